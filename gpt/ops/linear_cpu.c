/* A linear layer for a few rows in bfloat16 on a CPU with AVX512_BF16: out = x weight^T + bias.

   Every weight is read once, in the order in which they lie in memory, and meets all rows while it is in a register. So
   the time is that of reading the weights, and prefetching hides the latency of memory. Products accumulate in float32;
   the output is rounded once. One thread computes an output channel, and each row in the same order: neither the number
   of threads nor that of rows changes a bit.

   linear_cpu.py declares the same structure and functions. */
#if defined(__x86_64__) && defined(__linux__)

#include <stdint.h>
#include <string.h>

int linear_supported(void) {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

/* SHA-256 of this file, passed by the build. */
const char *linear_source(void) { return SOURCE; }

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include <immintrin.h>

enum {
  LANES = 32,           /* bfloat16 elements of a register */
  TILE_ROWS = 8,        /* rows whose sums are in registers at the same time */
  PREFETCH_BYTES = 4096 /* distance of the prefetch; 2048 and 8192 are as fast */
};

typedef uint16_t bf16;

typedef struct {
  const bf16 *x;      /* (rows, n_in) */
  const bf16 *weight; /* (n_out, n_in) */
  const float *bias;  /* (n_out); NULL: none */
  bf16 *out;          /* (rows, n_out) */
  int64_t rows, n_in, n_out, threads;
} Linear;

static inline __m512bh load(const bf16 *x) { return (__m512bh)_mm512_loadu_si512(x); }

/* Sums of the products of one output channel's weights with each of up to TILE_ROWS rows. `rows` is a constant wherever
   this is inlined, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void dot(const bf16 *x, const bf16 *weight, int64_t n, float *to,
                                                      const int rows) {
  __m512 sums[TILE_ROWS];
  for (int r = 0; r < rows; r++)
    sums[r] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    _mm_prefetch((const char *)(weight + i) + PREFETCH_BYTES, _MM_HINT_T0);
    const __m512bh w = load(weight + i);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
      sums[r] = _mm512_dpbf16_ps(sums[r], w, load(x + r * n + i));
  }
  if (i < n) {
    const __mmask32 rest = ((__mmask32)1 << (n - i)) - 1;
    const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(rest, weight + i);
    for (int r = 0; r < rows; r++)
      sums[r] = _mm512_dpbf16_ps(sums[r], w, (__m512bh)_mm512_maskz_loadu_epi16(rest, x + r * n + i));
  }
  for (int r = 0; r < rows; r++)
    to[r] = _mm512_reduce_add_ps(sums[r]);
}

static void dot_rows(const bf16 *x, const bf16 *weight, int64_t n, float *to, int rows) {
  switch (rows) {
#define CASE(ROWS)                                                                                                     \
  case ROWS:                                                                                                           \
    dot(x, weight, n, to, ROWS);                                                                                       \
    break;
    CASE(1)
    CASE(2)
    CASE(3)
    CASE(4)
    CASE(5)
    CASE(6)
    CASE(7)
    CASE(8)
#undef CASE
  }
}

static inline bf16 round_to_bf16(float x) {
  bf16 rounded;
  const __m128bh both = _mm_cvtneps_pbh(_mm_set_ss(x));
  memcpy(&rounded, &both, sizeof rounded);
  return rounded;
}

void linear_forward(const Linear *a) {
#pragma omp parallel for num_threads((int)a->threads) schedule(static)
  for (int64_t o = 0; o < a->n_out; o++)
    for (int64_t r = 0; r < a->rows; r += TILE_ROWS) {
      const int rows = (int)(a->rows - r < TILE_ROWS ? a->rows - r : TILE_ROWS);
      float sums[TILE_ROWS];
      dot_rows(a->x + r * a->n_in, a->weight + o * a->n_in, a->n_in, sums, rows);
      for (int i = 0; i < rows; i++)
        a->out[(r + i) * a->n_out + o] = round_to_bf16(sums[i] + (a->bias ? a->bias[o] : 0));
    }
}

#endif

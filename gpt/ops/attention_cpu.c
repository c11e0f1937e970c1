/* Causal attention in bfloat16 on a CPU with AVX512_BF16, forward and backward.

   Scores exist for one block of queries and one of keys at a time and never leave a core's cache (Dao et al. 2022,
   "FlashAttention"; the backward pass goes over blocks as in Dao 2023, "FlashAttention-2", algorithm 2). Products take
   bfloat16 and are added up in float32; between two products weights and the gradients of scores are rounded to bfloat16.
   One thread computes a head, in one order: how many threads there are changes no bit.

   attention.py declares the same structure and the same functions. Its caller sees to it that widths are multiples of 32
   and that the numbers of a row lie side by side. */
#if defined(__x86_64__) && defined(__linux__)

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int attention_runs_here(void) {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

/* Which source this was made of, as the one who compiled it says. */
const char *attention_source(void) { return SOURCE; }

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include <immintrin.h>

enum {
  QUERIES = 64, /* of a block */
  KEYS = 128,   /* of a block */
  ROWS = 8,     /* that `multiply` makes at once, in 16 registers: as many sums as hide the latency of adding to one */
  COLUMNS = 32  /* that `multiply` makes at once, and that a panel holds */
};

typedef uint16_t bf16;

/* (batch, heads, tokens, width) somewhere in memory; strides count numbers. */
typedef struct {
  bf16 *data;
  int64_t batch_stride, head_stride, token_stride;
} Tensor;

typedef struct {
  Tensor q, k, v, out;
  Tensor out_grad, q_grad, k_grad, v_grad; /* of the backward pass */
  float *log_sums;                         /* (batch, heads, tokens): log2 of the sum of a query's weights */
  const int32_t *begins;                   /* (batch, tokens): the first position that each one sees; NULL: 0 */
  int64_t batch, heads, tokens, width, threads;
} Attention;

static inline __m512i counting(void) { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

/* For each pair of 16-bit numbers where they come from: i and i + distance. */
static inline __m512i interleaving(int distance) {
  const __m512i twice = _mm512_mullo_epi32(counting(), _mm512_set1_epi32(0x10001));
  return _mm512_add_epi32(twice, _mm512_set1_epi32(distance << 16));
}

static inline __m512 widened(const bf16 *x) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
}

static inline void store_rounded(bf16 *to, __m512 x) {
  _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

/* 2 to the power of x, to 4e-6 of it; 0 below -200, and NaN stays NaN. */
static inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200), x); /* of a NaN and a number, max takes the second */
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.33335581e-3f); /* ln(2)^n / n!, from n = 5 on */
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(9.61812911e-3f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.55041087e-2f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.40226507e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.93147181e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1));
  return _mm512_scalef_ps(y, whole);
}

/* c (m x n) = a b, or with `add` c += a b. a: m x k, row by row. b: k x n in panels of 32 columns, in each of which every
   two rows are interleaved: [n / 32][k / 2][32][2]. m is a multiple of 8, n of 32, k of 2. */
static void multiply(const bf16 *a, int64_t a_stride, const bf16 *b, float *c, int64_t c_stride, int m, int n, int k,
                     int add) {
  for (int j = 0; j < n; j += COLUMNS, b += (int64_t)k * COLUMNS)
    for (int i = 0; i < m; i += ROWS) {
      const bf16 *from = a + i * a_stride;
      float *to = c + i * c_stride + j;
      __m512 sums[ROWS][2];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++)
        for (int half = 0; half < 2; half++)
          sums[r][half] = add ? _mm512_loadu_ps(to + r * c_stride + 16 * half) : _mm512_setzero_ps();
      for (int p = 0; p < k; p += 2) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(b + p * COLUMNS);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(b + p * COLUMNS + 32);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          int32_t pair;
          memcpy(&pair, from + r * a_stride + p, sizeof pair);
          const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++)
        for (int half = 0; half < 2; half++)
          _mm512_storeu_ps(to + r * c_stride + 16 * half, sums[r][half]);
    }
}

/* to[j][i] = from[i][j], of 4 bytes each; `rows` is a multiple of 16. */
static void transpose(const void *from, int64_t from_stride, void *to, int64_t to_stride, int rows, int columns) {
  const int32_t *in = from;
  int32_t *out = to;
  const __m512i column = _mm512_mullo_epi32(counting(), _mm512_set1_epi32((int)from_stride));
  for (int i = 0; i < rows; i += 16)
    for (int j = 0; j < columns; j++)
      _mm512_storeu_si512(out + j * to_stride + i, _mm512_i32gather_epi32(column, in + i * from_stride + j, 4));
}

/* rows x width, as `multiply` takes b. */
static void panels(const bf16 *from, bf16 *to, int rows, int64_t width) {
  const __m512i low = interleaving(32), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int j = 0; j < width; j += COLUMNS)
    for (int i = 0; i < rows; i += 2, to += 2 * COLUMNS) {
      const __m512i first = _mm512_loadu_si512(from + i * width + j);
      const __m512i second = _mm512_loadu_si512(from + (i + 1) * width + j);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, low, second));
      _mm512_storeu_si512(to + COLUMNS, _mm512_permutex2var_epi16(first, high, second));
    }
}

/* The same for each block of rows by itself. */
static void block_panels(const bf16 *from, bf16 *to, int64_t rows, int block, int64_t width) {
  for (int64_t i = 0; i < rows; i += block)
    panels(from + i * width, to + i * width, block, width);
}

/* The transposed of rows x width, as `multiply` takes b; `rows` is a multiple of 32. */
static void transposed_panels(const bf16 *from, bf16 *to, int rows, int64_t width) {
  for (int64_t i = 0; i < rows; i += COLUMNS)
    transpose(from + i * width, width / 2, to + i * width, COLUMNS, COLUMNS, (int)width / 2);
}

static inline bf16 *row(const Tensor *t, int64_t b, int64_t h, int64_t i) {
  return t->data + b * t->batch_stride + h * t->head_stride + i * t->token_stride;
}

/* n rows of a head from the i-th on, one after the other; those beyond the last one are 0. */
static void gather(const Attention *a, const Tensor *t, int64_t b, int64_t h, int64_t i, int n, bf16 *to) {
  for (int r = 0; r < n; r++, to += a->width)
    if (i + r < a->tokens)
      memcpy(to, row(t, b, h, i + r), a->width * sizeof(bf16));
    else
      memset(to, 0, a->width * sizeof(bf16));
}

/* n rows of a head from the i-th on, times `scale`; those beyond the last one are left out. */
static void scatter(const Attention *a, const float *rows, const Tensor *t, int64_t b, int64_t h, int64_t i, int n,
                    float scale) {
  for (int r = 0; r < n && i + r < a->tokens; r++)
    for (int64_t d = 0; d < a->width; d += 16)
      store_rounded(row(t, b, h, i + r) + d,
                    _mm512_mul_ps(_mm512_loadu_ps(rows + r * a->width + d), _mm512_set1_ps(scale)));
}

static int least(int64_t x, int64_t y) { return (int)(x < y ? x : y); }

/* What makes a product of query and key a score, whose power of two its weight is. */
static float score_scale(const Attention *a) { return (float)(M_LOG2E / sqrt((double)a->width)); }

static int64_t padded(const Attention *a) { return (a->tokens + KEYS - 1) / KEYS * KEYS; }

static int64_t begin_of(const Attention *a, int64_t b, int64_t i) {
  return a->begins ? a->begins[b * a->tokens + least(i, a->tokens - 1)] : 0;
}

/* The running state of a block of queries: what it has taken from the keys so far. */
typedef struct {
  float largest[QUERIES], sums[QUERIES]; /* of scores; of weights, which are 2^(score - largest) */
  float *out;                            /* QUERIES x width: weighted values, not yet divided by their weights' sum */
} Taken;

/* Scores of a query with keys j .. j + n of a block become weights; what was taken before shrinks if they are larger. */
static void weigh(float *scores, bf16 *weights, Taken *taken, int r, int n, int64_t first, int64_t last, int64_t width,
                  float scale) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int j = 0; j < n; j += 16) {
    const __m512i key = _mm512_add_epi32(counting(), _mm512_set1_epi32(j));
    const __mmask16 seen = _mm512_cmple_epi32_mask(key, _mm512_set1_epi32((int)last)) &
                           _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32((int)first));
    const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(scale));
    const __m512 visible = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, score);
    _mm512_storeu_ps(scores + j, visible);
    most = _mm512_max_ps(most, visible);
  }
  const float before = taken->largest[r], here = _mm512_reduce_max_ps(most), now = here > before ? here : before;
  const __m512 reference = _mm512_set1_ps(now == -INFINITY ? 0 : now); /* with none seen so far, all weights are 0 */
  __m512 sum = _mm512_setzero_ps();
  for (int j = 0; j < n; j += 32) {
    const __m512 left = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + j), reference));
    const __m512 right = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + j + 16), reference));
    sum = _mm512_add_ps(sum, _mm512_add_ps(left, right));
    _mm512_storeu_si512(weights + j, (__m512i)_mm512_cvtne2ps_pbh(right, left));
  }
  if (now != before) {
    const __m512 shrink = power_of_two(_mm512_set1_ps(before - now));
    float *out = taken->out + r * width;
    for (int64_t d = 0; d < width; d += 16)
      _mm512_storeu_ps(out + d, _mm512_mul_ps(_mm512_loadu_ps(out + d), shrink));
    taken->sums[r] *= _mm512_cvtss_f32(shrink);
    taken->largest[r] = now;
  }
  taken->sums[r] += _mm512_reduce_add_ps(sum);
}

static void forward_of_head(const Attention *a, int64_t b, int64_t h, void *scratch) {
  const int64_t width = a->width, all = padded(a) * width;
  const float scale = score_scale(a);
  bf16 *rows = scratch, *keys = rows + all, *values = keys + all;
  bf16 *weights = values + all, *queries = weights + QUERIES * KEYS;
  float *scores = (float *)(queries + QUERIES * width);
  Taken taken = {.out = scores + QUERIES * KEYS};
  float *log_sums = a->log_sums + (b * a->heads + h) * a->tokens;
  gather(a, &a->k, b, h, 0, (int)padded(a), rows);
  transposed_panels(rows, keys, (int)padded(a), width);
  gather(a, &a->v, b, h, 0, (int)padded(a), rows);
  block_panels(rows, values, padded(a), KEYS, width);
  for (int64_t i = 0; i < a->tokens; i += QUERIES) {
    gather(a, &a->q, b, h, i, QUERIES, queries);
    memset(taken.out, 0, QUERIES * width * sizeof(float));
    for (int r = 0; r < QUERIES; r++)
      taken.largest[r] = -INFINITY, taken.sums[r] = 0;
    for (int64_t j = begin_of(a, b, i) / KEYS * KEYS; j < i + QUERIES; j += KEYS) {
      const int n = least(KEYS, i + QUERIES - j);
      multiply(queries, width, keys + j * width, scores, KEYS, QUERIES, n, (int)width, 0);
      for (int r = 0; r < QUERIES; r++)
        weigh(scores + r * KEYS, weights + r * KEYS, &taken, r, n, begin_of(a, b, i + r) - j, i + r - j, width, scale);
      for (int64_t d = 0; d < width; d += COLUMNS)
        multiply(weights, KEYS, values + j * width + d * KEYS, taken.out + d, width, QUERIES, COLUMNS, n, 1);
    }
    for (int r = 0; r < QUERIES && i + r < a->tokens; r++) {
      scatter(a, taken.out + r * width, &a->out, b, h, i + r, 1, 1 / taken.sums[r]);
      log_sums[i + r] = taken.largest[r] + log2f(taken.sums[r]);
    }
  }
}

/* What the backward pass makes of a block of scores: keys x queries, row by row, and the last also as a product's b. */
typedef struct {
  bf16 *weights, *score_grads, *score_grad_panels;
} Slopes;

/* Scores of n keys from the j-th on with the queries from the i-th on, and their weights' gradients, become weights and
   the scores' gradients. log_sums are those queries', means what their weights' gradients are on the average. */
static void differentiate(const Attention *a, const float *scores, const float *weight_grads, const Slopes *to,
                          const float *log_sums, const float *means, int64_t b, int64_t i, int64_t j, int n) {
  const __m512 scale = _mm512_set1_ps(score_scale(a));
  int32_t firsts[QUERIES];
  for (int c = 0; c < QUERIES; c++)
    firsts[c] = (int32_t)begin_of(a, b, i + c);
  for (int r = 0; r < n; r += 2)
    for (int c = 0; c < QUERIES; c += 16) {
      const __m512i first = _mm512_loadu_si512(firsts + c);
      const __m512i last = _mm512_add_epi32(counting(), _mm512_set1_epi32((int)i + c));
      __m512 weight[2], grad[2];
      for (int y = 0; y < 2; y++) {
        const int at = (r + y) * QUERIES + c;
        const __m512i key = _mm512_set1_epi32((int)j + r + y);
        const __mmask16 seen = _mm512_cmple_epi32_mask(key, last) & _mm512_cmpge_epi32_mask(key, first);
        const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + at), scale);
        weight[y] = _mm512_maskz_mov_ps(seen, power_of_two(_mm512_sub_ps(score, _mm512_loadu_ps(log_sums + c))));
        grad[y] = _mm512_sub_ps(_mm512_loadu_ps(weight_grads + at), _mm512_loadu_ps(means + c));
        grad[y] = _mm512_maskz_mul_ps(seen, weight[y], grad[y]);
        store_rounded(to->weights + at, weight[y]);
        store_rounded(to->score_grads + at, grad[y]);
      }
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(grad[1], grad[0]);
      bf16 *panel = to->score_grad_panels + c / COLUMNS * COLUMNS * n + r * COLUMNS + c % COLUMNS * 2;
      _mm512_storeu_si512(panel, _mm512_permutexvar_epi16(interleaving(16), both));
    }
}

/* Of each query the gradient of its weights, on the average by its weights: the product of its result and that one's
   gradient (Dao et al. 2022, appendix B.2). */
static void mean_grads(const Attention *a, int64_t b, int64_t h, const bf16 *out_grads, float *means) {
  for (int64_t i = 0; i < a->tokens; i++) {
    const bf16 *grad = out_grads + i * a->width, *out = row(&a->out, b, h, i);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < a->width; d += 16)
      sum = _mm512_fmadd_ps(widened(grad + d), widened(out + d), sum);
    means[i] = _mm512_reduce_add_ps(sum);
  }
}

static void backward_of_head(const Attention *a, int64_t b, int64_t h, void *scratch) {
  const int64_t width = a->width, all = padded(a) * width;
  const float scale = (float)(1 / sqrt((double)width));
  bf16 *keys = scratch, *values = keys + all, *turned_keys = values + all;
  bf16 *queries = turned_keys + all, *query_panels = queries + all;
  bf16 *grads = query_panels + all, *grad_panels = grads + all, *rows = grad_panels + all;
  const Slopes slopes = {rows + all, rows + all + KEYS * QUERIES, rows + all + 2 * KEYS * QUERIES};
  float *turned_q_grad = (float *)(rows + all + 3 * KEYS * QUERIES), *k_grad = turned_q_grad + all;
  float *v_grad = k_grad + KEYS * width, *scores = v_grad + KEYS * width, *weight_grads = scores + KEYS * QUERIES;
  float *log_sums = weight_grads + KEYS * QUERIES, *means = log_sums + padded(a);
  gather(a, &a->k, b, h, 0, (int)padded(a), keys);
  gather(a, &a->v, b, h, 0, (int)padded(a), values);
  for (int64_t j = 0; j < padded(a); j += KEYS) {
    panels(keys + j * width, rows, KEYS, width); /* pairs of keys, which are then turned as they are */
    for (int64_t d = 0; d < width; d += COLUMNS)
      transpose(rows + d * KEYS, COLUMNS, turned_keys + j * width + d * KEYS, KEYS / 2, KEYS / 2, COLUMNS);
  }
  gather(a, &a->q, b, h, 0, (int)padded(a), rows);
  transposed_panels(rows, queries, (int)padded(a), width);
  block_panels(rows, query_panels, padded(a), QUERIES, width);
  gather(a, &a->out_grad, b, h, 0, (int)padded(a), rows);
  transposed_panels(rows, grads, (int)padded(a), width);
  block_panels(rows, grad_panels, padded(a), QUERIES, width);
  for (int64_t i = a->tokens; i < padded(a); i++)
    log_sums[i] = INFINITY, means[i] = 0; /* weights of 0 */
  memcpy(log_sums, a->log_sums + (b * a->heads + h) * a->tokens, a->tokens * sizeof(float));
  mean_grads(a, b, h, rows, means);
  memset(turned_q_grad, 0, all * sizeof(float));
  for (int64_t j = 0; j < a->tokens; j += KEYS) {
    memset(k_grad, 0, 2 * KEYS * width * sizeof(float)); /* and v_grad */
    for (int64_t i = j; i < a->tokens && begin_of(a, b, i) < j + KEYS; i += QUERIES) {
      const int n = least(KEYS, i + QUERIES - j);
      multiply(keys + j * width, width, queries + i * width, scores, QUERIES, n, QUERIES, (int)width, 0);
      multiply(values + j * width, width, grads + i * width, weight_grads, QUERIES, n, QUERIES, (int)width, 0);
      differentiate(a, scores, weight_grads, &slopes, log_sums + i, means + i, b, i, j, n);
      multiply(slopes.weights, QUERIES, grad_panels + i * width, v_grad, width, n, (int)width, QUERIES, 1);
      multiply(slopes.score_grads, QUERIES, query_panels + i * width, k_grad, width, n, (int)width, QUERIES, 1);
      multiply(turned_keys + j * width, KEYS, slopes.score_grad_panels, turned_q_grad + i * width, QUERIES, (int)width,
               QUERIES, n, 1);
    }
    scatter(a, k_grad, &a->k_grad, b, h, j, KEYS, scale);
    scatter(a, v_grad, &a->v_grad, b, h, j, KEYS, 1);
  }
  float *q_grad = k_grad; /* of a block */
  for (int64_t i = 0; i < a->tokens; i += QUERIES) {
    transpose(turned_q_grad + i * width, QUERIES, q_grad, width, (int)width, QUERIES);
    scatter(a, q_grad, &a->q_grad, b, h, i, QUERIES, scale);
  }
}

/* Whether there was memory. */
static int for_each_head(const Attention *a, int64_t bytes,
                         void (*compute)(const Attention *, int64_t, int64_t, void *)) {
  int failed = 0;
#pragma omp parallel num_threads((int)a->threads) reduction(| : failed)
  {
    void *scratch = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    failed = !scratch;
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < a->batch * a->heads; n++)
      if (scratch)
        compute(a, n / a->heads, n % a->heads, scratch);
    free(scratch);
  }
  return !failed;
}

int attention_forward(const Attention *a) {
  const int64_t bf16s = 3 * padded(a) * a->width + QUERIES * (KEYS + a->width), floats = QUERIES * (KEYS + a->width);
  return for_each_head(a, 2 * bf16s + 4 * floats, forward_of_head);
}

int attention_backward(const Attention *a) {
  const int64_t bf16s = 8 * padded(a) * a->width + 3 * KEYS * QUERIES;
  const int64_t floats = padded(a) * (a->width + 2) + 2 * KEYS * (a->width + QUERIES);
  return for_each_head(a, 2 * bf16s + 4 * floats, backward_of_head);
}

#endif

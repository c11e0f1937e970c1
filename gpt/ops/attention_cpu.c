/* Causal attention in bfloat16 on a CPU with AVX512_BF16, forward and backward.

   Scores exist for one block of queries and one of keys at a time and never leave a core's cache (Dao et al. 2022,
   "FlashAttention"; the backward pass goes over blocks as in Dao 2023, "FlashAttention-2", algorithm 2). Matmuls take
   bfloat16 and accumulate in float32; weights and score gradients are rounded to bfloat16 before the next matmul. One
   thread computes a head, always in the same order: the number of threads changes no bit.

   attention_cpu.py declares the same structure and functions, and checks that head_dim is a multiple of 32 and that the
   channels of a row are contiguous. */
#if defined(__x86_64__) && defined(__linux__)

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int attention_supported(void) {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

/* SHA-256 of this file, passed by the build. */
const char *attention_source(void) { return SOURCE; }

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include <immintrin.h>

enum {
  BLOCK_Q = 64,  /* queries of a block */
  BLOCK_K = 128, /* keys of a block */
  TILE_M = 8,    /* rows of a tile of `matmul`: 16 registers of sums, enough to hide the latency of an addition */
  TILE_N = 32    /* columns of a tile of `matmul`, and of a panel */
};

typedef uint16_t bf16;

/* (batch, heads, tokens, head_dim); strides count elements. */
typedef struct {
  bf16 *data;
  int64_t batch_stride, head_stride, token_stride;
} Tensor;

typedef struct {
  Tensor q, k, v, out;
  Tensor out_grad, q_grad, k_grad, v_grad; /* backward pass only */
  float *log_sums;                         /* (batch, heads, tokens): log2 of each query's softmax denominator */
  const int32_t *doc_starts;               /* (batch, tokens): first position that each attends to; NULL: 0 */
  int64_t batch, heads, tokens, head_dim, threads;
} Attention;

static inline __m512i lane_indices(void) {
  return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}

/* Permutation that interleaves 16-bit elements: pair i comes from elements i and i + distance. */
static inline __m512i interleave_index(int distance) {
  const __m512i twice = _mm512_mullo_epi32(lane_indices(), _mm512_set1_epi32(0x10001));
  return _mm512_add_epi32(twice, _mm512_set1_epi32(distance << 16));
}

static inline __m512 load_bf16(const bf16 *x) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
}

static inline void store_bf16(bf16 *to, __m512 x) {
  _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

/* 2^x, with a relative error of at most 4e-6; 0 below -200; NaN stays NaN. */
static inline __m512 exp2_ps(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200), x); /* max returns its second operand if one is NaN */
  const __m512 integer = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 fraction = _mm512_sub_ps(x, integer);
  __m512 y = _mm512_set1_ps(1.33335581e-3f); /* coefficients ln(2)^n / n!, n = 5 down to 0 */
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(9.61812911e-3f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(5.55041087e-2f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(2.40226507e-1f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(6.93147181e-1f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(1));
  return _mm512_scalef_ps(y, integer);
}

/* c (m x n) = a b, or with `add` c += a b. a: m x k, row-major. b: k x n, packed in panels of 32 columns in which pairs
   of rows are interleaved: [n / 32][k / 2][32][2]. m is a multiple of 8, n of 32, k of 2. */
static void matmul(const bf16 *a, int64_t a_stride, const bf16 *b, float *c, int64_t c_stride, int m, int n, int k,
                   int add) {
  for (int j = 0; j < n; j += TILE_N, b += (int64_t)k * TILE_N)
    for (int i = 0; i < m; i += TILE_M) {
      const bf16 *from = a + i * a_stride;
      float *to = c + i * c_stride + j;
      __m512 sums[TILE_M][2];
#pragma GCC unroll 8
      for (int r = 0; r < TILE_M; r++)
        for (int half = 0; half < 2; half++)
          sums[r][half] = add ? _mm512_loadu_ps(to + r * c_stride + 16 * half) : _mm512_setzero_ps();
      for (int p = 0; p < k; p += 2) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(b + p * TILE_N);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(b + p * TILE_N + 32);
#pragma GCC unroll 8
        for (int r = 0; r < TILE_M; r++) {
          int32_t pair;
          memcpy(&pair, from + r * a_stride + p, sizeof pair);
          const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < TILE_M; r++)
        for (int half = 0; half < 2; half++)
          _mm512_storeu_ps(to + r * c_stride + 16 * half, sums[r][half]);
    }
}

/* to[j][i] = from[i][j], elements of 4 bytes; `rows` is a multiple of 16. */
static void transpose(const void *from, int64_t from_stride, void *to, int64_t to_stride, int rows, int columns) {
  const int32_t *in = from;
  int32_t *out = to;
  const __m512i column = _mm512_mullo_epi32(lane_indices(), _mm512_set1_epi32((int)from_stride));
  for (int i = 0; i < rows; i += 16)
    for (int j = 0; j < columns; j++)
      _mm512_storeu_si512(out + j * to_stride + i, _mm512_i32gather_epi32(column, in + i * from_stride + j, 4));
}

/* Pack rows x head_dim as `matmul` takes b. */
static void pack(const bf16 *from, bf16 *to, int rows, int64_t dim) {
  const __m512i low = interleave_index(32), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int j = 0; j < dim; j += TILE_N)
    for (int i = 0; i < rows; i += 2, to += 2 * TILE_N) {
      const __m512i first = _mm512_loadu_si512(from + i * dim + j);
      const __m512i second = _mm512_loadu_si512(from + (i + 1) * dim + j);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, low, second));
      _mm512_storeu_si512(to + TILE_N, _mm512_permutex2var_epi16(first, high, second));
    }
}

/* Pack each block of rows separately. */
static void pack_blocks(const bf16 *from, bf16 *to, int64_t rows, int block, int64_t dim) {
  for (int64_t i = 0; i < rows; i += block)
    pack(from + i * dim, to + i * dim, block, dim);
}

/* Pack the transpose of rows x head_dim as `matmul` takes b; `rows` is a multiple of 32. */
static void pack_transposed(const bf16 *from, bf16 *to, int rows, int64_t dim) {
  for (int64_t i = 0; i < rows; i += TILE_N)
    transpose(from + i * dim, dim / 2, to + i * dim, TILE_N, TILE_N, (int)dim / 2);
}

static inline bf16 *row(const Tensor *t, int64_t b, int64_t h, int64_t i) {
  return t->data + b * t->batch_stride + h * t->head_stride + i * t->token_stride;
}

/* Copy n rows of a head, from row i, to contiguous memory; rows past the end are 0. */
static void gather(const Attention *a, const Tensor *t, int64_t b, int64_t h, int64_t i, int n, bf16 *to) {
  for (int r = 0; r < n; r++, to += a->head_dim)
    if (i + r < a->tokens)
      memcpy(to, row(t, b, h, i + r), a->head_dim * sizeof(bf16));
    else
      memset(to, 0, a->head_dim * sizeof(bf16));
}

/* Write n rows times `scale` to a head, from row i; rows past the end are skipped. */
static void scatter(const Attention *a, const float *rows, const Tensor *t, int64_t b, int64_t h, int64_t i, int n,
                    float scale) {
  for (int r = 0; r < n && i + r < a->tokens; r++)
    for (int64_t d = 0; d < a->head_dim; d += 16)
      store_bf16(row(t, b, h, i + r) + d,
                 _mm512_mul_ps(_mm512_loadu_ps(rows + r * a->head_dim + d), _mm512_set1_ps(scale)));
}

static int min_int(int64_t x, int64_t y) { return (int)(x < y ? x : y); }

/* Scale of query-key products, such that weights are 2^score. */
static float score_scale(const Attention *a) { return (float)(M_LOG2E / sqrt((double)a->head_dim)); }

/* Tokens rounded up to full blocks of keys. */
static int64_t padded_tokens(const Attention *a) { return (a->tokens + BLOCK_K - 1) / BLOCK_K * BLOCK_K; }

static int64_t doc_start(const Attention *a, int64_t b, int64_t i) {
  return a->doc_starts ? a->doc_starts[b * a->tokens + min_int(i, a->tokens - 1)] : 0;
}

/* Online softmax of a block of queries (Milakov and Gimelshein 2018). */
typedef struct {
  float max[BLOCK_Q], sums[BLOCK_Q]; /* running maximum of the scores; running sum of the weights 2^(score - max) */
  float *out;                        /* BLOCK_Q x head_dim: weighted values, not yet divided by the sum of weights */
} Softmax;

/* Turn query r's scores with the n keys of a block into weights; keys outside first .. last are masked. Where the
   maximum grows, earlier sums and outputs are rescaled. */
static void update_softmax(float *scores, bf16 *weights, Softmax *softmax, int r, int n, int64_t first, int64_t last,
                           int64_t dim, float scale) {
  __m512 block_max = _mm512_set1_ps(-INFINITY);
  for (int j = 0; j < n; j += 16) {
    const __m512i key = _mm512_add_epi32(lane_indices(), _mm512_set1_epi32(j));
    const __mmask16 is_allowed = _mm512_cmple_epi32_mask(key, _mm512_set1_epi32((int)last)) &
                                 _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32((int)first));
    const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(scale));
    const __m512 allowed = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), is_allowed, score);
    _mm512_storeu_ps(scores + j, allowed);
    block_max = _mm512_max_ps(block_max, allowed);
  }
  const float before = softmax->max[r], current = _mm512_reduce_max_ps(block_max);
  const float max = current > before ? current : before;
  const __m512 reference = _mm512_set1_ps(max == -INFINITY ? 0 : max); /* all masked: weights are 0 */
  __m512 sum = _mm512_setzero_ps();
  for (int j = 0; j < n; j += 32) {
    const __m512 left = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + j), reference));
    const __m512 right = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + j + 16), reference));
    sum = _mm512_add_ps(sum, _mm512_add_ps(left, right));
    _mm512_storeu_si512(weights + j, (__m512i)_mm512_cvtne2ps_pbh(right, left));
  }
  if (max != before) {
    const __m512 rescale = exp2_ps(_mm512_set1_ps(before - max));
    float *out = softmax->out + r * dim;
    for (int64_t d = 0; d < dim; d += 16)
      _mm512_storeu_ps(out + d, _mm512_mul_ps(_mm512_loadu_ps(out + d), rescale));
    softmax->sums[r] *= _mm512_cvtss_f32(rescale);
    softmax->max[r] = max;
  }
  softmax->sums[r] += _mm512_reduce_add_ps(sum);
}

static void head_forward(const Attention *a, int64_t b, int64_t h, void *scratch) {
  const int64_t dim = a->head_dim, all = padded_tokens(a) * dim;
  const float scale = score_scale(a);
  bf16 *rows = scratch, *keys = rows + all, *values = keys + all;
  bf16 *weights = values + all, *queries = weights + BLOCK_Q * BLOCK_K;
  float *scores = (float *)(queries + BLOCK_Q * dim);
  Softmax softmax = {.out = scores + BLOCK_Q * BLOCK_K};
  float *log_sums = a->log_sums + (b * a->heads + h) * a->tokens;
  gather(a, &a->k, b, h, 0, (int)padded_tokens(a), rows);
  pack_transposed(rows, keys, (int)padded_tokens(a), dim);
  gather(a, &a->v, b, h, 0, (int)padded_tokens(a), rows);
  pack_blocks(rows, values, padded_tokens(a), BLOCK_K, dim);
  for (int64_t i = 0; i < a->tokens; i += BLOCK_Q) {
    gather(a, &a->q, b, h, i, BLOCK_Q, queries);
    memset(softmax.out, 0, BLOCK_Q * dim * sizeof(float));
    for (int r = 0; r < BLOCK_Q; r++)
      softmax.max[r] = -INFINITY, softmax.sums[r] = 0;
    for (int64_t j = doc_start(a, b, i) / BLOCK_K * BLOCK_K; j < i + BLOCK_Q; j += BLOCK_K) {
      const int n = min_int(BLOCK_K, i + BLOCK_Q - j);
      matmul(queries, dim, keys + j * dim, scores, BLOCK_K, BLOCK_Q, n, (int)dim, 0);
      for (int r = 0; r < BLOCK_Q; r++)
        update_softmax(scores + r * BLOCK_K, weights + r * BLOCK_K, &softmax, r, n, doc_start(a, b, i + r) - j,
                       i + r - j, dim, scale);
      for (int64_t d = 0; d < dim; d += TILE_N)
        matmul(weights, BLOCK_K, values + j * dim + d * BLOCK_K, softmax.out + d, dim, BLOCK_Q, TILE_N, n, 1);
    }
    for (int r = 0; r < BLOCK_Q && i + r < a->tokens; r++) {
      scatter(a, softmax.out + r * dim, &a->out, b, h, i + r, 1, 1 / softmax.sums[r]);
      log_sums[i + r] = softmax.max[r] + log2f(softmax.sums[r]);
    }
  }
}

/* Outputs of a block's softmax backward: keys x queries, row-major; score gradients also packed as `matmul` takes b. */
typedef struct {
  bf16 *weights, *score_grads, *packed_score_grads;
} SoftmaxGrads;

/* Compute weights and score gradients from the scores of n keys, from key j, with the queries from query i, and from
   the weights' gradients. log_sums and means (of `mean_grads`) are those queries'. */
static void softmax_backward(const Attention *a, const float *scores, const float *weight_grads, const SoftmaxGrads *to,
                             const float *log_sums, const float *means, int64_t b, int64_t i, int64_t j, int n) {
  const __m512 scale = _mm512_set1_ps(score_scale(a));
  int32_t firsts[BLOCK_Q];
  for (int c = 0; c < BLOCK_Q; c++)
    firsts[c] = (int32_t)doc_start(a, b, i + c);
  for (int r = 0; r < n; r += 2)
    for (int c = 0; c < BLOCK_Q; c += 16) {
      const __m512i first = _mm512_loadu_si512(firsts + c);
      const __m512i last = _mm512_add_epi32(lane_indices(), _mm512_set1_epi32((int)i + c));
      __m512 weight[2], grad[2];
      for (int y = 0; y < 2; y++) {
        const int at = (r + y) * BLOCK_Q + c;
        const __m512i key = _mm512_set1_epi32((int)j + r + y);
        const __mmask16 is_allowed = _mm512_cmple_epi32_mask(key, last) & _mm512_cmpge_epi32_mask(key, first);
        const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + at), scale);
        weight[y] = _mm512_maskz_mov_ps(is_allowed, exp2_ps(_mm512_sub_ps(score, _mm512_loadu_ps(log_sums + c))));
        grad[y] = _mm512_sub_ps(_mm512_loadu_ps(weight_grads + at), _mm512_loadu_ps(means + c));
        grad[y] = _mm512_maskz_mul_ps(is_allowed, weight[y], grad[y]);
        store_bf16(to->weights + at, weight[y]);
        store_bf16(to->score_grads + at, grad[y]);
      }
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(grad[1], grad[0]);
      bf16 *packed = to->packed_score_grads + c / TILE_N * TILE_N * n + r * TILE_N + c % TILE_N * 2;
      _mm512_storeu_si512(packed, _mm512_permutexvar_epi16(interleave_index(16), both));
    }
}

/* Each query's mean gradient of its weights, weighted by them: the dot product of its output and the output's gradient
   (Dao et al. 2022, appendix B.2). */
static void mean_grads(const Attention *a, int64_t b, int64_t h, const bf16 *out_grads, float *means) {
  for (int64_t i = 0; i < a->tokens; i++) {
    const bf16 *grad = out_grads + i * a->head_dim, *out = row(&a->out, b, h, i);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < a->head_dim; d += 16)
      sum = _mm512_fmadd_ps(load_bf16(grad + d), load_bf16(out + d), sum);
    means[i] = _mm512_reduce_add_ps(sum);
  }
}

static void head_backward(const Attention *a, int64_t b, int64_t h, void *scratch) {
  const int64_t dim = a->head_dim, all = padded_tokens(a) * dim;
  const float scale = (float)(1 / sqrt((double)dim));
  bf16 *keys = scratch, *values = keys + all, *transposed_keys = values + all;
  bf16 *queries = transposed_keys + all, *packed_queries = queries + all;
  bf16 *grads = packed_queries + all, *packed_grads = grads + all, *rows = packed_grads + all;
  const SoftmaxGrads block = {rows + all, rows + all + BLOCK_K * BLOCK_Q, rows + all + 2 * BLOCK_K * BLOCK_Q};
  float *transposed_q_grad = (float *)(rows + all + 3 * BLOCK_K * BLOCK_Q), *k_grad = transposed_q_grad + all;
  float *v_grad = k_grad + BLOCK_K * dim, *scores = v_grad + BLOCK_K * dim, *weight_grads = scores + BLOCK_K * BLOCK_Q;
  float *log_sums = weight_grads + BLOCK_K * BLOCK_Q, *means = log_sums + padded_tokens(a);
  gather(a, &a->k, b, h, 0, (int)padded_tokens(a), keys);
  gather(a, &a->v, b, h, 0, (int)padded_tokens(a), values);
  for (int64_t j = 0; j < padded_tokens(a); j += BLOCK_K) {
    pack(keys + j * dim, rows, BLOCK_K, dim); /* interleaved pairs of keys, transposed below */
    for (int64_t d = 0; d < dim; d += TILE_N)
      transpose(rows + d * BLOCK_K, TILE_N, transposed_keys + j * dim + d * BLOCK_K, BLOCK_K / 2, BLOCK_K / 2, TILE_N);
  }
  gather(a, &a->q, b, h, 0, (int)padded_tokens(a), rows);
  pack_transposed(rows, queries, (int)padded_tokens(a), dim);
  pack_blocks(rows, packed_queries, padded_tokens(a), BLOCK_Q, dim);
  gather(a, &a->out_grad, b, h, 0, (int)padded_tokens(a), rows);
  pack_transposed(rows, grads, (int)padded_tokens(a), dim);
  pack_blocks(rows, packed_grads, padded_tokens(a), BLOCK_Q, dim);
  for (int64_t i = a->tokens; i < padded_tokens(a); i++)
    log_sums[i] = INFINITY, means[i] = 0; /* padding: weights of 0 */
  memcpy(log_sums, a->log_sums + (b * a->heads + h) * a->tokens, a->tokens * sizeof(float));
  mean_grads(a, b, h, rows, means);
  memset(transposed_q_grad, 0, all * sizeof(float));
  for (int64_t j = 0; j < a->tokens; j += BLOCK_K) {
    memset(k_grad, 0, 2 * BLOCK_K * dim * sizeof(float)); /* and v_grad, which follows it */
    for (int64_t i = j; i < a->tokens && doc_start(a, b, i) < j + BLOCK_K; i += BLOCK_Q) {
      const int n = min_int(BLOCK_K, i + BLOCK_Q - j);
      matmul(keys + j * dim, dim, queries + i * dim, scores, BLOCK_Q, n, BLOCK_Q, (int)dim, 0);
      matmul(values + j * dim, dim, grads + i * dim, weight_grads, BLOCK_Q, n, BLOCK_Q, (int)dim, 0);
      softmax_backward(a, scores, weight_grads, &block, log_sums + i, means + i, b, i, j, n);
      matmul(block.weights, BLOCK_Q, packed_grads + i * dim, v_grad, dim, n, (int)dim, BLOCK_Q, 1);
      matmul(block.score_grads, BLOCK_Q, packed_queries + i * dim, k_grad, dim, n, (int)dim, BLOCK_Q, 1);
      matmul(transposed_keys + j * dim, BLOCK_K, block.packed_score_grads, transposed_q_grad + i * dim, BLOCK_Q,
             (int)dim, BLOCK_Q, n, 1);
    }
    scatter(a, k_grad, &a->k_grad, b, h, j, BLOCK_K, scale);
    scatter(a, v_grad, &a->v_grad, b, h, j, BLOCK_K, 1);
  }
  float *q_grad = k_grad; /* of one block; k_grad is no longer needed */
  for (int64_t i = 0; i < a->tokens; i += BLOCK_Q) {
    transpose(transposed_q_grad + i * dim, BLOCK_Q, q_grad, dim, (int)dim, BLOCK_Q);
    scatter(a, q_grad, &a->q_grad, b, h, i, BLOCK_Q, scale);
  }
}

/* Call `compute` for each head, with scratch memory of its thread; return 0 if out of memory. */
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
  const int64_t floats = BLOCK_Q * (BLOCK_K + a->head_dim);
  const int64_t bf16s = 3 * padded_tokens(a) * a->head_dim + BLOCK_Q * (BLOCK_K + a->head_dim);
  return for_each_head(a, 2 * bf16s + 4 * floats, head_forward);
}

int attention_backward(const Attention *a) {
  const int64_t bf16s = 8 * padded_tokens(a) * a->head_dim + 3 * BLOCK_K * BLOCK_Q;
  const int64_t floats = padded_tokens(a) * (a->head_dim + 2) + 2 * BLOCK_K * (a->head_dim + BLOCK_Q);
  return for_each_head(a, 2 * bf16s + 4 * floats, head_backward);
}

#endif

/* Attention of single queries to paged keys where they lie; paged_attention.py calls it.

   query, result  [...][num_heads][D], float32 or bfloat16
   keys, values   [slots][num_kv_heads][D], float32 or bfloat16, or int8 with a bfloat16 scale for
                  each slot and KV head
   Scores and sums are in float32, each result is rounded once. Keys are taken CHUNK at a time, with
   the softmax's maximum and sum carried along (Milakov and Gimelshein, 2018), so a query's bits do
   not depend on other queries nor on the number of threads. */

#include "vectors.h"

#define CHUNK 64
/* query heads of a KV head that are computed at once, so that their sums stay in registers */
#define MAX_GROUP 4
#define MAX_D 256
/* how many keys ahead of their use they are loaded */
#define AHEAD 8
/* fewer numbers than this are one thread's: waking others costs more */
#define MIN_SHARED 65536

/* D is a multiple of it, and not above the other */
int64_t paged_attention_multiple(void) { return 2 * LANES; }
int64_t paged_attention_most(void) { return MAX_D; }

typedef struct {
  int kind, cache_kind;
  int64_t num_heads, num_kv_heads, D, block_size;
  float scale;
  const void *query, *keys, *values, *key_scales, *value_scales;
  void *result;
} Attention;

/* Of some heads, after the keys so far: greatest scores, sums of weights, and of weighted values. */
typedef struct {
  float greatest[MAX_GROUP], total[MAX_GROUP];
  float sums[MAX_GROUP * MAX_D] __attribute__((aligned(64)));
} State;

/* Load D numbers of keys, and the values of an earlier slot, into the CPU's cache before they are
   used: they are short pieces, which a CPU does not foresee. */
INLINE void prefetch(const Attention *a, int cache_kind, const int64_t *at, int64_t j,
                     int64_t count) {
  int64_t size = SIZES[cache_kind];
  const char *values = (const char *)a->values + at[j] * size;
  const char *keys = (const char *)a->keys + at[MIN(j + AHEAD, count - 1)] * size;
  for (int64_t i = 0; i < a->D * size; i += 64) {
    __builtin_prefetch(keys + i);
    __builtin_prefetch(values + i);
  }
}

/* The scores of G heads and J keys from the j-th on, whose offsets in the cache are `at`. */
INLINE void score(const Attention *a, int cache_kind, int G, int J, const float *query,
                  const int64_t *at, const float *scales, int64_t j, float *scores) {
  vf acc[2 * MAX_GROUP];
  UNROLL for (int i = 0; i < J * G; i++) acc[i] = (vf){0};
  for (int64_t d = 0; d < a->D; d += LANES) {
    vf keys[2];
    UNROLL for (int i = 0; i < J; i++) keys[i] = load(cache_kind, a->keys, at[j + i] + d);
    UNROLL for (int g = 0; g < G; g++) {
      vf x = load(FLOAT32, query, g * a->D + d);
      UNROLL for (int i = 0; i < J; i++) acc[i * G + g] += x * keys[i];
    }
  }
  UNROLL for (int i = 0; i < J; i++)
    UNROLL for (int g = 0; g < G; g++)
      scores[g * CHUNK + j + i] =
          sum_of(acc[i * G + g]) * (cache_kind == INT8 ? scales[j + i] : 1.0f);
}

/* Turn the scores of a head into weights; the factor of what was summed before. */
INLINE float weigh(State *state, int g, float *scores, int64_t count) {
  for (int64_t j = count; j < CHUNK && j % LANES; j++) scores[j] = -__builtin_inff();
  vf greatest = (vf){0} + state->greatest[g];
  for (int64_t j = 0; j < count; j += LANES)
    greatest = greater_of(load(FLOAT32, scores, j), greatest);
  float now = greatest_of(greatest);
  float factor = exp_of((vf){0} + (state->greatest[g] - now))[0];
  vf total = {0};
  for (int64_t j = 0; j < count; j += LANES) {
    vf weight = exp_of(load(FLOAT32, scores, j) - now);
    store(FLOAT32, scores, j, weight);
  }
  for (int64_t j = count; j < CHUNK && j % LANES; j++) scores[j] = 0;
  for (int64_t j = 0; j < count; j += LANES) total += load(FLOAT32, scores, j);
  state->total[g] = state->total[g] * factor + sum_of(total);
  state->greatest[g] = now;
  return factor;
}

/* Add the weighted values of `count` keys to two vectors of G heads' sums, from number d on. */
INLINE void mix(const Attention *a, int cache_kind, int G, const int64_t *at, int64_t count,
                const float *weights, const float *factors, int64_t d, float *sums) {
  vf acc[MAX_GROUP * 2];
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int t = 0; t < 2; t++)
      acc[g * 2 + t] = load(FLOAT32, sums, g * a->D + d + t * LANES) * factors[g];
  for (int64_t j = 0; j < count; j++)
    UNROLL for (int t = 0; t < 2; t++) {
      vf value = load(cache_kind, a->values, at[j] + d + t * LANES);
      UNROLL for (int g = 0; g < G; g++) acc[g * 2 + t] += value * weights[g * CHUNK + j];
    }
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int t = 0; t < 2; t++)
      store(FLOAT32, sums, g * a->D + d + t * LANES, acc[g * 2 + t]);
}

INLINE void scales_of(const Attention *a, const void *of, const int64_t *at, int64_t count,
                      float *scales) {
  for (int64_t j = 0; j < count; j++) scales[j] = load_one(BFLOAT16, of, at[j] / a->D);
}

/* G heads from `head` on, which have one KV head, of the query at `row`. */
INLINE void heads(const Attention *a, int kind, int cache_kind, int G, int64_t row, int64_t head,
                  int64_t key_len, const int64_t *blocks) {
  State state;
  float query[MAX_GROUP * MAX_D] __attribute__((aligned(64)));
  float scores[MAX_GROUP * CHUNK] __attribute__((aligned(64))), scales[CHUNK];
  float factors[MAX_GROUP];
  int64_t at[CHUNK], from = (row * a->num_heads + head) * a->D;
  int64_t stride = a->num_kv_heads * a->D, kv = head / (a->num_heads / a->num_kv_heads) * a->D;
  for (int g = 0; g < G; g++) state.greatest[g] = -__builtin_inff(), state.total[g] = 0;
  for (int64_t d = 0; d < G * a->D; d += LANES) {
    store(FLOAT32, query, d, load(kind, a->query, from + d) * a->scale);
    store(FLOAT32, state.sums, d, (vf){0});
  }
  for (int64_t first = 0; first < key_len; first += CHUNK) {
    int64_t count = MIN(CHUNK, key_len - first);
    for (int64_t j = 0; j < count; j++) {
      int64_t k = first + j;
      at[j] = (blocks[k / a->block_size] * a->block_size + k % a->block_size) * stride + kv;
    }
    if (cache_kind == INT8) scales_of(a, a->key_scales, at, count, scales);
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      prefetch(a, cache_kind, at, j, count), prefetch(a, cache_kind, at, j + 1, count);
      score(a, cache_kind, G, 2, query, at, scales, j, scores);
    }
    if (j < count) score(a, cache_kind, G, 1, query, at, scales, j, scores);
    for (int g = 0; g < G; g++) factors[g] = weigh(&state, g, scores + g * CHUNK, count);
    if (cache_kind == INT8) {
      scales_of(a, a->value_scales, at, count, scales);
      for (int g = 0; g < G; g++)
        for (int64_t j = 0; j < count; j++) scores[g * CHUNK + j] *= scales[j];
    }
    for (int64_t d = 0; d < a->D; d += 2 * LANES)
      mix(a, cache_kind, G, at, count, scores, factors, d, state.sums);
  }
  for (int g = 0; g < G; g++)
    for (int64_t d = 0; d < a->D; d += LANES)
      store(kind, a->result, from + g * a->D + d,
            load(FLOAT32, state.sums, g * a->D + d) / state.total[g]);
}

#define HEADS_OF(G) \
  case G: heads(a, kind, cache_kind, G, row, head, key_len, blocks); break;

/* All query heads of a KV head. */
INLINE void kv_head(const Attention *a, int kind, int cache_kind, int64_t row, int64_t kv,
                    int64_t key_len, const int64_t *blocks) {
  int64_t group = a->num_heads / a->num_kv_heads;
  for (int64_t g = 0; g < group; g += MAX_GROUP) {
    int64_t head = kv * group + g;
    switch (MIN(MAX_GROUP, group - g)) { HEADS_OF(1) HEADS_OF(2) HEADS_OF(3) HEADS_OF(4) }
  }
}

/* One function for each type, so that they are not compiled into one. */
#define TYPES(NAME, KIND, CACHE)                                                                \
  static void NAME(const Attention *a, int64_t row, int64_t kv, int64_t key_len,                \
                   const int64_t *blocks) {                                                     \
    kv_head(a, KIND, CACHE, row, kv, key_len, blocks);                                          \
  }
TYPES(of_float32, FLOAT32, FLOAT32)
TYPES(of_bfloat16, BFLOAT16, BFLOAT16)
TYPES(of_float32_int8, FLOAT32, INT8)
TYPES(of_bfloat16_int8, BFLOAT16, INT8)

/* rows [count]: the queries. key_lens [count]: the keys that each sees, at least one. tables
   [count]: each query's row of `table`, [...][table_stride], which names its blocks. */
void paged_attention(int kind, int cache_kind, int64_t count, int64_t num_heads,
                     int64_t num_kv_heads, int64_t D, int64_t block_size, float scale,
                     const void *query, const void *keys, const void *values,
                     const void *key_scales, const void *value_scales, const int64_t *rows,
                     const int64_t *key_lens, const int64_t *tables, const int64_t *table,
                     int64_t table_stride, void *result, int num_threads) {
  Attention a = {kind,  cache_kind, num_heads, num_kv_heads, D,           block_size,
                 scale, query,      keys,      values,       key_scales, value_scales,
                 result};
  int64_t size = 0;
  for (int64_t i = 0; i < count; i++) size += key_lens[i] * num_heads * D;
#pragma omp parallel for schedule(dynamic) num_threads(size >= MIN_SHARED ? num_threads : 1)
  for (int64_t task = 0; task < count * num_kv_heads; task++) {
    int64_t i = task / num_kv_heads, kv = task % num_kv_heads;
    const int64_t *blocks = table + tables[i] * table_stride;
    if (kind == FLOAT32 && cache_kind != INT8) of_float32(&a, rows[i], kv, key_lens[i], blocks);
    else if (kind == FLOAT32) of_float32_int8(&a, rows[i], kv, key_lens[i], blocks);
    else if (cache_kind != INT8) of_bfloat16(&a, rows[i], kv, key_lens[i], blocks);
    else of_bfloat16_int8(&a, rows[i], kv, key_lens[i], blocks);
  }
}

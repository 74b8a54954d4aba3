/* The operations between a decoder's products on a CPU; row_operations.py compiles and calls them.

   Rows are [M][...] of float32 or bfloat16; sums are in float32, and each result is rounded once. A
   row's bits do not depend on the rows beside it. */

#include "vectors.h"

/* fewer numbers than this are one thread's: waking others costs more */
#define MIN_SHARED 65536
#define THREADS(size) num_threads((size) >= MIN_SHARED ? num_threads : 1)

INLINE void norm_row(int kind, const void *rows, int64_t from, const void *weight, float eps,
                     void *result, int64_t to, int64_t H) {
  vf sums[2] = {{0}, {0}};
  int64_t c = 0;
  for (; c + 2 * LANES <= H; c += 2 * LANES)
    for (int h = 0; h < 2; h++) {
      vf x = load(kind, rows, from + c + h * LANES);
      sums[h] += x * x;
    }
  float sum = sum_of(sums[0] + sums[1]);
  for (; c < H; c++) sum += load_one(kind, rows, from + c) * load_one(kind, rows, from + c);
  float scale = 1.0f / __builtin_sqrtf(sum / (float)H + eps);
  for (c = 0; c + LANES <= H; c += LANES)
    store(kind, result, to + c, load(kind, rows, from + c) * scale * load(kind, weight, c));
  for (; c < H; c++)
    store_one(kind, result, to + c,
              load_one(kind, rows, from + c) * scale * load_one(kind, weight, c));
}

/* rows [M][H], stride numbers apart, to result [M][H]: the RMS norm times weight [H] */
void rms_norm(int kind, int64_t M, int64_t H, const void *rows, int64_t stride, const void *weight,
              float eps, void *result, int num_threads) {
#pragma omp parallel for THREADS(M * H)
  for (int64_t r = 0; r < M; r++)
    if (kind == FLOAT32) norm_row(FLOAT32, rows, r * stride, weight, eps, result, r * H, H);
    else norm_row(BFLOAT16, rows, r * stride, weight, eps, result, r * H, H);
}

INLINE void gated_row(int kind, const void *joined, int64_t from, void *result, int64_t to,
                      int64_t width) {
  for (int64_t c = 0; c < width; c += LANES) {
    vf gate = load(kind, joined, from + c), up = load(kind, joined, from + width + c);
    vf sigmoid = 1.0f / (1.0f + exp_of(-gate));
    store(kind, result, to + c, gate * sigmoid * up);
  }
}

/* joined [M][2 * width], gates first, to result [M][width]: SiLU of the gate times the other; width
   is a multiple of LANES */
void silu_gated(int kind, int64_t M, int64_t width, const void *joined, void *result,
                int num_threads) {
#pragma omp parallel for THREADS(M * width)
  for (int64_t r = 0; r < M; r++)
    if (kind == FLOAT32) gated_row(FLOAT32, joined, r * 2 * width, result, r * width, width);
    else gated_row(BFLOAT16, joined, r * 2 * width, result, r * width, width);
}

INLINE void rotate_head(int kind, const void *joined, int64_t from, const void *cos, const void *sin,
                        int64_t angle, void *result, int64_t to, int64_t D) {
  int64_t half = D / 2;
  for (int64_t c = 0; c < half; c += LANES) {
    vf a = load(kind, joined, from + c), b = load(kind, joined, from + half + c);
    vf x = load(kind, cos, angle + c), y = load(kind, sin, angle + c);
    store(kind, result, to + c, a * x - b * y);
    store(kind, result, to + half + c, b * x + a * y);
  }
}

INLINE void rotate_row(int kind, const void *joined, int64_t from, const void *cos, const void *sin,
                       int64_t angle, void *queries, int64_t to, void *keys, void *values,
                       int64_t slot, int64_t num_heads, int64_t num_kv_heads, int64_t D) {
  for (int64_t h = 0; h < num_heads; h++)
    rotate_head(kind, joined, from + h * D, cos, sin, angle, queries, to + h * D, D);
  from += num_heads * D, slot *= num_kv_heads * D;
  for (int64_t h = 0; h < num_kv_heads; h++)
    rotate_head(kind, joined, from + h * D, cos, sin, angle, keys, slot + h * D, D);
  from += num_kv_heads * D;
  for (int64_t c = 0; c < num_kv_heads * D; c += LANES)
    store(kind, values, slot + c, load(kind, joined, from + c));
}

/* joined [M][(num_heads + 2 * num_kv_heads) * D], queries, keys, values: rotates queries into
   queries [M][num_heads * D] and keys into their slots of keys [slots][num_kv_heads * D], and copies
   values. cos, sin: [M][D], with equal halves. D is a multiple of 2 * LANES. */
void rotate_and_write(int kind, int64_t M, int64_t num_heads, int64_t num_kv_heads, int64_t D,
                      const void *joined, const void *cos, const void *sin, void *queries,
                      void *keys, void *values, const int64_t *slots, int num_threads) {
  int64_t width = (num_heads + 2 * num_kv_heads) * D, size = num_heads * D;
#pragma omp parallel for THREADS(M * width)
  for (int64_t r = 0; r < M; r++)
    if (kind == FLOAT32)
      rotate_row(FLOAT32, joined, r * width, cos, sin, r * D, queries, r * size, keys, values,
                 slots[r], num_heads, num_kv_heads, D);
    else
      rotate_row(BFLOAT16, joined, r * width, cos, sin, r * D, queries, r * size, keys, values,
                 slots[r], num_heads, num_kv_heads, D);
}

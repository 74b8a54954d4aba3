/* Products of rows and a packed weight on a CPU; row_products.py compiles and calls them.

   weight   [panels][K][WIDTH], WIDTH output channels of a panel side by side, padded with zeros;
            float32, bfloat16 (its bits) or int8, widened to float32 where it is used
   rows     [M][K], float32 or bfloat16
   result   [M][N], of the rows' type: sums * scales + addend, rounded once

   A tile is some rows by one or more panels, whose sums stay in registers. Each sum adds its K
   products one by one in the same order, whatever tile it is in: a row's bits do not depend on the
   rows beside it, nor on the number of threads. Few rows read several panels at once, so that
   enough loads are in flight. Every tile widens what it reads: that is hidden behind its sums. */

#include "vectors.h"

#if LANES == 16
#define MAX_ROWS 12
#else
#define MAX_ROWS 6
#endif
#define WIDTH (2 * LANES)
#define MAX_PANELS 4
/* rows whose sums are kept between parts of K, a multiple of MAX_ROWS; inputs of a part */
#define BLOCK_ROWS 240
#define BLOCK_K 1024
/* bytes ahead of their use that P panels are loaded */
#define AHEAD(P) ((P) > 1 ? 512 : 2048)

int64_t row_products_width(void) { return WIDTH; }

/* Add `count` inputs of R rows and P panels to sums [R][P * WIDTH]; the first part starts at 0. */
INLINE void tile(int kind, int R, int P, const float *rows, int64_t K, const void *weight,
                 int64_t panel_size, int64_t count, float *sums, int is_first) {
  vf acc[MAX_ROWS * 2];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int h = 0; h < 2 * P; h++)
      acc[r * 2 * P + h] = is_first ? (vf){0} : load(FLOAT32, sums, (r * 2 * P + h) * LANES);
  for (int64_t k = 0; k < count; k++)
    UNROLL for (int p = 0; p < P; p++) {
      int64_t at = p * panel_size + k * WIDTH;
      __builtin_prefetch((const char *)weight + at * SIZES[kind] + AHEAD(P));
      vf low = load(kind, weight, at), high = load(kind, weight, at + LANES);
      UNROLL for (int r = 0; r < R; r++) {
        float x = rows[r * K + k];
        acc[(r * P + p) * 2] += low * x;
        acc[(r * P + p) * 2 + 1] += high * x;
      }
    }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int h = 0; h < 2 * P; h++)
      store(FLOAT32, sums, (r * 2 * P + h) * LANES, acc[r * 2 * P + h]);
}

#define TILE_OF(R) case R: tile(kind, R, 1, rows, K, weight, 0, count, sums, is_first); break;

/* The same for any number of rows and one panel. */
INLINE void tiles(int kind, int64_t M, const float *rows, int64_t K, const void *weight,
                  int64_t count, float *sums, int is_first) {
  for (; M >= MAX_ROWS; M -= MAX_ROWS, rows += MAX_ROWS * K, sums += MAX_ROWS * WIDTH)
    tile(kind, MAX_ROWS, 1, rows, K, weight, 0, count, sums, is_first);
  switch (M) {
    TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5)
#if MAX_ROWS > 6
    TILE_OF(6) TILE_OF(7) TILE_OF(8) TILE_OF(9) TILE_OF(10) TILE_OF(11)
#endif
  }
}

typedef struct {
  int weight_kind, row_kind;
  int64_t M, K, N, addend_stride;
  const void *weight, *scales, *addend;
  void *result;
} Product;

/* Write the results of M rows and some panels from channel `first` on, of sums [M][width]. */
INLINE void finish(const Product *p, int kind, int64_t row, int64_t M, int64_t first, int64_t width,
                   const float *sums) {
  int64_t end = MIN(p->N - first, width);
  for (int64_t r = 0; r < M; r++, sums += width) {
    int64_t to = (row + r) * p->N + first, add = (row + r) * p->addend_stride + first, c = 0;
    for (; c + LANES <= end; c += LANES) {
      vf value = load(FLOAT32, sums, c);
      if (p->scales) value *= load(kind, p->scales, first + c);
      if (p->addend) value += load(kind, p->addend, add + c);
      store(kind, p->result, to + c, value);
    }
    for (; c < end; c++) {
      float value = sums[c];
      if (p->scales) value *= load_one(kind, p->scales, first + c);
      if (p->addend) value += load_one(kind, p->addend, add + c);
      store_one(kind, p->result, to + c, value);
    }
  }
}

/* One row or two, and P panels at once. */
INLINE void few(const Product *p, int kind, int R, int P, const float *rows, int64_t panel) {
  float sums[2 * MAX_PANELS * WIDTH] __attribute__((aligned(64)));
  const char *weight = (const char *)p->weight + panel * p->K * WIDTH * SIZES[kind];
  tile(kind, R, P, rows, p->K, weight, p->K * WIDTH, p->K, sums, 1);
  if (p->row_kind == FLOAT32) finish(p, FLOAT32, 0, R, panel * WIDTH, P * WIDTH, sums);
  else finish(p, BFLOAT16, 0, R, panel * WIDTH, P * WIDTH, sums);
}

/* One panel and M rows. */
INLINE void block(const Product *p, int kind, int64_t row, int64_t M, const float *rows,
                  int64_t panel) {
  float sums[BLOCK_ROWS * WIDTH] __attribute__((aligned(64)));
  const char *weight = (const char *)p->weight + panel * p->K * WIDTH * SIZES[kind];
  for (int64_t k = 0; k < p->K; k += BLOCK_K)
    tiles(kind, M, rows + k, p->K, weight + k * WIDTH * SIZES[kind], MIN(BLOCK_K, p->K - k), sums,
          k == 0);
  if (p->row_kind == FLOAT32) finish(p, FLOAT32, row, M, panel * WIDTH, WIDTH, sums);
  else finish(p, BFLOAT16, row, M, panel * WIDTH, WIDTH, sums);
}

/* The panels from `first` to `end`, which are one thread's. */
INLINE void panels(const Product *p, int kind, const float *rows, int64_t first, int64_t end) {
  int64_t panel = first;
  if (p->M == 1)
    for (; panel + 4 <= end; panel += 4) few(p, kind, 1, 4, rows, panel);
  else if (p->M == 2)
    for (; panel + 2 <= end; panel += 2) few(p, kind, 2, 2, rows, panel);
  for (int64_t row = 0; row < p->M; row += BLOCK_ROWS)
    for (int64_t i = panel; i < end; i++)
      block(p, kind, row, MIN(BLOCK_ROWS, p->M - row), rows + row * p->K, i);
}

/* See above. wide: float32 [M][K] for rows in bfloat16, else unused. scales [N] and addend [M][N],
   or [N] with addend_stride 0, of the rows' type, may be null. */
void row_products(int weight_kind, int row_kind, int64_t M, int64_t K, int64_t N, const void *rows,
                  float *wide, const void *weight, const void *scales, const void *addend,
                  int64_t addend_stride, void *result, int num_threads) {
  Product p = {weight_kind, row_kind, M, K, N, addend_stride, weight, scales, addend, result};
  int64_t num_panels = (N + WIDTH - 1) / WIDTH;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    int64_t thread = omp_get_thread_num(), num = omp_get_num_threads();
    if (row_kind == BFLOAT16) {
      int64_t size = M * K, i = size * thread / num, end = size * (thread + 1) / num;
      for (; i + LANES <= end; i += LANES) store(FLOAT32, wide, i, load(BFLOAT16, rows, i));
      for (; i < end; i++) wide[i] = load_one(BFLOAT16, rows, i);
    }
#pragma omp barrier
    const float *numbers = row_kind == BFLOAT16 ? wide : rows;
    int64_t first = num_panels * thread / num, end = num_panels * (thread + 1) / num;
    if (weight_kind == FLOAT32) panels(&p, FLOAT32, numbers, first, end);
    else if (weight_kind == BFLOAT16) panels(&p, BFLOAT16, numbers, first, end);
    else panels(&p, INT8, numbers, first, end);
  }
}

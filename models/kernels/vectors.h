/* Vectors of a CPU: LANES numbers in float32, loaded and stored as float32, bfloat16 or int8. */

#include <omp.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))
/* sums stay in registers only if loops over them are unrolled */
#define UNROLL _Pragma("GCC unroll 16")
#define MIN(a, b) ((a) < (b) ? (a) : (b))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vf_any __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh_any __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t vb_any __attribute__((vector_size(LANES), aligned(1)));

enum { FLOAT32, BFLOAT16, INT8 };
/* bytes of a number */
static const int SIZES[] = {4, 2, 1};

INLINE vf load_int8(const int8_t *at) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
#else
  return __builtin_convertvector(__builtin_convertvector(*(const vb_any *)at, vi), vf);
#endif
}

INLINE vf load_bfloat16(const uint16_t *at) {
#if defined(__AVX512F__)
  vu bits = (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__AVX2__)
  vu bits = (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
#else
  vu bits = __builtin_convertvector(*(const vh_any *)at, vu);
#endif
  return (vf)(bits << 16);
}

/* LANES numbers from the i-th on, in float32 */
INLINE vf load(int kind, const void *from, int64_t i) {
  if (kind == FLOAT32) return *(const vf_any *)((const float *)from + i);
  if (kind == INT8) return load_int8((const int8_t *)from + i);
  return load_bfloat16((const uint16_t *)from + i);
}

INLINE float load_one(int kind, const void *from, int64_t i) {
  if (kind == FLOAT32) return ((const float *)from)[i];
  union { uint32_t bits; float value; } one = {(uint32_t)((const uint16_t *)from)[i] << 16};
  return one.value;
}

/* to nearest, ties to even; NaN stays NaN */
INLINE vu round_bits(vf value) {
  vu bits = (vu)value, is_nan = (vu)(value != value);
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (rounded & ~is_nan) | (0x7fc0 & is_nan);
}

INLINE void store(int kind, void *to, int64_t i, vf value) {
  if (kind == FLOAT32) *(vf_any *)((float *)to + i) = value;
  else *(vh_any *)((uint16_t *)to + i) = __builtin_convertvector(round_bits(value), vh_any);
}

INLINE void store_one(int kind, void *to, int64_t i, float value) {
  if (kind == FLOAT32) ((float *)to)[i] = value;
  else ((uint16_t *)to)[i] = (uint16_t)round_bits((vf){value})[0];
}

/* the vector whose lane i is lane i + by of `v`, around the end */
INLINE vf turned(vf v, int by) {
  vi lanes;
  UNROLL for (int i = 0; i < LANES; i++) lanes[i] = (i + by) % LANES;
  return __builtin_shuffle(v, lanes);
}

INLINE float sum_of(vf v) {
  UNROLL for (int by = LANES / 2; by > 0; by /= 2) v += turned(v, by);
  return v[0];
}

INLINE vf greater_of(vf a, vf b) {
  vi is_first = a > b;
  return (vf)(((vi)a & is_first) | ((vi)b & ~is_first));
}

INLINE float greatest_of(vf v) {
  UNROLL for (int by = LANES / 2; by > 0; by /= 2) v = greater_of(v, turned(v, by));
  return v[0];
}

/* exp, of numbers that are not NaN, to two units in the last place (Cephes) */
INLINE vf exp_of(vf x) {
  const vf low = (vf){0} - 87.3f, high = (vf){0} + 88.0f;
  vi is_low = x < low, is_high = x > high;
  x = (vf)(((vi)x & ~is_low & ~is_high) | ((vi)low & is_low) | ((vi)high & is_high));
  vf y = x * 1.44269504088896341f + 0.5f;
  vi n = __builtin_convertvector(y, vi);
  n += __builtin_convertvector(n, vf) > y; /* true is -1: floor */
  vf f = __builtin_convertvector(n, vf);
  x -= f * 0.693359375f;
  x -= f * -2.12194440e-4f;
  vf p = x * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * x * x + x + 1.0f;
  return p * (vf)((n + 127) << 23);
}

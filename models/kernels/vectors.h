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

INLINE vf load_int8(const int8_t *at) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
#else
  return __builtin_convertvector(__builtin_convertvector(*(const vb_any *)at, vi), vf);
#endif
}

/* LANES numbers from the i-th on, in float32 */
INLINE vf load(int kind, const void *from, int64_t i) {
  if (kind == FLOAT32) return *(const vf_any *)((const float *)from + i);
  if (kind == INT8) return load_int8((const int8_t *)from + i);
  vu bits = __builtin_convertvector(*(const vh_any *)((const uint16_t *)from + i), vu);
  return (vf)(bits << 16);
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

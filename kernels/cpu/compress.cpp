#include "cpu/compress.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace synco::cpu {
namespace {

// Written always and kept if it counts: a branch would be guessed wrong too often.
int append_above_portable(const float* values, int count, int32_t first_row, float bound, float* to_values,
                          int32_t* to_rows) {
  int size = 0;
  for (int i = 0; i < count; ++i) {
    to_values[size] = values[i];
    to_rows[size] = first_row + i;
    size += values[i] > bound;
  }
  return size;
}

int keep_at_least_portable(float* values, int32_t* rows, int count, float bound) {
  int size = 0;
  for (int i = 0; i < count; ++i) {
    const float value = values[i];
    values[size] = value;
    rows[size] = rows[i];
    size += value >= bound;
  }
  return size;
}

#if defined(__x86_64__)
#define SYNCO_AVX512 __attribute__((target("avx512f,popcnt")))

const bool kHasAvx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("popcnt");

// The lanes of a vector that lie within `left` elements.
SYNCO_AVX512 __mmask16 lanes(int left) { return static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1); }

SYNCO_AVX512 int append_above_avx512(const float* values, int count, int32_t first_row, float bound, float* to_values,
                                     int32_t* to_rows) {
  const __m512 bounds = _mm512_set1_ps(bound);
  __m512i row = _mm512_add_epi32(_mm512_set1_epi32(first_row),
                                 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  int size = 0;
  for (int i = 0; i < count; i += 16, row = _mm512_add_epi32(row, _mm512_set1_epi32(16))) {
    const __m512 value = _mm512_maskz_loadu_ps(lanes(count - i), values + i);
    const __mmask16 above = _mm512_mask_cmp_ps_mask(lanes(count - i), value, bounds, _CMP_GT_OQ);
    if (!above) continue;
    // Compressed in a register, then stored whole: storing through the mask is slow on some processors.
    _mm512_storeu_ps(to_values + size, _mm512_maskz_compress_ps(above, value));
    _mm512_storeu_si512(to_rows + size, _mm512_maskz_compress_epi32(above, row));
    size += _mm_popcnt_u32(above);
  }
  return size;
}

SYNCO_AVX512 int keep_at_least_avx512(float* values, int32_t* rows, int count, float bound) {
  const __m512 bounds = _mm512_set1_ps(bound);
  int size = 0;
  for (int i = 0; i < count; i += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(lanes(count - i), values + i);
    const __m512i row = _mm512_maskz_loadu_epi32(lanes(count - i), rows + i);
    const __mmask16 kept = _mm512_mask_cmp_ps_mask(lanes(count - i), value, bounds, _CMP_GE_OQ);
    _mm512_storeu_ps(values + size, _mm512_maskz_compress_ps(kept, value));
    _mm512_storeu_si512(rows + size, _mm512_maskz_compress_epi32(kept, row));
    size += _mm_popcnt_u32(kept);
  }
  return size;
}
#endif

}  // namespace

int append_above(const float* values, int count, int32_t first_row, float bound, float* to_values, int32_t* to_rows) {
#if defined(__x86_64__)
  if (kHasAvx512) return append_above_avx512(values, count, first_row, bound, to_values, to_rows);
#endif
  return append_above_portable(values, count, first_row, bound, to_values, to_rows);
}

int keep_at_least(float* values, int32_t* rows, int count, float bound) {
#if defined(__x86_64__)
  if (kHasAvx512) return keep_at_least_avx512(values, rows, count, bound);
#endif
  return keep_at_least_portable(values, rows, count, bound);
}

}  // namespace synco::cpu

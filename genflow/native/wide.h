// Sixteen numbers at a time (AVX-512), where the processor rounds to bf16 itself.

#pragma once

#if defined(__AVX512DQ__) && defined(__AVX512BF16__)
#define GENFLOW_WIDE

#include <immintrin.h>

namespace {

// Rounded to bf16, to nearest, ties to even.
inline __m256i half(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Sixteen bf16 as floats.
inline __m512 widened(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

// 2^x for |x| <= 126, to 3e-6 of it: a thousandth of what rounding to bf16 may change. NaN stays.
inline __m512 power_of_two(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, 8);  // less the nearest integer
    __m512 p = _mm512_set1_ps(9.5701019e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5917862e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4024745e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9312181e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.9999926e-1f));
    return _mm512_scalef_ps(p, _mm512_sub_ps(x, r));
}

constexpr float LEAST = -100.0f;  // of a power: neither it nor a product with it is a denormal number, which are slow

// The same for x <= 0, which rounding may have put above.
inline __m512 power_of_two_below(__m512 x) {
    return power_of_two(_mm512_min_ps(_mm512_setzero_ps(), _mm512_max_ps(_mm512_set1_ps(LEAST), x)));
}

// 1 / (1 + 2^z), 0 from z = 86 on.
inline __m512 logistic_of_two(__m512 z) {
    const __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), power_of_two(_mm512_max_ps(_mm512_set1_ps(LEAST), z)));
    const __m512 r = _mm512_rcp14_ps(d);  // to 2^-14, and squared by a step of Newton's
    return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(z, _mm512_set1_ps(86.0f), _CMP_LT_OQ), r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(2.0f)));
}

}  // namespace

#endif

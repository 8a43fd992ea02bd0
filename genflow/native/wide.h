// Sixteen numbers at a time (AVX-512), where the processor rounds to bf16 itself.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define GENFLOW_WIDE

#include <immintrin.h>

namespace {

// Rounded to bf16, to nearest, ties to even.
inline __m256i half(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Sixteen bf16 as floats.
inline __m512 widened(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

// exp(x) for x <= 0, to 2 ulp; the least answer is a normal number, for others are slow. NaN stays.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.3981999507e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// 1 / x to 2 ulp, for x within 1 .. 2^100.
inline __m512 reciprocal(__m512 x) {
    const __m512 r = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(2.0f)));
}

// 1 / (1 + exp(-z)), 0 where it is below 1e-26.
inline __m512 logistic(__m512 z) {
    const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(z)));
    const __m512 s = reciprocal(_mm512_add_ps(_mm512_set1_ps(1.0f), e));
    const __mmask16 below = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __mmask16 alive = _mm512_cmp_ps_mask(z, _mm512_set1_ps(-60.0f), _CMP_NLT_UQ);
    return _mm512_maskz_mov_ps(alive, _mm512_mask_mul_ps(s, below, s, e));
}

}  // namespace

#endif

// Numbers of kernels: T is float or bf16; arithmetic is in float.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "wide.h"

namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline void store(float* p, float x) { *p = x; }
inline void store(bf16* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    p->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Of n floats.
inline void store_row(float* y, const float* x, long n) { std::memcpy(y, x, 4 * n); }
inline void store_row(bf16* y, const float* x, long n) {
    long i = 0;
#ifdef GENFLOW_WIDE
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i*)(y + i), half(_mm512_loadu_ps(x + i)));
#endif
    for (; i < n; i++) store(y + i, x[i]);
}

// exp(x) for |x| <= 60, to 2 ulp: 2^n times a polynomial; written so that compilers vectorise it.
inline float fast_exp(float x) {
    x = x < -60.0f ? -60.0f : (x > 60.0f ? 60.0f : x);
    float n = std::floor(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

// 1 / (1 + exp(-z)), 0 where it is below 1e-26: compilers evaluate both sides of a choice, and denormal numbers are slow.
inline float logistic(float z) { return z < -60.0f ? 0.0f : 1 / (1 + fast_exp(-z)); }

}  // namespace

// A kernel under its C names, of both kinds of numbers.
#define BOTH(NAME, PARAMETERS, ARGUMENTS)                               \
    extern "C" void NAME##_f32 PARAMETERS(float) { NAME ARGUMENTS(float); } \
    extern "C" void NAME##_bf16 PARAMETERS(bf16) { NAME ARGUMENTS(bf16); }

// What kernels on a processor's matrix units (AMX) share: leave to use them, their tiles, and how bf16 lies in them.
//
// A tile is 16 rows of 64 bytes. A product C += A B of tiles takes 16 rows of 32 numbers of A, 32 rows of 16 of B in pairs
// (16 rows of 16 pairs, one above the other), and 16 x 16 float32 of C.

#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define GENFLOW_AMX

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace {

using u16 = uint16_t;

inline long up(long n, long to) { return (n + to - 1) / to * to; }


inline bool permitted() {
    static const bool yes = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return yes;
}

// All eight tiles 16 rows of 64 bytes.
inline void configure() {
    alignas(64) struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } tiles;
    _tile_loadconfig(&tiles);
}

// 16 x 16 numbers of 32 bits, rows of x and of y; the transpose.
inline void transpose(const void* x, long ldx, void* y, long ldy) {
    const int32_t* from = static_cast<const int32_t*>(x);
    int32_t* to = static_cast<int32_t*>(y);
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * ldx);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(to + i * ldy, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * ldy, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
}

// Rows a and b of 16 numbers as 16 pairs.
inline __m512i paired(__m256i a, __m256i b) {
    const __m512i low = _mm512_cvtepu16_epi32(a), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
    return _mm512_or_si512(low, high);
}

}  // namespace

#endif

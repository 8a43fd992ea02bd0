// What kernels on wide products of bf16 share: the products, on a processor's matrix units (AMX) or else on its vectors
// (AVX-512 BF16), and how bf16 lies in memory for both.
//
// A product C += A B takes 16 rows of 32 numbers of A, 32 rows of 16 of B in pairs (16 rows of 16 pairs, one above the
// other), and 16 x 16 float32 of C, at a time.

#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define GENFLOW_MATRIX

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace {

using u16 = uint16_t;

inline long up(long n, long to) { return (n + to - 1) / to * to; }

// Tiles of A or B: rows apart by `row` numbers, the next along the sum by `step`, the next along C by `next`.
struct Tiles {
    const u16* at;
    long row, step, next;
};

struct Nothing {
    void operator()(long) const {}
};

#ifdef __AMX_BF16__

// Leave to use the matrix units, which a kernel gives once.
inline bool permitted() {
    static const bool yes = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return yes;
}

// A thread's use of the units: all eight tiles 16 rows of 64 bytes.
struct Units {
    Units() {
        // Static, for compilers (GCC 12) see eight bytes of it read, and leave out what would fill the others.
        alignas(64) static const struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } tiles;
        _tile_loadconfig(&tiles);
    }
    ~Units() { _tile_release(); }
};

// C (+)= A B of 16 M x 16 N numbers, over `steps` of 32. besides(n): other work, of which the units let some be done after each of the
// M N steps products of tiles, the n-th.
template <int M, int N, class F = Nothing>
inline void tiles(Tiles a, Tiles b, float* c, long ldc, long steps, bool add, F besides = {}) {
    asm volatile("" ::: "memory");  // compilers (GCC 12) do not see that a tile's load reads memory
    if (add) {
        _tile_loadd(0, c, ldc * 4);
        if (N > 1) _tile_loadd(1, c + 16, ldc * 4);
        if (M > 1) _tile_loadd(2, c + 16 * ldc, ldc * 4);
        if (M > 1 && N > 1) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
    } else {
        _tile_zero(0);
        if (N > 1) _tile_zero(1);
        if (M > 1) _tile_zero(2);
        if (M > 1 && N > 1) _tile_zero(3);
    }
    for (long s = 0; s < steps; s++, a.at += a.step, b.at += b.step) {
        const long n = M * N * s;
        _tile_loadd(4, a.at, a.row * 2);
        _tile_loadd(6, b.at, b.row * 2);
        _tile_dpbf16ps(0, 4, 6);
        besides(n);
        if (N > 1) {
            _tile_loadd(7, b.at + b.next, b.row * 2);
            _tile_dpbf16ps(1, 4, 7);
            besides(n + 1);
        }
        if (M > 1) {
            _tile_loadd(5, a.at + a.next, a.row * 2);
            _tile_dpbf16ps(2, 5, 6);
            besides(n + N);
        }
        if (M > 1 && N > 1) {
            _tile_dpbf16ps(3, 5, 7);
            besides(n + 3);
        }
    }
    _tile_stored(0, c, ldc * 4);
    if (N > 1) _tile_stored(1, c + 16, ldc * 4);
    if (M > 1) _tile_stored(2, c + 16 * ldc, ldc * 4);
    if (M > 1 && N > 1) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

#else

inline bool permitted() { return true; }

struct Units {};

// C (+)= A B of 16 M x 16 N numbers, over `steps` of 32; eight rows at a time stay in registers. besides(n): the same.
template <int M, int N, class F = Nothing>
inline void tiles(Tiles a, Tiles b, float* c, long ldc, long steps, bool add, F besides = {}) {
    for (long n = 0; n < M * N * steps; n++) besides(n);
    for (int from = 0; from < 16 * M; from += 8) {
        const u16 *rows = a.at + from / 16 * a.next + from % 16 * a.row, *columns = b.at;
        float* to = c + from * ldc;
        __m512 sum[8][N];
        for (int r = 0; r < 8; r++)
            for (int n = 0; n < N; n++) sum[r][n] = add ? _mm512_loadu_ps(to + r * ldc + 16 * n) : _mm512_setzero_ps();
        for (long s = 0; s < steps; s++, rows += a.step, columns += b.step)
            for (int pair = 0; pair < 16; pair++) {
                __m512bh right[N];
                for (int n = 0; n < N; n++) right[n] = (__m512bh)_mm512_loadu_si512(columns + pair * b.row + n * b.next);
                for (int r = 0; r < 8; r++) {
                    int32_t both;
                    std::memcpy(&both, rows + r * a.row + 2 * pair, 4);
                    const __m512bh left = (__m512bh)_mm512_set1_epi32(both);
                    for (int n = 0; n < N; n++) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], left, right[n]);
                }
            }
        for (int r = 0; r < 8; r++)
            for (int n = 0; n < N; n++) _mm512_storeu_ps(to + r * ldc + 16 * n, sum[r][n]);
    }
}

#endif

}  // namespace

#endif

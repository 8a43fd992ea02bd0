// The gradient of a linear map's weight, g^T x: bf16 in, float32 out.
//
// The long axis, rows of g and x, is the one summed over, which libraries lay out anew at some cost. Here both are packed
// into tiles, some rows at a time: g by transposing its pairs of rows, x as its pairs are.

#include "matrix.h"

#ifdef GENFLOW_MATRIX

#include <cstdlib>

namespace {

constexpr long ROWS = 256;  // of g and x at a time: their tiles stay in the second cache, 32 columns of g in the first
constexpr long TILE = 512;  // bf16 numbers

// Rows r and r + 1 of 16 columns as pairs; zeros from row M on.
inline __m512i pair_at(const u16* x, long stride, long r, long M) {
    const __m256i a = r < M ? _mm256_loadu_si256((const __m256i*)(x + r * stride)) : _mm256_setzero_si256();
    const __m256i b = r + 1 < M ? _mm256_loadu_si256((const __m256i*)(x + (r + 1) * stride)) : _mm256_setzero_si256();
    return paired(a, b);
}

// 32 rows of 16 columns from row r on, as a tile of B.
inline void pack_pairs(const u16* x, long stride, long r, long M, u16* tile) {
    for (long i = 0; i < 16; i++) _mm512_store_si512(tile + 32 * i, pair_at(x, stride, r + 2 * i, M));
}

}  // namespace

extern "C" long matrix_units() { return permitted(); }

// g: M x O, x: M x I, rows apart by their strides -> dw: O x I, contiguous. O and I: multiples of 32.
extern "C" void weight_gradient_bf16(const u16* g, long g_stride, const u16* x, long x_stride, float* dw, long M, long O, long I) {
    const long most = ROWS / 32, apart = most * TILE;  // tiles of 16 columns lie `apart`
    u16* a = static_cast<u16*>(std::aligned_alloc(64, 2 * (O + I) / 16 * apart));
    u16* b = a + O / 16 * apart;
#pragma omp parallel
    {
        [[maybe_unused]] const Units units;
        for (long from = 0; from < M; from += ROWS) {
            const long steps = up(M - from < ROWS ? M - from : ROWS, 32) / 32;
#pragma omp for schedule(static)
            for (long s = 0; s < steps; s++) {
                alignas(64) u16 pairs[TILE];
                for (long o = 0; o < O; o += 16) {
                    pack_pairs(g + o, g_stride, from + 32 * s, M, pairs);
                    transpose(pairs, 16, a + o / 16 * apart + s * TILE, 16);
                }
                for (long i = 0; i < I; i += 16) pack_pairs(x + i, x_stride, from + 32 * s, M, b + i / 16 * apart + s * TILE);
            }
#pragma omp for collapse(2) schedule(static)
            for (long o = 0; o < O; o += 32)
                for (long i = 0; i < I; i += 32)
                    tiles<2, 2>({a + o / 16 * apart, 32, TILE, apart}, {b + i / 16 * apart, 32, TILE, apart}, dw + o * I + i, I, steps, from > 0);
        }
    }
    std::free(a);
}

#else

extern "C" long matrix_units() { return 0; }

#endif

// The gradient of a linear map's weight, g^T x: bf16 in, float32 out.
//
// The long axis, rows of g and x, is the one summed over, which libraries lay out anew at some cost. Here both are packed
// into tiles, some rows at a time: g transposed, x as pairs of its rows. Every thread has its own part of the answer and packs what
// that needs, so that none waits for another; a piece of it stays in the second cache until it is whole.

#include "matrix.h"

#ifdef GENFLOW_MATRIX

#include <omp.h>

#include <algorithm>
#include <cstdlib>

namespace {

constexpr long ROWS = 256;  // of g and x at a time: 32 columns of each in tiles fill two thirds of a first cache of 48 KiB
constexpr long TILE = 512;  // bf16 numbers
constexpr long BLOCK = 32 * 32;  // numbers of dw that are one product
constexpr long PIECE = 512;  // columns of g and of x whose blocks of dw are made at a time, a mebibyte

// Row r of 32 columns; zeros from row M on.
inline __m512i row_at(const u16* x, long stride, long r, long M) { return r < M ? _mm512_loadu_si512(x + r * stride) : _mm512_setzero_si512(); }

// 32 rows of 32 columns from row r on, as two tiles of B: of the even columns, and of the odd ones.
inline void pack_pairs(const u16* x, long stride, long r, long M, u16* tiles) {
    for (long i = 0; i < 16; i++) {
        const __m512i a = row_at(x, stride, r + 2 * i, M), b = row_at(x, stride, r + 2 * i + 1, M);
        _mm512_store_si512(tiles + 32 * i, _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
        _mm512_store_si512(tiles + TILE + 32 * i, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
    }
}

// Eight columns of 32 rows from row r on, transposed: eight rows of a tile of A.
inline void pack_columns(const u16* x, long stride, long r, long M, u16* tile) {
    auto eight = [&](long k) { return r + k < M ? _mm_loadu_si128((const __m128i*)(x + (r + k) * stride)) : _mm_setzero_si128(); };
    __m512i a[8], b[8];
    for (long k = 0; k < 8; k++) {  // rows k, k + 8, k + 16, k + 24
        a[k] = _mm512_inserti32x4(_mm512_castsi128_si512(eight(k)), eight(k + 8), 1);
        a[k] = _mm512_inserti32x4(_mm512_inserti32x4(a[k], eight(k + 16), 2), eight(k + 24), 3);
    }
    for (long k = 0; k < 8; k += 2) b[k] = _mm512_unpacklo_epi16(a[k], a[k + 1]), b[k + 1] = _mm512_unpackhi_epi16(a[k], a[k + 1]);
    for (long k = 0; k < 8; k += 4)
        for (long h = 0; h < 2; h++) {
            a[k + 2 * h] = _mm512_unpacklo_epi32(b[k + h], b[k + h + 2]);
            a[k + 2 * h + 1] = _mm512_unpackhi_epi32(b[k + h], b[k + h + 2]);
        }
    for (long k = 0; k < 4; k++) {
        _mm512_store_si512(tile + 32 * (2 * k), _mm512_unpacklo_epi64(a[k], a[k + 4]));
        _mm512_store_si512(tile + 32 * (2 * k + 1), _mm512_unpackhi_epi64(a[k], a[k + 4]));
    }
}

// A part of dw, in columns of g (o) and of x (i).
struct Part {
    long o, o_end, i, i_end;
};

// The part that one of `threads` makes.
Part part_of(long O, long I, long thread, long threads) {
    long across = 1;  // parts side by side along x, as many as take the least work
    double least = 0;
    for (long n = 1; n <= threads; n++) {
        const double down = up(O, 32 * (threads / n)) / (threads / n), wide = up(I, 32 * n) / n;
        const double cost = down * wide + 16 * down + 8 * wide;  // a product; to transpose; to pair
        if (threads % n == 0 && (n == 1 || cost < least)) least = cost, across = n;
    }
    const long down = threads / across, row = thread / across, column = thread % across;
    return {O / 32 * row / down * 32, O / 32 * (row + 1) / down * 32, I / 32 * column / across * 32, I / 32 * (column + 1) / across * 32};
}

// Columns o .. o_end of g and i .. i_end of x, of PIECE each at most. scratch: (64 + PIECE) ROWS numbers of bf16, PIECE^2 of float.
void make(const Part& part, const u16* g, long g_stride, const u16* x, long x_stride, float* dw, long M, long I, u16* scratch) {
    const long panels = (part.i_end - part.i) / 32, most = ROWS / 32;
    u16 *a = scratch, *next = a + ROWS * 32, *const b = next + ROWS * 32;
    float* const blocks = reinterpret_cast<float*>(b + ROWS * PIECE);
    // Eight columns of 32 rows, the n-th of those from column o and from a row on.
    auto pack_slice = [&](long n, long o, long from, u16* to) {
        const long r = from + n / 4 * 32, h = n % 4;
        if (n < 4 * most && r < M) pack_columns(g + o + 8 * h, g_stride, r, M, to + (h / 2 * most + n / 4) * TILE + h % 2 * TILE / 2);
    };
    for (long n = 0; n < 4 * most; n++) pack_slice(n, part.o, 0, a);
    for (long from = 0; from < M; from += ROWS) {
        const long steps = up(std::min(M - from, ROWS), 32) / 32, each = up(4 * most, panels * steps) / (panels * steps);
        for (long s = 0; s < steps; s++)
            for (long i = 0; i < panels; i++) pack_pairs(x + part.i + 32 * i, x_stride, from + 32 * s, M, b + (i * steps + s) * 2 * TILE);
        for (long o = part.o; o < part.o_end; o += 32, std::swap(a, next)) {
            const bool along = o + 32 < part.o_end;
            long done = 0;
            for (long i = 0; i < panels; i++) {
                float* block = blocks + ((o - part.o) / 32 * panels + i) * BLOCK;
                const Tiles rows{a, 32, TILE, most * TILE}, columns{b + i * steps * 2 * TILE, 32, 2 * TILE, TILE};
                tiles<2, 2>(rows, columns, block, 32, steps, from > 0, [&](long) {  // besides: the next columns, or those of the next rows
                    for (long e = 0; e < each; e++) pack_slice(done++, along ? o + 32 : part.o, along ? from : from + ROWS, next);
                });
            }
        }
    }
    alignas(64) int32_t order[2][16];  // of columns, of which a block has the even ones before the odd ones
    for (int j = 0; j < 32; j++) order[j / 16][j % 16] = j / 2 + j % 2 * 16;
    const __m512i left = _mm512_load_si512(order[0]), right = _mm512_load_si512(order[1]);
    for (long o = part.o; o < part.o_end; o++)
        for (long i = 0; i < panels; i++) {
            const float* row = blocks + ((o - part.o) / 32 * panels + i) * BLOCK + o % 32 * 32;
            const __m512 even = _mm512_load_ps(row), odd = _mm512_load_ps(row + 16);
            _mm512_stream_ps(dw + o * I + part.i + 32 * i, _mm512_permutex2var_ps(even, left, odd));
            _mm512_stream_ps(dw + o * I + part.i + 32 * i + 16, _mm512_permutex2var_ps(even, right, odd));
        }
    _mm_sfence();
}

}  // namespace

extern "C" long matrix_units() { return permitted(); }

// g: M x O, x: M x I, rows apart by their strides -> dw: O x I, contiguous, at a multiple of 64 bytes. M > 0; O and I: multiples of 32.
extern "C" void weight_gradient_bf16(const u16* g, long g_stride, const u16* x, long x_stride, float* dw, long M, long O, long I) {
#pragma omp parallel
    {
        [[maybe_unused]] const Units units;
        const Part part = part_of(O, I, omp_get_thread_num(), omp_get_num_threads());
        u16* scratch = static_cast<u16*>(std::aligned_alloc(64, 2 * (64 + PIECE) * ROWS + 4 * PIECE * PIECE));
        for (long o = part.o; o < part.o_end; o += PIECE)
            for (long i = part.i; i < part.i_end; i += PIECE) {
                const Part piece{o, std::min(o + PIECE, part.o_end), i, std::min(i + PIECE, part.i_end)};
                make(piece, g, g_stride, x, x_stride, dw, M, I, scratch);
            }
        std::free(scratch);
    }
}

#else

extern "C" long matrix_units() { return 0; }

#endif

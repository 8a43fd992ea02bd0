// The gradient of a linear map's weight, g^T x: bf16 in, float32 out.
//
// The long axis, rows of g and x, is the one summed over, which libraries lay out anew at some cost. Here both are packed
// into tiles, some rows at a time: g transposed, x as pairs of its rows. While these are multiplied, the next rows are fetched from memory,
// whose pace is the limit. Every thread has its own part of the answer and packs what that needs, so that none waits for another; a piece
// of it stays in the second cache until it is whole.

#include "matrix.h"

#ifdef GENFLOW_MATRIX

#include <omp.h>

#include <algorithm>
#include <cstdlib>

namespace {

constexpr long ROWS = 256;  // of g and x at a time: 32 columns of each in tiles fill two thirds of a first cache of 48 KiB
constexpr long TILE = 512;  // bf16 numbers
constexpr long BLOCK = 32 * 32;  // numbers of dw that are one product
constexpr long PIECE = 512, AREA = 512 * 256;  // columns of g or of x, and numbers of dw, that are made at a time

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

// 32 columns of 32 rows from row r on, transposed, as two tiles of A.
inline void pack_columns(const u16* x, long stride, long r, long M, u16* tiles) {
    __m512i a[32], b[32];
    for (long k = 0; k < 32; k++) a[k] = row_at(x, stride, r + k, M);
    for (long k = 0; k < 32; k += 2) b[k] = _mm512_unpacklo_epi16(a[k], a[k + 1]), b[k + 1] = _mm512_unpackhi_epi16(a[k], a[k + 1]);
    for (long k = 0; k < 32; k += 4)
        for (long h = 0; h < 2; h++) {
            a[k + 2 * h] = _mm512_unpacklo_epi32(b[k + h], b[k + h + 2]);
            a[k + 2 * h + 1] = _mm512_unpackhi_epi32(b[k + h], b[k + h + 2]);
        }
    for (long k = 0; k < 32; k += 8)
        for (long h = 0; h < 4; h++) {
            b[k + 2 * h] = _mm512_unpacklo_epi64(a[k + h], a[k + h + 4]);
            b[k + 2 * h + 1] = _mm512_unpackhi_epi64(a[k + h], a[k + h + 4]);
        }
    for (long k = 0; k < 8; k++) {  // eight rows each in b[k], b[k + 8], ...: of columns k, k + 8, k + 16 and k + 24
        const __m512i low[] = {_mm512_shuffle_i32x4(b[k], b[k + 8], 0x44), _mm512_shuffle_i32x4(b[k + 16], b[k + 24], 0x44)};
        const __m512i high[] = {_mm512_shuffle_i32x4(b[k], b[k + 8], 0xee), _mm512_shuffle_i32x4(b[k + 16], b[k + 24], 0xee)};
        _mm512_store_si512(tiles + 32 * k, _mm512_shuffle_i32x4(low[0], low[1], 0x88));
        _mm512_store_si512(tiles + 32 * (k + 8), _mm512_shuffle_i32x4(low[0], low[1], 0xdd));
        _mm512_store_si512(tiles + 32 * (k + 16), _mm512_shuffle_i32x4(high[0], high[1], 0x88));
        _mm512_store_si512(tiles + 32 * (k + 24), _mm512_shuffle_i32x4(high[0], high[1], 0xdd));
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

// Columns o .. o_end of g and i .. i_end of x. scratch: ROWS numbers of bf16 for each of those columns, a float for each of dw.
void make(const Part& part, const u16* g, long g_stride, const u16* x, long x_stride, float* dw, long M, long I, u16* scratch) {
    const long across = (part.o_end - part.o) / 32, panels = (part.i_end - part.i) / 32, most = ROWS / 32;
    u16 *const a = scratch, *const b = a + ROWS * 32 * across;
    float* const blocks = reinterpret_cast<float*>(b + ROWS * 32 * panels);
    for (long from = 0; from < M; from += ROWS) {
        const long next = from + ROWS, steps = up(std::min(M - from, ROWS), 32) / 32;
        for (long s = 0; s < steps; s++) {
            const long r = from + 32 * s;
            for (long o = 0; o < across; o++) pack_columns(g + part.o + 32 * o, g_stride, r, M, a + (o * most + s) * 2 * TILE);
            for (long i = 0; i < panels; i++) pack_pairs(x + part.i + 32 * i, x_stride, r, M, b + (i * most + s) * 2 * TILE);
        }
        // Cache lines of the next rows, each of g and then of x, in the time of all products.
        const long lines = across + panels, all = std::min(M - next, ROWS) * lines, times = 4 * across * panels * steps;
        long row = next, line = 0, time = 0, done = 0;
        auto fetch = [&](long) {
            for (time++; done * times < all * time; done++) {
                __builtin_prefetch(line < across ? g + row * g_stride + part.o + 32 * line : x + row * x_stride + part.i + 32 * (line - across), 0, 1);
                if (++line == lines) line = 0, row++;
            }
        };
        for (long o = 0; o < across; o++)
            for (long i = 0; i < panels; i++) {
                const Tiles rows{a + o * most * 2 * TILE, 32, 2 * TILE, TILE}, columns{b + i * most * 2 * TILE, 32, 2 * TILE, TILE};
                tiles<2, 2>(rows, columns, blocks + (o * panels + i) * BLOCK, 32, steps, from > 0, fetch);
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
        const long wide = std::min(PIECE, part.i_end - part.i), tall = std::min({PIECE, part.o_end - part.o, AREA / std::max(wide, 32L) / 32 * 32});
        u16* scratch = static_cast<u16*>(std::aligned_alloc(64, 2 * ROWS * (wide + tall) + 4 * wide * tall));
        for (long o = part.o; o < part.o_end; o += tall)
            for (long i = part.i; i < part.i_end; i += wide) {
                const Part piece{o, std::min(o + tall, part.o_end), i, std::min(i + wide, part.i_end)};
                make(piece, g, g_stride, x, x_stride, dw, M, I, scratch);
            }
        std::free(scratch);
    }
}

#else

extern "C" long matrix_units() { return 0; }

#endif

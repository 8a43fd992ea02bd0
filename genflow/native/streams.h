// Rows of attention's q, k and v: where they lie, and what is done to them on the way from and to memory.

#pragma once

#include "matrix.h"
#include "wide.h"

#ifdef GENFLOW_MATRIX

#include <cmath>
#include <type_traits>

namespace {

inline __mmask16 first(long n) { return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1); }

// Numbers d to d + 32 of a row of D; zeros beyond it.
inline __m512i pairs_at(const u16* row, long d, long D) { return _mm512_maskz_loadu_epi16(D - d >= 32 ? ~0u : (1u << (D - d)) - 1, row + d); }

// Sixteen numbers of a row, or the n that are left, zeros after them. Masked memory is slow, above all where it is read again soon.
inline __m512 widened(const u16* p, long n) {
    if (n >= 16) return widened(p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16));
}

inline __m512 floats(const float* p, long n) { return n >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first(n), p); }

inline void put(u16* p, long n, __m512 x) {
    if (n >= 16) _mm256_storeu_si256((__m256i*)p, half(x));
    else _mm256_mask_storeu_epi16(p, first(n), half(x));
}

inline void add_to(float* p, long n, __m512 x) {
    const __m512 sum = _mm512_add_ps(floats(p, n), x);
    if (n >= 16) _mm512_storeu_ps(p, sum);
    else _mm512_mask_storeu_ps(p, first(n), sum);
}

// A stream's rows of D numbers, for every head. bias, H x D: comes to each row first; weight, D: of the RMS norm after it; where
// there are any. Of gradients: x, those rows, apart as the gradients are; dbias, B x 3 x H x D; dweight, B x H x D.
struct Stream {
    u16* at;
    long batch, head, row, L;  // strides; rows
    const float *bias = nullptr, *weight = nullptr;
    const u16* x = nullptr;
    float *dbias = nullptr, *dweight = nullptr;
};

constexpr long AHEAD = 8;  // rows to fetch before: they lie too far apart for the processor to foresee them

// A head of a sample: its rows of all streams, one stream after the other.
struct Sequence {
    const Stream* streams;
    long b, h, H, D;
    float eps;

    // f(stream, where its row begins, the row's number after `from`), for n rows.
    template <int writes = 0, class F>
    void rows(long from, long n, F f) const {
        long i = 0;
        for (const Stream* s = streams; i < n; from -= s++->L)
            for (; i < n && from + i < s->L; i++) {
                const long at = b * s->batch + h * s->head + (from + i) * s->row;
                for (long d = 0; d < D; d += 32) __builtin_prefetch(s->at + at + AHEAD * s->row + d, writes);
                f(*s, at, i);
            }
    }
};

constexpr long MOST = 16;  // vectors of sixteen numbers of a row

// f(the number of vectors of a row), known to the compiler where it is usual, and else 0.
template <class F>
inline void by_width(long D, F f) {
    switch (D) {
        case 32: return f(std::integral_constant<int, 2>{});
        case 48: return f(std::integral_constant<int, 3>{});
        case 64: return f(std::integral_constant<int, 4>{});
        case 128: return f(std::integral_constant<int, 8>{});
        default: return f(std::integral_constant<int, 0>{});
    }
}

// 1 / the root of the mean square, of sums of squares.
inline __m512 inverse_rms(__m512 squares, long D, float eps) { return _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / D + eps)); }

// n rows with their bias, normed, as rows of W, zeros after them.
template <int V>
void read_biased(const Sequence& x, long from, long n, u16* y, long W) {
    const long D = V ? 16 * V : x.D;
    x.rows(from, n, [&](const Stream& s, long at, long i) {
        const float* bias = s.bias + x.h * D;
        __m512 v[V ? V : MOST], squares = _mm512_setzero_ps();
        for (long d = 0, k = 0; d < D; d += 16, k++) {
            v[k] = _mm512_add_ps(widened(s.at + at + d, D - d), floats(bias + d, D - d));
            squares = _mm512_fmadd_ps(v[k], v[k], squares);
        }
        if (s.weight) {
            const __m512 r = inverse_rms(squares, D, x.eps);
            for (long d = 0, k = 0; d < D; d += 16, k++) v[k] = _mm512_mul_ps(_mm512_mul_ps(v[k], r), floats(s.weight + d, D - d));
        }
        for (long d = 0, k = 0; d < D; d += 16, k++) _mm256_storeu_si256((__m256i*)(y + i * W + d), half(v[k]));
        if (W - D >= 16) _mm256_storeu_si256((__m256i*)(y + i * W + up(D, 16)), _mm256_setzero_si256());
    });
}

// n rows as rows of W, followed by zeros up to `to` rows.
void read_rows(const Sequence& x, long from, long n, u16* y, long W, long to) {
    if (x.streams->bias) {
        by_width(x.D, [&](auto V) { read_biased<V>(x, from, n, y, W); });
    } else {
        x.rows(from, n, [&](const Stream& s, long at, long i) {
            for (long d = 0; d < W; d += 32) _mm512_storeu_si512(y + i * W + d, pairs_at(s.at + at, d, x.D));
        });
    }
    std::memset(y + n * W, 0, 2 * (to - n) * W);
}

// Rows of C, float32, each times its factor, into those of y. factor: none: 1.
void write_rows(const float* c, long ldc, const float* factor, const Sequence& y, long from, long n) {
    y.rows<1>(from, n, [&](const Stream& s, long at, long i) {
        const __m512 by = _mm512_set1_ps(factor ? factor[i] : 1);
        for (long d = 0; d < y.D; d += 16) put(s.at + at + d, y.D - d, _mm512_mul_ps(by, _mm512_loadu_ps(c + i * ldc + d)));
    });
}

// The same of gradients, through norm and bias: dx = r (g w - xhat mean(g w xhat)), xhat = r (x + bias); dw += g xhat, dbias += dx.
template <int V>
void write_biased(const float* c, long ldc, const Sequence& y, long from, long n) {
    const long D = V ? 16 * V : y.D;
    const Stream* last = nullptr;  // whose sums over rows are in registers
    __m512 db[V ? V : MOST], dw[V ? V : MOST];
    auto finish = [&] {
        if (!last) return;
        float *dbias = last->dbias + (y.b * 3 * y.H + y.h) * D, *dweight = last->dweight + (y.b * y.H + y.h) * D;
        for (long d = 0, k = 0; d < D; d += 16, k++) {
            add_to(dbias + d, D - d, db[k]);
            if (last->weight) add_to(dweight + d, D - d, dw[k]);
        }
    };
    y.rows<1>(from, n, [&](const Stream& s, long at, long i) {
        if (last != &s) {
            finish();
            last = &s;
            for (long k = 0; 16 * k < D; k++) db[k] = dw[k] = _mm512_setzero_ps();
        }
        const float *g = c + i * ldc, *bias = s.bias + y.h * D;
        const u16* x = s.x + at;
        for (long d = 0; d < D; d += 32) __builtin_prefetch(x + AHEAD * s.row + d);
        __m512 dx[V ? V : MOST];
        for (long d = 0, k = 0; d < D; d += 16, k++) dx[k] = _mm512_loadu_ps(g + d);
        if (s.weight) {
            __m512 v[V ? V : MOST], squares = _mm512_setzero_ps(), along = squares;
            for (long d = 0, k = 0; d < D; d += 16, k++) {
                v[k] = _mm512_add_ps(widened(x + d, D - d), floats(bias + d, D - d));
                squares = _mm512_fmadd_ps(v[k], v[k], squares);
                along = _mm512_fmadd_ps(_mm512_mul_ps(dx[k], floats(s.weight + d, D - d)), v[k], along);
            }
            const __m512 r = inverse_rms(squares, D, y.eps);
            const __m512 part = _mm512_mul_ps(_mm512_mul_ps(r, r), _mm512_set1_ps(_mm512_reduce_add_ps(along) / D));
            for (long d = 0, k = 0; d < D; d += 16, k++) {
                dw[k] = _mm512_fmadd_ps(_mm512_mul_ps(dx[k], r), v[k], dw[k]);
                dx[k] = _mm512_mul_ps(r, _mm512_fnmadd_ps(v[k], part, _mm512_mul_ps(dx[k], floats(s.weight + d, D - d))));
            }
        }
        for (long d = 0, k = 0; d < D; d += 16, k++) {
            db[k] = _mm512_add_ps(db[k], dx[k]);
            put(s.at + at + d, D - d, dx[k]);
        }
    });
    finish();
}

void write_gradient(const float* c, long ldc, const Sequence& y, long from, long n) {
    if (!y.streams->bias) return write_rows(c, ldc, nullptr, y, from, n);
    by_width(y.D, [&](auto V) { write_biased<V>(c, ldc, y, from, n); });
}

}  // namespace

#endif

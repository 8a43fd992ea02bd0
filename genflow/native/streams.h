// Rows of attention's q, k and v: where they lie, and what is done to them on the way from and to memory.

#pragma once

#include "matrix.h"
#include "wide.h"

#ifdef GENFLOW_MATRIX

#include <cmath>

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

// 1 / the root of the mean square.
inline float inverse_rms(const u16* x, const float* bias, long D, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (long d = 0; d < D; d += 16) {
        const __m512 v = _mm512_add_ps(widened(x + d, D - d), floats(bias + d, D - d));
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1 / std::sqrt(_mm512_reduce_add_ps(sum) / D + eps);
}

// n rows as rows of W, followed by zeros up to `to` rows.
void read_rows(const Sequence& x, long from, long n, u16* y, long W, long to) {
    const long D = x.D, h = x.h;
    x.rows(from, n, [&](const Stream& s, long at, long i) {
        const u16* row = s.at + at;
        u16* out = y + i * W;
        if (!s.bias) {
            for (long d = 0; d < W; d += 32) _mm512_storeu_si512(out + d, pairs_at(row, d, D));
            return;
        }
        const float* bias = s.bias + h * D;
        const __m512 r = _mm512_set1_ps(s.weight ? inverse_rms(row, bias, D, x.eps) : 1);
        for (long d = 0; d < W; d += 16) {
            __m512 v = _mm512_add_ps(widened(row + d, D - d), floats(bias + d, D - d));
            if (s.weight) v = _mm512_mul_ps(_mm512_mul_ps(v, r), floats(s.weight + d, D - d));
            _mm256_storeu_si256((__m256i*)(out + d), half(v));
        }
    });
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
void write_gradient(const float* c, long ldc, const Sequence& y, long from, long n) {
    if (!y.streams->bias) return write_rows(c, ldc, nullptr, y, from, n);
    const long D = y.D;
    y.rows<1>(from, n, [&](const Stream& s, long at, long i) {
        const float *g = c + i * ldc, *bias = s.bias + y.h * D;
        const u16* x = s.x + at;
        for (long d = 0; d < D; d += 32) __builtin_prefetch(x + AHEAD * s.row + d);
        float* dbias = s.dbias + (y.b * 3 * y.H + y.h) * D;
        float* dweight = s.dweight + (y.b * y.H + y.h) * D;
        __m512 sum = _mm512_setzero_ps(), r = _mm512_set1_ps(1);
        if (s.weight) {
            r = _mm512_set1_ps(inverse_rms(x, bias, D, y.eps));
            for (long d = 0; d < D; d += 16) {
                const __m512 v = _mm512_add_ps(widened(x + d, D - d), floats(bias + d, D - d));
                const __m512 gx = _mm512_mul_ps(_mm512_loadu_ps(g + d), _mm512_mul_ps(r, v));
                sum = _mm512_fmadd_ps(gx, floats(s.weight + d, D - d), sum);
                add_to(dweight + d, D - d, gx);
            }
            sum = _mm512_mul_ps(r, _mm512_set1_ps(_mm512_reduce_add_ps(sum) / D));
        }
        for (long d = 0; d < D; d += 16) {
            __m512 dx = _mm512_loadu_ps(g + d);
            if (s.weight) {
                const __m512 v = _mm512_add_ps(widened(x + d, D - d), floats(bias + d, D - d));
                dx = _mm512_mul_ps(r, _mm512_fnmadd_ps(v, sum, _mm512_mul_ps(dx, floats(s.weight + d, D - d))));
            }
            add_to(dbias + d, D - d, dx);
            put(s.at + at + d, D - d, dx);
        }
    });
}

}  // namespace

#endif

// Attention: softmax(q k^T scale) v in bf16, sums and softmax in float32.
//
// FlashAttention's order of work (Dao et al. 2022, arXiv 2205.14135, alg. 1 and 4) with all keys of a head at once, for they fit the
// cache: weights exist for 32 rows at a time and are made again in the backward from the rows' log-sum-exp. A head is the
// work of one thread, so that no answer hangs on the batch or the number of threads. Its rows of D numbers are copied to
// rows of W, a multiple of 32, with zeros after them.

#include "matrix.h"
#include "wide.h"

#ifdef GENFLOW_MATRIX

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace {

constexpr long BLOCK = 32;  // rows of weights at a time
constexpr long PANEL = 1 << 18;  // weights of keys kept for dQ at a time
constexpr float LOG2E = 1.44269504f;

// A piece of the thread's scratch memory, on a cache line.
struct Arena {
    char* next;
    template <typename T>
    T* take(long n) {
        T* here = reinterpret_cast<T*>(next);
        next += up(n * long(sizeof(T)), 64);
        return here;
    }
};

// C (+)= A B; A: m x k row by row, B: k x n in pairs of rows (k/2 x n x 2), C: float32. m, n: multiples of 16; k of 32.
void product(const u16* a, long lda, const u16* b, long ldb, float* c, long ldc, long m, long n, long k, bool add = false) {
    for (long j = 0; j < n; j += 32)
        for (long i = 0; i < m; i += 32) {
            const Tiles rows{a + i * lda, lda, 32, 16 * lda}, columns{b + 2 * j, ldb, 16 * ldb, 32};
            float* to = c + i * ldc + j;
            if (m - i > 16 && n - j > 16) tiles<2, 2>(rows, columns, to, ldc, k / 32, add);
            else if (m - i > 16) tiles<2, 1>(rows, columns, to, ldc, k / 32, add);
            else if (n - j > 16) tiles<1, 2>(rows, columns, to, ldc, k / 32, add);
            else tiles<1, 1>(rows, columns, to, ldc, k / 32, add);
        }
}

inline __mmask16 first(long n) { return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1); }

// Numbers d to d + 32 of a row of D; zeros beyond it.
inline __m512i pairs_at(const u16* row, long d, long D) { return _mm512_maskz_loadu_epi16(D - d >= 32 ? ~0u : (1u << (D - d)) - 1, row + d); }

// The rows, L x D, as rows of W, followed by zeros up to `to` rows.
void copy(const u16* x, long row, long L, long D, u16* y, long W, long to) {
    for (long i = 0; i < L; i++)
        for (long d = 0; d < W; d += 32) _mm512_storeu_si512(y + i * W + d, pairs_at(x + i * row, d, D));
    std::memset(y + L * W, 0, 2 * (to - L) * W);
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

// x^T in pairs: L x D contiguous -> D/2 x L x 2. L: a multiple of 16.
void pairs_of_columns(const u16* x, long L, long D, u16* y) {
    for (long i = 0; i < L; i += 16)
        for (long d = 0; d < D; d += 32) transpose(x + i * D + d, D / 2, y + d * L + 2 * i, L);
}

// x in pairs: L x D contiguous -> L/2 x D x 2. L: even.
void pairs_of_rows(const u16* x, long L, long D, u16* y) {
    for (long i = 0; i < L; i += 2)
        for (long d = 0; d < D; d += 16) {
            const __m256i a = _mm256_loadu_si256((const __m256i*)(x + i * D + d));
            const __m256i b = _mm256_loadu_si256((const __m256i*)(x + (i + 1) * D + d));
            _mm512_storeu_si512(y + i * D + 2 * d, paired(a, b));
        }
}

// x^T: L x D contiguous, L a multiple of 16 -> D x `wide`, zeros from L on, by way of its pairs.
void transposed(const u16* pairs, long L, long D, u16* y, long wide) {
    for (long d = 0; d < D; d += 2) {
        for (long i = 0; i < L; i += 16) {
            __m512i both = _mm512_loadu_si512(pairs + d * L + 2 * i);
            _mm256_storeu_si256((__m256i*)(y + d * wide + i), _mm512_cvtepi32_epi16(both));
            _mm256_storeu_si256((__m256i*)(y + (d + 1) * wide + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
        }
        for (long row = d; row < d + 2; row++) std::memset(y + row * wide + L, 0, 2 * (wide - L));
    }
}

// Rows of C, float32, D numbers of each, times its factor, as bf16. factor: of each row; none: 1.
void put(const float* c, long ldc, const float* factor, long rows, long D, u16* y, long row) {
    for (long i = 0; i < rows; i++)
        for (long d = 0; d < D; d += 16) {
            __m512 x = _mm512_loadu_ps(c + i * ldc + d);
            if (factor) x = _mm512_mul_ps(x, _mm512_set1_ps(factor[i]));
            _mm256_mask_storeu_epi16(y + i * row + d, first(D - d), half(x));
        }
}

// Of one row of scores, the first n alive: weights 2^(s scale - max) in bf16, zeros up to `wide`; 1 / their sum, and its logarithm
// with the maximum added, to the base of 2.
void softmax_row(const float* s, long n, float scale, u16* p, long wide, float* inverse, float* lse) {
    const __m512 by = _mm512_set1_ps(scale), least = _mm512_set1_ps(-INFINITY);
    __m512 top = least, sum = _mm512_setzero_ps();
    for (long j = 0; j < n; j += 16)
        top = _mm512_max_ps(top, _mm512_mask_mul_ps(least, first(n - j), by, _mm512_loadu_ps(s + j)));
    const float most = _mm512_reduce_max_ps(top);
    for (long j = 0; j < wide; j += 16) {
        const __mmask16 alive = first(n - j);
        __m512 e = _mm512_setzero_ps();
        if (alive) {
            e = power_of_two_below(_mm512_fmsub_ps(by, _mm512_loadu_ps(s + j), _mm512_set1_ps(most)));
            e = _mm512_maskz_mov_ps(alive, e);
            sum = _mm512_add_ps(sum, e);
        }
        _mm256_storeu_si256((__m256i*)(p + j), half(e));
    }
    const float total = _mm512_reduce_add_ps(sum);
    *inverse = 1 / total;
    *lse = most + std::log2(total);
}

void forward_head(Arena arena, const u16* q, long q_row, const u16* k, long k_row, const u16* v, long v_row, u16* out, long out_row, float* lse,
                  long Lq, long Lk, long D, float scale, bool causal) {
    const long W = up(D, 32), keys = up(Lk, 16), deep = up(Lk, 32);
    u16* rows = arena.take<u16>(deep * W);
    u16 *kp = arena.take<u16>(keys * W), *vp = arena.take<u16>(deep * W), *qb = arena.take<u16>(BLOCK * W);
    u16* p = arena.take<u16>(BLOCK * deep);
    float *s = arena.take<float>(BLOCK * keys), *o = arena.take<float>(BLOCK * W);
    copy(k, k_row, Lk, D, rows, W, keys);
    pairs_of_columns(rows, keys, W, kp);
    copy(v, v_row, Lk, D, rows, W, deep);
    pairs_of_rows(rows, deep, W, vp);
    float inverse[BLOCK];
    for (long i = 0; i < Lq; i += BLOCK) {
        const long n = std::min(BLOCK, Lq - i), m = up(n, 16);
        const long seen = causal ? std::min(Lk, i + n) : Lk;  // keys
        copy(q + i * q_row, q_row, n, D, qb, W, m);
        product(qb, W, kp, 2 * keys, s, keys, m, up(seen, 16), W);
        for (long r = 0; r < n; r++)
            softmax_row(s + r * keys, causal ? i + r + 1 : Lk, LOG2E * scale, p + r * deep, up(seen, 32), inverse + r, lse + i + r);
        if (m > n) std::memset(p + n * deep, 0, 2 * (m - n) * deep);
        product(p, deep, vp, 2 * W, o, W, m, W, up(seen, 32));
        put(o, W, inverse, n, D, out + i * out_row, out_row);
    }
}

// What a head's backward reads and writes.
struct Head {
    const u16 *q, *k, *v, *out, *g;
    long q_row, k_row, v_row, out_row, g_row;
    const float* lse;
    u16 *dq, *dk, *dv;  // rows of D
};

// dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T Q (alg. 4), with rows of keys.
void backward_head(Arena arena, const Head& x, long Lq, long Lk, long D, float scale, bool causal) {
    const long W = up(D, 32), queries = up(Lq, 16), deep = up(Lq, 32), keys = up(Lk, 16), wide = up(Lk, 32);
    const long chunk = std::max(BLOCK, std::min(wide, PANEL / queries / 32 * 32));
    u16 *k = arena.take<u16>(keys * W), *v = arena.take<u16>(keys * W), *kp = arena.take<u16>(keys * W), *kt = arena.take<u16>(wide * W);
    u16 *q = arena.take<u16>(deep * W), *g = arena.take<u16>(deep * W);
    u16 *q_columns = arena.take<u16>(queries * W), *g_columns = arena.take<u16>(queries * W);
    u16 *q_rows = arena.take<u16>(deep * W), *g_rows = arena.take<u16>(deep * W);
    u16 *p = arena.take<u16>(BLOCK * deep), *ds = arena.take<u16>(BLOCK * deep), *panel = arena.take<u16>(chunk * queries);
    float *s = arena.take<float>(BLOCK * queries), *dp = arena.take<float>(BLOCK * queries), *dqt = arena.take<float>(W * queries);
    float *lse = arena.take<float>(queries), *delta = arena.take<float>(queries), *c = arena.take<float>(std::max(BLOCK * W, 16 * queries));
    copy(x.k, x.k_row, Lk, D, k, W, keys);
    copy(x.v, x.v_row, Lk, D, v, W, keys);
    pairs_of_columns(k, keys, W, kp);
    transposed(kp, keys, W, kt, wide);
    copy(x.q, x.q_row, Lq, D, q, W, deep);
    copy(x.g, x.g_row, Lq, D, g, W, deep);
    pairs_of_columns(q, queries, W, q_columns);
    pairs_of_columns(g, queries, W, g_columns);
    pairs_of_rows(q, deep, W, q_rows);
    pairs_of_rows(g, deep, W, g_rows);
    for (long i = 0; i < queries; i++) {
        __m512 sum = _mm512_setzero_ps();
        if (i < Lq)
            for (long d = 0; d < D; d += 32) {  // pairs of products, as products have them
                const __m512i o = pairs_at(x.out + i * x.out_row, d, D);
                sum = _mm512_dpbf16_ps(sum, (__m512bh)o, (__m512bh)_mm512_loadu_si512(g + i * W + d));
            }
        delta[i] = scale * _mm512_reduce_add_ps(sum);
        lse[i] = i < Lq ? x.lse[i] : 0;
    }
    alignas(64) u16 order[32];
    for (int i = 0; i < 16; i++) order[2 * i] = u16(i), order[2 * i + 1] = u16(i + 16);
    const __m512i interleave = _mm512_load_si512(order);
    const __m512 by = _mm512_set1_ps(scale), by2 = _mm512_set1_ps(LOG2E * scale);
    for (long from = 0; from < wide; from += chunk) {
        const long to = std::min(from + chunk, wide);
        for (long j = from; j < to; j += BLOCK) {
            const long n = std::min(BLOCK, Lk - j), m = up(n, 16), begin = causal ? j : 0;  // queries before see none of these
            if (begin >= queries) {
                std::memset(panel + (j - from) * queries, 0, 2 * BLOCK * queries);
                for (long r = 0; r < n; r++) {
                    std::memset(x.dk + (j + r) * D, 0, 2 * D);
                    std::memset(x.dv + (j + r) * D, 0, 2 * D);
                }
                continue;
            }
            product(k + j * W, W, q_columns + 2 * begin, 2 * queries, s + begin, queries, m, queries - begin, W);
            product(v + j * W, W, g_columns + 2 * begin, 2 * queries, dp + begin, queries, m, queries - begin, W);
            for (long r = 0; r < BLOCK; r += 2) {
                u16* pair = panel + (j - from + r) * queries;
                if (r >= m) {
                    std::memset(pair, 0, 4 * queries);
                    continue;
                }
                std::memset(pair, 0, 4 * begin);
                for (long i = begin; i < queries; i += 16) {
                    const __m512 l = _mm512_loadu_ps(lse + i), d = _mm512_loadu_ps(delta + i);
                    __m512 w[2], e[2];
                    for (int h = 0; h < 2; h++) {
                        const float *sr = s + (r + h) * queries + i, *dr = dp + (r + h) * queries + i;
                        const long key = j + r + h;
                        const __mmask16 alive = key >= Lk ? __mmask16(0) : causal ? __mmask16(~first(key - i)) : __mmask16(0xffff);
                        w[h] = _mm512_maskz_mov_ps(alive, power_of_two_below(_mm512_fmsub_ps(by2, _mm512_loadu_ps(sr), l)));
                        e[h] = _mm512_mul_ps(w[h], _mm512_fmsub_ps(by, _mm512_loadu_ps(dr), d));
                    }
                    const __m512i ww = (__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]), ee = (__m512i)_mm512_cvtne2ps_pbh(e[1], e[0]);
                    _mm256_storeu_si256((__m256i*)(p + r * deep + i), _mm512_castsi512_si256(ww));
                    _mm256_storeu_si256((__m256i*)(p + (r + 1) * deep + i), _mm512_extracti64x4_epi64(ww, 1));
                    _mm256_storeu_si256((__m256i*)(ds + r * deep + i), _mm512_castsi512_si256(ee));
                    _mm256_storeu_si256((__m256i*)(ds + (r + 1) * deep + i), _mm512_extracti64x4_epi64(ee, 1));
                    _mm512_storeu_si512(pair + 2 * i, _mm512_permutexvar_epi16(interleave, ee));
                }
                for (long h = r; h < r + 2; h++) {
                    std::memset(p + h * deep + queries, 0, 2 * (deep - queries));
                    std::memset(ds + h * deep + queries, 0, 2 * (deep - queries));
                }
            }
            product(p + begin, deep, g_rows + begin * W, 2 * W, c, W, m, W, deep - begin);
            put(c, W, nullptr, n, D, x.dv + j * D, D);
            product(ds + begin, deep, q_rows + begin * W, 2 * W, c, W, m, W, deep - begin);
            put(c, W, nullptr, n, D, x.dk + j * D, D);
        }
        product(kt + from, wide, panel, 2 * queries, dqt, queries, W, queries, to - from, from > 0);
    }
    for (long i = 0; i < queries; i += 16) {
        for (long d = 0; d < W; d += 16) transpose(dqt + d * queries + i, queries, c + d, W);
        put(c, W, nullptr, std::min(16L, Lq - i), D, x.dq + i * D, D);
    }
}

// Bytes of scratch memory for a head, with room for every piece's alignment.
long scratch(long Lq, long Lk, long W) {
    const long queries = up(Lq, 32), keys = up(Lk, 32), longest = std::max(queries, keys);
    return 2 * (16 * longest * W + 2 * BLOCK * longest + PANEL + BLOCK * queries) + 4 * (2 * BLOCK * longest + W * queries + BLOCK * W + 20 * queries) + 64 * 32;
}

template <typename F>
void each_head(long B, long H, long bytes, F work) {
#pragma omp parallel
    {
        void* memory = std::aligned_alloc(64, up(bytes, 64));
        [[maybe_unused]] const Units units;
#pragma omp for collapse(2) schedule(static)
        for (long b = 0; b < B; b++)
            for (long h = 0; h < H; h++) work(Arena{static_cast<char*>(memory)}, b, h);
        std::free(memory);
    }
}

}  // namespace

// strides: of q, k, v and out, each of batch, head and row. lse: B x H x Lq.
extern "C" void attention_forward_bf16(const u16* q, const u16* k, const u16* v, u16* out, const long* strides, float* lse, long B, long H, long Lq,
                                       long Lk, long D, float scale, long causal) {
    const long* t = strides;
    each_head(B, H, scratch(Lq, Lk, up(D, 32)), [&](Arena arena, long b, long h) {
        forward_head(arena, q + b * t[0] + h * t[1], t[2], k + b * t[3] + h * t[4], t[5], v + b * t[6] + h * t[7], t[8],
                     out + b * t[9] + h * t[10], t[11], lse + (b * H + h) * Lq, Lq, Lk, D, scale, causal);
    });
}

// strides: of q, k, v, out and its gradient. dq, dk, dv: contiguous.
extern "C" void attention_backward_bf16(const u16* q, const u16* k, const u16* v, const u16* out, const u16* g, const long* strides, const float* lse,
                                        u16* dq, u16* dk, u16* dv, long B, long H, long Lq, long Lk, long D, float scale, long causal) {
    const long* t = strides;
    each_head(B, H, scratch(Lq, Lk, up(D, 32)), [&](Arena arena, long b, long h) {
        const long head = b * H + h;
        Head x{q + b * t[0] + h * t[1], k + b * t[3] + h * t[4], v + b * t[6] + h * t[7], out + b * t[9] + h * t[10], g + b * t[12] + h * t[13],
               t[2], t[5], t[8], t[11], t[14], lse + head * Lq, dq + head * Lq * D, dk + head * Lk * D, dv + head * Lk * D};
        backward_head(arena, x, Lq, Lk, D, scale, causal);
    });
}

#endif

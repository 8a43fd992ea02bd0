// Attention: softmax(q k^T scale) v in bf16, sums and softmax in float32.
//
// FlashAttention's order of work (Dao et al. 2022, arXiv 2205.14135, alg. 1 and 4) with all keys of a head at once, for they fit the
// cache: weights exist for 32 rows at a time and are made again in the backward from the rows' log-sum-exp. A head is the
// work of one thread, so that no answer hangs on the batch or the number of threads. Its rows of D numbers are copied to
// rows of W, a multiple of 32, with zeros after them.

#include "streams.h"

#ifdef GENFLOW_MATRIX

#include <algorithm>
#include <cstdlib>
#include <vector>

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

// Scores times their scale, rounded: fused with what is taken away after, the largest would not be at 0 from itself.
inline __m512 scaled(__m512 by, const float* s) {
    return _mm512_mul_round_ps(by, _mm512_loadu_ps(s), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Of one row of scores, the first n alive: weights 2^(s scale - max) in bf16, zeros up to `wide`; 1 / their sum, and its logarithm
// with the maximum added, to the base of 2.
void softmax_row(const float* s, long n, float scale, u16* p, long wide, float* inverse, float* lse) {
    const __m512 by = _mm512_set1_ps(scale), least = _mm512_set1_ps(-INFINITY);
    __m512 top = least, sum = _mm512_setzero_ps();
    for (long j = 0; j < n; j += 16)
        top = _mm512_max_ps(top, _mm512_mask_mov_ps(least, first(n - j), scaled(by, s + j)));
    const float most = _mm512_reduce_max_ps(top);
    for (long j = 0; j < wide; j += 16) {
        const __mmask16 alive = first(n - j);
        __m512 e = _mm512_setzero_ps();
        if (alive) {
            e = power_of_two_below(_mm512_sub_ps(scaled(by, s + j), _mm512_set1_ps(most)));
            e = _mm512_maskz_mov_ps(alive, e);
            sum = _mm512_add_ps(sum, e);
        }
        _mm256_storeu_si256((__m256i*)(p + j), half(e));
    }
    const float total = _mm512_reduce_add_ps(sum);
    *inverse = 1 / total;
    *lse = most + std::log2(total);
}

// What a head reads and writes.
struct Head {
    Sequence q, k, v, out;
    float* lse;  // of each query
    Sequence g, dq, dk, dv;  // in the backward
};

void forward_head(Arena arena, const Head& x, long Lq, long Lk, float scale, bool causal) {
    const long D = x.q.D;
    const long W = up(D, 32), keys = up(Lk, 16), deep = up(Lk, 32);
    u16* rows = arena.take<u16>(deep * W);
    u16 *kp = arena.take<u16>(keys * W), *vp = arena.take<u16>(deep * W), *qb = arena.take<u16>(BLOCK * W);
    u16* p = arena.take<u16>(BLOCK * deep);
    float *s = arena.take<float>(BLOCK * keys), *o = arena.take<float>(BLOCK * W);
    read_rows(x.k, 0, Lk, rows, W, keys);
    pairs_of_columns(rows, keys, W, kp);
    read_rows(x.v, 0, Lk, rows, W, deep);
    pairs_of_rows(rows, deep, W, vp);
    float inverse[BLOCK];
    for (long i = 0; i < Lq; i += BLOCK) {
        const long n = std::min(BLOCK, Lq - i), m = up(n, 16);
        const long seen = causal ? std::min(Lk, i + n) : Lk;  // keys
        read_rows(x.q, i, n, qb, W, m);
        product(qb, W, kp, 2 * keys, s, keys, m, up(seen, 16), W);
        for (long r = 0; r < n; r++)
            softmax_row(s + r * keys, causal ? i + r + 1 : Lk, LOG2E * scale, p + r * deep, up(seen, 32), inverse + r, x.lse + i + r);
        if (m > n) std::memset(p + n * deep, 0, 2 * (m - n) * deep);
        product(p, deep, vp, 2 * W, o, W, m, W, up(seen, 32));
        write_rows(o, W, inverse, x.out, i, n);
    }
}

// dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T Q (alg. 4), with rows of keys.
void backward_head(Arena arena, const Head& x, long Lq, long Lk, float scale, bool causal) {
    const long D = x.q.D, W = up(D, 32), queries = up(Lq, 16), deep = up(Lq, 32), keys = up(Lk, 16), wide = up(Lk, 32);
    const long chunk = std::max(BLOCK, std::min(wide, PANEL / queries / 32 * 32));
    u16 *k = arena.take<u16>(keys * W), *v = arena.take<u16>(keys * W), *kp = arena.take<u16>(keys * W), *kt = arena.take<u16>(wide * W);
    u16 *q = arena.take<u16>(deep * W), *g = arena.take<u16>(deep * W);
    u16 *q_columns = arena.take<u16>(queries * W), *g_columns = arena.take<u16>(queries * W);
    u16 *q_rows = arena.take<u16>(deep * W), *g_rows = arena.take<u16>(deep * W);
    u16 *p = arena.take<u16>(BLOCK * deep), *ds = arena.take<u16>(BLOCK * deep), *panel = arena.take<u16>(chunk * queries);
    float *s = arena.take<float>(BLOCK * queries), *dp = arena.take<float>(BLOCK * queries), *dqt = arena.take<float>(W * queries);
    float *lse = arena.take<float>(queries), *delta = arena.take<float>(queries), *c = arena.take<float>(BLOCK * W);
    read_rows(x.k, 0, Lk, k, W, keys);
    read_rows(x.v, 0, Lk, v, W, keys);
    pairs_of_columns(k, keys, W, kp);
    transposed(kp, keys, W, kt, wide);
    read_rows(x.q, 0, Lq, q, W, deep);
    read_rows(x.g, 0, Lq, g, W, deep);
    pairs_of_columns(q, queries, W, q_columns);
    pairs_of_columns(g, queries, W, g_columns);
    pairs_of_rows(q, deep, W, q_rows);
    pairs_of_rows(g, deep, W, g_rows);
    std::memset(lse, 0, 4 * queries);
    std::memset(delta, 0, 4 * queries);
    std::memcpy(lse, x.lse, 4 * Lq);
    x.out.rows(0, Lq, [&](const Stream& s, long at, long i) {
        __m512 sum = _mm512_setzero_ps();
        for (long d = 0; d < D; d += 32)  // pairs of products, as products have them
            sum = _mm512_dpbf16_ps(sum, (__m512bh)pairs_at(s.at + at, d, D), (__m512bh)_mm512_loadu_si512(g + i * W + d));
        delta[i] = scale * _mm512_reduce_add_ps(sum);
    });
    alignas(64) u16 order[32];
    for (int i = 0; i < 16; i++) order[2 * i] = u16(i), order[2 * i + 1] = u16(i + 16);
    const __m512i interleave = _mm512_load_si512(order);
    const __m512 by = _mm512_set1_ps(scale), by2 = _mm512_set1_ps(LOG2E * scale);
    for (long from = 0; from < wide; from += chunk) {
        const long to = std::min(from + chunk, wide);
        for (long j = from; j < to; j += BLOCK) {
            const long n = std::min(BLOCK, Lk - j), m = up(n, 16), begin = causal ? j : 0;  // queries before see none of these
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
                        w[h] = _mm512_maskz_mov_ps(alive, power_of_two_below(_mm512_sub_ps(scaled(by2, sr), l)));
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
            write_gradient(c, W, x.dv, j, n);
            product(ds + begin, deep, q_rows + begin * W, 2 * W, c, W, m, W, deep - begin);
            write_gradient(c, W, x.dk, j, n);
        }
        product(kt + from, wide, panel, 2 * queries, dqt, queries, W, queries, to - from, from > 0);
    }
    for (long i = 0; i < queries; i += 16) {
        for (long d = 0; d < W; d += 16) transpose(dqt + d * queries + i, queries, c + d, W);
        write_gradient(c, W, x.dq, i, std::min(16L, Lq - i));
    }
}

// Bytes of scratch memory for a head, with room for every piece's alignment.
long scratch(long Lq, long Lk, long W) {
    const long queries = up(Lq, 32), keys = up(Lk, 32), longest = std::max(queries, keys);
    return 2 * (16 * longest * W + 2 * BLOCK * longest + std::min(PANEL, keys * queries) + BLOCK * queries) + 4 * (2 * BLOCK * longest + W * queries + BLOCK * W + 2 * queries) + 64 * 32;
}

// All heads of all samples. The streams of q and of what comes of it have the same lengths, and so those of k and v.
struct Problem {
    std::vector<Stream> q, k, v, out;
    float* lse;  // B x H x Lq
    long B, H, D;
    float eps, scale;
    bool causal;  // where it is, Lq = Lk
    std::vector<Stream> g, dq, dk, dv;  // in the backward
};

long length(const std::vector<Stream>& x) {
    long sum = 0;
    for (const Stream& s : x) sum += s.L;
    return sum;
}

template <typename F>
void each_head(const Problem& x, F work) {
    const long Lq = length(x.q), Lk = length(x.k);
#pragma omp parallel
    {
        void* memory = std::aligned_alloc(64, up(scratch(Lq, Lk, up(x.D, 32)), 64));
        [[maybe_unused]] const Units units;
#pragma omp for collapse(2) schedule(dynamic)
        for (long b = 0; b < x.B; b++)
            for (long h = 0; h < x.H; h++) {
                const auto of = [&](const std::vector<Stream>& s) { return Sequence{s.data(), b, h, x.H, x.D, x.eps}; };
                const Head head{of(x.q), of(x.k), of(x.v), of(x.out), x.lse + (b * x.H + h) * Lq, of(x.g), of(x.dq), of(x.dk), of(x.dv)};
                work(Arena{static_cast<char*>(memory)}, head, Lq, Lk, x.scale, x.causal);
            }
        std::free(memory);
    }
}

// q, k and v of n products, each B x L x 3 x H x D. weights: of each its bias, 3 x H x D, and the weights of its norms of q and of
// k; normed: whether it has those.
struct Products {
    u16* const* at;
    float* const* weights;
    const long *lengths, *normed;
    long n, H, D;

    std::vector<Stream> part(int p) const {
        std::vector<Stream> found;
        for (long s = 0; s < n; s++) {
            Stream stream{at[s] + p * H * D, lengths[s] * 3 * H * D, D, 3 * H * D, lengths[s], weights[3 * s] + p * H * D};
            if (p < 2 && normed[s]) stream.weight = weights[3 * s + 1 + p];
            found.push_back(stream);
        }
        return found;
    }

    // The same of their gradients. dweights: B x that of each weight, and for every head that of a norm's.
    std::vector<Stream> gradient(int p, u16* const* grads, float* const* dweights) const {
        std::vector<Stream> found = part(p);
        for (long s = 0; s < n; s++) {
            found[s].x = found[s].at;
            found[s].at = grads[s] + p * H * D;
            found[s].dbias = dweights[3 * s] + p * H * D;
            if (found[s].weight) found[s].dweight = dweights[3 * s + 1 + p];
        }
        return found;
    }

    // Rows of H x D, B x L of each product.
    std::vector<Stream> rows(u16* const* x) const {
        std::vector<Stream> found;
        for (long s = 0; s < n; s++) found.push_back({x[s], lengths[s] * H * D, D, H * D, lengths[s]});
        return found;
    }
};

}  // namespace

// strides: of q, k, v and out, each of batch, head and row. lse: B x H x Lq.
extern "C" void attention_forward_bf16(u16* q, u16* k, u16* v, u16* out, const long* t, float* lse, long B, long H, long Lq, long Lk, long D,
                                       float scale, long causal) {
    each_head({{{q, t[0], t[1], t[2], Lq}}, {{k, t[3], t[4], t[5], Lk}}, {{v, t[6], t[7], t[8], Lk}}, {{out, t[9], t[10], t[11], Lq}},
               lse, B, H, D, 0, scale, causal != 0}, forward_head);
}

// strides: of q, k, v, out and its gradient. dq, dk, dv: contiguous.
extern "C" void attention_backward_bf16(u16* q, u16* k, u16* v, u16* out, u16* g, const long* t, float* lse, u16* dq, u16* dk, u16* dv, long B,
                                        long H, long Lq, long Lk, long D, float scale, long causal) {
    each_head({{{q, t[0], t[1], t[2], Lq}}, {{k, t[3], t[4], t[5], Lk}}, {{v, t[6], t[7], t[8], Lk}}, {{out, t[9], t[10], t[11], Lq}},
               lse, B, H, D, 0, scale, causal != 0, {{g, t[12], t[13], t[14], Lq}}, {{dq, H * Lq * D, Lq * D, D, Lq}},
               {{dk, H * Lk * D, Lk * D, D, Lk}}, {{dv, H * Lk * D, Lk * D, D, Lk}}}, backward_head);
}

// n streams side by side, from their products to what each hears: outs, each B x L x H x D. lse: B x H x all rows.
extern "C" void joint_attention_forward_bf16(u16* const* products, float* const* weights, u16* const* outs, const long* lengths, const long* normed,
                                             float* lse, long n, long B, long H, long D, float eps, float scale, long causal) {
    const Products x{products, weights, lengths, normed, n, H, D};
    each_head({x.part(0), x.part(1), x.part(2), x.rows(outs), lse, B, H, D, eps, scale, causal != 0}, forward_head);
}

// gs: the gradients of outs; grads: of products; dweights: zeros at first.
extern "C" void joint_attention_backward_bf16(u16* const* products, float* const* weights, u16* const* outs, u16* const* gs, u16* const* grads,
                                              float* const* dweights, const long* lengths, const long* normed, float* lse, long n, long B, long H,
                                              long D, float eps, float scale, long causal) {
    const Products x{products, weights, lengths, normed, n, H, D};
    each_head({x.part(0), x.part(1), x.part(2), x.rows(outs), lse, B, H, D, eps, scale, causal != 0, x.rows(gs),
               x.gradient(0, grads, dweights), x.gradient(1, grads, dweights), x.gradient(2, grads, dweights)}, backward_head);
}

#endif

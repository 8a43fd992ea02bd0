// Fused elementwise kernels of the MM-DiT block for CPUs: one pass over memory where tensor operations take many.
//
// Plain C++ and OpenMP, compiled once by library.py. T is float or bf16; arithmetic is in float. Every
// sum over tokens belongs to one sample and is taken by one thread, so that results do not depend on their number.

#include "kernels.h"

namespace {

// ---------------------------------------------------------------------------- y = (1 + scale) LN(x) + shift

template <class T>
void norm_forward(const T* x, const T* shift, const T* scale, long stride, T* y, float* mean, float* rstd, long B,
                  long L, long H, float eps) {
#pragma omp parallel
    {
        std::vector<float> room(3 * H);
        float *v = room.data(), *to = v + H, *by = to + H;
        long of = -1;  // the sample that these are of
#pragma omp for collapse(2)
        for (long b = 0; b < B; b++)
            for (long l = 0; l < L; l++) {
                if (of != b) {
                    for (long h = 0; h < H; h++) by[h] = 1 + load(scale[b * stride + h]), to[h] = load(shift[b * stride + h]);
                    of = b;
                }
                const T* row = x + (b * L + l) * H;
                float sum = 0, square = 0;
                for (long h = 0; h < H; h++) sum += v[h] = load(row[h]);
                float m = sum / H;
                for (long h = 0; h < H; h++) square += (v[h] - m) * (v[h] - m);
                float r = 1 / std::sqrt(square / H + eps);
                for (long h = 0; h < H; h++) v[h] = (v[h] - m) * r * by[h] + to[h];
                store_row(y + (b * L + l) * H, v, H);
                mean[b * L + l] = m;
                rstd[b * L + l] = r;
            }
    }
}

// past: the gradient that x has beside, to which this comes; nullptr where there is none.
template <class T>
void norm_backward(const T* g, const T* past, const T* x, const T* scale, long stride, const float* mean, const float* rstd, T* dx,
                   T* dshift, T* dscale, long B, long L, long H) {
#pragma omp parallel for
    for (long b = 0; b < B; b++) {
        std::vector<float> room(5 * H, 0.0f);
        float *ds = room.data(), *dc = ds + H, *by = dc + H, *hat = by + H, *v = hat + H;
        for (long h = 0; h < H; h++) by[h] = 1 + load(scale[b * stride + h]);
        for (long l = 0; l < L; l++) {
            const T *row = x + (b * L + l) * H, *grow = g + (b * L + l) * H;
            float m = mean[b * L + l], r = rstd[b * L + l], s1 = 0, s2 = 0;
            for (long h = 0; h < H; h++) {
                float xhat = (load(row[h]) - m) * r, gh = load(grow[h]), gx = gh * by[h];
                ds[h] += gh;
                dc[h] += gh * xhat;
                s1 += gx;
                s2 += gx * xhat;
                hat[h] = xhat;
                v[h] = gx;
            }
            s1 /= H;
            s2 /= H;
            for (long h = 0; h < H; h++) v[h] = r * (v[h] - s1 - hat[h] * s2);
            if (past)
                for (long h = 0; h < H; h++) v[h] += load(past[(b * L + l) * H + h]);
            store_row(dx + (b * L + l) * H, v, H);
        }
        store_row(dshift + b * H, ds, H);
        store_row(dscale + b * H, dc, H);
    }
}

// ------------------------------------------------------------------------------------- x + gate (y + bias)
// dbias: B x H, one row for each sample.

template <class T>
void gate_forward(const T* x, const T* gate, long stride, const T* y, const float* bias, T* out, long B, long L, long H) {
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        for (long l = 0; l < L; l++) {
            long o = (b * L + l) * H;
            const T* gt = gate + b * stride;
            for (long h = 0; h < H; h++) store(out + o + h, load(x[o + h]) + load(gt[h]) * (load(y[o + h]) + bias[h]));
        }
}

template <class T>
void gate_backward(const T* g, const T* gate, long stride, const T* y, const float* bias, T* dy, T* dgate, float* dbias,
                   long B, long L, long H) {
#pragma omp parallel for
    for (long b = 0; b < B; b++) {
        std::vector<float> sums(2 * H, 0.0f);
        float *sy = sums.data(), *sg = sy + H;
        const T* gt = gate + b * stride;
        for (long l = 0; l < L; l++) {
            long o = (b * L + l) * H;
            for (long h = 0; h < H; h++) {
                float gh = load(g[o + h]);
                sy[h] += gh * load(y[o + h]);
                sg[h] += gh;
                store(dy + o + h, gh * load(gt[h]));
            }
        }
        for (long h = 0; h < H; h++) {
            store(dgate + b * H + h, sy[h] + sg[h] * bias[h]);
            dbias[b * H + h] = sg[h] * load(gt[h]);
        }
    }
}

// ------------------------------------------------- q, k, v of one stream into its place in the joint sequence
// qkv: B x L x 3 x heads x D, to which bias, 3 x heads x D, comes; q, k, v: B x heads x J x D, of which this stream
// takes rows at .. at + L. dbias: B x 3 x heads x D.

template <class T>
void heads_forward(const T* qkv, const float* bias, const float* wq, const float* wk, T* q, T* k, T* v, float* rq, float* rk, long B,
                   long L, long heads, long D, long J, long at, float eps, int normed) {
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        for (long l = 0; l < L; l++)
            for (long n = 0; n < heads; n++) {
                long row = b * L + l, to = ((b * heads + n) * J + at + l) * D;
                const T *sq = qkv + (row * 3 * heads + n) * D, *sk = sq + heads * D, *sv = sk + heads * D;
                const float *bq = bias + n * D, *bk = bq + heads * D, *bv = bk + heads * D;
                if (normed) {
                    float a = 0, c = 0;
                    for (long d = 0; d < D; d++) {
                        float qd = load(sq[d]) + bq[d], kd = load(sk[d]) + bk[d];
                        a += qd * qd;
                        c += kd * kd;
                    }
                    a = 1 / std::sqrt(a / D + eps);
                    c = 1 / std::sqrt(c / D + eps);
                    rq[row * heads + n] = a;
                    rk[row * heads + n] = c;
                    for (long d = 0; d < D; d++) store(q + to + d, (load(sq[d]) + bq[d]) * a * wq[d]);
                    for (long d = 0; d < D; d++) store(k + to + d, (load(sk[d]) + bk[d]) * c * wk[d]);
                } else {
                    for (long d = 0; d < D; d++) store(q + to + d, load(sq[d]) + bq[d]);
                    for (long d = 0; d < D; d++) store(k + to + d, load(sk[d]) + bk[d]);
                }
                for (long d = 0; d < D; d++) store(v + to + d, load(sv[d]) + bv[d]);
            }
}

// d/dx of RMSNorm: dx = r (g w - xhat mean(g w xhat)), xhat = r x; dw += g xhat
template <class T>
void rms_backward(const T* g, const T* x, const float* bias, const float* w, float r, T* dx, float* dbias, float* dw,
                  long D) {
    float s = 0;
    for (long d = 0; d < D; d++) {
        float xhat = (load(x[d]) + bias[d]) * r, gd = load(g[d]);
        dw[d] += gd * xhat;
        s += gd * w[d] * xhat;
    }
    s *= r / D;
    for (long d = 0; d < D; d++) {
        float dxd = r * (load(g[d]) * w[d] - (load(x[d]) + bias[d]) * s);
        dbias[d] += dxd;
        store(dx + d, dxd);
    }
}

template <class T>
void pass_backward(const T* g, T* dx, float* dbias, long D) {
    for (long d = 0; d < D; d++) dbias[d] += load(g[d]);
    std::memcpy(dx, g, D * sizeof(T));
}

template <class T>
void heads_backward(const T* dq, const T* dk, const T* dv, const long* strides, const T* qkv, const float* bias,
                    const float* wq, const float* wk, const float* rq, const float* rk, T* dqkv, float* dbias,
                    float* dwq, float* dwk, long B, long L, long heads, long D, long at, int normed) {
#pragma omp parallel for
    for (long b = 0; b < B; b++)
        for (long l = 0; l < L; l++)
            for (long n = 0; n < heads; n++) {
                long row = b * L + l, from = (row * 3 * heads + n) * D;
                const T* gq = dq + b * strides[0] + n * strides[1] + (at + l) * strides[2];
                const T* gk = dk + b * strides[3] + n * strides[4] + (at + l) * strides[5];
                const T* gv = dv + b * strides[6] + n * strides[7] + (at + l) * strides[8];
                const T *sq = qkv + from, *sk = sq + heads * D;
                const float *bq = bias + n * D, *bk = bq + heads * D;
                T *oq = dqkv + from, *ok = oq + heads * D, *ov = ok + heads * D;
                float *eq = dbias + (b * 3 * heads + n) * D, *ek = eq + heads * D, *ev = ek + heads * D;
                if (normed) {
                    rms_backward(gq, sq, bq, wq, rq[row * heads + n], oq, eq, dwq + b * D, D);
                    rms_backward(gk, sk, bk, wk, rk[row * heads + n], ok, ek, dwk + b * D, D);
                } else {
                    pass_backward(gq, oq, eq, D);
                    pass_backward(gk, ok, ek, D);
                }
                pass_backward(gv, ov, ev, D);
            }
}

// ----------------------------- GELU of x + bias, tanh form: a sigmoid(2u), u = sqrt(2/pi) (a + 0.044715 a^3)
// dbias: B x H, one row for each sample.

constexpr float C0 = 1.5957691216f, C1 = 0.0713548162726f;  // 2 sqrt(2/pi), and that times 0.044715
constexpr float LN2 = 0.69314718056f;

template <class T>
void gelu_forward(const T* x, const float* bias, T* y, long rows, long H) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows; i++) {
        const T* row = x + i * H;
        T* out = y + i * H;
#pragma omp simd
        for (long h = 0; h < H; h++) {
            float a = load(row[h]) + bias[h];
            store(out + h, a * logistic(a * (C0 + C1 * a * a)));
        }
    }
}

template <class T>
void gelu_backward(const T* g, const T* x, const float* bias, T* dx, float* dbias, long B, long L, long H) {
#pragma omp parallel for schedule(static)
    for (long b = 0; b < B; b++) {
        float* db = dbias + b * H;
        for (long i = b * L; i < (b + 1) * L; i++)
            for (long h = 0; h < H; h++) {
                float a = load(x[i * H + h]) + bias[h], s = logistic(a * (C0 + C1 * a * a));
                float d = load(g[i * H + h]) * (s + a * s * (1 - s) * (C0 + 3 * C1 * a * a));
                db[h] += d;
                store(dx + i * H + h, d);
            }
    }
}

#ifdef GENFLOW_WIDE

// The same for bf16, sixteen numbers at a time: the time goes into the sigmoid and the roundings, of which one serves two.
struct Gelu {
    __m512 a, cubic, s;  // sigmoid(2u) = 1 / (1 + 2^z), z = a cubic
    Gelu(const bf16* x, const float* bias) {
        a = _mm512_add_ps(widened(x), _mm512_loadu_ps(bias));
        cubic = _mm512_fmadd_ps(_mm512_mul_ps(a, a), _mm512_set1_ps(-C1 / LN2), _mm512_set1_ps(-C0 / LN2));
        s = logistic_of_two(_mm512_mul_ps(a, cubic));
    }
    __m512 value() const { return _mm512_mul_ps(a, s); }
    __m512 derivative() const {  // s + a s (1 - s) (C0 + 3 C1 a^2)
        const __m512 rise = _mm512_fmadd_ps(cubic, _mm512_set1_ps(-3 * LN2), _mm512_set1_ps(-2 * C0));
        return _mm512_fmadd_ps(_mm512_mul_ps(a, _mm512_fnmadd_ps(s, s, s)), rise, s);
    }
};

void gelu_forward(const bf16* x, const float* bias, bf16* y, long rows, long H) {
    if (H % 32) return gelu_forward<bf16>(x, bias, y, rows, H);
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows; i++)
        for (long h = 0; h < H; h += 32) {
            const __m512 low = Gelu(x + i * H + h, bias + h).value(), high = Gelu(x + i * H + h + 16, bias + h + 16).value();
            _mm512_storeu_si512(y + i * H + h, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
}

void gelu_backward(const bf16* g, const bf16* x, const float* bias, bf16* dx, float* dbias, long B, long L, long H) {
    if (H % 16) return gelu_backward<bf16>(g, x, bias, dx, dbias, B, L, H);
#pragma omp parallel for schedule(static)
    for (long b = 0; b < B; b++)
        for (long i = b * L; i < (b + 1) * L; i++)
            for (long h = 0; h < H; h += 16) {
                float* db = dbias + b * H + h;
                const __m512 d = _mm512_mul_ps(widened(g + i * H + h), Gelu(x + i * H + h, bias + h).derivative());
                _mm512_storeu_ps(db, _mm512_add_ps(_mm512_loadu_ps(db), d));
                _mm256_storeu_si256((__m256i*)(dx + i * H + h), half(d));
            }
}

#endif

}  // namespace

#define P1(T) (const T* x, const T* shift, const T* scale, long stride, T* y, float* mean, float* rstd, long B, long L, long H, float eps)
#define A1(T) (x, shift, scale, stride, y, mean, rstd, B, L, H, eps)
BOTH(norm_forward, P1, A1)
#define P2(T) (const T* g, const T* past, const T* x, const T* scale, long stride, const float* mean, const float* rstd, T* dx, T* dshift, T* dscale, long B, long L, long H)
#define A2(T) (g, past, x, scale, stride, mean, rstd, dx, dshift, dscale, B, L, H)
BOTH(norm_backward, P2, A2)
#define P3(T) (const T* x, const T* gate, long stride, const T* y, const float* bias, T* out, long B, long L, long H)
#define A3(T) (x, gate, stride, y, bias, out, B, L, H)
BOTH(gate_forward, P3, A3)
#define P4(T) (const T* g, const T* gate, long stride, const T* y, const float* bias, T* dy, T* dgate, float* dbias, long B, long L, long H)
#define A4(T) (g, gate, stride, y, bias, dy, dgate, dbias, B, L, H)
BOTH(gate_backward, P4, A4)
#define P5(T) (const T* qkv, const float* bias, const float* wq, const float* wk, T* q, T* k, T* v, float* rq, float* rk, long B, long L, long heads, long D, long J, long at, float eps, int normed)
#define A5(T) (qkv, bias, wq, wk, q, k, v, rq, rk, B, L, heads, D, J, at, eps, normed)
BOTH(heads_forward, P5, A5)
#define P6(T) (const T* dq, const T* dk, const T* dv, const long* strides, const T* qkv, const float* bias, const float* wq, const float* wk, const float* rq, const float* rk, T* dqkv, float* dbias, float* dwq, float* dwk, long B, long L, long heads, long D, long at, int normed)
#define A6(T) (dq, dk, dv, strides, qkv, bias, wq, wk, rq, rk, dqkv, dbias, dwq, dwk, B, L, heads, D, at, normed)
BOTH(heads_backward, P6, A6)
#define P7(T) (const T* x, const float* bias, T* y, long rows, long H)
#define A7(T) (x, bias, y, rows, H)
BOTH(gelu_forward, P7, A7)
#define P8(T) (const T* g, const T* x, const float* bias, T* dx, float* dbias, long B, long L, long H)
#define A8(T) (g, x, bias, dx, dbias, B, L, H)
BOTH(gelu_backward, P8, A8)

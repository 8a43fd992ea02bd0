// Couplings of pictures for CPUs: what surrounds the matrix products of a 3x3, 1x1, 3x3 convolution network
// (genflow/layers/conv.py), and the affine map of one half by its output (genflow/layers/affine.py).
//
// Pictures are B x H x W x C in memory. Every sample is taken by one thread, so that results do not depend on their number.

#include "kernels.h"

namespace {

// Columns: of every place its 3x3 neighbours' channels, (ky, kx, c), zero beyond the edge. Pixels of x are stride apart.
template <class T>
void unfold(const float* x, long stride, T* columns, long B, long H, long W, long C) {
    long run = 3 * C, width = (W + 2) * C;
#pragma omp parallel for schedule(static)
    for (long b = 0; b < B; b++) {
        std::vector<T> edged((H + 2) * width);  // the sample with a border of zeros
        for (long i = 0; i < H; i++)
            for (long j = 0; j < W; j++) {
                const float* from = x + ((b * H + i) * W + j) * stride;
                T* to = edged.data() + (i + 1) * width + (j + 1) * C;
                for (long c = 0; c < C; c++) store(to + c, from[c]);
            }
        for (long i = 0; i < H; i++)
            for (long j = 0; j < W; j++)
                for (long k = 0; k < 3; k++) {
                    T* to = columns + (((b * H + i) * W + j) * 3 + k) * run;
                    std::memcpy(to, edged.data() + (i + k) * width + j * C, run * sizeof(T));
                }
    }
}

// The transpose of unfold: every column is added to the places that it came from. out: B x H x W x C, bias included.
template <class T>
void fold(const T* columns, const float* bias, float* out, long B, long H, long W, long C) {
    long run = 3 * C, width = (W + 2) * C;
#pragma omp parallel for schedule(static)
    for (long b = 0; b < B; b++) {
        std::vector<float> edged((H + 2) * width);
        for (long i = 0; i < H; i++)
            for (long j = 0; j < W; j++)
                for (long k = 0; k < 3; k++) {
                    const T* from = columns + (((b * H + i) * W + j) * 3 + k) * run;
                    float* to = edged.data() + (i + k) * width + j * C;
#pragma omp simd
                    for (long c = 0; c < run; c++) to[c] += load(from[c]);
                }
        for (long i = 0; i < H; i++)
            for (long j = 0; j < W; j++)
                for (long c = 0; c < C; c++)
                    out[((b * H + i) * W + j) * C + c] = edged[(i + 1) * width + (j + 1) * C + c] + bias[c];
    }
}

// h = relu(h + bias), in place; the bias of each sample is stride further on, or the same.
template <class T>
void bias_relu(T* h, const float* bias, long stride, long B, long L, long H) {
#pragma omp parallel for schedule(static)
    for (long b = 0; b < B; b++) {
        const float* add = bias + b * stride;
        for (long l = 0; l < L; l++) {
            T* row = h + (b * L + l) * H;
#pragma omp simd
            for (long k = 0; k < H; k++) {
                float a = load(row[k]) + add[k];
                store(row + k, a < 0.0f ? 0.0f : a);
            }
        }
    }
}

// g = g where h > 0, in place, and its sum over each sample's places: dbias, B x H.
template <class T>
void relu_backward(T* g, const T* h, float* dbias, long B, long L, long H) {
#pragma omp parallel for schedule(static)
    for (long b = 0; b < B; b++) {
        float* sum = dbias + b * H;
        for (long k = 0; k < H; k++) sum[k] = 0;
        for (long l = 0; l < L; l++) {
            T* row = g + (b * L + l) * H;
            const T* from = h + (b * L + l) * H;
#pragma omp simd
            for (long k = 0; k < H; k++) {
                float a = load(from[k]) > 0.0f ? load(row[k]) : 0.0f;
                sum[k] += a;
                store(row + k, a);
            }
        }
    }
}

// ------------------------------------------- z = (kept, x exp(s) + t), s = limit tanh(u / limit), ladj = sum s
// x, z: B x L x C; parameters: B x L x 2 (C - kept), first t, then u.

// A sample's tanh(u / limit) and exp(way * s), L x changed each: on their own, so that they vectorise.
template <class T>
void bounded(const T* parameters, float* bent, float* scale, long L, long changed, float limit, float way) {
    for (long l = 0; l < L; l++)
        for (long c = 0; c < changed; c++) bent[l * changed + c] = load(parameters[(2 * l + 1) * changed + c]);
    float inverse = 2 / limit;
#pragma omp simd
    for (long i = 0; i < L * changed; i++) {
        bent[i] = 2 * logistic(bent[i] * inverse) - 1;
        scale[i] = fast_exp(way * limit * bent[i]);
    }
}

template <class T>
void affine(const float* x, const T* parameters, float* z, float* ladj, long B, long L, long C, long kept, float limit,
            bool invert) {
    long changed = C - kept;
#pragma omp parallel for schedule(static)
    for (long b = 0; b < B; b++) {
        std::vector<float> both(2 * L * changed);
        float *bent = both.data(), *scale = bent + L * changed, total = 0, way = invert ? -1 : 1;
        bounded(parameters + b * L * 2 * changed, bent, scale, L, changed, limit, way);
        for (long l = 0; l < L; l++) {
            const T* t = parameters + (b * L + l) * 2 * changed;
            const float *from = x + (b * L + l) * C, *e = scale + l * changed;
            float* to = z + (b * L + l) * C;
            for (long c = 0; c < kept; c++) to[c] = from[c];
            from += kept, to += kept;
            if (invert)
                for (long c = 0; c < changed; c++) to[c] = (from[c] - load(t[c])) * e[c];
            else
                for (long c = 0; c < changed; c++) to[c] = from[c] * e[c] + load(t[c]);
        }
        for (long i = 0; i < L * changed; i++) total += bent[i];
        ladj[b] = way * limit * total;
    }
}

template <class T>
void affine_forward(const float* x, const T* parameters, float* z, float* ladj, long B, long L, long C, long kept,
                    float limit) {
    affine(x, parameters, z, ladj, B, L, C, kept, limit, false);
}

template <class T>
void affine_inverse(const float* z, const T* parameters, float* x, float* ladj, long B, long L, long C, long kept,
                    float limit) {
    affine(z, parameters, x, ladj, B, L, C, kept, limit, true);
}

template <class T>
void affine_backward(const float* gz, const float* gladj, const float* x, const T* parameters, float* dx,
                     T* dparameters, long B, long L, long C, long kept, float limit) {
    long changed = C - kept;
#pragma omp parallel for schedule(static)
    for (long b = 0; b < B; b++) {
        std::vector<float> both(2 * L * changed);
        float *bent = both.data(), *scale = bent + L * changed;
        bounded(parameters + b * L * 2 * changed, bent, scale, L, changed, limit, 1);
        for (long l = 0; l < L; l++) {
            const float *g = gz + (b * L + l) * C, *from = x + (b * L + l) * C + kept;
            const float *h = bent + l * changed, *e = scale + l * changed;
            float* to = dx + (b * L + l) * C;
            T *dt = dparameters + (b * L + l) * 2 * changed, *du = dt + changed;
            for (long c = 0; c < kept; c++) to[c] = g[c];
            g += kept, to += kept;
            for (long c = 0; c < changed; c++) {
                to[c] = g[c] * e[c];
                store(dt + c, g[c]);
                store(du + c, (to[c] * from[c] + gladj[b]) * (1 - h[c] * h[c]));
            }
        }
    }
}

}  // namespace

#define P1(T) (const float* x, long stride, T* columns, long B, long H, long W, long C)
#define A1(T) (x, stride, columns, B, H, W, C)
BOTH(unfold, P1, A1)
#define P2(T) (const T* columns, const float* bias, float* out, long B, long H, long W, long C)
#define A2(T) (columns, bias, out, B, H, W, C)
BOTH(fold, P2, A2)
#define P3(T) (T* h, const float* bias, long stride, long B, long L, long H)
#define A3(T) (h, bias, stride, B, L, H)
BOTH(bias_relu, P3, A3)
#define P4(T) (T* g, const T* h, float* dbias, long B, long L, long H)
#define A4(T) (g, h, dbias, B, L, H)
BOTH(relu_backward, P4, A4)
#define P5(T) (const float* x, const T* parameters, float* z, float* ladj, long B, long L, long C, long kept, float limit)
#define A5(T) (x, parameters, z, ladj, B, L, C, kept, limit)
BOTH(affine_forward, P5, A5)
BOTH(affine_inverse, P5, A5)
#define P6(T) (const float* gz, const float* gladj, const float* x, const T* parameters, float* dx, T* dparameters, long B, long L, long C, long kept, float limit)
#define A6(T) (gz, gladj, x, parameters, dx, dparameters, B, L, C, kept, limit)
BOTH(affine_backward, P6, A6)

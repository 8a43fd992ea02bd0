// AdamW and a moving average of the weights, in one pass over memory.

#include <algorithm>

#include "kernels.h"

namespace {

constexpr long PIECE = 1 << 14;  // numbers that a thread takes at a time

struct Piece {
    long tensor, start;
};

}  // namespace

// tensors: for each of `count`, where p, its gradient, both moments and the average begin. keep = 1 - lr * decay;
// rate = lr / (1 - beta1^t); root = 1 / sqrt(1 - beta2^t); new1, new2 = 1 - beta1, 1 - beta2.
extern "C" void adamw_f32(float* const* tensors, const long* sizes, long count, float keep, float new1, float beta2,
                          float new2, float rate, float root, float eps, float weight) {
    std::vector<Piece> pieces;
    for (long i = 0; i < count; i++)
        for (long start = 0; start < sizes[i]; start += PIECE) pieces.push_back({i, start});
#pragma omp parallel for schedule(static)
    for (size_t k = 0; k < pieces.size(); k++) {
        const long i = pieces[k].tensor, start = pieces[k].start, n = std::min(PIECE, sizes[i] - start);
        float* const* own = tensors + 5 * i;
        float *__restrict p = own[0] + start, *__restrict m = own[2] + start, *__restrict v = own[3] + start;
        float *__restrict average = own[4] + start;
        const float* __restrict g = own[1] + start;
        for (long j = 0; j < n; j++) {
            const float first = m[j] + new1 * (g[j] - m[j]), second = beta2 * v[j] + new2 * g[j] * g[j];
            const float next = keep * p[j] - rate * first / (std::sqrt(second) * root + eps);
            m[j] = first;
            v[j] = second;
            p[j] = next;
            average[j] += weight * (next - average[j]);
        }
    }
}

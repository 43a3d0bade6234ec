#ifndef INFINICPU_OP_STRIDED_H_
#define INFINICPU_OP_STRIDED_H_

#include "tensor.h"

#include <algorithm>
#include <array>
#include <cstdlib>

namespace infinicpu {

// A loop nest over N operands of one shape, simplified: dimensions of length 1 dropped, dimensions that follow each
// other in memory in every operand merged, ordered by the first operand's strides. The last dimension is the inner
// loop. Strides are in elements.
template <size_t N>
struct StridedLoop {
    struct Dim {
        size_t length;
        std::array<ptrdiff_t, N> strides;
    };
    std::vector<Dim> outer;
    Dim inner{1, {}};
    size_t rows = 1; // iterations of the outer loops

    StridedLoop() = default;

    explicit StridedLoop(const std::array<const TensorDescriptor *, N> &operands) {
        std::vector<Dim> dims;
        for (size_t i = 0; i < operands[0]->ndim(); ++i) {
            Dim dim{operands[0]->dim(i), {}};
            for (size_t operand = 0; operand < N; ++operand) {
                dim.strides[operand] = operands[operand]->stride(i);
            }
            if (dim.length != 1) {
                dims.push_back(dim);
            }
        }
        std::stable_sort(dims.begin(), dims.end(), [](const Dim &x, const Dim &y) { return std::abs(x.strides[0]) > std::abs(y.strides[0]); });
        for (const Dim &dim : dims) {
            if (!outer.empty() && follows(outer.back(), dim)) {
                outer.back() = Dim{outer.back().length * dim.length, dim.strides};
            } else {
                outer.push_back(dim);
            }
        }
        if (!outer.empty()) {
            inner = outer.back();
            outer.pop_back();
        } else {
            inner.strides.fill(1); // a scalar is a run of one
        }
        for (const Dim &dim : outer) {
            rows *= dim.length;
        }
    }

    bool innerIsContiguous() const {
        return std::all_of(inner.strides.begin(), inner.strides.end(), [](ptrdiff_t stride) { return stride == 1; });
    }

    // Each operand's offset, in elements, of an iteration of the outer loops.
    std::array<ptrdiff_t, N> offsets(size_t row) const {
        std::array<ptrdiff_t, N> result{};
        for (size_t i = outer.size(); i-- > 0;) {
            const size_t index = row % outer[i].length;
            row /= outer[i].length;
            for (size_t operand = 0; operand < N; ++operand) {
                result[operand] += ptrdiff_t(index) * outer[i].strides[operand];
            }
        }
        return result;
    }

private:
    static bool follows(const Dim &far, const Dim &near) {
        for (size_t operand = 0; operand < N; ++operand) {
            if (far.strides[operand] != near.strides[operand] * ptrdiff_t(near.length)) {
                return false;
            }
        }
        return true;
    }
};

} // namespace infinicpu

#endif // INFINICPU_OP_STRIDED_H_

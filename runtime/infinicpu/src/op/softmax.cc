#include "../kernels/kernels.h"
#include "launch.h"
#include "thread_pool.h"

#include <infiniop/ops/causal_softmax.h>

#include <algorithm>

using namespace infinicpu;

namespace {

constexpr size_t PIECE_ELEMENTS = 4096;

struct CausalSoftmaxDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "causal_softmax";
    infiniDtype_t dtype;
    size_t batch, seq, total;
    struct Strides {
        ptrdiff_t batch, row, col;
    } y, x;
};

CausalSoftmaxDescriptor::Strides readStrides(const TensorDescriptor &tensor) {
    const size_t first = tensor.ndim() - 2;
    return {first == 1 ? tensor.stride(0) : 0, tensor.stride(first), tensor.stride(first + 1)};
}

} // namespace

infiniStatus_t infiniopCreateCausalSoftmaxDescriptor(infiniopHandle_t handle, infiniopCausalSoftmaxDescriptor_t *desc_ptr, infiniopTensorDescriptor_t y_desc, infiniopTensorDescriptor_t x_desc) {
    return createOperator<CausalSoftmaxDescriptor>(handle, desc_ptr, {y_desc, x_desc}, [&](CausalSoftmaxDescriptor &d) {
        d.dtype = y_desc->dtype;
        INFINICPU_REQUIRE(x_desc->dtype == d.dtype && isOneOf(d.dtype, {INFINI_DTYPE_F16, INFINI_DTYPE_BF16, INFINI_DTYPE_F32}), INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(x_desc->shape == y_desc->shape && (y_desc->ndim() == 2 || y_desc->ndim() == 3), INFINI_STATUS_BAD_TENSOR_SHAPE);
        const size_t first = y_desc->ndim() - 2;
        d.batch = first == 1 ? y_desc->dim(0) : 1;
        d.seq = y_desc->dim(first);
        d.total = y_desc->dim(first + 1);
        INFINICPU_REQUIRE(d.total >= d.seq, INFINI_STATUS_BAD_TENSOR_SHAPE);
        d.y = readStrides(*y_desc);
        d.x = readStrides(*x_desc);
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_WORKSPACE_SIZE(CausalSoftmax)

infiniStatus_t infiniopCausalSoftmax(infiniopCausalSoftmaxDescriptor_t desc, void *workspace, size_t workspace_size, void *y, const void *x, void *stream) {
    return launch<CausalSoftmaxDescriptor>(desc, workspace, workspace_size, {y, x}, stream, [=](const CausalSoftmaxDescriptor &d) {
        const ptrdiff_t size = ptrdiff_t(sizeOf(d.dtype));
        parallelFor(0, d.batch * d.seq, std::max<size_t>(1, PIECE_ELEMENTS / std::max<size_t>(1, d.total)), [&](size_t from, size_t to) {
            for (size_t i = from; i < to; ++i) {
                const ptrdiff_t batch = ptrdiff_t(i / d.seq);
                const ptrdiff_t row = ptrdiff_t(i % d.seq);
                SoftmaxRow task{};
                task.y = static_cast<char *>(y) + (batch * d.y.batch + row * d.y.row) * size;
                task.x = static_cast<const char *>(x) + (batch * d.x.batch + row * d.x.row) * size;
                task.y_stride = d.y.col;
                task.x_stride = d.x.col;
                task.visible = d.total - d.seq + size_t(row) + 1;
                task.total = d.total;
                kernels().softmax[floatIndex(d.dtype)](task);
            }
        });
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_DESTROY(CausalSoftmax)

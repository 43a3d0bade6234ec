#include "../kernels/kernels.h"
#include "launch.h"
#include "thread_pool.h"

#include <infiniop/ops/rope.h>

#include <algorithm>

using namespace infinicpu;

namespace {

constexpr size_t PIECE_ELEMENTS = 8192;

struct RoPEDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "rope";
    infiniDtype_t dtype, pos_dtype;
    infiniopRoPEAlgo_t algo;
    size_t batch, tokens, heads, half, table_rows;
    bool pos_has_batch;
    struct Strides {
        ptrdiff_t batch, token, head;
    } y, x;
};

RoPEDescriptor::Strides readStrides(const TensorDescriptor &tensor) {
    const size_t first = tensor.ndim() - 3;
    return {first == 1 ? tensor.stride(0) : 0, tensor.stride(first), tensor.stride(first + 1)};
}

void rotateDouble(double *y, const double *x, const double *sines, const double *cosines, size_t half, infiniopRoPEAlgo_t algo) {
    for (size_t i = 0; i < half; ++i) {
        const size_t first = algo == INFINIOP_ROPE_ALGO_GPT_J ? 2 * i : i;
        const size_t second = algo == INFINIOP_ROPE_ALGO_GPT_J ? 2 * i + 1 : i + half;
        const double x0 = x[first], x1 = x[second];
        y[first] = x0 * cosines[i] - x1 * sines[i];
        y[second] = x0 * sines[i] + x1 * cosines[i];
    }
}

} // namespace

infiniStatus_t infiniopCreateRoPEDescriptor(infiniopHandle_t handle, infiniopRoPEDescriptor_t *desc_ptr, infiniopTensorDescriptor_t y, infiniopTensorDescriptor_t x, infiniopTensorDescriptor_t pos_ids, infiniopTensorDescriptor_t sin_table, infiniopTensorDescriptor_t cos_table, infiniopRoPEAlgo_t algo) {
    return createOperator<RoPEDescriptor>(handle, desc_ptr, {y, x, pos_ids, sin_table, cos_table}, [&](RoPEDescriptor &d) {
        // InfiniCore gives this status for a bad algorithm too.
        INFINICPU_REQUIRE(algo >= 0 && algo < INFINIOP_ROPE_ALGO_COUNT, INFINI_STATUS_NULL_POINTER);
        d.dtype = y->dtype;
        d.pos_dtype = pos_ids->dtype;
        INFINICPU_REQUIRE(x->dtype == d.dtype && sin_table->dtype == d.dtype && cos_table->dtype == d.dtype, INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(isOneOf(d.dtype, {INFINI_DTYPE_F16, INFINI_DTYPE_BF16, INFINI_DTYPE_F32, INFINI_DTYPE_F64}), INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(isAnyInteger(d.pos_dtype), INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(y->ndim() == 3 || y->ndim() == 4, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(pos_ids->ndim() == 1 || pos_ids->ndim() == 2, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(sin_table->ndim() == 2 && cos_table->ndim() == 2 && x->shape == y->shape, INFINI_STATUS_BAD_TENSOR_SHAPE);
        const size_t first = y->ndim() - 3;
        d.batch = first == 1 ? y->dim(0) : 1;
        d.tokens = y->dim(first);
        d.heads = y->dim(first + 1);
        d.pos_has_batch = pos_ids->ndim() == 2;
        INFINICPU_REQUIRE(pos_ids->shape == (d.pos_has_batch ? std::vector<size_t>{d.batch, d.tokens} : std::vector<size_t>{d.tokens}), INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(sin_table->shape == cos_table->shape && y->dim(first + 2) == 2 * sin_table->dim(1), INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(y->strides.back() == 1 && x->strides.back() == 1, INFINI_STATUS_BAD_TENSOR_STRIDES);
        INFINICPU_REQUIRE(sin_table->isContiguous() && cos_table->isContiguous(), INFINI_STATUS_BAD_TENSOR_STRIDES);
        // InfiniCore ignores these strides and would read the wrong positions.
        INFINICPU_REQUIRE(pos_ids->isContiguous(), INFINI_STATUS_BAD_TENSOR_STRIDES);
        d.half = sin_table->dim(1);
        d.table_rows = sin_table->dim(0);
        d.y = readStrides(*y);
        d.x = readStrides(*x);
        d.algo = algo;
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_WORKSPACE_SIZE(RoPE)

infiniStatus_t infiniopRoPE(infiniopRoPEDescriptor_t desc, void *workspace, size_t workspace_size, void *y, const void *x, const void *pos_ids, const void *sin_table, const void *cos_table, void *stream) {
    return launch<RoPEDescriptor>(desc, workspace, workspace_size, {y, x, pos_ids, sin_table, cos_table}, stream, [=](const RoPEDescriptor &d) {
        for (size_t i = 0; i < d.operands[2].numel(); ++i) {
            const int64_t position = readInteger(pos_ids, d.pos_dtype, ptrdiff_t(i));
            INFINICPU_REQUIRE(position >= 0 && uint64_t(position) < d.table_rows, INFINI_STATUS_BAD_PARAM);
        }
        const ptrdiff_t size = ptrdiff_t(sizeOf(d.dtype));
        const size_t grain = std::max<size_t>(1, PIECE_ELEMENTS / std::max<size_t>(1, d.heads * 2 * d.half));
        parallelFor(0, d.batch * d.tokens, grain, [&](size_t from, size_t to) {
            for (size_t i = from; i < to; ++i) {
                const size_t batch = i / d.tokens;
                const size_t token = i % d.tokens;
                const int64_t position = readInteger(pos_ids, d.pos_dtype, ptrdiff_t(d.pos_has_batch ? i : token));
                const char *sin_row = static_cast<const char *>(sin_table) + position * ptrdiff_t(d.half) * size;
                const char *cos_row = static_cast<const char *>(cos_table) + position * ptrdiff_t(d.half) * size;
                for (size_t head = 0; head < d.heads; ++head) {
                    const auto at = [&](const RoPEDescriptor::Strides &s) { return (ptrdiff_t(batch) * s.batch + ptrdiff_t(token) * s.token + ptrdiff_t(head) * s.head) * size; };
                    char *y_head = static_cast<char *>(y) + at(d.y);
                    const char *x_head = static_cast<const char *>(x) + at(d.x);
                    if (d.dtype == INFINI_DTYPE_F64) {
                        rotateDouble(reinterpret_cast<double *>(y_head), reinterpret_cast<const double *>(x_head), reinterpret_cast<const double *>(sin_row), reinterpret_cast<const double *>(cos_row), d.half, d.algo);
                    } else {
                        kernels().rope[floatIndex(d.dtype)][d.algo]({y_head, x_head, sin_row, cos_row, d.half});
                    }
                }
            }
        });
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_DESTROY(RoPE)

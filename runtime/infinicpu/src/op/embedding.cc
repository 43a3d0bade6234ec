#include "../sim/memory.h"
#include "launch.h"
#include "thread_pool.h"

#include <infiniop/ops/embedding.h>

#include <algorithm>
#include <cstring>

using namespace infinicpu;

namespace {

constexpr size_t PIECE_BYTES = 64 << 10;

struct EmbeddingDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "embedding";
    static constexpr bool TAKES_WORKSPACE = false;
    infiniDtype_t index_dtype;
    size_t count, table_rows, row_bytes;
};

} // namespace

infiniStatus_t infiniopCreateEmbeddingDescriptor(infiniopHandle_t handle, infiniopEmbeddingDescriptor_t *desc_ptr, infiniopTensorDescriptor_t output_desc, infiniopTensorDescriptor_t input_desc, infiniopTensorDescriptor_t weight_desc) {
    return createOperator<EmbeddingDescriptor>(handle, desc_ptr, {output_desc, input_desc, weight_desc}, [&](EmbeddingDescriptor &d) {
        INFINICPU_REQUIRE(weight_desc->ndim() == 2 && output_desc->ndim() == input_desc->ndim() + 1, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(output_desc->shape.back() == weight_desc->dim(1), INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(std::equal(input_desc->shape.begin(), input_desc->shape.end(), output_desc->shape.begin()), INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(isOneOf(input_desc->dtype, {INFINI_DTYPE_I32, INFINI_DTYPE_I64}), INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(isOneOf(weight_desc->dtype, {INFINI_DTYPE_F32, INFINI_DTYPE_F16, INFINI_DTYPE_BF16}) && output_desc->dtype == weight_desc->dtype, INFINI_STATUS_BAD_TENSOR_DTYPE);
        // InfiniCore ignores the strides here and would read the wrong rows.
        INFINICPU_REQUIRE(input_desc->isContiguous() && output_desc->isContiguous() && weight_desc->isContiguous(), INFINI_STATUS_BAD_TENSOR_STRIDES);
        d.index_dtype = input_desc->dtype;
        d.count = input_desc->numel();
        d.table_rows = weight_desc->dim(0);
        d.row_bytes = weight_desc->dim(1) * sizeOf(weight_desc->dtype);
        return INFINI_STATUS_SUCCESS;
    });
}

infiniStatus_t infiniopEmbedding(infiniopEmbeddingDescriptor_t desc, void *output, const void *input, const void *weight, void *stream) {
    return launch<EmbeddingDescriptor>(desc, nullptr, 0, {output, input, weight}, stream, [=](const EmbeddingDescriptor &d) {
        const auto hasRow = [&](size_t i) {
            const int64_t index = readInteger(input, d.index_dtype, ptrdiff_t(i));
            return index >= 0 && uint64_t(index) < d.table_rows;
        };
        for (size_t i = 0; i < d.count; ++i) {
            // Devices do not look: the row stays as it is, which here is made visible.
            if (d.simulated != nullptr && !hasRow(i)) {
                std::memset(static_cast<char *>(output) + i * d.row_bytes, infinirt_cpu::POISON, d.row_bytes);
            } else {
                INFINICPU_REQUIRE(hasRow(i), INFINI_STATUS_BAD_PARAM);
            }
        }
        if (d.row_bytes == 0) {
            return INFINI_STATUS_SUCCESS;
        }
        parallelFor(0, d.count, std::max<size_t>(1, PIECE_BYTES / d.row_bytes), [&](size_t from, size_t to) {
            for (size_t i = from; i < to; ++i) {
                if (hasRow(i)) {
                    const size_t index = size_t(readInteger(input, d.index_dtype, ptrdiff_t(i)));
                    std::memcpy(static_cast<char *>(output) + i * d.row_bytes, static_cast<const char *>(weight) + index * d.row_bytes, d.row_bytes);
                }
            }
        });
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_DESTROY(Embedding)

#include "launch.h"
#include "strided.h"
#include "thread_pool.h"

#include <infiniop/ops/rearrange.h>

#include <cstring>

using namespace infinicpu;

namespace {

constexpr size_t PIECE_BYTES = 64 << 10;

struct RearrangeDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "rearrange";
    static constexpr bool TAKES_WORKSPACE = false;
    StridedLoop<2> loop;
    size_t element_size;
};

template <size_t SIZE>
void copyStrided(size_t n, char *dst, ptrdiff_t dst_stride, const char *src, ptrdiff_t src_stride) {
    for (size_t i = 0; i < n; ++i) {
        std::memcpy(dst + ptrdiff_t(i) * dst_stride, src + ptrdiff_t(i) * src_stride, SIZE);
    }
}

void copyRow(size_t size, size_t n, char *dst, ptrdiff_t dst_stride, const char *src, ptrdiff_t src_stride) {
    if (dst_stride == 1 && src_stride == 1) {
        std::memmove(dst, src, n * size); // dst may be src
        return;
    }
    dst_stride *= ptrdiff_t(size);
    src_stride *= ptrdiff_t(size);
    switch (size) {
    case 1:
        return copyStrided<1>(n, dst, dst_stride, src, src_stride);
    case 2:
        return copyStrided<2>(n, dst, dst_stride, src, src_stride);
    case 4:
        return copyStrided<4>(n, dst, dst_stride, src, src_stride);
    case 8:
        return copyStrided<8>(n, dst, dst_stride, src, src_stride);
    default:
        return copyStrided<16>(n, dst, dst_stride, src, src_stride);
    }
}

} // namespace

infiniStatus_t infiniopCreateRearrangeDescriptor(infiniopHandle_t handle, infiniopRearrangeDescriptor_t *desc_ptr, infiniopTensorDescriptor_t dst, infiniopTensorDescriptor_t src) {
    return createOperator<RearrangeDescriptor>(handle, desc_ptr, {dst, src}, [&](RearrangeDescriptor &d) {
        INFINICPU_REQUIRE(src->dtype == dst->dtype, INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(src->shape == dst->shape, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(!dst->hasBroadcast(), INFINI_STATUS_BAD_TENSOR_STRIDES);
        d.loop = StridedLoop<2>({dst, src});
        d.element_size = sizeOf(dst->dtype);
        return INFINI_STATUS_SUCCESS;
    });
}

infiniStatus_t infiniopRearrange(infiniopRearrangeDescriptor_t desc, void *dst, const void *src, void *stream) {
    return launch<RearrangeDescriptor>(desc, nullptr, 0, {dst, src}, stream, [=](const RearrangeDescriptor &d) {
        if (d.operands[0].numel() == 0) {
            return INFINI_STATUS_SUCCESS;
        }
        const auto &inner = d.loop.inner;
        const size_t run = std::max<size_t>(1, PIECE_BYTES / d.element_size); // elements of a row that are one piece
        const size_t pieces = (inner.length + run - 1) / run;
        parallelFor(0, d.loop.rows * pieces, std::max<size_t>(1, run / inner.length), [&](size_t from, size_t to) {
            for (size_t task = from; task < to; ++task) {
                const auto offsets = d.loop.offsets(task / pieces);
                const size_t start = task % pieces * run;
                const auto at = [&](size_t operand) { return (offsets[operand] + ptrdiff_t(start) * inner.strides[operand]) * ptrdiff_t(d.element_size); };
                copyRow(d.element_size, std::min(run, inner.length - start), static_cast<char *>(dst) + at(0), inner.strides[0], static_cast<const char *>(src) + at(1), inner.strides[1]);
            }
        });
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_DESTROY(Rearrange)

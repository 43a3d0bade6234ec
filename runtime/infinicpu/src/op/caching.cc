// paged_caching and kv_caching: appending k and v to a cache.

#include "launch.h"
#include "thread_pool.h"

#include <infiniop/ops/kv_caching.h>
#include <infiniop/ops/paged_caching.h>

#include <algorithm>
#include <cstring>

using namespace infinicpu;

namespace {

constexpr size_t PIECE_BYTES = 32 << 10;

struct PagedCachingDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "paged_caching";
    size_t tokens, heads, blocks, block_size;
    size_t element_size;
};

struct KVCachingDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "kv_caching";
    size_t batch, heads, seq, max_seq, dim;
    size_t element_size;
};

// A vector of n elements between two strided places.
void copyVector(size_t size, size_t n, char *dst, ptrdiff_t dst_stride, const char *src, ptrdiff_t src_stride) {
    if (dst_stride == 1 && src_stride == 1) {
        std::memcpy(dst, src, n * size);
        return;
    }
    for (size_t i = 0; i < n; ++i) {
        std::memcpy(dst + ptrdiff_t(i) * dst_stride * ptrdiff_t(size), src + ptrdiff_t(i) * src_stride * ptrdiff_t(size), size);
    }
}

bool isCacheDtype(infiniDtype_t dtype) {
    return isOneOf(dtype, {INFINI_DTYPE_F16, INFINI_DTYPE_BF16, INFINI_DTYPE_F32});
}

} // namespace

infiniStatus_t infiniopCreatePagedCachingDescriptor(infiniopHandle_t handle, infiniopPagedCachingDescriptor_t *desc_ptr, infiniopTensorDescriptor_t k_cache_desc, infiniopTensorDescriptor_t v_cache_desc, infiniopTensorDescriptor_t k_desc, infiniopTensorDescriptor_t v_desc, infiniopTensorDescriptor_t slot_mapping_desc) {
    return createOperator<PagedCachingDescriptor>(handle, desc_ptr, {k_cache_desc, v_cache_desc, k_desc, v_desc, slot_mapping_desc}, [&](PagedCachingDescriptor &d) {
        const infiniDtype_t dtype = k_desc->dtype;
        INFINICPU_REQUIRE(isCacheDtype(dtype) && v_desc->dtype == dtype && k_cache_desc->dtype == dtype && v_cache_desc->dtype == dtype, INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(slot_mapping_desc->dtype == INFINI_DTYPE_I64, INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(k_desc->ndim() == 3 && v_desc->ndim() == 3 && k_cache_desc->ndim() == 4 && v_cache_desc->ndim() == 4 && slot_mapping_desc->ndim() == 1, INFINI_STATUS_BAD_TENSOR_SHAPE);
        d.tokens = slot_mapping_desc->dim(0);
        d.heads = k_desc->dim(1);
        d.blocks = k_cache_desc->dim(0);
        d.block_size = k_cache_desc->dim(2);
        d.element_size = sizeOf(dtype);
        INFINICPU_REQUIRE(k_desc->dim(0) == d.tokens && v_desc->dim(0) == d.tokens && v_desc->dim(1) == d.heads, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(v_cache_desc->dim(0) == d.blocks && v_cache_desc->dim(1) == d.heads && v_cache_desc->dim(2) == d.block_size, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(k_cache_desc->dim(1) == d.heads && k_cache_desc->dim(3) == k_desc->dim(2) && v_cache_desc->dim(3) == v_desc->dim(2), INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(d.block_size != 0, INFINI_STATUS_BAD_TENSOR_SHAPE);
        // InfiniCore assumes these to be 1 without looking.
        INFINICPU_REQUIRE(k_desc->stride(2) == 1 && v_desc->stride(2) == 1 && k_cache_desc->stride(3) == 1 && v_cache_desc->stride(3) == 1 && slot_mapping_desc->isContiguous(), INFINI_STATUS_BAD_TENSOR_STRIDES);
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_WORKSPACE_SIZE(PagedCaching)

infiniStatus_t infiniopPagedCaching(infiniopPagedCachingDescriptor_t desc, void *workspace, size_t workspace_size, void *k_cache, void *v_cache, const void *k, const void *v, const void *slot_mapping, void *stream) {
    return launch<PagedCachingDescriptor>(desc, workspace, workspace_size, {k_cache, v_cache, k, v, slot_mapping}, stream, [=](const PagedCachingDescriptor &d) {
        const int64_t *slots = static_cast<const int64_t *>(slot_mapping);
        for (size_t i = 0; i < d.tokens; ++i) {
            INFINICPU_REQUIRE(slots[i] < 0 || uint64_t(slots[i]) / d.block_size < d.blocks, INFINI_STATUS_BAD_PARAM);
        }
        const size_t token_bytes = std::max<size_t>(1, d.heads * d.operands[2].dim(2) * d.element_size);
        const auto copyToken = [&](const TensorDescriptor &cache, void *to, const TensorDescriptor &source, const void *from, size_t token) {
            const ptrdiff_t block = slots[token] / int64_t(d.block_size);
            const ptrdiff_t row = slots[token] % int64_t(d.block_size);
            const ptrdiff_t size = ptrdiff_t(d.element_size);
            for (size_t head = 0; head < d.heads; ++head) {
                char *dst = static_cast<char *>(to) + (block * cache.stride(0) + ptrdiff_t(head) * cache.stride(1) + row * cache.stride(2)) * size;
                const char *src = static_cast<const char *>(from) + (ptrdiff_t(token) * source.stride(0) + ptrdiff_t(head) * source.stride(1)) * size;
                std::memcpy(dst, src, source.dim(2) * d.element_size);
            }
        };
        const auto copyTokens = [&](size_t from, size_t to) {
            for (size_t token = from; token < to; ++token) {
                if (slots[token] >= 0) {
                    copyToken(d.operands[0], k_cache, d.operands[2], k, token);
                    copyToken(d.operands[1], v_cache, d.operands[3], v, token);
                }
            }
        };
        parallelFor(0, d.tokens, std::max<size_t>(1, PIECE_BYTES / token_bytes), copyTokens);
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_DESTROY(PagedCaching)

infiniStatus_t infiniopCreateKVCachingDescriptor(infiniopHandle_t handle, infiniopKVCachingDescriptor_t *desc_ptr, infiniopTensorDescriptor_t k_cache, infiniopTensorDescriptor_t v_cache, infiniopTensorDescriptor_t k, infiniopTensorDescriptor_t v, infiniopTensorDescriptor_t past_kv_lengths) {
    return createOperator<KVCachingDescriptor>(handle, desc_ptr, {k_cache, v_cache, k, v, past_kv_lengths}, [&](KVCachingDescriptor &d) {
        const infiniDtype_t dtype = k_cache->dtype;
        INFINICPU_REQUIRE(isCacheDtype(dtype) && v_cache->dtype == dtype && k->dtype == dtype && v->dtype == dtype, INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(isOneOf(past_kv_lengths->dtype, {INFINI_DTYPE_I32, INFINI_DTYPE_I64}), INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(k_cache->ndim() == 4 && k->ndim() == 4, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(k_cache->shape == v_cache->shape && k->shape == v->shape, INFINI_STATUS_BAD_TENSOR_SHAPE);
        d.batch = k->dim(0);
        d.heads = k->dim(1);
        d.seq = k->dim(2);
        d.dim = k->dim(3);
        d.max_seq = k_cache->dim(2);
        d.element_size = sizeOf(dtype);
        INFINICPU_REQUIRE(k_cache->dim(0) == d.batch && k_cache->dim(1) == d.heads && k_cache->dim(3) == d.dim, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(past_kv_lengths->ndim() == 1 && past_kv_lengths->dim(0) == d.batch, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(past_kv_lengths->isContiguous(), INFINI_STATUS_BAD_TENSOR_STRIDES);
        INFINICPU_REQUIRE(!k_cache->hasBroadcast() && !v_cache->hasBroadcast(), INFINI_STATUS_BAD_TENSOR_STRIDES);
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_WORKSPACE_SIZE(KVCaching)

infiniStatus_t infiniopKVCaching(infiniopKVCachingDescriptor_t desc, void *workspace, size_t workspace_size, void *k_cache, void *v_cache, const void *k, const void *v, const void *past_kv_lengths, void *stream) {
    return launch<KVCachingDescriptor>(desc, workspace, workspace_size, {k_cache, v_cache, k, v, past_kv_lengths}, stream, [=](const KVCachingDescriptor &d) {
        const infiniDtype_t index_dtype = d.operands[4].dtype;
        for (size_t i = 0; i < d.batch; ++i) {
            const int64_t past = readInteger(past_kv_lengths, index_dtype, ptrdiff_t(i));
            INFINICPU_REQUIRE(past >= 0 && d.seq <= d.max_seq && uint64_t(past) <= d.max_seq - d.seq, INFINI_STATUS_BAD_PARAM);
        }
        const auto copyOne = [&](const TensorDescriptor &cache, void *to, const TensorDescriptor &source, const void *from, size_t batch, size_t head, size_t row, ptrdiff_t past) {
            const ptrdiff_t size = ptrdiff_t(d.element_size);
            const ptrdiff_t b = ptrdiff_t(batch), h = ptrdiff_t(head), s = ptrdiff_t(row);
            char *dst = static_cast<char *>(to) + (b * cache.stride(0) + h * cache.stride(1) + (past + s) * cache.stride(2)) * size;
            const char *src = static_cast<const char *>(from) + (b * source.stride(0) + h * source.stride(1) + s * source.stride(2)) * size;
            copyVector(d.element_size, d.dim, dst, cache.stride(3), src, source.stride(3));
        };
        const size_t grain = std::max<size_t>(1, PIECE_BYTES / std::max<size_t>(1, d.dim * d.element_size));
        parallelFor(0, d.batch * d.heads * d.seq, grain, [&](size_t from, size_t to) {
            for (size_t i = from; i < to; ++i) {
                const size_t row = i % d.seq;
                const size_t head = i / d.seq % d.heads;
                const size_t batch = i / d.seq / d.heads;
                const ptrdiff_t past = readInteger(past_kv_lengths, index_dtype, ptrdiff_t(batch));
                copyOne(d.operands[0], k_cache, d.operands[2], k, batch, head, row, past);
                copyOne(d.operands[1], v_cache, d.operands[3], v, batch, head, row, past);
            }
        });
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_DESTROY(KVCaching)

// The composite attention of one sequence. InfiniCore makes it of rearrange, gemm and causal_softmax; here it is one
// pass over the cache, which needs no matrix of scores.

#include "../kernels/kernels.h"
#include "launch.h"
#include "thread_pool.h"

#include <infiniop/ops/attention.h>

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace infinicpu;

namespace {

struct AttentionDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "attention";
    infiniDtype_t dtype;
    size_t heads, kv_heads, seq, dim, pos;
};

enum Operand { OUT,
               Q,
               K,
               V,
               K_CACHE,
               V_CACHE };

// [kv_heads, seq, dim] into the cache's rows pos ...
void append(const AttentionDescriptor &d, Operand cache, void *to, Operand source, const void *from) {
    const TensorDescriptor &target = d.operands[cache], &input = d.operands[source];
    const ptrdiff_t size = ptrdiff_t(sizeOf(d.dtype));
    parallelFor(0, d.kv_heads * d.seq, 64, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const ptrdiff_t head = ptrdiff_t(i / d.seq), row = ptrdiff_t(i % d.seq);
            std::memcpy(static_cast<char *>(to) + (head * target.stride(0) + (ptrdiff_t(d.pos) + row) * target.stride(1)) * size,
                        static_cast<const char *>(from) + (head * input.stride(0) + row * input.stride(1)) * size, d.dim * size_t(size));
        }
    });
}

infiniStatus_t compute(const AttentionDescriptor &d, void *out, const void *q, const void *k, const void *v, void *k_cache, void *v_cache) {
    append(d, K_CACHE, k_cache, K, k);
    append(d, V_CACHE, v_cache, V, v);
    const ptrdiff_t size = ptrdiff_t(sizeOf(d.dtype));
    const size_t group = d.heads / d.kv_heads;
    const size_t tokens_per_block = std::max<size_t>(1, ATTENTION_MAX_ROWS / group);
    const size_t blocks = (d.seq + tokens_per_block - 1) / tokens_per_block;
    const auto strideOf = [&](Operand operand, size_t i) { return d.operands[operand].stride(i); };
    std::atomic<bool> out_of_memory{false};
    parallelFor(0, blocks * d.kv_heads, 1, [&](size_t from, size_t to) {
        void *scratch = threadScratch(attentionScratchBytes(tokens_per_block * group, d.dim, d.dim));
        if (scratch == nullptr) {
            out_of_memory.store(true, std::memory_order_relaxed);
            return;
        }
        for (size_t i = from; i < to; ++i) {
            const size_t kv_head = i % d.kv_heads;
            const size_t first = i / d.kv_heads * tokens_per_block;
            const ptrdiff_t head = ptrdiff_t(kv_head * group);
            AttentionTask t{};
            t.q = static_cast<const char *>(q) + (head * strideOf(Q, 0) + ptrdiff_t(first) * strideOf(Q, 1)) * size;
            t.q_token = strideOf(Q, 1);
            t.q_head = strideOf(Q, 0);
            t.out = static_cast<char *>(out) + (ptrdiff_t(first) * strideOf(OUT, 0) + head * strideOf(OUT, 1)) * size;
            t.out_token = strideOf(OUT, 0);
            t.out_head = strideOf(OUT, 1);
            t.tokens = std::min(tokens_per_block, d.seq - first);
            t.group = group;
            t.dim = d.dim;
            t.value_dim = d.dim;
            t.k = static_cast<const char *>(k_cache) + ptrdiff_t(kv_head) * strideOf(K_CACHE, 0) * size;
            t.v = static_cast<const char *>(v_cache) + ptrdiff_t(kv_head) * strideOf(V_CACHE, 0) * size;
            t.k_row = strideOf(K_CACHE, 1);
            t.v_row = strideOf(V_CACHE, 1);
            t.block_size = d.pos + d.seq; // all of it is one block
            t.kv_end = d.pos + d.seq;
            t.first_visible = d.pos + first + 1;
            t.scale = 1.0f / std::sqrt(float(d.dim));
            t.scratch = scratch;
            kernels().attention[floatIndex(d.dtype)](t);
        }
    });
    return out_of_memory.load() ? INFINI_STATUS_INTERNAL_ERROR : INFINI_STATUS_SUCCESS;
}

} // namespace

infiniStatus_t infiniopCreateAttentionDescriptor(infiniopHandle_t handle, infiniopAttentionDescriptor_t *desc_ptr, infiniopTensorDescriptor_t out_desc, infiniopTensorDescriptor_t q_desc, infiniopTensorDescriptor_t k_desc, infiniopTensorDescriptor_t v_desc, infiniopTensorDescriptor_t k_cache_desc, infiniopTensorDescriptor_t v_cache_desc, size_t pos) {
    return createOperator<AttentionDescriptor>(handle, desc_ptr, {out_desc, q_desc, k_desc, v_desc, k_cache_desc, v_cache_desc}, [&](AttentionDescriptor &d) {
        for (const TensorDescriptor &tensor : d.operands) {
            INFINICPU_REQUIRE(tensor.ndim() == 3, INFINI_STATUS_BAD_TENSOR_SHAPE);
        }
        INFINICPU_REQUIRE(out_desc->isContiguous(), INFINI_STATUS_BAD_TENSOR_STRIDES);
        for (size_t i = Q; i <= V_CACHE; ++i) {
            INFINICPU_REQUIRE(d.operands[i].stride(2) == 1, INFINI_STATUS_BAD_TENSOR_STRIDES);
        }
        d.heads = q_desc->dim(0);
        d.seq = q_desc->dim(1);
        d.dim = q_desc->dim(2);
        d.kv_heads = k_desc->dim(0);
        d.pos = pos;
        INFINICPU_REQUIRE(d.kv_heads != 0 && d.heads % d.kv_heads == 0, INFINI_STATUS_BAD_PARAM);
        INFINICPU_REQUIRE((out_desc->shape == std::vector<size_t>{d.seq, d.heads, d.dim}), INFINI_STATUS_BAD_PARAM);
        INFINICPU_REQUIRE((k_desc->shape == std::vector<size_t>{d.kv_heads, d.seq, d.dim}) && v_desc->shape == k_desc->shape, INFINI_STATUS_BAD_PARAM);
        for (const TensorDescriptor *cache : {k_cache_desc, v_cache_desc}) {
            INFINICPU_REQUIRE(cache->dim(0) == d.kv_heads && cache->dim(1) >= pos && cache->dim(1) - pos >= d.seq && cache->dim(2) == d.dim, INFINI_STATUS_BAD_PARAM);
        }
        d.dtype = q_desc->dtype;
        INFINICPU_REQUIRE(isOneOf(d.dtype, {INFINI_DTYPE_F16, INFINI_DTYPE_BF16, INFINI_DTYPE_F32}), INFINI_STATUS_BAD_TENSOR_DTYPE);
        for (const TensorDescriptor &tensor : d.operands) {
            INFINICPU_REQUIRE(tensor.dtype == d.dtype, INFINI_STATUS_BAD_TENSOR_DTYPE);
        }
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_WORKSPACE_SIZE(Attention)

infiniStatus_t infiniopAttention(infiniopAttentionDescriptor_t desc, void *workspace, size_t workspace_size, void *out, const void *q, const void *k, const void *v, void *k_cache, void *v_cache, void *stream) {
    return launch<AttentionDescriptor>(desc, workspace, workspace_size, {out, q, k, v, k_cache, v_cache}, stream, [=](const AttentionDescriptor &d) {
        return compute(d, out, q, k, v, k_cache, v_cache);
    });
}

INFINICPU_DEFINE_DESTROY(Attention)

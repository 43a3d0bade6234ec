#ifndef INFINICPU_INFINIOP_OPS_ATTENTION_H_
#define INFINICPU_INFINIOP_OPS_ATTENTION_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopAttentionDescriptor_t;

/**
 * One sequence's attention: append k and v to the caches at pos, then out = softmax(q k^T / sqrt(dim), causal) v.
 *
 *   q [heads, seq, dim]; k, v [kv_heads, seq, dim]; caches [kv_heads, >= pos + seq, dim]; last strides 1;
 *   out [seq, heads, dim] contiguous. f16, bf16 or f32. pos, the length before this call, is fixed at create.
 */
__INFINI_C __export infiniStatus_t infiniopCreateAttentionDescriptor(
    infiniopHandle_t handle,
    infiniopAttentionDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t out_desc,
    infiniopTensorDescriptor_t q_desc,
    infiniopTensorDescriptor_t k_desc,
    infiniopTensorDescriptor_t v_desc,
    infiniopTensorDescriptor_t k_cache_desc,
    infiniopTensorDescriptor_t v_cache_desc,
    size_t pos);

__INFINI_C __export infiniStatus_t infiniopGetAttentionWorkspaceSize(
    infiniopAttentionDescriptor_t desc,
    size_t *size);

__INFINI_C __export infiniStatus_t infiniopAttention(
    infiniopAttentionDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *out,
    const void *q,
    const void *k,
    const void *v,
    void *k_cache,
    void *v_cache,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyAttentionDescriptor(infiniopAttentionDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_ATTENTION_H_

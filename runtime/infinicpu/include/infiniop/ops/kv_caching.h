#ifndef INFINICPU_INFINIOP_OPS_KV_CACHING_H_
#define INFINICPU_INFINIOP_OPS_KV_CACHING_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopKVCachingDescriptor_t;

/**
 * Append to contiguous caches: cache[b, h, past_kv_lengths[b] + s, :] = k[b, h, s, :], for k and v.
 *
 *   k, v [batch, kv_heads, seq, dim]; caches [batch, kv_heads, max_seq, dim]; f16, bf16 or f32, one dtype; strides free;
 *   past_kv_lengths [batch] i32 or i64. past + seq beyond max_seq is BAD_PARAM, and nothing is written.
 */
__INFINI_C __export infiniStatus_t infiniopCreateKVCachingDescriptor(
    infiniopHandle_t handle,
    infiniopKVCachingDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t k_cache,
    infiniopTensorDescriptor_t v_cache,
    infiniopTensorDescriptor_t k,
    infiniopTensorDescriptor_t v,
    infiniopTensorDescriptor_t past_kv_lengths);

__INFINI_C __export infiniStatus_t infiniopGetKVCachingWorkspaceSize(
    infiniopKVCachingDescriptor_t desc,
    size_t *size);

__INFINI_C __export infiniStatus_t infiniopKVCaching(
    infiniopKVCachingDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *k_cache,
    void *v_cache,
    const void *k,
    const void *v,
    const void *past_kv_lengths,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyKVCachingDescriptor(infiniopKVCachingDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_KV_CACHING_H_

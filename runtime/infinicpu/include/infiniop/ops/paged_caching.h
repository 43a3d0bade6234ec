#ifndef INFINICPU_INFINIOP_OPS_PAGED_CACHING_H_
#define INFINICPU_INFINIOP_OPS_PAGED_CACHING_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopPagedCachingDescriptor_t;

/**
 * Write each token's k and v into its slot: slot s is row s % block_size of block s / block_size. Negative slots are skipped.
 *
 *   k [tokens, kv_heads, dim], v [tokens, kv_heads, v_dim]; caches [blocks, kv_heads, block_size, dim or v_dim];
 *   f16, bf16 or f32; last strides 1, others free; slot_mapping [tokens] i64.
 * A slot beyond the last block is BAD_PARAM, and nothing is written. Two tokens with one slot: which one stays is unspecified.
 */
__INFINI_C __export infiniStatus_t infiniopCreatePagedCachingDescriptor(
    infiniopHandle_t handle,
    infiniopPagedCachingDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t k_cache_desc,
    infiniopTensorDescriptor_t v_cache_desc,
    infiniopTensorDescriptor_t k_desc,
    infiniopTensorDescriptor_t v_desc,
    infiniopTensorDescriptor_t slot_mapping_desc);

__INFINI_C __export infiniStatus_t infiniopGetPagedCachingWorkspaceSize(
    infiniopPagedCachingDescriptor_t desc,
    size_t *size);

__INFINI_C __export infiniStatus_t infiniopPagedCaching(
    infiniopPagedCachingDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *k_cache,
    void *v_cache,
    const void *k,
    const void *v,
    const void *slot_mapping,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyPagedCachingDescriptor(infiniopPagedCachingDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_PAGED_CACHING_H_

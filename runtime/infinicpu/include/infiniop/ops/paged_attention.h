#ifndef INFINICPU_INFINIOP_OPS_PAGED_ATTENTION_H_
#define INFINICPU_INFINIOP_OPS_PAGED_ATTENTION_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopPagedAttentionDescriptor_t;

/**
 * Decode: each sequence's one query attends to seq_lens[i] cached positions (the current token included).
 *
 *   out, q [seqs, heads, dim]; caches [blocks, kv_heads, block_size, dim], any strides but the last; heads % kv_heads == 0;
 *   f16, bf16 or f32, any dim. block_tables [seqs, max_blocks] and seq_lens [seqs] share i32, i64 or u32.
 *   alibi_slopes: NULL or [heads] f32, adds slope * (key position - query position) to the scores.
 * seq_lens[i] == 0 writes zeros. A length or block beyond the tables or the cache is BAD_PARAM.
 */
__INFINI_C __export infiniStatus_t infiniopCreatePagedAttentionDescriptor(
    infiniopHandle_t handle,
    infiniopPagedAttentionDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t out_desc,
    infiniopTensorDescriptor_t q_desc,
    infiniopTensorDescriptor_t k_cache_desc,
    infiniopTensorDescriptor_t v_cache_desc,
    infiniopTensorDescriptor_t block_tables_desc,
    infiniopTensorDescriptor_t seq_lens_desc,
    infiniopTensorDescriptor_t alibi_slopes_desc,
    float scale);

__INFINI_C __export infiniStatus_t infiniopGetPagedAttentionWorkspaceSize(
    infiniopPagedAttentionDescriptor_t desc,
    size_t *size);

__INFINI_C __export infiniStatus_t infiniopPagedAttention(
    infiniopPagedAttentionDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *out,
    const void *q,
    const void *k_cache,
    const void *v_cache,
    const void *block_tables,
    const void *seq_lens,
    const void *alibi_slopes,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyPagedAttentionDescriptor(infiniopPagedAttentionDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_PAGED_ATTENTION_H_

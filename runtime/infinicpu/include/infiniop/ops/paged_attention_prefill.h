#ifndef INFINICPU_INFINIOP_OPS_PAGED_ATTENTION_PREFILL_H_
#define INFINICPU_INFINIOP_OPS_PAGED_ATTENTION_PREFILL_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopPagedAttentionPrefillDescriptor_t;

/**
 * Prefill of packed sequences: query j of sequence i attends to positions <= seq_lens[i] - q_len[i] + j.
 *
 *   out, q [total_q, heads, dim]; q rows cum_seq_lens_q[i] .. cum_seq_lens_q[i + 1] belong to sequence i; seq_lens are TOTAL
 *   lengths, new tokens included, and the new tokens' k and v are in the cache already. Caches, dtypes, block_tables and
 *   alibi_slopes as paged_attention; the three index tensors share i32, i64 or u32.
 * A sequence with seq_lens[i] == 0 writes zeros to its rows. Rows outside cum_seq_lens_q are left alone.
 */
__INFINI_C __export infiniStatus_t infiniopCreatePagedAttentionPrefillDescriptor(
    infiniopHandle_t handle,
    infiniopPagedAttentionPrefillDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t out_desc,
    infiniopTensorDescriptor_t q_desc,
    infiniopTensorDescriptor_t k_cache_desc,
    infiniopTensorDescriptor_t v_cache_desc,
    infiniopTensorDescriptor_t block_tables_desc,
    infiniopTensorDescriptor_t seq_lens_desc,
    infiniopTensorDescriptor_t cum_seq_lens_q_desc,
    infiniopTensorDescriptor_t alibi_slopes_desc,
    float scale);

__INFINI_C __export infiniStatus_t infiniopGetPagedAttentionPrefillWorkspaceSize(
    infiniopPagedAttentionPrefillDescriptor_t desc,
    size_t *size);

__INFINI_C __export infiniStatus_t infiniopPagedAttentionPrefill(
    infiniopPagedAttentionPrefillDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *out,
    const void *q,
    const void *k_cache,
    const void *v_cache,
    const void *block_tables,
    const void *seq_lens,
    const void *cum_seq_lens_q,
    const void *alibi_slopes,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyPagedAttentionPrefillDescriptor(
    infiniopPagedAttentionPrefillDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_PAGED_ATTENTION_PREFILL_H_

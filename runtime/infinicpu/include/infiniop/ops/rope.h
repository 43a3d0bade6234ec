#ifndef INFINICPU_INFINIOP_OPS_ROPE_H_
#define INFINICPU_INFINIOP_OPS_ROPE_H_

#include "../operator_descriptor.h"

typedef enum {
    INFINIOP_ROPE_ALGO_GPT_J = 0,
    INFINIOP_ROPE_ALGO_GPT_NEOX = 1,
    INFINIOP_ROPE_ALGO_COUNT = 2,
} infiniopRoPEAlgo_t;

typedef struct InfiniopDescriptor *infiniopRoPEDescriptor_t;

/**
 * Rotary position embedding: pairs (x0, x1) become (x0 cos - x1 sin, x0 sin + x1 cos).
 *
 *   y, x [tokens, heads, dim] or [batch, tokens, heads, dim], last stride 1; pos_ids [tokens] or [batch, tokens],
 *   any integer type, contiguous; sin_table, cos_table [positions, dim / 2], contiguous, x's dtype (f16, bf16, f32, f64).
 * algo says which elements pair up: GPT_J (2i, 2i + 1), GPT_NEOX (i, dim / 2 + i). y may be x.
 * A position outside the tables is BAD_PARAM, and nothing is written.
 */
__INFINI_C __export infiniStatus_t infiniopCreateRoPEDescriptor(
    infiniopHandle_t handle,
    infiniopRoPEDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t y,
    infiniopTensorDescriptor_t x,
    infiniopTensorDescriptor_t pos_ids,
    infiniopTensorDescriptor_t sin_table,
    infiniopTensorDescriptor_t cos_table,
    infiniopRoPEAlgo_t algo);

__INFINI_C __export infiniStatus_t infiniopGetRoPEWorkspaceSize(infiniopRoPEDescriptor_t desc, size_t *size);

__INFINI_C __export infiniStatus_t infiniopRoPE(
    infiniopRoPEDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *y,
    const void *x,
    const void *pos_ids,
    const void *sin_table,
    const void *cos_table,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyRoPEDescriptor(infiniopRoPEDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_ROPE_H_

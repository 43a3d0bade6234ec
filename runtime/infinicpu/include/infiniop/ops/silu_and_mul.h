#ifndef INFINICPU_INFINIOP_OPS_SILU_AND_MUL_H_
#define INFINICPU_INFINIOP_OPS_SILU_AND_MUL_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopSiluAndMulDescriptor_t;

/**
 * output[..., i] = silu(input[..., i]) * input[..., d + i]: the gate is the first half of the last dimension.
 *
 *   output [..., d], input [..., 2 * d], both contiguous; dtype f16, bf16 or f32. Computed in f32, rounded once.
 */
__INFINI_C __export infiniStatus_t infiniopCreateSiluAndMulDescriptor(
    infiniopHandle_t handle,
    infiniopSiluAndMulDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t output,
    infiniopTensorDescriptor_t input);

__INFINI_C __export infiniStatus_t infiniopGetSiluAndMulWorkspaceSize(
    infiniopSiluAndMulDescriptor_t desc,
    size_t *size);

__INFINI_C __export infiniStatus_t infiniopSiluAndMul(
    infiniopSiluAndMulDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *output,
    const void *input,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroySiluAndMulDescriptor(infiniopSiluAndMulDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_SILU_AND_MUL_H_

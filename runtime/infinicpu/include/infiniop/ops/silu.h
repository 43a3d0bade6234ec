#ifndef INFINICPU_INFINIOP_OPS_SILU_H_
#define INFINICPU_INFINIOP_OPS_SILU_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopSiluDescriptor_t;

/**
 * output = input * sigmoid(input), elementwise, computed in f32 for halves.
 *
 *   Both have one shape (1-D or more) and dtype: f16, bf16, f32 or f64. Strides as add.
 */
__INFINI_C __export infiniStatus_t infiniopCreateSiluDescriptor(
    infiniopHandle_t handle,
    infiniopSiluDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t output,
    infiniopTensorDescriptor_t input);

__INFINI_C __export infiniStatus_t infiniopGetSiluWorkspaceSize(infiniopSiluDescriptor_t desc, size_t *size);

__INFINI_C __export infiniStatus_t infiniopSilu(
    infiniopSiluDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *output,
    const void *input,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroySiluDescriptor(infiniopSiluDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_SILU_H_

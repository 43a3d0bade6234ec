#ifndef INFINICPU_INFINIOP_OPS_MUL_H_
#define INFINICPU_INFINIOP_OPS_MUL_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopMulDescriptor_t;

/**
 * c = a * b, elementwise. Halves are multiplied in f32.
 *
 *   All three have one shape (1-D or more) and dtype: f16, bf16, f32 or f64. Strides as add.
 */
__INFINI_C __export infiniStatus_t infiniopCreateMulDescriptor(
    infiniopHandle_t handle,
    infiniopMulDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t c,
    infiniopTensorDescriptor_t a,
    infiniopTensorDescriptor_t b);

__INFINI_C __export infiniStatus_t infiniopGetMulWorkspaceSize(infiniopMulDescriptor_t desc, size_t *size);

__INFINI_C __export infiniStatus_t infiniopMul(
    infiniopMulDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *c,
    const void *a,
    const void *b,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyMulDescriptor(infiniopMulDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_MUL_H_

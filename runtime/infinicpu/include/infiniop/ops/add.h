#ifndef INFINICPU_INFINIOP_OPS_ADD_H_
#define INFINICPU_INFINIOP_OPS_ADD_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopAddDescriptor_t;

/**
 * c = a + b, elementwise. Halves are added in f32.
 *
 *   All three have one shape (1-D or more) and dtype: f16, bf16, f32, f64, i32 or i64. Strides are free; an input may
 *   broadcast with stride 0, c may not. c may be a or b when its layout is the same.
 */
__INFINI_C __export infiniStatus_t infiniopCreateAddDescriptor(
    infiniopHandle_t handle,
    infiniopAddDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t c,
    infiniopTensorDescriptor_t a,
    infiniopTensorDescriptor_t b);

__INFINI_C __export infiniStatus_t infiniopGetAddWorkspaceSize(infiniopAddDescriptor_t desc, size_t *size);

__INFINI_C __export infiniStatus_t infiniopAdd(
    infiniopAddDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *c,
    const void *a,
    const void *b,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyAddDescriptor(infiniopAddDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_ADD_H_

#ifndef INFINICPU_INFINIOP_TENSOR_DESCRIPTOR_H_
#define INFINICPU_INFINIOP_TENSOR_DESCRIPTOR_H_

#include "../infinicore.h"

struct InfiniopTensorDescriptor;
typedef struct InfiniopTensorDescriptor *infiniopTensorDescriptor_t;

/**
 * The shape, strides (in elements; NULL means contiguous) and dtype of a tensor. ndim 0 is a scalar.
 * Operators copy what they need at create: a tensor descriptor may be destroyed right after.
 */
__INFINI_C __export infiniStatus_t infiniopCreateTensorDescriptor(
    infiniopTensorDescriptor_t *desc_ptr,
    size_t ndim,
    const size_t *shape,
    const ptrdiff_t *strides,
    infiniDtype_t dtype);
__INFINI_C __export infiniStatus_t infiniopDestroyTensorDescriptor(infiniopTensorDescriptor_t desc);

#endif // INFINICPU_INFINIOP_TENSOR_DESCRIPTOR_H_

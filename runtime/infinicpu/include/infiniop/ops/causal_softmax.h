#ifndef INFINICPU_INFINIOP_OPS_CAUSAL_SOFTMAX_H_
#define INFINICPU_INFINIOP_OPS_CAUSAL_SOFTMAX_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopCausalSoftmaxDescriptor_t;

/**
 * y = softmax(x) over the last dimension, where row i of [seq, total] sees columns j <= total - seq + i; others become 0.
 *
 *   y, x [seq, total] or [batch, seq, total], total >= seq; f16, bf16 or f32; strides are free. y may be x.
 */
__INFINI_C __export infiniStatus_t infiniopCreateCausalSoftmaxDescriptor(
    infiniopHandle_t handle,
    infiniopCausalSoftmaxDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t y_desc,
    infiniopTensorDescriptor_t x_desc);

__INFINI_C __export infiniStatus_t infiniopGetCausalSoftmaxWorkspaceSize(
    infiniopCausalSoftmaxDescriptor_t desc,
    size_t *size);

__INFINI_C __export infiniStatus_t infiniopCausalSoftmax(
    infiniopCausalSoftmaxDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *y,
    const void *x,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyCausalSoftmaxDescriptor(infiniopCausalSoftmaxDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_CAUSAL_SOFTMAX_H_

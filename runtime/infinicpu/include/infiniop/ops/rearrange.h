#ifndef INFINICPU_INFINIOP_OPS_REARRANGE_H_
#define INFINICPU_INFINIOP_OPS_REARRANGE_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopRearrangeDescriptor_t;

/**
 * dst = src: copy between two layouts of one shape and dtype (any).
 *
 *   dst must not have stride 0 where its dimension is longer than 1; src may (that repeats). No workspace.
 */
__INFINI_C __export infiniStatus_t infiniopCreateRearrangeDescriptor(
    infiniopHandle_t handle,
    infiniopRearrangeDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t dst,
    infiniopTensorDescriptor_t src);

__INFINI_C __export infiniStatus_t infiniopRearrange(
    infiniopRearrangeDescriptor_t desc,
    void *dst,
    const void *src,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyRearrangeDescriptor(infiniopRearrangeDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_REARRANGE_H_

#ifndef INFINICPU_INFINIOP_OPS_RMS_NORM_H_
#define INFINICPU_INFINIOP_OPS_RMS_NORM_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopRMSNormDescriptor_t;

/**
 * y = x * w / sqrt(mean(x^2) + epsilon) over the last dimension, computed in f32 and rounded once.
 *
 *   y, x [rows, dim] or [rows, heads, dim], w [dim]; the last stride must be 1, other strides are free.
 *   y and x share a dtype: f16 or bf16 (w f16, bf16 or f32), f32 (w f32) or f64 (w f64). y may be x.
 */
__INFINI_C __export infiniStatus_t infiniopCreateRMSNormDescriptor(
    infiniopHandle_t handle,
    infiniopRMSNormDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t y_desc,
    infiniopTensorDescriptor_t x_desc,
    infiniopTensorDescriptor_t w_desc,
    float epsilon);

__INFINI_C __export infiniStatus_t infiniopGetRMSNormWorkspaceSize(infiniopRMSNormDescriptor_t desc, size_t *size);

__INFINI_C __export infiniStatus_t infiniopRMSNorm(
    infiniopRMSNormDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *y,
    const void *x,
    const void *w,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyRMSNormDescriptor(infiniopRMSNormDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_RMS_NORM_H_

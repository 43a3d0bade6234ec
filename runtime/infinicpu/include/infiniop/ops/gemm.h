#ifndef INFINICPU_INFINIOP_OPS_GEMM_H_
#define INFINICPU_INFINIOP_OPS_GEMM_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopGemmDescriptor_t;

/**
 * C = alpha * A * B + beta * C, sums in f32, one rounding at the end.
 *
 *   c [M, N] or [batch, M, N]; a [M, K] and b [K, N], each 2-D or 3-D with a batch of 1 (shared) or c's batch.
 *   dtype f32, f16 or bf16, the same for all three. Each matrix needs a row stride or a column stride of 1.
 *   A linear layer's weight stored [N, K] is b with shape [K, N] and strides [1, K]: the fastest layout.
 * alpha and beta come with the call. beta == 0 never reads C. c must not overlap a or b.
 */
__INFINI_C __export infiniStatus_t infiniopCreateGemmDescriptor(
    infiniopHandle_t handle,
    infiniopGemmDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t c_desc,
    infiniopTensorDescriptor_t a_desc,
    infiniopTensorDescriptor_t b_desc);

__INFINI_C __export infiniStatus_t infiniopGetGemmWorkspaceSize(infiniopGemmDescriptor_t desc, size_t *size);

__INFINI_C __export infiniStatus_t infiniopGemm(
    infiniopGemmDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *c,
    const void *a,
    const void *b,
    float alpha,
    float beta,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyGemmDescriptor(infiniopGemmDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_GEMM_H_

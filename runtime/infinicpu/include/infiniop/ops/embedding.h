#ifndef INFINICPU_INFINIOP_OPS_EMBEDDING_H_
#define INFINICPU_INFINIOP_OPS_EMBEDDING_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopEmbeddingDescriptor_t;

/**
 * output[..., :] = weight[input[...], :].
 *
 *   input [...] i32 or i64, weight [rows, dim], output [..., dim]; weight and output share f32, f16 or bf16; all contiguous.
 * An index outside the table is BAD_PARAM, and nothing is written. No workspace.
 */
__INFINI_C __export infiniStatus_t infiniopCreateEmbeddingDescriptor(
    infiniopHandle_t handle,
    infiniopEmbeddingDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t output_desc,
    infiniopTensorDescriptor_t input_desc,
    infiniopTensorDescriptor_t weight_desc);

__INFINI_C __export infiniStatus_t infiniopEmbedding(
    infiniopEmbeddingDescriptor_t desc,
    void *output,
    const void *input,
    const void *weight,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyEmbeddingDescriptor(infiniopEmbeddingDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_EMBEDDING_H_

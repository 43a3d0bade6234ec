#ifndef INFINICPU_INFINIOP_OPS_RANDOM_SAMPLE_H_
#define INFINICPU_INFINIOP_OPS_RANDOM_SAMPLE_H_

#include "../operator_descriptor.h"

typedef struct InfiniopDescriptor *infiniopRandomSampleDescriptor_t;

/**
 * Choose one index from logits (despite the name `probs`).
 *
 *   result: 0-d, any integer type that can hold n - 1; probs [n], stride 1, f16, bf16, f32 or f64.
 * argmax (the lowest index among equals) when random_val == 0, topp == 0, topk == 1 or temperature == 0. Else: weights
 * exp((logit - max) / temperature), sorted falling, ties by index; c_i their running sums; the first i with
 * c_i >= random_val * min(c_topk, topp * c_n) wins. topk < 0 or >= n does not limit.
 * random_val in [0, 1], topp >= 0, temperature >= 0 and topk != 0, else BAD_PARAM.
 */
__INFINI_C __export infiniStatus_t infiniopCreateRandomSampleDescriptor(
    infiniopHandle_t handle,
    infiniopRandomSampleDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t result,
    infiniopTensorDescriptor_t probs);

__INFINI_C __export infiniStatus_t infiniopGetRandomSampleWorkspaceSize(
    infiniopRandomSampleDescriptor_t desc,
    size_t *size);

__INFINI_C __export infiniStatus_t infiniopRandomSample(
    infiniopRandomSampleDescriptor_t desc,
    void *workspace,
    size_t workspace_size,
    void *result,
    const void *probs,
    float random_val,
    float topp,
    int topk,
    float temperature,
    void *stream);

__INFINI_C __export infiniStatus_t infiniopDestroyRandomSampleDescriptor(infiniopRandomSampleDescriptor_t desc);

#endif // INFINICPU_INFINIOP_OPS_RANDOM_SAMPLE_H_

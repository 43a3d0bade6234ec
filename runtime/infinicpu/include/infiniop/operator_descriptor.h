#ifndef INFINICPU_INFINIOP_OPERATOR_DESCRIPTOR_H_
#define INFINICPU_INFINIOP_OPERATOR_DESCRIPTOR_H_

#include "handle.h"
#include "tensor_descriptor.h"

/** What all operator descriptors are: an operator with its shapes, ready to be called with pointers. */
struct InfiniopDescriptor;

__INFINI_C __export infiniStatus_t infiniopGetDescriptorDeviceType(
    const struct InfiniopDescriptor *desc_ptr,
    infiniDevice_t *device_type);
__INFINI_C __export infiniStatus_t infiniopGetDescriptorDeviceId(
    const struct InfiniopDescriptor *desc_ptr,
    int *device_id);

#endif // INFINICPU_INFINIOP_OPERATOR_DESCRIPTOR_H_

#ifndef INFINICPU_OP_LAUNCH_H_
#define INFINICPU_OP_LAUNCH_H_

#include "../rt/stream.h"
#include "simulation.h"
#include "tensor.h"

#include <atomic>
#include <initializer_list>
#include <new>

// What every operator call has in common. Create goes through createOperator, every call through launch: checks,
// counters, trace, the no-op switch and the way to simulated devices live here. A launch's body owns all of its arguments
// by value: a simulated device stores it and runs it later, and again in a replayed graph.

namespace infinicpu {

struct Switches {
    std::atomic<bool> noop;
    std::atomic<bool> trace;
};
Switches &switches();

struct Counts {
    std::atomic<uint64_t> calls{0};
    std::atomic<uint64_t> operators_created{0};
    std::atomic<uint64_t> operators_destroyed{0};
    std::atomic<uint64_t> tensors_created{0};
    std::atomic<uint64_t> tensors_destroyed{0};
};
Counts &counts();

void traceCall(const InfiniopDescriptor &desc, infiniStatus_t status);

// A tensor at create: its descriptor, and whether it may be NULL.
struct OperandDesc {
    infiniopTensorDescriptor_t desc;
    bool optional = false;

    OperandDesc(infiniopTensorDescriptor_t desc_, bool optional_ = false) : desc(desc_), optional(optional_) {}
};

// Makes a Descriptor, lets check(descriptor) validate and fill it, and hands it out on success.
// The descriptor keeps a copy of every operand's TensorDescriptor, in the order given (absent ones: ndim 0, numel 0).
template <class Descriptor, class Check>
infiniStatus_t createOperator(infiniopHandle_t handle, struct InfiniopDescriptor **desc_ptr, std::initializer_list<OperandDesc> operands, Check &&check) {
    if (handle == nullptr || desc_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    for (const OperandDesc &operand : operands) {
        if (operand.desc == nullptr && !operand.optional) {
            return INFINI_STATUS_NULL_POINTER;
        }
    }
    Descriptor *made = new (std::nothrow) Descriptor;
    if (made == nullptr) {
        return INFINI_STATUS_INTERNAL_ERROR;
    }
    made->device_type = handle->device;
    made->device_id = handle->device_id;
    made->kind = &Descriptor::KIND;
    infiniStatus_t status = INFINI_STATUS_INTERNAL_ERROR;
    try {
        for (const OperandDesc &operand : operands) {
            made->operands.push_back(operand.desc != nullptr ? *operand.desc : absentTensor());
        }
        if (infinirt_cpu::simulating.load(std::memory_order_relaxed) || handle->device != INFINI_DEVICE_CPU) {
            status = simulateOperator(*made, Descriptor::TAKES_WORKSPACE, [&] { return check(*made); });
        } else {
            status = check(*made);
        }
    } catch (const std::bad_alloc &) {
        status = INFINI_STATUS_INTERNAL_ERROR;
    }
    if (status != INFINI_STATUS_SUCCESS) {
        delete made;
        return status;
    }
    counts().operators_created.fetch_add(1, std::memory_order_relaxed);
    *desc_ptr = made;
    return INFINI_STATUS_SUCCESS;
}

// The one way into a kernel. `data` are the operands' pointers in the order given at create: a NULL one is refused
// unless the operand is absent or has no elements. body(descriptor) computes and returns a status.
template <class Descriptor, class Body>
infiniStatus_t launch(struct InfiniopDescriptor *desc, void *workspace, size_t workspace_size, std::initializer_list<const void *> data, void *stream, Body &&body) {
    counts().calls.fetch_add(1, std::memory_order_relaxed);
    if (desc == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    if (desc->kind != &Descriptor::KIND) {
        return INFINI_STATUS_BAD_PARAM; // another operator's descriptor
    }
    infiniStatus_t status = INFINI_STATUS_SUCCESS;
    if (workspace_size < desc->workspace_size) {
        status = INFINI_STATUS_INSUFFICIENT_WORKSPACE;
    } else if (workspace == nullptr && desc->workspace_size != 0) {
        status = INFINI_STATUS_NULL_POINTER;
    } else {
        size_t i = 0;
        for (const void *pointer : data) {
            if (pointer == nullptr && desc->operands[i].numel() != 0) {
                status = INFINI_STATUS_NULL_POINTER;
            }
            ++i;
        }
    }
    const bool noop = switches().noop.load(std::memory_order_relaxed);
    if (status == INFINI_STATUS_SUCCESS && desc->simulated != nullptr) {
        const auto run = [body, noop](const InfiniopDescriptor &d) { return noop ? INFINI_STATUS_SUCCESS : body(static_cast<const Descriptor &>(d)); };
        status = simulateCall(desc, {workspace, workspace_size, data, run}, stream);
    } else if (status == INFINI_STATUS_SUCCESS && !noop) {
        status = body(static_cast<const Descriptor &>(*desc));
    }
    if (switches().trace.load(std::memory_order_relaxed)) {
        traceCall(*desc, status);
    }
    return status;
}

infiniStatus_t workspaceSize(const struct InfiniopDescriptor *desc, size_t *size);
infiniStatus_t destroyOperator(struct InfiniopDescriptor *desc);

} // namespace infinicpu

// The functions that are the same for every operator.
#define INFINICPU_DEFINE_WORKSPACE_SIZE(NAME)                                                                \
    infiniStatus_t infiniopGet##NAME##WorkspaceSize(infiniop##NAME##Descriptor_t desc, size_t *size) {       \
        return infinicpu::workspaceSize(desc, size);                                                         \
    }
#define INFINICPU_DEFINE_DESTROY(NAME)                                                           \
    infiniStatus_t infiniopDestroy##NAME##Descriptor(infiniop##NAME##Descriptor_t desc) {        \
        return infinicpu::destroyOperator(desc);                                                 \
    }

#endif // INFINICPU_OP_LAUNCH_H_

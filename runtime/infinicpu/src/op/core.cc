// Handles, tensor descriptors, and what all operators share.

#include "../kernels/kernels.h"
#include "../rt/memory_counters.h"
#include "../sim/record.h"
#include "launch.h"
#include "thread_pool.h"

#include <infinicpu.h>
#include <infiniop.h>
#include <infinirt.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

size_t InfiniopTensorDescriptor::numel() const {
    size_t count = present ? 1 : 0;
    for (size_t length : shape) {
        count *= length;
    }
    return count;
}

bool InfiniopTensorDescriptor::isContiguous() const {
    ptrdiff_t expected = 1;
    for (size_t i = ndim(); i-- > 0;) {
        if (shape[i] != 1 && strides[i] != expected) {
            return false;
        }
        expected *= ptrdiff_t(shape[i]);
    }
    return true;
}

bool InfiniopTensorDescriptor::hasBroadcast() const {
    if (numel() == 0) {
        return false; // contiguous strides of an empty tensor are 0 too
    }
    for (size_t i = 0; i < ndim(); ++i) {
        if (shape[i] > 1 && strides[i] == 0) {
            return true;
        }
    }
    return false;
}

namespace infinicpu {

namespace {

bool environmentFlag(const char *name) {
    const char *text = std::getenv(name);
    return text != nullptr && *text != '\0' && std::strcmp(text, "0") != 0;
}

} // namespace

Switches &switches() {
    static Switches instance{{environmentFlag("INFINICPU_NOOP")}, {environmentFlag("INFINICPU_TRACE")}};
    return instance;
}

Counts &counts() {
    static Counts instance;
    return instance;
}

const TensorDescriptor &absentTensor() {
    static const TensorDescriptor absent = [] {
        TensorDescriptor tensor;
        tensor.present = false;
        return tensor;
    }();
    return absent;
}

size_t sizeOf(infiniDtype_t dtype) {
    static constexpr size_t SIZES[] = {0, 1, 1, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 4, 8, 16, 2};
    return dtype >= 0 && dtype <= INFINI_DTYPE_BF16 ? SIZES[dtype] : 0;
}

bool isAnyInteger(infiniDtype_t dtype) {
    return dtype >= INFINI_DTYPE_I8 && dtype <= INFINI_DTYPE_U64;
}

void traceCall(const InfiniopDescriptor &desc, infiniStatus_t status) {
    std::string line = *desc.kind;
    for (const TensorDescriptor &tensor : desc.operands) {
        line += ' ';
        line += tensor.present ? infinirt_cpu::dtypeName(tensor.dtype) : "none";
        line += '[';
        for (size_t i = 0; i < tensor.ndim(); ++i) {
            line += (i == 0 ? "" : ",") + std::to_string(tensor.shape[i]);
        }
        line += ']';
        if (!tensor.isContiguous()) {
            line += '(';
            for (size_t i = 0; i < tensor.ndim(); ++i) {
                line += (i == 0 ? "" : ",") + std::to_string(tensor.strides[i]);
            }
            line += ')';
        }
    }
    if (status != INFINI_STATUS_SUCCESS) {
        line += " -> status " + std::to_string(int(status));
    }
    line += '\n';
    std::fputs(line.c_str(), stderr);
}

infiniStatus_t workspaceSize(const InfiniopDescriptor *desc, size_t *size) {
    INFINICPU_REQUIRE(desc != nullptr && size != nullptr, INFINI_STATUS_NULL_POINTER);
    *size = desc->workspace_size;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t destroyOperator(InfiniopDescriptor *desc) {
    if (desc != nullptr) {
        counts().operators_destroyed.fetch_add(1, std::memory_order_relaxed);
        if (desc->simulated != nullptr) {
            return destroySimulated(desc);
        }
        delete desc;
    }
    return INFINI_STATUS_SUCCESS;
}

} // namespace infinicpu

using namespace infinicpu;

infiniStatus_t infiniopCreateHandle(infiniopHandle_t *handle_ptr) {
    INFINICPU_REQUIRE(handle_ptr != nullptr, INFINI_STATUS_NULL_POINTER);
    infiniDevice_t device = INFINI_DEVICE_CPU;
    int device_id = 0;
    const infiniStatus_t status = infinirtGetDevice(&device, &device_id);
    INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
    *handle_ptr = new (std::nothrow) InfiniopHandle{device, device_id};
    return *handle_ptr != nullptr ? INFINI_STATUS_SUCCESS : INFINI_STATUS_INTERNAL_ERROR;
}

infiniStatus_t infiniopDestroyHandle(infiniopHandle_t handle) {
    delete handle;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infiniopCreateTensorDescriptor(infiniopTensorDescriptor_t *desc_ptr, size_t ndim, const size_t *shape, const ptrdiff_t *strides, infiniDtype_t dtype) {
    INFINICPU_REQUIRE(desc_ptr != nullptr && (shape != nullptr || ndim == 0), INFINI_STATUS_NULL_POINTER);
    INFINICPU_REQUIRE(sizeOf(dtype) != 0, INFINI_STATUS_BAD_TENSOR_DTYPE);
    try {
        auto *desc = new InfiniopTensorDescriptor;
        desc->dtype = dtype;
        if (ndim != 0) {
            desc->shape.assign(shape, shape + ndim);
            desc->strides.assign(ndim, 1);
        }
        if (strides != nullptr) {
            desc->strides.assign(strides, strides + ndim);
        } else {
            for (size_t i = ndim; i-- > 1;) {
                desc->strides[i - 1] = desc->strides[i] * ptrdiff_t(shape[i]);
            }
        }
        *desc_ptr = desc;
    } catch (const std::bad_alloc &) {
        return INFINI_STATUS_INTERNAL_ERROR;
    }
    counts().tensors_created.fetch_add(1, std::memory_order_relaxed);
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infiniopDestroyTensorDescriptor(infiniopTensorDescriptor_t desc) {
    if (desc != nullptr) {
        counts().tensors_destroyed.fetch_add(1, std::memory_order_relaxed);
        delete desc;
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infiniopGetDescriptorDeviceType(const struct InfiniopDescriptor *desc_ptr, infiniDevice_t *device_type) {
    INFINICPU_REQUIRE(desc_ptr != nullptr && device_type != nullptr, INFINI_STATUS_NULL_POINTER);
    *device_type = desc_ptr->device_type;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infiniopGetDescriptorDeviceId(const struct InfiniopDescriptor *desc_ptr, int *device_id) {
    INFINICPU_REQUIRE(desc_ptr != nullptr && device_id != nullptr, INFINI_STATUS_NULL_POINTER);
    *device_id = desc_ptr->device_id;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinicpuCounters(infinicpuCounters_t *counters) {
    INFINICPU_REQUIRE(counters != nullptr, INFINI_STATUS_NULL_POINTER);
    const Counts &now = counts();
    InfinirtCpuCounters memory;
    infinirtCpuCounters(&memory);
    counters->calls = now.calls.load(std::memory_order_relaxed);
    counters->operators_created = now.operators_created.load(std::memory_order_relaxed);
    counters->operators_alive = counters->operators_created - now.operators_destroyed.load(std::memory_order_relaxed);
    counters->tensors_created = now.tensors_created.load(std::memory_order_relaxed);
    counters->tensors_alive = counters->tensors_created - now.tensors_destroyed.load(std::memory_order_relaxed);
    counters->allocations = memory.allocations;
    counters->allocations_alive = memory.allocations_alive;
    counters->copies_host_device = memory.copies_host_device;
    counters->copies_device_device = memory.copies_device_device;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinicpuSetNumThreads(int num_threads) {
    INFINICPU_REQUIRE(num_threads >= 1, INFINI_STATUS_BAD_PARAM);
    try {
        ThreadPool::instance().setNumThreads(size_t(num_threads));
    } catch (const std::exception &) {
        return INFINI_STATUS_INTERNAL_ERROR;
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinicpuGetNumThreads(int *num_threads) {
    INFINICPU_REQUIRE(num_threads != nullptr, INFINI_STATUS_NULL_POINTER);
    *num_threads = int(ThreadPool::instance().numThreads());
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinicpuSetNoop(int noop) {
    switches().noop.store(noop != 0, std::memory_order_relaxed);
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinicpuSetTrace(int trace) {
    switches().trace.store(trace != 0, std::memory_order_relaxed);
    return INFINI_STATUS_SUCCESS;
}

const char *infinicpuIsa(void) {
    return kernels().name;
}

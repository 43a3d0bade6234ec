// infinirt for the CPU: a number of device ids that are all this machine's memory, with streams that run at once.

#include "memory_counters.h"
#include <infinirt.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr size_t SMALL_ALIGNMENT = 64;
constexpr size_t HUGE_PAGE = size_t(2) << 20;
constexpr size_t HUGE_PAGE_THRESHOLD = 2 * HUGE_PAGE;
constexpr int DEFAULT_DEVICE_COUNT = 8;
constexpr int MAX_DEVICE_COUNT = 1024;

struct Stream {
    int device_id;
};

struct Event {
    std::chrono::steady_clock::time_point time;
    uint32_t flags;
};

std::atomic<uint64_t> allocations{0};
std::atomic<uint64_t> frees{0};
std::atomic<uint64_t> copies_host_device{0};
std::atomic<uint64_t> copies_device_device{0};

thread_local int current_device_id = 0;

int deviceCount() {
    static const int count = [] {
        const char *text = std::getenv("INFINICPU_DEVICES");
        const int value = text != nullptr ? std::atoi(text) : DEFAULT_DEVICE_COUNT;
        return value < 1 ? 1 : (value > MAX_DEVICE_COUNT ? MAX_DEVICE_COUNT : value);
    }();
    return count;
}

infiniStatus_t checkDevice(infiniDevice_t device, int device_id) {
    if (device != INFINI_DEVICE_CPU) {
        return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    }
    return device_id >= 0 && device_id < deviceCount() ? INFINI_STATUS_SUCCESS : INFINI_STATUS_DEVICE_NOT_FOUND;
}

} // namespace

void infinirtCpuCounters(InfinirtCpuCounters *counters) {
    const uint64_t freed = frees.load(std::memory_order_relaxed);
    counters->allocations = allocations.load(std::memory_order_relaxed);
    counters->allocations_alive = counters->allocations - freed;
    counters->copies_host_device = copies_host_device.load(std::memory_order_relaxed);
    counters->copies_device_device = copies_device_device.load(std::memory_order_relaxed);
}

infiniStatus_t infinirtInit(void) {
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtGetAllDeviceCount(int *count_array) {
    if (count_array == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    for (int type = 0; type < INFINI_DEVICE_TYPE_COUNT; ++type) {
        count_array[type] = type == INFINI_DEVICE_CPU ? deviceCount() : 0;
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtGetDeviceCount(infiniDevice_t device, int *count) {
    if (count == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    *count = device == INFINI_DEVICE_CPU ? deviceCount() : 0;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtSetDevice(infiniDevice_t device, int device_id) {
    const infiniStatus_t status = checkDevice(device, device_id);
    if (status == INFINI_STATUS_SUCCESS) {
        current_device_id = device_id;
    }
    return status;
}

infiniStatus_t infinirtGetDevice(infiniDevice_t *device_ptr, int *device_id_ptr) {
    if (device_ptr == nullptr && device_id_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    if (device_ptr != nullptr) {
        *device_ptr = INFINI_DEVICE_CPU;
    }
    if (device_id_ptr != nullptr) {
        *device_id_ptr = current_device_id;
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtGetMemInfo(infiniDevice_t device, int device_id, size_t *free_bytes, size_t *total_bytes) {
    if (free_bytes == nullptr || total_bytes == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const infiniStatus_t status = checkDevice(device, device_id);
    if (status != INFINI_STATUS_SUCCESS) {
        return status;
    }
    const long page = sysconf(_SC_PAGESIZE);
    const long total = sysconf(_SC_PHYS_PAGES);
    const long available = sysconf(_SC_AVPHYS_PAGES);
    if (page < 0 || total < 0 || available < 0) {
        return INFINI_STATUS_INTERNAL_ERROR;
    }
    *free_bytes = size_t(available) * size_t(page);
    *total_bytes = size_t(total) * size_t(page);
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtGetDeviceResourceSnapshot(infiniDevice_t device, int device_id, infinirtDeviceResourceSnapshot_t *snapshot) {
    if (snapshot == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    infinirtDeviceResourceSnapshot_t result{};
    const infiniStatus_t status = infinirtGetMemInfo(device, device_id, &result.free_bytes, &result.total_bytes);
    if (status != INFINI_STATUS_SUCCESS) {
        return status;
    }
    result.device_type = device;
    result.device_id = device_id;
    result.used_bytes = result.total_bytes - result.free_bytes;
    result.valid_fields = INFINIRT_RESOURCE_FIELD_MEMORY_CAPACITY;
    *snapshot = result;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtDeviceSynchronize(void) {
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtStreamCreate(infinirtStream_t *stream_ptr) {
    if (stream_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    *stream_ptr = new (std::nothrow) Stream{current_device_id};
    return *stream_ptr != nullptr ? INFINI_STATUS_SUCCESS : INFINI_STATUS_INTERNAL_ERROR;
}

infiniStatus_t infinirtStreamDestroy(infinirtStream_t stream) {
    delete static_cast<Stream *>(stream);
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtStreamSynchronize(infinirtStream_t) {
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtStreamWaitEvent(infinirtStream_t, infinirtEvent_t event) {
    return event != nullptr ? INFINI_STATUS_SUCCESS : INFINI_STATUS_NULL_POINTER;
}

infiniStatus_t infinirtEventCreate(infinirtEvent_t *event_ptr) {
    return infinirtEventCreateWithFlags(event_ptr, INFINIRT_EVENT_DEFAULT);
}

infiniStatus_t infinirtEventCreateWithFlags(infinirtEvent_t *event_ptr, uint32_t flags) {
    if (event_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    *event_ptr = new (std::nothrow) Event{std::chrono::steady_clock::now(), flags};
    return *event_ptr != nullptr ? INFINI_STATUS_SUCCESS : INFINI_STATUS_INTERNAL_ERROR;
}

infiniStatus_t infinirtEventRecord(infinirtEvent_t event, infinirtStream_t) {
    if (event == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    static_cast<Event *>(event)->time = std::chrono::steady_clock::now();
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtEventQuery(infinirtEvent_t event, infinirtEventStatus_t *status_ptr) {
    if (event == nullptr || status_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    *status_ptr = INFINIRT_EVENT_COMPLETE;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtEventSynchronize(infinirtEvent_t event) {
    return event != nullptr ? INFINI_STATUS_SUCCESS : INFINI_STATUS_NULL_POINTER;
}

infiniStatus_t infinirtEventDestroy(infinirtEvent_t event) {
    delete static_cast<Event *>(event);
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtEventElapsedTime(float *ms_ptr, infinirtEvent_t start, infinirtEvent_t end) {
    if (ms_ptr == nullptr || start == nullptr || end == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const Event *from = static_cast<Event *>(start);
    const Event *to = static_cast<Event *>(end);
    if (((from->flags | to->flags) & INFINIRT_EVENT_DISABLE_TIMING) != 0) {
        return INFINI_STATUS_BAD_PARAM;
    }
    *ms_ptr = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtMalloc(void **p_ptr, size_t size) {
    if (p_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    *p_ptr = nullptr;
    if (size == 0) {
        return INFINI_STATUS_SUCCESS;
    }
    const bool huge = size >= HUGE_PAGE_THRESHOLD;
    void *memory = nullptr;
    if (posix_memalign(&memory, huge ? HUGE_PAGE : SMALL_ALIGNMENT, size) != 0) {
        return INFINI_STATUS_INTERNAL_ERROR;
    }
#ifdef MADV_HUGEPAGE
    if (huge) {
        // Whole pages only: the tail shares its page with other allocations. Only advice, so its failure changes nothing.
        (void)madvise(memory, size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    }
#endif
    allocations.fetch_add(1, std::memory_order_relaxed);
    *p_ptr = memory;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtMallocHost(void **p_ptr, size_t size) {
    return infinirtMalloc(p_ptr, size);
}

infiniStatus_t infinirtFree(void *ptr) {
    if (ptr != nullptr) {
        frees.fetch_add(1, std::memory_order_relaxed);
        std::free(ptr);
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtFreeHost(void *ptr) {
    return infinirtFree(ptr);
}

infiniStatus_t infinirtMemcpy(void *dst, const void *src, size_t size, infinirtMemcpyKind_t kind) {
    if (size != 0 && (dst == nullptr || src == nullptr)) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const bool crosses = kind == INFINIRT_MEMCPY_H2D || kind == INFINIRT_MEMCPY_D2H;
    (crosses ? copies_host_device : copies_device_device).fetch_add(1, std::memory_order_relaxed);
    if (size != 0) {
        std::memmove(dst, src, size);
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtMemcpyAsync(void *dst, const void *src, size_t size, infinirtMemcpyKind_t kind, infinirtStream_t) {
    return infinirtMemcpy(dst, src, size, kind);
}

infiniStatus_t infinirtMallocAsync(void **p_ptr, size_t size, infinirtStream_t) {
    return infinirtMalloc(p_ptr, size);
}

infiniStatus_t infinirtFreeAsync(void *ptr, infinirtStream_t) {
    return infinirtFree(ptr);
}

infiniStatus_t infinirtMemset(void *ptr, int value, size_t count) {
    if (count != 0 && ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    if (count != 0) {
        std::memset(ptr, value, count);
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtMemsetAsync(void *ptr, int value, size_t count, infinirtStream_t) {
    return infinirtMemset(ptr, value, count);
}

// Graph capture: refused with the status that InfiniCore's own CPU backend gives.

infiniStatus_t infinirtStreamBeginCapture(infinirtStream_t, infinirtStreamCaptureMode_t) {
    return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
}

infiniStatus_t infinirtStreamEndCapture(infinirtStream_t, infinirtGraph_t *) {
    return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
}

infiniStatus_t infinirtGraphDestroy(infinirtGraph_t) {
    return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
}

infiniStatus_t infinirtGraphInstantiate(infinirtGraphExec_t *, infinirtGraph_t, infinirtGraphNode_t *, char *, size_t) {
    return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
}

infiniStatus_t infinirtGraphExecDestroy(infinirtGraphExec_t) {
    return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
}

infiniStatus_t infinirtGraphLuanch(infinirtGraphExec_t, infinirtStream_t) {
    return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
}

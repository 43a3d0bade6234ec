// infinirt's devices and memory, for the CPU: a number of device ids that are all this machine's memory. Simulated
// devices take the turns marked by `simulating`, one load away from the plain path.

#include "../sim/memory.h"
#include "../sim/queue.h"
#include "../sim/record.h"
#include "device.h"
#include "memory_counters.h"
#include "stream.h"

#include <infinirt.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

using namespace infinirt_cpu;

namespace {

constexpr size_t SMALL_ALIGNMENT = 64;
constexpr size_t HUGE_PAGE = size_t(2) << 20;
constexpr size_t HUGE_PAGE_THRESHOLD = 2 * HUGE_PAGE;
constexpr int DEFAULT_DEVICE_COUNT = 8;
constexpr int MAX_DEVICE_COUNT = 1024;

std::atomic<uint64_t> allocations{0};
std::atomic<uint64_t> frees{0};
std::atomic<uint64_t> copies_host_device{0};
std::atomic<uint64_t> copies_device_device{0};

thread_local Device current_device;

int deviceCount() {
    static const int count = [] {
        const char *text = std::getenv("INFINICPU_DEVICES");
        const int value = text != nullptr ? std::atoi(text) : DEFAULT_DEVICE_COUNT;
        return value < 1 ? 1 : (value > MAX_DEVICE_COUNT ? MAX_DEVICE_COUNT : value);
    }();
    return count;
}

infiniStatus_t checkDevice(infiniDevice_t device, int device_id) {
    if (device != INFINI_DEVICE_CPU && !isSimulated(device)) {
        return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    }
    return device_id >= 0 && device_id < deviceCount() ? INFINI_STATUS_SUCCESS : INFINI_STATUS_DEVICE_NOT_FOUND;
}

bool isSimulating() {
    return simulating.load(std::memory_order_relaxed);
}

bool crossesDevices(infinirtMemcpyKind_t kind) {
    return kind == INFINIRT_MEMCPY_H2D || kind == INFINIRT_MEMCPY_D2H;
}

void countCopy(infinirtMemcpyKind_t kind) {
    (crossesDevices(kind) ? copies_host_device : copies_device_device).fetch_add(1, std::memory_order_relaxed);
}

// Whether an allocation of the current device is simulated. Only the CPU needs no record.
bool allocatesSimulated(Device current) {
    return isSimulating() && isSimulated(current.type);
}

// ---- Simulated devices: what a call may touch. ----

// On the CPU both ends are the host's.
infiniStatus_t checkCopy(Device current, const void *dst, const void *src, size_t size, infinirtMemcpyKind_t kind) {
    const bool deferred = isDeferred(current.type);
    const bool to_device = deferred && (kind == INFINIRT_MEMCPY_H2D || kind == INFINIRT_MEMCPY_D2D);
    const bool from_device = deferred && (kind == INFINIRT_MEMCPY_D2H || kind == INFINIRT_MEMCPY_D2D);
    const infiniStatus_t status = (to_device ? checkDeviceMemory : checkHostMemory)(current, dst, size, "memcpy: the destination");
    return status != INFINI_STATUS_SUCCESS ? status : (from_device ? checkDeviceMemory : checkHostMemory)(current, src, size, "memcpy: the source");
}

infiniStatus_t checkMemset(Device current, const void *ptr, size_t count) {
    return (isDeferred(current.type) ? checkDeviceMemory : checkHostMemory)(current, ptr, count, "memset: the destination");
}

infiniStatus_t allocate(void **p_ptr, size_t size, Kind kind) {
    if (p_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    *p_ptr = nullptr;
    if (size == 0) {
        return INFINI_STATUS_SUCCESS;
    }
    const Device current = currentDevice();
    if (allocatesSimulated(current)) {
        const infiniStatus_t status = refuseDuringCaptures(current, "malloc");
        if (status != INFINI_STATUS_SUCCESS) {
            return status;
        }
        *p_ptr = allocateSimulated(current, kind, size);
    } else if (current.type != INFINI_DEVICE_CPU) {
        return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    } else {
        *p_ptr = allocateHost(size);
    }
    if (*p_ptr == nullptr) {
        return INFINI_STATUS_INTERNAL_ERROR;
    }
    allocations.fetch_add(1, std::memory_order_relaxed);
    return INFINI_STATUS_SUCCESS;
}

// Frees without a look at captures.
infiniStatus_t release(void *ptr, Kind kind) {
    bool known = false;
    if (isSimulating()) {
        const Device current = currentDevice();
        const infiniStatus_t status = freeSimulated(current, kind, ptr, &known);
        if (status != INFINI_STATUS_SUCCESS) {
            return status;
        }
        if (!known && isDeferred(current.type)) {
            return violation(current.type, INFINI_STATUS_BAD_PARAM, "free: the memory was not allocated by infinirt");
        }
    }
    if (!known) {
        std::free(ptr);
    }
    frees.fetch_add(1, std::memory_order_relaxed);
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t releaseNow(void *ptr, Kind kind) {
    if (ptr == nullptr) {
        return INFINI_STATUS_SUCCESS;
    }
    const infiniStatus_t status = isSimulating() ? refuseDuringCaptures(currentDevice(), "free") : INFINI_STATUS_SUCCESS;
    return status == INFINI_STATUS_SUCCESS ? release(ptr, kind) : status;
}

} // namespace

namespace infinirt_cpu {

Device currentDevice() {
    return current_device;
}

void setCurrentDevice(Device device) {
    current_device = device;
}

void *allocateHost(size_t size) {
    const bool huge = size >= HUGE_PAGE_THRESHOLD;
    void *memory = nullptr;
    if (posix_memalign(&memory, huge ? HUGE_PAGE : SMALL_ALIGNMENT, size) != 0) {
        return nullptr;
    }
#ifdef MADV_HUGEPAGE
    if (huge) {
        // Whole pages only: the tail shares its page with other allocations. Only advice, so its failure changes nothing.
        (void)madvise(memory, size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    }
#endif
    return memory;
}

} // namespace infinirt_cpu

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
        count_array[type] = type == INFINI_DEVICE_CPU || isSimulated(infiniDevice_t(type)) ? deviceCount() : 0;
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtGetDeviceCount(infiniDevice_t device, int *count) {
    if (count == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    *count = device == INFINI_DEVICE_CPU || isSimulated(device) ? deviceCount() : 0;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtSetDevice(infiniDevice_t device, int device_id) {
    const infiniStatus_t status = checkDevice(device, device_id);
    if (status == INFINI_STATUS_SUCCESS) {
        current_device = Device{device, device_id};
    }
    return status;
}

infiniStatus_t infinirtGetDevice(infiniDevice_t *device_ptr, int *device_id_ptr) {
    if (device_ptr == nullptr && device_id_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    if (device_ptr != nullptr) {
        *device_ptr = current_device.type;
    }
    if (device_id_ptr != nullptr) {
        *device_id_ptr = current_device.id;
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

infiniStatus_t infinirtMalloc(void **p_ptr, size_t size) {
    return allocate(p_ptr, size, Kind::DEVICE);
}

infiniStatus_t infinirtMallocHost(void **p_ptr, size_t size) {
    return allocate(p_ptr, size, Kind::HOST);
}

infiniStatus_t infinirtFree(void *ptr) {
    return releaseNow(ptr, Kind::DEVICE);
}

infiniStatus_t infinirtFreeHost(void *ptr) {
    return releaseNow(ptr, Kind::HOST);
}

infiniStatus_t infinirtMemcpy(void *dst, const void *src, size_t size, infinirtMemcpyKind_t kind) {
    if (size != 0 && (dst == nullptr || src == nullptr)) {
        return INFINI_STATUS_NULL_POINTER;
    }
    if (isSimulating()) {
        const Device current = currentDevice();
        infiniStatus_t status = refuseDuringCaptures(current, "memcpy");
        if (status == INFINI_STATUS_SUCCESS) {
            status = checkCopy(current, dst, src, size, kind);
        }
        if (status != INFINI_STATUS_SUCCESS) {
            return status;
        }
    }
    countCopy(kind);
    if (size != 0) {
        std::memmove(dst, src, size);
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtMemcpyAsync(void *dst, const void *src, size_t size, infinirtMemcpyKind_t kind, infinirtStream_t stream) {
    if (!isSimulating() || !isDeferred(currentDevice().type)) {
        return infinirtMemcpy(dst, src, size, kind);
    }
    const Device current = currentDevice();
    if (size != 0 && (dst == nullptr || src == nullptr)) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const infiniStatus_t status = checkCopy(current, dst, src, size, kind);
    if (status != INFINI_STATUS_SUCCESS) {
        return status;
    }
    countCopy(kind);
    const auto copy = [=] {
        const infiniStatus_t now = checkCopy(current, dst, src, size, kind); // memory may be freed meanwhile
        if (now == INFINI_STATUS_SUCCESS && size != 0) {
            std::memmove(dst, src, size);
        }
        return now;
    };
    return enqueue(stream, copy, "memcpy", nullptr);
}

infiniStatus_t infinirtMallocAsync(void **p_ptr, size_t size, infinirtStream_t) {
    return infinirtMalloc(p_ptr, size);
}

infiniStatus_t infinirtFreeAsync(void *ptr, infinirtStream_t stream) {
    if (ptr == nullptr || !isSimulating() || !isDeferred(currentDevice().type)) {
        return infinirtFree(ptr);
    }
    const auto free_later = [ptr] { return release(ptr, Kind::DEVICE); };
    return enqueue(stream, free_later, "free", "free: not while the stream is capturing");
}

infiniStatus_t infinirtMemset(void *ptr, int value, size_t count) {
    if (count != 0 && ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    if (isSimulating()) {
        const Device current = currentDevice();
        infiniStatus_t status = refuseDuringCaptures(current, "memset");
        if (status == INFINI_STATUS_SUCCESS) {
            status = checkMemset(current, ptr, count);
        }
        if (status != INFINI_STATUS_SUCCESS) {
            return status;
        }
    }
    if (count != 0) {
        std::memset(ptr, value, count);
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtMemsetAsync(void *ptr, int value, size_t count, infinirtStream_t stream) {
    if (!isSimulating() || !isDeferred(currentDevice().type)) {
        return infinirtMemset(ptr, value, count);
    }
    const Device current = currentDevice();
    if (count != 0 && ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const infiniStatus_t status = checkMemset(current, ptr, count);
    if (status != INFINI_STATUS_SUCCESS) {
        return status;
    }
    const auto fill = [=] {
        const infiniStatus_t now = checkMemset(current, ptr, count);
        if (now == INFINI_STATUS_SUCCESS && count != 0) {
            std::memset(ptr, value, count);
        }
        return now;
    };
    return enqueue(stream, fill, "memset", nullptr);
}

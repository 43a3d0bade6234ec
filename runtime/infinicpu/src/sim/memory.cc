#include "memory.h"

#include "../rt/stream.h"
#include "record.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>

namespace infinirt_cpu {

namespace {

// Freed memory that is kept out of use, oldest first to go.
constexpr size_t QUARANTINE_BYTES = size_t(64) << 20;
constexpr size_t QUARANTINE_BLOCKS = 4096;

struct Allocation {
    Device device;
    Kind kind;
    size_t size;
    bool live;
};

struct Memory {
    std::shared_mutex mutex;
    std::map<uintptr_t, Allocation> allocations; // by address; they never overlap
    std::deque<uintptr_t> freed;
    size_t freed_bytes = 0;

    void trim(size_t bytes, size_t blocks) {
        while (freed_bytes > bytes || freed.size() > blocks) {
            const auto it = allocations.find(freed.front());
            freed_bytes -= it->second.size;
            std::free(reinterpret_cast<void *>(it->first));
            allocations.erase(it);
            freed.pop_front();
        }
    }

    // The first allocation that has a byte in [from, from + bytes), or end.
    std::map<uintptr_t, Allocation>::const_iterator touched(uintptr_t from, size_t bytes) const {
        auto it = allocations.upper_bound(from);
        if (it != allocations.begin()) {
            const auto before = std::prev(it);
            if (from - before->first < before->second.size) {
                return before;
            }
        }
        return it != allocations.end() && it->first - from < bytes ? it : allocations.end();
    }
};

// Never destroyed: threads may still run at exit.
Memory &memory() {
    static Memory &instance = *new Memory;
    return instance;
}

std::string nameOf(Device device) {
    return deviceName(device.type) + " " + std::to_string(device.id);
}

} // namespace

void *allocateSimulated(Device device, Kind kind, size_t size) {
    void *block = allocateHost(size);
    if (block == nullptr) {
        return nullptr;
    }
    std::memset(block, POISON, size);
    Memory &all = memory();
    const std::unique_lock<std::shared_mutex> lock(all.mutex);
    all.allocations[reinterpret_cast<uintptr_t>(block)] = Allocation{device, kind, size, true};
    return block;
}

infiniStatus_t freeSimulated(Device current, Kind kind, void *ptr, bool *known) {
    Memory &all = memory();
    const std::unique_lock<std::shared_mutex> lock(all.mutex);
    const auto it = all.allocations.find(reinterpret_cast<uintptr_t>(ptr));
    *known = it != all.allocations.end();
    if (!*known) {
        return INFINI_STATUS_SUCCESS;
    }
    Allocation &block = it->second;
    const auto refuse = [&](const std::string &why) { return violation(current.type, INFINI_STATUS_BAD_PARAM, "free: " + why); };
    if (!block.live) {
        return refuse("the memory was freed before");
    }
    if (block.device != current) {
        return refuse("the memory is " + nameOf(block.device) + "'s, the current device is " + nameOf(current));
    }
    if (block.kind != kind && current.type != INFINI_DEVICE_CPU) {
        return refuse(kind == Kind::HOST ? "the memory is the device's, not from infinirtMallocHost" : "the memory is from infinirtMallocHost");
    }
    if (block.size > QUARANTINE_BYTES) { // instead of all others
        all.allocations.erase(it);
        std::free(ptr);
        return INFINI_STATUS_SUCCESS;
    }
    block.live = false;
    std::memset(ptr, POISON, block.size);
    all.freed.push_back(it->first);
    all.freed_bytes += block.size;
    all.trim(QUARANTINE_BYTES, QUARANTINE_BLOCKS);
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t checkDeviceMemory(Device device, const void *ptr, size_t bytes, const char *what) {
    if (bytes == 0) {
        return INFINI_STATUS_SUCCESS;
    }
    const auto refuse = [&](const std::string &why) { return violation(device.type, INFINI_STATUS_BAD_PARAM, std::string(what) + " " + why); };
    const uintptr_t from = reinterpret_cast<uintptr_t>(ptr);
    Memory &all = memory();
    const std::shared_lock<std::shared_mutex> lock(all.mutex);
    const auto it = all.touched(from, bytes);
    if (it == all.allocations.end() || (it->second.live && it->second.kind == Kind::HOST)) {
        return refuse("is host memory");
    }
    if (it->second.device.type == INFINI_DEVICE_CPU) {
        return refuse("is host memory");
    }
    if (!it->second.live) {
        return refuse("is freed memory");
    }
    if (it->second.device != device) {
        return refuse("is memory of " + nameOf(it->second.device) + ", not of " + nameOf(device));
    }
    if (from < it->first || bytes > it->second.size - (from - it->first)) {
        return refuse("of " + std::to_string(bytes) + " bytes is not inside one allocation (of " + std::to_string(it->second.size) + " bytes)");
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t checkHostMemory(Device current, const void *ptr, size_t bytes, const char *what) {
    if (bytes == 0) {
        return INFINI_STATUS_SUCCESS;
    }
    const auto refuse = [&](const std::string &why) { return violation(current.type, INFINI_STATUS_BAD_PARAM, std::string(what) + " " + why); };
    const uintptr_t from = reinterpret_cast<uintptr_t>(ptr);
    Memory &all = memory();
    const std::shared_lock<std::shared_mutex> lock(all.mutex);
    const auto it = all.touched(from, bytes);
    if (it == all.allocations.end()) {
        return INFINI_STATUS_SUCCESS;
    }
    if (!it->second.live) {
        return refuse("is freed memory");
    }
    if (it->second.kind == Kind::DEVICE && it->second.device.type != INFINI_DEVICE_CPU) {
        return refuse("is device memory (of " + nameOf(it->second.device) + ")");
    }
    if (from < it->first || bytes > it->second.size - (from - it->first)) {
        return refuse("of " + std::to_string(bytes) + " bytes is not inside one allocation (of " + std::to_string(it->second.size) + " bytes)");
    }
    return INFINI_STATUS_SUCCESS;
}

bool hasSimulatedMemory(infiniDevice_t type) {
    Memory &all = memory();
    const std::shared_lock<std::shared_mutex> lock(all.mutex);
    for (const auto &entry : all.allocations) {
        if (entry.second.live && entry.second.device.type == type) {
            return true;
        }
    }
    return false;
}

void dropFreedMemory() {
    Memory &all = memory();
    const std::unique_lock<std::shared_mutex> lock(all.mutex);
    all.trim(0, 0);
}

} // namespace infinirt_cpu

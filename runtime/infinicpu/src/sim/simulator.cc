// Which records are registered, and what was violated.

#include "memory.h"
#include "queue.h"
#include "record.h"

#include <infinicpu.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace infinirt_cpu {

std::atomic<bool> simulating{false};

namespace {

std::atomic<const Record *> current_records[INFINI_DEVICE_TYPE_COUNT];
std::atomic<const char *> last_violation{""};

struct State {
    std::mutex mutex;                             // one registration at a time
    std::vector<std::unique_ptr<Record>> records; // all that ever were: descriptors and queues point to them
    std::mutex lines_mutex;
    std::map<std::string, bool> lines; // every violation's text, and whether stderr got it
};

// Never destroyed: threads may still run at exit.
State &state() {
    static State &instance = *new State;
    return instance;
}

infiniStatus_t report(infiniStatus_t status, const std::string &line) {
    State &all = state();
    const std::lock_guard<std::mutex> lock(all.lines_mutex);
    const auto it = all.lines.emplace(line, false).first;
    if (!it->second) {
        it->second = true;
        std::fprintf(stderr, "%s\n", line.c_str());
    }
    last_violation.store(it->first.c_str(), std::memory_order_release); // a map's keys stay where they are
    return status;
}

// What was reported before is of no interest to what comes.
void forgetViolations() {
    State &all = state();
    const std::lock_guard<std::mutex> lock(all.lines_mutex);
    for (auto &line : all.lines) {
        line.second = false;
    }
    last_violation.store("", std::memory_order_release);
}

void updateSwitch() {
    const bool any = std::any_of(std::begin(current_records), std::end(current_records), [](const auto &record) { return record.load() != nullptr; });
    simulating.store(any, std::memory_order_seq_cst);
}

infiniStatus_t refuseInUse(infiniDevice_t device) {
    if (!hasSimulatedMemory(device)) {
        return INFINI_STATUS_SUCCESS;
    }
    return report(INFINI_STATUS_BAD_PARAM, "record: memory of " + recordOf(device)->name + " is allocated: its record cannot change");
}

infiniStatus_t forgetAll() {
    for (int type = 0; type < INFINI_DEVICE_TYPE_COUNT; ++type) {
        const infiniStatus_t status = recordOf(infiniDevice_t(type)) != nullptr ? refuseInUse(infiniDevice_t(type)) : INFINI_STATUS_SUCCESS;
        if (status != INFINI_STATUS_SUCCESS) {
            return status;
        }
    }
    for (auto &record : current_records) {
        record.store(nullptr, std::memory_order_release);
    }
    updateSwitch();
    dropQueuedWork();
    dropFreedMemory();
    forgetViolations();
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t registerRecord(const char *text) {
    auto record = std::make_unique<Record>();
    std::string error;
    if (!parseRecord(text, record.get(), &error)) {
        return report(INFINI_STATUS_BAD_PARAM, "record: " + error);
    }
    if (recordOf(record->device) != nullptr) {
        const infiniStatus_t status = refuseInUse(record->device);
        if (status != INFINI_STATUS_SUCCESS) {
            return status;
        }
    }
    current_records[record->device].store(record.get(), std::memory_order_release);
    state().records.push_back(std::move(record));
    updateSwitch();
    forgetViolations();
    return INFINI_STATUS_SUCCESS;
}

} // namespace

const Record *recordOf(infiniDevice_t device) {
    return device >= 0 && device < INFINI_DEVICE_TYPE_COUNT ? current_records[device].load(std::memory_order_acquire) : nullptr;
}

std::string deviceName(infiniDevice_t device) {
    const Record *record = recordOf(device);
    if (record != nullptr) {
        return record->name;
    }
    return device == INFINI_DEVICE_CPU ? "cpu" : "device type " + std::to_string(int(device));
}

bool isSimulated(infiniDevice_t device) {
    return recordOf(device) != nullptr;
}

bool hasCollective(infiniDevice_t device, const char *name) {
    const Record *record = recordOf(device);
    return record == nullptr || std::find(record->collectives.begin(), record->collectives.end(), name) != record->collectives.end();
}

bool collectiveTakes(infiniDevice_t device, infiniDtype_t dtype) {
    const Record *record = recordOf(device);
    return record == nullptr || std::find(record->collective_dtypes.begin(), record->collective_dtypes.end(), dtype) != record->collective_dtypes.end();
}

infiniStatus_t violation(infiniDevice_t device, infiniStatus_t status, const std::string &text) {
    return report(status, deviceName(device) + ": " + text);
}

infiniStatus_t checkSpan(const void *ptr, size_t bytes, const char *what) {
    const Device device = currentDevice();
    return isDeferred(device.type) ? checkDeviceMemory(device, ptr, bytes, what) : INFINI_STATUS_SUCCESS;
}

} // namespace infinirt_cpu

using namespace infinirt_cpu;

infiniStatus_t infinicpuSimulate(const char *record) {
    try {
        const std::lock_guard<std::mutex> lock(state().mutex);
        return record == nullptr || *record == '\0' ? forgetAll() : registerRecord(record);
    } catch (const std::bad_alloc &) {
        return INFINI_STATUS_INTERNAL_ERROR;
    }
}

const char *infinicpuSimulatorError(void) {
    return last_violation.load(std::memory_order_acquire);
}

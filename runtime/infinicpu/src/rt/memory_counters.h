#ifndef INFINICPU_RT_MEMORY_COUNTERS_H_
#define INFINICPU_RT_MEMORY_COUNTERS_H_

#include <infinicore.h>
#include <stdint.h>

// Internal to this implementation: libinfiniop reads them for infinicpuCounters.
struct InfinirtCpuCounters {
    uint64_t allocations;
    uint64_t allocations_alive;
    uint64_t copies_host_device;
    uint64_t copies_device_device;
};

__INFINI_C __export void infinirtCpuCounters(InfinirtCpuCounters *counters);

#endif // INFINICPU_RT_MEMORY_COUNTERS_H_

#ifndef INFINICPU_INFINICPU_H_
#define INFINICPU_INFINICPU_H_

// What this CPU implementation offers beside the InfiniCore ABI: threads, counters and switches.
// The environment sets the start values: INFINICPU_THREADS, INFINICPU_TRACE=1, INFINICPU_NOOP=1,
// INFINICPU_ISA (portable, avx2, avx512, avx512_bf16: at most that instruction set), INFINICPU_DEVICES.

#include "infinicore.h"
#include <stdint.h>

/** What happened since the library was loaded. */
typedef struct {
    uint64_t calls;                /**< operator calls, failed ones included */
    uint64_t operators_created;    /**< operator descriptors created */
    uint64_t operators_alive;      /**< of those, not yet destroyed */
    uint64_t tensors_created;      /**< tensor descriptors created */
    uint64_t tensors_alive;        /**< of those, not yet destroyed */
    uint64_t allocations;          /**< infinirtMalloc and its variants */
    uint64_t allocations_alive;    /**< of those, not yet freed */
    uint64_t copies_host_device;   /**< infinirtMemcpy(Async) with kind H2D or D2H */
    uint64_t copies_device_device; /**< infinirtMemcpy(Async) with kind H2H or D2D */
} infinicpuCounters_t;

__INFINI_C __export infiniStatus_t infinicpuCounters(infinicpuCounters_t *counters);

/** Threads that one operator call may use, the caller included; at least 1. Not while calls are running. */
__INFINI_C __export infiniStatus_t infinicpuSetNumThreads(int num_threads);
__INFINI_C __export infiniStatus_t infinicpuGetNumThreads(int *num_threads);

/** With 1, operator calls check their arguments and return success without computing. */
__INFINI_C __export infiniStatus_t infinicpuSetNoop(int noop);

/** With 1, every operator call prints one line with its shapes to stderr. */
__INFINI_C __export infiniStatus_t infinicpuSetTrace(int trace);

/** The instruction set that was chosen: "portable", "avx2", "avx512" or "avx512_bf16". */
__INFINI_C __export const char *infinicpuIsa(void);

#endif // INFINICPU_INFINICPU_H_

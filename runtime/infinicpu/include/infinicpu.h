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

/**
 * Simulates a type of device on the CPU, as a record says what it can do: other operators, dtypes, shapes and strides
 * are refused at create, device memory is checked and poisoned, and streams run when somebody waits for them.
 * NULL or "" forgets all records. The text has one line per fact, fields and list items without blanks:
 *
 *     device 3 ascend                      infiniDevice_t and name
 *     graph_capture 1                      whether streams can be captured
 *     uncertain_ok 1                       operators marked as uncertain may be used
 *     collectives AllReduce CommInitAll
 *     collective_dtypes f32 f16
 *     collective_capture 1
 *     op swiglu dtypes=f16,f32 ranks=2,3 last_multiple=8 graph_capture=1
 *     op gemm dtypes=f16 row_major_output=1 alphas=1:0,1:1
 *
 * An op's fields: dtypes (required), index_dtypes, head_dims, ranks, last_multiple, row_major_output,
 * single_batch_dtypes, alphas, unit_last_stride, packed_heads, contiguous, max_row_bytes, clobbers, uncertain and
 * graph_capture (whether a captured call may be replayed; 0 when absent). Operands are counted in create's order.
 *
 * BAD_PARAM for a text that is wrong, and while memory of a device whose record would change is allocated; nothing
 * changes then, and infinicpuSimulatorError says why. Not while calls are running.
 */
__INFINI_C __export infiniStatus_t infinicpuSimulate(const char *record);

/**
 * What a simulated device refused last, as one line ("ascend: swiglu: the last dimension 12 is no multiple of 8"); ""
 * since the last infinicpuSimulate if nothing was. The string stays valid. stderr gets every line once.
 */
__INFINI_C __export const char *infinicpuSimulatorError(void);

#endif // INFINICPU_INFINICPU_H_

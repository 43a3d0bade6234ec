#ifndef INFINICPU_OP_SIMULATION_H_
#define INFINICPU_OP_SIMULATION_H_

#include "../sim/record.h"
#include "tensor.h"

#include <atomic>
#include <functional>
#include <initializer_list>
#include <mutex>

// Operators of simulated devices: what the device's record refuses, where operands may lie, and what a call destroys.

namespace infinicpu {

// What an operator's descriptor and the work that waits for it share.
struct SimulatedOperator {
    const infinirt_cpu::Record *record;
    const infinirt_cpu::OpRecord *rule;
    std::mutex mutex; // held while the operator runs
    bool destroyed = false;
    std::atomic<int> waiting{0}; // pieces of work, queued or captured, that need the descriptor
};

struct SimulatedCall {
    void *workspace;
    size_t workspace_size;
    std::initializer_list<const void *> data; // in create's order
    std::function<infiniStatus_t(const InfiniopDescriptor &)> run;
};

// At create, with the operands known: what the record refuses, then check(). `made` is simulated afterwards, unless it
// is the plain CPU's.
infiniStatus_t simulateOperator(InfiniopDescriptor &made, bool takes_workspace, const std::function<infiniStatus_t()> &check);

// Queues the call, or runs it where the device is the CPU.
infiniStatus_t simulateCall(InfiniopDescriptor *desc, SimulatedCall call, void *stream);

// Whether gemm may be called with these scalars.
infiniStatus_t checkScalars(const InfiniopDescriptor &desc, float alpha, float beta);

// Deletes the descriptor; BAD_PARAM if work still needs it.
infiniStatus_t destroySimulated(InfiniopDescriptor *desc);

} // namespace infinicpu

#endif // INFINICPU_OP_SIMULATION_H_

#ifndef INFINICPU_RT_STREAM_H_
#define INFINICPU_RT_STREAM_H_

// What libinfiniop and libinfiniccl need of libinfinirt's streams and of its simulated devices.

#include <infinirt.h>

#include <atomic>
#include <functional>
#include <string>

namespace infinirt_cpu {

// Whether any record is registered: nothing else is asked on the way of a plain CPU call.
__export extern std::atomic<bool> simulating;

// Whether a record is registered for this type of device.
__export bool isSimulated(infiniDevice_t device);

// What the record of a simulated device says; the plain CPU has all of them. `name` is as in the record: "AllReduce".
__export bool hasCollective(infiniDevice_t device, const char *name);
__export bool collectiveTakes(infiniDevice_t device, infiniDtype_t dtype);

// Work of the current device on one of its streams (NULL: its default stream). On the plain CPU it runs now and its
// status is the result. On a simulated device it is queued until somebody synchronises, or recorded while the stream
// captures, and may then run several times: it owns all that it needs. It runs with its own device as the current one,
// perhaps on another thread.
__export infiniStatus_t submit(infinirtStream_t stream, std::function<infiniStatus_t()> work);

// On a simulated device: whether the bytes lie in one live allocation of the current device; else BAD_PARAM, with
// `what` ("AllReduce: sendbuf") at the start of the reported line. SUCCESS on the plain CPU.
__export infiniStatus_t checkSpan(const void *ptr, size_t bytes, const char *what);

// Reports a violation: infinicpuSimulatorError returns "<device>: <text>", stderr gets it once. Returns `status`.
__export infiniStatus_t violation(infiniDevice_t device, infiniStatus_t status, const std::string &text);

} // namespace infinirt_cpu

#endif // INFINICPU_RT_STREAM_H_

#ifndef INFINICPU_SIM_QUEUE_H_
#define INFINICPU_SIM_QUEUE_H_

#include "../rt/device.h"
#include "../rt/stream.h"

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

// Streams of simulated devices. Work waits until somebody asks for it, and is then done by whoever asks: what a program
// forgot to wait for is not there. The worst that a real device may do, and the same on every run.

namespace infinirt_cpu {

using Work = std::function<infiniStatus_t()>;
using SharedWork = std::shared_ptr<const Work>;

// Streams of these types are queues: every simulated type but the CPU, which does all at once.
__export bool isDeferred(infiniDevice_t type);

struct Capture {
    infinirtStreamCaptureMode_t mode;
    std::thread::id thread;
    bool broken = false; // something was refused meanwhile
    std::vector<SharedWork> nodes;
};

class Queue {
public:
    explicit Queue(Device device_) : device(device_) {}

    // Appends, or records while the stream captures. `why_not` says why the work may not be replayed; nullptr: it may.
    infiniStatus_t push(SharedWork work, const char *why_not);
    // A graph's nodes, with nothing of other threads between them.
    infiniStatus_t pushAll(const std::vector<SharedWork> &nodes);
    uint64_t position();
    bool isDone(uint64_t target);
    // Does what was appended up to `target`. The first failure since the last time that one was returned.
    infiniStatus_t runUntil(uint64_t target);
    // The next work, if there is any and nobody is at it: so that polling gets somewhere.
    void runOne();
    void drop();

    bool isCapturing();
    infiniStatus_t beginCapture(infinirtStreamCaptureMode_t mode);
    infiniStatus_t endCapture(std::vector<SharedWork> *nodes);
    // BAD_PARAM, and a broken capture, if `what` is asked for while the stream captures.
    infiniStatus_t refuseWhileCapturing(const char *what);
    // Whether allocating and the like is refused to this thread because of this stream's capture.
    bool breakCapture(std::thread::id thread);

    const Device device;

private:
    infiniStatus_t pushLocked(SharedWork work, const char *why_not);
    void runFront(std::unique_lock<std::mutex> &lock);

    std::mutex _mutex;
    std::condition_variable _progress;
    std::deque<SharedWork> _pending;
    uint64_t _pushed = 0;
    uint64_t _done = 0;
    bool _running = false;
    std::thread::id _runner;
    infiniStatus_t _failure = INFINI_STATUS_SUCCESS;
    std::unique_ptr<Capture> _capture;
};

using SharedQueue = std::shared_ptr<Queue>;

// A new stream of the device; it lives until destroyQueue.
infinirtStream_t createQueue(Device device);
infiniStatus_t destroyQueue(infinirtStream_t stream);

// The queue of a stream that the current device is asked to work on; NULL: its default one. BAD_PARAM with a report if
// the stream is none, or another device's. `what` names the call.
infiniStatus_t findQueue(infinirtStream_t stream, const char *what, SharedQueue *queue);

// Whether a stream is a simulated device's, whatever the current one is.
bool isQueue(infinirtStream_t stream);

// All queues of a device, the default one included.
std::vector<SharedQueue> queuesOf(Device device);

// BAD_PARAM if a capture is under way that forbids `what` to this thread: as CUDA's capture modes say.
infiniStatus_t refuseDuringCaptures(Device current, const char *what);

// For operators and copies: `work` of the current device on a stream. As submit(), with the reason why the work may not
// be replayed, and what the work is called in reports.
__export infiniStatus_t enqueue(infinirtStream_t stream, Work work, const char *what, const char *why_not);

// Forgets what waits in every queue.
void dropQueuedWork();

} // namespace infinirt_cpu

#endif // INFINICPU_SIM_QUEUE_H_

// infinirt's streams and events. The plain CPU does everything at once; simulated devices have queues.

#include "../sim/queue.h"
#include "device.h"
#include "stream.h"

#include <chrono>
#include <new>

using namespace infinirt_cpu;

namespace {

using Clock = std::chrono::steady_clock;

// The plain CPU's: work on it is done when the call returns.
struct Stream {
    int device_id;
};

// When a simulated stream got to the event.
struct Reached {
    std::atomic<Clock::rep> time{0};
};

struct Event {
    Device device;
    uint32_t flags;
    std::mutex mutex; // what follows
    Clock::time_point time;
    SharedQueue queue; // nullptr: never recorded, or by the plain CPU
    uint64_t position = 0;
    std::shared_ptr<Reached> reached;
};

bool isSimulating() {
    return simulating.load(std::memory_order_relaxed);
}

// Whether the current device has queues. Anything that is neither that nor the CPU lost its record.
bool onQueues(Device current) {
    return isSimulating() && isDeferred(current.type);
}

infiniStatus_t refuse(Device device, const std::string &text) {
    return violation(device.type, INFINI_STATUS_BAD_PARAM, text);
}

// The queue and position that an event stands for; no queue: nothing to wait for.
struct Mark {
    SharedQueue queue;
    uint64_t position = 0;
};

Mark markOf(Event *event) {
    const std::lock_guard<std::mutex> lock(event->mutex);
    return {event->queue, event->position};
}

// Whoever waits for an event, or asks, must be of its type: of another one, the call goes to another library.
infiniStatus_t checkType(const Event *event, const char *what) {
    const Device current = currentDevice();
    return event->device.type == current.type ? INFINI_STATUS_SUCCESS : refuse(current, std::string(what) + ": the event is another type of device's");
}

} // namespace

infiniStatus_t infinirtDeviceSynchronize(void) {
    const Device current = currentDevice();
    if (!onQueues(current)) {
        return current.type == INFINI_DEVICE_CPU ? INFINI_STATUS_SUCCESS : INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    }
    const std::vector<SharedQueue> queues = queuesOf(current);
    infiniStatus_t first = INFINI_STATUS_SUCCESS;
    for (const SharedQueue &queue : queues) {
        const infiniStatus_t status = queue->refuseWhileCapturing("infinirtDeviceSynchronize");
        first = first == INFINI_STATUS_SUCCESS ? status : first;
    }
    if (first != INFINI_STATUS_SUCCESS) {
        return first;
    }
    for (const SharedQueue &queue : queues) {
        const infiniStatus_t status = queue->runUntil(queue->position());
        first = first == INFINI_STATUS_SUCCESS ? status : first;
    }
    return first;
}

infiniStatus_t infinirtStreamCreate(infinirtStream_t *stream_ptr) {
    if (stream_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const Device current = currentDevice();
    if (onQueues(current)) {
        *stream_ptr = createQueue(current);
        return INFINI_STATUS_SUCCESS;
    }
    *stream_ptr = new (std::nothrow) Stream{current.id};
    return *stream_ptr != nullptr ? INFINI_STATUS_SUCCESS : INFINI_STATUS_INTERNAL_ERROR;
}

infiniStatus_t infinirtStreamDestroy(infinirtStream_t stream) {
    if (stream == nullptr) {
        return INFINI_STATUS_SUCCESS;
    }
    if (isQueue(stream) || onQueues(currentDevice())) {
        return destroyQueue(stream);
    }
    delete static_cast<Stream *>(stream);
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtStreamSynchronize(infinirtStream_t stream) {
    if (!isSimulating()) {
        return INFINI_STATUS_SUCCESS;
    }
    if (!isDeferred(currentDevice().type) && (stream == nullptr || !isQueue(stream))) {
        return INFINI_STATUS_SUCCESS;
    }
    SharedQueue queue;
    infiniStatus_t status = findQueue(stream, "infinirtStreamSynchronize", &queue);
    if (status == INFINI_STATUS_SUCCESS) {
        status = queue->refuseWhileCapturing("infinirtStreamSynchronize");
    }
    return status == INFINI_STATUS_SUCCESS ? queue->runUntil(queue->position()) : status;
}

infiniStatus_t infinirtStreamWaitEvent(infinirtStream_t stream, infinirtEvent_t event) {
    if (event == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const Mark mark = isSimulating() ? markOf(static_cast<Event *>(event)) : Mark{};
    if (mark.queue == nullptr) {
        return INFINI_STATUS_SUCCESS;
    }
    const infiniStatus_t status = checkType(static_cast<Event *>(event), "infinirtStreamWaitEvent");
    if (status != INFINI_STATUS_SUCCESS) {
        return status;
    }
    const auto wait = [mark] { return mark.queue->runUntil(mark.position); };
    return enqueue(stream, wait, "infinirtStreamWaitEvent", "infinirtStreamWaitEvent: not supported in a capture");
}

infiniStatus_t infinirtEventCreate(infinirtEvent_t *event_ptr) {
    return infinirtEventCreateWithFlags(event_ptr, INFINIRT_EVENT_DEFAULT);
}

infiniStatus_t infinirtEventCreateWithFlags(infinirtEvent_t *event_ptr, uint32_t flags) {
    if (event_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    Event *event = new (std::nothrow) Event;
    if (event == nullptr) {
        return INFINI_STATUS_INTERNAL_ERROR;
    }
    event->device = currentDevice();
    event->flags = flags;
    event->time = Clock::now();
    *event_ptr = event;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtEventRecord(infinirtEvent_t event, infinirtStream_t stream) {
    if (event == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    Event *self = static_cast<Event *>(event);
    const Device current = currentDevice();
    if (!onQueues(current)) {
        self->time = Clock::now();
        return INFINI_STATUS_SUCCESS;
    }
    SharedQueue queue;
    if (self->device != current) {
        return refuse(current, "infinirtEventRecord: the event is another device's");
    }
    infiniStatus_t status = findQueue(stream, "infinirtEventRecord", &queue);
    if (status != INFINI_STATUS_SUCCESS) {
        return status;
    }
    const auto reached = std::make_shared<Reached>();
    const auto arrive = [reached] {
        reached->time.store(Clock::now().time_since_epoch().count());
        return INFINI_STATUS_SUCCESS;
    };
    status = queue->push(std::make_shared<const Work>(arrive), "infinirtEventRecord: not supported in a capture");
    if (status != INFINI_STATUS_SUCCESS) {
        return status;
    }
    const std::lock_guard<std::mutex> lock(self->mutex);
    self->queue = queue;
    self->position = queue->position();
    self->reached = reached;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtEventQuery(infinirtEvent_t event, infinirtEventStatus_t *status_ptr) {
    if (event == nullptr || status_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const Mark mark = markOf(static_cast<Event *>(event));
    if (mark.queue != nullptr) {
        const infiniStatus_t status = checkType(static_cast<Event *>(event), "infinirtEventQuery");
        if (status != INFINI_STATUS_SUCCESS) {
            return status;
        }
    }
    *status_ptr = mark.queue == nullptr || mark.queue->isDone(mark.position) ? INFINIRT_EVENT_COMPLETE : INFINIRT_EVENT_NOT_READY;
    if (*status_ptr == INFINIRT_EVENT_NOT_READY) {
        mark.queue->runOne(); // who polls gets there
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtEventSynchronize(infinirtEvent_t event) {
    if (event == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const Mark mark = markOf(static_cast<Event *>(event));
    if (mark.queue == nullptr) {
        return INFINI_STATUS_SUCCESS;
    }
    const infiniStatus_t status = checkType(static_cast<Event *>(event), "infinirtEventSynchronize");
    return status == INFINI_STATUS_SUCCESS ? mark.queue->runUntil(mark.position) : status;
}

infiniStatus_t infinirtEventDestroy(infinirtEvent_t event) {
    delete static_cast<Event *>(event);
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinirtEventElapsedTime(float *ms_ptr, infinirtEvent_t start, infinirtEvent_t end) {
    if (ms_ptr == nullptr || start == nullptr || end == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    Clock::time_point times[2];
    for (const bool last : {false, true}) {
        Event *event = static_cast<Event *>(last ? end : start);
        if ((event->flags & INFINIRT_EVENT_DISABLE_TIMING) != 0) {
            return INFINI_STATUS_BAD_PARAM;
        }
        const std::lock_guard<std::mutex> lock(event->mutex);
        times[last] = event->time;
        if (event->queue != nullptr) {
            if (!event->queue->isDone(event->position)) {
                return refuse(event->device, "infinirtEventElapsedTime: the stream has not got to the event");
            }
            times[last] = Clock::time_point(Clock::duration(event->reached->time.load()));
        }
    }
    *ms_ptr = std::chrono::duration<float, std::milli>(times[1] - times[0]).count();
    return INFINI_STATUS_SUCCESS;
}

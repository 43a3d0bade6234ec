#include "queue.h"

#include "record.h"

#include <map>
#include <unordered_map>

namespace infinirt_cpu {

namespace {

struct Queues {
    std::mutex mutex;
    std::unordered_map<infinirtStream_t, SharedQueue> streams;
    std::map<Device, SharedQueue> defaults;
    std::atomic<int> captures{0};
};

// Never destroyed: threads may still run at exit.
Queues &queues() {
    static Queues &instance = *new Queues;
    return instance;
}

SharedQueue defaultQueue(Device device) {
    Queues &all = queues();
    const std::lock_guard<std::mutex> lock(all.mutex);
    SharedQueue &queue = all.defaults[device];
    if (queue == nullptr) {
        queue = std::make_shared<Queue>(device);
    }
    return queue;
}

infiniStatus_t refuse(Device device, const std::string &text) {
    return violation(device.type, INFINI_STATUS_BAD_PARAM, text);
}

} // namespace

bool isDeferred(infiniDevice_t type) {
    return type != INFINI_DEVICE_CPU && recordOf(type) != nullptr;
}

infiniStatus_t Queue::push(SharedWork work, const char *why_not) {
    const std::lock_guard<std::mutex> lock(_mutex);
    return pushLocked(std::move(work), why_not);
}

infiniStatus_t Queue::pushAll(const std::vector<SharedWork> &nodes) {
    const std::lock_guard<std::mutex> lock(_mutex);
    for (const SharedWork &node : nodes) {
        const infiniStatus_t status = pushLocked(node, nullptr);
        if (status != INFINI_STATUS_SUCCESS) {
            return status;
        }
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t Queue::pushLocked(SharedWork work, const char *why_not) {
    if (_capture == nullptr) {
        _pending.push_back(std::move(work));
        ++_pushed;
    } else if (why_not != nullptr) {
        _capture->broken = true;
        return refuse(device, why_not);
    } else {
        _capture->nodes.push_back(std::move(work));
    }
    return INFINI_STATUS_SUCCESS;
}

uint64_t Queue::position() {
    const std::lock_guard<std::mutex> lock(_mutex);
    return _pushed;
}

bool Queue::isDone(uint64_t target) {
    const std::lock_guard<std::mutex> lock(_mutex);
    return _done >= target;
}

void Queue::runFront(std::unique_lock<std::mutex> &lock) {
    SharedWork work = std::move(_pending.front());
    _pending.pop_front();
    _running = true;
    _runner = std::this_thread::get_id();
    lock.unlock();
    infiniStatus_t status = INFINI_STATUS_INTERNAL_ERROR;
    try {
        const CurrentDevice here(device);
        status = (*work)();
    } catch (const std::exception &) { // no exception crosses the C interface
        status = INFINI_STATUS_INTERNAL_ERROR;
    }
    work.reset(); // before anybody learns that it is done: what it holds is free then
    lock.lock();
    _running = false;
    ++_done;
    if (_failure == INFINI_STATUS_SUCCESS) {
        _failure = status;
    }
    _progress.notify_all();
}

infiniStatus_t Queue::runUntil(uint64_t target) {
    std::unique_lock<std::mutex> lock(_mutex);
    while (_done < target) {
        if (!_running) {
            runFront(lock);
        } else if (_runner == std::this_thread::get_id()) {
            return refuse(device, "work on a stream waits for its own stream");
        } else {
            _progress.wait(lock);
        }
    }
    return std::exchange(_failure, INFINI_STATUS_SUCCESS);
}

void Queue::runOne() {
    std::unique_lock<std::mutex> lock(_mutex);
    if (!_running && !_pending.empty()) {
        runFront(lock);
    }
}

void Queue::drop() {
    std::deque<SharedWork> dropped; // destroyed without the lock
    const std::lock_guard<std::mutex> lock(_mutex);
    dropped.swap(_pending);
    _done = _pushed - (_running ? 1 : 0);
    _failure = INFINI_STATUS_SUCCESS;
}

bool Queue::isCapturing() {
    const std::lock_guard<std::mutex> lock(_mutex);
    return _capture != nullptr;
}

infiniStatus_t Queue::beginCapture(infinirtStreamCaptureMode_t mode) {
    const std::lock_guard<std::mutex> lock(_mutex);
    if (_capture != nullptr) {
        _capture->broken = true;
        return refuse(device, "capture: the stream is capturing already");
    }
    _capture = std::make_unique<Capture>();
    _capture->mode = mode;
    _capture->thread = std::this_thread::get_id();
    queues().captures.fetch_add(1);
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t Queue::endCapture(std::vector<SharedWork> *nodes) {
    std::unique_ptr<Capture> capture;
    {
        const std::lock_guard<std::mutex> lock(_mutex);
        if (_capture == nullptr) {
            return refuse(device, "capture: the stream is not capturing");
        }
        if (_capture->mode != INFINIRT_STREAM_CAPTURE_MODE_RELAXED && _capture->thread != std::this_thread::get_id()) {
            return refuse(device, "capture: begun by another thread");
        }
        capture = std::move(_capture);
    }
    queues().captures.fetch_sub(1);
    if (capture->broken) {
        return refuse(device, "capture: given up because of a call that was refused meanwhile");
    }
    *nodes = std::move(capture->nodes);
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t Queue::refuseWhileCapturing(const char *what) {
    const std::lock_guard<std::mutex> lock(_mutex);
    if (_capture == nullptr) {
        return INFINI_STATUS_SUCCESS;
    }
    _capture->broken = true;
    return refuse(device, std::string(what) + ": the stream is capturing");
}

bool Queue::breakCapture(std::thread::id thread) {
    const std::lock_guard<std::mutex> lock(_mutex);
    const bool forbids = _capture != nullptr && (_capture->mode == INFINIRT_STREAM_CAPTURE_MODE_GLOBAL || (_capture->mode == INFINIRT_STREAM_CAPTURE_MODE_THREAD_LOCAL && _capture->thread == thread));
    if (forbids) {
        _capture->broken = true;
    }
    return forbids;
}

infinirtStream_t createQueue(Device device) {
    Queues &all = queues();
    SharedQueue queue = std::make_shared<Queue>(device);
    const infinirtStream_t stream = queue.get();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.streams.emplace(stream, std::move(queue));
    return stream;
}

infiniStatus_t findQueue(infinirtStream_t stream, const char *what, SharedQueue *queue) {
    const Device current = currentDevice();
    if (stream == nullptr) {
        *queue = defaultQueue(current);
        return INFINI_STATUS_SUCCESS;
    }
    Queues &all = queues();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto it = all.streams.find(stream);
    if (it == all.streams.end()) {
        return refuse(current, std::string(what) + ": no such stream of this device");
    }
    if (it->second->device != current) {
        return refuse(current, std::string(what) + ": the stream is another device's");
    }
    *queue = it->second;
    return INFINI_STATUS_SUCCESS;
}

bool isQueue(infinirtStream_t stream) {
    Queues &all = queues();
    const std::lock_guard<std::mutex> lock(all.mutex);
    return all.streams.count(stream) != 0;
}

infiniStatus_t destroyQueue(infinirtStream_t stream) {
    Queues &all = queues();
    SharedQueue queue;
    {
        const std::lock_guard<std::mutex> lock(all.mutex);
        const auto it = all.streams.find(stream);
        if (it != all.streams.end() && !isDeferred(it->second->device.type)) {
            all.streams.erase(it); // its device's record was forgotten, and its work with it
            return INFINI_STATUS_SUCCESS;
        }
    }
    infiniStatus_t status = findQueue(stream, "infinirtStreamDestroy", &queue);
    if (status == INFINI_STATUS_SUCCESS) {
        status = queue->refuseWhileCapturing("infinirtStreamDestroy");
    }
    if (status != INFINI_STATUS_SUCCESS) {
        return status;
    }
    {
        const std::lock_guard<std::mutex> lock(all.mutex);
        all.streams.erase(stream);
    }
    return queue->runUntil(queue->position()); // what was asked for is done, as everywhere
}

std::vector<SharedQueue> queuesOf(Device device) {
    std::vector<SharedQueue> found = {defaultQueue(device)};
    Queues &all = queues();
    const std::lock_guard<std::mutex> lock(all.mutex);
    for (const auto &entry : all.streams) {
        if (entry.second->device == device) {
            found.push_back(entry.second);
        }
    }
    return found;
}

infiniStatus_t refuseDuringCaptures(Device current, const char *what) {
    Queues &all = queues();
    if (all.captures.load() == 0) {
        return INFINI_STATUS_SUCCESS;
    }
    bool forbidden = false;
    {
        const std::lock_guard<std::mutex> lock(all.mutex);
        for (const auto &entry : all.streams) {
            if (entry.second->device.type == current.type && entry.second->breakCapture(std::this_thread::get_id())) {
                forbidden = true;
            }
        }
    }
    return forbidden ? refuse(current, std::string(what) + ": not while a stream is capturing") : INFINI_STATUS_SUCCESS;
}

infiniStatus_t enqueue(infinirtStream_t stream, Work work, const char *what, const char *why_not) {
    SharedQueue queue;
    const infiniStatus_t status = findQueue(stream, what, &queue);
    return status == INFINI_STATUS_SUCCESS ? queue->push(std::make_shared<const Work>(std::move(work)), why_not) : status;
}

infiniStatus_t submit(infinirtStream_t stream, std::function<infiniStatus_t()> work) {
    const Device current = currentDevice();
    if (!isDeferred(current.type)) {
        return work();
    }
    const Record *record = recordOf(current.type);
    const char *why_not = record != nullptr && record->collective_capture ? nullptr : "collectives may not be captured";
    return enqueue(stream, std::move(work), "infiniccl", why_not);
}

void dropQueuedWork() {
    std::vector<SharedQueue> found;
    {
        Queues &all = queues();
        const std::lock_guard<std::mutex> lock(all.mutex);
        for (const auto &entry : all.streams) {
            found.push_back(entry.second);
        }
        for (const auto &entry : all.defaults) {
            found.push_back(entry.second);
        }
    }
    for (const SharedQueue &queue : found) {
        queue->drop();
    }
}

} // namespace infinirt_cpu

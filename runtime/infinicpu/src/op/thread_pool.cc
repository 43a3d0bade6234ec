#include "thread_pool.h"

#include <chrono>
#include <cstdlib>
#include <unistd.h>

#ifdef __linux__
#include <sched.h>
#endif

namespace infinicpu {

namespace {

constexpr size_t MAX_THREADS = 1024;
// How long a worker without work stays awake. A decode step is hundreds of calls some microseconds apart: sleeping
// and waking between them would cost more than the calls.
constexpr std::chrono::microseconds SPIN_TIME{100};
constexpr int POLLS_PER_CLOCK_READ = 64;

thread_local bool inside_loop = false;

inline void pauseCpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

size_t defaultNumThreads() {
    if (const char *text = std::getenv("INFINICPU_THREADS")) {
        const long value = std::atol(text);
        if (value >= 1) {
            return size_t(value) < MAX_THREADS ? size_t(value) : MAX_THREADS;
        }
    }
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        return size_t(CPU_COUNT(&set));
    }
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count == 0 ? 1 : count;
}

struct Scratch {
    void *data = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(data); }
};

} // namespace

void *threadScratch(size_t bytes) {
    static thread_local Scratch scratch;
    if (bytes > scratch.size) {
        const size_t size = (bytes + 4095) / 4096 * 4096;
        void *data = nullptr;
        if (posix_memalign(&data, 64, size) != 0) {
            return nullptr;
        }
        std::free(scratch.data);
        scratch.data = data;
        scratch.size = size;
    }
    return scratch.data;
}

ThreadPool &ThreadPool::instance() {
    static ThreadPool pool;
    return pool;
}

ThreadPool::ThreadPool() {
    _num_threads.store(defaultNumThreads(), std::memory_order_relaxed);
    startWorkers();
}

ThreadPool::~ThreadPool() {
    stopWorkers();
}

void ThreadPool::setNumThreads(size_t num_threads) {
    num_threads = num_threads < 1 ? 1 : (num_threads > MAX_THREADS ? MAX_THREADS : num_threads);
    if (num_threads == numThreads()) {
        return;
    }
    stopWorkers();
    _num_threads.store(num_threads, std::memory_order_relaxed);
    startWorkers();
}

void ThreadPool::startWorkers() {
    _owner_pid = getpid();
    _stopping = false;
    _workers = new std::vector<std::thread>;
    const uint64_t epoch = _epoch.load(std::memory_order_relaxed);
    for (size_t i = 1; i < numThreads(); ++i) {
        _workers->emplace_back([this, epoch] { workerMain(epoch); });
    }
}

void ThreadPool::stopWorkers() {
    if (_owner_pid != getpid()) {
        return; // a forked child has no workers to join: fork copies only the calling thread
    }
    {
        const std::lock_guard<std::mutex> lock(_mutex);
        _stopping = true;
        _epoch.fetch_add(1, std::memory_order_release);
    }
    _wake.notify_all();
    for (std::thread &worker : *_workers) {
        worker.join();
    }
    delete _workers;
    _workers = nullptr;
}

void ThreadPool::Loop::work() {
    for (;;) {
        const size_t from = next.fetch_add(grain, std::memory_order_relaxed);
        if (from >= end) {
            return;
        }
        body(context, from, end - from > grain ? from + grain : end);
    }
}

void ThreadPool::run(Loop &loop, size_t items) {
    if (inside_loop || items <= loop.grain || numThreads() == 1) {
        loop.body(loop.context, loop.next.load(std::memory_order_relaxed), loop.end);
        return;
    }
    bool wake = false;
    {
        const std::lock_guard<std::mutex> lock(_mutex);
        _loops.push_back(&loop);
        _epoch.fetch_add(1, std::memory_order_release);
        wake = _sleepers != 0;
    }
    if (wake) {
        _wake.notify_all();
    }
    inside_loop = true;
    loop.work();
    inside_loop = false;
    {
        // Withdrawn under the lock: from here on no worker can join, and those that did are counted.
        const std::lock_guard<std::mutex> lock(_mutex);
        for (size_t i = 0; i < _loops.size(); ++i) {
            if (_loops[i] == &loop) {
                _loops[i] = _loops.back();
                _loops.pop_back();
                break;
            }
        }
    }
    // Each remaining worker is inside its last chunk, so this is short; yielding covers a worker that lost its CPU.
    for (int polls = 0; loop.workers.load(std::memory_order_acquire) != 0; ++polls) {
        if (polls < 10000) {
            pauseCpu();
        } else {
            std::this_thread::yield();
        }
    }
}

// The loop with the fewest workers among those with chunks left. Needs _mutex.
ThreadPool::Loop *ThreadPool::pickLoop() {
    Loop *best = nullptr;
    int fewest = 0;
    for (Loop *loop : _loops) {
        const int workers = loop->workers.load(std::memory_order_relaxed);
        if (!loop->exhausted() && (best == nullptr || workers < fewest)) {
            best = loop;
            fewest = workers;
        }
    }
    return best;
}

void ThreadPool::workerMain(uint64_t epoch) {
    inside_loop = true;
    for (;;) {
        auto deadline = std::chrono::steady_clock::now() + SPIN_TIME;
        for (int polls = 1; _epoch.load(std::memory_order_acquire) == epoch; ++polls) {
            pauseCpu();
            if (polls % POLLS_PER_CLOCK_READ == 0 && std::chrono::steady_clock::now() > deadline) {
                break;
            }
        }
        std::unique_lock<std::mutex> lock(_mutex);
        while (!_stopping && _epoch.load(std::memory_order_relaxed) == epoch) {
            ++_sleepers;
            _wake.wait(lock);
            --_sleepers;
        }
        epoch = _epoch.load(std::memory_order_relaxed);
        if (_stopping) {
            return;
        }
        while (Loop *loop = pickLoop()) {
            loop->workers.fetch_add(1, std::memory_order_relaxed);
            lock.unlock();
            loop->work();
            // Release: the caller sees what this worker wrote. The loop may be gone right after.
            loop->workers.fetch_sub(1, std::memory_order_release);
            lock.lock();
            epoch = _epoch.load(std::memory_order_relaxed);
            if (_stopping) {
                return;
            }
        }
    }
}

} // namespace infinicpu

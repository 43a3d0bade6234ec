#ifndef INFINICPU_OP_THREAD_POOL_H_
#define INFINICPU_OP_THREAD_POOL_H_

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace infinicpu {

// The library's own threads. Not OpenMP: its runtime is not instrumented, so ThreadSanitizer would see races that
// are none and miss those that are.
//
// Several host threads may call parallelFor at once: each works on its own loop, the workers spread over all loops
// that still have chunks. A caller never waits for a free worker, so nothing can deadlock, and a call from inside a
// loop body simply runs there.
class ThreadPool {
public:
    static ThreadPool &instance();

    // Threads per call, the caller included.
    size_t numThreads() const { return _num_threads.load(std::memory_order_relaxed); }
    void setNumThreads(size_t num_threads);

    // fn(begin, end) over chunks of [begin, end) of about `grain` items. Returns when all of them are done.
    // The chunks' borders depend on grain alone, not on the number of threads.
    template <class Fn>
    void parallelFor(size_t begin, size_t end, size_t grain, Fn &&fn) {
        if (begin >= end) {
            return;
        }
        using Body = std::remove_reference_t<Fn>;
        Loop loop;
        loop.grain = grain == 0 ? 1 : grain;
        loop.end = end;
        loop.next.store(begin, std::memory_order_relaxed);
        loop.context = const_cast<void *>(static_cast<const void *>(&fn));
        loop.body = [](void *context, size_t from, size_t to) { (*static_cast<Body *>(context))(from, to); };
        run(loop, end - begin);
    }

    ThreadPool(const ThreadPool &) = delete;
    ThreadPool &operator=(const ThreadPool &) = delete;

private:
    struct Loop {
        void (*body)(void *, size_t, size_t) = nullptr;
        void *context = nullptr;
        size_t grain = 1;
        size_t end = 0;
        std::atomic<size_t> next{0};
        std::atomic<int> workers{0}; // changed under _mutex, except that the caller reads it

        bool exhausted() const { return next.load(std::memory_order_relaxed) >= end; }
        void work();
    };

    ThreadPool();
    ~ThreadPool();

    void run(Loop &loop, size_t items);
    void startWorkers();
    void stopWorkers();
    void workerMain(uint64_t epoch);
    Loop *pickLoop();

    std::atomic<size_t> _num_threads{1};
    std::atomic<uint64_t> _epoch{0}; // grows with every loop that is offered, and at shutdown
    std::mutex _mutex;
    std::condition_variable _wake;
    std::vector<Loop *> _loops; // offered and not yet withdrawn
    size_t _sleepers = 0;
    bool _stopping = false;
    std::vector<std::thread> *_workers = nullptr; // on the heap so that a forked child can leave it alone
    int _owner_pid = 0;
};

template <class Fn>
void parallelFor(size_t begin, size_t end, size_t grain, Fn &&fn) {
    ThreadPool::instance().parallelFor(begin, end, grain, fn);
}

// A buffer of this thread, at least `bytes` long and 64-byte aligned, that grows and stays. Its content does not
// survive the next call on the same thread. nullptr when memory is out.
void *threadScratch(size_t bytes);

} // namespace infinicpu

#endif // INFINICPU_OP_THREAD_POOL_H_

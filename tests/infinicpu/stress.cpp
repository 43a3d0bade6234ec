// The thread pool under load, for ThreadSanitizer: several host threads call operators at once, with more workers than
// CPUs and with pauses long enough for the workers to fall asleep, and every result is compared with the first one.

#include "harness.hpp"

#include <chrono>
#include <thread>

namespace {

constexpr int HOST_THREADS = 4;
constexpr int ROUNDS = 25;

void hostThread(int id) {
    OK(infinirtSetDevice(INFINI_DEVICE_CPU, id % 2));
    const infiniopHandle_t handle = makeHandle();
    {
        const size_t m = 3 + size_t(id), n = 96, k = 700;
        Tensor a(INFINI_DTYPE_F32, {m, k}), b(INFINI_DTYPE_F32, {k, n}, {1, ptrdiff_t(k)}), c(INFINI_DTYPE_F32, {m, n}), first(INFINI_DTYPE_F32, {m, n});
        Tensor x(INFINI_DTYPE_BF16, {64, 512}), w(INFINI_DTYPE_F32, {512}), y(INFINI_DTYPE_BF16, {64, 512}), sum(INFINI_DTYPE_BF16, {64, 512});
        for (int round = 0; round < ROUNDS; ++round) {
            Tensor &target = round == 0 ? first : c;
            RUN(Gemm, handle, (target.desc(), a.desc(), b.desc()), (target.data(), a.data(), b.data(), 1.0f, 0.0f));
            CHECK(std::memcmp(first.data(), target.data(), m * n * sizeof(float)) == 0);
            RUN(RMSNorm, handle, (y.desc(), x.desc(), w.desc(), 1e-6f), (y.data(), x.data(), w.data()));
            RUN(Add, handle, (sum.desc(), x.desc(), y.desc()), (sum.data(), x.data(), y.data()));
            if (round % 10 == id) {
                std::this_thread::sleep_for(std::chrono::milliseconds(3));
            }
        }
    }
    OK(infiniopDestroyHandle(handle));
}

} // namespace

int main() {
    for (const int threads : {1, 2, 5, 3}) {
        OK(infinicpuSetNumThreads(threads));
        std::vector<std::thread> hosts;
        for (int id = 0; id < HOST_THREADS; ++id) {
            hosts.emplace_back(hostThread, id);
        }
        for (std::thread &host : hosts) {
            host.join();
        }
    }
    infinicpuCounters_t counters;
    OK(infinicpuCounters(&counters));
    CHECK(counters.calls == 4u * HOST_THREADS * ROUNDS * 3 && counters.operators_alive == 0);
    return 0;
}

// The collectives under load, for ThreadSanitizer and AddressSanitizer: more ranks than CPUs, at different paces, on
// buffers of exactly the needed size; two communicators at once, made by id and torn down while a rank still waits.

#include "harness.hpp"

#include <chrono>
#include <thread>

namespace {

constexpr int ROUNDS = 40;
constexpr size_t BIG = 40007; // several chunks, and no multiple of anything

void pauseSometimes(int rank, int round) {
    if (round % 7 == rank) {
        std::this_thread::sleep_for(std::chrono::microseconds(300)); // long enough for the others to fall asleep
    }
}

// Integers, so that every result is known exactly: rank r's element i is r + i.
std::vector<int32_t> numbers(int rank, size_t count) {
    std::vector<int32_t> result(count);
    for (size_t i = 0; i < count; ++i) {
        result[i] = rank + int32_t(i);
    }
    result.shrink_to_fit();
    return result;
}

void reduceAndGather(infinicclComm_t comm, int ranks, int rank, size_t count) {
    const int32_t rank_sum = ranks * (ranks - 1) / 2;
    std::vector<int32_t> x = numbers(rank, count), y(count), all(count * size_t(ranks)), part(count);
    OK(infinicclAllReduce(x.data(), y.data(), count, INFINI_DTYPE_I32, INFINICCL_SUM, comm, nullptr));
    OK(infinicclAllGather(x.data(), all.data(), count, INFINI_DTYPE_I32, comm, nullptr));
    OK(infinicclReduceScatter(all.data(), part.data(), count, INFINI_DTYPE_I32, INFINICCL_MAX, comm, nullptr));
    OK(infinicclAllReduce(x.data(), x.data(), count, INFINI_DTYPE_I32, INFINICCL_AVG, comm, nullptr));
    for (size_t i = 0; i < count; ++i) {
        CHECK(y[i] == rank_sum + ranks * int32_t(i));
        CHECK(part[i] == rank + int32_t(i));
        CHECK(x[i] == y[i] / ranks);
        for (int other = 0; other < ranks; ++other) {
            CHECK(all[size_t(other) * count + i] == other + int32_t(i));
        }
    }
}

// Everybody sends to the next and receives from the previous rank, together with a broadcast.
void exchange(infinicclComm_t comm, int ranks, int rank, int round) {
    const int root = round % ranks, next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;
    const size_t count = size_t(1 + round);
    std::vector<int32_t> x = numbers(rank, count), from_root(count), from_previous(count);
    OK(infinicclGroupStart(comm));
    OK(infinicclSend(x.data(), count, INFINI_DTYPE_I32, next, comm, nullptr));
    OK(infinicclBroadcast(x.data(), from_root.data(), count, INFINI_DTYPE_I32, root, comm, nullptr));
    OK(infinicclRecv(from_previous.data(), count, INFINI_DTYPE_I32, previous, comm, nullptr));
    OK(infinicclGroupEnd(comm));
    CHECK(from_root == numbers(root, count) && from_previous == numbers(previous, count));
}

void disagree(infinicclComm_t comm, int ranks, int rank, int round) {
    const size_t count = rank == round % ranks ? 3 : 2;
    std::vector<int32_t> x = numbers(rank, count), y(count, -1);
    const infiniStatus_t expected = ranks == 1 ? INFINI_STATUS_SUCCESS : INFINI_STATUS_BAD_PARAM;
    CHECK(infinicclAllReduce(x.data(), y.data(), count, INFINI_DTYPE_I32, INFINICCL_SUM, comm, nullptr) == expected);
    CHECK(ranks == 1 || y[0] == -1);
}

void rankThread(infinicclUniqueId_t id, int ranks, int rank) {
    OK(infinirtSetDevice(INFINI_DEVICE_CPU, rank));
    infinicclComm_t comm;
    OK(infinicclCommInitRank(&comm, ranks, id, rank));
    for (int round = 0; round < ROUNDS; ++round) {
        reduceAndGather(comm, ranks, rank, round % 4 == 3 ? BIG : size_t(round));
        exchange(comm, ranks, rank, round);
        disagree(comm, ranks, rank, round);
        pauseSometimes(rank, round);
    }
    if (rank != ranks - 1) { // the last one leaves instead
        int32_t one = 1;
        CHECK(infinicclAllReduce(&one, &one, 1, INFINI_DTYPE_I32, INFINICCL_SUM, comm, nullptr) == INFINI_STATUS_INTERNAL_ERROR && one == 1);
    }
    OK(infinicclCommDestroy(comm));
}

// The same on a simulated device: the ranks queue, and meet where they synchronise.
void simulatedRank(infinicclComm_t comm, int rank) {
    const size_t count = 20011;
    const std::vector<int32_t> ones(count, 1);
    std::vector<int32_t> result(count);
    OK(infinirtSetDevice(INFINI_DEVICE_NVIDIA, rank));
    void *memory;
    infinirtStream_t stream;
    OK(infinirtMalloc(&memory, count * sizeof(int32_t)));
    OK(infinirtStreamCreate(&stream));
    for (int round = 0; round < ROUNDS; ++round) {
        OK(infinirtMemcpyAsync(memory, ones.data(), count * sizeof(int32_t), INFINIRT_MEMCPY_H2D, stream));
        OK(infinicclAllReduce(memory, memory, count, INFINI_DTYPE_I32, INFINICCL_SUM, comm, stream));
        OK(infinicclAllReduce(memory, memory, count, INFINI_DTYPE_I32, INFINICCL_SUM, comm, stream));
        OK(infinirtMemcpyAsync(result.data(), memory, count * sizeof(int32_t), INFINIRT_MEMCPY_D2H, stream));
        OK(infinirtStreamSynchronize(stream));
        CHECK(result == std::vector<int32_t>(count, 4));
        pauseSometimes(rank, round);
    }
    OK(infinirtStreamDestroy(stream));
    OK(infinirtFree(memory));
    OK(infinicclCommDestroy(comm));
}

} // namespace

int main() {
    std::vector<std::thread> threads;
    for (const int ranks : {4, 2, 3, 1}) {
        infinicclUniqueId_t id;
        OK(infinicclGetUniqueId(&id));
        for (int rank = 0; rank < ranks; ++rank) {
            threads.emplace_back(rankThread, id, ranks, rank);
        }
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    OK(infinicpuSimulate("device 1 nvidia\ncollectives CommInitAll AllReduce\ncollective_dtypes i32\n"));
    infinicclComm_t comms[2];
    const int devices[2] = {0, 1};
    OK(infinicclCommInitAll(INFINI_DEVICE_NVIDIA, comms, 2, devices));
    std::thread first(simulatedRank, comms[0], 0), second(simulatedRank, comms[1], 1);
    first.join();
    second.join();
    OK(infinicpuSimulate(nullptr));
    return 0;
}

// Simulated devices under the sanitizers: host threads with a device each allocate, queue, wait, capture and replay, and
// do what is refused; threads share a stream; one device waits for another.

#include "harness.hpp"

#include <string>
#include <thread>

namespace {

constexpr int THREADS = 4;
constexpr int ROUNDS = 20;
constexpr size_t N = 300;
constexpr size_t BYTES = N * sizeof(float);

const char *const RECORD = "device 1 nvidia\ngraph_capture 1\nop add dtypes=f32 graph_capture=1\n"
                           "op causal_softmax dtypes=f32 clobbers=1\nop embedding dtypes=f32\n";

#define REFUSED(CALL) CHECK((CALL) == INFINI_STATUS_BAD_PARAM)

float *allocate(size_t bytes = BYTES) {
    void *memory = nullptr;
    OK(infinirtMalloc(&memory, bytes));
    return static_cast<float *>(memory);
}

// add of N elements, with its workspace in the device's memory.
class Add {
public:
    Add() {
        const infiniopHandle_t handle = makeHandle();
        infiniopTensorDescriptor_t tensor;
        const size_t shape[] = {N};
        OK(infiniopCreateTensorDescriptor(&tensor, 1, shape, nullptr, INFINI_DTYPE_F32));
        OK(infiniopCreateAddDescriptor(handle, &_desc, tensor, tensor, tensor));
        OK(infiniopDestroyTensorDescriptor(tensor));
        OK(infiniopDestroyHandle(handle));
        OK(infiniopGetAddWorkspaceSize(_desc, &_size));
        OK(infinirtMalloc(&_workspace, _size));
    }
    ~Add() {
        OK(infiniopDestroyAddDescriptor(_desc));
        OK(infinirtFree(_workspace));
    }
    Add(const Add &) = delete;
    Add &operator=(const Add &) = delete;

    infiniStatus_t operator()(float *c, const float *a, const float *b, infinirtStream_t stream) const {
        return infiniopAdd(_desc, _workspace, _size, c, a, b, stream);
    }

private:
    infiniopAddDescriptor_t _desc = nullptr;
    void *_workspace = nullptr;
    size_t _size = 0;
};

void fill(float *device, float value) {
    const std::vector<float> host(N, value);
    OK(infinirtMemcpy(device, host.data(), BYTES, INFINIRT_MEMCPY_H2D));
}

void expect(const float *device, float value) {
    std::vector<float> host(N);
    OK(infinirtMemcpy(host.data(), device, BYTES, INFINIRT_MEMCPY_D2H));
    for (float found : host) {
        CHECK(found == value);
    }
}

void useStream(const Add &add, infinirtStream_t stream) {
    float *x = allocate(), *y = allocate();
    fill(x, 1.0f);
    std::vector<float> result(N, 0.0f);
    OK(add(y, x, x, stream));
    OK(add(y, y, x, stream));
    OK(infinirtMemcpyAsync(result.data(), y, BYTES, INFINIRT_MEMCPY_D2H, stream));
    CHECK(result[0] == 0.0f);
    OK(infinirtStreamSynchronize(stream));
    CHECK(result[0] == 3.0f && result[N - 1] == 3.0f);
    REFUSED(add(y, x + 1, x, stream));
    REFUSED(add(result.data(), x, x, stream));
    OK(add(y, x, x, stream));
    OK(infinirtFree(y));
    REFUSED(infinirtStreamSynchronize(stream)); // the memory is gone
    REFUSED(infinirtFree(y));
    OK(infinirtFree(x));
}

void useGraph(const Add &add, infinirtStream_t stream) {
    float *x = allocate(), *y = allocate();
    fill(x, 1.0f);
    OK(infinirtStreamBeginCapture(stream, INFINIRT_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    OK(add(y, x, x, stream));
    OK(add(x, y, y, stream));
    infinirtGraph_t graph = nullptr;
    infinirtGraphExec_t run = nullptr;
    OK(infinirtStreamEndCapture(stream, &graph));
    OK(infinirtGraphInstantiate(&run, graph, nullptr, nullptr, 0));
    OK(infinirtGraphDestroy(graph));
    for (int i = 0; i < 3; ++i) {
        OK(infinirtGraphLuanch(run, stream));
    }
    OK(infinirtGraphExecDestroy(run)); // what was launched runs nevertheless
    OK(infinirtStreamSynchronize(stream));
    expect(x, 64.0f);
    OK(infinirtFree(x));
    OK(infinirtFree(y));
}

void hostThread(int id) {
    OK(infinirtSetDevice(INFINI_DEVICE_NVIDIA, id));
    infinirtStream_t stream = nullptr;
    OK(infinirtStreamCreate(&stream));
    {
        const Add add;
        for (int round = 0; round < ROUNDS; ++round) {
            useStream(add, stream);
            useGraph(add, stream);
            CHECK(std::string(infinicpuSimulatorError()).find("nvidia: ") == 0);
        }
    }
    OK(infinirtStreamDestroy(stream));
    OK(infinirtDeviceSynchronize());
}

// Several threads queue on one stream and wait for it; device 1 waits for device 0.
void shareStream() {
    OK(infinirtSetDevice(INFINI_DEVICE_NVIDIA, 0));
    infinirtStream_t stream = nullptr, other = nullptr;
    infinirtEvent_t event = nullptr;
    OK(infinirtStreamCreate(&stream));
    OK(infinirtEventCreate(&event));
    {
        const Add add;
        float *x = allocate(), *y = allocate();
        fill(x, 1.0f);
        OK(add(y, x, x, stream));
        OK(infinirtEventRecord(event, stream));
        std::vector<std::thread> threads;
        for (int id = 0; id < THREADS; ++id) {
            threads.emplace_back([&] {
                OK(infinirtSetDevice(INFINI_DEVICE_NVIDIA, 0));
                for (int round = 0; round < ROUNDS; ++round) {
                    OK(add(y, y, x, stream));
                    OK(round % 3 == 0 ? infinirtEventSynchronize(event) : infinirtStreamSynchronize(stream));
                }
            });
        }
        OK(infinirtSetDevice(INFINI_DEVICE_NVIDIA, 1));
        OK(infinirtStreamCreate(&other));
        OK(infinirtStreamWaitEvent(other, event));
        OK(infinirtStreamSynchronize(other));
        OK(infinirtStreamDestroy(other));
        OK(infinirtSetDevice(INFINI_DEVICE_NVIDIA, 0));
        for (std::thread &thread : threads) {
            thread.join();
        }
        OK(infinirtStreamSynchronize(stream));
        expect(y, 2.0f + THREADS * ROUNDS);
        OK(infinirtFree(x));
        OK(infinirtFree(y));
    }
    OK(infinirtStreamDestroy(stream));
    OK(infinirtEventDestroy(event));
}

// The parts that fill memory themselves: clobbered inputs, rows that are not there.
void destroyThings() {
    const infiniopHandle_t handle = makeHandle();
    const size_t shape[] = {3, 5};
    const ptrdiff_t strides[] = {7, 1};
    infiniopTensorDescriptor_t out, in, index, table;
    OK(infiniopCreateTensorDescriptor(&out, 2, shape, nullptr, INFINI_DTYPE_F32));
    OK(infiniopCreateTensorDescriptor(&in, 2, shape, strides, INFINI_DTYPE_F32));
    OK(infiniopCreateTensorDescriptor(&index, 1, shape, nullptr, INFINI_DTYPE_I32));
    OK(infiniopCreateTensorDescriptor(&table, 2, shape, nullptr, INFINI_DTYPE_F32));
    float *y = allocate(15 * 4), *x = allocate(19 * 4), *rows = allocate(3 * 4), *weights = allocate(15 * 4); // -1 is no row
    infiniopCausalSoftmaxDescriptor_t softmax;
    OK(infiniopCreateCausalSoftmaxDescriptor(handle, &softmax, out, in));
    size_t size = 0;
    OK(infiniopGetCausalSoftmaxWorkspaceSize(softmax, &size));
    float *workspace = allocate(size);
    OK(infiniopCausalSoftmax(softmax, workspace, size, y, x, nullptr));
    infiniopEmbeddingDescriptor_t embedding;
    OK(infiniopCreateEmbeddingDescriptor(handle, &embedding, out, index, table));
    OK(infiniopEmbedding(embedding, y, rows, weights, nullptr));
    OK(infinirtStreamSynchronize(nullptr));
    OK(infiniopDestroyCausalSoftmaxDescriptor(softmax));
    OK(infiniopEmbedding(embedding, y, rows, weights, nullptr));
    REFUSED(infiniopDestroyEmbeddingDescriptor(embedding)); // it is queued
    REFUSED(infinirtStreamSynchronize(nullptr));
    for (float *memory : {y, x, rows, weights, workspace}) {
        OK(infinirtFree(memory));
    }
    for (infiniopTensorDescriptor_t desc : {out, in, index, table}) {
        OK(infiniopDestroyTensorDescriptor(desc));
    }
    OK(infiniopDestroyHandle(handle));
}

} // namespace

int main() {
    OK(infinicpuSimulate(RECORD));
    REFUSED(infinicpuSimulate("device 1 nvidia\nop add dtypes=f99"));
    std::vector<std::thread> hosts;
    for (int id = 0; id < THREADS; ++id) {
        hosts.emplace_back(hostThread, id);
    }
    for (std::thread &host : hosts) {
        host.join();
    }
    shareStream();
    destroyThings();
    OK(infinicpuSimulate(nullptr));
    infinicpuCounters_t counters;
    OK(infinicpuCounters(&counters));
    CHECK(counters.operators_alive == 0 && counters.tensors_alive == 0 && counters.allocations_alive == 0);
    return 0;
}

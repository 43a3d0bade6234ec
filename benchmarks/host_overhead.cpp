// What an engine costs the host: decode steps on the embedded InfiniCore with operators that do nothing, from inferBatch's entry to its return.
//
// Linked with the engine's own qwen3.cpp. Counts heap allocations (operator new) and what InfiniCore was asked to create during the steps that are measured.
//   host_overhead [batch [position [steps]]]      prints one JSON object
#include "qwen3_impl.hpp"

#include <infinicpu.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>

namespace {
std::atomic<uint64_t> heap_allocations{0};

void *counted(size_t size) {
    heap_allocations.fetch_add(1, std::memory_order_relaxed);
    if (void *memory = std::malloc(size != 0 ? size : 1)) {
        return memory;
    }
    throw std::bad_alloc();
}

[[noreturn]] void die(const char *what) {
    std::fprintf(stderr, "host_overhead: %s: %s\n", what, qwen3LastError());
    std::exit(1);
}
} // namespace

void *operator new(size_t size) { return counted(size); }
void *operator new[](size_t size) { return counted(size); }
void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete[](void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, size_t) noexcept { std::free(memory); }
void operator delete[](void *memory, size_t) noexcept { std::free(memory); }

int main(int argc, char **argv) {
    const uint32_t batch = argc > 1 ? static_cast<uint32_t>(std::atoi(argv[1])) : 1;
    const uint32_t position = argc > 2 ? static_cast<uint32_t>(std::atoi(argv[2])) : 1040;
    const size_t steps = argc > 3 ? static_cast<size_t>(std::atoi(argv[3])) : 900;
    if (infinirtInit() != INFINI_STATUS_SUCCESS || infinicpuSetNoop(1) != INFINI_STATUS_SUCCESS) {
        die("InfiniCore");
    }
    const Qwen3Meta meta = *getQwen3Meta();
    // Nothing is read from weights: any address will do.
    static const float nothing[16] = {};
    const std::vector<const void *> layers(meta.nlayer, nothing);
    const Qwen3Weights weights = {meta.nlayer, meta.dt_logits, meta.dt_logits, 0, nothing, nothing, nothing,
                                  layers.data(), layers.data(), nullptr, layers.data(), layers.data(), layers.data(), layers.data(), layers.data(), layers.data()};
    Qwen3Model *model = createQwen3Model(&meta, &weights, INFINI_DEVICE_CPU, 1, nullptr);
    if (!model) {
        die("createQwen3Model");
    }
    std::vector<Qwen3KVCache *> caches;
    std::vector<uint32_t> tokens(batch, 1), ones(batch, 1), positions(batch, 0), topk(batch, 1), output(batch);
    const std::vector<float> temperature(batch, 1.0f), topp(batch, 1.0f), random(batch, 0.5f);
    const auto step = [&] {
        const infiniStatus_t status = inferBatch(model, tokens.data(), batch, ones.data(), batch, positions.data(), caches.data(), temperature.data(), topk.data(), topp.data(), random.data(), output.data());
        if (status != INFINI_STATUS_SUCCESS) {
            die("inferBatch");
        }
        for (uint32_t &p : positions) {
            ++p;
        }
    };
    for (uint32_t r = 0; r < batch; ++r) {
        caches.push_back(createKVCache(model, 0));
        if (!caches.back()) {
            die("createKVCache");
        }
    }
    while (positions[0] < position) {
        step();
    }
    std::vector<double> microseconds(steps);
    infinicpuCounters_t before, after;
    infinicpuCounters(&before);
    const uint64_t heap_before = heap_allocations.load();
    const uint64_t plans_before = getQwen3Counter(model, "plans_built"), copies_before = getQwen3Counter(model, "h2d_copies");
    for (double &time : microseconds) {
        if (positions[0] + 1 >= meta.dctx) { // from the top again; the caches' tails are dropped
            std::fill(positions.begin(), positions.end(), position);
        }
        const auto start = std::chrono::steady_clock::now();
        step();
        time = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
    }
    const uint64_t heap = heap_allocations.load() - heap_before;
    infinicpuCounters(&after);
    const double per = 1.0 / static_cast<double>(steps);
    const auto rate = [&](uint64_t later, uint64_t earlier) { return static_cast<double>(later - earlier) * per; };
    std::sort(microseconds.begin(), microseconds.end());
    std::printf("{\"layers\": %u, \"batch\": %u, \"position\": %u, \"steps\": %zu, \"us_median\": %.2f, \"us_p10\": %.2f, \"us_p90\": %.2f, \"calls_per_step\": %.2f, "
                "\"heap_allocations_per_step\": %g, \"operators_created_per_step\": %g, \"tensors_created_per_step\": %g, \"device_allocations_per_step\": %g, "
                "\"host_to_device_copies_per_step\": %g, \"plans_built_per_step\": %g}\n",
                meta.nlayer, batch, position, steps, microseconds[steps / 2], microseconds[steps / 10], microseconds[steps * 9 / 10], rate(after.calls, before.calls),
                static_cast<double>(heap) * per, rate(after.operators_created, before.operators_created), rate(after.tensors_created, before.tensors_created),
                rate(after.allocations, before.allocations), rate(getQwen3Counter(model, "h2d_copies"), copies_before), rate(getQwen3Counter(model, "plans_built"), plans_before));
    for (Qwen3KVCache *cache : caches) {
        dropKVCache(model, cache);
    }
    destroyQwen3Model(model);
    return 0;
}

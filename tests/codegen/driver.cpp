// Drives any emitted engine through a fixed scenario, for builds with sanitizers: Python itself is not instrumented.
//
// Sizes come from getQwen3Meta(), weights are random. A ragged batch is compared with its requests alone; caches are duplicated, trimmed, overwritten, swapped and
// left to the model; two models run in two threads, and two threads share one model. Prints the largest difference found and exits 0, or says what failed.
//
//   driver [rounds [devices]]       devices that share each model
//   driver overrun | leak     does what a sanitizer must find
#include "qwen3_impl.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>

namespace {

[[noreturn]] void die(const std::string &what) {
    std::fprintf(stderr, "driver: %s: %s\n", what.c_str(), qwen3LastError());
    std::exit(1);
}

void must(bool ok, const char *what) {
    if (!ok) {
        die(what);
    }
}
#define MUST(CALL) must((CALL), #CALL)
#define MUST_SUCCEED(CALL) must((CALL) == INFINI_STATUS_SUCCESS, #CALL)

// Random weights in the engine's dtype.
class HostWeights {
public:
    HostWeights(const Qwen3Meta &meta, unsigned seed) : _meta(meta), _random(seed) {
        const size_t q = size_t{meta.nh} * meta.dh, kv = size_t{meta.nkvh} * meta.dh;
        _weights.nlayer = meta.nlayer;
        _weights.dt_norm = _weights.dt_mat = meta.dt_logits;
        _weights.transpose_linear_weights = 0;
        _weights.input_embd = matrix(meta.dvoc, meta.d);
        _weights.output_norm = norm(meta.d);
        _weights.output_embd = matrix(meta.dvoc, meta.d);
        _weights.attn_qkv_b = nullptr;
        for (size_t layer = 0; layer < meta.nlayer; ++layer) {
            _attn_norm.push_back(norm(meta.d));
            _attn_qkv.push_back(matrix(q + 2 * kv, meta.d));
            _attn_q_norm.push_back(norm(meta.dh));
            _attn_k_norm.push_back(norm(meta.dh));
            _attn_o.push_back(matrix(meta.d, q));
            _ffn_norm.push_back(norm(meta.d));
            _ffn_gate_up.push_back(matrix(2 * size_t{meta.di}, meta.d));
            _ffn_down.push_back(matrix(meta.d, meta.di));
        }
        _weights.attn_norm = _attn_norm.data();
        _weights.attn_qkv = _attn_qkv.data();
        _weights.attn_q_norm = _attn_q_norm.data();
        _weights.attn_k_norm = _attn_k_norm.data();
        _weights.attn_o = _attn_o.data();
        _weights.ffn_norm = _ffn_norm.data();
        _weights.ffn_gate_up = _ffn_gate_up.data();
        _weights.ffn_down = _ffn_down.data();
    }
    const Qwen3Weights *get() const { return &_weights; }

private:
    const void *fill(size_t count, float middle, float spread) {
        // Each in a block of its own: reading past one is an error that AddressSanitizer sees.
        _memory.emplace_back(count * qwen3::sizeOf(_meta.dt_logits));
        std::uniform_real_distribution<float> uniform(-spread, spread);
        for (size_t i = 0; i < count; ++i) {
            qwen3::fromFloat(middle + uniform(_random), _memory.back().data(), _meta.dt_logits, i);
        }
        return _memory.back().data();
    }
    const void *matrix(size_t rows, size_t cols) { return fill(rows * cols, 0.0f, std::sqrt(3.0f / static_cast<float>(cols))); }
    const void *norm(size_t size) { return fill(size, 1.0f, 0.2f); }

    Qwen3Meta _meta;
    std::mt19937 _random;
    std::vector<std::vector<std::byte>> _memory;
    std::vector<const void *> _attn_norm, _attn_qkv, _attn_q_norm, _attn_k_norm, _attn_o, _ffn_norm, _ffn_gate_up, _ffn_down;
    Qwen3Weights _weights{};
};

struct Request {
    std::vector<uint32_t> tokens;
    uint32_t pos;
    Qwen3KVCache *cache;
};

int devices = 1;

class Session {
public:
    Session(unsigned seed) : meta(*getQwen3Meta()), random(seed), _weights(meta, seed), model(createQwen3Model(&meta, _weights.get(), INFINI_DEVICE_CPU, devices, nullptr)) {
        MUST(model != nullptr);
    }
    ~Session() { destroyQwen3Model(model); }
    Session(const Session &) = delete;
    Session &operator=(const Session &) = delete;

    std::vector<uint32_t> tokens(size_t count) {
        std::uniform_int_distribution<uint32_t> uniform(0, meta.dvoc - 1);
        std::vector<uint32_t> result(count);
        std::generate(result.begin(), result.end(), [&] { return uniform(random); });
        return result;
    }
    Qwen3KVCache *cache(size_t capacity = 0) {
        Qwen3KVCache *made = createKVCache(model, capacity);
        MUST(made != nullptr);
        return made;
    }
    // Logits of every token.
    std::vector<float> forward(const std::vector<Request> &requests) {
        std::vector<uint32_t> flat, lens, pos, rows;
        std::vector<Qwen3KVCache *> caches;
        for (const Request &r : requests) {
            flat.insert(flat.end(), r.tokens.begin(), r.tokens.end());
            lens.push_back(static_cast<uint32_t>(r.tokens.size()));
            pos.push_back(r.pos);
            caches.push_back(r.cache);
        }
        for (uint32_t i = 0; i < flat.size(); ++i) {
            rows.push_back(i);
        }
        const uint32_t count = static_cast<uint32_t>(flat.size()), nreq = static_cast<uint32_t>(lens.size());
        std::vector<float> logits(size_t{count} * meta.dvoc);
        MUST_SUCCEED(forwardBatch(model, flat.data(), count, lens.data(), nreq, pos.data(), caches.data(), rows.data(), count, logits.data()));
        return logits;
    }

    const Qwen3Meta meta;
    std::mt19937 random;

private:
    HostWeights _weights;

public:
    Qwen3Model *const model;
};

float compare(const std::vector<float> &found, const std::vector<float> &expected, float bound) {
    double difference = 0, size = 0;
    must(found.size() == expected.size() && !found.empty(), "sizes of logits");
    for (size_t i = 0; i < found.size(); ++i) {
        must(std::isfinite(found[i]), "finite logits");
        difference += std::pow(double{found[i]} - expected[i], 2);
        size += std::pow(double{expected[i]}, 2);
    }
    const float relative = static_cast<float>(std::sqrt(difference / size));
    must(relative <= bound, ("logits differ by " + std::to_string(relative)).c_str());
    return relative;
}

// One round of everything on one model.
float scenario(Session &s) {
    // Two orders of summation; half types round each intermediate result to 2^-9 (bf16) or 2^-12, some dozen times in a row.
    const float bound = s.meta.dt_logits == INFINI_DTYPE_F32 ? 5e-6f : s.meta.dt_logits == INFINI_DTYPE_F16 ? 5e-3f : 4e-2f;
    const std::pair<uint32_t, uint32_t> shapes[] = {{0, 7}, {5, 1}, {16, 4}, {31, 1}, {0, 1}, {15, 2}, {3, 30}};
    std::vector<Request> batch;
    std::vector<float> alone;
    for (const auto &[start, fresh] : shapes) {
        const std::vector<uint32_t> before = s.tokens(start), now = s.tokens(fresh);
        for (const bool one : {true, false}) {
            Qwen3KVCache *cache = s.cache(one ? 0 : 20);
            if (start) {
                s.forward({{before, 0, cache}});
            }
            if (one) {
                const std::vector<float> logits = s.forward({{now, start, cache}});
                alone.insert(alone.end(), logits.begin(), logits.end());
                MUST_SUCCEED(dropKVCache(s.model, cache));
            } else {
                batch.push_back({now, start, cache});
            }
        }
    }
    float worst = compare(s.forward(batch), alone, bound);

    // Branches of one prefix, against the same branch without sharing.
    Qwen3KVCache *trunk = batch[6].cache; // 33 tokens
    Qwen3KVCache *left = duplicateKVCache(s.model, trunk, 33), *right = duplicateKVCache(s.model, trunk, 20);
    must(left && right, "duplicateKVCache");
    const std::vector<uint32_t> branch = s.tokens(9);
    const std::vector<float> grown = s.forward({{branch, 33, left}, {branch, 20, right}});
    MUST_SUCCEED(trimKVCache(s.model, trunk, 20));
    MUST_SUCCEED(reserveKVCache(s.model, trunk, 60));
    const std::vector<float> again = s.forward({{branch, 20, trunk}});
    worst = std::max(worst, compare(again, {grown.begin() + static_cast<ptrdiff_t>(9 * size_t{s.meta.dvoc}), grown.end()}, bound));
    MUST_SUCCEED(dropKVCache(s.model, trunk));

    // Out to the host and back.
    std::vector<std::byte> host(size_t{s.meta.nlayer} * 2 * s.meta.nkvh * 29 * s.meta.dh * qwen3::sizeOf(s.meta.dt_logits));
    MUST_SUCCEED(exportKVCache(s.model, right, 0, 29, host.data()));
    Qwen3KVCache *copy = s.cache();
    MUST_SUCCEED(importKVCache(s.model, copy, 0, 29, host.data()));
    worst = std::max(worst, compare(s.forward({{branch, 29, copy}}), s.forward({{branch, 29, right}}), bound));

    // Sampling, a few steps, several requests.
    std::vector<Qwen3KVCache *> caches{left, right, copy};
    std::vector<uint32_t> last = s.tokens(3), ones(3, 1), pos(3), topk{1, 40, 5};
    const std::vector<float> temperature{1.0f, 0.8f, 0.0f}, topp{1.0f, 0.9f, 0.5f};
    for (int step = 0; step < 6; ++step) {
        for (size_t i = 0; i < 3; ++i) {
            pos[i] = lengthKVCache(caches[i]);
        }
        std::vector<uint32_t> next(3);
        MUST_SUCCEED(inferBatch(s.model, last.data(), 3, ones.data(), 3, pos.data(), caches.data(), temperature.data(), topk.data(), topp.data(), nullptr, next.data()));
        must(*std::max_element(next.begin(), next.end()) < s.meta.dvoc, "sampled tokens");
        last = next;
    }
    // What is refused must change and leak nothing.
    const uint32_t bad = s.meta.dvoc;
    must(inferBatch(s.model, &bad, 1, ones.data(), 1, pos.data(), caches.data(), temperature.data(), topk.data(), topp.data(), nullptr, last.data()) == INFINI_STATUS_BAD_PARAM, "bad token");
    must(duplicateKVCache(s.model, left, 10000) == nullptr, "bad duplicate");
    MUST_SUCCEED(dropKVCache(s.model, left));
    for (size_t i = 0; i + 1 < batch.size(); ++i) {
        MUST_SUCCEED(dropKVCache(s.model, batch[i].cache));
    }
    MUST_SUCCEED(dropKVCache(s.model, copy));
    return worst; // `right` stays: destroyQwen3Model takes it along
}

// Decode by hand, as several threads do it on one model.
void decode(Session &s, const std::vector<uint32_t> &tokens, std::vector<float> *logits) {
    Qwen3KVCache *cache = s.cache();
    for (uint32_t i = 0; i < tokens.size(); ++i) {
        const uint32_t one = 1;
        std::vector<float> row(s.meta.dvoc);
        MUST_SUCCEED(forwardBatch(s.model, &tokens[i], 1, &one, 1, &i, &cache, nullptr, 1, row.data()));
        logits->insert(logits->end(), row.begin(), row.end());
    }
    MUST_SUCCEED(dropKVCache(s.model, cache));
}

void threads(int rounds) {
    // Two models in two threads.
    std::thread others[2];
    for (unsigned t = 0; t < 2; ++t) {
        others[t] = std::thread([t] {
            Session s(10 + t);
            scenario(s);
        });
    }
    for (std::thread &t : others) {
        t.join();
    }
    // Two threads on one model.
    Session s(3);
    const std::vector<uint32_t> prompts[2] = {s.tokens(20), s.tokens(17)};
    for (int round = 0; round < rounds; ++round) {
        std::vector<float> logits[2], expected[2];
        for (size_t t = 0; t < 2; ++t) {
            decode(s, prompts[t], &expected[t]);
            others[t] = std::thread([&, t] { decode(s, prompts[t], &logits[t]); });
        }
        for (size_t t = 0; t < 2; ++t) {
            others[t].join();
            compare(logits[t], expected[t], 0.0f); // the same steps, one at a time: not a bit may differ
        }
    }
}

// Faults of a caller, to see that the sanitizer is awake: a table that is a row short, a model that is never destroyed.
void misbehave(const std::string &mode) {
    Qwen3Meta meta = *getQwen3Meta();
    Qwen3Meta shorter = meta;
    shorter.dvoc -= mode == "overrun" ? 1 : 0;
    static const HostWeights weights(shorter, 1);
    Qwen3Model *model = createQwen3Model(&meta, weights.get(), INFINI_DEVICE_CPU, 1, nullptr);
    MUST(model != nullptr);
    Qwen3KVCache *cache = createKVCache(model, 0);
    const uint32_t token = 1, one = 1, zero = 0;
    std::vector<float> logits(meta.dvoc);
    MUST_SUCCEED(forwardBatch(model, &token, 1, &one, 1, &zero, &cache, nullptr, 1, logits.data()));
    if (mode != "leak") {
        destroyQwen3Model(model);
    }
}

} // namespace

int main(int argc, char **argv) {
    const std::string mode = argc > 1 ? argv[1] : "1";
    MUST_SUCCEED(infinirtInit());
    if (mode == "overrun" || mode == "leak") {
        misbehave(mode);
        return 0;
    }
    const int rounds = std::atoi(mode.c_str());
    devices = argc > 2 ? std::atoi(argv[2]) : 1;
    float worst = 0;
    {
        Session s(1);
        for (int round = 0; round < rounds; ++round) {
            worst = std::max(worst, scenario(s));
        }
    }
    threads(rounds);
    std::printf("largest difference %g\n", static_cast<double>(worst));
    return 0;
}

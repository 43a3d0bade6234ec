// The engine's C interface over a toy model, so that the runtime is tested apart from the compiler: the logits after a
// prefix are a hash of the prefix, hence every mistake in tokens, positions or caches changes the answer.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

struct Meta {
    int dt_logits;
    uint32_t nlayer, d, nh, nkvh, dh, di, dctx, dvoc;
    float epsilon, theta;
    uint32_t end_token;
    float scale_input, scale_output, scale_o, scale_down;
};

struct Weights {
    size_t nlayer;
    int dt_norm, dt_mat, transpose_linear_weights;
    const void *input_embd, *output_norm, *output_embd;
    const void *const *attn_norm, *const *attn_qkv, *const *attn_qkv_b, *const *attn_q_norm, *const *attn_k_norm;
    const void *const *attn_o, *const *ffn_norm, *const *ffn_gate_up, *const *ffn_down;
};

struct PoolInfo {
    uint32_t block_size, total_blocks, free_blocks;
    uint64_t bytes_per_token, bytes_allocated;
};

constexpr uint32_t BLOCK = 16;
constexpr int BAD_PARAM = 3, NO_MEMORY = 13;

thread_local std::string last_error;
int live_models = 0;
Meta compiled;

int fail(int status, const std::string &text) {
    last_error = text + ": status " + std::to_string(status) + (status == NO_MEMORY ? " (INSUFFICIENT_WORKSPACE)" : " (BAD_PARAM)");
    return status;
}

uint32_t blocksOf(size_t tokens) { return uint32_t((tokens + BLOCK - 1) / BLOCK); }

uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 31)) * 0x9E3779B97F4A7C15ull;
    return x ^ (x >> 29);
}

} // namespace

struct Cache {
    std::vector<uint32_t> tokens;
};

struct Model {
    Meta meta;
    uint32_t blocks = 0;
    uint64_t steps = 0, seed = 0;
    std::set<Cache *> caches;
    std::mutex mutex;

    uint32_t used() const {
        uint32_t n = 0;
        for (const Cache *cache : caches) {
            n += blocksOf(cache->tokens.size());
        }
        return n;
    }

    // Checks everything before anything changes, then appends; rows[i] is the prefix hash after token i of the batch.
    int append(const uint32_t *tokens, uint32_t ntok, const uint32_t *lens, uint32_t nreq, const uint32_t *pos, Cache **kv, std::vector<uint64_t> &rows) {
        uint64_t sum = 0;
        int64_t more = 0;
        std::set<Cache *> distinct;
        for (uint32_t i = 0; i < nreq; i++) {
            sum += lens[i];
            if (lens[i] == 0 || !caches.count(kv[i]) || !distinct.insert(kv[i]).second || pos[i] > kv[i]->tokens.size() || pos[i] + lens[i] > meta.dctx) {
                return fail(BAD_PARAM, "request " + std::to_string(i));
            }
            more += int64_t(blocksOf(pos[i] + lens[i])) - blocksOf(kv[i]->tokens.size());
        }
        if (sum != ntok || nreq == 0) {
            return fail(BAD_PARAM, "ntok");
        }
        for (uint32_t i = 0; i < ntok; i++) {
            if (tokens[i] >= meta.dvoc) {
                return fail(BAD_PARAM, "token " + std::to_string(tokens[i]));
            }
        }
        if (used() + more > blocks) {
            return fail(NO_MEMORY, "KV pool");
        }
        for (uint32_t i = 0; i < nreq; i++) {
            kv[i]->tokens.resize(pos[i]);
            uint64_t hash = seed;
            for (uint32_t token : kv[i]->tokens) {
                hash = mix(hash ^ token);
            }
            for (uint32_t n = 0; n < lens[i]; n++) {
                hash = mix(hash ^ *tokens);
                kv[i]->tokens.push_back(*tokens++);
                rows.push_back(hash);
            }
        }
        steps++;
        return 0;
    }

    std::vector<float> logits(uint64_t hash) const {
        std::vector<float> out(meta.dvoc);
        for (uint32_t v = 0; v < meta.dvoc; v++) {
            out[v] = float(mix(hash + v * 0x632BE59BD9B4E019ull) >> 40) / float(1 << 21) - 4.0f;
        }
        return out;
    }
};

static uint32_t sample(std::vector<float> logits, float temperature, uint32_t topk, float topp, float random) {
    std::vector<uint32_t> order(logits.size());
    for (uint32_t i = 0; i < order.size(); i++) {
        order[i] = i;
    }
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return logits[a] > logits[b]; });
    if (temperature == 0 || topk == 1) {
        return order[0];
    }
    order.resize(std::min<size_t>(topk, order.size()));
    std::vector<double> sums;
    double total = 0;
    for (uint32_t i : order) {
        sums.push_back(total += std::exp((logits[i] - logits[order[0]]) / temperature));
    }
    double limit = random * std::min(topp * total, total);
    return order[std::lower_bound(sums.begin(), sums.end(), limit) - sums.begin()];
}

extern "C" {

const char *qwen3LastError() { return last_error.c_str(); }
int fakeLiveModels() { return live_models; }
const Meta *getQwen3Meta() { return &compiled; }

Model *createQwen3Model(const Meta *meta, const Weights *weights, int device, int ndev, const int *dev_ids) {
    if (device != 0 || ndev != 1 || dev_ids[0] != 0 || weights->nlayer != meta->nlayer || weights->attn_qkv_b) {
        fail(BAD_PARAM, "createQwen3Model");
        return nullptr;
    }
    Model *model = new Model;
    model->meta = compiled = *meta;
    model->blocks = blocksOf(std::max(meta->dctx, 8192u));
    std::memcpy(&model->seed, weights->attn_qkv[meta->nlayer - 1], 8); // the model depends on its weights
    live_models++;
    return model;
}

void destroyQwen3Model(Model *model) {
    if (model) {
        live_models--;
        for (Cache *cache : model->caches) {
            delete cache;
        }
    }
    delete model;
}

int inferBatch(Model *m, const uint32_t *tokens, uint32_t ntok, const uint32_t *lens, uint32_t nreq, const uint32_t *pos, Cache **kv, const float *temperature, const uint32_t *topk, const float *topp, const float *random, uint32_t *output) {
    std::lock_guard<std::mutex> lock(m->mutex);
    std::vector<uint64_t> rows;
    if (int status = m->append(tokens, ntok, lens, nreq, pos, kv, rows)) {
        return status;
    }
    size_t row = 0;
    for (uint32_t i = 0; i < nreq; i++) {
        row += lens[i];
        output[i] = sample(m->logits(rows[row - 1]), temperature[i], topk[i], topp[i], random ? random[i] : 0.5f);
    }
    return 0;
}

int forwardBatch(Model *m, const uint32_t *tokens, uint32_t ntok, const uint32_t *lens, uint32_t nreq, const uint32_t *pos, Cache **kv, const uint32_t *chosen, uint32_t nrows, float *logits) {
    std::lock_guard<std::mutex> lock(m->mutex);
    std::vector<uint64_t> rows;
    if (int status = m->append(tokens, ntok, lens, nreq, pos, kv, rows)) {
        return status;
    }
    uint32_t last = 0;
    for (uint32_t i = 0; i < nrows; i++) {
        last += chosen ? 0 : lens[i];
        std::vector<float> row = m->logits(rows[chosen ? chosen[i] : last - 1]);
        std::copy(row.begin(), row.end(), logits + size_t(i) * m->meta.dvoc);
    }
    return 0;
}

Cache *createKVCache(Model *m, size_t) { return *m->caches.insert(new Cache).first; }

Cache *duplicateKVCache(Model *m, const Cache *from, uint32_t length) {
    if (length > from->tokens.size() || m->used() + blocksOf(length) > m->blocks) {
        fail(length > from->tokens.size() ? BAD_PARAM : NO_MEMORY, "duplicateKVCache");
        return nullptr;
    }
    Cache *cache = createKVCache(m, 0);
    cache->tokens.assign(from->tokens.begin(), from->tokens.begin() + length);
    return cache;
}

int trimKVCache(Model *, Cache *cache, uint32_t length) {
    if (length > cache->tokens.size()) {
        return fail(BAD_PARAM, "trimKVCache");
    }
    cache->tokens.resize(length);
    return 0;
}

int reserveKVCache(Model *m, Cache *cache, uint32_t n) {
    return m->used() + blocksOf(n) - blocksOf(cache->tokens.size()) > m->blocks ? fail(NO_MEMORY, "reserveKVCache") : 0;
}

uint32_t lengthKVCache(const Cache *cache) { return uint32_t(cache->tokens.size()); }

int dropKVCache(Model *m, Cache *cache) {
    if (!m->caches.erase(cache)) {
        return fail(BAD_PARAM, "dropKVCache");
    }
    delete cache;
    return 0;
}

int setKVPoolSize(Model *m, uint64_t tokens) {
    m->blocks = blocksOf(tokens);
    return 0;
}

int getKVPoolInfo(const Model *m, PoolInfo *info) {
    *info = {BLOCK, m->blocks, m->blocks - m->used(), 4, 4ull * BLOCK * m->used()};
    return 0;
}

// Tokens stand for keys and values: [nlayer, 2, nkvh, ntokens, dh] filled with the token at each position (as uint16).
int exportKVCache(Model *m, const Cache *cache, uint32_t start, uint32_t n, void *host) {
    if (size_t(start) + n > cache->tokens.size()) {
        return fail(BAD_PARAM, "exportKVCache");
    }
    uint16_t *out = static_cast<uint16_t *>(host);
    for (uint32_t i = 0; i < m->meta.nlayer * 2 * m->meta.nkvh; i++) {
        for (uint32_t t = 0; t < n * m->meta.dh; t++) {
            *out++ = uint16_t(cache->tokens[start + t / m->meta.dh]);
        }
    }
    return 0;
}

int importKVCache(Model *m, Cache *cache, uint32_t start, uint32_t n, const void *host) {
    if (start > cache->tokens.size()) {
        return fail(BAD_PARAM, "importKVCache");
    }
    const uint16_t *in = static_cast<const uint16_t *>(host);
    cache->tokens.resize(start);
    for (uint32_t t = 0; t < n; t++) {
        cache->tokens.push_back(in[t * m->meta.dh]);
    }
    return 0;
}

int setTrace(Model *, int) { return 0; }

int setCapture(Model *, int) { return 0; }

uint64_t getQwen3Counter(const Model *m, const char *name) { return std::string(name) == "steps" ? m->steps : 0; }

} // extern "C"

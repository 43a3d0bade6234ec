// A small InfiniCore for float32, in the forms of several eras: OLD_ADD_RMS_NORM, OLD_PAGED_CACHING and OLD_ROPE take their arguments as they once did,
// HISTORY_LENGTHS reads lengths as those of the cached tokens alone, WIDE_INTEGERS takes int64 only, CREATE_STATUS is what creating a RoPE returns.
// Its device's memory is not the host's: an address that did not come from infinirtMalloc ends the process.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr uintptr_t DEVICE_BIT = uintptr_t{1} << 62;
thread_local int current_device = -1;
int live = 0;

void *onHost(const void *device) {
    const auto address = reinterpret_cast<uintptr_t>(device);
    if (!(address & DEVICE_BIT)) {
        std::abort();
    }
    return reinterpret_cast<void *>(address & ~DEVICE_BIT);
}

float *values(const void *device) { return static_cast<float *>(onHost(device)); }

struct Tensor {
    std::vector<size_t> shape;
    int dtype;
};

constexpr int I32 = 5;

int64_t integer(const Tensor &tensor, const void *device, size_t i) {
    return tensor.dtype == I32 ? static_cast<int32_t *>(onHost(device))[i] : static_cast<int64_t *>(onHost(device))[i];
}

struct Op {
    std::vector<Tensor> tensors;
    float number;
    int algo;
};

template <class... Tensors>
int make(Op **op, float number, int algo, const Tensors *...tensors) {
    *op = new Op{{*tensors...}, number, algo};
    live++;
    return 0;
}

bool refuses([[maybe_unused]] const Tensor *tensor) {
#ifdef WIDE_INTEGERS
    return tensor->dtype == I32;
#else
    return false;
#endif
}

} // namespace

extern "C" {

int infinirtSetDevice(int device, int) {
    current_device = device;
    return 0;
}
int infinirtGetDevice(int *device, int *) {
    *device = current_device;
    return 0;
}
int infinirtMalloc(void **pointer, size_t size) {
    *pointer = reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(std::malloc(size)) | DEVICE_BIT);
    live++;
    return 0;
}
int infinirtFree(void *pointer) {
    std::free(onHost(pointer));
    live--;
    return 0;
}
int infinirtMemcpy(void *to, const void *from, size_t size, int kind) {
    std::memcpy(kind == 1 ? onHost(to) : to, kind == 2 ? onHost(from) : from, size);
    return 0;
}
int infinirtDeviceSynchronize() { return 0; }
#ifndef WITHOUT_CAPTURE
int infinirtStreamBeginCapture(void *, int) { return 0; }
#endif

int infiniopCreateHandle(void **handle) {
    *handle = std::malloc(1);
    live++;
    return current_device < 0 ? 7 : 0;
}
int infiniopDestroyHandle(void *handle) {
    std::free(handle);
    live--;
    return 0;
}
int infiniopCreateTensorDescriptor(Tensor **desc, size_t ndim, const size_t *shape, const ptrdiff_t *, int dtype) {
    *desc = new Tensor{{shape, shape + ndim}, dtype};
    live++;
    return 0;
}
int infiniopDestroyTensorDescriptor(Tensor *desc) {
    delete desc;
    live--;
    return 0;
}
int getLive() { return live; }

#define OPERATOR(NAME)                                         \
    int infiniopGet##NAME##WorkspaceSize(Op *, size_t *size) { \
        *size = 24;                                            \
        return 0;                                              \
    }                                                          \
    int infiniopDestroy##NAME##Descriptor(Op *op) {            \
        delete op;                                             \
        live--;                                                \
        return 0;                                              \
    }

OPERATOR(AddRMSNorm)
OPERATOR(PagedCaching)
OPERATOR(RoPE)
OPERATOR(PagedAttentionPrefill)

int infiniopGemm() { return 0; }

#ifdef OLD_ADD_RMS_NORM
int infiniopCreateAddRMSNormDescriptor(void *, Op **op, Tensor *y, Tensor *a, Tensor *b, Tensor *w, float epsilon, Tensor *) {
    return make(op, epsilon, 0, y, a, b, w);
}
int infiniopAddRMSNorm(Op *op, void *, size_t, void *y, const void *a, const void *b, const void *w, void *residual_out, void *) {
#else
int infiniopCreateAddRMSNormDescriptor(void *, Op **op, Tensor *y, Tensor *, Tensor *a, Tensor *b, Tensor *w, float epsilon) {
    return make(op, epsilon, 0, y, a, b, w);
}
int infiniopAddRMSNorm(Op *op, void *, size_t, void *y, void *residual_out, const void *a, const void *b, const void *w, void *) {
#endif
    const size_t dim = op->tensors[0].shape[1];
    for (size_t row = 0; row < op->tensors[0].shape[0]; row++) {
        double sum = 0;
        for (size_t i = row * dim; i < (row + 1) * dim; i++) {
            const float total = values(a)[i] + values(b)[i];
            values(residual_out)[i] = total;
            sum += total * total;
        }
        for (size_t i = 0; i < dim; i++) {
            values(y)[row * dim + i] = static_cast<float>(values(residual_out)[row * dim + i] * values(w)[i] / std::sqrt(sum / dim + op->number));
        }
    }
    return 0;
}

#ifdef OLD_PAGED_CACHING
int infiniopCreatePagedCachingDescriptor(void *, Op **op, Tensor *k, Tensor *v, Tensor *k_cache, Tensor *v_cache, Tensor *slots) {
#else
int infiniopCreatePagedCachingDescriptor(void *, Op **op, Tensor *k_cache, Tensor *v_cache, Tensor *k, Tensor *v, Tensor *slots) {
#endif
    return k_cache->shape.size() == 4 && k->shape.size() == 3 ? make(op, 0, 0, k_cache, v_cache, k, v, slots) : 11;
}
#ifdef OLD_PAGED_CACHING
int infiniopPagedCaching(Op *op, void *, size_t, const void *k, const void *v, void *k_cache, void *v_cache, const void *slots, void *) {
#else
int infiniopPagedCaching(Op *op, void *, size_t, void *k_cache, void *v_cache, const void *k, const void *v, const void *slots, void *) {
#endif
    const auto &shape = op->tensors[0].shape;
    for (size_t token = 0; token < op->tensors[2].shape[0]; token++) {
        const size_t slot = integer(op->tensors[4], slots, token);
        for (size_t head = 0; head < shape[1]; head++) {
            const size_t to = ((slot / shape[2] * shape[1] + head) * shape[2] + slot % shape[2]) * shape[3];
            const size_t from = (token * shape[1] + head) * shape[3];
            std::memcpy(values(k_cache) + to, values(k) + from, shape[3] * sizeof(float));
            std::memcpy(values(v_cache) + to, values(v) + from, shape[3] * sizeof(float));
        }
    }
    return 0;
}

#ifndef CREATE_STATUS
#define CREATE_STATUS 0
#endif
#ifdef OLD_ROPE
int infiniopCreateRoPEDescriptor(void *, Op **op, Tensor *y, Tensor *, Tensor *pos, Tensor *, Tensor *) {
    const int algo = 0;
#else
int infiniopCreateRoPEDescriptor(void *, Op **op, Tensor *y, Tensor *, Tensor *pos, Tensor *, Tensor *, int algo) {
#endif
    return CREATE_STATUS ? CREATE_STATUS : refuses(pos) ? 10
                                                        : make(op, 0, algo, y, pos);
}
int infiniopRoPE(Op *op, void *, size_t, void *y, const void *x, const void *pos, const void *sin_table, const void *cos_table, void *) {
    const auto &shape = op->tensors[0].shape;
    const size_t half = shape[2] / 2;
    for (size_t row = 0; row < shape[0] * shape[1]; row++) {
        const size_t position = integer(op->tensors[1], pos, row / shape[1]);
        for (size_t i = 0; i < half; i++) {
            const size_t first = row * shape[2] + (op->algo ? i : 2 * i), second = first + (op->algo ? half : 1);
            const float sin = values(sin_table)[position * half + i], cos = values(cos_table)[position * half + i];
            const float one = values(x)[first], two = values(x)[second];
            values(y)[first] = one * cos - two * sin;
            values(y)[second] = one * sin + two * cos;
        }
    }
    return 0;
}

int infiniopCreatePagedAttentionPrefillDescriptor(void *, Op **op, Tensor *out, Tensor *, Tensor *k_cache, Tensor *, Tensor *tables, Tensor *lens, Tensor *cu_lens, Tensor *, float scale) {
    return refuses(tables) ? 10 : make(op, scale, 0, out, k_cache, tables, lens, cu_lens);
}
int infiniopPagedAttentionPrefill(Op *op, void *, size_t, void *out, const void *q, const void *k_cache, const void *v_cache, const void *tables, const void *lens, const void *cu_lens, const void *, void *) {
    const auto &shape = op->tensors[0].shape, &cache = op->tensors[1].shape;
    const size_t heads = shape[1], dim = shape[2], per_request = op->tensors[2].shape[1];
    for (size_t request = 0; request < op->tensors[3].shape[0]; request++) {
        const size_t begin = integer(op->tensors[4], cu_lens, request), end = integer(op->tensors[4], cu_lens, request + 1);
        size_t total = integer(op->tensors[3], lens, request);
#ifdef HISTORY_LENGTHS
        total += end - begin;
#endif
        for (size_t token = begin; token < end; token++) {
            for (size_t head = 0; head < heads; head++) {
                const float *query = values(q) + (token * heads + head) * dim;
                float *result = values(out) + (token * heads + head) * dim;
                std::vector<double> sums(dim, 0.0);
                double weights = 0;
                for (size_t position = 0; position < total - (end - 1 - token); position++) {
                    const size_t block = integer(op->tensors[2], tables, request * per_request + position / cache[2]);
                    const size_t at = ((block * cache[1] + head * cache[1] / heads) * cache[2] + position % cache[2]) * dim;
                    double score = 0;
                    for (size_t i = 0; i < dim; i++) {
                        score += query[i] * values(k_cache)[at + i];
                    }
                    const double weight = std::exp(score * op->number);
                    weights += weight;
                    for (size_t i = 0; i < dim; i++) {
                        sums[i] += weight * values(v_cache)[at + i];
                    }
                }
                for (size_t i = 0; i < dim; i++) {
                    result[i] = static_cast<float>(sums[i] / weights);
                }
            }
        }
    }
    return 0;
}

} // extern "C"

#include "../kernels/kernels.h"
#include "launch.h"

#include <infiniop/ops/random_sample.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

using namespace infinicpu;

namespace {

// The drawn index is mostly among the largest few hundred weights. Those are found in one pass with a heap; only a
// draw beyond them pays for partitioning all of the weights.
constexpr size_t FIRST_PIECE = 256;
constexpr size_t LARGEST_HEAP = 1024;

struct RandomSampleDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "random_sample";
    infiniDtype_t index_dtype, dtype;
    size_t n;
};

uint64_t largestIndex(infiniDtype_t dtype) {
    switch (dtype) {
    case INFINI_DTYPE_I8:
        return std::numeric_limits<int8_t>::max();
    case INFINI_DTYPE_U8:
        return std::numeric_limits<uint8_t>::max();
    case INFINI_DTYPE_I16:
        return std::numeric_limits<int16_t>::max();
    case INFINI_DTYPE_U16:
        return std::numeric_limits<uint16_t>::max();
    default:
        return std::numeric_limits<int32_t>::max(); // indices are kept in 32 bits in between
    }
}

void writeIndex(void *result, infiniDtype_t dtype, uint32_t index) {
    // Integers of any width are little endian here, and the index is not negative.
    const uint64_t wide = index;
    std::memcpy(result, &wide, sizeOf(dtype));
}

// The first of the largest; a NaN at the front wins, elsewhere it loses, as a loop with `>` has it.
template <class T>
uint32_t argmax(const T *values, size_t n, T max) {
    if (values[0] != values[0]) {
        return 0;
    }
    return uint32_t(std::find(values, values + n, max) - values);
}

// Indices in falling order of their weights, equal weights by index: as many of them as were asked for.
template <class W>
class FallingOrder {
public:
    FallingOrder(const W *weights, uint32_t *order, size_t n)
        : _weights(weights), _order(order), _n(n) {}

    uint32_t operator[](size_t i) const { return _order[i]; }

    void sortFirst(size_t count) {
        count = std::min(count, _n);
        if (count <= _sorted) {
            return;
        }
        const auto before = [w = _weights](uint32_t x, uint32_t y) { return w[x] != w[y] ? w[x] > w[y] : x < y; };
        if (!_partitioned && count <= LARGEST_HEAP) {
            // The heap's top is the last of the chosen; a later index never displaces an equal weight.
            for (size_t i = 0; i < count; ++i) {
                _order[i] = uint32_t(i);
            }
            std::make_heap(_order, _order + count, before);
            for (size_t i = count; i < _n; ++i) {
                if (_weights[i] > _weights[_order[0]]) {
                    std::pop_heap(_order, _order + count, before);
                    _order[count - 1] = uint32_t(i);
                    std::push_heap(_order, _order + count, before);
                }
            }
            std::sort_heap(_order, _order + count, before);
        } else {
            if (!_partitioned) {
                for (size_t i = 0; i < _n; ++i) {
                    _order[i] = uint32_t(i);
                }
                _partitioned = true;
                _sorted = 0;
            }
            if (count < _n) {
                std::nth_element(_order + _sorted, _order + count, _order + _n, before);
            }
            std::sort(_order + _sorted, _order + count, before);
        }
        _sorted = count;
    }

    size_t sorted() const { return _sorted; }

private:
    const W *_weights;
    uint32_t *_order;
    size_t _n;
    size_t _sorted = 0;
    bool _partitioned = false; // _order holds all n indices
};

// The selection rule, see the header: weights (not normalised) with their total, `order` is scratch for n indices.
template <class W>
uint32_t draw(const W *weights, double total, uint32_t *order, size_t n, float random_val, float topp, int topk) {
    const size_t limit = topk < 0 || size_t(topk) > n ? n : size_t(topk);
    FallingOrder<W> falling(weights, order, n);
    double top_k_sum = total;
    if (limit < n) {
        falling.sortFirst(limit);
        top_k_sum = 0.0;
        for (size_t i = 0; i < limit; ++i) {
            top_k_sum += double(weights[falling[i]]);
        }
    }
    const double threshold = double(random_val) * std::min(top_k_sum, double(topp) * total);
    double sum = 0.0;
    uint32_t chosen = 0;
    for (size_t i = 0; i < limit; ++i) { // no further: rounding must not push the draw beyond the allowed ones
        if (i == falling.sorted()) {
            falling.sortFirst(std::max(FIRST_PIECE, 4 * i));
        }
        chosen = falling[i];
        sum += double(weights[chosen]);
        if (sum >= threshold) {
            break;
        }
    }
    return chosen;
}

infiniStatus_t sample(const RandomSampleDescriptor &d, char *workspace, void *result, const void *logits, float random_val, float topp, int topk, float temperature) {
    const bool greedy = random_val == 0.0f || topp == 0.0f || topk == 1 || temperature == 0.0f;
    if (!greedy) {
        // Written so that NaN fails too.
        INFINICPU_REQUIRE(random_val > 0.0f && random_val <= 1.0f && topp > 0.0f && temperature > 0.0f && topk != 0, INFINI_STATUS_BAD_PARAM);
    }
    if (d.dtype == INFINI_DTYPE_F64) {
        const double *values = static_cast<const double *>(logits);
        double max = -std::numeric_limits<double>::infinity();
        for (size_t i = 0; i < d.n; ++i) {
            max = values[i] > max ? values[i] : max;
        }
        uint32_t chosen = argmax(values, d.n, max);
        if (!greedy) {
            double *weights = reinterpret_cast<double *>(workspace);
            double total = 0.0;
            for (size_t i = 0; i < d.n; ++i) {
                const double weight = std::exp((values[i] - max) / double(temperature));
                weights[i] = std::isnan(weight) ? 0.0 : weight;
                total += weights[i];
            }
            if (total > 0.0) {
                chosen = draw(weights, total, reinterpret_cast<uint32_t *>(workspace + d.n * sizeof(double)), d.n, random_val, topp, topk);
            }
        }
        writeIndex(result, d.index_dtype, chosen);
        return INFINI_STATUS_SUCCESS;
    }
    const float *values = static_cast<const float *>(logits);
    float *weights = reinterpret_cast<float *>(workspace);
    if (d.dtype != INFINI_DTYPE_F32) {
        kernels().to_f32[floatIndex(d.dtype)](d.n, weights, logits);
        values = weights;
    }
    const float max = kernels().max_value(d.n, values);
    uint32_t chosen = argmax(values, d.n, max);
    if (!greedy) {
        const double total = kernels().softmax_weights(d.n, weights, values, max, 1.0f / temperature);
        // No finite maximum leaves no weights: the argmax stands.
        if (total > 0.0) {
            chosen = draw(weights, total, reinterpret_cast<uint32_t *>(workspace + d.n * sizeof(float)), d.n, random_val, topp, topk);
        }
    }
    writeIndex(result, d.index_dtype, chosen);
    return INFINI_STATUS_SUCCESS;
}

} // namespace

infiniStatus_t infiniopCreateRandomSampleDescriptor(infiniopHandle_t handle, infiniopRandomSampleDescriptor_t *desc_ptr, infiniopTensorDescriptor_t result, infiniopTensorDescriptor_t probs) {
    return createOperator<RandomSampleDescriptor>(handle, desc_ptr, {result, probs}, [&](RandomSampleDescriptor &d) {
        d.index_dtype = result->dtype;
        d.dtype = probs->dtype;
        INFINICPU_REQUIRE(isAnyInteger(d.index_dtype), INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(isOneOf(d.dtype, {INFINI_DTYPE_F16, INFINI_DTYPE_BF16, INFINI_DTYPE_F32, INFINI_DTYPE_F64}), INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(result->ndim() == 0 && probs->ndim() == 1, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(probs->stride(0) == 1, INFINI_STATUS_BAD_TENSOR_STRIDES);
        d.n = probs->dim(0);
        INFINICPU_REQUIRE(d.n >= 1, INFINI_STATUS_BAD_TENSOR_SHAPE);
        // InfiniCore would wrap the index around.
        INFINICPU_REQUIRE(d.n - 1 <= largestIndex(d.index_dtype), INFINI_STATUS_BAD_TENSOR_DTYPE);
        d.workspace_size = d.n * ((d.dtype == INFINI_DTYPE_F64 ? sizeof(double) : sizeof(float)) + sizeof(uint32_t));
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_WORKSPACE_SIZE(RandomSample)

infiniStatus_t infiniopRandomSample(infiniopRandomSampleDescriptor_t desc, void *workspace, size_t workspace_size, void *result, const void *probs, float random_val, float topp, int topk, float temperature, void *stream) {
    return launch<RandomSampleDescriptor>(desc, workspace, workspace_size, {result, probs}, stream, [=](const RandomSampleDescriptor &d) {
        return sample(d, static_cast<char *>(workspace), result, probs, random_val, topp, topk, temperature);
    });
}

INFINICPU_DEFINE_DESTROY(RandomSample)

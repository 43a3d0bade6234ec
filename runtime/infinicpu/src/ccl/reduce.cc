#include "reduce.h"

#include "../kernels/half.h"

#include <cstring>
#include <type_traits>

namespace infiniccl_cpu {

namespace {

using infinicpu::BF16;
using infinicpu::F16;

constexpr size_t BLOCK = 1024;
constexpr size_t REDUCE_OPS = size_t(INFINICCL_AVG) + 1;

using Kernel = void (*)(const Side &sources, const Side &destinations, size_t count);

// What a storage type is computed in, and the two conversions. Integers are computed in 64 bits, so that an average of
// narrow ones cannot overflow; halves in f32, rounded once.
template <class T>
struct Arithmetic {
    using Wide = std::conditional_t<std::is_floating_point_v<T>, T, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
    static Wide load(T value) { return value; }
    static T store(Wide value) { return T(value); }
};

template <>
struct Arithmetic<F16> {
    using Wide = float;
    static float load(F16 value) { return infinicpu::toFloat(value); }
    static F16 store(float value) { return infinicpu::fromFloat<F16>(value); }
};

template <>
struct Arithmetic<BF16> {
    using Wide = float;
    static float load(BF16 value) { return infinicpu::toFloat(value); }
    static BF16 store(float value) { return infinicpu::fromFloat<BF16>(value); }
};

// A truth value: any byte but 0 is true. The sum is then "or", the product "and".
struct Truth {
    uint8_t byte;
};

template <>
struct Arithmetic<Truth> {
    using Wide = uint64_t;
    static uint64_t load(Truth value) { return value.byte != 0; }
    static Truth store(uint64_t value) { return Truth{uint8_t(value != 0)}; }
};

template <infinicclReduceOp_t OP, class Wide>
inline Wide apply(Wide a, Wide b) {
    if constexpr (OP == INFINICCL_MAX) {
        return b > a || b != b ? b : a;
    } else if constexpr (OP == INFINICCL_MIN) {
        return b < a || b != b ? b : a;
    } else if constexpr (std::is_floating_point_v<Wide>) {
        return OP == INFINICCL_PROD ? a * b : a + b;
    } else { // unsigned: signed overflow is undefined, wrapping around is what every device does
        return OP == INFINICCL_PROD ? Wide(uint64_t(a) * uint64_t(b)) : Wide(uint64_t(a) + uint64_t(b));
    }
}

template <class T, infinicclReduceOp_t OP>
void reduce(const Side &sources, const Side &destinations, size_t count) {
    using Wide = typename Arithmetic<T>::Wide;
    const Wide ranks = Wide(sources.size());
    Wide sum[BLOCK];
    for (size_t at = 0; at < count; at += BLOCK) {
        const size_t n = count - at < BLOCK ? count - at : BLOCK;
        const T *first = reinterpret_cast<const T *>(sources.send(0)) + at;
        for (size_t i = 0; i < n; ++i) {
            sum[i] = Arithmetic<T>::load(first[i]);
        }
        for (size_t rank = 1; rank < sources.size(); ++rank) {
            const T *next = reinterpret_cast<const T *>(sources.send(rank)) + at;
            for (size_t i = 0; i < n; ++i) {
                sum[i] = apply<OP>(sum[i], Arithmetic<T>::load(next[i]));
            }
        }
        T *out = reinterpret_cast<T *>(destinations.recv(0)) + at;
        for (size_t i = 0; i < n; ++i) {
            out[i] = Arithmetic<T>::store(OP == INFINICCL_AVG ? sum[i] / ranks : sum[i]);
        }
        for (size_t rank = 1; rank < destinations.size(); ++rank) {
            std::memmove(reinterpret_cast<T *>(destinations.recv(rank)) + at, out, n * sizeof(T));
        }
    }
}

struct Dtype {
    const char *name;
    size_t size;
    size_t components;          // numbers in an element that are reduced separately; 0: not reduced at all
    Kernel kernels[REDUCE_OPS]; // nullptr: no such reduction
};

template <class T>
constexpr Dtype number(const char *name) {
    return {name, sizeof(T), 1, {reduce<T, INFINICCL_SUM>, reduce<T, INFINICCL_PROD>, reduce<T, INFINICCL_MAX>, reduce<T, INFINICCL_MIN>, reduce<T, INFINICCL_AVG>}};
}

template <class T>
constexpr Dtype complexNumber(const char *name) {
    return {name, 2 * sizeof(T), 2, {reduce<T, INFINICCL_SUM>, nullptr, nullptr, nullptr, reduce<T, INFINICCL_AVG>}};
}

constexpr Dtype truth(const char *name) {
    return {name, 1, 1, {reduce<Truth, INFINICCL_SUM>, reduce<Truth, INFINICCL_PROD>, reduce<Truth, INFINICCL_MAX>, reduce<Truth, INFINICCL_MIN>, nullptr}};
}

// In the order of infiniDtype_t.
constexpr Dtype DTYPES[] = {
    {"invalid", 0, 0, {}},
    number<uint8_t>("byte"),
    truth("bool"),
    number<int8_t>("i8"),
    number<int16_t>("i16"),
    number<int32_t>("i32"),
    number<int64_t>("i64"),
    number<uint8_t>("u8"),
    number<uint16_t>("u16"),
    number<uint32_t>("u32"),
    number<uint64_t>("u64"),
    {"f8", 1, 0, {}},
    number<F16>("f16"),
    number<float>("f32"),
    number<double>("f64"),
    {"c16", 2, 0, {}},
    complexNumber<F16>("c32"),
    complexNumber<float>("c64"),
    complexNumber<double>("c128"),
    number<BF16>("bf16"),
};
static_assert(sizeof(DTYPES) / sizeof(*DTYPES) == INFINI_DTYPE_BF16 + 1);

const Dtype &find(infiniDtype_t dtype) {
    return DTYPES[unsigned(dtype) <= unsigned(INFINI_DTYPE_BF16) ? dtype : INFINI_DTYPE_INVALID];
}

} // namespace

size_t elementSize(infiniDtype_t dtype) {
    return find(dtype).size;
}

const char *dtypeName(infiniDtype_t dtype) {
    return find(dtype).name;
}

size_t reduceAlignment(infiniDtype_t dtype, infinicclReduceOp_t op) {
    const Dtype &found = find(dtype);
    return found.kernels[op] != nullptr ? found.size / found.components : 0;
}

void combine(infiniDtype_t dtype, infinicclReduceOp_t op, const Side &sources, const Side &destinations, size_t count) noexcept {
    const Dtype &found = find(dtype);
    if (sources.size() != 1) {
        found.kernels[op](sources, destinations, count * found.components);
        return;
    }
    for (size_t i = 0; i < destinations.size(); ++i) {
        if (destinations.recv(i) != sources.send(0)) {
            std::memmove(destinations.recv(i), sources.send(0), count * found.size);
        }
    }
}

} // namespace infiniccl_cpu

#ifndef INFINICPU_KERNELS_HALF_H_
#define INFINICPU_KERNELS_HALF_H_

#include "kernels.h"

#include <cstring>

// Scalar conversions, round to nearest even, NaN stays NaN. `static`: every kernel file has its own copies, because
// one shared copy could be the one compiled for an instruction set that this machine lacks.

namespace infinicpu {
namespace {

inline float fromBits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline uint32_t toBits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float toFloat(float value) {
    return value;
}

inline float toFloat(BF16 value) {
    return fromBits(uint32_t(value.bits) << 16);
}

inline float toFloat(F16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
    const uint32_t magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) { // infinity or NaN
        return fromBits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    }
    // The exponent is rebased by a multiplication with 2^112, which also normalises subnormals, exactly.
    return fromBits(toBits(fromBits(magnitude << 13) * fromBits(0x77800000)) | sign);
}

template <class T>
T fromFloat(float value);

template <>
inline float fromFloat<float>(float value) {
    return value;
}

template <>
inline BF16 fromFloat<BF16>(float value) {
    const uint32_t bits = toBits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return BF16{uint16_t(bits >> 16 | 0x40)}; // NaN, made quiet so that it cannot turn into infinity
    }
    return BF16{uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline F16 fromFloat<F16>(float value) {
    const uint32_t bits = toBits(value);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        return F16{uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
    }
    if (magnitude >= 0x477ff000) { // 65520 and above round to infinity
        return F16{uint16_t(sign | 0x7c00)};
    }
    if (magnitude < 0x38800000) { // below 2^-14: the sum's last bit is worth 2^-24, so the addition rounds
        return F16{uint16_t(sign | (toBits(fromBits(magnitude) + 0.5f) - toBits(0.5f)))};
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return F16{uint16_t(sign | ((rounded - 0x38000000) >> 13))};
}

} // namespace
} // namespace infinicpu

#endif // INFINICPU_KERNELS_HALF_H_

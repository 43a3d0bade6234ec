#ifndef INFINICPU_KERNELS_ROW_KERNELS_H_
#define INFINICPU_KERNELS_ROW_KERNELS_H_

#include "simd.h"

// Kernels on one contiguous row, memory-bound: each loads, computes in f32, and rounds once.

namespace infinicpu {
namespace {

// A few independent sums hide the latency of the addition, and keep the error down.
constexpr size_t NUM_SUMS = 4;

struct RowSum {
    Vec parts[NUM_SUMS] = {vzero(), vzero(), vzero(), vzero()};
    float total() const { return vsum(vadd(vadd(parts[0], parts[1]), vadd(parts[2], parts[3]))); }
};

inline float inverseRms(float sum_of_squares, size_t dim, float epsilon) {
    return 1.0f / __builtin_sqrtf(sum_of_squares / float(dim) + epsilon);
}

template <class T, class TW>
void rmsNorm(const NormRow &r) {
    T *y = static_cast<T *>(r.y);
    const T *x = static_cast<const T *>(r.a);
    const TW *w = static_cast<const TW *>(r.weight);
    RowSum sum;
    for (size_t i = 0, part = 0; i < r.dim; i += LANES, part = (part + 1) % NUM_SUMS) {
        const Vec v = vloadUpTo(x + i, r.dim - i);
        sum.parts[part] = vfma(v, v, sum.parts[part]);
    }
    const Vec scale = vset(inverseRms(sum.total(), r.dim, r.epsilon));
    for (size_t i = 0; i < r.dim; i += LANES) {
        const size_t n = r.dim - i;
        vstoreUpTo(y + i, vmul(vmul(vloadUpTo(x + i, n), scale), vloadUpTo(w + i, n)), n);
    }
}

// The sum is formed twice instead of kept, and each element is read before its place is written: residual and y may
// each be a or b.
template <class T, class TW>
void addRmsNorm(const NormRow &r) {
    T *y = static_cast<T *>(r.y);
    T *residual = static_cast<T *>(r.residual);
    const T *a = static_cast<const T *>(r.a);
    const T *b = static_cast<const T *>(r.b);
    const TW *w = static_cast<const TW *>(r.weight);
    RowSum sum;
    for (size_t i = 0, part = 0; i < r.dim; i += LANES, part = (part + 1) % NUM_SUMS) {
        const size_t n = r.dim - i;
        const Vec v = vadd(vloadUpTo(a + i, n), vloadUpTo(b + i, n));
        sum.parts[part] = vfma(v, v, sum.parts[part]);
    }
    const Vec scale = vset(inverseRms(sum.total(), r.dim, r.epsilon));
    for (size_t i = 0; i < r.dim; i += LANES) {
        const size_t n = r.dim - i;
        const Vec v = vadd(vloadUpTo(a + i, n), vloadUpTo(b + i, n));
        vstoreUpTo(residual + i, v, n);
        vstoreUpTo(y + i, vmul(vmul(v, scale), vloadUpTo(w + i, n)), n);
    }
}

template <class T>
void ropeNeox(const RopeRow &r) {
    T *y = static_cast<T *>(r.y);
    const T *x = static_cast<const T *>(r.x);
    const T *sines = static_cast<const T *>(r.sin_row);
    const T *cosines = static_cast<const T *>(r.cos_row);
    for (size_t i = 0; i < r.half; i += LANES) {
        const size_t n = r.half - i;
        const Vec s = vloadUpTo(sines + i, n);
        const Vec c = vloadUpTo(cosines + i, n);
        const Vec x0 = vloadUpTo(x + i, n);
        const Vec x1 = vloadUpTo(x + r.half + i, n);
        vstoreUpTo(y + i, vsub(vmul(x0, c), vmul(x1, s)), n);
        vstoreUpTo(y + r.half + i, vfma(x0, s, vmul(x1, c)), n);
    }
}

template <class T>
void ropeGptJ(const RopeRow &r) {
    T *y = static_cast<T *>(r.y);
    const T *x = static_cast<const T *>(r.x);
    const T *sines = static_cast<const T *>(r.sin_row);
    const T *cosines = static_cast<const T *>(r.cos_row);
    for (size_t i = 0; i < r.half; ++i) {
        const float s = toFloat(sines[i]);
        const float c = toFloat(cosines[i]);
        const float x0 = toFloat(x[2 * i]);
        const float x1 = toFloat(x[2 * i + 1]);
        y[2 * i] = fromFloat<T>(x0 * c - x1 * s);
        y[2 * i + 1] = fromFloat<T>(x0 * s + x1 * c);
    }
}

inline float maxOfLanes(Vec v) {
    float lanes[LANES];
    vstore(lanes, v);
    float result = lanes[0];
    for (size_t i = 1; i < LANES; ++i) {
        result = maxOf(result, lanes[i]);
    }
    return result;
}

constexpr float NEGATIVE_INFINITY = -__builtin_inff();

// vmax(value, highest so far) passes over NaN: with one, all of the instruction sets return the second operand.
inline float maxValue(size_t n, const float *values) {
    Vec highest[NUM_SUMS] = {vset(NEGATIVE_INFINITY), vset(NEGATIVE_INFINITY), vset(NEGATIVE_INFINITY), vset(NEGATIVE_INFINITY)};
    size_t i = 0;
    for (; i + NUM_SUMS * LANES <= n; i += NUM_SUMS * LANES) {
        unrolled<NUM_SUMS>([&](auto part) { highest[part.value] = vmax(vload(values + i + part.value * LANES), highest[part.value]); });
    }
    float max = maxOfLanes(vmax(vmax(highest[0], highest[1]), vmax(highest[2], highest[3])));
    for (; i < n; ++i) {
        max = maxOf(max, values[i]);
    }
    return max;
}

// Three passes that each compute what they need from x: exp is cheaper than a buffer for a row of unknown length, and
// y (which may be x) is written in the last pass only.
template <class T>
void softmaxContiguous(T *y, const T *x, size_t visible) {
    Vec highest = vset(NEGATIVE_INFINITY);
    size_t i = 0;
    for (; i + LANES <= visible; i += LANES) {
        highest = vmax(vload(x + i), highest);
    }
    float max = maxOfLanes(highest);
    for (; i < visible; ++i) {
        max = maxOf(max, toFloat(x[i]));
    }
    const Vec shift = vset(max);
    RowSum sum;
    size_t part = 0;
    for (i = 0; i + LANES <= visible; i += LANES, part = (part + 1) % NUM_SUMS) {
        sum.parts[part] = vadd(sum.parts[part], vexp(vsub(vload(x + i), shift)));
    }
    float tail = 0.0f;
    if (i < visible) {
        float lanes[LANES];
        vstore(lanes, vexp(vsub(vloadPart(x + i, visible - i), shift)));
        for (size_t l = 0; l < visible - i; ++l) {
            tail += lanes[l];
        }
    }
    const Vec scale = vset(1.0f / (sum.total() + tail));
    for (i = 0; i < visible; i += LANES) {
        const size_t n = visible - i;
        vstoreUpTo(y + i, vmul(vexp(vsub(vloadUpTo(x + i, n), shift)), scale), n);
    }
}

template <class T>
void softmaxStrided(const SoftmaxRow &r) {
    T *y = static_cast<T *>(r.y);
    const T *x = static_cast<const T *>(r.x);
    float max = NEGATIVE_INFINITY;
    for (size_t i = 0; i < r.visible; ++i) {
        max = maxOf(max, toFloat(x[ptrdiff_t(i) * r.x_stride]));
    }
    float values[LANES];
    double sum = 0.0;
    for (int pass = 0; pass < 2; ++pass) {
        for (size_t i = 0; i < r.visible; i += LANES) {
            const size_t n = minOf(LANES, r.visible - i);
            for (size_t l = 0; l < LANES; ++l) {
                values[l] = l < n ? toFloat(x[ptrdiff_t(i + l) * r.x_stride]) : max;
            }
            vstore(values, vexp(vsub(vload(values), vset(max))));
            for (size_t l = 0; l < n; ++l) {
                if (pass == 0) {
                    sum += values[l];
                } else {
                    y[ptrdiff_t(i + l) * r.y_stride] = fromFloat<T>(values[l] / float(sum));
                }
            }
        }
    }
}

template <class T>
void softmaxRow(const SoftmaxRow &r) {
    T *y = static_cast<T *>(r.y);
    if (r.x_stride == 1 && r.y_stride == 1) {
        softmaxContiguous(y, static_cast<const T *>(r.x), r.visible);
    } else {
        softmaxStrided<T>(r);
    }
    for (size_t i = r.visible; i < r.total; ++i) {
        y[ptrdiff_t(i) * r.y_stride] = fromFloat<T>(0.0f);
    }
}

struct AddOp {
    static Vec apply(Vec a, Vec b) { return vadd(a, b); }
};
struct MulOp {
    static Vec apply(Vec a, Vec b) { return vmul(a, b); }
};
struct SwigluOp {
    static Vec apply(Vec up, Vec gate) { return vmul(vsilu(gate), up); }
};

template <class T, class Op>
void binaryRow(size_t n, void *c, const void *a, const void *b) {
    for (size_t i = 0; i < n; i += LANES) {
        const Vec left = vloadUpTo(static_cast<const T *>(a) + i, n - i);
        const Vec right = vloadUpTo(static_cast<const T *>(b) + i, n - i);
        vstoreUpTo(static_cast<T *>(c) + i, Op::apply(left, right), n - i);
    }
}

template <class T>
void siluRow(size_t n, void *c, const void *a) {
    for (size_t i = 0; i < n; i += LANES) {
        vstoreUpTo(static_cast<T *>(c) + i, vsilu(vloadUpTo(static_cast<const T *>(a) + i, n - i)), n - i);
    }
}

template <class T>
void toF32Row(size_t n, float *out, const void *in) {
    for (size_t i = 0; i < n; i += LANES) {
        vstoreUpTo(out + i, vloadUpTo(static_cast<const T *>(in) + i, n - i), n - i);
    }
}

inline double softmaxWeights(size_t n, float *weights, const float *logits, float max, float inverse_temperature) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i += LANES) {
        const size_t count = minOf(LANES, n - i);
        const Vec shifted = vmul(vsub(vloadUpTo(logits + i, count), vset(max)), vset(inverse_temperature));
        float lanes[LANES];
        vstore(lanes, vexp(shifted));
        float part = 0.0f;
        for (size_t l = 0; l < count; ++l) {
            lanes[l] = lanes[l] == lanes[l] ? lanes[l] : 0.0f; // NaN
            weights[i + l] = lanes[l];
            part += lanes[l];
        }
        sum += part;
    }
    return sum;
}

} // namespace
} // namespace infinicpu

#endif // INFINICPU_KERNELS_ROW_KERNELS_H_

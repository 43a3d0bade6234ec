#ifndef INFINICPU_KERNELS_SIMD_H_
#define INFINICPU_KERNELS_SIMD_H_

// One vector type of f32 lanes per instruction set, with the few functions that the kernels need. Everything has
// internal linkage (see half.h), which is also why the kernels use no std:: function templates.

#include "half.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace infinicpu {
namespace {

template <class T>
inline T minOf(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T maxOf(T a, T b) {
    return a < b ? b : a;
}

constexpr size_t STEP_MAX = 32; // no step of a kernel is longer, in elements

template <size_t I>
struct Index {
    static constexpr size_t value = I;
};

// fn(Index<0>{}), ..., fn(Index<N - 1>{}): a loop that is unrolled before anything else happens, so that an array
// indexed by it becomes registers. The compiler's own unrolling comes too late for that.
template <size_t N, size_t I = 0, class Fn>
inline __attribute__((always_inline)) void unrolled(const Fn &fn) {
    if constexpr (I < N) {
        fn(Index<I>{});
        unrolled<N, I + 1>(fn);
    }
}

#if defined(__AVX512F__)

constexpr size_t LANES = 16;
using Vec = __m512;

inline Vec vset(float x) { return _mm512_set1_ps(x); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec vadd(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec vsub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec vmul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec vdiv(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec vround(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for integral n, without overflow in between.
inline Vec vscale2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
// x where a < b, else y (also where either is NaN).
inline Vec vselectLess(Vec a, Vec b, Vec x, Vec y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }

inline Vec vload(const float *p) { return _mm512_loadu_ps(p); }
inline Vec vload(const F16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
inline Vec vload(const BF16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16));
}
inline void vstore(float *p, Vec x) { _mm512_storeu_ps(p, x); }
inline __m256i vpack(F16, Vec x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m256i vpack(BF16, Vec x) {
    // Not vcvtneps2bf16: it flushes subnormals.
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, quiet);
    return _mm512_cvtepi32_epi16(rounded);
}
inline void vstore(F16 *p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), vpack(F16{}, x)); }
inline void vstore(BF16 *p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), vpack(BF16{}, x)); }

inline __mmask16 firstLanes(size_t n) { return __mmask16((1u << n) - 1); }
inline Vec vloadPart(const float *p, size_t n) { return _mm512_maskz_loadu_ps(firstLanes(n), p); }
inline void vstorePart(float *p, Vec x, size_t n) { _mm512_mask_storeu_ps(p, firstLanes(n), x); }
inline Vec vloadPart(const F16 *p, size_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(firstLanes(n), p)); }
inline Vec vloadPart(const BF16 *p, size_t n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(firstLanes(n), p)), 16));
}
inline void vstorePart(F16 *p, Vec x, size_t n) { _mm256_mask_storeu_epi16(p, firstLanes(n), vpack(F16{}, x)); }
inline void vstorePart(BF16 *p, Vec x, size_t n) { _mm256_mask_storeu_epi16(p, firstLanes(n), vpack(BF16{}, x)); }

inline float vsum(Vec x) {
    // A fixed tree, so that every kernel adds the lanes in the same order.
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
// Lane j: vsum(x[j]), with exactly its additions, of LANES vectors.
inline Vec vsumAll(const Vec *x) {
    // 16 vectors become 8, 4, 2 and 1: each step adds the two halves of what two vectors have left.
    Vec quarters[4]; // four sums of four lanes each: those of x[e], x[4 + e], x[8 + e], x[12 + e]
    unrolled<4>([&](auto e) {
        const Vec a = x[e.value], b = x[4 + e.value], c = x[8 + e.value], d = x[12 + e.value];
        const Vec ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        const Vec cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
        quarters[e.value] = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    });
    const auto pairs = [](Vec a, Vec b) {
        const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)), high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
        return _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    };
    const Vec first = pairs(quarters[0], quarters[1]), second = pairs(quarters[2], quarters[3]);
    return _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x88), _mm512_shuffle_ps(first, second, 0xdd));
}

#elif defined(__AVX2__)

constexpr size_t LANES = 8;
using Vec = __m256;

inline Vec vset(float x) { return _mm256_set1_ps(x); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec vadd(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec vsub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec vmul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec vdiv(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec vround(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec vscale2(Vec x, Vec n) {
    // In two steps: 2^n alone may overflow or be subnormal.
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i first = _mm256_srai_epi32(whole, 1);
    const __m256i second = _mm256_sub_epi32(whole, first);
    const __m256i bias = _mm256_set1_epi32(127);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23)));
}
inline Vec vselectLess(Vec a, Vec b, Vec x, Vec y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }

inline Vec vload(const float *p) { return _mm256_loadu_ps(p); }
inline Vec vload(const F16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline Vec vload(const BF16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 16));
}
inline void vstore(float *p, Vec x) { _mm256_storeu_ps(p, x); }
inline void vstore(F16 *p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void vstore(BF16 *p, Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_castsi256_si128(packed));
}

inline __m256i firstLanes(size_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec vloadPart(const float *p, size_t n) { return _mm256_maskload_ps(p, firstLanes(n)); }
inline void vstorePart(float *p, Vec x, size_t n) { _mm256_maskstore_ps(p, firstLanes(n), x); }

inline float vsum(Vec x) {
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

#else

// The compilers' generic vectors: SSE2, NEON or plain code, whatever the machine's base has.
constexpr size_t LANES = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));

inline Vec vset(float x) { return Vec{x, x, x, x}; }
inline Vec vfma(Vec a, Vec b, Vec c) { return a * b + c; } // contracted where the machine can (-ffp-contract=fast)
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
inline Vec vadd(Vec a, Vec b) { return a + b; }
inline Vec vsub(Vec a, Vec b) { return a - b; }
inline Vec vmul(Vec a, Vec b) { return a * b; }
inline Vec vdiv(Vec a, Vec b) { return a / b; }
inline Vec vround(Vec a) {
    Vec out;
    for (size_t i = 0; i < LANES; ++i) {
        out[i] = __builtin_rintf(a[i]);
    }
    return out;
}
inline Vec vscale2(Vec x, Vec n) {
    const IntVec whole = __builtin_convertvector(n, IntVec);
    const IntVec first = whole >> 1;
    const IntVec second = whole - first;
    return x * reinterpret_cast<Vec>((first + 127) << 23) * reinterpret_cast<Vec>((second + 127) << 23);
}
inline Vec vselectLess(Vec a, Vec b, Vec x, Vec y) { return a < b ? x : y; }

inline Vec vload(const float *p) {
    Vec out;
    std::memcpy(&out, p, sizeof(out));
    return out;
}
template <class T>
inline Vec vload(const T *p) {
    return Vec{toFloat(p[0]), toFloat(p[1]), toFloat(p[2]), toFloat(p[3])};
}
inline void vstore(float *p, Vec x) { std::memcpy(p, &x, sizeof(x)); }
template <class T>
inline void vstore(T *p, Vec x) {
    for (size_t i = 0; i < LANES; ++i) {
        p[i] = fromFloat<T>(x[i]);
    }
}
inline Vec vloadPart(const float *p, size_t n) {
    Vec out{};
    std::memcpy(&out, p, n * sizeof(float));
    return out;
}
inline void vstorePart(float *p, Vec x, size_t n) { std::memcpy(p, &x, n * sizeof(float)); }
inline float vsum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

#endif

inline Vec vzero() { return vset(0.0f); }

#if !defined(__AVX512F__)
inline Vec vsumAll(const Vec *x) {
    float sums[LANES];
    for (size_t j = 0; j < LANES; ++j) {
        sums[j] = vsum(x[j]);
    }
    return vload(sums);
}
#endif

// The first n lanes, the others 0. n < LANES.
template <class T>
inline Vec vloadPart(const T *p, size_t n) {
    T lanes[LANES] = {};
    for (size_t i = 0; i < n; ++i) {
        lanes[i] = p[i];
    }
    return vload(lanes);
}
template <class T>
inline void vstorePart(T *p, Vec x, size_t n) {
    T lanes[LANES];
    vstore(lanes, x);
    for (size_t i = 0; i < n; ++i) {
        p[i] = lanes[i];
    }
}
// n may be LANES too.
template <class T>
inline Vec vloadUpTo(const T *p, size_t n) { return n >= LANES ? vload(p) : vloadPart(p, n); }
template <class T>
inline void vstoreUpTo(T *p, Vec x, size_t n) {
    if (n >= LANES) {
        vstore(p, x);
    } else {
        vstorePart(p, x, n);
    }
}

// exp(x), relative error below 2e-7 where the result is a normal number; 0 below -104, infinity above 88.73, NaN stays.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7.
inline Vec vexp(Vec x) {
    const Vec lowest = vset(-104.0f);
    const Vec highest = vset(89.0f);
    const Vec clamped_low = vselectLess(x, lowest, lowest, x); // NaN passes: it is not less than anything
    const Vec clamped = vselectLess(highest, clamped_low, highest, clamped_low);
    const Vec n = vround(vmul(clamped, vset(1.44269504088896341f)));
    Vec r = vfma(n, vset(-0.693145751953125f), clamped); // ln 2 in two parts: n times the first is exact
    r = vfma(n, vset(-1.42860682030941723e-6f), r);
    Vec p = vset(1.0f / 5040.0f);
    p = vfma(p, r, vset(1.0f / 720.0f));
    p = vfma(p, r, vset(1.0f / 120.0f));
    p = vfma(p, r, vset(1.0f / 24.0f));
    p = vfma(p, r, vset(1.0f / 6.0f));
    p = vfma(p, r, vset(0.5f));
    p = vfma(p, r, vset(1.0f));
    p = vfma(p, r, vset(1.0f));
    const Vec result = vscale2(p, n);
    return vselectLess(x, lowest, vzero(), result);
}

inline Vec vsigmoid(Vec x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }
// x * sigmoid(x). At -infinity the limit is 0, but -inf * 0 is NaN, in the scalar formula too.
inline Vec vsilu(Vec x) { return vmul(x, vsigmoid(x)); }

} // namespace
} // namespace infinicpu

#endif // INFINICPU_KERNELS_SIMD_H_

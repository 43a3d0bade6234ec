#ifndef INFINICPU_KERNELS_GEMM_KERNELS_H_
#define INFINICPU_KERNELS_GEMM_KERNELS_H_

#include "simd.h"

// Two families, chosen by the layout of B alone, so that one layer's products are always summed in the same order
// whatever the number of rows:
//
//   dot    a_col == 1 and b_row == 1: both are contiguous along K. Lanes run along K, one sum per lane, the lanes are
//          added at the end. This is a weight stored [N, K]; nothing is packed, a row of weights is read once.
//   outer  b_col == 1: B is contiguous along N. Lanes run along N, K is summed in pieces of K_PIECE.
//
// In both, an element's sum depends on its row of A and its column of B only, never on the tile that it falls into.

namespace infinicpu {
namespace {

#if defined(__AVX512F__)
constexpr size_t DOT_ROWS = 4, DOT_COLS = 6;
constexpr size_t OUTER_ROWS = 6, OUTER_VECS = 4;
#elif defined(__AVX2__)
constexpr size_t DOT_ROWS = 3, DOT_COLS = 4;
constexpr size_t OUTER_ROWS = 6, OUTER_VECS = 2;
#elif defined(__aarch64__)
constexpr size_t DOT_ROWS = 4, DOT_COLS = 6;
constexpr size_t OUTER_ROWS = 6, OUTER_VECS = 4;
#else
constexpr size_t DOT_ROWS = 2, DOT_COLS = 4;
constexpr size_t OUTER_ROWS = 4, OUTER_VECS = 2;
#endif

constexpr size_t K_PIECE = 256;

// How a dot tile multiplies: f32 lanes, converted from the storage types.
template <class TA, class TB>
struct FloatProduct {
    using A = TA;
    using B = TB;
    using Operand = Vec;
    static constexpr size_t STEP = LANES;
    template <class T>
    static Operand load(const T *p) { return vload(p); }
    template <class T>
    static Operand loadPart(const T *p, size_t n) { return vloadPart(p, n); }
    static Vec multiplyAdd(Operand a, Operand b, Vec sum) { return vfma(a, b, sum); }
};

#if defined(__AVX512BF16__)
// Pairs of bf16: products are exact, each lane adds its two products to an f32 sum. The instruction treats subnormal
// inputs and results as 0, an error below 2^-126 per product.
struct Bf16Product {
    using A = BF16;
    using B = BF16;
    using Operand = __m512bh;
    static constexpr size_t STEP = 32;
    static Operand load(const BF16 *p) { return __m512bh(_mm512_loadu_si512(p)); }
    static Operand loadPart(const BF16 *p, size_t n) { return __m512bh(_mm512_maskz_loadu_epi16((uint32_t(1) << n) - 1, p)); }
    static Vec multiplyAdd(Operand a, Operand b, Vec sum) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

// out[i * DOT_COLS + j] = sum over k of a[i][k] * b[j][k]
template <class Product, size_t ROWS, size_t COLS>
inline void dotTile(size_t k, const typename Product::A *a, ptrdiff_t a_row, const typename Product::B *b, ptrdiff_t b_col, float *out) {
    using Operand = typename Product::Operand;
    Vec sums[ROWS][COLS];
    for (size_t i = 0; i < ROWS; ++i) {
        for (size_t j = 0; j < COLS; ++j) {
            sums[i][j] = vzero();
        }
    }
    size_t p = 0;
    for (; p + Product::STEP <= k; p += Product::STEP) {
        Operand left[ROWS];
        for (size_t i = 0; i < ROWS; ++i) {
            left[i] = Product::load(a + ptrdiff_t(i) * a_row + p);
        }
        for (size_t j = 0; j < COLS; ++j) {
            const Operand right = Product::load(b + ptrdiff_t(j) * b_col + p);
            for (size_t i = 0; i < ROWS; ++i) {
                sums[i][j] = Product::multiplyAdd(left[i], right, sums[i][j]);
            }
        }
    }
    if (p < k) {
        Operand left[ROWS];
        for (size_t i = 0; i < ROWS; ++i) {
            left[i] = Product::loadPart(a + ptrdiff_t(i) * a_row + p, k - p);
        }
        for (size_t j = 0; j < COLS; ++j) {
            const Operand right = Product::loadPart(b + ptrdiff_t(j) * b_col + p, k - p);
            for (size_t i = 0; i < ROWS; ++i) {
                sums[i][j] = Product::multiplyAdd(left[i], right, sums[i][j]);
            }
        }
    }
    for (size_t i = 0; i < ROWS; ++i) {
        for (size_t j = 0; j < COLS; ++j) {
            out[i * DOT_COLS + j] = vsum(sums[i][j]);
        }
    }
}

template <class Product, size_t ROWS, size_t COLS>
inline void dotTileCols(size_t cols, size_t k, const typename Product::A *a, ptrdiff_t a_row, const typename Product::B *b, ptrdiff_t b_col, float *out) {
    if (cols == COLS) {
        dotTile<Product, ROWS, COLS>(k, a, a_row, b, b_col, out);
    } else if constexpr (COLS > 1) {
        dotTileCols<Product, ROWS, COLS - 1>(cols, k, a, a_row, b, b_col, out);
    }
}

template <class Product, size_t ROWS>
inline void dotTileAny(size_t rows, size_t cols, size_t k, const typename Product::A *a, ptrdiff_t a_row, const typename Product::B *b, ptrdiff_t b_col, float *out) {
    if (rows == ROWS) {
        dotTileCols<Product, ROWS, DOT_COLS>(cols, k, a, a_row, b, b_col, out);
    } else if constexpr (ROWS > 1) {
        dotTileAny<Product, ROWS - 1>(rows, cols, k, a, a_row, b, b_col, out);
    }
}

// c = alpha * sum + beta * c, rounded once; beta == 0 does not read c.
template <class T>
inline void storeElement(T *c, float sum, float alpha, float beta) {
    const float value = alpha * sum;
    *c = fromFloat<T>(beta == 0.0f ? value : value + beta * toFloat(*c));
}

template <class Product, class TC>
void gemmDot(const GemmBlock &g) {
    const auto *a = static_cast<const typename Product::A *>(g.a);
    const auto *b = static_cast<const typename Product::B *>(g.b);
    auto *c = static_cast<TC *>(g.c);
    float tile[DOT_ROWS * DOT_COLS];
    // The rows of A stay in the first-level cache while the block's columns of B, which fit the second level, pass by.
    for (size_t m = g.m0; m < g.m1; m += DOT_ROWS) {
        const size_t rows = minOf(DOT_ROWS, g.m1 - m);
        for (size_t n = g.n0; n < g.n1; n += DOT_COLS) {
            const size_t cols = minOf(DOT_COLS, g.n1 - n);
            dotTileAny<Product, DOT_ROWS>(rows, cols, g.k, a + ptrdiff_t(m) * g.a_row, g.a_row, b + ptrdiff_t(n) * g.b_col, g.b_col, tile);
            for (size_t i = 0; i < rows; ++i) {
                TC *row = c + ptrdiff_t(m + i) * g.c_row + ptrdiff_t(n) * g.c_col;
                for (size_t j = 0; j < cols; ++j) {
                    storeElement(row + ptrdiff_t(j) * g.c_col, tile[i * DOT_COLS + j], g.alpha, g.beta);
                }
            }
        }
    }
}

// ROWS rows by VECS vectors; the last vector has `last` lanes (LANES unless TAIL).
template <class TB, class TC, size_t ROWS, size_t VECS, bool TAIL>
inline void outerTile(const GemmBlock &g, size_t m, size_t n, size_t last) {
    const float *a = static_cast<const float *>(g.a) + ptrdiff_t(m) * g.a_row;
    const TB *b = static_cast<const TB *>(g.b) + n;
    Vec totals[ROWS][VECS];
    for (size_t i = 0; i < ROWS; ++i) {
        for (size_t j = 0; j < VECS; ++j) {
            totals[i][j] = vzero();
        }
    }
    for (size_t k0 = 0; k0 < g.k; k0 += K_PIECE) {
        const size_t k1 = minOf(g.k, k0 + K_PIECE);
        Vec sums[ROWS][VECS];
        for (size_t i = 0; i < ROWS; ++i) {
            for (size_t j = 0; j < VECS; ++j) {
                sums[i][j] = vzero();
            }
        }
        for (size_t p = k0; p < k1; ++p) {
            const TB *row = b + ptrdiff_t(p) * g.b_row;
            Vec right[VECS];
            for (size_t j = 0; j < VECS; ++j) {
                right[j] = TAIL && j == VECS - 1 ? vloadPart(row + j * LANES, last) : vload(row + j * LANES);
            }
            for (size_t i = 0; i < ROWS; ++i) {
                const Vec left = vset(a[ptrdiff_t(i) * g.a_row + ptrdiff_t(p) * g.a_col]);
                for (size_t j = 0; j < VECS; ++j) {
                    sums[i][j] = vfma(left, right[j], sums[i][j]);
                }
            }
        }
        for (size_t i = 0; i < ROWS; ++i) {
            for (size_t j = 0; j < VECS; ++j) {
                totals[i][j] = vadd(totals[i][j], sums[i][j]);
            }
        }
    }
    const Vec alpha = vset(g.alpha);
    for (size_t i = 0; i < ROWS; ++i) {
        TC *row = static_cast<TC *>(g.c) + ptrdiff_t(m + i) * g.c_row + ptrdiff_t(n) * g.c_col;
        for (size_t j = 0; j < VECS; ++j) {
            const size_t lanes = TAIL && j == VECS - 1 ? last : LANES;
            if (g.c_col == 1) {
                Vec value = vmul(alpha, totals[i][j]);
                if (g.beta != 0.0f) {
                    value = vfma(vset(g.beta), vloadUpTo(row + j * LANES, lanes), value);
                }
                vstoreUpTo(row + j * LANES, value, lanes);
            } else {
                float values[LANES];
                vstore(values, totals[i][j]);
                for (size_t l = 0; l < lanes; ++l) {
                    storeElement(row + ptrdiff_t(j * LANES + l) * g.c_col, values[l], g.alpha, g.beta);
                }
            }
        }
    }
}

template <class TB, class TC, size_t ROWS, size_t VECS>
inline void outerTileVecs(const GemmBlock &g, size_t m, size_t n, size_t vecs, size_t last) {
    if (vecs == VECS) {
        if (last == LANES) {
            outerTile<TB, TC, ROWS, VECS, false>(g, m, n, last);
        } else {
            outerTile<TB, TC, ROWS, VECS, true>(g, m, n, last);
        }
    } else if constexpr (VECS > 1) {
        outerTileVecs<TB, TC, ROWS, VECS - 1>(g, m, n, vecs, last);
    }
}

template <class TB, class TC, size_t ROWS>
inline void outerTileAny(const GemmBlock &g, size_t m, size_t n, size_t rows, size_t vecs, size_t last) {
    if (rows == ROWS) {
        outerTileVecs<TB, TC, ROWS, OUTER_VECS>(g, m, n, vecs, last);
    } else if constexpr (ROWS > 1) {
        outerTileAny<TB, TC, ROWS - 1>(g, m, n, rows, vecs, last);
    }
}

template <class TB, class TC>
void gemmOuter(const GemmBlock &g) {
    constexpr size_t WIDTH = OUTER_VECS * LANES;
    for (size_t n = g.n0; n < g.n1; n += WIDTH) {
        const size_t width = minOf(WIDTH, g.n1 - n);
        const size_t vecs = (width + LANES - 1) / LANES;
        const size_t last = width - (vecs - 1) * LANES;
        for (size_t m = g.m0; m < g.m1; m += OUTER_ROWS) {
            outerTileAny<TB, TC, OUTER_ROWS>(g, m, n, minOf(OUTER_ROWS, g.m1 - m), vecs, last);
        }
    }
}

} // namespace
} // namespace infinicpu

#endif // INFINICPU_KERNELS_GEMM_KERNELS_H_

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

// A k piece of a tile of sums: row i of the left operand is at a + i * a_row, its step s at + s * a_step; column j of the
// right operand is at b + j * b_col. FIRST starts the sums at 0, else they continue from `kept`; LAST adds up the lanes,
// out[i * DOT_COLS + j], else the sums go to `kept`. So cutting k into pieces changes nothing in the result.
template <class Product, size_t ROWS, size_t COLS, bool FIRST, bool LAST>
__attribute__((noinline)) void dotTile(size_t k, const typename Product::A *a, ptrdiff_t a_row, ptrdiff_t a_step, const typename Product::B *b, ptrdiff_t b_col, Vec *kept, float *out) {
    using Operand = typename Product::Operand;
    Vec sums[ROWS][COLS];
    unrolled<ROWS * COLS>([&](auto ij) {
        constexpr size_t I = decltype(ij)::value / COLS, J = decltype(ij)::value % COLS;
        sums[I][J] = FIRST ? vzero() : kept[I * DOT_COLS + J];
    });
    const auto step = [&](auto load, size_t p) __attribute__((always_inline)) {
        Operand left[ROWS];
        unrolled<ROWS>([&](auto i) { left[i.value] = load(a + ptrdiff_t(i.value) * a_row); });
        unrolled<COLS>([&](auto j) {
            const Operand right = load(b + ptrdiff_t(j.value) * b_col + p);
            unrolled<ROWS>([&](auto i) { sums[i.value][j.value] = Product::multiplyAdd(left[i.value], right, sums[i.value][j.value]); });
        });
    };
    size_t p = 0;
    for (; p + Product::STEP <= k; p += Product::STEP, a += a_step) {
        step([](const auto *from) { return Product::load(from); }, p);
    }
    if (LAST && p < k) {
        step([n = k - p](const auto *from) { return Product::loadPart(from, n); }, p);
    }
    unrolled<ROWS * COLS>([&](auto ij) {
        constexpr size_t I = decltype(ij)::value / COLS, J = decltype(ij)::value % COLS;
        if (LAST) {
            out[I * DOT_COLS + J] = vsum(sums[I][J]);
        } else {
            kept[I * DOT_COLS + J] = sums[I][J];
        }
    });
}

// All of k at once, for any number of columns, then of rows.
template <class Product, size_t ROWS, size_t COLS>
inline void dotTileCols(size_t cols, size_t k, const typename Product::A *a, ptrdiff_t a_row, const typename Product::B *b, ptrdiff_t b_col, float *out) {
    if (cols == COLS) {
        dotTile<Product, ROWS, COLS, true, true>(k, a, a_row, ptrdiff_t(Product::STEP), b, b_col, nullptr, out);
    } else if constexpr (COLS > 1) {
        dotTileCols<Product, ROWS, COLS - 1>(cols, k, a, a_row, b, b_col, out);
    }
}

template <class Product, size_t ROWS>
inline void dotTileRows(size_t rows, size_t cols, size_t k, const typename Product::A *a, ptrdiff_t a_row, const typename Product::B *b, ptrdiff_t b_col, float *out) {
    if (rows == ROWS) {
        dotTileCols<Product, ROWS, DOT_COLS>(cols, k, a, a_row, b, b_col, out);
    } else if constexpr (ROWS > 1) {
        dotTileRows<Product, ROWS - 1>(rows, cols, k, a, a_row, b, b_col, out);
    }
}

// c = alpha * sum + beta * c, rounded once; beta == 0 does not read c.
template <class T>
inline void storeElement(T *c, float sum, float alpha, float beta) {
    const float value = alpha * sum;
    *c = fromFloat<T>(beta == 0.0f ? value : value + beta * toFloat(*c));
}

template <class TC>
inline void storeTile(const GemmBlock &g, size_t m, size_t n, size_t rows, size_t cols, const float *tile) {
    TC *c = static_cast<TC *>(g.c) + ptrdiff_t(m) * g.c_row + ptrdiff_t(n) * g.c_col;
    for (size_t i = 0; i < rows; ++i) {
        for (size_t j = 0; j < cols; ++j) {
            storeElement(c + ptrdiff_t(i) * g.c_row + ptrdiff_t(j) * g.c_col, tile[i * DOT_COLS + j], g.alpha, g.beta);
        }
    }
}

// A k piece of DOT_ROWS rows of A, copied step by step, and the sums of DOT_WIDTH columns, stay in the first-level cache
// while B's columns pass by from the second level.
constexpr size_t DOT_PIECE_BYTES = 2048;
constexpr size_t DOT_WIDTH = 8 * DOT_COLS;

// DOT_ROWS rows from m, `tiles` whole tiles of columns from n, k in pieces. Copying the rows also frees them from their
// stride: rows a power of two apart would all fall into the same few places of the cache.
template <class Product, class TC>
void dotPanel(const GemmBlock &g, size_t m, size_t n, size_t tiles) {
    using A = typename Product::A;
    constexpr size_t STEP = Product::STEP;
    constexpr size_t PIECE = DOT_PIECE_BYTES / sizeof(A) / STEP * STEP;
    constexpr ptrdiff_t A_STEP = DOT_ROWS * STEP;
    const A *a = static_cast<const A *>(g.a) + ptrdiff_t(m) * g.a_row;
    const auto *b = static_cast<const typename Product::B *>(g.b) + ptrdiff_t(n) * g.b_col;
    alignas(64) A packed[DOT_ROWS * PIECE];
    Vec kept[DOT_ROWS * DOT_WIDTH];
    float tile[DOT_ROWS * DOT_COLS];
    for (size_t k0 = 0; k0 < g.k; k0 += PIECE) {
        const size_t length = minOf(PIECE, g.k - k0);
        const bool first = k0 == 0, last = k0 + PIECE >= g.k;
        for (size_t i = 0; i < DOT_ROWS; ++i) {
            const A *from = a + ptrdiff_t(i) * g.a_row + k0;
            A *to = packed + i * STEP;
            size_t p = 0;
            for (; p + STEP <= length; p += STEP) {
                std::memcpy(to + p * DOT_ROWS, from + p, STEP * sizeof(A)); // of constant size: one vector
            }
            if (p < length) {
                std::memcpy(to + p * DOT_ROWS, from + p, (length - p) * sizeof(A));
            }
        }
        const auto run = first ? (last ? dotTile<Product, DOT_ROWS, DOT_COLS, true, true> : dotTile<Product, DOT_ROWS, DOT_COLS, true, false>)
                               : (last ? dotTile<Product, DOT_ROWS, DOT_COLS, false, true> : dotTile<Product, DOT_ROWS, DOT_COLS, false, false>);
        for (size_t t = 0; t < tiles; ++t) {
            run(length, packed, STEP, A_STEP, b + ptrdiff_t(t * DOT_COLS) * g.b_col + k0, g.b_col, kept + t * DOT_ROWS * DOT_COLS, tile);
            if (last) {
                storeTile<TC>(g, m, n + t * DOT_COLS, DOT_ROWS, DOT_COLS, tile);
            }
        }
    }
}

template <class Product, class TC>
void gemmDot(const GemmBlock &g) {
    const auto *a = static_cast<const typename Product::A *>(g.a);
    const auto *b = static_cast<const typename Product::B *>(g.b);
    size_t panel_rows = g.m0, panel_cols = g.n0; // what panels have done
    // A b that is converted on the fly has few rows to serve; with many, the operator converts it first.
    if constexpr (sizeof(typename Product::A) == sizeof(typename Product::B)) {
        if (g.m1 - g.m0 > DOT_ROWS && g.n1 - g.n0 >= DOT_COLS && g.k != 0) {
            panel_rows += (g.m1 - g.m0) / DOT_ROWS * DOT_ROWS;
            panel_cols += (g.n1 - g.n0) / DOT_COLS * DOT_COLS;
            for (size_t m = g.m0; m < panel_rows; m += DOT_ROWS) {
                for (size_t n = g.n0; n < panel_cols; n += DOT_WIDTH) {
                    dotPanel<Product, TC>(g, m, n, minOf(DOT_WIDTH, panel_cols - n) / DOT_COLS);
                }
            }
        }
    }
    // Few rows, or the last rows and columns: B is read once, in order.
    float tile[DOT_ROWS * DOT_COLS];
    for (size_t m = g.m0; m < g.m1; m += DOT_ROWS) {
        const size_t rows = minOf(DOT_ROWS, g.m1 - m);
        for (size_t n = m < panel_rows ? panel_cols : g.n0; n < g.n1; n += DOT_COLS) {
            const size_t cols = minOf(DOT_COLS, g.n1 - n);
            dotTileRows<Product, DOT_ROWS>(rows, cols, g.k, a + ptrdiff_t(m) * g.a_row, g.a_row, b + ptrdiff_t(n) * g.b_col, g.b_col, tile);
            storeTile<TC>(g, m, n, rows, cols, tile);
        }
    }
}

// out[i * OUTER_VECS * LANES + j] = sum over k of ROWS rows of A times VECS vectors of columns. With TAIL there is one
// vector, of which only the first `lanes` lanes exist. (No inlining, here and above: once per operand types is enough.)
template <class TB, size_t ROWS, size_t VECS, bool TAIL>
__attribute__((noinline)) void outerTile(size_t k, const float *a, ptrdiff_t a_row, ptrdiff_t a_col, const TB *b, ptrdiff_t b_row, size_t lanes, float *out) {
    static_assert(!TAIL || VECS == 1);
    Vec totals[ROWS][VECS];
    unrolled<ROWS>([&](auto i) { unrolled<VECS>([&](auto j) { totals[i.value][j.value] = vzero(); }); });
    for (size_t k0 = 0; k0 < k; k0 += K_PIECE) {
        const size_t k1 = minOf(k, k0 + K_PIECE);
        Vec sums[ROWS][VECS];
        unrolled<ROWS>([&](auto i) { unrolled<VECS>([&](auto j) { sums[i.value][j.value] = vzero(); }); });
        for (size_t p = k0; p < k1; ++p) {
            const TB *row = b + ptrdiff_t(p) * b_row;
            Vec right[VECS];
            unrolled<VECS>([&](auto j) { right[j.value] = TAIL ? vloadPart(row, lanes) : vload(row + j.value * LANES); });
            unrolled<ROWS>([&](auto i) {
                const Vec left = vset(a[ptrdiff_t(i.value) * a_row + ptrdiff_t(p) * a_col]);
                unrolled<VECS>([&](auto j) { sums[i.value][j.value] = vfma(left, right[j.value], sums[i.value][j.value]); });
            });
        }
        unrolled<ROWS>([&](auto i) { unrolled<VECS>([&](auto j) { totals[i.value][j.value] = vadd(totals[i.value][j.value], sums[i.value][j.value]); }); });
    }
    unrolled<ROWS>([&](auto i) { unrolled<VECS>([&](auto j) { vstore(out + (i.value * OUTER_VECS + j.value) * LANES, totals[i.value][j.value]); }); });
}

template <class TB, size_t VECS, bool TAIL, size_t ROWS = OUTER_ROWS>
inline void outerTileRows(size_t rows, size_t k, const float *a, ptrdiff_t a_row, ptrdiff_t a_col, const TB *b, ptrdiff_t b_row, size_t lanes, float *out) {
    if (rows == ROWS) {
        outerTile<TB, ROWS, VECS, TAIL>(k, a, a_row, a_col, b, b_row, lanes, out);
    } else if constexpr (ROWS > 1) {
        outerTileRows<TB, VECS, TAIL, ROWS - 1>(rows, k, a, a_row, a_col, b, b_row, lanes, out);
    }
}

template <class TB, class TC>
void gemmOuter(const GemmBlock &g) {
    constexpr size_t WIDTH = OUTER_VECS * LANES;
    float tile[OUTER_ROWS * WIDTH];
    for (size_t n = g.n0; n < g.n1;) {
        const size_t left = g.n1 - n;
        const size_t width = left >= WIDTH ? WIDTH : minOf(LANES, left);
        const TB *b = static_cast<const TB *>(g.b) + n;
        for (size_t m = g.m0; m < g.m1; m += OUTER_ROWS) {
            const size_t rows = minOf(OUTER_ROWS, g.m1 - m);
            const float *a = static_cast<const float *>(g.a) + ptrdiff_t(m) * g.a_row;
            if (width == WIDTH) {
                outerTileRows<TB, OUTER_VECS, false>(rows, g.k, a, g.a_row, g.a_col, b, g.b_row, LANES, tile);
            } else if (width == LANES) {
                outerTileRows<TB, 1, false>(rows, g.k, a, g.a_row, g.a_col, b, g.b_row, LANES, tile);
            } else {
                outerTileRows<TB, 1, true>(rows, g.k, a, g.a_row, g.a_col, b, g.b_row, width, tile);
            }
            for (size_t i = 0; i < rows; ++i) {
                TC *row = static_cast<TC *>(g.c) + ptrdiff_t(m + i) * g.c_row + ptrdiff_t(n) * g.c_col;
                const float *sums = tile + i * WIDTH;
                if (g.c_col == 1) {
                    for (size_t j = 0; j < width; j += LANES) {
                        const size_t lanes = minOf(LANES, width - j);
                        Vec value = vmul(vset(g.alpha), vload(sums + j));
                        if (g.beta != 0.0f) {
                            value = vfma(vset(g.beta), vloadUpTo(row + j, lanes), value);
                        }
                        vstoreUpTo(row + j, value, lanes);
                    }
                } else {
                    for (size_t j = 0; j < width; ++j) {
                        storeElement(row + ptrdiff_t(j) * g.c_col, sums[j], g.alpha, g.beta);
                    }
                }
            }
        }
        n += width;
    }
}

} // namespace
} // namespace infinicpu

#endif // INFINICPU_KERNELS_GEMM_KERNELS_H_

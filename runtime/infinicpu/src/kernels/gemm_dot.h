#ifndef INFINICPU_KERNELS_GEMM_DOT_H_
#define INFINICPU_KERNELS_GEMM_DOT_H_

#include "simd.h"

// Products with a B that is contiguous along K: a weight stored [N, K]. Lanes run along K, one chain of sums per lane from
// the first k to the last, then the lanes are added in a fixed tree: the bits of an element depend on its row of A and its
// column of B only, whatever the number of rows, the tile that it falls into, or the pieces that k is cut into.
//
// A comes packed in tiles of DOT_ROWS rows: [tile][step][row][STEP], the last step filled up with zeros (one row alone
// needs no packing: it is its own tile). B is used in place while few rows share it; with many, panels of it are packed too.

namespace infinicpu {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr size_t DOT_ROWS = 4, DOT_COLS = 6; // 24 sums of 32 registers
#elif defined(__AVX2__)
constexpr size_t DOT_ROWS = 3, DOT_COLS = 4;
#else
constexpr size_t DOT_ROWS = 2, DOT_COLS = 4;
#endif

// f32 lanes, converted from the storage types.
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

// The product that serves once B is packed: of A's type on both sides.
template <class Product>
struct PackedProduct {
    using Type = Product;
};
template <class TB>
struct PackedProduct<FloatProduct<float, TB>> {
    using Type = FloatProduct<float, float>;
};

constexpr size_t roundUp(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// n <= STEP elements, converted if the types differ.
template <size_t STEP, class To, class From>
inline void copyStep(To *to, const From *from, size_t n) {
    if constexpr (sizeof(To) == sizeof(From)) {
        if (n == STEP) {
            std::memcpy(to, from, STEP * sizeof(To)); // of constant size: vectors
        } else {
            std::memcpy(to, from, n * sizeof(To));
        }
    } else {
        static_assert(STEP == LANES);
        vstoreUpTo(to, vloadUpTo(from, n), n);
    }
}

// `rows` <= HEIGHT rows of k elements each, row i at rowAt(i), to [step][HEIGHT][STEP]; missing rows and elements are zeros.
template <class Product, size_t HEIGHT, class RowAt>
inline void packTile(const RowAt &rowAt, ptrdiff_t stride, size_t rows, size_t k, typename Product::A *to) {
    using To = typename Product::A;
    constexpr size_t STEP = Product::STEP;
    const size_t length = roundUp(k, STEP);
    if (rows < HEIGHT || k < length) {
        std::memset(static_cast<void *>(to), 0, HEIGHT * length * sizeof(To));
    }
    for (size_t i = 0; i < rows; ++i) {
        const auto *row = rowAt(i);
        To *out = to + i * STEP;
        for (size_t p = 0; p < k; p += STEP, out += HEIGHT * STEP) {
            const size_t n = minOf(STEP, k - p);
            if (stride == 1) {
                copyStep<STEP>(out, row + p, n);
                continue;
            }
            for (size_t e = 0; e < n; ++e) {
                if constexpr (sizeof(To) == sizeof(*row)) {
                    out[e] = row[ptrdiff_t(p + e) * stride];
                } else {
                    out[e] = toFloat(row[ptrdiff_t(p + e) * stride]);
                }
            }
        }
    }
}

// One tile of A, see DotKernel. `single`: a matrix of one row.
template <class Product, class From>
void packDotRows(const void *a, ptrdiff_t a_row, ptrdiff_t a_col, size_t rows, size_t k, bool single, void *packed) {
    auto *to = static_cast<typename Product::A *>(packed);
    const auto rowAt = [&](size_t i) { return static_cast<const From *>(a) + ptrdiff_t(i) * a_row; };
    if (single) {
        packTile<Product, 1>(rowAt, a_col, 1, k, to);
    } else {
        packTile<Product, DOT_ROWS>(rowAt, a_col, rows, k, to);
    }
}

// How far in front of a stream memory is asked for: bytes, some hundred nanoseconds at the speed of one core.
constexpr ptrdiff_t STREAM_AHEAD = 1024;

// Columns at once: enough chains of sums to be faster than memory, and few enough streams for the prefetchers.
constexpr size_t STREAM_COLS = 4;

// A few columns of all of k, see dotStream.
template <class Product, size_t ROWS, size_t COLS>
inline __attribute__((always_inline)) void streamColumns(size_t k, const typename Product::A *a, ptrdiff_t a_step, const typename Product::B *b, ptrdiff_t b_col, Vec *kept, size_t pitch) {
    constexpr size_t STEP = Product::STEP;
    Vec sums[ROWS][COLS];
    unrolled<ROWS>([&](auto i) { unrolled<COLS>([&](auto j) { sums[i.value][j.value] = vzero(); }); });
    const auto step = [&](auto load, size_t p) __attribute__((always_inline)) {
        typename Product::Operand right[COLS];
        unrolled<COLS>([&](auto j) { right[j.value] = load(b + ptrdiff_t(j.value) * b_col + p); });
        unrolled<ROWS>([&](auto i) {
            const auto left = load(a + i.value * STEP);
            unrolled<COLS>([&](auto j) { sums[i.value][j.value] = Product::multiplyAdd(left, right[j.value], sums[i.value][j.value]); });
        });
    };
    size_t p = 0;
#pragma GCC unroll 4
    for (; p + STEP <= k; p += STEP, a += a_step) {
        unrolled<COLS>([&](auto j) { __builtin_prefetch(reinterpret_cast<const char *>(b + ptrdiff_t(j.value) * b_col + p) + STREAM_AHEAD); });
        step([](const auto *from) { return Product::load(from); }, p);
    }
    if (p < k) {
        step([n = k - p](const auto *from) { return Product::loadPart(from, n); }, p);
    }
    unrolled<ROWS>([&](auto i) { unrolled<COLS>([&](auto j) { kept[i.value * pitch + j.value] = sums[i.value][j.value]; }); });
}

// Few rows: a few columns after the other. kept[i * pitch + j] gets the sums of row i and column j.
template <class Product, size_t ROWS>
__attribute__((noinline)) void dotStream(size_t cols, size_t k, const typename Product::A *a, ptrdiff_t a_step, const typename Product::B *b, ptrdiff_t b_col, Vec *kept, size_t pitch) {
    size_t j = 0;
    for (; j + STREAM_COLS <= cols; j += STREAM_COLS) {
        streamColumns<Product, ROWS, STREAM_COLS>(k, a, a_step, b + ptrdiff_t(j) * b_col, b_col, kept + j, pitch);
    }
    for (; j < cols; ++j) {
        streamColumns<Product, ROWS, 1>(k, a, a_step, b + ptrdiff_t(j) * b_col, b_col, kept + j, pitch);
    }
}

// A tile of ROWS x DOT_COLS sums over a piece of k, which start at 0 (`first`) or continue from `kept`, as above. PACKED:
// b is [step][DOT_COLS][STEP], and k is a multiple of STEP. LINES cache lines from `ahead` on are asked for per step.
template <class Product, size_t ROWS, bool PACKED, size_t LINES>
__attribute__((noinline)) void dotTile(size_t k, bool first, const typename Product::A *a, const typename Product::B *b, ptrdiff_t b_col, const char *ahead, Vec *kept, size_t pitch) {
    using Operand = typename Product::Operand;
    constexpr size_t STEP = Product::STEP;
    const ptrdiff_t col = PACKED ? ptrdiff_t(STEP) : b_col;
    Vec sums[ROWS][DOT_COLS];
    unrolled<ROWS * DOT_COLS>([&](auto ij) {
        constexpr size_t I = decltype(ij)::value / DOT_COLS, J = decltype(ij)::value % DOT_COLS;
        sums[I][J] = first ? vzero() : kept[I * pitch + J];
    });
    const auto step = [&](auto load) __attribute__((always_inline)) {
        Operand left[ROWS];
        unrolled<ROWS>([&](auto i) { left[i.value] = load(a + i.value * STEP); });
        unrolled<DOT_COLS>([&](auto j) {
            const Operand right = load(b + ptrdiff_t(j.value) * col);
            unrolled<ROWS>([&](auto i) { sums[i.value][j.value] = Product::multiplyAdd(left[i.value], right, sums[i.value][j.value]); });
        });
    };
    for (; k >= STEP; k -= STEP) {
        unrolled<LINES>([&](auto line) { __builtin_prefetch(ahead + line.value * 64, 0, 2); });
        ahead += LINES * 64;
        step([](const auto *from) { return Product::load(from); });
        a += DOT_ROWS * STEP;
        b += PACKED ? DOT_COLS * STEP : STEP;
    }
    if (!PACKED && k != 0) {
        step([k](const auto *from) { return Product::loadPart(from, k); });
    }
    unrolled<ROWS * DOT_COLS>([&](auto ij) {
        constexpr size_t I = decltype(ij)::value / DOT_COLS, J = decltype(ij)::value % DOT_COLS;
        kept[I * pitch + J] = sums[I][J];
    });
}

template <class Product, size_t ROWS = DOT_ROWS>
inline auto streamOf(size_t rows) {
    if constexpr (ROWS > 1) {
        return rows == ROWS ? dotStream<Product, ROWS> : streamOf<Product, ROWS - 1>(rows);
    } else {
        return dotStream<Product, 1>;
    }
}
template <class Product, bool PACKED, size_t LINES, size_t ROWS = DOT_ROWS>
inline auto tileOf(size_t rows) {
    if constexpr (ROWS > 1) {
        return rows == ROWS ? dotTile<Product, ROWS, PACKED, LINES> : tileOf<Product, PACKED, LINES, ROWS - 1>(rows);
    } else {
        return dotTile<Product, 1, PACKED, LINES>;
    }
}

// out[j] = the sum of the lanes of kept[j], j < n. Reads and writes up to the next multiple of LANES: sumsRoom(n).
constexpr size_t sumsRoom(size_t n) { return roundUp(n, LANES); }
inline void addLanes(size_t n, const Vec *kept, float *out) {
    for (size_t j = 0; j < n; j += LANES) {
        vstore(out + j, vsumAll(kept + j));
    }
}

// c = alpha * sum + beta * c of `cols` elements in a row, rounded once; beta == 0 does not read c.
template <class TC>
inline void storeSums(const GemmBlock &g, size_t m, size_t n, size_t cols, const float *sums) {
    TC *c = static_cast<TC *>(g.c) + ptrdiff_t(m) * g.c_row + ptrdiff_t(n);
    for (size_t j = 0; j < cols; j += LANES) {
        const size_t count = minOf(LANES, cols - j);
        Vec value = vmul(vset(g.alpha), vloadUpTo(sums + j, count));
        if (g.beta != 0.0f) {
            value = vfma(vset(g.beta), vloadUpTo(c + j, count), value);
        }
        vstoreUpTo(c + j, value, count);
    }
}

template <class Product, class TC>
void gemmDotStream(const GemmBlock &g, size_t m, size_t rows, size_t n0) {
    constexpr size_t WIDTH = LANES;
    Vec kept[DOT_ROWS * WIDTH];
    const auto *a = static_cast<const typename Product::A *>(g.a) + m * roundUp(g.k, Product::STEP);
    const auto stream = streamOf<Product>(rows);
    for (size_t n = n0; n < g.n1; n += WIDTH) {
        const size_t cols = minOf(WIDTH, g.n1 - n);
        const auto *b = static_cast<const typename Product::B *>(g.b) + ptrdiff_t(n) * g.b_col;
        stream(cols, g.k, a, ptrdiff_t((g.single ? 1 : DOT_ROWS) * Product::STEP), b, g.b_col, kept, WIDTH);
        float sums[WIDTH];
        for (size_t i = 0; i < rows; ++i) {
            addLanes(cols, kept + i * WIDTH, sums);
            storeSums<TC>(g, m + i, n, cols, sums);
        }
    }
}

// Up to this many rows, a few columns at once are faster than a tile of them, unless they have to be converted.
constexpr size_t STREAM_ROWS_MAX = 2;
// From this many rows on, packing B costs less than reading it in place.
constexpr size_t DOT_PACK_ROWS = 32;
constexpr size_t DOT_CONVERT_ROWS = 12; // ... where that also converts the elements
// A tile's piece of A and B's piece of as many columns as a tile has stay in the first-level cache.
constexpr size_t DOT_PIECE_BYTES = 2048;
// A packed panel of B stays in the second-level cache, beside the next one that is on its way there.
constexpr size_t DOT_PANEL_BYTES = 320 << 10;
constexpr size_t DOT_PANEL_GROUPS = 8; // at most, of DOT_COLS columns

template <class Product>
constexpr size_t DOT_PIECE = DOT_PIECE_BYTES / sizeof(typename Product::A) / Product::STEP * Product::STEP;

template <class Product>
inline size_t panelGroups(size_t k) {
    const size_t group = DOT_COLS * roundUp(k, Product::STEP) * sizeof(typename Product::A);
    return minOf(DOT_PANEL_GROUPS, maxOf(size_t(1), DOT_PANEL_BYTES / maxOf(size_t(1), group)));
}

// More than one tile of rows, but few: a group of columns is read from memory while the one before it is multiplied.
template <class Product, class TC>
void gemmDotGroups(const GemmBlock &g) {
    // Cache lines of the next group of columns to ask for per step: all in one pass over the rows, or in each of two.
    constexpr size_t STEP = Product::STEP, STEP_BYTES = DOT_COLS * STEP * sizeof(typename Product::B);
    constexpr size_t LINES = (STEP_BYTES + 63) / 64, HALF = (STEP_BYTES + 127) / 128;
    const bool one_pass = g.m1 - g.m0 <= DOT_ROWS;
    const size_t length = roundUp(g.k, Product::STEP);
    Vec kept[sumsRoom(DOT_PACK_ROWS * DOT_COLS)];
    float sums[sumsRoom(DOT_PACK_ROWS * DOT_COLS)];
    size_t n = g.n0;
    for (; n + DOT_COLS <= g.n1; n += DOT_COLS) {
        const auto *b = static_cast<const typename Product::B *>(g.b) + ptrdiff_t(n) * g.b_col;
        for (size_t k0 = 0; k0 < g.k; k0 += DOT_PIECE<Product>) {
            const size_t piece = minOf(DOT_PIECE<Product>, g.k - k0);
            for (size_t m = g.m0; m < g.m1; m += DOT_ROWS) {
                const size_t rows = minOf(DOT_ROWS, g.m1 - m);
                const auto *a = static_cast<const typename Product::A *>(g.a) + m * length + k0 * DOT_ROWS;
                // Consecutive columns are consecutive memory, usually: then this is exactly the next group.
                const size_t pass = (m - g.m0) / DOT_ROWS;
                const size_t lines = one_pass ? k0 / STEP * LINES : (2 * k0 + pass * piece) / STEP * HALF;
                const char *ahead = reinterpret_cast<const char *>(b + DOT_COLS * g.b_col) + lines * 64;
                const auto tile = one_pass ? tileOf<Product, false, LINES>(rows) : (pass < 2 ? tileOf<Product, false, HALF>(rows) : tileOf<Product, false, 0>(rows));
                tile(piece, k0 == 0, a, b + k0, g.b_col, ahead, kept + (m - g.m0) * DOT_COLS, DOT_COLS);
            }
        }
        addLanes((g.m1 - g.m0) * DOT_COLS, kept, sums);
        for (size_t m = g.m0; m < g.m1; ++m) {
            storeSums<TC>(g, m, n, DOT_COLS, sums + (m - g.m0) * DOT_COLS);
        }
    }
    for (size_t m = g.m0; n < g.n1 && m < g.m1; m += DOT_ROWS) {
        gemmDotStream<Product, TC>(g, m, minOf(DOT_ROWS, g.m1 - m), n);
    }
}

// Many rows: a panel of B is packed, all rows of A pass by, and what comes after the panel is asked for meanwhile.
template <class Product, class TC>
void gemmDotPanels(const GemmBlock &g) {
    using Packed = typename PackedProduct<Product>::Type;
    using B = typename Product::B;
    constexpr size_t WIDTH = sumsRoom(DOT_PANEL_GROUPS * DOT_COLS);
    constexpr size_t LINES = 2;
    const size_t length = roundUp(g.k, Packed::STEP);
    const size_t width = panelGroups<Packed>(g.k) * DOT_COLS;
    auto *packed = static_cast<typename Packed::A *>(g.scratch);
    Vec kept[DOT_ROWS * WIDTH];
    float sums[WIDTH];
    for (size_t n = g.n0; n < g.n1; n += width) {
        const size_t cols = minOf(width, g.n1 - n);
        const size_t groups = (cols + DOT_COLS - 1) / DOT_COLS;
        const B *b = static_cast<const B *>(g.b) + ptrdiff_t(n) * g.b_col;
        for (size_t t = 0; t < groups; ++t) {
            const auto columnAt = [&](size_t j) { return b + ptrdiff_t(t * DOT_COLS + j) * g.b_col; };
            packTile<Packed, DOT_COLS>(columnAt, 1, minOf(DOT_COLS, cols - t * DOT_COLS), g.k, packed + t * DOT_COLS * length);
        }
        const char *ahead = reinterpret_cast<const char *>(b + ptrdiff_t(g.columns_ahead) * g.b_col);
        const char *const ahead_end = ahead + cols * g.k * sizeof(B);
        for (size_t m = g.m0; m < g.m1; m += DOT_ROWS) {
            const size_t rows = minOf(DOT_ROWS, g.m1 - m);
            const auto tile = tileOf<Packed, true, LINES>(rows);
            const auto *a = static_cast<const typename Packed::A *>(g.a) + m * length;
            for (size_t k0 = 0; k0 < length; k0 += DOT_PIECE<Packed>) {
                const size_t piece = minOf(DOT_PIECE<Packed>, length - k0);
                const auto *left = a + k0 * DOT_ROWS;
                // A's next piece first, then some of B's next panel.
                const char *next = reinterpret_cast<const char *>(left + piece * DOT_ROWS);
                const char *const next_end = next + piece * DOT_ROWS * sizeof(*left);
                const size_t bytes = piece / Packed::STEP * LINES * 64; // that one call asks for
                for (size_t t = 0; t < groups; ++t) {
                    const char *&cursor = next < next_end || ahead >= ahead_end ? next : ahead;
                    tile(piece, k0 == 0, left, packed + (t * length + k0) * DOT_COLS, 0, cursor, kept + t * DOT_COLS, WIDTH);
                    cursor += bytes;
                }
            }
            for (size_t i = 0; i < rows; ++i) {
                addLanes(cols, kept + i * WIDTH, sums);
                storeSums<TC>(g, m + i, n, cols, sums);
            }
        }
    }
}

template <class Product>
size_t dotScratchBytes(size_t k) {
    using Packed = typename PackedProduct<Product>::Type;
    return panelGroups<Packed>(k) * DOT_COLS * roundUp(k, Packed::STEP) * sizeof(typename Packed::A);
}

template <class Product>
size_t dotPanelColumns(size_t k) {
    return panelGroups<typename PackedProduct<Product>::Type>(k) * DOT_COLS;
}

template <class Product, class TC>
void gemmDot(const GemmBlock &g) {
    const size_t rows = g.m1 - g.m0;
    constexpr bool SAME = sizeof(typename Product::A) == sizeof(typename Product::B);
    if (rows <= (SAME ? STREAM_ROWS_MAX : 0) || g.k == 0) {
        for (size_t m = g.m0; m < g.m1; m += DOT_ROWS) {
            gemmDotStream<Product, TC>(g, m, minOf(DOT_ROWS, g.m1 - m), g.n0);
        }
    } else if (rows < (SAME ? DOT_PACK_ROWS : DOT_CONVERT_ROWS)) {
        gemmDotGroups<Product, TC>(g);
    } else {
        gemmDotPanels<Product, TC>(g);
    }
}

} // namespace
} // namespace infinicpu

#endif // INFINICPU_KERNELS_GEMM_DOT_H_

#ifndef INFINICPU_KERNELS_GEMM_KERNELS_H_
#define INFINICPU_KERNELS_GEMM_KERNELS_H_

#include "simd.h"

// Products with a B that is contiguous along N (one that is contiguous along K: gemm_dot.h). Lanes run along N, K is summed
// in pieces of K_PIECE. An element's sum depends on its row of A and its column of B only, never on the tile it falls into.

namespace infinicpu {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr size_t OUTER_ROWS = 6, OUTER_VECS = 4;
#elif defined(__AVX2__)
constexpr size_t OUTER_ROWS = 6, OUTER_VECS = 2;
#else
constexpr size_t OUTER_ROWS = 4, OUTER_VECS = 2;
#endif

constexpr size_t K_PIECE = 256;

// c = alpha * sum + beta * c, rounded once; beta == 0 does not read c.
template <class T>
inline void storeElement(T *c, float sum, float alpha, float beta) {
    const float value = alpha * sum;
    *c = fromFloat<T>(beta == 0.0f ? value : value + beta * toFloat(*c));
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

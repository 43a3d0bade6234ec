#ifndef INFINICPU_KERNELS_ATTENTION_KERNELS_H_
#define INFINICPU_KERNELS_ATTENTION_KERNELS_H_

#include "gemm_dot.h"
#include "gemm_kernels.h"
#include "row_kernels.h"

#include <infinicore.h>

// Attention by tiles of ATTENTION_KV_TILE positions with a running maximum and sum ("online softmax"): scores for a
// few query rows exist for one tile at a time. Tiles start at multiples of the tile length, in prefill and in decode,
// whatever a token is batched with. The rounding of a token's result may still follow its batch: paged decode cuts long
// sequences into parts of whole tiles when there are too few of them for all threads, as many as the number of sequences,
// the width of the block table and the number of threads ask for, and merges the parts' sums at the end.

namespace infinicpu {
namespace {

inline int64_t blockAt(const AttentionTask &t, size_t i) {
    if (t.block_table == nullptr) {
        return int64_t(i);
    }
    switch (t.block_table_dtype) {
    case INFINI_DTYPE_I32:
        return static_cast<const int32_t *>(t.block_table)[i];
    case INFINI_DTYPE_U32:
        return static_cast<const uint32_t *>(t.block_table)[i];
    default:
        return static_cast<const int64_t *>(t.block_table)[i];
    }
}

// A part of a buffer, each starting on a cache line.
inline float *takeScratch(char *&cursor, size_t floats) {
    float *part = reinterpret_cast<float *>(cursor);
    cursor += (floats * sizeof(float) + 63) / 64 * 64;
    return part;
}

// How q k^T is multiplied, in place and with a packed tile of k.
template <class T>
struct ScoreProduct {
    using Type = FloatProduct<float, T>;
};
#if defined(__AVX512BF16__)
template <>
struct ScoreProduct<BF16> {
    using Type = Bf16Product;
};
#endif

// Where the rows of one tile of k and v are.
template <class T>
struct KvTile {
    const T *k[ATTENTION_KV_TILE];
    const T *v[ATTENTION_KV_TILE];

    void locate(const AttentionTask &t, size_t from, size_t to) {
        for (size_t position = from; position < to;) {
            const size_t in_block = position % t.block_size;
            const size_t run = minOf(t.block_size - in_block, to - position);
            const ptrdiff_t block = ptrdiff_t(blockAt(t, position / t.block_size));
            const T *k_row = static_cast<const T *>(t.k) + block * t.k_block + ptrdiff_t(in_block) * t.k_row;
            const T *v_row = static_cast<const T *>(t.v) + block * t.v_block + ptrdiff_t(in_block) * t.v_row;
            for (size_t i = 0; i < run; ++i) {
                k[position - from + i] = k_row + ptrdiff_t(i) * t.k_row;
                v[position - from + i] = v_row + ptrdiff_t(i) * t.v_row;
            }
            position += run;
        }
    }
};

// Asks for a row of dim elements that is wanted a tile later.
template <class T>
inline void prefetchRow(const T *row, size_t dim) {
    for (size_t i = 0; i < dim; i += 64 / sizeof(T)) {
        __builtin_prefetch(row + i, 0, 2);
    }
}

// kept[r * LANES + j] = the lanes' sums of q[r] k[j], ROWS rows of a packed q and COLS rows of k read in place.
template <class Product, size_t ROWS, size_t COLS>
inline void scoreSums(size_t dim, const typename Product::A *q, const typename Product::B *const *k, Vec *kept) {
    using Operand = typename Product::Operand;
    Vec sums[ROWS][COLS];
    unrolled<ROWS>([&](auto r) { unrolled<COLS>([&](auto j) { sums[r.value][j.value] = vzero(); }); });
    const auto step = [&](auto load, size_t p) __attribute__((always_inline)) {
        Operand left[ROWS];
        unrolled<ROWS>([&](auto r) { left[r.value] = load(q + p * DOT_ROWS + r.value * Product::STEP); });
        unrolled<COLS>([&](auto j) {
            const Operand right = load(k[j.value] + p);
            unrolled<ROWS>([&](auto r) { sums[r.value][j.value] = Product::multiplyAdd(left[r.value], right, sums[r.value][j.value]); });
        });
    };
    size_t p = 0;
    for (; p + Product::STEP <= dim; p += Product::STEP) {
        step([](const auto *from) { return Product::load(from); }, p);
    }
    if (p < dim) {
        step([n = dim - p](const auto *from) { return Product::loadPart(from, n); }, p);
    }
    unrolled<ROWS>([&](auto r) { unrolled<COLS>([&](auto j) { kept[r.value * LANES + j.value] = sums[r.value][j.value]; }); });
}

// scores[r] = scale q k^T of up to DOT_ROWS rows, with k read in place; the next tile is asked for meanwhile.
template <class T, size_t ROWS = DOT_ROWS>
void scoresInPlace(const AttentionTask &t, size_t rows, size_t width, const typename ScoreProduct<T>::Type::A *q, const KvTile<T> &tile, const KvTile<T> &next, size_t next_width, float *scores) {
    using Product = typename ScoreProduct<T>::Type;
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            return scoresInPlace<T, ROWS - 1>(t, rows, width, q, tile, next, next_width, scores);
        }
    }
    constexpr size_t COLS = 4;
    Vec kept[ROWS * LANES];
    for (size_t i = 0; i < width; i += LANES) {
        const size_t n = minOf(LANES, width - i);
        for (size_t j = i; j < minOf(i + n, next_width); ++j) {
            prefetchRow(next.k[j], t.dim);
        }
        size_t j = 0;
        for (; j + COLS <= n; j += COLS) {
            scoreSums<Product, ROWS, COLS>(t.dim, q, tile.k + i + j, kept + j);
        }
        for (; j < n; ++j) {
            scoreSums<Product, ROWS, 1>(t.dim, q, tile.k + i + j, kept + j);
        }
        for (size_t r = 0; r < ROWS; ++r) {
            vstore(scores + r * ATTENTION_KV_TILE + i, vmul(vset(t.scale), vsumAll(kept + r * LANES)));
        }
    }
}

// sums[r] += weights[r] v for ROWS rows and VECS vectors of columns from `column` on, with v read in place. `lanes`: of a
// vector, below LANES only if VECS is 1.
template <class T, size_t ROWS, size_t VECS>
inline void addColumns(size_t width, const float *weights, const T *const *v, size_t column, size_t lanes, const KvTile<T> &next, size_t next_width, float *sums, size_t pitch) {
    Vec parts[ROWS][VECS];
    unrolled<ROWS>([&](auto r) { unrolled<VECS>([&](auto j) { parts[r.value][j.value] = vzero(); }); });
    for (size_t i = 0; i < width; ++i) {
        if (i < next_width) {
            prefetchRow(next.v[i] + column, VECS * lanes);
        }
        Vec right[VECS];
        unrolled<VECS>([&](auto j) { right[j.value] = VECS == 1 ? vloadUpTo(v[i] + column, lanes) : vload(v[i] + column + j.value * LANES); });
        unrolled<ROWS>([&](auto r) {
            const Vec weight = vset(weights[r.value * ATTENTION_KV_TILE + i]);
            unrolled<VECS>([&](auto j) { parts[r.value][j.value] = vfma(weight, right[j.value], parts[r.value][j.value]); });
        });
    }
    unrolled<ROWS>([&](auto r) {
        unrolled<VECS>([&](auto j) {
            float *sum = sums + r.value * pitch + column + j.value * LANES;
            const size_t n = VECS == 1 ? lanes : LANES;
            vstoreUpTo(sum, vadd(vloadUpTo(sum, n), parts[r.value][j.value]), n);
        });
    });
}

// sums += weights v of up to DOT_ROWS rows.
template <class T, size_t ROWS = DOT_ROWS>
void addValuesInPlace(const AttentionTask &t, size_t rows, size_t width, const float *weights, const KvTile<T> &tile, const KvTile<T> &next, size_t next_width, float *sums) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            return addValuesInPlace<T, ROWS - 1>(t, rows, width, weights, tile, next, next_width, sums);
        }
    }
    constexpr size_t VECS = LANES < 16 ? 2 : (ROWS <= 2 ? 8 : 4); // with the sums, no more than there are registers
    size_t column = 0;
    for (; column + VECS * LANES <= t.value_dim; column += VECS * LANES) {
        addColumns<T, ROWS, VECS>(width, weights, tile.v, column, LANES, next, next_width, sums, t.value_dim);
    }
    for (; column < t.value_dim; column += LANES) {
        addColumns<T, ROWS, 1>(width, weights, tile.v, column, minOf(LANES, t.value_dim - column), next, next_width, sums, t.value_dim);
    }
}

// The same for many rows, with k packed into `panel`.
template <class T>
void scoresPacked(const AttentionTask &t, size_t rows, size_t width, const typename ScoreProduct<T>::Type::A *q, const KvTile<T> &tile, float *panel, float *scores) {
    using Product = typename PackedProduct<typename ScoreProduct<T>::Type>::Type;
    using A = typename Product::A;
    constexpr size_t PITCH = sumsRoom((ATTENTION_KV_TILE + DOT_COLS - 1) / DOT_COLS * DOT_COLS);
    const size_t length = roundUp(t.dim, Product::STEP);
    const size_t groups = (width + DOT_COLS - 1) / DOT_COLS;
    A *packed = reinterpret_cast<A *>(panel);
    for (size_t g = 0; g < groups; ++g) {
        const auto rowAt = [&](size_t j) { return tile.k[g * DOT_COLS + j]; };
        packTile<Product, DOT_COLS>(rowAt, 1, minOf(DOT_COLS, width - g * DOT_COLS), t.dim, packed + g * DOT_COLS * length);
    }
    Vec kept[DOT_ROWS * PITCH];
    for (size_t r0 = 0; r0 < rows; r0 += DOT_ROWS) {
        const size_t count = minOf(DOT_ROWS, rows - r0);
        const auto multiply = tileOf<Product, true, 0>(count);
        for (size_t g = 0; g < groups; ++g) {
            multiply(length, true, q + r0 * length, packed + g * DOT_COLS * length, 0, nullptr, kept + g * DOT_COLS, PITCH);
        }
        for (size_t r = 0; r < count; ++r) {
            for (size_t i = 0; i < width; i += LANES) {
                vstore(scores + (r0 + r) * ATTENTION_KV_TILE + i, vmul(vset(t.scale), vsumAll(kept + r * PITCH + i)));
            }
        }
    }
}

// sums += weights v of many rows, with v converted into `panel`.
template <class T>
void addValuesConverted(const AttentionTask &t, size_t rows, size_t width, const float *weights, const KvTile<T> &tile, float *panel, float *sums) {
    for (size_t i = 0; i < width; ++i) {
        toF32Row<T>(t.value_dim, panel + i * t.value_dim, tile.v[i]);
    }
    GemmBlock g{};
    g.a = weights;
    g.a_row = ATTENTION_KV_TILE;
    g.a_col = 1;
    g.b = panel;
    g.b_row = ptrdiff_t(t.value_dim);
    g.b_col = 1;
    g.c = sums;
    g.c_row = ptrdiff_t(t.value_dim);
    g.c_col = 1;
    g.m1 = rows;
    g.n1 = t.value_dim;
    g.k = width;
    g.alpha = 1.0f;
    g.beta = 1.0f;
    gemmOuter<float, float>(g);
}

template <class T>
void attention(const AttentionTask &t) {
    using Product = typename ScoreProduct<T>::Type;
    const size_t rows = t.tokens * t.group;
    char *cursor = static_cast<char *>(t.scratch);
    auto *q = reinterpret_cast<typename Product::A *>(takeScratch(cursor, roundUp(rows, DOT_ROWS) * roundUp(t.dim, STEP_MAX)));
    float *sums = takeScratch(cursor, rows * t.value_dim);
    float *scores = takeScratch(cursor, rows * ATTENTION_KV_TILE);
    float *maxima = takeScratch(cursor, rows);
    float *totals = takeScratch(cursor, rows);
    float *panel = takeScratch(cursor, (ATTENTION_KV_TILE + DOT_COLS) * roundUp(maxOf(t.dim, t.value_dim), STEP_MAX));
    // In place while one pass over a tile of k and v serves all rows.
    const bool in_place = rows <= DOT_ROWS;

    const auto queryAt = [&](size_t r) { return static_cast<const T *>(t.q) + ptrdiff_t(r / t.group) * t.q_token + ptrdiff_t(r % t.group) * t.q_head; };
    for (size_t r = 0; r < rows; r += DOT_ROWS) {
        packTile<Product, DOT_ROWS>([&](size_t i) { return queryAt(r + i); }, 1, minOf(DOT_ROWS, rows - r), t.dim, q + r * roundUp(t.dim, Product::STEP));
    }
    for (size_t r = 0; r < rows; ++r) {
        for (size_t i = 0; i < t.value_dim; ++i) {
            sums[r * t.value_dim + i] = 0.0f;
        }
        maxima[r] = NEGATIVE_INFINITY;
        totals[r] = 0.0f;
    }

    // What the last token sees bounds what any token sees.
    const size_t end = minOf(t.kv_end, t.first_visible + t.tokens - 1);
    KvTile<T> tiles[2];
    size_t turn = 0;
    for (size_t tile = t.kv_begin / ATTENTION_KV_TILE * ATTENTION_KV_TILE; tile < end; tile += ATTENTION_KV_TILE, turn ^= 1) {
        const size_t from = maxOf(tile, t.kv_begin);
        const size_t to = minOf(tile + ATTENTION_KV_TILE, end);
        const size_t width = to - from;
        const size_t next_width = minOf(to + ATTENTION_KV_TILE, end) - to;
        if (from == t.kv_begin) {
            tiles[turn].locate(t, from, to);
        }
        tiles[turn ^ 1].locate(t, to, to + next_width);

        if (in_place) {
            scoresInPlace<T>(t, rows, width, q, tiles[turn], tiles[turn ^ 1], next_width, scores);
        } else {
            scoresPacked<T>(t, rows, width, q, tiles[turn], panel, scores);
        }

        // weights = exp(scores - maximum), and what came before is scaled to the new maximum
        for (size_t r = 0; r < rows; ++r) {
            float *row = scores + r * ATTENTION_KV_TILE;
            const size_t limit = minOf(t.kv_end, t.first_visible + r / t.group);
            const size_t visible = limit <= from ? 0 : minOf(limit - from, width);
            if (t.alibi_slopes != nullptr && visible != 0) {
                const float slope = t.alibi_slopes[r % t.group];
                const ptrdiff_t query = ptrdiff_t(t.first_visible + r / t.group) - 1;
                for (size_t i = 0; i < visible; ++i) {
                    row[i] += slope * float(ptrdiff_t(from + i) - query);
                }
            }
            float max = maxima[r];
            for (size_t i = 0; i < visible; ++i) {
                max = maxOf(max, row[i]);
            }
            // Scores of -infinity only: any finite shift gives weights of 0 instead of NaN.
            const float shift = max == NEGATIVE_INFINITY ? 0.0f : max;
            Vec part = vzero();
            for (size_t i = 0; i < visible; i += LANES) {
                const size_t n = minOf(LANES, visible - i);
                Vec weight = vexp(vsub(vload(row + i), vset(shift))); // the row has whole vectors of room
                if (n < LANES) {
                    float lanes[LANES];
                    vstore(lanes, weight);
                    weight = vloadPart(lanes, n);
                }
                vstore(row + i, weight);
                part = vadd(part, weight);
            }
            for (size_t i = (visible + LANES - 1) / LANES * LANES; i < width; ++i) {
                row[i] = 0.0f;
            }
            if (max > maxima[r] && maxima[r] != NEGATIVE_INFINITY) {
                float lanes[LANES];
                vstore(lanes, vexp(vset(maxima[r] - shift)));
                const float factor = lanes[0];
                totals[r] *= factor;
                float *sum = sums + r * t.value_dim;
                for (size_t i = 0; i < t.value_dim; i += LANES) {
                    vstoreUpTo(sum + i, vmul(vloadUpTo(sum + i, t.value_dim - i), vset(factor)), t.value_dim - i);
                }
            }
            maxima[r] = max;
            totals[r] += vsum(part);
        }

        if (in_place) {
            addValuesInPlace<T>(t, rows, width, scores, tiles[turn], tiles[turn ^ 1], next_width, sums);
        } else {
            addValuesConverted<T>(t, rows, width, scores, tiles[turn], panel, sums);
        }
    }

    for (size_t r = 0; r < rows; ++r) {
        const float *sum = sums + r * t.value_dim;
        if (t.partial != nullptr) {
            float *part = t.partial + r * (t.value_dim + 2);
            for (size_t i = 0; i < t.value_dim; ++i) {
                part[i] = sum[i];
            }
            part[t.value_dim] = maxima[r];
            part[t.value_dim + 1] = totals[r];
            continue;
        }
        // Nothing seen: zeros.
        const float scale = totals[r] == 0.0f ? 0.0f : 1.0f / totals[r];
        T *out = static_cast<T *>(t.out) + ptrdiff_t(r / t.group) * t.out_token + ptrdiff_t(r % t.group) * t.out_head;
        for (size_t i = 0; i < t.value_dim; i += LANES) {
            vstoreUpTo(out + i, vmul(vloadUpTo(sum + i, t.value_dim - i), vset(scale)), t.value_dim - i);
        }
    }
}

template <class T>
void attentionMerge(size_t parts, const float *partial, size_t stride, size_t value_dim, void *out) {
    float max = NEGATIVE_INFINITY;
    for (size_t p = 0; p < parts; ++p) {
        max = maxOf(max, partial[p * stride + value_dim]);
    }
    const float shift = max == NEGATIVE_INFINITY ? 0.0f : max;
    float total = 0.0f;
    for (size_t p = 0; p < parts; ++p) {
        float lanes[LANES];
        vstore(lanes, vexp(vset(partial[p * stride + value_dim] - shift)));
        total += lanes[0] * partial[p * stride + value_dim + 1];
    }
    const float scale = total == 0.0f ? 0.0f : 1.0f / total;
    for (size_t i = 0; i < value_dim; i += LANES) {
        Vec sum = vzero();
        for (size_t p = 0; p < parts; ++p) {
            const Vec factor = vexp(vset(partial[p * stride + value_dim] - shift));
            sum = vfma(factor, vloadUpTo(partial + p * stride + i, value_dim - i), sum);
        }
        vstoreUpTo(static_cast<T *>(out) + i, vmul(sum, vset(scale)), value_dim - i);
    }
}

} // namespace
} // namespace infinicpu

#endif // INFINICPU_KERNELS_ATTENTION_KERNELS_H_

#ifndef INFINICPU_KERNELS_ATTENTION_KERNELS_H_
#define INFINICPU_KERNELS_ATTENTION_KERNELS_H_

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

template <class T>
void attention(const AttentionTask &t) {
    const size_t rows = t.tokens * t.group;
    char *cursor = static_cast<char *>(t.scratch);
    float *q = takeScratch(cursor, rows * t.dim);
    float *sums = takeScratch(cursor, rows * t.value_dim);
    float *scores = takeScratch(cursor, rows * ATTENTION_KV_TILE);
    float *maxima = takeScratch(cursor, rows);
    float *totals = takeScratch(cursor, rows);
    float *converted = takeScratch(cursor, ATTENTION_KV_TILE * maxOf(t.dim, t.value_dim));
    // Converting a tile first pays off when more rows read it than one pass of a gemm tile.
    const bool convert = sizeof(T) == 2 && rows > DOT_ROWS;

    for (size_t r = 0; r < rows; ++r) {
        const T *from = static_cast<const T *>(t.q) + ptrdiff_t(r / t.group) * t.q_token + ptrdiff_t(r % t.group) * t.q_head;
        for (size_t i = 0; i < t.dim; i += LANES) {
            vstoreUpTo(q + r * t.dim + i, vmul(vloadUpTo(from + i, t.dim - i), vset(t.scale)), t.dim - i);
        }
        for (size_t i = 0; i < t.value_dim; ++i) {
            sums[r * t.value_dim + i] = 0.0f;
        }
        maxima[r] = NEGATIVE_INFINITY;
        totals[r] = 0.0f;
    }

    // What the last token sees bounds what any token sees.
    const size_t end = minOf(t.kv_end, t.first_visible + t.tokens - 1);
    for (size_t tile = t.kv_begin / ATTENTION_KV_TILE * ATTENTION_KV_TILE; tile < end; tile += ATTENTION_KV_TILE) {
        const size_t from = maxOf(tile, t.kv_begin);
        const size_t to = minOf(tile + ATTENTION_KV_TILE, end);
        const size_t width = to - from;

        // scores = q k^T, one run of a block at a time
        for (size_t position = from; position < to;) {
            const size_t in_block = position % t.block_size;
            const size_t run = minOf(t.block_size - in_block, to - position);
            const T *k = static_cast<const T *>(t.k) + ptrdiff_t(blockAt(t, position / t.block_size)) * t.k_block + ptrdiff_t(in_block) * t.k_row;
            GemmBlock g{};
            g.a = q;
            g.a_row = ptrdiff_t(t.dim);
            g.a_col = 1;
            g.b_row = 1;
            g.c = scores + (position - from);
            g.c_row = ATTENTION_KV_TILE;
            g.c_col = 1;
            g.m1 = rows;
            g.n1 = run;
            g.k = t.dim;
            g.alpha = 1.0f;
            if (convert) {
                for (size_t i = 0; i < run; ++i) {
                    toF32Row<T>(t.dim, converted + i * t.dim, k + ptrdiff_t(i) * t.k_row);
                }
                g.b = converted;
                g.b_col = ptrdiff_t(t.dim);
                gemmDot<FloatProduct<float, float>, float>(g);
            } else {
                g.b = k;
                g.b_col = t.k_row;
                gemmDot<FloatProduct<float, T>, float>(g);
            }
            position += run;
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

        // sums += weights v
        for (size_t position = from; position < to;) {
            const size_t in_block = position % t.block_size;
            const size_t run = minOf(t.block_size - in_block, to - position);
            const T *v = static_cast<const T *>(t.v) + ptrdiff_t(blockAt(t, position / t.block_size)) * t.v_block + ptrdiff_t(in_block) * t.v_row;
            GemmBlock g{};
            g.a = scores + (position - from);
            g.a_row = ATTENTION_KV_TILE;
            g.a_col = 1;
            g.b_col = 1;
            g.c = sums;
            g.c_row = ptrdiff_t(t.value_dim);
            g.c_col = 1;
            g.m1 = rows;
            g.n1 = t.value_dim;
            g.k = run;
            g.alpha = 1.0f;
            g.beta = 1.0f;
            if (convert) {
                for (size_t i = 0; i < run; ++i) {
                    toF32Row<T>(t.value_dim, converted + i * t.value_dim, v + ptrdiff_t(i) * t.v_row);
                }
                g.b = converted;
                g.b_row = ptrdiff_t(t.value_dim);
                gemmOuter<float, float>(g);
            } else {
                g.b = v;
                g.b_row = t.v_row;
                gemmOuter<T, float>(g);
            }
            position += run;
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

#ifndef INFINICPU_KERNELS_KERNELS_H_
#define INFINICPU_KERNELS_KERNELS_H_

#include <cstddef>
#include <cstdint>

// The kernels: serial functions on plain pointers, compiled once per instruction set and chosen when the library is
// loaded. Who runs which part on which thread is decided by the operators (op/), never here.

namespace infinicpu {

// Storage types. Arithmetic is always f32.
struct F16 {
    uint16_t bits;
};
struct BF16 {
    uint16_t bits;
};

// Part of C = alpha * A * B + beta * C: rows [m0, m1), columns [n0, n1).
struct GemmBlock {
    const void *a;    // element (m, k) at m * a_row + k * a_col; of a DotKernel: the packed tiles, m0 is one's first row
    const void *b;    // element (k, n) at k * b_row + n * b_col
    void *c;          // element (m, n) at m * c_row + n * c_col
    ptrdiff_t a_row, a_col;
    ptrdiff_t b_row, b_col;
    ptrdiff_t c_row, c_col;
    size_t m0, m1;
    size_t n0, n1;
    size_t k;
    float alpha, beta;

    // Of a DotKernel, whose columns of B are contiguous (b_row == 1) and rows of C too (c_col == 1):
    bool single;          // A has one row in all, which is not padded to a tile
    void *scratch;        // scratch_bytes(k), for calls with more than `rows` rows
    size_t columns_ahead; // where, in columns from n0 on, B is probably wanted next: worth prefetching
};

// Products with a B that is contiguous along K, see gemm_dot.h.
struct DotKernel {
    size_t rows;   // of a tile of A
    size_t step;   // a tile is `rows` times k elements, rounded up to a multiple of this
    size_t a_size; // bytes of an element of packed A: the storage type's own, or f32's
    // A tile of A (of `rows` rows, fewer in the last one) from the storage type. single: as in GemmBlock.
    void (*pack)(const void *a, ptrdiff_t a_row, ptrdiff_t a_col, size_t rows, size_t k, bool single, void *packed);
    size_t (*scratch_bytes)(size_t k);
    size_t (*panel_columns)(size_t k); // a good width of a call with many rows is a multiple of this
    void (*run)(const GemmBlock &);
};

struct NormRow {
    void *y;
    void *residual; // add_rms_norm only
    const void *a;  // x of rms_norm
    const void *b;  // add_rms_norm only
    const void *weight;
    size_t dim;
    float epsilon;
};

// One head's dim elements; the tables' rows are those of its position.
struct RopeRow {
    void *y;
    const void *x;
    const void *sin_row;
    const void *cos_row;
    size_t half;
};

// One row: softmax over x[0 .. visible), zeros for [visible, total).
struct SoftmaxRow {
    void *y;
    const void *x;
    ptrdiff_t y_stride, x_stride;
    size_t visible, total;
};

// Queries that share one kv head: `tokens` consecutive tokens times `group` heads.
// Token t sees the kv positions [kv_begin, min(kv_end, first_visible + t)).
struct AttentionTask {
    const void *q; // token t, head g: q + t * q_token + g * q_head
    ptrdiff_t q_token, q_head;
    void *out;
    ptrdiff_t out_token, out_head;
    size_t tokens, group, dim, value_dim;

    const void *k; // block i, row r: k + i * k_block + r * k_row (this kv head's offset is in k already)
    const void *v;
    ptrdiff_t k_block, k_row, v_block, v_row;
    const void *block_table; // this sequence's; NULL: block i is i
    int block_table_dtype;   // infiniDtype_t
    size_t block_size;

    size_t kv_begin, kv_end, first_visible;
    float scale;
    const float *alibi_slopes; // of this group, or NULL

    // NULL: out gets the result. Else each (token, head) row gets value_dim weighted sums, then their maximum score and
    // the sum of weights, to be merged with other parts of the kv range by attention_merge.
    float *partial;

    void *scratch; // attentionScratchBytes(...)
};

constexpr size_t ATTENTION_KV_TILE = 64;
constexpr size_t ATTENTION_MAX_ROWS = 32; // upper limit of tokens * group, unless tokens == 1

constexpr size_t attentionScratchBytes(size_t rows, size_t dim, size_t value_dim) {
    // q and the sums, scores, maxima and sums of the rows, a packed or converted tile of k or v; 64-byte aligned parts, each
    // with room for whole tiles and vectors
    return sizeof(float) * ((rows + 8) * (dim + 32) + rows * (value_dim + 16) + rows * ATTENTION_KV_TILE + 2 * (rows + 16)
                            + (ATTENTION_KV_TILE + 8) * ((dim > value_dim ? dim : value_dim) + 32))
         + 1024;
}

struct Kernels {
    const char *name;

    // [dtype]: f32, f16, bf16 (FloatIndex)
    DotKernel gemm_dot[3];
    void (*gemm_outer[3])(const GemmBlock &); // a is f32, b and c the dtype; see gemm_kernels.h

    void (*rms_norm[3][3])(const NormRow &);     // [activation][weight]
    void (*add_rms_norm[3][3])(const NormRow &); // [activation][weight]
    void (*rope[3][2])(const RopeRow &);         // [dtype][infiniopRoPEAlgo_t]
    void (*softmax[3])(const SoftmaxRow &);

    // Contiguous runs of n elements.
    void (*add[3])(size_t n, void *c, const void *a, const void *b);
    void (*mul[3])(size_t n, void *c, const void *a, const void *b);
    void (*silu[3])(size_t n, void *c, const void *a);
    void (*swiglu[3])(size_t n, void *c, const void *a, const void *b);
    void (*to_f32[3])(size_t n, float *out, const void *in);

    void (*attention[3])(const AttentionTask &);
    // Merges `parts` partial results of one row, `stride` floats apart, into out.
    void (*attention_merge[3])(size_t parts, const float *partial, size_t stride, size_t value_dim, void *out);

    // The largest of n >= 1 values; NaN is passed over, and -infinity if nothing else is there.
    float (*max_value)(size_t n, const float *values);
    // weights[i] = exp((logits[i] - max) * inverse_temperature), and their sum. NaN counts as 0.
    double (*softmax_weights)(size_t n, float *weights, const float *logits, float max, float inverse_temperature);
};

const Kernels &kernels();

} // namespace infinicpu

#endif // INFINICPU_KERNELS_KERNELS_H_

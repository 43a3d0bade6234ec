#include "../kernels/kernels.h"
#include "launch.h"
#include "thread_pool.h"

#include <infiniop/ops/gemm.h>

#include <algorithm>

using namespace infinicpu;

namespace {

// A matrix, or a batch of them with `batch_stride` elements between (0: one matrix for all).
struct Matrix {
    size_t batch;
    ptrdiff_t batch_stride;
    size_t rows, cols;
    ptrdiff_t row_stride, col_stride;

    void transpose() {
        std::swap(rows, cols);
        std::swap(row_stride, col_stride);
    }
};

infiniStatus_t readMatrix(const TensorDescriptor &tensor, Matrix *matrix) {
    INFINICPU_REQUIRE(tensor.ndim() == 2 || tensor.ndim() == 3, INFINI_STATUS_BAD_TENSOR_SHAPE);
    const size_t first = tensor.ndim() - 2;
    matrix->batch = first == 1 ? tensor.dim(0) : 1;
    matrix->batch_stride = matrix->batch == 1 ? 0 : tensor.stride(0);
    matrix->rows = tensor.dim(first);
    matrix->cols = tensor.dim(first + 1);
    matrix->row_stride = tensor.stride(first);
    matrix->col_stride = tensor.stride(first + 1);
    INFINICPU_REQUIRE(matrix->row_stride == 1 || matrix->col_stride == 1, INFINI_STATUS_BAD_TENSOR_STRIDES);
    return INFINI_STATUS_SUCCESS;
}

// Columns of a task are a multiple of every instruction set's tile width.
constexpr size_t DOT_COLUMN_UNIT = 24;
constexpr size_t OUTER_COLUMN_UNIT = 64;
// A task's part of B stays in a second-level cache while all rows of A use it.
constexpr size_t TASK_BYTES = 192 << 10;
// From this many rows on, B's half-precision elements are converted once per task and not once per tile of rows.
constexpr size_t CONVERT_ROWS = 12;
constexpr size_t ROWS_UNIT = 12; // a multiple of every tile height

struct GemmDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "gemm";

    infiniDtype_t dtype;
    Matrix a, b, c; // such that c.col_stride == 1: a column-major C is computed as its transpose
    bool swapped;   // ... and then the caller's a and b changed places
    size_t m, n, k, batch;
    bool dot;    // the kernel family, see gemm_kernels.h
    bool pack_a; // A goes through the workspace: converted to f32 and/or made contiguous along K
    bool a_is_native;
};

size_t roundUp(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

template <class T>
void packNative(const GemmDescriptor &d, const T *a, T *packed, size_t row) {
    for (size_t p = 0; p < d.k; ++p) {
        packed[row * d.k + p] = a[ptrdiff_t(row) * d.a.row_stride + ptrdiff_t(p) * d.a.col_stride];
    }
}

// One row of A into the workspace, in the type that the kernel reads.
infiniStatus_t packRow(const GemmDescriptor &d, const char *a, char *packed, size_t row) {
    const size_t size = sizeOf(d.dtype);
    if (d.a_is_native) {
        if (size == 4) {
            packNative(d, reinterpret_cast<const float *>(a), reinterpret_cast<float *>(packed), row);
        } else {
            packNative(d, reinterpret_cast<const uint16_t *>(a), reinterpret_cast<uint16_t *>(packed), row);
        }
        return INFINI_STATUS_SUCCESS;
    }
    const auto to_f32 = kernels().to_f32[floatIndex(d.dtype)];
    float *out = reinterpret_cast<float *>(packed) + row * d.k;
    const char *from = a + ptrdiff_t(row) * d.a.row_stride * ptrdiff_t(size);
    if (d.a.col_stride == 1) {
        to_f32(d.k, out, from);
        return INFINI_STATUS_SUCCESS;
    }
    constexpr size_t PIECE = 256;
    uint16_t gathered[PIECE];
    for (size_t p0 = 0; p0 < d.k; p0 += PIECE) {
        const size_t count = std::min(PIECE, d.k - p0);
        for (size_t p = 0; p < count; ++p) {
            gathered[p] = reinterpret_cast<const uint16_t *>(from)[ptrdiff_t(p0 + p) * d.a.col_stride];
        }
        to_f32(count, out + p0, gathered);
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t compute(const GemmDescriptor &d, char *workspace, char *c, const char *a, const char *b, float alpha, float beta) {
    if (d.m == 0 || d.n == 0 || d.batch == 0) {
        return INFINI_STATUS_SUCCESS;
    }
    const FloatIndex type = floatIndex(d.dtype);
    const ptrdiff_t size = ptrdiff_t(sizeOf(d.dtype));
    const size_t a_size = d.a_is_native ? size_t(size) : sizeof(float);
    if (d.pack_a) {
        parallelFor(0, d.a.batch * d.m, 16, [&](size_t from, size_t to) {
            for (size_t i = from; i < to; ++i) {
                const size_t batch = i / d.m;
                packRow(d, a + ptrdiff_t(batch) * d.a.batch_stride * size, workspace + batch * d.m * d.k * a_size, i % d.m);
            }
        });
    }

    // Tasks: batch x row blocks x column blocks. All rows in one block unless that leaves threads without work.
    const size_t unit = d.dot ? DOT_COLUMN_UNIT : OUTER_COLUMN_UNIT;
    const size_t row_bytes = std::max<size_t>(1, d.k) * (d.dot ? a_size : sizeof(float));
    const size_t columns = std::max(unit, TASK_BYTES / row_bytes / unit * unit);
    const size_t column_blocks = (d.n + columns - 1) / columns;
    const size_t threads = ThreadPool::instance().numThreads();
    size_t row_blocks = 1;
    if (d.batch * column_blocks < 4 * threads) {
        row_blocks = std::min((4 * threads + d.batch * column_blocks - 1) / (d.batch * column_blocks), (d.m + 3 * ROWS_UNIT - 1) / (3 * ROWS_UNIT));
    }
    const size_t rows = roundUp((d.m + row_blocks - 1) / row_blocks, ROWS_UNIT);
    row_blocks = (d.m + rows - 1) / rows;

    const bool convert_b = d.dot && !d.a_is_native && std::min(rows, d.m) >= CONVERT_ROWS;
    const auto kernel = convert_b ? kernels().gemm_dot_converted[type] : (d.dot ? kernels().gemm_dot[type] : kernels().gemm_outer[type]);
    std::atomic<bool> out_of_memory{false};

    // Work too small to share would only wait for the other threads to wake up.
    const size_t tasks = d.batch * row_blocks * column_blocks;
    const double work = 2.0 * double(d.m) * double(d.n) * double(d.k) * double(d.batch);
    const size_t grain = work < 1e5 ? tasks : 1;
    parallelFor(0, tasks, grain, [&](size_t from, size_t to) {
        for (size_t task = from; task < to; ++task) {
            const size_t column_block = task % column_blocks;
            const size_t row_block = task / column_blocks % row_blocks;
            const size_t batch = task / column_blocks / row_blocks;
            GemmBlock g{};
            if (d.pack_a) {
                g.a = workspace + (d.a.batch == 1 ? 0 : batch) * d.m * d.k * a_size;
                g.a_row = ptrdiff_t(d.k);
                g.a_col = 1;
            } else {
                g.a = a + ptrdiff_t(batch) * d.a.batch_stride * size;
                g.a_row = d.a.row_stride;
                g.a_col = d.a.col_stride;
            }
            g.b = b + ptrdiff_t(batch) * d.b.batch_stride * size;
            g.b_row = d.b.row_stride;
            g.b_col = d.b.col_stride;
            g.c = c + ptrdiff_t(batch) * d.c.batch_stride * size;
            g.c_row = d.c.row_stride;
            g.c_col = d.c.col_stride;
            g.m0 = row_block * rows;
            g.m1 = std::min(d.m, g.m0 + rows);
            g.n0 = column_block * columns;
            g.n1 = std::min(d.n, g.n0 + columns);
            g.k = d.k;
            g.alpha = alpha;
            g.beta = beta;
            if (convert_b) {
                float *converted = static_cast<float *>(threadScratch((g.n1 - g.n0) * d.k * sizeof(float)));
                if (converted == nullptr) {
                    out_of_memory.store(true, std::memory_order_relaxed);
                    return;
                }
                for (size_t column = g.n0; column < g.n1; ++column) {
                    kernels().to_f32[type](d.k, converted + (column - g.n0) * d.k, static_cast<const char *>(g.b) + ptrdiff_t(column) * g.b_col * size);
                }
                // The block's columns start at 0 there.
                g.b = converted;
                g.b_col = ptrdiff_t(d.k);
                g.c = static_cast<char *>(g.c) + ptrdiff_t(g.n0) * g.c_col * size;
                g.n1 -= g.n0;
                g.n0 = 0;
            }
            kernel(g);
        }
    });
    return out_of_memory.load() ? INFINI_STATUS_INTERNAL_ERROR : INFINI_STATUS_SUCCESS;
}

} // namespace

infiniStatus_t infiniopCreateGemmDescriptor(infiniopHandle_t handle, infiniopGemmDescriptor_t *desc_ptr, infiniopTensorDescriptor_t c_desc, infiniopTensorDescriptor_t a_desc, infiniopTensorDescriptor_t b_desc) {
    return createOperator<GemmDescriptor>(handle, desc_ptr, {c_desc, a_desc, b_desc}, [&](GemmDescriptor &d) {
        d.dtype = c_desc->dtype;
        INFINICPU_REQUIRE(isOneOf(d.dtype, {INFINI_DTYPE_F16, INFINI_DTYPE_F32, INFINI_DTYPE_BF16}), INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(a_desc->dtype == d.dtype && b_desc->dtype == d.dtype, INFINI_STATUS_BAD_TENSOR_DTYPE);
        infiniStatus_t status = readMatrix(*a_desc, &d.a);
        INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
        status = readMatrix(*b_desc, &d.b);
        INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
        status = readMatrix(*c_desc, &d.c);
        INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
        INFINICPU_REQUIRE(d.c.rows == d.a.rows && d.c.cols == d.b.cols && d.a.cols == d.b.rows, INFINI_STATUS_BAD_TENSOR_SHAPE);
        d.batch = d.c.batch;
        INFINICPU_REQUIRE((d.a.batch == d.batch || d.a.batch == 1) && (d.b.batch == d.batch || d.b.batch == 1), INFINI_STATUS_BAD_TENSOR_SHAPE);

        d.swapped = d.c.col_stride != 1;
        if (d.swapped) {
            d.a.transpose();
            d.b.transpose();
            d.c.transpose();
            std::swap(d.a, d.b);
        }
        d.m = d.c.rows;
        d.n = d.c.cols;
        d.k = d.a.cols;
        d.dot = d.b.row_stride == 1;
        d.a_is_native = d.dot ? kernels().gemm_dot_native[floatIndex(d.dtype)] : d.dtype == INFINI_DTYPE_F32;
        d.pack_a = !d.a_is_native || (d.dot && d.a.col_stride != 1);
        d.workspace_size = d.pack_a ? d.a.batch * d.m * d.k * (d.a_is_native ? sizeOf(d.dtype) : sizeof(float)) : 0;
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_WORKSPACE_SIZE(Gemm)

infiniStatus_t infiniopGemm(infiniopGemmDescriptor_t desc, void *workspace, size_t workspace_size, void *c, const void *a, const void *b, float alpha, float beta, void *stream) {
    if (desc != nullptr && desc->simulated != nullptr) {
        const infiniStatus_t status = checkScalars(*desc, alpha, beta);
        INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
    }
    return launch<GemmDescriptor>(desc, workspace, workspace_size, {c, a, b}, stream, [=](const GemmDescriptor &d) {
        const void *left = d.swapped ? b : a;
        const void *right = d.swapped ? a : b;
        return compute(d, static_cast<char *>(workspace), static_cast<char *>(c), static_cast<const char *>(left), static_cast<const char *>(right), alpha, beta);
    });
}

INFINICPU_DEFINE_DESTROY(Gemm)

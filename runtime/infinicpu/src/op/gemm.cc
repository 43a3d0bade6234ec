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

constexpr size_t OUTER_COLUMN_UNIT = 64;
// A task's part of B stays in a second-level cache while all rows of A use it.
constexpr size_t TASK_BYTES = 192 << 10;
constexpr size_t ROWS_UNIT = 12; // a multiple of every tile height
// Few rows: B is read once, in runs long enough for memory, and short enough that all threads finish together.
constexpr size_t STREAM_ROWS = 32;
constexpr size_t STREAM_TASK_BYTES = 256 << 10;
constexpr size_t STREAM_TASKS_PER_THREAD = 16;
constexpr size_t STREAM_COLUMN_UNIT = 48; // a multiple of every tile width and vector
constexpr size_t ALIGNMENT = 64;

size_t roundUp(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

struct GemmDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "gemm";

    infiniDtype_t dtype;
    Matrix a, b, c; // such that c.col_stride == 1: a column-major C is computed as its transpose
    bool swapped;   // ... and then the caller's a and b changed places
    size_t m, n, k, batch;
    bool dot;    // the kernel family: B is contiguous along K (gemm_dot.h), or along N (gemm_kernels.h)
    bool pack_a; // A goes through the workspace: in tiles (dot), or converted to f32

    const DotKernel &dotKernel() const { return kernels().gemm_dot[floatIndex(dtype)]; }
    // One row of what the kernel reads is its own tile.
    bool single() const { return m == 1 && dotKernel().a_size == sizeOf(dtype); }
    // Bytes of one packed matrix A.
    size_t packedBytes() const {
        if (!dot) {
            return m * k * sizeof(float);
        }
        const DotKernel &kernel = dotKernel();
        return (single() ? 1 : roundUp(m, kernel.rows)) * roundUp(k, kernel.step) * kernel.a_size;
    }
};

// One row of a half-precision A into the workspace as f32.
void convertRow(const GemmDescriptor &d, const char *a, float *packed, size_t row) {
    const auto to_f32 = kernels().to_f32[floatIndex(d.dtype)];
    float *out = packed + row * d.k;
    const char *from = a + ptrdiff_t(row) * d.a.row_stride * ptrdiff_t(sizeOf(d.dtype));
    if (d.a.col_stride == 1) {
        to_f32(d.k, out, from);
        return;
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
}

// All of A into the workspace.
void pack(const GemmDescriptor &d, const char *a, char *packed) {
    const ptrdiff_t size = ptrdiff_t(sizeOf(d.dtype));
    const DotKernel &kernel = d.dotKernel();
    const size_t height = d.dot ? kernel.rows : 1;
    const size_t tiles = (d.m + height - 1) / height;
    const size_t tile_bytes = d.dot ? (d.single() ? 1 : height) * roundUp(d.k, kernel.step) * kernel.a_size : d.k * sizeof(float);
    // About the time that it takes a thread to join.
    const size_t grain = std::max<size_t>(1, (64 << 10) / std::max<size_t>(1, tile_bytes));
    parallelFor(0, d.a.batch * tiles, grain, [&](size_t from, size_t to) {
        for (size_t i = from; i < to; ++i) {
            const char *matrix = a + ptrdiff_t(i / tiles) * d.a.batch_stride * size;
            char *out = packed + i / tiles * d.packedBytes();
            const size_t row = i % tiles * height;
            if (d.dot) {
                kernel.pack(matrix + ptrdiff_t(row) * d.a.row_stride * size, d.a.row_stride, d.a.col_stride, std::min(height, d.m - row), d.k, d.single(), out + i % tiles * tile_bytes);
            } else {
                convertRow(d, matrix, reinterpret_cast<float *>(out), row);
            }
        }
    });
}

// How the result is cut into tasks: batch x row blocks x column blocks.
struct Tasks {
    size_t rows, row_blocks;
    size_t columns, column_blocks;

    Tasks(const GemmDescriptor &d, size_t threads) {
        const size_t row_bytes = std::max<size_t>(1, d.k) * (d.dot ? sizeOf(d.dtype) : sizeof(float));
        if (!d.dot) {
            columns = std::max(OUTER_COLUMN_UNIT, TASK_BYTES / row_bytes / OUTER_COLUMN_UNIT * OUTER_COLUMN_UNIT);
        } else if (d.m < STREAM_ROWS) {
            const size_t share = d.n * row_bytes / (STREAM_TASKS_PER_THREAD * threads);
            columns = roundUp(std::max<size_t>(1, std::min(STREAM_TASK_BYTES, share) / row_bytes), STREAM_COLUMN_UNIT);
        } else {
            columns = d.dotKernel().panel_columns(d.k);
        }
        column_blocks = (d.n + columns - 1) / columns;
        // All rows in one block unless that leaves threads without work.
        row_blocks = 1;
        if (d.batch * column_blocks < 4 * threads) {
            row_blocks = std::min((4 * threads + d.batch * column_blocks - 1) / (d.batch * column_blocks), (d.m + 3 * ROWS_UNIT - 1) / (3 * ROWS_UNIT));
        }
        rows = roundUp((d.m + row_blocks - 1) / row_blocks, ROWS_UNIT);
        row_blocks = (d.m + rows - 1) / rows;
    }
};

infiniStatus_t compute(const GemmDescriptor &d, char *workspace, char *c, const char *a, const char *b, float alpha, float beta) {
    if (d.m == 0 || d.n == 0 || d.batch == 0) {
        return INFINI_STATUS_SUCCESS;
    }
    const FloatIndex type = floatIndex(d.dtype);
    const ptrdiff_t size = ptrdiff_t(sizeOf(d.dtype));
    char *packed = nullptr;
    if (d.pack_a) {
        packed = reinterpret_cast<char *>(roundUp(reinterpret_cast<size_t>(workspace), ALIGNMENT));
        pack(d, a, packed);
    }
    const size_t threads = ThreadPool::instance().numThreads();
    const Tasks cut(d, threads);
    const auto kernel = d.dot ? d.dotKernel().run : kernels().gemm_outer[type];
    const size_t scratch_bytes = d.dot && std::min(cut.rows, d.m) > d.dotKernel().rows ? d.dotKernel().scratch_bytes(d.k) : 0;
    std::atomic<bool> out_of_memory{false};

    // Work too small to share would only wait for the other threads to wake up.
    const size_t tasks = d.batch * cut.row_blocks * cut.column_blocks;
    const double work = 2.0 * double(d.m) * double(d.n) * double(d.k) * double(d.batch);
    const size_t grain = work < 1e5 ? tasks : 1;
    parallelFor(0, tasks, grain, [&](size_t from, size_t to) {
        void *scratch = scratch_bytes != 0 ? threadScratch(scratch_bytes) : nullptr;
        if (scratch_bytes != 0 && scratch == nullptr) {
            out_of_memory.store(true, std::memory_order_relaxed);
            return;
        }
        for (size_t task = from; task < to; ++task) {
            const size_t column_block = task % cut.column_blocks;
            const size_t row_block = task / cut.column_blocks % cut.row_blocks;
            const size_t batch = task / cut.column_blocks / cut.row_blocks;
            GemmBlock g{};
            if (d.pack_a) {
                g.a = packed + (d.a.batch == 1 ? 0 : batch) * d.packedBytes();
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
            g.m0 = row_block * cut.rows;
            g.m1 = std::min(d.m, g.m0 + cut.rows);
            g.n0 = column_block * cut.columns;
            g.n1 = std::min(d.n, g.n0 + cut.columns);
            g.k = d.k;
            g.alpha = alpha;
            g.beta = beta;
            g.single = d.dot && d.single();
            g.scratch = scratch;
            // The threads take tasks in turn.
            g.columns_ahead = threads * cut.columns;
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
        const size_t element = sizeOf(d.dtype);
        d.pack_a = d.dot ? !d.single() || d.a.col_stride != 1 : element != sizeof(float);
        d.workspace_size = d.pack_a ? d.a.batch * d.packedBytes() + ALIGNMENT : 0;
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

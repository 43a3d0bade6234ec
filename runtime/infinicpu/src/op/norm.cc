#include "../kernels/kernels.h"
#include "launch.h"
#include "thread_pool.h"

#include <infiniop/ops/add_rms_norm.h>
#include <infiniop/ops/rms_norm.h>

#include <cmath>

using namespace infinicpu;

namespace {

// Rows small enough that several of them are one thread's piece of work.
constexpr size_t PIECE_ELEMENTS = 8192;

bool dtypesAllowed(infiniDtype_t activation, infiniDtype_t weight) {
    if (activation == INFINI_DTYPE_F16 || activation == INFINI_DTYPE_BF16) {
        return isOneOf(weight, {INFINI_DTYPE_F32, INFINI_DTYPE_F16, INFINI_DTYPE_BF16});
    }
    return (activation == INFINI_DTYPE_F32 || activation == INFINI_DTYPE_F64) && weight == activation;
}

// Where row i (of rows x heads) of a 2-D or 3-D tensor starts.
struct RowOffsets {
    ptrdiff_t outer, inner;

    RowOffsets() = default;
    explicit RowOffsets(const TensorDescriptor &tensor)
        : outer(tensor.stride(0)), inner(tensor.ndim() == 3 ? tensor.stride(1) : 0) {}
    ptrdiff_t operator()(size_t row, size_t heads) const { return ptrdiff_t(row / heads) * outer + ptrdiff_t(row % heads) * inner; }
};

struct NormShape {
    size_t rows, heads, dim;

    explicit NormShape(const TensorDescriptor &y)
        : rows(y.dim(0) * (y.ndim() == 3 ? y.dim(1) : 1)), heads(y.ndim() == 3 ? y.dim(1) : 1), dim(y.dim(y.ndim() - 1)) {}
    NormShape() = default;
    size_t grain() const { return dim == 0 ? rows + 1 : (PIECE_ELEMENTS + dim - 1) / dim; }
};

struct RMSNormDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "rms_norm";
    NormShape shape;
    RowOffsets y, x;
    infiniDtype_t activation, weight;
    float epsilon;
};

struct AddRMSNormDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "add_rms_norm";
    NormShape shape;
    RowOffsets y, residual, a, b;
    infiniDtype_t activation, weight;
    float epsilon;
};

// The f64 form of both: b and residual may be NULL.
void normRowDouble(double *y, double *residual, const double *a, const double *b, const double *w, size_t dim, float epsilon) {
    double sum = 0.0;
    for (size_t i = 0; i < dim; ++i) {
        const double v = b != nullptr ? a[i] + b[i] : a[i];
        sum += v * v;
    }
    const double scale = 1.0 / std::sqrt(sum / double(dim) + double(epsilon));
    for (size_t i = 0; i < dim; ++i) {
        const double v = b != nullptr ? a[i] + b[i] : a[i];
        if (residual != nullptr) {
            residual[i] = v;
        }
        y[i] = v * scale * w[i];
    }
}

// Whether `tensor` is a 2-D or 3-D tensor of y's shape.
bool sameRows(const TensorDescriptor &tensor, const TensorDescriptor &y) {
    return tensor.shape == y.shape;
}

bool lastStrideIsOne(const TensorDescriptor &tensor) {
    return tensor.stride(tensor.ndim() - 1) == 1;
}

} // namespace

infiniStatus_t infiniopCreateRMSNormDescriptor(infiniopHandle_t handle, infiniopRMSNormDescriptor_t *desc_ptr, infiniopTensorDescriptor_t y_desc, infiniopTensorDescriptor_t x_desc, infiniopTensorDescriptor_t w_desc, float epsilon) {
    return createOperator<RMSNormDescriptor>(handle, desc_ptr, {y_desc, x_desc, w_desc}, [&](RMSNormDescriptor &d) {
        INFINICPU_REQUIRE(x_desc->dtype == y_desc->dtype && dtypesAllowed(y_desc->dtype, w_desc->dtype), INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE((y_desc->ndim() == 2 || y_desc->ndim() == 3) && w_desc->ndim() == 1, INFINI_STATUS_BAD_TENSOR_SHAPE);
        d.shape = NormShape(*y_desc);
        INFINICPU_REQUIRE(sameRows(*x_desc, *y_desc) && w_desc->dim(0) == d.shape.dim, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(lastStrideIsOne(*y_desc) && lastStrideIsOne(*x_desc) && lastStrideIsOne(*w_desc), INFINI_STATUS_BAD_TENSOR_STRIDES);
        d.y = RowOffsets(*y_desc);
        d.x = RowOffsets(*x_desc);
        d.activation = y_desc->dtype;
        d.weight = w_desc->dtype;
        d.epsilon = epsilon;
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_WORKSPACE_SIZE(RMSNorm)

infiniStatus_t infiniopRMSNorm(infiniopRMSNormDescriptor_t desc, void *workspace, size_t workspace_size, void *y, const void *x, const void *w, void *stream) {
    return launch<RMSNormDescriptor>(desc, workspace, workspace_size, {y, x, w}, stream, [=](const RMSNormDescriptor &d) {
        const ptrdiff_t size = ptrdiff_t(sizeOf(d.activation));
        parallelFor(0, d.shape.rows, d.shape.grain(), [&](size_t from, size_t to) {
            for (size_t row = from; row < to; ++row) {
                char *y_row = static_cast<char *>(y) + d.y(row, d.shape.heads) * size;
                const char *x_row = static_cast<const char *>(x) + d.x(row, d.shape.heads) * size;
                if (d.activation == INFINI_DTYPE_F64) {
                    normRowDouble(reinterpret_cast<double *>(y_row), nullptr, reinterpret_cast<const double *>(x_row), nullptr, static_cast<const double *>(w), d.shape.dim, d.epsilon);
                } else {
                    kernels().rms_norm[floatIndex(d.activation)][floatIndex(d.weight)]({y_row, nullptr, x_row, nullptr, w, d.shape.dim, d.epsilon});
                }
            }
        });
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_DESTROY(RMSNorm)

infiniStatus_t infiniopCreateAddRMSNormDescriptor(infiniopHandle_t handle, infiniopAddRMSNormDescriptor_t *desc_ptr, infiniopTensorDescriptor_t y_desc, infiniopTensorDescriptor_t residual_out_desc, infiniopTensorDescriptor_t a_desc, infiniopTensorDescriptor_t b_desc, infiniopTensorDescriptor_t weight_desc, float epsilon) {
    return createOperator<AddRMSNormDescriptor>(handle, desc_ptr, {y_desc, OperandDesc(residual_out_desc, true), a_desc, b_desc, weight_desc}, [&](AddRMSNormDescriptor &d) {
        INFINICPU_REQUIRE(a_desc->dtype == y_desc->dtype && b_desc->dtype == y_desc->dtype && dtypesAllowed(y_desc->dtype, weight_desc->dtype), INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE((y_desc->ndim() == 2 || y_desc->ndim() == 3) && weight_desc->ndim() == 1, INFINI_STATUS_BAD_TENSOR_SHAPE);
        d.shape = NormShape(*y_desc);
        INFINICPU_REQUIRE(sameRows(*a_desc, *y_desc) && sameRows(*b_desc, *y_desc) && weight_desc->dim(0) == d.shape.dim, INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(lastStrideIsOne(*y_desc) && lastStrideIsOne(*a_desc) && lastStrideIsOne(*b_desc) && lastStrideIsOne(*weight_desc), INFINI_STATUS_BAD_TENSOR_STRIDES);
        INFINICPU_REQUIRE(residual_out_desc != nullptr, INFINI_STATUS_BAD_PARAM);
        INFINICPU_REQUIRE(residual_out_desc->ndim() == y_desc->ndim(), INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(residual_out_desc->dtype == y_desc->dtype, INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(sameRows(*residual_out_desc, *y_desc), INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(lastStrideIsOne(*residual_out_desc), INFINI_STATUS_BAD_TENSOR_STRIDES);
        d.y = RowOffsets(*y_desc);
        d.residual = RowOffsets(*residual_out_desc);
        d.a = RowOffsets(*a_desc);
        d.b = RowOffsets(*b_desc);
        d.activation = y_desc->dtype;
        d.weight = weight_desc->dtype;
        d.epsilon = epsilon;
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_WORKSPACE_SIZE(AddRMSNorm)

infiniStatus_t infiniopAddRMSNorm(infiniopAddRMSNormDescriptor_t desc, void *workspace, size_t workspace_size, void *y, void *residual_out, const void *a, const void *b, const void *weight, void *stream) {
    return launch<AddRMSNormDescriptor>(desc, workspace, workspace_size, {y, residual_out, a, b, weight}, stream, [=](const AddRMSNormDescriptor &d) {
        const ptrdiff_t size = ptrdiff_t(sizeOf(d.activation));
        parallelFor(0, d.shape.rows, d.shape.grain(), [&](size_t from, size_t to) {
            for (size_t row = from; row < to; ++row) {
                char *y_row = static_cast<char *>(y) + d.y(row, d.shape.heads) * size;
                char *residual_row = static_cast<char *>(residual_out) + d.residual(row, d.shape.heads) * size;
                const char *a_row = static_cast<const char *>(a) + d.a(row, d.shape.heads) * size;
                const char *b_row = static_cast<const char *>(b) + d.b(row, d.shape.heads) * size;
                if (d.activation == INFINI_DTYPE_F64) {
                    normRowDouble(reinterpret_cast<double *>(y_row), reinterpret_cast<double *>(residual_row), reinterpret_cast<const double *>(a_row), reinterpret_cast<const double *>(b_row), static_cast<const double *>(weight), d.shape.dim, d.epsilon);
                } else {
                    kernels().add_rms_norm[floatIndex(d.activation)][floatIndex(d.weight)]({y_row, residual_row, a_row, b_row, weight, d.shape.dim, d.epsilon});
                }
            }
        });
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_DESTROY(AddRMSNorm)

// add, mul, silu, swiglu and silu_and_mul.

#include "../kernels/half.h"
#include "../kernels/kernels.h"
#include "launch.h"
#include "strided.h"
#include "thread_pool.h"

#include <infiniop/ops/add.h>
#include <infiniop/ops/mul.h>
#include <infiniop/ops/silu.h>
#include <infiniop/ops/silu_and_mul.h>
#include <infiniop/ops/swiglu.h>

#include <cmath>

using namespace infinicpu;

namespace {

constexpr size_t PIECE_ELEMENTS = 8192;

enum class Function { ADD,
                      MUL,
                      SILU,
                      SWIGLU };

using UnaryKernel = void (*)(size_t, void *, const void *);
using BinaryKernel = void (*)(size_t, void *, const void *, const void *);

// A unary function ignores its second operand, which is then the first again.
struct ElementwiseDescriptor : InfiniopDescriptor {
    StridedLoop<3> loop;
    infiniDtype_t dtype;
    Function function;
};

struct AddDescriptor final : ElementwiseDescriptor {
    static constexpr const char *KIND = "add";
};
struct MulDescriptor final : ElementwiseDescriptor {
    static constexpr const char *KIND = "mul";
};
struct SiluDescriptor final : ElementwiseDescriptor {
    static constexpr const char *KIND = "silu";
};
struct SwiGLUDescriptor final : ElementwiseDescriptor {
    static constexpr const char *KIND = "swiglu";
};

template <class T>
T applyScalar(Function function, T a, T b) {
    switch (function) {
    case Function::ADD:
        if constexpr (std::is_integral_v<T>) { // wraps around, as everywhere
            using Unsigned = std::make_unsigned_t<T>;
            return T(Unsigned(a) + Unsigned(b));
        }
        return a + b;
    case Function::MUL:
        if constexpr (!std::is_integral_v<T>) {
            return a * b;
        }
        return a;
    case Function::SILU:
        return T(double(a) / (1.0 + std::exp(-double(a))));
    default:
        return T(double(b) / (1.0 + std::exp(-double(b))) * double(a));
    }
}

template <class T>
void runScalar(Function function, size_t n, T *c, ptrdiff_t c_stride, const T *a, ptrdiff_t a_stride, const T *b, ptrdiff_t b_stride) {
    for (size_t i = 0; i < n; ++i) {
        const ptrdiff_t p = ptrdiff_t(i);
        c[p * c_stride] = applyScalar(function, a[p * a_stride], b[p * b_stride]);
    }
}

void runContiguous(Function function, FloatIndex type, size_t n, void *c, const void *a, const void *b) {
    switch (function) {
    case Function::ADD:
        return kernels().add[type](n, c, a, b);
    case Function::MUL:
        return kernels().mul[type](n, c, a, b);
    case Function::SILU:
        return kernels().silu[type](n, c, a);
    case Function::SWIGLU:
        return kernels().swiglu[type](n, c, a, b);
    }
}

// The kernels want contiguous runs: strided ones are gathered and scattered in small pieces.
template <class Bits>
void runStrided(Function function, FloatIndex type, size_t n, Bits *c, ptrdiff_t c_stride, const Bits *a, ptrdiff_t a_stride, const Bits *b, ptrdiff_t b_stride) {
    constexpr size_t PIECE = 256;
    Bits left[PIECE], right[PIECE], out[PIECE];
    for (size_t start = 0; start < n; start += PIECE) {
        const size_t count = std::min(PIECE, n - start);
        for (size_t i = 0; i < count; ++i) {
            left[i] = a[ptrdiff_t(start + i) * a_stride];
            right[i] = b[ptrdiff_t(start + i) * b_stride];
        }
        runContiguous(function, type, count, out, left, right);
        for (size_t i = 0; i < count; ++i) {
            c[ptrdiff_t(start + i) * c_stride] = out[i];
        }
    }
}

void runRow(const ElementwiseDescriptor &d, size_t n, char *c, const char *a, const char *b) {
    const auto &s = d.loop.inner.strides;
    switch (d.dtype) {
    case INFINI_DTYPE_F64:
        return runScalar(d.function, n, reinterpret_cast<double *>(c), s[0], reinterpret_cast<const double *>(a), s[1], reinterpret_cast<const double *>(b), s[2]);
    case INFINI_DTYPE_I32:
        return runScalar(d.function, n, reinterpret_cast<int32_t *>(c), s[0], reinterpret_cast<const int32_t *>(a), s[1], reinterpret_cast<const int32_t *>(b), s[2]);
    case INFINI_DTYPE_I64:
        return runScalar(d.function, n, reinterpret_cast<int64_t *>(c), s[0], reinterpret_cast<const int64_t *>(a), s[1], reinterpret_cast<const int64_t *>(b), s[2]);
    default:
        break;
    }
    const FloatIndex type = floatIndex(d.dtype);
    if (d.loop.innerIsContiguous()) {
        runContiguous(d.function, type, n, c, a, b);
    } else if (d.dtype == INFINI_DTYPE_F32) {
        runStrided(d.function, type, n, reinterpret_cast<uint32_t *>(c), s[0], reinterpret_cast<const uint32_t *>(a), s[1], reinterpret_cast<const uint32_t *>(b), s[2]);
    } else {
        runStrided(d.function, type, n, reinterpret_cast<uint16_t *>(c), s[0], reinterpret_cast<const uint16_t *>(a), s[1], reinterpret_cast<const uint16_t *>(b), s[2]);
    }
}

infiniStatus_t compute(const ElementwiseDescriptor &d, char *c, const char *a, const char *b) {
    if (d.operands[0].numel() == 0) {
        return INFINI_STATUS_SUCCESS;
    }
    const ptrdiff_t size = ptrdiff_t(sizeOf(d.dtype));
    const size_t inner = d.loop.inner.length;
    const size_t pieces = (inner + PIECE_ELEMENTS - 1) / PIECE_ELEMENTS; // of one row
    const size_t grain = std::max<size_t>(1, PIECE_ELEMENTS / inner);
    parallelFor(0, d.loop.rows * pieces, grain, [&](size_t from, size_t to) {
        for (size_t task = from; task < to; ++task) {
            const auto offsets = d.loop.offsets(task / pieces);
            const size_t start = task % pieces * PIECE_ELEMENTS;
            const auto at = [&](size_t operand) { return (offsets[operand] + ptrdiff_t(start) * d.loop.inner.strides[operand]) * size; };
            runRow(d, std::min(PIECE_ELEMENTS, inner - start), c + at(0), a + at(1), b + at(2));
        }
    });
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t check(ElementwiseDescriptor &d, Function function, std::initializer_list<infiniDtype_t> dtypes) {
    const TensorDescriptor &c = d.operands[0];
    const TensorDescriptor &a = d.operands[1];
    const TensorDescriptor &b = d.operands.back();
    INFINICPU_REQUIRE(isOneOf(c.dtype, dtypes) && a.dtype == c.dtype && b.dtype == c.dtype, INFINI_STATUS_BAD_TENSOR_DTYPE);
    INFINICPU_REQUIRE(c.shape == a.shape && c.shape == b.shape && c.ndim() >= 1, INFINI_STATUS_BAD_TENSOR_SHAPE);
    INFINICPU_REQUIRE(!c.hasBroadcast(), INFINI_STATUS_BAD_TENSOR_STRIDES);
    d.loop = StridedLoop<3>({&c, &a, &b});
    d.dtype = c.dtype;
    d.function = function;
    return INFINI_STATUS_SUCCESS;
}

template <class Descriptor>
infiniStatus_t run(InfiniopDescriptor *desc, void *workspace, size_t workspace_size, void *c, const void *a, const void *b, void *stream) {
    return launch<Descriptor>(desc, workspace, workspace_size, {c, a, b}, stream, [=](const Descriptor &d) {
        return compute(d, static_cast<char *>(c), static_cast<const char *>(a), static_cast<const char *>(b));
    });
}

struct SiluAndMulDescriptor final : InfiniopDescriptor {
    static constexpr const char *KIND = "silu_and_mul";
    infiniDtype_t dtype;
    size_t rows, dim;
};

} // namespace

#define FLOAT_DTYPES INFINI_DTYPE_F16, INFINI_DTYPE_F32, INFINI_DTYPE_F64, INFINI_DTYPE_BF16

infiniStatus_t infiniopCreateAddDescriptor(infiniopHandle_t handle, infiniopAddDescriptor_t *desc_ptr, infiniopTensorDescriptor_t c, infiniopTensorDescriptor_t a, infiniopTensorDescriptor_t b) {
    return createOperator<AddDescriptor>(handle, desc_ptr, {c, a, b}, [](AddDescriptor &d) { return check(d, Function::ADD, {FLOAT_DTYPES, INFINI_DTYPE_I32, INFINI_DTYPE_I64}); });
}
INFINICPU_DEFINE_WORKSPACE_SIZE(Add)
infiniStatus_t infiniopAdd(infiniopAddDescriptor_t desc, void *workspace, size_t workspace_size, void *c, const void *a, const void *b, void *stream) {
    return run<AddDescriptor>(desc, workspace, workspace_size, c, a, b, stream);
}
INFINICPU_DEFINE_DESTROY(Add)

infiniStatus_t infiniopCreateMulDescriptor(infiniopHandle_t handle, infiniopMulDescriptor_t *desc_ptr, infiniopTensorDescriptor_t c, infiniopTensorDescriptor_t a, infiniopTensorDescriptor_t b) {
    return createOperator<MulDescriptor>(handle, desc_ptr, {c, a, b}, [](MulDescriptor &d) { return check(d, Function::MUL, {FLOAT_DTYPES}); });
}
INFINICPU_DEFINE_WORKSPACE_SIZE(Mul)
infiniStatus_t infiniopMul(infiniopMulDescriptor_t desc, void *workspace, size_t workspace_size, void *c, const void *a, const void *b, void *stream) {
    return run<MulDescriptor>(desc, workspace, workspace_size, c, a, b, stream);
}
INFINICPU_DEFINE_DESTROY(Mul)

infiniStatus_t infiniopCreateSiluDescriptor(infiniopHandle_t handle, infiniopSiluDescriptor_t *desc_ptr, infiniopTensorDescriptor_t output, infiniopTensorDescriptor_t input) {
    return createOperator<SiluDescriptor>(handle, desc_ptr, {output, input}, [](SiluDescriptor &d) { return check(d, Function::SILU, {FLOAT_DTYPES}); });
}
INFINICPU_DEFINE_WORKSPACE_SIZE(Silu)
infiniStatus_t infiniopSilu(infiniopSiluDescriptor_t desc, void *workspace, size_t workspace_size, void *output, const void *input, void *stream) {
    return launch<SiluDescriptor>(desc, workspace, workspace_size, {output, input}, stream, [=](const SiluDescriptor &d) {
        return compute(d, static_cast<char *>(output), static_cast<const char *>(input), static_cast<const char *>(input));
    });
}
INFINICPU_DEFINE_DESTROY(Silu)

infiniStatus_t infiniopCreateSwiGLUDescriptor(infiniopHandle_t handle, infiniopSwiGLUDescriptor_t *desc_ptr, infiniopTensorDescriptor_t c_desc, infiniopTensorDescriptor_t a_desc, infiniopTensorDescriptor_t b_desc) {
    return createOperator<SwiGLUDescriptor>(handle, desc_ptr, {c_desc, a_desc, b_desc}, [](SwiGLUDescriptor &d) { return check(d, Function::SWIGLU, {FLOAT_DTYPES}); });
}
INFINICPU_DEFINE_WORKSPACE_SIZE(SwiGLU)
infiniStatus_t infiniopSwiGLU(infiniopSwiGLUDescriptor_t desc, void *workspace, size_t workspace_size, void *c, const void *a, const void *b, void *stream) {
    return run<SwiGLUDescriptor>(desc, workspace, workspace_size, c, a, b, stream);
}
INFINICPU_DEFINE_DESTROY(SwiGLU)

infiniStatus_t infiniopCreateSiluAndMulDescriptor(infiniopHandle_t handle, infiniopSiluAndMulDescriptor_t *desc_ptr, infiniopTensorDescriptor_t output, infiniopTensorDescriptor_t input) {
    return createOperator<SiluAndMulDescriptor>(handle, desc_ptr, {output, input}, [&](SiluAndMulDescriptor &d) {
        INFINICPU_REQUIRE(isOneOf(output->dtype, {INFINI_DTYPE_F16, INFINI_DTYPE_F32, INFINI_DTYPE_BF16}) && input->dtype == output->dtype, INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(input->ndim() == output->ndim(), INFINI_STATUS_BAD_PARAM);
        INFINICPU_REQUIRE(output->ndim() >= 1, INFINI_STATUS_BAD_TENSOR_SHAPE);
        const size_t last = output->ndim() - 1;
        INFINICPU_REQUIRE(input->dim(last) == 2 * output->dim(last), INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(std::equal(output->shape.begin(), output->shape.end() - 1, input->shape.begin()), INFINI_STATUS_BAD_TENSOR_SHAPE);
        // InfiniCore ignores the strides here and would read the wrong elements.
        INFINICPU_REQUIRE(input->isContiguous() && output->isContiguous(), INFINI_STATUS_BAD_TENSOR_STRIDES);
        d.dtype = output->dtype;
        d.dim = output->dim(last);
        d.rows = d.dim == 0 ? 0 : output->numel() / d.dim;
        return INFINI_STATUS_SUCCESS;
    });
}
INFINICPU_DEFINE_WORKSPACE_SIZE(SiluAndMul)
infiniStatus_t infiniopSiluAndMul(infiniopSiluAndMulDescriptor_t desc, void *workspace, size_t workspace_size, void *output, const void *input, void *stream) {
    return launch<SiluAndMulDescriptor>(desc, workspace, workspace_size, {output, input}, stream, [=](const SiluAndMulDescriptor &d) {
        const size_t bytes = d.dim * sizeOf(d.dtype);
        parallelFor(0, d.rows, d.dim == 0 ? 1 : std::max<size_t>(1, PIECE_ELEMENTS / d.dim), [&](size_t from, size_t to) {
            for (size_t row = from; row < to; ++row) {
                const char *gate = static_cast<const char *>(input) + row * 2 * bytes;
                kernels().swiglu[floatIndex(d.dtype)](d.dim, static_cast<char *>(output) + row * bytes, gate + bytes, gate);
            }
        });
        return INFINI_STATUS_SUCCESS;
    });
}
INFINICPU_DEFINE_DESTROY(SiluAndMul)

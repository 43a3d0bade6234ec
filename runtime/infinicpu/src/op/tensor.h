#ifndef INFINICPU_OP_TENSOR_H_
#define INFINICPU_OP_TENSOR_H_

#include <infinicore.h>
#include <infiniop/operator_descriptor.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

// The structs behind infiniop's opaque handles.

struct InfiniopHandle {
    infiniDevice_t device;
    int device_id;
};

struct InfiniopTensorDescriptor {
    infiniDtype_t dtype = INFINI_DTYPE_INVALID;
    std::vector<size_t> shape;
    std::vector<ptrdiff_t> strides; // in elements
    bool present = true;            // false for an optional operand that was NULL

    size_t ndim() const { return shape.size(); }
    size_t dim(size_t i) const { return shape[i]; }
    ptrdiff_t stride(size_t i) const { return strides[i]; }
    size_t numel() const;
    // Dimensions of length 1 may have any stride.
    bool isContiguous() const;
    // A stride of 0 along a dimension longer than 1.
    bool hasBroadcast() const;
};

namespace infinicpu {
struct SimulatedOperator;
}

struct InfiniopDescriptor {
    // Whether the op's call takes a workspace at all.
    static constexpr bool TAKES_WORKSPACE = true;

    infiniDevice_t device_type = INFINI_DEVICE_CPU;
    int device_id = 0;
    const char *const *kind = nullptr; // &Derived::KIND: which operator this is, and its name
    std::vector<InfiniopTensorDescriptor> operands;
    size_t workspace_size = 0;
    std::shared_ptr<infinicpu::SimulatedOperator> simulated; // on a simulated device: see simulation.h

    virtual ~InfiniopDescriptor() = default;
};

namespace infinicpu {

using TensorDescriptor = InfiniopTensorDescriptor;

const TensorDescriptor &absentTensor();

// Bytes of one element; 0 for an unknown dtype.
size_t sizeOf(infiniDtype_t dtype);
bool isAnyInteger(infiniDtype_t dtype);

inline bool isOneOf(infiniDtype_t dtype, std::initializer_list<infiniDtype_t> allowed) {
    for (infiniDtype_t candidate : allowed) {
        if (dtype == candidate) {
            return true;
        }
    }
    return false;
}

// Position of a floating dtype in the kernels' tables; f64 is not there.
enum FloatIndex { INDEX_F32 = 0,
                  INDEX_F16 = 1,
                  INDEX_BF16 = 2,
                  NUM_FLOATS = 3 };
inline FloatIndex floatIndex(infiniDtype_t dtype) {
    return dtype == INFINI_DTYPE_F16 ? INDEX_F16 : (dtype == INFINI_DTYPE_BF16 ? INDEX_BF16 : INDEX_F32);
}

// Element i of an integer tensor. Values of u64 beyond int64_t become negative: out of every table's range.
inline int64_t readInteger(const void *data, infiniDtype_t dtype, ptrdiff_t i) {
    switch (dtype) {
    case INFINI_DTYPE_I8:
        return static_cast<const int8_t *>(data)[i];
    case INFINI_DTYPE_I16:
        return static_cast<const int16_t *>(data)[i];
    case INFINI_DTYPE_I32:
        return static_cast<const int32_t *>(data)[i];
    case INFINI_DTYPE_U8:
        return static_cast<const uint8_t *>(data)[i];
    case INFINI_DTYPE_U16:
        return static_cast<const uint16_t *>(data)[i];
    case INFINI_DTYPE_U32:
        return static_cast<const uint32_t *>(data)[i];
    default:
        return static_cast<const int64_t *>(data)[i];
    }
}

} // namespace infinicpu

// Leaves the enclosing function with STATUS unless CONDITION holds.
#define INFINICPU_REQUIRE(CONDITION, STATUS) \
    do {                                     \
        if (!(CONDITION)) {                  \
            return STATUS;                   \
        }                                    \
    } while (0)

#endif // INFINICPU_OP_TENSOR_H_

// What the C++ tests share: buffers of exactly the needed size, so that a sanitizer sees every byte read or written
// beyond them, and a way to create, call and destroy an operator.

#ifndef INFINICPU_TESTS_HARNESS_HPP_
#define INFINICPU_TESTS_HARNESS_HPP_

#include <infiniccl.h>
#include <infinicpu.h>
#include <infiniop.h>
#include <infinirt.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#define CHECK(CONDITION)                                                                    \
    do {                                                                                    \
        if (!(CONDITION)) {                                                                 \
            std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #CONDITION); \
            std::exit(1);                                                                   \
        }                                                                                   \
    } while (0)

#define OK(CALL) CHECK((CALL) == INFINI_STATUS_SUCCESS)

inline size_t bytesOf(infiniDtype_t dtype) {
    switch (dtype) {
    case INFINI_DTYPE_F16:
    case INFINI_DTYPE_BF16:
        return 2;
    case INFINI_DTYPE_I64:
        return 8;
    default:
        return 4;
    }
}

// A tensor on the heap. Values are small and of either sign, whatever the dtype.
class Tensor {
public:
    Tensor(infiniDtype_t dtype, std::vector<size_t> shape, std::vector<ptrdiff_t> strides = {})
        : _dtype(dtype) {
        OK(infiniopCreateTensorDescriptor(&_desc, shape.size(), shape.data(), strides.empty() ? nullptr : strides.data(), dtype));
        size_t last = 0;
        size_t count = 1;
        for (size_t i = 0; i < shape.size(); ++i) {
            count *= shape[i];
            if (!strides.empty() && shape[i] != 0) {
                last += (shape[i] - 1) * size_t(strides[i]);
            }
        }
        _count = count == 0 ? 0 : (strides.empty() ? count : last + 1);
        _data.reset(new char[_count * bytesOf(dtype)]); // to the byte
        fill(_count);
    }
    ~Tensor() { infiniopDestroyTensorDescriptor(_desc); }
    Tensor(const Tensor &) = delete;
    Tensor &operator=(const Tensor &) = delete;

    infiniopTensorDescriptor_t desc() const { return _desc; }
    void *data() const { return _data.get(); }
    size_t count() const { return _count; }

    template <class T>
    T *as() const { return reinterpret_cast<T *>(_data.get()); }

    void setIntegers(const std::vector<int64_t> &values) {
        CHECK(values.size() == _count);
        for (size_t i = 0; i < _count; ++i) {
            if (bytesOf(_dtype) == 8) {
                as<int64_t>()[i] = values[i];
            } else {
                as<int32_t>()[i] = int32_t(values[i]);
            }
        }
    }

private:
    void fill(size_t seed) {
        std::mt19937 random(static_cast<unsigned>(seed + 17));
        std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
        for (size_t i = 0; i < _count; ++i) {
            const float value = uniform(random);
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof(bits));
            if (_dtype == INFINI_DTYPE_F32) {
                as<float>()[i] = value;
            } else if (_dtype == INFINI_DTYPE_BF16) {
                as<uint16_t>()[i] = uint16_t(bits >> 16);
            } else if (_dtype == INFINI_DTYPE_F16) {
                as<uint16_t>()[i] = uint16_t((bits >> 16 & 0x8000) | 0x3000 | (bits >> 13 & 0x3ff)); // 2^-3 .. 2^-2
            } else if (bytesOf(_dtype) == 8) {
                as<int64_t>()[i] = int64_t(i % 2);
            } else {
                as<int32_t>()[i] = int32_t(i % 2);
            }
        }
    }

    infiniDtype_t _dtype;
    infiniopTensorDescriptor_t _desc = nullptr;
    size_t _count = 0;
    std::unique_ptr<char[]> _data;
};

// The handle of the calling thread's device.
inline infiniopHandle_t makeHandle() {
    infiniopHandle_t handle;
    OK(infiniopCreateHandle(&handle));
    return handle;
}

// RUN(Gemm, handle, (c.desc(), ...), (c.data(), ..., 1.0f, 0.0f)): create, workspace, call, destroy.
#define UNPACK(...) __VA_ARGS__
#define RUN(NAME, HANDLE, CREATE, CALL)                                                            \
    do {                                                                                           \
        infiniop##NAME##Descriptor_t operator_desc;                                                \
        OK(infiniopCreate##NAME##Descriptor(HANDLE, &operator_desc, UNPACK CREATE));               \
        size_t workspace_bytes;                                                                    \
        OK(infiniopGet##NAME##WorkspaceSize(operator_desc, &workspace_bytes));                     \
        std::unique_ptr<char[]> workspace(new char[workspace_bytes]);                              \
        OK(infiniop##NAME(operator_desc, workspace.get(), workspace_bytes, UNPACK CALL, nullptr)); \
        OK(infiniopDestroy##NAME##Descriptor(operator_desc));                                      \
    } while (0)

#define RUN_WITHOUT_WORKSPACE(NAME, HANDLE, CREATE, CALL)                            \
    do {                                                                             \
        infiniop##NAME##Descriptor_t operator_desc;                                  \
        OK(infiniopCreate##NAME##Descriptor(HANDLE, &operator_desc, UNPACK CREATE)); \
        OK(infiniop##NAME(operator_desc, UNPACK CALL, nullptr));                     \
        OK(infiniopDestroy##NAME##Descriptor(operator_desc));                        \
    } while (0)

#endif // INFINICPU_TESTS_HARNESS_HPP_

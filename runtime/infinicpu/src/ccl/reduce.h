#ifndef INFINICPU_CCL_REDUCE_H_
#define INFINICPU_CCL_REDUCE_H_

#include <infiniccl.h>

// What moves and reduces the elements: serial functions on plain pointers.

namespace infiniccl_cpu {

// One rank's buffers in an operation. Which of them is used depends on the operation and the rank.
struct Buffers {
    const char *send = nullptr;
    char *recv = nullptr;
};

// The buffers of parties [first, last), all of them `offset` bytes further on.
struct Side {
    const Buffers *parties;
    size_t first, last;
    size_t offset;

    size_t size() const { return last - first; }
    const char *send(size_t i) const { return parties[first + i].send + offset; }
    char *recv(size_t i) const { return parties[first + i].recv + offset; }
};

// Bytes of one element; 0 for what is no dtype.
size_t elementSize(infiniDtype_t dtype);

// "bf16"; "invalid" for what is no dtype.
const char *dtypeName(infiniDtype_t dtype);

// Bytes that a pointer must be a multiple of to be reduced; 0 where this dtype has no such reduction. Those that have
// none: 8-bit floats (the ABI does not say which format) and complex numbers of them; the product, maximum and
// minimum of complex numbers; the average of truth values.
size_t reduceAlignment(infiniDtype_t dtype, infinicclReduceOp_t op);

// Elements [0, count) of every source into every destination: copied if there is one source, else reduced in the
// sources' order. A destination may be one of the sources; all sources of a block are read before any is written.
// A sum of integers wraps around, an average of integers is rounded towards zero, a NaN makes a maximum NaN.
void combine(infiniDtype_t dtype, infinicclReduceOp_t op, const Side &sources, const Side &destinations, size_t count) noexcept;

} // namespace infiniccl_cpu

#endif // INFINICPU_CCL_REDUCE_H_

#ifndef INFINICPU_SIM_RECORD_H_
#define INFINICPU_SIM_RECORD_H_

#include <infinicore.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

// What a simulated device can do: see infinicpuSimulate in infinicpu.h for the text that it is read from.

namespace infinirt_cpu {

// One operator. Operands are counted in create's order, outputs first. Empty, 0 and false: no limit.
struct OpRecord {
    std::vector<infiniDtype_t> dtypes;
    std::vector<infiniDtype_t> index_dtypes;
    std::vector<size_t> head_dims;
    bool uncertain = false;
    bool graph_capture = false;
    std::vector<size_t> ranks;
    size_t last_multiple = 0;
    bool row_major_output = false;
    std::vector<infiniDtype_t> single_batch_dtypes;
    std::vector<std::pair<float, float>> alphas;
    std::vector<size_t> unit_last_stride;
    std::vector<size_t> packed_heads;
    std::vector<size_t> contiguous;
    size_t max_row_bytes = 0;
    std::vector<size_t> clobbers;
};

struct Record {
    infiniDevice_t device = INFINI_DEVICE_CPU;
    std::string name;
    bool graph_capture = false;
    bool uncertain_ok = false; // operators marked as uncertain may be used
    std::vector<std::string> collectives;
    std::vector<infiniDtype_t> collective_dtypes;
    bool collective_capture = false;
    std::map<std::string, OpRecord> ops;
};

// The record registered for a type of device, or nullptr. It stays valid after it was replaced or forgotten.
__export const Record *recordOf(infiniDevice_t device);

// "ascend", as its record names it.
std::string deviceName(infiniDevice_t device);

// "f32"; "?" for what is none.
__export const char *dtypeName(infiniDtype_t dtype);

// Reads a record. On failure `error` says where and why.
bool parseRecord(const std::string &text, Record *record, std::string *error);

} // namespace infinirt_cpu

#endif // INFINICPU_SIM_RECORD_H_

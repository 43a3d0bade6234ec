#include "simulation.h"

#include "../rt/stream.h"
#include "../sim/memory.h"
#include "../sim/queue.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

namespace infinicpu {

namespace {

using namespace infinirt_cpu;

// Added to what the CPU needs: other devices need a workspace where the CPU has none, so it must be asked for.
constexpr size_t EXTRA_WORKSPACE = 256;

// Operands whose dtypes the record names: `main` has one of "dtypes", `indices` one of "index_dtypes".
struct DtypeOperands {
    size_t main;
    std::vector<size_t> indices;
};

const DtypeOperands &dtypeOperands(const std::string &op) {
    static const std::map<std::string, DtypeOperands> table = {
        {"rope", {0, {2}}},
        {"embedding", {0, {1}}},
        {"random_sample", {1, {0}}},
        {"paged_attention", {0, {4, 5}}},
        {"paged_attention_prefill", {0, {4, 5, 6}}},
        {"paged_caching", {0, {4}}},
        {"kv_caching", {0, {4}}},
    };
    static const DtypeOperands others = {0, {}};
    const auto it = table.find(op);
    return it != table.end() ? it->second : others;
}

template <class T>
bool contains(const std::vector<T> &list, T value) {
    return std::find(list.begin(), list.end(), value) != list.end();
}

std::string numbers(const std::vector<size_t> &list) {
    std::string text;
    for (size_t value : list) {
        text += (text.empty() ? "" : ", ") + std::to_string(value);
    }
    return text;
}

std::string dtypes(const std::vector<infiniDtype_t> &list) {
    std::string text;
    for (infiniDtype_t value : list) {
        text += (text.empty() ? "" : ", ") + std::string(dtypeName(value));
    }
    return text;
}

// The operator that a report is about.
struct Reporter {
    const InfiniopDescriptor &desc;

    infiniStatus_t operator()(infiniStatus_t status, const std::string &text) const {
        return violation(desc.device_type, status, std::string(*desc.kind) + ": " + text);
    }
};

// The operands of a list that are there and have at least one dimension.
template <class Visit>
infiniStatus_t forOperands(const InfiniopDescriptor &d, const std::vector<size_t> &list, Visit &&visit) {
    for (size_t i : list) {
        if (i < d.operands.size() && d.operands[i].present && d.operands[i].ndim() != 0) {
            const infiniStatus_t status = visit(d.operands[i], "operand " + std::to_string(i));
            INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
        }
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t checkDtypes(const InfiniopDescriptor &d, const OpRecord &rule) {
    const Reporter refuse{d};
    const DtypeOperands &positions = dtypeOperands(*d.kind);
    const infiniDtype_t dtype = d.operands[positions.main].dtype;
    if (!contains(rule.dtypes, dtype)) {
        return refuse(INFINI_STATUS_BAD_TENSOR_DTYPE, "takes " + dtypes(rule.dtypes) + ", not " + dtypeName(dtype));
    }
    for (size_t i : positions.indices) {
        const infiniDtype_t index = d.operands[i].dtype;
        if (!rule.index_dtypes.empty() && !contains(rule.index_dtypes, index)) {
            return refuse(INFINI_STATUS_BAD_TENSOR_DTYPE, "takes indices in " + dtypes(rule.index_dtypes) + ", not " + dtypeName(index));
        }
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t checkShape(const InfiniopDescriptor &d, const OpRecord &rule) {
    const Reporter report{d};
    const auto refuse = [&](const std::string &text) { return report(INFINI_STATUS_BAD_TENSOR_SHAPE, text); };
    const TensorDescriptor &first = d.operands[0];
    if (!rule.ranks.empty() && !contains(rule.ranks, first.ndim())) {
        return refuse("takes operands of rank " + numbers(rule.ranks) + ", not " + std::to_string(first.ndim()));
    }
    if (first.ndim() == 0) {
        return INFINI_STATUS_SUCCESS;
    }
    const size_t last = first.shape.back();
    if (rule.last_multiple != 0 && last % rule.last_multiple != 0) {
        return refuse("the last dimension " + std::to_string(last) + " is no multiple of " + std::to_string(rule.last_multiple));
    }
    if (!rule.head_dims.empty() && !contains(rule.head_dims, last)) {
        return refuse("takes heads of " + numbers(rule.head_dims) + ", not " + std::to_string(last));
    }
    if (first.ndim() == 3 && first.dim(0) > 1 && contains(rule.single_batch_dtypes, first.dtype)) {
        return refuse("a batch of " + std::to_string(first.dim(0)) + " is wrong in " + dtypeName(first.dtype));
    }
    const size_t row_bytes = last * sizeOf(first.dtype);
    if (rule.max_row_bytes != 0 && row_bytes > rule.max_row_bytes) {
        return refuse("a row of " + std::to_string(row_bytes) + " bytes is longer than " + std::to_string(rule.max_row_bytes));
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t checkStrides(const InfiniopDescriptor &d, const OpRecord &rule) {
    const Reporter report{d};
    const auto refuse = [&](const std::string &text) { return report(INFINI_STATUS_BAD_TENSOR_STRIDES, text); };
    const TensorDescriptor &first = d.operands[0];
    if (rule.row_major_output && first.ndim() >= 2 && first.stride(first.ndim() - 2) == 1) {
        return refuse("the output's row stride is 1: it must be row-major");
    }
    infiniStatus_t status = forOperands(d, rule.unit_last_stride, [&](const TensorDescriptor &tensor, const std::string &name) {
        const ptrdiff_t stride = tensor.strides.back();
        return stride == 1 ? INFINI_STATUS_SUCCESS : refuse(name + "'s last stride is " + std::to_string(stride) + ", not 1");
    });
    INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
    status = forOperands(d, rule.packed_heads, [&](const TensorDescriptor &tensor, const std::string &name) {
        const bool packed = tensor.ndim() != 3 || tensor.dim(1) <= 1 || tensor.stride(1) == ptrdiff_t(tensor.dim(2));
        return packed ? INFINI_STATUS_SUCCESS : refuse(name + "'s heads do not lie one after the other");
    });
    INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
    return forOperands(d, rule.contiguous, [&](const TensorDescriptor &tensor, const std::string &name) {
        return tensor.isContiguous() ? INFINI_STATUS_SUCCESS : refuse(name + " is not contiguous");
    });
}

infiniStatus_t checkRecord(const InfiniopDescriptor &d, const Record &record, const OpRecord *rule) {
    const Reporter refuse{d};
    if (rule == nullptr) {
        return refuse(INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED, "this device has none");
    }
    if (rule->uncertain && !record.uncertain_ok) {
        return refuse(INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED, "uncertain on this device");
    }
    for (const auto check : {checkDtypes, checkShape, checkStrides}) {
        const infiniStatus_t status = check(d, *rule);
        INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
    }
    return INFINI_STATUS_SUCCESS;
}

// The bytes from the first element to the last one, relative to element 0's address.
struct Span {
    ptrdiff_t begin;
    size_t bytes;
};

Span spanOf(const TensorDescriptor &tensor) {
    if (tensor.numel() == 0) {
        return {0, 0};
    }
    ptrdiff_t lowest = 0, highest = 0;
    for (size_t i = 0; i < tensor.ndim(); ++i) {
        const ptrdiff_t reach = ptrdiff_t(tensor.dim(i) - 1) * tensor.stride(i);
        (reach < 0 ? lowest : highest) += reach;
    }
    const ptrdiff_t size = ptrdiff_t(sizeOf(tensor.dtype));
    return {lowest * size, size_t((highest - lowest + 1) * size)};
}

// Fills every element, and nothing between them.
void poisonElements(const TensorDescriptor &tensor, char *data) {
    const size_t size = sizeOf(tensor.dtype);
    const size_t count = tensor.numel();
    if (tensor.isContiguous()) {
        std::memset(data, POISON, count * size);
        return;
    }
    for (size_t i = 0; i < count; ++i) {
        ptrdiff_t offset = 0;
        size_t rest = i;
        for (size_t dim = tensor.ndim(); dim-- > 0; rest /= tensor.dim(dim)) {
            offset += ptrdiff_t(rest % tensor.dim(dim)) * tensor.stride(dim);
        }
        std::memset(data + offset * ptrdiff_t(size), POISON, size);
    }
}

// One call: everything that it needs, for running it any number of times.
class Launch {
public:
    Launch(InfiniopDescriptor *desc, const SimulatedCall &call)
        : _desc(desc), _operator(desc->simulated), _kind(*desc->kind), _device(desc->device_type),
          _workspace(call.workspace), _workspace_size(call.workspace_size), _data(call.data), _run(call.run) {
        _operator->waiting.fetch_add(1);
    }
    ~Launch() { _operator->waiting.fetch_sub(1); }
    Launch(const Launch &) = delete;
    Launch &operator=(const Launch &) = delete;

    // Whether every operand, and the workspace, lies in the device's memory.
    infiniStatus_t checkMemory() const {
        for (size_t i = 0; i < _data.size(); ++i) {
            const Span span = spanOf(_desc->operands[i]);
            const std::string what = std::string(_kind) + ": operand " + std::to_string(i);
            const infiniStatus_t status = checkSpan(static_cast<const char *>(_data[i]) + span.begin, span.bytes, what.c_str());
            INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
        }
        return checkSpan(_workspace, _workspace != nullptr ? _workspace_size : 0, (std::string(_kind) + ": the workspace").c_str());
    }

    infiniStatus_t operator()() const {
        const std::lock_guard<std::mutex> lock(_operator->mutex);
        if (_operator->destroyed) {
            return violation(_device, INFINI_STATUS_BAD_PARAM, std::string(_kind) + ": its descriptor was destroyed before it ran");
        }
        infiniStatus_t status = checkMemory(); // memory may have been freed since the call
        INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
        if (_workspace != nullptr) {
            std::memset(_workspace, POISON, _workspace_size);
        }
        status = _run(*_desc);
        if (status != INFINI_STATUS_SUCCESS) {
            return violation(_device, status, std::string(_kind) + ": failed with status " + std::to_string(int(status)) + " when it ran");
        }
        destroyInputs();
        return INFINI_STATUS_SUCCESS;
    }

private:
    void destroyInputs() const {
        const TensorDescriptor &output = _desc->operands[0];
        for (size_t i : _operator->rule->clobbers) {
            if (i >= _data.size() || _data[i] == nullptr) {
                continue;
            }
            const TensorDescriptor &input = _desc->operands[i];
            const bool in_place = _data[i] == _data[0] && input.shape == output.shape && input.strides == output.strides;
            if (input.numel() != 0 && !in_place) {
                poisonElements(input, static_cast<char *>(const_cast<void *>(_data[i])));
            }
        }
    }

    InfiniopDescriptor *const _desc; // only while the operator is not destroyed
    const std::shared_ptr<SimulatedOperator> _operator;
    const char *const _kind;
    const infiniDevice_t _device;
    void *const _workspace;
    const size_t _workspace_size;
    const std::vector<const void *> _data;
    const std::function<infiniStatus_t(const InfiniopDescriptor &)> _run;
};

} // namespace

infiniStatus_t simulateOperator(InfiniopDescriptor &made, bool takes_workspace, const std::function<infiniStatus_t()> &check) {
    const Record *record = recordOf(made.device_type);
    if (record == nullptr) {
        return made.device_type == INFINI_DEVICE_CPU ? check() : INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    }
    const auto it = record->ops.find(*made.kind);
    const OpRecord *rule = it != record->ops.end() ? &it->second : nullptr;
    infiniStatus_t status = checkRecord(made, *record, rule);
    INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
    made.simulated = std::make_shared<SimulatedOperator>();
    made.simulated->record = record;
    made.simulated->rule = rule;
    status = check();
    if (status != INFINI_STATUS_SUCCESS) {
        return Reporter{made}(status, "create refused its operands with status " + std::to_string(int(status)));
    }
    made.workspace_size += takes_workspace ? EXTRA_WORKSPACE : 0;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t simulateCall(InfiniopDescriptor *desc, SimulatedCall call, void *stream) {
    const Reporter refuse{*desc};
    if (recordOf(desc->device_type) != desc->simulated->record) {
        return refuse(INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED, "its device's record was replaced or forgotten");
    }
    const auto launch = std::make_shared<const Launch>(desc, call);
    if (!isDeferred(desc->device_type)) {
        return (*launch)();
    }
    infiniDevice_t type = INFINI_DEVICE_CPU;
    int id = 0;
    infiniStatus_t status = infinirtGetDevice(&type, &id);
    INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
    if (type != desc->device_type || id != desc->device_id) {
        return refuse(INFINI_STATUS_BAD_PARAM, "the current device is not the one that the descriptor was made for");
    }
    status = launch->checkMemory();
    INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
    const std::string why_not = std::string(*desc->kind) + ": may not be replayed, or nobody knows that it may";
    return enqueue(stream, [launch] { return (*launch)(); }, *desc->kind, desc->simulated->rule->graph_capture ? nullptr : why_not.c_str());
}

infiniStatus_t checkScalars(const InfiniopDescriptor &desc, float alpha, float beta) {
    const auto &allowed = desc.simulated->rule->alphas;
    if (allowed.empty() || contains(allowed, std::make_pair(alpha, beta))) {
        return INFINI_STATUS_SUCCESS;
    }
    char text[96];
    std::snprintf(text, sizeof(text), "alpha %g with beta %g was not planned at create", double(alpha), double(beta));
    return Reporter{desc}(INFINI_STATUS_INSUFFICIENT_WORKSPACE, text);
}

infiniStatus_t destroySimulated(InfiniopDescriptor *desc) {
    const std::shared_ptr<SimulatedOperator> shared = desc->simulated;
    infiniStatus_t status = INFINI_STATUS_SUCCESS;
    const std::lock_guard<std::mutex> lock(shared->mutex);
    if (shared->waiting.load() != 0) {
        status = Reporter{*desc}(INFINI_STATUS_BAD_PARAM, "the descriptor is destroyed while queued or captured work needs it");
    }
    shared->destroyed = true;
    delete desc;
    return status;
}

} // namespace infinicpu

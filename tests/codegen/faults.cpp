// Stands between an engine and InfiniCore: compiled into the engine's own library (see faulty.py), whose calls of the functions below end here. Each is counted by
// device, and the one that is planted fails; all others go on to the InfiniCore that is loaded.
#include <infiniccl.h>
#include <infiniop.h>
#include <infinirt.h>

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#define FAULTS_EXPORT extern "C" __attribute__((visibility("default")))

// Name, parameters, arguments.
#define FAULTS_FUNCTIONS(F)                                                                                                                         \
    F(infinirtMalloc, (void **p, size_t size), (p, size))                                                                                           \
    F(infinirtMallocHost, (void **p, size_t size), (p, size))                                                                                       \
    F(infinirtFree, (void *p), (p))                                                                                                                 \
    F(infinirtFreeHost, (void *p), (p))                                                                                                             \
    F(infinirtMemcpy, (void *to, const void *from, size_t size, infinirtMemcpyKind_t kind), (to, from, size, kind))                                 \
    F(infinirtMemcpyAsync, (void *to, const void *from, size_t size, infinirtMemcpyKind_t kind, infinirtStream_t s), (to, from, size, kind, s))     \
    F(infinirtDeviceSynchronize, (), ())                                                                                                            \
    F(infinirtStreamSynchronize, (infinirtStream_t s), (s))                                                                                         \
    F(infinirtEventSynchronize, (infinirtEvent_t event), (event))                                                                                   \
    F(infinirtStreamBeginCapture, (infinirtStream_t s, infinirtStreamCaptureMode_t mode), (s, mode))                                                \
    F(infinirtStreamEndCapture, (infinirtStream_t s, infinirtGraph_t *graph), (s, graph))                                                           \
    F(infinirtGraphInstantiate, (infinirtGraphExec_t *exec, infinirtGraph_t graph, infinirtGraphNode_t *node, char *log, size_t size), (exec, graph, node, log, size)) \
    F(infinirtGraphLuanch, (infinirtGraphExec_t exec, infinirtStream_t s), (exec, s))                                                               \
    F(infiniopCreateTensorDescriptor, (infiniopTensorDescriptor_t * desc, size_t ndim, const size_t *shape, const ptrdiff_t *strides, infiniDtype_t dtype), (desc, ndim, shape, strides, dtype)) \
    F(infiniopGemm, (infiniopGemmDescriptor_t desc, void *workspace, size_t size, void *c, const void *a, const void *b, float alpha, float beta, void *s), (desc, workspace, size, c, a, b, alpha, beta, s)) \
    F(infiniopRandomSample, (infiniopRandomSampleDescriptor_t desc, void *workspace, size_t size, void *result, const void *probs, float random, float topp, int topk, float temperature, void *s), (desc, workspace, size, result, probs, random, topp, topk, temperature, s)) \
    F(infinicclAllReduce, (void *from, void *to, size_t count, infiniDtype_t dtype, infinicclReduceOp_t op, infinicclComm_t comm, infinirtStream_t s), (from, to, count, dtype, op, comm, s)) \
    F(infinicclAllGather, (void *from, void *to, size_t count, infiniDtype_t dtype, infinicclComm_t comm, infinirtStream_t s), (from, to, count, dtype, comm, s))

namespace {

enum Function {
#define FAULTS_ENUM(NAME, PARAMS, ARGS) AT_##NAME,
    FAULTS_FUNCTIONS(FAULTS_ENUM)
#undef FAULTS_ENUM
};

const char *const NAMES[] = {
#define FAULTS_NAME(NAME, PARAMS, ARGS) #NAME,
    FAULTS_FUNCTIONS(FAULTS_NAME)
#undef FAULTS_NAME
};
constexpr int DEVICES = 16;

std::atomic<uint64_t> counts[std::size(NAMES)][DEVICES];
std::atomic<int64_t> live_allocations{0}, failed_frees{0};

// What fails: the call of `function` on `device` (any, if negative) before which `left` more go well.
std::atomic<int> planted_function{-1}, planted_device{-1}, planted_status{0};
std::atomic<int64_t> planted_left{0};

int indexOf(const char *name) {
    for (size_t i = 0; i < std::size(NAMES); ++i) {
        if (std::strcmp(NAMES[i], name) == 0) {
            return static_cast<int>(i);
        }
    }
    std::fprintf(stderr, "faults: %s is not one of the functions here\n", name);
    std::abort();
}

// Counts a call. Its planted status, or success: let it through.
infiniStatus_t enter(Function function) {
    infiniDevice_t type;
    int device = 0;
    infinirtGetDevice(&type, &device);
    counts[function][device % DEVICES].fetch_add(1);
    const int where = planted_device.load();
    if (planted_function.load() == function && (where < 0 || where == device) && planted_left.fetch_sub(1) == 0) {
        return static_cast<infiniStatus_t>(planted_status.load());
    }
    return INFINI_STATUS_SUCCESS;
}

void leave(Function function, infiniStatus_t status) {
    const bool good = status == INFINI_STATUS_SUCCESS;
    if (function == AT_infinirtMalloc || function == AT_infinirtMallocHost) {
        live_allocations += good;
    } else if (function == AT_infinirtFree || function == AT_infinirtFreeHost) {
        live_allocations -= good;
        failed_frees += !good;
    }
}

// InfiniCore's libraries are in the process's global scope; this library is not.
template <typename Pointer>
Pointer real(const char *name) {
    void *found = dlsym(RTLD_DEFAULT, name);
    if (!found) {
        std::fprintf(stderr, "faults: no %s is loaded\n", name);
        std::abort();
    }
    return reinterpret_cast<Pointer>(found);
}

} // namespace

// What ends something fails after it has ended it: a stream whose capture went wrong captures no more, and one that reports a failed kernel has nothing left to do.
constexpr bool endsSomething(Function function) { return function == AT_infinirtStreamSynchronize || function == AT_infinirtStreamEndCapture; }

#define FAULTS_DEFINE(NAME, PARAMS, ARGS)                                         \
    infiniStatus_t NAME PARAMS {                                                  \
        static const auto next = real<decltype(&NAME)>(#NAME);                    \
        const infiniStatus_t planted = enter(AT_##NAME);                          \
        if (planted != INFINI_STATUS_SUCCESS && !endsSomething(AT_##NAME)) {      \
            return planted;                                                       \
        }                                                                         \
        const infiniStatus_t status = next ARGS;                                  \
        leave(AT_##NAME, status);                                                 \
        return planted != INFINI_STATUS_SUCCESS ? planted : status;               \
    }
FAULTS_FUNCTIONS(FAULTS_DEFINE)

FAULTS_EXPORT void faultsPlant(const char *function, int device, int64_t left, int status) {
    planted_function = -1;
    planted_device = device;
    planted_status = status;
    planted_left = left;
    planted_function = function ? indexOf(function) : -1;
}
// Whether the planted call has come.
FAULTS_EXPORT int faultsMet() { return planted_left.load() < 0; }
FAULTS_EXPORT uint64_t faultsCount(const char *function, int device) { return counts[indexOf(function)][device % DEVICES].load(); }
FAULTS_EXPORT int64_t faultsLiveAllocations() { return live_allocations.load(); }
FAULTS_EXPORT int64_t faultsFailedFrees() { return failed_frees.load(); }

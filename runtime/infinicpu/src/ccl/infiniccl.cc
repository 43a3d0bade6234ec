// infiniccl for devices that are all this machine's memory: the ranks are threads of one process (or one thread, that
// gives the parts of several ranks in one group). On the CPU a call returns when its work is done; on a simulated
// device it is queued on its stream, so that the ranks meet where their threads synchronise.

#include "invitations.h"
#include "rendezvous.h"

#include "../rt/stream.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <string>
#include <tuple>

using infiniccl_cpu::Buffers;
using infiniccl_cpu::Clock;
using infiniccl_cpu::Group;
using infiniccl_cpu::Id;
using infiniccl_cpu::Kind;
using infiniccl_cpu::Operation;
using infiniccl_cpu::Terms;

struct InfinicclComm {
    std::shared_ptr<Group> group;
    int rank;
    infiniDevice_t device_type;
    int device_id;
    bool simulated;

    ~InfinicclComm() { group->leave(rank); }
};

namespace {

// One rank's part of one operation, with all that it takes to run it, once or (recorded in a graph) often.
struct Request {
    const char *name = "";
    std::shared_ptr<Group> group;
    int rank = 0;
    int peer = 0;
    bool simulated = false;
    Terms terms;
    Buffers buffers;
    size_t send_bytes = 0; // that are read from this rank's buffer
    size_t recv_bytes = 0; // that are written to it
};

// A request inside GroupStart and GroupEnd.
struct Pending {
    Request request;
    infiniDevice_t device_type;
    int device_id;
    infinirtStream_t stream;
};

struct OpenGroup {
    int depth = 0;
    infiniStatus_t status = INFINI_STATUS_SUCCESS; // of the first call that was refused
    std::vector<Pending> pending;
};

thread_local OpenGroup open_group;

// No exception crosses the C interface.
template <class Body>
infiniStatus_t caught(Body &&body) {
    try {
        return body();
    } catch (const std::exception &) { // out of memory, or no randomness
        return INFINI_STATUS_INTERNAL_ERROR;
    }
}

// A call of the interface. A group in which one was refused does not run.
template <class Body>
infiniStatus_t guarded(Body &&body) {
    const infiniStatus_t status = caught(body);
    if (open_group.depth != 0 && open_group.status == INFINI_STATUS_SUCCESS) {
        open_group.status = status;
    }
    return status;
}

infiniStatus_t checkSpans(const Request &request) {
    infiniStatus_t status = INFINI_STATUS_SUCCESS;
    if (request.simulated && request.send_bytes != 0) {
        status = infinirt_cpu::checkSpan(request.buffers.send, request.send_bytes, (std::string(request.name) + ": sendbuf").c_str());
    }
    if (status == INFINI_STATUS_SUCCESS && request.simulated && request.recv_bytes != 0) {
        status = infinirt_cpu::checkSpan(request.buffers.recv, request.recv_bytes, (std::string(request.name) + ": recvbuf").c_str());
    }
    return status;
}

// Everything is posted before anything is waited for: ranks that exchange buffers need not agree on an order, and one
// thread can be several ranks.
infiniStatus_t run(const std::vector<Request> &requests) {
    std::vector<std::shared_ptr<Operation>> operations(requests.size());
    infiniStatus_t first_error = INFINI_STATUS_SUCCESS;
    const auto note = [&](infiniStatus_t status) { first_error = first_error == INFINI_STATUS_SUCCESS ? status : first_error; };
    Clock::duration timeout{};
    for (size_t i = 0; i < requests.size(); ++i) {
        const Request &request = requests[i];
        timeout = std::max(timeout, request.group->timeout());
        try {
            // A part that cannot take place is posted all the same, so that the other ranks fail with it and do not wait.
            operations[i] = request.group->post(request.rank, request.peer, request.terms, request.buffers, checkSpans(request));
        } catch (const std::bad_alloc &) { // no reason to leave: the parts that are posted may be in use
            note(INFINI_STATUS_INTERNAL_ERROR);
            request.group->fail(INFINI_STATUS_INTERNAL_ERROR);
        }
    }
    const auto deadline = Clock::now() + timeout;
    for (size_t i = 0; i < requests.size(); ++i) {
        if (operations[i] != nullptr) {
            note(requests[i].group->wait(*operations[i], deadline));
        }
    }
    return first_error;
}

bool isDeferred(const Request &request, infiniDevice_t device_type) {
    return request.simulated && device_type != INFINI_DEVICE_CPU && request.terms.kind != Kind::JOIN;
}

infiniStatus_t enqueue(Request &&request, const InfinicclComm &comm, infinirtStream_t stream) {
    if (open_group.depth != 0) {
        open_group.pending.push_back({std::move(request), comm.device_type, comm.device_id, stream});
        return INFINI_STATUS_SUCCESS;
    }
    const bool deferred = isDeferred(request, comm.device_type);
    std::vector<Request> requests;
    requests.push_back(std::move(request));
    if (deferred) {
        return infinirt_cpu::submit(stream, [requests = std::move(requests)] { return caught([&] { return run(requests); }); });
    }
    return run(requests);
}

// What was queued between GroupStart and GroupEnd: at once, or as one piece of work per stream.
infiniStatus_t runGroup(std::vector<Pending> &&pending) {
    using Key = std::tuple<infiniDevice_t, int, infinirtStream_t>;
    std::vector<Request> now;
    std::map<Key, std::vector<Request>> later;
    for (Pending &one : pending) {
        const bool deferred = isDeferred(one.request, one.device_type);
        std::vector<Request> &requests = deferred ? later[{one.device_type, one.device_id, one.stream}] : now;
        requests.push_back(std::move(one.request));
    }
    infiniDevice_t device_type;
    int device_id;
    infiniStatus_t status = infinirtGetDevice(&device_type, &device_id);
    for (auto &[key, requests] : later) {
        if (status == INFINI_STATUS_SUCCESS) {
            status = infinirtSetDevice(std::get<0>(key), std::get<1>(key));
        }
        if (status == INFINI_STATUS_SUCCESS) {
            status = infinirt_cpu::submit(std::get<2>(key), [requests = std::move(requests)] { return caught([&] { return run(requests); }); });
        }
    }
    if (!later.empty()) {
        const infiniStatus_t restored = infinirtSetDevice(device_type, device_id);
        status = status == INFINI_STATUS_SUCCESS ? restored : status;
    }
    return status == INFINI_STATUS_SUCCESS ? run(now) : status;
}

// ---- Arguments ----

infiniStatus_t checkSupported(bool simulated, infiniDevice_t device_type, const char *name) {
    if (!simulated || infinirt_cpu::hasCollective(device_type, name)) {
        return INFINI_STATUS_SUCCESS;
    }
    return infinirt_cpu::violation(device_type, INFINI_STATUS_NOT_IMPLEMENTED, std::string(name) + ": not among its collectives");
}

// The buffers of one call, in elements.
struct Arguments {
    size_t send_count = 0;
    size_t recv_count = 0;
    bool reads = true; // whether this rank's sendbuf is
    // In place means that these elements of the two buffers are the same.
    size_t send_at = 0;
    size_t recv_at = 0;
};

infiniStatus_t checkBuffers(const Request &request, const Arguments &arguments) {
    const Terms &terms = request.terms;
    const size_t size = infiniccl_cpu::elementSize(terms.dtype);
    if (size == 0) {
        return INFINI_STATUS_BAD_TENSOR_DTYPE;
    }
    size_t alignment = 1;
    if (terms.kind == Kind::ALL_REDUCE || terms.kind == Kind::REDUCE_SCATTER) {
        if (unsigned(terms.op) > unsigned(INFINICCL_AVG)) {
            return INFINI_STATUS_BAD_PARAM;
        }
        alignment = infiniccl_cpu::reduceAlignment(terms.dtype, terms.op);
        if (alignment == 0) {
            return INFINI_STATUS_BAD_TENSOR_DTYPE;
        }
    }
    if (std::max(arguments.send_count, arguments.recv_count) > std::numeric_limits<ptrdiff_t>::max() / size) {
        return INFINI_STATUS_BAD_PARAM;
    }
    const uintptr_t send = uintptr_t(request.buffers.send);
    const uintptr_t recv = uintptr_t(request.buffers.recv);
    if ((arguments.send_count != 0 && send == 0) || (arguments.recv_count != 0 && recv == 0)) {
        return INFINI_STATUS_NULL_POINTER;
    }
    if (send % alignment != 0 || recv % alignment != 0) {
        return INFINI_STATUS_BAD_PARAM;
    }
    const bool overlap = arguments.reads && send < recv + arguments.recv_count * size && recv < send + arguments.send_count * size;
    const bool in_place = send + arguments.send_at * size == recv + arguments.recv_at * size;
    return overlap && !in_place ? INFINI_STATUS_BAD_PARAM : INFINI_STATUS_SUCCESS;
}

infiniStatus_t call(const char *name, infinicclComm_t comm, infinirtStream_t stream, Terms &&terms, const void *sendbuf, void *recvbuf, const Arguments &arguments, int peer = 0) {
    const infiniStatus_t supported = checkSupported(comm->simulated, comm->device_type, name);
    if (supported != INFINI_STATUS_SUCCESS) {
        return supported;
    }
    if (comm->simulated && infiniccl_cpu::elementSize(terms.dtype) != 0 && !infinirt_cpu::collectiveTakes(comm->device_type, terms.dtype)) {
        return infinirt_cpu::violation(comm->device_type, INFINI_STATUS_NOT_IMPLEMENTED, std::string(name) + ": its collectives do not take " + infiniccl_cpu::dtypeName(terms.dtype));
    }
    Request request;
    request.name = name;
    request.group = comm->group;
    request.rank = comm->rank;
    request.peer = peer;
    request.simulated = comm->simulated;
    request.terms = std::move(terms);
    request.buffers = {static_cast<const char *>(sendbuf), static_cast<char *>(recvbuf)};
    infiniStatus_t status = checkBuffers(request, arguments);
    if (status != INFINI_STATUS_SUCCESS) {
        return status;
    }
    const size_t size = infiniccl_cpu::elementSize(request.terms.dtype);
    request.send_bytes = arguments.reads ? arguments.send_count * size : 0;
    request.recv_bytes = arguments.recv_count * size;
    if (comm->simulated) {
        // As on the real devices, where a stream and its memory belong to the device that is current.
        infiniDevice_t device_type;
        int device_id;
        status = infinirtGetDevice(&device_type, &device_id);
        if (status == INFINI_STATUS_SUCCESS && (device_type != comm->device_type || device_id != comm->device_id)) {
            const std::string text = "the current device is number " + std::to_string(device_id) + " of type " + std::to_string(device_type) + ", the communicator's is number " + std::to_string(comm->device_id);
            status = infinirt_cpu::violation(comm->device_type, INFINI_STATUS_BAD_PARAM, std::string(name) + ": " + text);
        }
        if (status == INFINI_STATUS_SUCCESS) {
            status = checkSpans(request);
        }
    }
    return status == INFINI_STATUS_SUCCESS ? enqueue(std::move(request), *comm, stream) : status;
}

// The sum of a rank's counts; more than memory can hold if it overflows.
size_t total(const std::vector<size_t> &counts, size_t first_ranks) {
    size_t sum = 0;
    for (size_t i = 0; i < first_ranks; ++i) {
        sum = counts[i] > std::numeric_limits<size_t>::max() - sum ? std::numeric_limits<size_t>::max() : sum + counts[i];
    }
    return sum;
}

infiniStatus_t gather(const char *name, const void *sendbuf, void *recvbuf, std::vector<size_t> counts, infiniDtype_t dtype, infinicclComm_t comm, infinirtStream_t stream) {
    Arguments arguments;
    arguments.send_count = counts[size_t(comm->rank)];
    arguments.recv_count = total(counts, counts.size());
    arguments.recv_at = total(counts, size_t(comm->rank));
    return call(name, comm, stream, {Kind::ALL_GATHER, dtype, INFINICCL_SUM, 0, std::move(counts)}, sendbuf, recvbuf, arguments);
}

infiniStatus_t scatter(const char *name, const void *sendbuf, void *recvbuf, std::vector<size_t> counts, infiniDtype_t dtype, infinicclReduceOp_t op, infinicclComm_t comm, infinirtStream_t stream) {
    Arguments arguments;
    arguments.send_count = total(counts, counts.size());
    arguments.recv_count = counts[size_t(comm->rank)];
    arguments.send_at = total(counts, size_t(comm->rank));
    return call(name, comm, stream, {Kind::REDUCE_SCATTER, dtype, op, 0, std::move(counts)}, sendbuf, recvbuf, arguments);
}

infiniStatus_t transfer(const char *name, const void *sendbuf, void *recvbuf, size_t count, infiniDtype_t dtype, int peer, infinicclComm_t comm, infinirtStream_t stream) {
    if (comm == nullptr || (sendbuf == nullptr && recvbuf == nullptr)) {
        return INFINI_STATUS_NULL_POINTER;
    }
    if (peer < 0 || peer >= comm->group->size() || count == 0) {
        return INFINI_STATUS_BAD_PARAM;
    }
    Arguments arguments;
    arguments.send_count = sendbuf != nullptr ? count : 0;
    arguments.recv_count = recvbuf != nullptr ? count : 0;
    return call(name, comm, stream, {Kind::TRANSFER, dtype, INFINICCL_SUM, 0, {count}}, sendbuf, recvbuf, arguments, peer);
}

std::vector<size_t> same(size_t count, infinicclComm_t comm) {
    return std::vector<size_t>(size_t(comm->group->size()), count);
}

} // namespace

infiniStatus_t infinicclCommInitAll(infiniDevice_t device_type, infinicclComm_t *comms, int ndevice, const int *device_ids) {
    return guarded([&] {
        if (comms == nullptr || device_ids == nullptr) {
            return INFINI_STATUS_NULL_POINTER;
        }
        if (ndevice < 1) {
            return INFINI_STATUS_BAD_PARAM;
        }
        int available = 0;
        if (device_type < 0 || device_type >= INFINI_DEVICE_TYPE_COUNT || infinirtGetDeviceCount(device_type, &available) != INFINI_STATUS_SUCCESS || available == 0) {
            return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
        }
        const bool simulated = infinirt_cpu::isSimulated(device_type);
        const infiniStatus_t supported = checkSupported(simulated, device_type, "CommInitAll");
        if (supported != INFINI_STATUS_SUCCESS) {
            return supported;
        }
        for (int i = 0; i < ndevice; ++i) {
            if (device_ids[i] < 0 || device_ids[i] >= available) {
                return INFINI_STATUS_DEVICE_NOT_FOUND;
            }
            if (std::find(device_ids, device_ids + i, device_ids[i]) != device_ids + i) {
                return INFINI_STATUS_BAD_PARAM;
            }
        }
        const auto group = std::make_shared<Group>(ndevice);
        std::vector<std::unique_ptr<InfinicclComm>> made;
        for (int i = 0; i < ndevice; ++i) {
            made.emplace_back(new InfinicclComm{group, i, device_type, device_ids[i], simulated});
        }
        for (int i = 0; i < ndevice; ++i) {
            comms[i] = made[size_t(i)].release();
        }
        return INFINI_STATUS_SUCCESS;
    });
}

infiniStatus_t infinicclGetUniqueId(infinicclUniqueId_t *unique_id) {
    return guarded([&] {
        if (unique_id == nullptr) {
            return INFINI_STATUS_NULL_POINTER;
        }
        infiniDevice_t device_type;
        infiniStatus_t status = infinirtGetDevice(&device_type, nullptr);
        if (status == INFINI_STATUS_SUCCESS) {
            status = checkSupported(infinirt_cpu::isSimulated(device_type), device_type, "GetUniqueId");
        }
        if (status == INFINI_STATUS_SUCCESS) {
            const Id id = infiniccl_cpu::invite();
            std::memcpy(unique_id->internal, id.data(), id.size());
        }
        return status;
    });
}

infiniStatus_t infinicclCommInitRank(infinicclComm_t *comm, int nranks, infinicclUniqueId_t comm_id, int rank) {
    return guarded([&] {
        if (comm == nullptr) {
            return INFINI_STATUS_NULL_POINTER;
        }
        if (nranks < 1 || rank < 0 || rank >= nranks) {
            return INFINI_STATUS_BAD_PARAM;
        }
        infiniDevice_t device_type;
        int device_id;
        infiniStatus_t status = infinirtGetDevice(&device_type, &device_id);
        if (status != INFINI_STATUS_SUCCESS) {
            return status;
        }
        const bool simulated = infinirt_cpu::isSimulated(device_type);
        status = checkSupported(simulated, device_type, "CommInitRank");
        if (status != INFINI_STATUS_SUCCESS) {
            return status;
        }
        Id id;
        std::memcpy(id.data(), comm_id.internal, id.size());
        std::shared_ptr<Group> group;
        status = infiniccl_cpu::accept(id, nranks, rank, device_type, device_id, &group);
        if (status != INFINI_STATUS_SUCCESS) {
            return status;
        }
        std::unique_ptr<InfinicclComm> made(new InfinicclComm{group, rank, device_type, device_id, simulated});
        Request join;
        join.name = "CommInitRank";
        join.group = group;
        join.rank = rank;
        status = enqueue(std::move(join), *made, nullptr);
        if (status != INFINI_STATUS_SUCCESS) {
            infiniccl_cpu::withdraw(id);
            return status;
        }
        *comm = made.release();
        return INFINI_STATUS_SUCCESS;
    });
}

infiniStatus_t infinicclCommDestroy(infinicclComm_t comm) {
    delete comm;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinicclGroupStart(infinicclComm_t comm) {
    if (comm == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const infiniStatus_t status = checkSupported(comm->simulated, comm->device_type, "GroupStart");
    open_group.depth += status == INFINI_STATUS_SUCCESS;
    return status;
}

infiniStatus_t infinicclGroupEnd(infinicclComm_t comm) {
    if (comm == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const infiniStatus_t supported = checkSupported(comm->simulated, comm->device_type, "GroupEnd");
    if (supported != INFINI_STATUS_SUCCESS) {
        return supported;
    }
    if (open_group.depth == 0) {
        return INFINI_STATUS_BAD_PARAM;
    }
    if (--open_group.depth != 0) {
        return INFINI_STATUS_SUCCESS;
    }
    OpenGroup ended;
    std::swap(ended, open_group);
    return caught([&] { return ended.status == INFINI_STATUS_SUCCESS ? runGroup(std::move(ended.pending)) : ended.status; });
}

infiniStatus_t infinicclAllReduce(void *sendbuf, void *recvbuf, size_t count, infiniDtype_t dataype, infinicclReduceOp_t op, infinicclComm_t comm, infinirtStream_t stream) {
    return guarded([&] {
        if (comm == nullptr) {
            return INFINI_STATUS_NULL_POINTER;
        }
        return call("AllReduce", comm, stream, {Kind::ALL_REDUCE, dataype, op, 0, {count}}, sendbuf, recvbuf, {count, count});
    });
}

infiniStatus_t infinicclBroadcast(const void *sendbuf, void *recvbuf, size_t count, infiniDtype_t datatype, int root, infinicclComm_t comm, infinirtStream_t stream) {
    return guarded([&] {
        if (comm == nullptr || sendbuf == nullptr || recvbuf == nullptr) {
            return INFINI_STATUS_NULL_POINTER;
        }
        if (root < 0 || root >= comm->group->size() || count == 0) {
            return INFINI_STATUS_BAD_PARAM;
        }
        return call("Broadcast", comm, stream, {Kind::BROADCAST, datatype, INFINICCL_SUM, root, {count}}, sendbuf, recvbuf, {count, count, comm->rank == root});
    });
}

infiniStatus_t infinicclSend(const void *sendbuf, size_t count, infiniDtype_t datatype, int peer, infinicclComm_t comm, infinirtStream_t stream) {
    return guarded([&] { return transfer("Send", sendbuf, nullptr, count, datatype, peer, comm, stream); });
}

infiniStatus_t infinicclRecv(void *recvbuf, size_t count, infiniDtype_t datatype, int peer, infinicclComm_t comm, infinirtStream_t stream) {
    return guarded([&] { return transfer("Recv", nullptr, recvbuf, count, datatype, peer, comm, stream); });
}

infiniStatus_t infinicclAllGather(void *sendbuf, void *recvbuf, size_t send_count, infiniDtype_t dataype, infinicclComm_t comm, infinirtStream_t stream) {
    return guarded([&] {
        if (comm == nullptr) {
            return INFINI_STATUS_NULL_POINTER;
        }
        return gather("AllGather", sendbuf, recvbuf, same(send_count, comm), dataype, comm, stream);
    });
}

infiniStatus_t infinicclAllGatherV(void *sendbuf, void *recvbuf, const size_t *recv_counts, int nranks, infiniDtype_t dataype, infinicclComm_t comm, infinirtStream_t stream) {
    return guarded([&] {
        if (comm == nullptr || recv_counts == nullptr) {
            return INFINI_STATUS_NULL_POINTER;
        }
        if (nranks != comm->group->size()) {
            return INFINI_STATUS_BAD_PARAM;
        }
        return gather("AllGatherV", sendbuf, recvbuf, {recv_counts, recv_counts + nranks}, dataype, comm, stream);
    });
}

infiniStatus_t infinicclReduceScatter(void *sendbuf, void *recvbuf, size_t recv_count, infiniDtype_t dataype, infinicclReduceOp_t op, infinicclComm_t comm, infinirtStream_t stream) {
    return guarded([&] {
        if (comm == nullptr) {
            return INFINI_STATUS_NULL_POINTER;
        }
        return scatter("ReduceScatter", sendbuf, recvbuf, same(recv_count, comm), dataype, op, comm, stream);
    });
}

infiniStatus_t infinicclReduceScatterV(void *sendbuf, void *recvbuf, const size_t *send_counts, int nranks, infiniDtype_t dataype, infinicclReduceOp_t op, infinicclComm_t comm, infinirtStream_t stream) {
    return guarded([&] {
        if (comm == nullptr || send_counts == nullptr) {
            return INFINI_STATUS_NULL_POINTER;
        }
        if (nranks != comm->group->size()) {
            return INFINI_STATUS_BAD_PARAM;
        }
        return scatter("ReduceScatterV", sendbuf, recvbuf, {send_counts, send_counts + nranks}, dataype, op, comm, stream);
    });
}

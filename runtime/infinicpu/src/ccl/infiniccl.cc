// infiniccl for the CPU: communicators of one rank, where every collective is a copy (or nothing, in place).
// More ranks are refused with the status that InfiniCore gives for the CPU.

#include <infiniccl.h>

#include <cstring>
#include <new>

struct InfinicclComm {
    infiniDevice_t device_type;
    int device_id;
};

namespace {

size_t elementSize(infiniDtype_t dtype) {
    switch (dtype) {
    case INFINI_DTYPE_F16:
    case INFINI_DTYPE_BF16:
        return 2;
    case INFINI_DTYPE_F32:
        return 4;
    case INFINI_DTYPE_F64:
    case INFINI_DTYPE_I64:
    case INFINI_DTYPE_U64:
        return 8;
    case INFINI_DTYPE_I32:
    case INFINI_DTYPE_U32:
        return 4;
    case INFINI_DTYPE_I8:
    case INFINI_DTYPE_U8:
    case INFINI_DTYPE_BYTE:
        return 1;
    default:
        return 0;
    }
}

infiniStatus_t createComm(infinicclComm_t *comm, int device_id) {
    *comm = new (std::nothrow) InfinicclComm{INFINI_DEVICE_CPU, device_id};
    return *comm != nullptr ? INFINI_STATUS_SUCCESS : INFINI_STATUS_INTERNAL_ERROR;
}

infiniStatus_t copyAlone(const void *sendbuf, void *recvbuf, size_t count, infiniDtype_t dtype, infinicclComm_t comm) {
    if (comm == nullptr || (count != 0 && (sendbuf == nullptr || recvbuf == nullptr))) {
        return INFINI_STATUS_NULL_POINTER;
    }
    const size_t size = elementSize(dtype);
    if (size == 0) {
        return INFINI_STATUS_BAD_TENSOR_DTYPE;
    }
    if (sendbuf != recvbuf && count != 0) {
        std::memmove(recvbuf, sendbuf, count * size);
    }
    return INFINI_STATUS_SUCCESS;
}

} // namespace

infiniStatus_t infinicclCommInitAll(infiniDevice_t device_type, infinicclComm_t *comms, int ndevice, const int *device_ids) {
    if (comms == nullptr || device_ids == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    if (device_type != INFINI_DEVICE_CPU || ndevice > 1) {
        return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    }
    return ndevice == 1 ? createComm(comms, device_ids[0]) : INFINI_STATUS_BAD_PARAM;
}

infiniStatus_t infinicclGetUniqueId(infinicclUniqueId_t *unique_id) {
    if (unique_id == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    std::memset(unique_id, 0, sizeof(*unique_id));
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinicclCommInitRank(infinicclComm_t *comm, int nranks, infinicclUniqueId_t, int rank) {
    if (comm == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    if (nranks > 1) {
        return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    }
    if (nranks != 1 || rank != 0) {
        return INFINI_STATUS_BAD_PARAM;
    }
    int device_id = 0;
    const infiniStatus_t status = infinirtGetDevice(nullptr, &device_id);
    return status == INFINI_STATUS_SUCCESS ? createComm(comm, device_id) : status;
}

infiniStatus_t infinicclCommDestroy(infinicclComm_t comm) {
    delete comm;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t infinicclGroupStart(infinicclComm_t comm) {
    return comm != nullptr ? INFINI_STATUS_SUCCESS : INFINI_STATUS_NULL_POINTER;
}

infiniStatus_t infinicclGroupEnd(infinicclComm_t comm) {
    return comm != nullptr ? INFINI_STATUS_SUCCESS : INFINI_STATUS_NULL_POINTER;
}

infiniStatus_t infinicclAllReduce(void *sendbuf, void *recvbuf, size_t count, infiniDtype_t dataype, infinicclReduceOp_t, infinicclComm_t comm, infinirtStream_t) {
    return copyAlone(sendbuf, recvbuf, count, dataype, comm);
}

infiniStatus_t infinicclBroadcast(const void *sendbuf, void *recvbuf, size_t count, infiniDtype_t datatype, int root, infinicclComm_t comm, infinirtStream_t) {
    return root == 0 ? copyAlone(sendbuf, recvbuf, count, datatype, comm) : INFINI_STATUS_BAD_PARAM;
}

// A lone rank has no peer.

infiniStatus_t infinicclSend(const void *, size_t, infiniDtype_t, int, infinicclComm_t comm, infinirtStream_t) {
    return comm != nullptr ? INFINI_STATUS_BAD_PARAM : INFINI_STATUS_NULL_POINTER;
}

infiniStatus_t infinicclRecv(void *, size_t, infiniDtype_t, int, infinicclComm_t comm, infinirtStream_t) {
    return comm != nullptr ? INFINI_STATUS_BAD_PARAM : INFINI_STATUS_NULL_POINTER;
}

infiniStatus_t infinicclAllGather(void *sendbuf, void *recvbuf, size_t send_count, infiniDtype_t dataype, infinicclComm_t comm, infinirtStream_t) {
    return copyAlone(sendbuf, recvbuf, send_count, dataype, comm);
}

infiniStatus_t infinicclAllGatherV(void *sendbuf, void *recvbuf, const size_t *recv_counts, int nranks, infiniDtype_t dataype, infinicclComm_t comm, infinirtStream_t) {
    if (recv_counts == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    return nranks == 1 ? copyAlone(sendbuf, recvbuf, recv_counts[0], dataype, comm) : INFINI_STATUS_BAD_PARAM;
}

infiniStatus_t infinicclReduceScatter(void *sendbuf, void *recvbuf, size_t recv_count, infiniDtype_t dataype, infinicclReduceOp_t, infinicclComm_t comm, infinirtStream_t) {
    return copyAlone(sendbuf, recvbuf, recv_count, dataype, comm);
}

infiniStatus_t infinicclReduceScatterV(void *sendbuf, void *recvbuf, const size_t *send_counts, int nranks, infiniDtype_t dataype, infinicclReduceOp_t, infinicclComm_t comm, infinirtStream_t) {
    if (send_counts == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    return nranks == 1 ? copyAlone(sendbuf, recvbuf, send_counts[0], dataype, comm) : INFINI_STATUS_BAD_PARAM;
}

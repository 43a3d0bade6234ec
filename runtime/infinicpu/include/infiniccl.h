#ifndef INFINICPU_INFINICCL_H_
#define INFINICPU_INFINICCL_H_

// Collectives between devices. All of them are this machine's memory, so the ranks of a communicator are threads of one
// process: each calls with its own communicator, and a call returns when its part is done (on a simulated device it is
// queued on its stream, and the ranks meet where their threads synchronise).
//
// All ranks call the same operations in the same order. Where they disagree (another operation, count, dtype, reduction
// or root) the call fails with BAD_PARAM on all of them and nothing is written. A rank that does not come within 60 s
// (INFINICPU_CCL_TIMEOUT_MS: other milliseconds, read when a communicator is made), or destroys its communicator
// instead, makes the waiting ranks fail with INTERNAL_ERROR; after a timeout the communicator is of no more use.
// An argument that is wrong by itself is refused at once, and the rank takes no part: a NULL buffer, a negative rank,
// a buffer that is not aligned to its numbers, buffers that overlap other than in place.
//
// All dtypes can be moved. Reduced are the integers, f16, bf16, f32, f64, bool (not averaged) and complex numbers (sum
// and average), always in the order of the ranks, so the result is the same on all ranks and in every run: f16 and bf16
// in f32, rounded once; integers wrap around, their average is rounded towards zero; a NaN makes a maximum NaN. Other
// reductions are BAD_TENSOR_DTYPE. What a simulated device's record does not have is NOT_IMPLEMENTED.

#include "infinirt.h"

typedef enum {
    INFINICCL_SUM = 0,
    INFINICCL_PROD = 1,
    INFINICCL_MAX = 2,
    INFINICCL_MIN = 3,
    INFINICCL_AVG = 4,
} infinicclReduceOp_t;

struct InfinicclComm;
typedef struct InfinicclComm *infinicclComm_t;

#define INFINICCL_UNIQUE_ID_BYTES 128

/** Names a communicator while its ranks come together. Good for one communicator, within one process. */
typedef struct {
    char internal[INFINICCL_UNIQUE_ID_BYTES];
} infinicclUniqueId_t;

// ---- Communicators ----

/** comms[i] becomes rank i, on device device_ids[i] of the type. No device twice (BAD_PARAM). */
__INFINI_C __export infiniStatus_t infinicclCommInitAll(
    infiniDevice_t device_type,
    infinicclComm_t *comms,
    int ndevice,
    const int *device_ids);

/** For all ranks of one communicator to come: one thread asks, all of them call infinicclCommInitRank with it. */
__INFINI_C __export infiniStatus_t infinicclGetUniqueId(infinicclUniqueId_t *unique_id);

/**
 * Makes the current device rank `rank` of nranks, and waits for the others (in a group, infinicclGroupEnd waits).
 * BAD_PARAM for an id that was not given by this process or is used up, for another nranks or kind of device than the
 * ranks before had, and for a rank or device that is there already; those that wait then fail too.
 */
__INFINI_C __export infiniStatus_t infinicclCommInitRank(
    infinicclComm_t *comm,
    int nranks,
    infinicclUniqueId_t comm_id,
    int rank);

/** NULL is fine. Ranks that wait for this one fail, as do their later operations with it. */
__INFINI_C __export infiniStatus_t infinicclCommDestroy(infinicclComm_t comm);

// ---- Groups: what this thread calls between Start and End starts together at the End, which waits for all of it (or
// queues it, as one piece of work per stream). So ranks can exchange buffers without deadlock, and one thread can be
// several ranks. Groups nest; any communicator serves as the argument. If a call in the group was refused, End returns
// its status and runs nothing.

__INFINI_C __export infiniStatus_t infinicclGroupStart(infinicclComm_t comm);

/** BAD_PARAM without a Start. */
__INFINI_C __export infiniStatus_t infinicclGroupEnd(infinicclComm_t comm);

// ---- Collectives. Counts are in elements. ----

/** recvbuf [count] of every rank = the ranks' sendbufs [count], reduced. In place: sendbuf == recvbuf. */
__INFINI_C __export infiniStatus_t infinicclAllReduce(
    void *sendbuf,
    void *recvbuf,
    size_t count,
    infiniDtype_t dataype,
    infinicclReduceOp_t op,
    infinicclComm_t comm,
    infinirtStream_t stream);

/**
 * recvbuf [count] of every rank = the root's sendbuf [count]. In place: sendbuf == recvbuf.
 * As in InfiniCore, no rank may give a NULL sendbuf, and a count of 0 is BAD_PARAM.
 */
__INFINI_C __export infiniStatus_t infinicclBroadcast(
    const void *sendbuf,
    void *recvbuf,
    size_t count,
    infiniDtype_t datatype,
    int root,
    infinicclComm_t comm,
    infinirtStream_t stream);

/**
 * To the peer's infinicclRecv: the n-th Send from one rank to another meets the n-th Recv, and returns when the data is
 * there. Different counts or dtypes are BAD_PARAM on both, a count of 0 as well.
 */
__INFINI_C __export infiniStatus_t infinicclSend(
    const void *sendbuf,
    size_t count,
    infiniDtype_t datatype,
    int peer,
    infinicclComm_t comm,
    infinirtStream_t stream);

__INFINI_C __export infiniStatus_t infinicclRecv(
    void *recvbuf,
    size_t count,
    infiniDtype_t datatype,
    int peer,
    infinicclComm_t comm,
    infinirtStream_t stream);

/** recvbuf [ranks, send_count] = all ranks' sendbufs [send_count]. In place: sendbuf == recvbuf + rank * send_count. */
__INFINI_C __export infiniStatus_t infinicclAllGather(
    void *sendbuf,
    void *recvbuf,
    size_t send_count,
    infiniDtype_t dataype,
    infinicclComm_t comm,
    infinirtStream_t stream);

/**
 * recvbuf = all ranks' sendbufs [recv_counts[rank]], one behind the other. In place: sendbuf is this rank's part of
 * recvbuf. recv_counts [nranks] is the same on all ranks; nranks is the communicator's size, else BAD_PARAM.
 */
__INFINI_C __export infiniStatus_t infinicclAllGatherV(
    void *sendbuf,
    void *recvbuf,
    const size_t *recv_counts,
    int nranks,
    infiniDtype_t dataype,
    infinicclComm_t comm,
    infinirtStream_t stream);

/**
 * recvbuf [recv_count] of rank r = row r of the ranks' sendbufs [ranks, recv_count], reduced.
 * In place: recvbuf == sendbuf + rank * recv_count.
 */
__INFINI_C __export infiniStatus_t infinicclReduceScatter(
    void *sendbuf,
    void *recvbuf,
    size_t recv_count,
    infiniDtype_t dataype,
    infinicclReduceOp_t op,
    infinicclComm_t comm,
    infinirtStream_t stream);

/**
 * The same with parts of send_counts[r] elements, one behind the other. send_counts [nranks] is the same on all ranks;
 * nranks is the communicator's size, else BAD_PARAM.
 */
__INFINI_C __export infiniStatus_t infinicclReduceScatterV(
    void *sendbuf,
    void *recvbuf,
    const size_t *send_counts,
    int nranks,
    infiniDtype_t dataype,
    infinicclReduceOp_t op,
    infinicclComm_t comm,
    infinirtStream_t stream);

#endif // INFINICPU_INFINICCL_H_

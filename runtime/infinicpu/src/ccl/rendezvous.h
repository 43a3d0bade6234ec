#ifndef INFINICPU_CCL_RENDEZVOUS_H_
#define INFINICPU_CCL_RENDEZVOUS_H_

#include "reduce.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

// Where the ranks of a communicator meet.
//
// Every rank posts its part of an operation; the n-th post of each party belongs to the n-th operation. When the last
// party has posted, the operation is cut into chunks, and whoever waits for it takes chunks until none is left. So the
// ranks share the work, one thread may be several ranks (it posts all parts, then waits), and the result does not
// depend on who computed what: a chunk is reduced in the ranks' order.

namespace infiniccl_cpu {

using Clock = std::chrono::steady_clock;

enum class Kind {
    JOIN, // meets and moves nothing
    ALL_REDUCE,
    BROADCAST,
    ALL_GATHER,
    REDUCE_SCATTER,
    TRANSFER, // between two parties: 0 sends, 1 receives
};

// What all parties of an operation must agree on.
struct Terms {
    Kind kind = Kind::JOIN;
    infiniDtype_t dtype = INFINI_DTYPE_BYTE;
    infinicclReduceOp_t op = INFINICCL_SUM;
    int root = 0;
    std::vector<size_t> counts; // elements of each segment: one per rank of ALL_GATHER and REDUCE_SCATTER, else one

    bool operator==(const Terms &other) const {
        return kind == other.kind && dtype == other.dtype && op == other.op && root == other.root && counts == other.counts;
    }
};

class Operation {
public:
    enum class State {
        OPEN,    // a party is missing
        RUNNING, // chunks are being computed
        DONE,    // nobody touches a buffer any more; the status is final
    };

    Operation(const Terms &terms, size_t parties);

    State state() const { return _state.load(std::memory_order_acquire); }

private:
    friend class Group;

    size_t offset(size_t segment) const;
    void runChunk(size_t chunk) noexcept;
    // Takes chunks until none is left. True for the one caller that finished the last of them.
    bool work() noexcept;

    const Terms _terms;
    std::vector<Buffers> _buffers; // of each party
    size_t _missing;
    size_t _chunks = 0;
    infiniStatus_t _status = INFINI_STATUS_SUCCESS; // not changed any more once RUNNING or DONE
    std::atomic<State> _state{State::OPEN};         // changed under the group's lock
    std::atomic<size_t> _next{0};
    std::atomic<size_t> _finished{0};
};

// The ranks of one communicator. Outlives the communicators: operations under way hold it.
class Group {
public:
    explicit Group(int size);

    int size() const { return _size; }
    Clock::duration timeout() const { return _timeout; }

    // Posts a rank's part of its next operation with everybody, or of its next TRANSFER with `peer` (it sends if it
    // gives a send buffer). With a status that is not SUCCESS its part cannot take place: the operation fails with
    // that status, for all parties. If the terms differ between parties, it fails with BAD_PARAM.
    std::shared_ptr<Operation> post(int rank, int peer, const Terms &terms, const Buffers &buffers, infiniStatus_t status);

    // Works on the operation until it is done. INTERNAL_ERROR if a party is still missing at the deadline, or has left:
    // then the group has failed, and so will everything that is posted from then on.
    infiniStatus_t wait(Operation &operation, Clock::time_point deadline);

    // The rank posts nothing any more: operations that need it fail now.
    void leave(int rank);

    // Everything that still misses a party fails, now and later.
    void fail(infiniStatus_t status);

    Group(const Group &) = delete;
    Group &operator=(const Group &) = delete;

private:
    // Operations between the same parties, in order.
    struct Channel {
        std::vector<int> parties;                    // ranks
        std::vector<uint64_t> posted;                // by each party
        uint64_t first = 0;                          // number of open.front()
        std::deque<std::shared_ptr<Operation>> open; // those that miss a party
    };

    Channel &channel(int from, int to);
    bool spin(const Operation &operation, Operation::State state) const;
    void leaveChannel(Channel &channel, int rank);
    void failAll(infiniStatus_t status);
    void finish(Operation &operation, infiniStatus_t status);
    void setState(Operation &operation, Operation::State state);

    const int _size;
    const Clock::duration _timeout;
    const bool _spins;
    std::mutex _mutex;
    std::condition_variable _changed;
    size_t _sleepers = 0;
    infiniStatus_t _failure = INFINI_STATUS_SUCCESS;
    std::vector<bool> _gone; // by rank
    Channel _everybody;
    std::map<std::pair<int, int>, Channel> _pairs; // by sender and receiver
};

} // namespace infiniccl_cpu

#endif // INFINICPU_CCL_RENDEZVOUS_H_

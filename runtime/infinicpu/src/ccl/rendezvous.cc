#include "rendezvous.h"

#include <algorithm>
#include <cstdlib>
#include <thread>

namespace infiniccl_cpu {

namespace {

// Smaller operations are computed by one thread: handing out parts of them costs more than it saves.
constexpr size_t CHUNK_BYTES = size_t(64) << 10;
constexpr long DEFAULT_TIMEOUT_MS = 60000;
constexpr long MAX_TIMEOUT_MS = 1000000000; // eleven days; more might not fit the clock
// How long a waiting rank stays awake. In a decode step the ranks come within some microseconds of each other:
// sleeping and waking would cost more than the operation.
constexpr std::chrono::microseconds SPIN_TIME{100};
constexpr int POLLS_PER_CLOCK_READ = 64;

inline void pauseCpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

std::chrono::milliseconds configuredTimeout() {
    const char *text = std::getenv("INFINICPU_CCL_TIMEOUT_MS");
    const long value = text != nullptr ? std::atol(text) : 0;
    return std::chrono::milliseconds(value > 0 ? std::min(value, MAX_TIMEOUT_MS) : DEFAULT_TIMEOUT_MS);
}

// How a kind of operation moves its segments: from all parties or one, to all parties or one; and whether a segment
// lies behind its predecessors in the sources or in the destinations.
struct Layout {
    bool from_all, to_all;
    bool spread_sources, spread_destinations;
};

constexpr Layout LAYOUTS[] = {
    {false, false, false, false}, // JOIN
    {true, true, false, false},   // ALL_REDUCE
    {false, true, false, false},  // BROADCAST: from the root
    {false, true, false, true},   // ALL_GATHER: segment i from rank i
    {true, false, true, false},   // REDUCE_SCATTER: segment i to rank i
    {false, false, false, false}, // TRANSFER
};

size_t chunkElements(infiniDtype_t dtype) {
    return CHUNK_BYTES / elementSize(dtype);
}

size_t chunksOf(size_t count, infiniDtype_t dtype) {
    const size_t elements = chunkElements(dtype);
    return count / elements + (count % elements != 0);
}

} // namespace

Operation::Operation(const Terms &terms, size_t parties) : _terms(terms), _buffers(parties), _missing(parties) {
    for (const size_t count : terms.counts) {
        _chunks += chunksOf(count, terms.dtype);
    }
}

// Elements before a segment.
size_t Operation::offset(size_t segment) const {
    size_t sum = 0;
    for (size_t i = 0; i < segment; ++i) {
        sum += _terms.counts[i];
    }
    return sum;
}

void Operation::runChunk(size_t chunk) noexcept {
    size_t segment = 0;
    for (; chunk >= chunksOf(_terms.counts[segment], _terms.dtype); ++segment) {
        chunk -= chunksOf(_terms.counts[segment], _terms.dtype);
    }
    const size_t elements = chunkElements(_terms.dtype);
    const size_t begin = chunk * elements;
    const size_t left = _terms.counts[segment] - begin;
    const size_t size = elementSize(_terms.dtype);
    const size_t here = begin * size;
    const size_t spread = here + offset(segment) * size;

    const Layout &layout = LAYOUTS[size_t(_terms.kind)];
    const size_t from = _terms.kind == Kind::BROADCAST ? size_t(_terms.root) : segment;
    const size_t to = _terms.kind == Kind::TRANSFER ? 1 : segment;
    const Side sources{_buffers.data(), layout.from_all ? 0 : from, layout.from_all ? _buffers.size() : from + 1, layout.spread_sources ? spread : here};
    const Side destinations{_buffers.data(), layout.to_all ? 0 : to, layout.to_all ? _buffers.size() : to + 1, layout.spread_destinations ? spread : here};
    combine(_terms.dtype, _terms.op, sources, destinations, left < elements ? left : elements);
}

bool Operation::work() noexcept {
    size_t done = 0;
    for (size_t chunk; (chunk = _next.fetch_add(1, std::memory_order_relaxed)) < _chunks; ++done) {
        runChunk(chunk);
    }
    return done != 0 && _finished.fetch_add(done, std::memory_order_acq_rel) + done == _chunks;
}

// Awake waiting only pays where every rank can have a CPU of its own.
Group::Group(int size)
    : _size(size), _timeout(configuredTimeout()), _spins(unsigned(size) <= std::thread::hardware_concurrency()), _gone(size_t(size), false) {
    for (int rank = 0; rank < size; ++rank) {
        _everybody.parties.push_back(rank);
    }
    _everybody.posted.resize(size_t(size));
}

Group::Channel &Group::channel(int from, int to) {
    Channel &found = _pairs[{from, to}];
    if (found.parties.empty()) {
        found.posted.resize(2);
        found.parties = {from, to};
    }
    return found;
}

std::shared_ptr<Operation> Group::post(int rank, int peer, const Terms &terms, const Buffers &buffers, infiniStatus_t status) {
    const std::lock_guard<std::mutex> lock(_mutex);
    const bool transfer = terms.kind == Kind::TRANSFER;
    const bool sends = transfer && buffers.send != nullptr;
    Channel &meeting = !transfer ? _everybody : (sends ? channel(rank, peer) : channel(peer, rank));
    const size_t party = !transfer ? size_t(rank) : (sends ? 0 : 1);
    const uint64_t number = meeting.posted[party];

    infiniStatus_t never = _failure;
    for (size_t other = 0; other < meeting.parties.size(); ++other) {
        if (_gone[size_t(meeting.parties[other])] && (other == party || meeting.posted[other] <= number) && never == INFINI_STATUS_SUCCESS) {
            never = INFINI_STATUS_INTERNAL_ERROR;
        }
    }
    if (never != INFINI_STATUS_SUCCESS) {
        const auto refused = std::make_shared<Operation>(terms, meeting.parties.size());
        finish(*refused, never);
        return refused;
    }

    std::shared_ptr<Operation> operation;
    if (number - meeting.first < meeting.open.size()) {
        operation = meeting.open[number - meeting.first];
    } else {
        operation = std::make_shared<Operation>(terms, meeting.parties.size());
        meeting.open.push_back(operation);
    }
    ++meeting.posted[party];
    operation->_buffers[party] = buffers;
    --operation->_missing;

    if (status == INFINI_STATUS_SUCCESS && !(terms == operation->_terms)) {
        status = INFINI_STATUS_BAD_PARAM;
    }
    if (operation->state() == Operation::State::OPEN) {
        if (status != INFINI_STATUS_SUCCESS) {
            finish(*operation, status);
        } else if (operation->_missing == 0) {
            setState(*operation, operation->_chunks != 0 ? Operation::State::RUNNING : Operation::State::DONE);
        }
    }
    // A failed operation stays until all of its parties have posted, so that they stay in step.
    while (!meeting.open.empty() && meeting.open.front()->_missing == 0) {
        meeting.open.pop_front();
        ++meeting.first;
    }
    return operation;
}

// True if the operation left the state within the time worth staying awake for.
bool Group::spin(const Operation &operation, Operation::State state) const {
    const auto deadline = Clock::now() + SPIN_TIME;
    for (int polls = 1; operation.state() == state; ++polls) {
        pauseCpu();
        if (!_spins) {
            return false;
        }
        if (polls % POLLS_PER_CLOCK_READ == 0) {
            if (Clock::now() > deadline) {
                return false;
            }
            std::this_thread::yield(); // the rank that is missing may want this CPU
        }
    }
    return true;
}

infiniStatus_t Group::wait(Operation &operation, Clock::time_point deadline) {
    using State = Operation::State;
    if (!spin(operation, State::OPEN)) {
        std::unique_lock<std::mutex> lock(_mutex);
        ++_sleepers;
        const bool left = _changed.wait_until(lock, deadline, [&] { return operation.state() != State::OPEN; });
        --_sleepers;
        if (!left) {
            failAll(INFINI_STATUS_INTERNAL_ERROR);
        }
    }
    if (operation.state() == State::RUNNING && operation.work()) {
        const std::lock_guard<std::mutex> lock(_mutex);
        setState(operation, State::DONE);
    }
    // Without a deadline: all that is left are others' last chunks, and until they are done the buffers are in use.
    if (!spin(operation, State::RUNNING)) {
        std::unique_lock<std::mutex> lock(_mutex);
        ++_sleepers;
        _changed.wait(lock, [&] { return operation.state() == State::DONE; });
        --_sleepers;
    }
    return operation._status;
}

void Group::leave(int rank) {
    const std::lock_guard<std::mutex> lock(_mutex);
    _gone[size_t(rank)] = true;
    leaveChannel(_everybody, rank);
    for (auto &pair : _pairs) {
        leaveChannel(pair.second, rank);
    }
}

void Group::fail(infiniStatus_t status) {
    const std::lock_guard<std::mutex> lock(_mutex);
    failAll(status);
}

// The following need the lock.

void Group::leaveChannel(Channel &channel, int rank) {
    for (size_t party = 0; party < channel.parties.size(); ++party) {
        while (channel.parties[party] == rank && channel.first + channel.open.size() > channel.posted[party] && !channel.open.empty()) {
            finish(*channel.open.back(), INFINI_STATUS_INTERNAL_ERROR);
            channel.open.pop_back();
        }
    }
}

void Group::failAll(infiniStatus_t status) {
    if (_failure == INFINI_STATUS_SUCCESS) {
        _failure = status;
    }
    for (const auto &operation : _everybody.open) {
        finish(*operation, status);
    }
    _everybody.open.clear();
    for (auto &pair : _pairs) {
        for (const auto &operation : pair.second.open) {
            finish(*operation, status);
        }
        pair.second.open.clear();
    }
}

void Group::finish(Operation &operation, infiniStatus_t status) {
    if (operation.state() == Operation::State::OPEN) {
        operation._status = status;
        setState(operation, Operation::State::DONE);
    }
}

void Group::setState(Operation &operation, Operation::State state) {
    operation._state.store(state, std::memory_order_release);
    if (_sleepers != 0) {
        _changed.notify_all();
    }
}

} // namespace infiniccl_cpu

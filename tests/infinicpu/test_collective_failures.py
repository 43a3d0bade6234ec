"""infiniccl: what happens when ranks disagree, do not come, leave, or give arguments that are wrong; and how they join."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from .lib import (
    BAD_DTYPE,
    BAD_PARAM,
    DEVICE_NOT_FOUND,
    DEVICE_TYPE_NOT_SUPPORTED,
    F32,
    INTERNAL_ERROR,
    NULL_POINTER,
    SUCCESS,
    runtime,
)
from .ranks import AVG, SUM, Int, Pointer, Rank, UniqueId, ccl, data, sizes, threads, timeout_ms, together, world

# ---- Ranks that disagree, do not come, or leave ----

X = np.ones(8, F32)
DISAGREEMENTS: dict[str, list[Callable[[Rank, np.ndarray], int]]] = {
    "count": [lambda r, y: r.all_reduce(X, y), lambda r, y: r.all_reduce(X, y, count=7)],
    "no count": [lambda r, y: r.all_reduce(X, y, count=0), lambda r, y: r.all_reduce(X, y)],
    "dtype": [lambda r, y: r.all_reduce(X, y), lambda r, y: r.all_reduce(X.view(np.int32), y.view(np.int32))],
    "reduction": [lambda r, y: r.all_reduce(X, y), lambda r, y: r.all_reduce(X, y, AVG)],
    "operation": [lambda r, y: r.all_reduce(X, y), lambda r, y: r.broadcast(X, y, 0)],
    "root": [lambda r, y: r.broadcast(X, y, 1), lambda r, y: r.broadcast(X, y, 0)],
    "sizes": [lambda r, y: r.all_gather_v(X, y, [1, 2]), lambda r, y: r.all_gather_v(X, y, [2, 1])],
    "message": [lambda r, y: r.send(X, 1), lambda r, y: r.recv(y[:5], 0)],
    "message dtype": [lambda r, y: r.send(X, 1), lambda r, y: r.recv(y.view(np.int32), 0)],
}


@pytest.mark.parametrize("calls", DISAGREEMENTS.values(), ids=DISAGREEMENTS)
def test_disagreement_fails_on_all_ranks(calls: list[Callable[[Rank, np.ndarray], int]]) -> None:
    y = [np.zeros(8, F32) for _ in range(2)]
    with world(2) as ranks:
        assert together(ranks, lambda r: calls[r.rank](r, y[r.rank])) == [BAD_PARAM] * 2
        assert not any(a.any() for a in y)
        # The ranks are still in step.
        assert together(ranks, lambda r: r.all_reduce(X, y[r.rank])) == [SUCCESS] * 2
    assert [a.tolist() for a in y] == [[2.0] * 8] * 2


def test_disagreement_among_many() -> None:
    y = [np.zeros(8, F32) for _ in range(5)]
    with world(5) as ranks:
        for odd in range(5):
            counts = [8 - (r == odd) for r in range(5)]
            assert together(ranks, lambda r, c=counts: r.all_reduce(X, y[r.rank], count=c[r.rank])) == [BAD_PARAM] * 5
        assert not any(a.any() for a in y)
        assert together(ranks, lambda r: r.all_reduce(X, y[r.rank])) == [SUCCESS] * 5


def test_a_rank_that_never_comes() -> None:
    y = np.zeros(8, F32)
    with timeout_ms(30), world(3) as ranks:
        assert together(ranks[:2], lambda r: r.all_reduce(X, y)) == [INTERNAL_ERROR] * 2
        # From here on the ranks are out of step, so nothing works any more, whoever comes.
        assert together(ranks, lambda r: r.all_reduce(X, y)) == [INTERNAL_ERROR] * 3
        assert ranks[2].send(X, 0) == INTERNAL_ERROR
        assert not y.any()


def test_a_message_that_nobody_receives() -> None:
    with timeout_ms(30), world(2) as ranks:
        assert ranks[0].send(X, 1) == INTERNAL_ERROR and ranks[1].recv(X.copy(), 0) == INTERNAL_ERROR


def test_a_rank_that_leaves_while_others_wait() -> None:
    with world(3) as ranks:
        waiting = [threads().submit(r.all_reduce, X, np.zeros(8, F32)) for r in ranks[:2]]
        assert ranks[2].destroy() == SUCCESS
        assert [w.result() for w in waiting] == [INTERNAL_ERROR] * 2
        assert ranks[0].all_reduce(X, np.zeros(8, F32)) == INTERNAL_ERROR  # at once
        # The others can still talk to each other, not to the one that left.
        y = np.zeros(8, F32)
        talk = [threads().submit(ranks[0].send, X, 1), threads().submit(ranks[1].recv, y, 0)]
        assert [t.result() for t in talk] == [SUCCESS] * 2 and y.all()
        assert ranks[0].send(X, 2) == ranks[1].recv(y, 2) == INTERNAL_ERROR


# ---- Communicators ----


def unique_id() -> UniqueId:
    result = UniqueId()
    assert ccl().infinicclGetUniqueId(ctypes.byref(result)) == SUCCESS
    return result


def join(name: UniqueId, n: int, rank: int, device: int | None = None) -> tuple[int, Rank]:
    comm = Pointer()
    assert runtime().infinirtSetDevice(0, rank if device is None else device) == SUCCESS
    status = ccl().infinicclCommInitRank(ctypes.byref(comm), n, name, rank)
    assert runtime().infinirtSetDevice(0, 0) == SUCCESS
    return status, Rank(rank, comm.value)


def test_ranks_join_by_id() -> None:
    names = [unique_id() for _ in range(2)]
    assert bytes(names[0]) != bytes(names[1])
    # Two communicators at once: ranks 0, 1, 2 of the one and 0, 1 of the other.
    seats = [(names[0], 3, 2), (names[1], 2, 0), (names[0], 3, 0), (names[1], 2, 1), (names[0], 3, 1)]
    joined = together(seats, lambda seat: join(*seat))
    assert [status for status, _ in joined] == [SUCCESS] * 5
    y = [np.zeros(8, F32) for _ in joined]
    assert together(range(5), lambda i: joined[i][1].all_reduce(X * 2**i, y[i])) == [SUCCESS] * 5
    assert [a[0] for a in y] == [21.0, 10.0, 21.0, 10.0, 21.0]
    assert [rank.destroy() for _, rank in joined] == [SUCCESS] * 5
    assert join(names[0], 3, 0)[0] == BAD_PARAM  # used up


def test_one_thread_joins_all_ranks_in_a_group() -> None:
    name = unique_id()
    with world(1) as (any_rank,):
        assert any_rank.group_start() == SUCCESS
        joined = [join(name, 3, r) for r in range(3)]
        assert any_rank.group_end() == SUCCESS
    assert [status for status, _ in joined] == [SUCCESS] * 3
    y = [np.zeros(8, F32) for _ in joined]
    assert together(range(3), lambda i: joined[i][1].all_reduce(X, y[i])) == [SUCCESS] * 3
    assert all((a == 3).all() for a in y)
    assert [rank.destroy() for _, rank in joined] == [SUCCESS] * 3


@pytest.mark.parametrize(
    "second",
    [dict(n=3, rank=1), dict(n=2, rank=0, device=1), dict(n=2, rank=1, device=0)],
    ids=["another number of ranks", "the same rank", "the same device"],
)
def test_joining_what_does_not_fit(second: dict[str, int]) -> None:
    name = unique_id()
    results = together([dict(n=2, rank=0), second], lambda seat: join(name, **seat))
    assert [status for status, _ in results] == [BAD_PARAM] * 2
    assert [rank.comm for _, rank in results] == [None] * 2


def test_joining_refusals() -> None:
    name = unique_id()
    assert ccl().infinicclGetUniqueId(None) == NULL_POINTER
    assert ccl().infinicclCommInitRank(None, 1, name, 0) == NULL_POINTER
    for n, rank in ((0, 0), (2, 2), (2, -1), (-1, 0)):
        assert join(name, n, rank, 0)[0] == BAD_PARAM
    assert join(UniqueId(), 1, 0)[0] == BAD_PARAM  # never given
    status, rank = join(name, 1, 0)  # what was refused did not use it up
    assert (status, rank.destroy()) == (SUCCESS, SUCCESS) and join(name, 1, 0)[0] == BAD_PARAM
    with timeout_ms(30):
        name = unique_id()
        status, rank = join(name, 2, 1)
        assert status == INTERNAL_ERROR and rank.comm is None
        assert join(name, 2, 0)[0] == BAD_PARAM


def test_init_all_refusals() -> None:
    comms, init = (Pointer * 3)(), ccl().infinicclCommInitAll
    assert init(0, None, 1, (Int * 1)(0)) == init(0, comms, 1, None) == NULL_POINTER
    assert init(0, comms, 0, (Int * 1)(0)) == init(0, comms, -1, (Int * 1)(0)) == BAD_PARAM
    assert init(0, comms, 3, (Int * 3)(0, 1, 0)) == BAD_PARAM  # a device twice
    assert init(0, comms, 2, (Int * 2)(0, 8)) == init(0, comms, 1, (Int * 1)(-1)) == DEVICE_NOT_FOUND
    for device_type in (1, 11, -1):
        assert init(device_type, comms, 1, (Int * 1)(0)) == DEVICE_TYPE_NOT_SUPPORTED
    assert list(comms) == [None] * 3
    assert ccl().infinicclCommDestroy(None) == SUCCESS


# ---- Arguments that are wrong by themselves ----


def bad_arguments(rank: Rank) -> Iterator[tuple[str, int, int]]:
    """(what, status, expected status)"""
    lib, comm = ccl(), rank.comm
    target = np.zeros(16, F32)
    x, y = data(X), data(target)
    assert x is not None and y is not None
    huge = 2**62
    two = sizes([1, 2])
    yield "AllReduce NULL", lib.infinicclAllReduce(None, y, 1, 13, SUM, comm, None), NULL_POINTER
    yield "AllReduce NULL target", lib.infinicclAllReduce(x, None, 1, 13, SUM, comm, None), NULL_POINTER
    yield "AllReduce NULL comm", lib.infinicclAllReduce(x, y, 1, 13, SUM, None, None), NULL_POINTER
    for dtype in (0, 20, -1, 11, 15):  # no dtype; 8-bit floats, of which the format is not known
        yield f"AllReduce dtype {dtype}", lib.infinicclAllReduce(x, y, 1, dtype, SUM, comm, None), BAD_DTYPE
    yield "AllReduce average of bool", lib.infinicclAllReduce(x, y, 1, 2, AVG, comm, None), BAD_DTYPE
    for op in (5, -1):
        yield f"AllReduce op {op}", lib.infinicclAllReduce(x, y, 1, 13, op, comm, None), BAD_PARAM
    yield "AllReduce huge", lib.infinicclAllReduce(x, y, huge, 13, SUM, comm, None), BAD_PARAM
    yield "AllReduce overlap", lib.infinicclAllReduce(y, y + 4, 2, 13, SUM, comm, None), BAD_PARAM
    yield "AllReduce unaligned", lib.infinicclAllReduce(x + 2, y, 1, 13, SUM, comm, None), BAD_PARAM
    for root in (-1, 2):
        yield f"Broadcast root {root}", lib.infinicclBroadcast(x, y, 1, 13, root, comm, None), BAD_PARAM
    yield "Broadcast 0", lib.infinicclBroadcast(x, y, 0, 13, 0, comm, None), BAD_PARAM
    yield "Broadcast NULL", lib.infinicclBroadcast(None, y, 1, 13, 1, comm, None), NULL_POINTER
    yield "Broadcast NULL comm", lib.infinicclBroadcast(x, y, 1, 13, 0, None, None), NULL_POINTER
    yield "Broadcast dtype", lib.infinicclBroadcast(x, y, 1, 20, 0, comm, None), BAD_DTYPE
    for name in ("Send", "Recv"):
        call = getattr(lib, f"infiniccl{name}")
        for peer in (-1, 2):
            yield f"{name} peer {peer}", call(y, 1, 13, peer, comm, None), BAD_PARAM
        yield f"{name} 0", call(y, 0, 13, 1, comm, None), BAD_PARAM
        yield f"{name} NULL", call(None, 1, 13, 1, comm, None), NULL_POINTER
        yield f"{name} NULL comm", call(y, 1, 13, 1, None, None), NULL_POINTER
        yield f"{name} dtype", call(y, 1, 0, 1, comm, None), BAD_DTYPE
    yield "AllGather NULL", lib.infinicclAllGather(x, None, 1, 13, comm, None), NULL_POINTER
    yield "AllGather NULL comm", lib.infinicclAllGather(x, y, 1, 13, None, None), NULL_POINTER
    yield "AllGather overlap", lib.infinicclAllGather(y + 4, y, 1, 13, comm, None), BAD_PARAM  # rank 1's place
    yield "AllGather huge", lib.infinicclAllGather(x, y, huge, 13, comm, None), BAD_PARAM
    yield "AllGatherV NULL", lib.infinicclAllGatherV(x, y, None, 2, 13, comm, None), NULL_POINTER
    for n in (1, 3):
        yield f"AllGatherV {n}", lib.infinicclAllGatherV(x, y, two, n, 13, comm, None), BAD_PARAM
    wraps = sizes([2**63, 2**63 + 1])
    yield "AllGatherV huge", lib.infinicclAllGatherV(x, y, wraps, 2, 1, comm, None), BAD_PARAM
    yield "ReduceScatter NULL", lib.infinicclReduceScatter(None, y, 1, 13, SUM, comm, None), NULL_POINTER
    yield "ReduceScatter dtype", lib.infinicclReduceScatter(x, y, 1, 11, SUM, comm, None), BAD_DTYPE
    yield "ReduceScatter NULL comm", lib.infinicclReduceScatter(x, y, 1, 13, SUM, None, None), NULL_POINTER
    yield "ReduceScatter overlap", lib.infinicclReduceScatter(y, y + 4, 1, 13, SUM, comm, None), BAD_PARAM
    yield "ReduceScatterV NULL", lib.infinicclReduceScatterV(x, y, None, 2, 13, SUM, comm, None), NULL_POINTER
    yield "ReduceScatterV 3", lib.infinicclReduceScatterV(x, y, two, 3, 13, SUM, comm, None), BAD_PARAM
    yield "ReduceScatterV op", lib.infinicclReduceScatterV(x, y, two, 2, 13, 7, comm, None), BAD_PARAM


def test_bad_arguments_are_refused_at_once() -> None:
    """The other rank is not there: a call that was not refused would end in a timeout. The ranks stay in step."""
    with timeout_ms(2000), world(2) as ranks:
        for what, status, expected in bad_arguments(ranks[0]):
            assert status == expected, what
        y = [np.zeros(8, F32) for _ in ranks]
        assert together(ranks, lambda r: r.all_reduce(X, y[r.rank])) == [SUCCESS] * 2
        assert ccl().infinicclAllReduce(None, None, 0, 13, SUM, None, None) == NULL_POINTER
        empty = lambda r: ccl().infinicclAllReduce(None, None, 0, 13, SUM, r.comm, None)  # noqa: E731
        assert together(ranks, empty) == [SUCCESS] * 2

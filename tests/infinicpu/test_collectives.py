"""infiniccl: several ranks, each a thread, against numpy.

The library promises an order of reduction (the ranks') and one rounding, so the comparisons are exact.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .lib import (
    BAD_DTYPE,
    BAD_PARAM,
    BF16,
    DTYPE_CODE,
    F16,
    F32,
    NULL_POINTER,
    SUCCESS,
    random_bits,
)
from .ranks import (
    AVG,
    MAX,
    MIN,
    PROD,
    SUM,
    Rank,
    ccl,
    data,
    together,
    world,
)

F64 = np.dtype(np.float64)
BOOL = np.dtype(bool)
HALVES = (F16, BF16)
INTEGERS = tuple(np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8))
# All of infiniDtype_t, with a numpy type of the same size where numpy has none.
MOVED = {1: "u1", 2: "u1", 11: "u1", 15: "u2", 16: "u4", 17: "c8", 18: "c16"} | {
    c: t.str for t, c in DTYPE_CODE.items()
}


def wrap(value: int, bits: int, signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def reduced_integers(inputs: Sequence[np.ndarray], op: int) -> np.ndarray:
    signed, bits = inputs[0].dtype.kind == "i", inputs[0].itemsize * 8

    def one(values: tuple[int, ...]) -> int:
        if op in (MAX, MIN):
            return (max if op == MAX else min)(values)
        wide = wrap(reduce(operator.mul if op == PROD else operator.add, values), 64, signed)
        if op == AVG:
            wide = -(-wide // len(values)) if wide < 0 else wide // len(values)
        return wrap(wide, bits, signed)

    return np.array([one(values) for values in zip(*(x.tolist() for x in inputs), strict=True)], inputs[0].dtype)


def reduced(inputs: Sequence[np.ndarray], op: int) -> np.ndarray:
    """What the ranks' inputs reduce to: halves in f32, in the ranks' order, rounded once."""
    dtype = inputs[0].dtype
    if dtype == BOOL:
        return reduce(np.logical_or if op in (SUM, MAX) else np.logical_and, inputs)
    if dtype.kind in "iu":
        return reduced_integers(inputs, op)
    if len(inputs) == 1:
        return inputs[0]  # copied: not even a NaN's bits change
    step = {SUM: np.add, AVG: np.add, PROD: np.multiply, MAX: np.maximum, MIN: np.minimum}[op]
    with np.errstate(all="ignore"):
        total = reduce(step, [x.astype(F32) if dtype in HALVES else x for x in inputs])
        if op == AVG:
            total = total / total.dtype.type(len(inputs))
        return total.astype(dtype)


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal; one NaN is as good as another, and 0 as -0."""
    assert actual.dtype == expected.dtype
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = [x.astype(F64) if x.dtype in (*HALVES, F32) else x for x in (actual, expected)]
    np.testing.assert_array_equal(*wide)


def inputs_of(seed: int, n: int, count: int, dtype: np.dtype) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    if dtype == BOOL:
        return [rng.integers(0, 2, count).astype(bool) for _ in range(n)]
    return [random_bits(rng, count, dtype) for _ in range(n)]


REDUCTIONS = [(dtype, op) for dtype in (*INTEGERS, F16, BF16, F32, F64) for op in range(5)]
REDUCTIONS += [(BOOL, op) for op in (SUM, PROD, MAX, MIN)]


# 1 .. 5 ranks; 8191, 16384 and 32768 elements are what one thread takes at a time, depending on the dtype.
@given(
    n=st.integers(1, 5),
    count=st.one_of(st.integers(0, 67), st.sampled_from([1023, 1025, 8193, 16385, 32771])),
    reduction=st.sampled_from(REDUCTIONS),
    in_place=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_all_reduce(n: int, count: int, reduction: tuple[np.dtype, int], in_place: bool, seed: int) -> None:
    dtype, op = reduction
    count = min(count, 67) if dtype.kind in "iu" else count  # the reference is slow
    x = inputs_of(seed, n, count, dtype)
    expected = reduced(x, op)
    y = [a.copy() if in_place else np.ones_like(a) for a in x]
    with world(n) as ranks:
        assert together(ranks, lambda r: r.all_reduce((y if in_place else x)[r.rank], y[r.rank], op)) == [SUCCESS] * n
    for actual in y:
        assert_same(actual, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
def test_every_reduction(reduction: tuple[np.dtype, int]) -> None:
    dtype, op = reduction
    x = inputs_of(5, 3, 257, dtype)
    y = [np.empty_like(a) for a in x]
    with world(3) as ranks:
        assert together(ranks, lambda r: r.all_reduce(x[r.rank], y[r.rank], op)) == [SUCCESS] * 3
    for actual in y:
        assert_same(actual, reduced(x, op))


@pytest.mark.parametrize("n", [2, 3, 8])
def test_many_operations_in_a_row(n: int) -> None:
    """More ranks than CPUs too, each at its own pace, on sums that stay exact in f32."""
    rounds = 200
    with world(n) as ranks:

        def body(rank: Rank) -> float:
            x = np.full(211, rank.rank + 1, F32)
            y = np.empty_like(x)
            for _ in range(rounds):
                assert rank.all_reduce(x, y) == SUCCESS
                x[...] = y / n  # the sum of n equal numbers from here on
            return float(y[0])

        assert together(ranks, body) == [n * (n + 1) / 2] * n


@pytest.mark.parametrize("component", [F16, F32, F64], ids=str)
@pytest.mark.parametrize("op", [SUM, AVG])
def test_complex_numbers(component: np.dtype, op: int) -> None:
    code = {F16: 16, F32: 17, F64: 18}[component]
    x = [a.reshape(31, 2) for a in inputs_of(9, 3, 62, component)]
    y = [np.empty_like(a) for a in x]
    with world(3) as ranks:
        args = [(data(x[r]), data(y[r]), 31, code) for r in range(3)]
        call = ccl().infinicclAllReduce
        assert together(ranks, lambda r: call(*args[r.rank], op, r.comm, None)) == [SUCCESS] * 3
        assert call(*args[0], PROD, ranks[0].comm, None) == BAD_DTYPE
    for actual in y:
        assert_same(actual, reduced(x, op))


@given(n=st.integers(1, 5), root=st.integers(0, 4), count=st.integers(1, 40000), seed=st.integers(0, 2**32 - 1))
def test_broadcast(n: int, root: int, count: int, seed: int) -> None:
    root %= n
    x = inputs_of(seed, n, count, F32)
    y = [a if rank == root else np.empty_like(a) for rank, a in enumerate(x)]  # in place at the root
    expected = x[root].copy()
    with world(n) as ranks:
        assert together(ranks, lambda r: r.broadcast(x[r.rank], y[r.rank], root)) == [SUCCESS] * n
    for actual in y:
        np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("code", sorted(MOVED))
def test_every_dtype_is_moved(code: int) -> None:
    x = inputs_of(code, 3, 41, np.dtype(MOVED[code]))
    y = [np.empty((3, 41), x[0].dtype) for _ in x]
    with world(3) as ranks:
        assert together(ranks, lambda r: r.all_gather(x[r.rank], y[r.rank], code)) == [SUCCESS] * 3
    for actual in y:
        assert actual.tobytes() == b"".join(a.tobytes() for a in x)


COUNTS = st.lists(st.one_of(st.integers(0, 50), st.just(16387)), min_size=1, max_size=5)


@given(counts=COUNTS, equal=st.booleans(), in_place=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_all_gather(counts: list[int], equal: bool, in_place: bool, seed: int) -> None:
    counts = counts[:1] * len(counts) if equal else counts
    n, ends = len(counts), list(itertools.accumulate(counts, initial=0))
    expected = inputs_of(seed, 1, ends[-1], BF16)[0].view(np.uint16)
    y = [np.full_like(expected, 1) for _ in counts]
    x = [y[r][ends[r] : ends[r + 1]] if in_place else np.empty(counts[r], np.uint16) for r in range(n)]
    for r in range(n):
        x[r][...] = expected[ends[r] : ends[r + 1]]

    def body(rank: Rank) -> int:
        send, recv = x[rank.rank].view(BF16), y[rank.rank].view(BF16)
        return rank.all_gather(send, recv) if equal else rank.all_gather_v(send, recv, counts)

    with world(n) as ranks:
        assert together(ranks, body) == [SUCCESS] * n
    for actual in y:
        np.testing.assert_array_equal(actual, expected)


@given(
    counts=COUNTS,
    equal=st.booleans(),
    in_place=st.booleans(),
    dtype=st.sampled_from([F16, BF16, F32]),
    op=st.sampled_from(range(5)),
    seed=st.integers(0, 2**32 - 1),
)
def test_reduce_scatter(counts: list[int], equal: bool, in_place: bool, dtype: np.dtype, op: int, seed: int) -> None:
    counts = counts[:1] * len(counts) if equal else counts
    n, ends = len(counts), list(itertools.accumulate(counts, initial=0))
    x = inputs_of(seed, n, ends[-1], dtype)
    expected = reduced([a.copy() for a in x], op)
    y = [x[r][ends[r] : ends[r + 1]] if in_place else np.empty(counts[r], dtype) for r in range(n)]

    def body(rank: Rank) -> int:
        send, recv = x[rank.rank], y[rank.rank]
        return rank.reduce_scatter(send, recv, op) if equal else rank.reduce_scatter_v(send, recv, counts, op)

    with world(n) as ranks:
        assert together(ranks, body) == [SUCCESS] * n
    for r, actual in enumerate(y):
        assert_same(actual, expected[ends[r] : ends[r + 1]])


# ---- Send, Recv and groups ----


def test_messages_arrive_in_order() -> None:
    """Without a group: every Send waits for its Recv."""
    messages = [np.full(5 + i, i, F32) for i in range(20)]

    def body(rank: Rank) -> list[np.ndarray]:
        received = [np.empty_like(m) for m in messages]
        for message, target in zip(messages, received, strict=True):
            assert rank.send(message, 1) == SUCCESS if rank.rank == 0 else rank.recv(target, 0) == SUCCESS
        return received

    with world(3) as ranks:  # rank 2 has no part in it
        for message, target in zip(messages, together(ranks[:2], body)[1], strict=True):
            np.testing.assert_array_equal(target, message)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_everybody_exchanges_with_everybody(n: int) -> None:
    """In a group, in an order that would deadlock outside of one; a rank may send to itself."""
    with world(n) as ranks:

        def body(rank: Rank) -> bool:
            received = [np.empty(7 + rank.rank, np.int32) for _ in range(n)]
            total, one = np.empty(3, F32), np.ones(3, F32)
            assert rank.group_start() == SUCCESS and rank.group_start() == SUCCESS
            for peer in range(n):
                x = np.full(7 + peer, 100 * rank.rank + peer, np.int32)
                kept.append(x)
                assert rank.send(x, peer) == SUCCESS
            assert rank.group_end() == SUCCESS
            assert rank.all_reduce(one, total) == SUCCESS
            for peer in range(n):
                assert rank.recv(received[peer], peer) == SUCCESS
            assert rank.group_end() == SUCCESS
            expected = [[100 * peer + rank.rank] * (7 + rank.rank) for peer in range(n)]
            return [x.tolist() for x in received] == expected and total.tolist() == [n] * 3

        kept: list[np.ndarray] = []
        assert together(ranks, body) == [True] * n


def test_one_thread_is_all_ranks() -> None:
    x, y = [np.full(9, r + 1, BF16) for r in range(4)], [np.zeros(9, BF16) for _ in range(4)]
    with world(4) as ranks:
        assert ranks[0].group_start() == SUCCESS
        for r in ranks:
            assert r.all_reduce(x[r.rank], y[r.rank]) == SUCCESS
        assert not any(a.any() for a in y)  # nothing happens before the end
        assert ranks[0].group_end() == SUCCESS
    for actual in y:
        assert_same(actual, np.full(9, 10, BF16))


def test_group_refusals() -> None:
    with world(1) as (rank,):
        x, y = np.ones(3, F32), np.zeros(3, F32)
        assert rank.group_end() == BAD_PARAM  # no start
        assert ccl().infinicclGroupStart(None) == ccl().infinicclGroupEnd(None) == NULL_POINTER
        assert rank.group_start() == SUCCESS
        assert rank.all_reduce(x, y) == SUCCESS and rank.broadcast(x, y, 1) == BAD_PARAM
        assert rank.group_end() == BAD_PARAM and not y.any()  # one call was refused, so none runs
        assert rank.all_reduce(x, y) == SUCCESS and y.all()


def test_one_failure_in_a_group_leaves_the_rest() -> None:
    with world(2) as ranks:

        def body(rank: Rank) -> tuple[int, list[float]]:
            x, bad, good = np.ones(4, F32), np.zeros(4, F32), np.zeros(4, F32)
            assert rank.group_start() == SUCCESS
            assert rank.all_reduce(x, bad, count=3 + rank.rank) == SUCCESS
            assert rank.all_reduce(x, good) == SUCCESS
            return rank.group_end(), [bad.sum(), good.sum()]

        assert together(ranks, body) == [(BAD_PARAM, [0, 8])] * 2

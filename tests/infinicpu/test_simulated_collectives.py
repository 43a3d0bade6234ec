"""infiniccl on simulated devices: calls are queued, and the ranks meet where their threads synchronise."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from .lib import (
    BAD_DTYPE,
    BAD_PARAM,
    DTYPE_CODE,
    F16,
    F32,
    INTERNAL_ERROR,
    NOT_IMPLEMENTED,
    NULL_POINTER,
    SUCCESS,
    runtime,
)
from .ranks import MAX, SUM, DeviceArray, Int, Pointer, Rank, UniqueId, ccl, data, sizes, timeout_ms, together, world

DEVICE = 8  # any type but the CPU's
EVERYTHING = (
    "CommInitAll GetUniqueId CommInitRank CommDestroy GroupStart GroupEnd AllReduce Broadcast Send Recv "
    "AllGather AllGatherV ReduceScatter ReduceScatterV"
)


def simulate(collectives: str = EVERYTHING, *extra: str) -> None:
    lines = [
        f"device {DEVICE} hygon",
        "graph_capture 1",
        f"collectives {collectives}",
        "collective_dtypes f32 f16",
        *extra,
    ]
    assert runtime().infinicpuSimulate("\n".join(lines).encode()) == SUCCESS


def error() -> str:
    function = runtime().infinicpuSimulatorError
    function.restype = ctypes.c_char_p
    return function().decode()


@pytest.fixture(autouse=True)
def no_records_afterwards() -> Iterator[None]:
    with timeout_ms(10000):  # a test that fails does not hold up the others for a minute
        yield
    assert runtime().infinirtSetDevice(0, 0) == SUCCESS
    assert runtime().infinicpuSimulate(None) == SUCCESS


@contextmanager
def on_device(rank: Rank) -> Iterator[Callable[[np.ndarray], DeviceArray]]:
    """The rank's device is current, with a stream; gives a function that puts an array there until the end."""
    arrays: list[DeviceArray] = []

    def put(values: np.ndarray) -> DeviceArray:
        arrays.append(DeviceArray(values))
        return arrays[-1]

    rt, stream = runtime(), Pointer()
    assert rt.infinirtSetDevice(DEVICE, rank.rank) == SUCCESS
    assert rt.infinirtStreamCreate(ctypes.byref(stream)) == SUCCESS
    rank.stream = stream.value
    try:
        yield put
    finally:
        for array in arrays:
            assert rt.infinirtSetDevice(DEVICE, array.device) == SUCCESS
            assert array.free() == SUCCESS
        assert rt.infinirtSetDevice(DEVICE, rank.rank) == SUCCESS
        assert rt.infinirtStreamDestroy(stream) == SUCCESS
        assert rt.infinirtSetDevice(0, 0) == SUCCESS


def synchronize(rank: Rank) -> int:
    return runtime().infinirtStreamSynchronize(Pointer(rank.stream))


ONES = np.ones(5, F32)


def test_work_is_done_where_the_ranks_synchronise() -> None:
    def body(rank: Rank) -> Any:
        with on_device(rank) as put:
            x, y, z = put(ONES * (rank.rank + 1)), put(ONES * 0), put(np.zeros(15, F32))
            assert rank.all_reduce(x, y) == SUCCESS  # 6
            assert rank.all_reduce(y, y, MAX) == SUCCESS  # in place: 6
            assert rank.all_gather(x, z) == SUCCESS  # 1, 2, 3
            before = y.read(), z.read()
            assert synchronize(rank) == SUCCESS
            return [a.sum() for a in (*before, y.read())], z.read().reshape(3, 5)[:, 0].tolist()

    simulate()
    with world(3, DEVICE) as ranks:
        assert together(ranks, body) == [([0, 0, 30], [1, 2, 3])] * 3


def test_exchange_in_a_group() -> None:
    def body(rank: Rank) -> float:
        with on_device(rank) as put:
            x, y = put(ONES * (rank.rank + 1)), put(ONES * 0)
            assert rank.group_start() == SUCCESS
            assert rank.send(x, (rank.rank + 1) % 3) == SUCCESS and rank.recv(y, (rank.rank + 2) % 3) == SUCCESS
            assert rank.group_end() == SUCCESS
            before = y.read()
            assert synchronize(rank) == SUCCESS
            return float(y.read()[0] - before[0])

    simulate()
    with world(3, DEVICE) as ranks:
        assert together(ranks, body) == [3, 1, 2]


def test_one_thread_queues_for_all_ranks() -> None:
    """In one group, on the devices' own streams; each stream is synchronised by a thread of its own."""
    simulate()
    rt = runtime()
    with world(2, DEVICE) as ranks, on_device(ranks[0]) as put:
        assert ranks[0].group_start() == SUCCESS
        arrays = []
        for rank in ranks:
            assert rt.infinirtSetDevice(DEVICE, rank.rank) == SUCCESS
            arrays.append(put(ONES * (rank.rank + 1)))
            rank.stream = None if rank.rank == 1 else rank.stream
            assert rank.all_reduce(arrays[-1], arrays[-1]) == SUCCESS
        assert rt.infinirtSetDevice(DEVICE, 0) == SUCCESS
        assert ranks[1].group_end() == SUCCESS
        current = Int(-1)
        assert rt.infinirtGetDevice(None, ctypes.byref(current)) == SUCCESS and current.value == 0

        def body(rank: Rank) -> tuple[int, float]:
            assert rt.infinirtSetDevice(DEVICE, rank.rank) == SUCCESS
            return synchronize(rank), float(arrays[rank.rank].read()[0])

        assert together(ranks, body) == [(SUCCESS, 3)] * 2


def test_a_captured_collective_is_replayed() -> None:
    def body(rank: Rank) -> list[float]:
        rt, graph, executable = runtime(), Pointer(), Pointer()
        with on_device(rank) as put:
            x = put(ONES)
            stream = Pointer(rank.stream)
            assert rt.infinirtStreamBeginCapture(stream, 1) == SUCCESS
            assert rank.all_reduce(x, x) == SUCCESS
            assert rt.infinirtStreamEndCapture(stream, ctypes.byref(graph)) == SUCCESS
            assert (
                rt.infinirtGraphInstantiate(ctypes.byref(executable), graph, None, None, ctypes.c_size_t(0)) == SUCCESS
            )
            values = [float(x.read()[0])]
            for _ in range(3):
                assert rt.infinirtGraphLuanch(executable, stream) == SUCCESS and synchronize(rank) == SUCCESS
                values.append(float(x.read()[0]))
            assert rt.infinirtGraphExecDestroy(executable) == SUCCESS and rt.infinirtGraphDestroy(graph) == SUCCESS
            return values

    simulate(EVERYTHING, "collective_capture 1")
    with world(2, DEVICE) as ranks:
        assert together(ranks, body) == [[1, 2, 4, 8]] * 2


def test_collectives_are_not_captured_where_nobody_knows_whether_they_can_be(capfd: pytest.CaptureFixture[str]) -> None:
    def body(rank: Rank) -> tuple[int, int]:
        rt, graph = runtime(), Pointer()
        with on_device(rank) as put:
            x = put(ONES)
            stream = Pointer(rank.stream)
            assert rt.infinirtStreamBeginCapture(stream, 1) == SUCCESS
            return rank.all_reduce(x, x), rt.infinirtStreamEndCapture(stream, ctypes.byref(graph))

    simulate()
    with world(2, DEVICE) as ranks:
        for refused, ended in together(ranks, body):
            assert refused != SUCCESS and ended != SUCCESS
    assert "hygon: collectives may not be captured" in capfd.readouterr().err


def test_disagreement_is_found_when_the_ranks_meet() -> None:
    def body(rank: Rank) -> tuple[int, float, int, float]:
        with on_device(rank) as put:
            x, y = put(ONES), put(ONES * 0)
            assert rank.all_reduce(x, y, count=4 + rank.rank) == SUCCESS
            first, untouched = synchronize(rank), float(y.read().sum())
            assert rank.all_reduce(x, y) == SUCCESS
            return first, untouched, synchronize(rank), float(y.read().sum())

    simulate()
    with world(2, DEVICE) as ranks:
        assert together(ranks, body) == [(BAD_PARAM, 0, SUCCESS, 10)] * 2


def test_memory_freed_before_the_ranks_meet_fails_on_all_of_them() -> None:
    def body(rank: Rank) -> tuple[int, float]:
        with on_device(rank) as put:
            x, y = put(ONES), put(ONES * 0)
            assert rank.all_reduce(x, y) == SUCCESS
            if rank.rank == 1:
                assert x.free() == SUCCESS
            return synchronize(rank), float(y.read().sum())

    simulate()
    with world(3, DEVICE) as ranks:
        assert together(ranks, body) == [(BAD_PARAM, 0)] * 3
    assert "AllReduce: sendbuf" in error()


def test_a_rank_that_never_synchronises() -> None:
    def body(rank: Rank) -> int:
        with on_device(rank) as put:
            x = put(ONES)
            assert rank.all_reduce(x, x) == SUCCESS
            return synchronize(rank)

    simulate()
    with timeout_ms(30), world(2, DEVICE) as ranks:
        assert body(ranks[1]) == INTERNAL_ERROR


def test_work_that_is_queued_when_the_communicator_goes() -> None:
    simulate()
    with world(1, DEVICE) as (rank,), on_device(rank) as put:
        x = put(ONES)
        assert rank.all_reduce(x, x) == SUCCESS and rank.destroy() == SUCCESS
        assert synchronize(rank) == INTERNAL_ERROR


def calls(rank: Rank, x: DeviceArray, y: DeviceArray, code: int) -> dict[str, Callable[[], int]]:
    lib, comm, a, b, one = ccl(), rank.comm, data(x), data(y), sizes([1])
    return {
        "AllReduce": lambda: lib.infinicclAllReduce(a, b, 1, code, SUM, comm, None),
        "Broadcast": lambda: lib.infinicclBroadcast(a, b, 1, code, 0, comm, None),
        "Send": lambda: lib.infinicclSend(a, 1, code, 0, comm, None),
        "Recv": lambda: lib.infinicclRecv(b, 1, code, 0, comm, None),
        "AllGather": lambda: lib.infinicclAllGather(a, b, 1, code, comm, None),
        "AllGatherV": lambda: lib.infinicclAllGatherV(a, b, one, 1, code, comm, None),
        "ReduceScatter": lambda: lib.infinicclReduceScatter(a, b, 1, code, SUM, comm, None),
        "ReduceScatterV": lambda: lib.infinicclReduceScatterV(a, b, one, 1, code, SUM, comm, None),
    }


def test_what_the_record_lacks() -> None:
    simulate("CommInitAll CommDestroy AllReduce")
    name, comm = UniqueId(), Pointer()
    with world(1, DEVICE) as (rank,), on_device(rank) as put:
        x, y = put(ONES), put(ONES)
        for what, call in calls(rank, x, y, DTYPE_CODE[F32]).items():
            assert call() == (SUCCESS if what == "AllReduce" else NOT_IMPLEMENTED), what
            assert what == "AllReduce" or error() == f"hygon: {what}: not among its collectives"
        assert ccl().infinicclGetUniqueId(ctypes.byref(name)) == NOT_IMPLEMENTED
        assert ccl().infinicclCommInitRank(ctypes.byref(comm), 1, name, 0) == NOT_IMPLEMENTED
        assert rank.group_start() == rank.group_end() == NOT_IMPLEMENTED
        assert runtime().infinirtDeviceSynchronize() == SUCCESS
    simulate("AllReduce")
    assert ccl().infinicclCommInitAll(DEVICE, ctypes.byref(comm), 1, (Int * 1)(0)) == NOT_IMPLEMENTED
    assert comm.value is None


def test_dtypes_that_the_record_lacks() -> None:
    simulate()
    with world(1, DEVICE) as (rank,), on_device(rank) as put:
        x, y = put(ONES), put(ONES)
        for dtype, expected in (
            (5, NOT_IMPLEMENTED),
            (19, NOT_IMPLEMENTED),
            (20, BAD_DTYPE),
            (DTYPE_CODE[F16], SUCCESS),
        ):
            assert rank.group_start() == SUCCESS  # a Send alone would wait for ever
            for what, call in calls(rank, x, y, dtype).items():
                assert call() == expected, (what, dtype)
            assert rank.group_end() == expected
        assert error() == "hygon: ReduceScatterV: its collectives do not take bf16"
        assert runtime().infinirtDeviceSynchronize() == SUCCESS


def test_memory_and_devices_are_checked_at_the_call() -> None:
    simulate()
    rt = runtime()
    with world(2, DEVICE) as ranks, on_device(ranks[0]) as put:
        x, host = put(ONES), np.ones(5, F32)
        for arguments in ((host, x), (x, host)):
            assert ranks[0].all_reduce(*arguments) == BAD_PARAM
            assert error().startswith("hygon: AllReduce: " + ("sendbuf" if arguments[0] is host else "recvbuf"))
        assert ranks[0].all_reduce(x, x, count=6) == BAD_PARAM  # one element more than there is
        assert ranks[1].all_reduce(x, x) == BAD_PARAM
        assert error() == "hygon: AllReduce: the current device is number 0 of type 8, the communicator's is number 1"
        assert rt.infinirtSetDevice(DEVICE, 1) == SUCCESS
        assert ranks[1].all_reduce(x, x) == BAD_PARAM and "sendbuf" in error()  # device 0's memory
        assert ccl().infinicclAllReduce(None, None, 1, 13, SUM, ranks[1].comm, None) == NULL_POINTER
        assert rt.infinirtSetDevice(DEVICE, 0) == SUCCESS

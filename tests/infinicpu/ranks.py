"""Calls infiniccl through ctypes: several ranks, each a thread."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest

from .lib import DTYPE_CODE, SUCCESS, collectives, runtime

SUM, PROD, MAX, MIN, AVG = range(5)  # infinicclReduceOp_t

Pointer, Size, Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


@cache
def ccl() -> ctypes.CDLL:
    library = collectives()
    sizes = ctypes.POINTER(Size)
    for name, types in {
        "CommInitAll": [Int, Pointer, Int, Pointer],
        "CommInitRank": [Pointer, Int, UniqueId, Int],
        "CommDestroy": [Pointer],
        "GroupStart": [Pointer],
        "GroupEnd": [Pointer],
        "AllReduce": [Pointer, Pointer, Size, Int, Int, Pointer, Pointer],
        "Broadcast": [Pointer, Pointer, Size, Int, Int, Pointer, Pointer],
        "Send": [Pointer, Size, Int, Int, Pointer, Pointer],
        "Recv": [Pointer, Size, Int, Int, Pointer, Pointer],
        "AllGather": [Pointer, Pointer, Size, Int, Pointer, Pointer],
        "AllGatherV": [Pointer, Pointer, sizes, Int, Int, Pointer, Pointer],
        "ReduceScatter": [Pointer, Pointer, Size, Int, Int, Pointer, Pointer],
        "ReduceScatterV": [Pointer, Pointer, sizes, Int, Int, Int, Pointer, Pointer],
    }.items():
        getattr(library, f"infiniccl{name}").argtypes = types
    return library


class DeviceArray:
    """An array in the memory of the current, simulated device: a copy of `values`."""

    def __init__(self, values: np.ndarray) -> None:
        self.dtype, self.shape, self.size, self.nbytes = values.dtype, values.shape, values.size, values.nbytes
        memory, device = Pointer(), Int()
        assert runtime().infinirtGetDevice(None, ctypes.byref(device)) == SUCCESS
        self.device = device.value
        assert runtime().infinirtMalloc(ctypes.byref(memory), Size(self.nbytes)) == SUCCESS
        self.address = memory.value
        assert self._copy(self.address, data(values), 1) == SUCCESS

    def _copy(self, target: int | None, source: int | None, kind: int) -> int:
        return runtime().infinirtMemcpy(Pointer(target), Pointer(source), Size(self.nbytes), kind)

    def read(self) -> np.ndarray:
        """What is there now, whatever is queued."""
        values = np.empty(self.shape, self.dtype)
        assert self._copy(data(values), self.address, 2) == SUCCESS
        return values

    def free(self) -> int:
        address, self.address = self.address, None
        return runtime().infinirtFree(Pointer(address))


Array = np.ndarray | DeviceArray


def data(array: Array) -> int | None:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.address


def sizes(counts: Sequence[int]) -> Any:
    return (Size * len(counts))(*counts)


class Rank:
    """One rank's communicator; arrays instead of pointers and dtypes. Every method returns the status."""

    def __init__(self, rank: int, comm: int | None, stream: int | None = None) -> None:
        self.rank, self.comm, self.stream = rank, comm, stream

    def all_reduce(self, x: Array, y: Array, op: int = SUM, count: int | None = None) -> int:
        count = x.size if count is None else count
        return ccl().infinicclAllReduce(data(x), data(y), count, DTYPE_CODE[x.dtype], op, self.comm, self.stream)

    def broadcast(self, x: Array, y: Array, root: int) -> int:
        return ccl().infinicclBroadcast(data(x), data(y), x.size, DTYPE_CODE[x.dtype], root, self.comm, self.stream)

    def send(self, x: Array, peer: int) -> int:
        return ccl().infinicclSend(data(x), x.size, DTYPE_CODE[x.dtype], peer, self.comm, self.stream)

    def recv(self, y: Array, peer: int) -> int:
        return ccl().infinicclRecv(data(y), y.size, DTYPE_CODE[y.dtype], peer, self.comm, self.stream)

    def all_gather(self, x: Array, y: Array, code: int | None = None) -> int:
        code = DTYPE_CODE[x.dtype] if code is None else code
        return ccl().infinicclAllGather(data(x), data(y), x.size, code, self.comm, self.stream)

    def all_gather_v(self, x: Array, y: Array, counts: Sequence[int]) -> int:
        code = DTYPE_CODE[y.dtype]
        return ccl().infinicclAllGatherV(data(x), data(y), sizes(counts), len(counts), code, self.comm, self.stream)

    def reduce_scatter(self, x: Array, y: Array, op: int = SUM) -> int:
        return ccl().infinicclReduceScatter(data(x), data(y), y.size, DTYPE_CODE[x.dtype], op, self.comm, self.stream)

    def reduce_scatter_v(self, x: Array, y: Array, counts: Sequence[int], op: int = SUM) -> int:
        code = DTYPE_CODE[x.dtype]
        return ccl().infinicclReduceScatterV(
            data(x), data(y), sizes(counts), len(counts), code, op, self.comm, self.stream
        )

    def group_start(self) -> int:
        return ccl().infinicclGroupStart(self.comm)

    def group_end(self) -> int:
        return ccl().infinicclGroupEnd(self.comm)

    def destroy(self) -> int:
        comm, self.comm = self.comm, None
        return ccl().infinicclCommDestroy(comm)


@contextlib.contextmanager
def world(n: int, device_type: int = 0) -> Iterator[list[Rank]]:
    """A communicator of n ranks on devices 0 .. n - 1."""
    comms = (Pointer * n)()
    assert ccl().infinicclCommInitAll(device_type, comms, n, (Int * n)(*range(n))) == SUCCESS
    ranks = [Rank(i, comm) for i, comm in enumerate(comms)]
    try:
        yield ranks
    finally:
        assert [rank.destroy() for rank in ranks] == [SUCCESS] * n


@cache
def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(8)


def together(ranks: Sequence[Any], body: Callable[[Any], Any]) -> list[Any]:
    """body(rank) of every rank, each in a thread of its own."""
    return list(threads().map(body, ranks))


@contextlib.contextmanager
def timeout_ms(value: int) -> Iterator[None]:
    """How long the ranks of communicators that are made here wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFINICPU_CCL_TIMEOUT_MS", str(value))
        yield

"""What devices call together, against numpy: a thread per device, as the engine has them, each with memory, a stream and a communicator of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from ctypes import c_int, c_size_t, c_void_p
from typing import TypeVar

import numpy as np

from codegen.check_ops import (
    CRASHED,
    NOT_RUN,
    TIMED_CALLS,
    TIMED_SECONDS,
    WRONG,
    Result,
    compare,
    describe,
    refuse,
    result_of,
    spill,
)
from codegen.check_ops_bounds import Expected, expect
from codegen.check_ops_calls import OpCall, Use
from codegen.check_ops_cases import Case, cases_of
from codegen.check_ops_device import Device, Refused, Region
from ir.types import DTYPES
from runtime.errors import InfiniCoreError
from runtime.infinicore import Provider, device_count
from runtime.structs import DataType

_SUM = 0  # infinicclReduceOp_t
_T = TypeVar("_T")


class Team:
    """Devices of one type, each served by its own thread, with communicators of all of them.

    Args:
        numbers: of the devices among those of their type.

    Raises:
        InfiniCoreError: a device cannot be used.
        Refused: there are no communicators.
    """

    def __init__(self, provider: Provider, device: int, numbers: list[int]) -> None:
        self._threads = [ThreadPoolExecutor(1, f"device {number}") for number in numbers]
        # The current device is a matter of each thread.
        self.devices = self.each(lambda rank: Device(provider, device, numbers[rank]))
        self.comms = (c_void_p * len(numbers))()
        first = self.devices[0]
        ids = (c_int * len(numbers))(*numbers)
        self._threads[0].submit(
            first.status, "infinicclCommInitAll", c_int(device), self.comms, c_int(len(numbers)), ids
        ).result()

    def each(self, work: Callable[[int], _T]) -> list[_T]:
        """``work(rank)`` on every device's thread at once; their results.

        Raises:
            what the first of them raised. The others are not waited for: they may be waiting for that one.
        """
        futures = [thread.submit(work, rank) for rank, thread in enumerate(self._threads)]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]

    def close(self) -> None:
        def leave(rank: int) -> None:
            self.devices[rank].run("infinicclCommDestroy", c_void_p(self.comms[rank]))
            self.devices[rank].close()

        self.each(leave)
        for thread in self._threads:
            thread.shutdown()


class Meeting:
    """Runs the collectives of a build; its devices are opened for the first of them.

    Args:
        device: infiniDevice_t.
        first: number of the first of the devices.
    """

    def __init__(self, provider: Provider, device: int, first: int) -> None:
        self.provider, self.device, self.first = provider, device, first
        self._team: Team | None = None

    def check(self, use: Use, seed: int = 0) -> Result:
        """As check_ops.check, of a call in which devices meet. NOT_RUN where there are fewer devices."""
        result = result_of(use)
        ndev = dict(use.call.attrs)["ndev"]
        there = device_count(self.provider, self.device)
        if there is not None and self.first + ndev > there:
            result.status = NOT_RUN
            wanted = f"{ndev} devices from number {self.first} on" if self.first else f"{ndev} devices"
            result.reason = f"takes {wanted}, and there {'is' if there == 1 else 'are'} {there}"
            return result
        try:
            if self._team is None:
                self._team = Team(self.provider, self.device, list(range(self.first, self.first + ndev)))
            _check(self._team, use.call, result, seed)
        except Refused as refusal:
            refuse(result, refusal)
            if result.cases:
                result.failed.append(result.cases[-1])
                result.reason += f" (case {result.cases[-1]})"
        except InfiniCoreError as error:
            result.status, result.status_code, result.reason = CRASHED, error.status, str(error)
        return result

    def close(self) -> None:
        if self._team is not None:
            self._team.close()


def _check(team: Team, call: OpCall, result: Result, seed: int) -> None:
    name = f"infiniccl{call.spec.name}"
    team.devices[0].function(name)  # not there: said before anything else
    benches = team.each(lambda rank: _Bench(team.devices[rank], team.comms[rank], name, call))
    result.workspace_bytes = 0
    first: Case | None = None
    for case in cases_of(call, seed):
        first = first or case
        result.cases.append(case.name)
        images = team.each(lambda rank: benches[rank].run(case.inputs["i0"][rank]))
        expected = expect(call, case)["o0"]
        problems = []
        for rank, (bench, image) in enumerate(zip(benches, images)):
            found = bench.out.view(image)
            worst = compare(case.name, "o0", found, expected)
            if result.worst is None or worst.share > result.worst.share:
                result.worst = worst
            problem = describe(worst, found) if worst.share > 1 else bench.elsewhere(image)
            if problem:
                problems.append(f"device {rank}: {problem}")
                result.likely = result.likely or _likely(call, case, rank, found)
        if problems:
            result.status = WRONG
            result.failed.append(case.name)
            result.reason = result.reason or f"{problems[0]} (case {case.name})"
    if first is not None:
        result.microseconds = _time(team, benches, first)
    team.each(lambda rank: benches[rank].free())


class _Bench:
    """One device's memory, and its part of the call. Used by that device's thread."""

    def __init__(self, device: Device, comm: int | None, name: str, call: OpCall) -> None:
        self.device, self.name, self.comm = device, name, c_void_p(comm)
        self.out = Region(device, call["o0"])
        self.source = self.out if call.in_place else Region(device, call["i0"])
        self.mask = self.out.mask()
        self.count = int(np.prod(call["i0"].shape))
        self.dtype = c_int(DataType["INFINI_DTYPE_" + DTYPES[call["i0"].dtype].infini])
        self.sums = call.op == "infini.all_reduce"

    def put(self, values: np.ndarray) -> None:
        self.out.put(None)
        self.source.put(values)

    def enqueue(self) -> None:
        """
        Raises:
            Refused
        """
        operation = [c_int(_SUM)] if self.sums else []
        pointers = c_void_p(self.source.pointer), c_void_p(self.out.pointer)
        self.device.status(
            self.name, *pointers, c_size_t(self.count), self.dtype, *operation, self.comm, self.device.stream
        )

    def run(self, values: np.ndarray) -> np.ndarray:
        """An image of the result's memory after a call with these values."""
        self.put(values)
        self.enqueue()
        self.device.synchronise()
        return self.out.get()

    def elsewhere(self, image: np.ndarray) -> str:
        """What was changed that is no result."""
        outside = (image != self.out.image) & ~self.mask
        if outside.any():
            return f"o0: {spill(self.out, outside)}"
        return ""

    def time(self, calls: int) -> float:
        """Seconds of so many calls, without waiting between them."""
        started = time.perf_counter()
        for _ in range(calls):
            self.enqueue()
        self.device.synchronise()
        return time.perf_counter() - started

    def free(self) -> None:
        for region in {id(r): r for r in (self.out, self.source)}.values():
            region.free()


def _time(team: Team, benches: list[_Bench], case: Case) -> float:
    """Microseconds of a call, of the slowest device."""
    team.each(lambda rank: benches[rank].put(case.inputs["i0"][rank]))
    calls = 1
    while True:
        spent = max(team.each(lambda rank: benches[rank].time(calls)))
        if spent >= TIMED_SECONDS / 4 or calls >= TIMED_CALLS:
            return spent / calls * 1e6
        calls = min(TIMED_CALLS, 4 * calls)


def _likely(call: OpCall, case: Case, rank: int, found: np.ndarray) -> str:
    """What the result would be right for; ``""`` where nothing fits."""
    parts = case.inputs["i0"]

    def fits(values: np.ndarray) -> bool:
        return compare("", "o0", found, Expected(values, None)).share <= 1

    if call.op == "infini.all_gather":
        return "right if the devices come in the opposite order" if fits(parts[::-1]) else ""
    if fits(parts[rank]):
        return "right if every device is alone: nothing was added"
    expected = expect(call, case)["o0"]
    assert expected.bound is not None  # of sums
    mean = Expected(expected.values / len(parts), expected.bound)
    return "right for the average" if compare("", "o0", found, mean).share <= 1 else ""

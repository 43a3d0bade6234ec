"""Devices as threads: runs what each device of a sharded graph runs, with collectives between the interpreters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from ir.errors import GraphError

Result = TypeVar("Result")
TIMEOUT = 60.0  # seconds that a device waits for the others: one that never comes is an error and no hang


class Group:
    """The devices that meet in a collective: each leaves its array, waits, and takes what all of them left."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: list[np.ndarray | None] = [None] * size
        self._barrier = threading.Barrier(size, timeout=TIMEOUT)

    def exchange(self, rank: int, x: np.ndarray) -> list[np.ndarray]:
        try:
            self._slots[rank] = np.array(x)
            self._barrier.wait()
            found = [a for a in self._slots if a is not None]
            self._barrier.wait()  # nobody leaves its next array before all have read this one
        except threading.BrokenBarrierError:
            raise GraphError(f"device {rank} of {self.size}: another one did not come to a collective") from None
        if len({(a.shape, a.dtype) for a in found}) != 1:
            shapes = ", ".join(f"{a.dtype}{list(a.shape)}" for a in found)
            raise GraphError(f"devices come to a collective with different tensors: {shapes}")
        return found

    def abort(self) -> None:
        """Free those who wait: somebody will not come."""
        self._barrier.abort()


class Rank:
    """One device of a group (an ir.interp.Communicator)."""

    def __init__(self, group: Group, rank: int) -> None:
        self.group = group
        self.rank = rank

    def all_reduce(self, x: np.ndarray) -> np.ndarray:
        # In the ranks' order, so that all devices get the same bits.
        total, *rest = self.group.exchange(self.rank, x)
        for other in rest:
            total = total + other
        return total

    def all_gather(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate(self.group.exchange(self.rank, x), axis=-1)


def run_ranks(count: int, device: Callable[[Rank], Result]) -> Sequence[Result]:
    """``device(rank)`` on a thread per device; their results by rank.

    Raises:
        The first error that was no consequence of another device's.
    """
    group = Group(count)
    results: list[Result | None] = [None] * count
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = device(Rank(group, rank))
        except BaseException as error:
            errors.append(error)  # before the others are freed: theirs come later
            group.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]

"""What each device of InfiniCore can do, as data (targets.json), and how legalisation asks.

A record belongs to a target and an InfiniCore: ``cpu`` is the real InfiniCore's CPU backend, ``embedded`` our own library for the same device, which has more.
Facts were read from InfiniCore's sources at main 2cec6ce6 (2026-08-08); ``since`` is the date an op came to main; ``uncertain`` ones count as absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ir.errors import UnsupportedError

# The first published release; what came to main later is not in it.
RELEASE_0_1_0 = "2025-10-01"


@dataclass(frozen=True)
class OpSupport:
    """One op on one target. Empty tuples mean: no limit is known."""

    dtypes: tuple[str, ...]
    index_dtypes: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = ()
    since: str = ""
    uncertain: bool = False
    graph_capture: bool | None = None


@dataclass(frozen=True)
class Target:
    """One device type under one InfiniCore.

    Attributes:
        name: the record's name, a target or ``embedded``.
        device: the infiniDevice_t.
        host_memory: device memory is host memory, so weights are used where they are mapped.
        block_size: tokens per block of a paged KV cache.
    """

    name: str
    device: int
    ops: Mapping[str, OpSupport]
    graph_capture: bool
    collectives: tuple[str, ...]
    block_size: int = 16

    @property
    def host_memory(self) -> bool:
        return self.device == 0

    def refusal(self, op: str, dtype: str, head_dim: int | None = None) -> str:
        """Why the op cannot be used with this dtype here, or ``""`` if it can."""
        support = self.ops.get(op)
        if support is None:
            return f"{self.name} has no {op}"
        if support.uncertain:
            return f"{op} on {self.name} is uncertain"
        if dtype not in support.dtypes:
            return f"{op} on {self.name} takes {', '.join(support.dtypes)}, not {dtype}"
        if head_dim is not None and support.head_dims and head_dim not in support.head_dims:
            return f"{op} on {self.name} takes head_dim {', '.join(map(str, support.head_dims))}, not {head_dim}"
        return ""


@cache
def targets() -> dict[str, Target]:
    """Every record by name."""
    raw = json.loads((Path(__file__).parent / "targets.json").read_text(encoding="utf-8"))
    table = {}
    for name, record in raw.items():
        ops = {}
        for op, fields in record["ops"].items():
            given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            ops[op] = OpSupport(**given)
        table[name] = Target(name, record["device"], ops, record["graph_capture"], tuple(record["collectives"]))
    return table


TARGETS = "cpu nvidia cambricon ascend metax moore iluvatar kunlun hygon qy ali".split()


def select(target: str, infinicore: str) -> Target:
    """The record for ``--target`` and ``--infinicore`` (``embedded``, ``any`` or a folder).

    ``any`` leaves out what the first release lacks, so the engine runs on every InfiniCore since.

    Raises:
        UnsupportedError: there is no such target.
    """
    if target not in TARGETS:
        raise UnsupportedError(f"unknown target {target!r}; targets are {', '.join(TARGETS)}")
    if infinicore == "embedded" and target == "cpu":
        return targets()["embedded"]
    record = targets()[target]
    if infinicore == "any" or target == "cpu":
        # The ops that every InfiniCore has with one meaning and one argument order; an installation is not probed yet.
        ops = {k: v for k, v in record.ops.items() if not v.since or v.since < RELEASE_0_1_0}
        return Target(record.name, record.device, ops, record.graph_capture, record.collectives)
    return record

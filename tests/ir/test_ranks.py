"""Devices as threads: collectives between interpreters, and devices that fail or never come."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ir.errors import GraphError
from ir.graph import Graph, GraphEditor, Value
from ir.interp import run
from ir.ranks import Rank, run_ranks
from ir.text import parse, to_text
from ir.types import TensorType, sym
from ir.verify import verify


def meeting(stage: str) -> Graph:
    """x -> the sum of all devices' x, and all of them side by side."""
    prefix = "infini." if stage == "infini" else ""
    x = TensorType("f64", (sym("T"), sym("V")))
    edit = GraphEditor(Graph("g", stage, (Value("x", x),), (), {}, ()))
    edit.outputs = [
        edit.add(prefix + "all_reduce", ["x"], ["total"])[0],
        edit.add(prefix + "all_gather", ["x"], ["whole"], {"size": 12})[0],
    ]
    return verify(edit.finish())


@pytest.mark.parametrize("stage", ["fused", "infini"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_collectives(stage, count):
    graph = meeting(stage)
    assert parse(to_text(graph)) == graph
    whole = np.random.default_rng(count).normal(size=(5, 12))
    parts = np.split(whole, count, axis=1)
    results = run_ranks(count, lambda rank: run(graph, {"x": parts[rank.rank]}, communicator=rank))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    for found in results:  # the same bits everywhere
        np.testing.assert_array_equal(found["total"], total)
        np.testing.assert_array_equal(found["whole"], whole)


def test_alone_there_is_nobody_to_meet():
    x = np.arange(24.0).reshape(2, 12)
    found = run(meeting("infini"), {"x": x})
    np.testing.assert_array_equal(found["total"], x)
    np.testing.assert_array_equal(found["whole"], x)


def test_many_collectives_in_a_row_stay_apart():
    """A fast device must not overwrite what a slow one has not read yet."""

    def device(rank: Rank) -> list[float]:
        return [float(rank.all_reduce(np.array([step * (rank.rank + 1.0)]))[0]) for step in range(300)]

    for found in run_ranks(4, device):
        assert found == [10.0 * step for step in range(300)]


def test_a_device_that_fails_frees_the_others_and_its_error_is_told():
    def device(rank: Rank) -> None:
        if rank.rank == 2:
            raise GraphError("device 2 is broken")
        rank.all_reduce(np.ones(3))

    before = threading.active_count()
    with pytest.raises(GraphError, match="device 2 is broken"):
        run_ranks(3, device)
    assert threading.active_count() == before


def test_a_device_that_never_comes_is_an_error(monkeypatch):
    monkeypatch.setattr("ir.ranks.TIMEOUT", 0.2)

    def device(rank: Rank) -> None:
        if rank.rank:
            rank.all_reduce(np.ones(3))

    with pytest.raises(GraphError, match="device 1 of 2: another one did not come to a collective"):
        run_ranks(2, device)

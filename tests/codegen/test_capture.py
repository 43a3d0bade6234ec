"""Captured decode steps, switched on and off, in the simulator."""

from __future__ import annotations

import numpy as np
import pytest

from tests.codegen.engines import Builder
from tests.codegen.simulated import build_all, config, open_simulated
from tests.models import relative_l2

NVIDIA = dict(target="nvidia", dtype="bf16", kv="paged")
METAX = dict(target="metax", dtype="bf16", kv="paged")


@pytest.fixture(scope="module")
def builds(build_engine: Builder):
    return build_all(build_engine, [NVIDIA, METAX])


def decode(s, cache: int, position: int, steps: int) -> np.ndarray:
    return np.concatenate([s.engine.forward([7 + i], [1], [position + i], [cache]) for i in range(steps)])


def test_steps_as_graphs_and_as_calls_are_the_same(builds, build_engine):
    reference = build_engine.reference(build_engine.checkpoint(config()))
    s = open_simulated(builds["nvidia-bf16-paged"], reference, 1.0)
    prompt = s.tokens(21, 0)
    found, replayed = [], []
    for on in (True, False, True):
        s.engine.set_capture(on)
        cache, before = s.engine.create_cache(0), s.engine.counter("graphs_replayed")
        s.engine.forward(prompt, [21], [0], [cache])
        found.append(decode(s, cache, 21, 6))
        replayed.append(s.engine.counter("graphs_replayed") - before)
        s.engine.drop_cache(cache)
    s.engine.close()
    assert replayed[0] == 5 and replayed[1] == 0 and replayed[2] == 6  # the first step of a shape runs as calls
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize("target, ndev, captured", [("nvidia", 2, True), ("metax", 1, True), ("metax", 2, False)])
def test_several_devices_replay_only_what_is_known_to_be_replayable(builds, build_engine, target, ndev, captured):
    """NCCL's collectives can be captured; of metax's nobody has said so."""
    reference = build_engine.reference(build_engine.checkpoint(config()))
    s = open_simulated(builds[f"{target}-bf16-paged"], reference, 1.0, ndev)
    cache = s.engine.create_cache(0)
    rows = decode(s, cache, 0, 6)
    tokens = np.arange(7, 13)
    assert relative_l2(rows, s.expected(tokens)) < 0.1 and (s.engine.counter("graphs_replayed") > 0) == captured
    each = 2 * 3 + (target == "nvidia")  # sums, and the gathering of logits
    assert s.engine.counter("collectives") == (6 * each if ndev > 1 else 0)  # replayed ones count too
    s.engine.close()

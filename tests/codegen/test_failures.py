"""What InfiniCore may refuse in the middle of things, planted one call at a time: what is said, what is left as it was, and that the next call works.

faults.cpp stands between the engine and InfiniCore; see faulty.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import InfiniCoreError
from runtime.structs import NUMPY_DTYPES, STATUS_NAMES
from tests.codegen.engines import Builder
from tests.codegen.faulty import FAULTY, PLANTED, Faults, faulty_builds
from tests.codegen.simulated import DEVICE_IDS, Bounds, Comparison, Simulated, bounds_of, config, open_simulated

LAYERS, KV_HEADS = config()["num_hidden_layers"], config()["num_key_value_heads"]
SAID = rf"status {PLANTED} \({STATUS_NAMES[PLANTED]}\)"
# Out of device memory for caches has a status of its own; the rest say what failed, and on what.
SAID_OF_MEMORY = re.compile(
    rf"(infini\w+.* \([\w ]+\)|infini\w+ .*|\w+): {SAID}|KV (cache|pool) of \d+ bytes: status 13"
)
# Two requests whose next tokens lie beside the end of a block, and inside one.
LENGTHS = (15, 4)


@pytest.fixture(scope="module")
def builds(build_engine: Builder) -> dict[str, Path]:
    return faulty_builds(build_engine)


class Requests:
    """Two requests that go on token by token on an engine, and are compared with the reference at every step."""

    def __init__(self, simulated: Simulated, faults: Faults, ids: list[int], dtype: str) -> None:
        self.simulated, self.engine, self.faults, self.ids = simulated, simulated.engine, faults, ids
        self.kind = NUMPY_DTYPES[dtype]
        self.text = [simulated.tokens(100, seed) for seed in (1, 2)]
        self.done = [0, 0]
        self.caches: list[int] = []

    def start(self) -> Requests:
        self.caches = [self.engine.create_cache(0) for _ in self.text]
        self.step(LENGTHS)
        return self

    def step(self, new: tuple[int, ...] = (1, 1)) -> None:
        """Feed each request's next tokens and look at the last logits of each. After a failure, the next call feeds the same ones again."""
        spans = [slice(n, n + more) for n, more in zip(self.done, new)]
        flat = np.concatenate([text[span] for text, span in zip(self.text, spans)])
        logits = self.engine.forward(flat, list(new), self.done, self.caches)
        expected = np.stack([self.simulated.expected(text[: s.stop])[-1] for text, s in zip(self.text, spans)])
        Comparison(Bounds(np.inf, self.simulated.bounds.row)).check(logits, expected, f"step at {self.done}")
        self.done = [s.stop for s in spans]
        assert self.lengths() == self.done

    def lengths(self) -> list[int]:
        return [self.engine.cache_length(cache) for cache in self.caches]

    def state(self) -> tuple[Any, ...]:
        """All that a failed call must leave as it was: caches, what the pool counts, and memory that is taken."""
        contents = [self.bytes_of(cache) for cache in self.caches]
        return self.lengths(), contents, self.engine.pool_info(), self.faults.live_allocations

    def bytes_of(self, cache: int) -> bytes:
        return self.engine.export_cache(cache, 0, self.engine.cache_length(cache), self.kind).tobytes()


@pytest.fixture
def started(builds, build_engine: Builder, monkeypatch) -> Iterator[Callable[..., Requests]]:
    """``started(kv, ndev, timeout_ms=...) -> Requests``. Whatever happened in a test, closing the engine gives back all its memory."""
    opened: list[Requests] = []

    def start(kv: str, ndev: int, timeout_ms: int = 20000) -> Requests:
        monkeypatch.setenv("INFINICPU_CCL_TIMEOUT_MS", str(timeout_ms))
        options = FAULTY[kv]
        faults = Faults(builds[kv])
        reference = build_engine.reference(build_engine.checkpoint(config()))
        s = open_simulated(builds[kv], reference, bounds_of(build_engine, *options), ndev)
        opened.append(Requests(s, faults, list(DEVICE_IDS[:ndev]) if ndev > 1 else [0], options[1]))
        return opened[-1].start()

    yield start
    for requests in opened:
        requests.engine.close()
    for requests in opened:
        assert (requests.faults.live_allocations, requests.faults.failed_frees) == (0, 0)


# --- a device fails in a step ---------------------------------------------------------------------------------------------------------------------

# Calls of a step of one token per request, on any device: four products per layer, two more per request where attention is made of them.
PRODUCTS = {"paged": 4, "contiguous": 8}
# What fails, after how many of its kind, and what the message calls it: before everything, between two sums, before the last collective.
FAULTS_IN_A_STEP = {
    "paged": [
        ("infinirtMemcpyAsync", 0, "infinirtMemcpyAsync (inputs)"),
        ("infiniopGemm", 0, "infiniopGemm (qkv)"),
        ("infiniopGemm", PRODUCTS["paged"], "infiniopGemm (qkv)"),
        ("infiniopGemm", PRODUCTS["paged"] * LAYERS - 1, "infiniopGemm (down)"),
        ("infiniopGemm", PRODUCTS["paged"] * LAYERS, "infiniopGemm (logits_part)"),
    ],
    "contiguous": [
        ("infinirtMemcpyAsync", 0, "infinirtMemcpyAsync (inputs)"),
        ("infiniopGemm", PRODUCTS["contiguous"] + 1, "infiniopGemm (scores)"),
        ("infiniopGemm", PRODUCTS["contiguous"] * LAYERS - 1, "infiniopGemm (down)"),
    ],
}


@pytest.mark.parametrize("rank, ndev", [(0, 1), (0, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("kv", FAULTY)
def test_a_device_that_fails_in_a_step_leaves_the_model_usable(kv, rank, ndev, started):
    """The others meet it in the rest of the step's collectives: had one of them waited for 20 s, its collective would have failed and the model with it."""
    r = started(kv, ndev)
    r.engine.set_capture(False)
    device = f"device {r.ids[rank]}: " if ndev > 1 else ""
    for function, after, what in FAULTS_IN_A_STEP[kv]:
        before = r.lengths()
        r.faults.plant(function, r.ids[rank], after)
        with pytest.raises(InfiniCoreError) as caught:
            r.step()
        assert caught.value.status == PLANTED and r.faults.met, (function, after)
        assert str(caught.value).startswith(
            f"forwardBatch failed with status {PLANTED}: {device}{what}: status {PLANTED}"
        )
        assert r.lengths() == before
        r.step()
        r.step((2, 3))  # a step of another shape


@pytest.mark.parametrize("rank", [0, 1])
def test_a_device_that_fails_to_replay_its_graph(rank, started):
    r = started("paged", 2)
    for _ in range(3):
        r.step()
    before, replayed = r.lengths(), r.faults.count("infinirtGraphLuanch", r.ids[rank])
    assert replayed > 0
    r.faults.plant("infinirtGraphLuanch", r.ids[rank])
    with pytest.raises(InfiniCoreError, match=rf"^[^:]*: device {r.ids[rank]}: infinirtGraphLuanch: {SAID}"):
        r.step()
    assert r.lengths() == before
    for _ in range(2):
        r.step()
    assert r.faults.count("infinirtGraphLuanch", r.ids[rank]) == replayed + 3


@pytest.mark.parametrize(
    "function, what", [("infiniopRandomSample", "sample"), ("infinirtMemcpyAsync", "sampled tokens")]
)
@pytest.mark.parametrize("kv, ndev", [("paged", 2), ("contiguous", 1)])
def test_sampling_that_fails_leaves_the_model_usable(kv, ndev, function, what, started):
    r = started(kv, ndev)
    before = r.lengths()
    r.faults.plant(function, r.ids[0], after=int(function == "infinirtMemcpyAsync"))  # after the inputs
    device = f"device {r.ids[0]}: " if ndev > 1 else ""
    rest = [[1.0] * 2, [1] * 2, [1.0] * 2, [0.5] * 2]
    new = [int(text[n]) for text, n in zip(r.text, r.done)]
    with pytest.raises(InfiniCoreError, match=rf"^[^:]*: {device}{function} \({what}\): {SAID}"):
        r.engine.infer(new, [1, 1], r.done, r.caches, *rest)
    assert r.lengths() == before
    r.step()


# --- a collective fails ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "kv, function, what",
    [
        ("contiguous", "infinicclAllReduce", "infinicclAllReduce (down_sum)"),
        ("paged", "infinicclAllGather", "infinicclAllGather (logits)"),
        ("paged", "infinirtStreamSynchronize", "infinirtStreamSynchronize"),
    ],
)
def test_a_collective_that_fails_breaks_the_model(kv, function, what, rank, started):
    """What the devices have summed is not certain any more. The others stop waiting for the one that never came, here after 0.3 s."""
    r = started(kv, 2, timeout_ms=300)
    before = r.lengths()
    r.faults.plant(function, r.ids[rank], after=int(function == "infinicclAllReduce"))
    said = rf"device {r.ids[rank]}: {re.escape(what)}: {SAID}"
    with pytest.raises(InfiniCoreError, match=rf"^forwardBatch failed with status {PLANTED}: {said}"):
        r.step()
    assert r.lengths() == before
    for _ in range(2):
        with pytest.raises(InfiniCoreError, match=rf"an earlier step failed.*{said}.*: make the model anew") as caught:
            r.step()
        assert caught.value.status == PLANTED and r.lengths() == before
    assert all(len(r.bytes_of(cache)) > 0 for cache in r.caches)  # what the caches hold can still be saved
    r.engine.drop_cache(r.caches[0])
    started(kv, 2).step()


def test_one_device_whose_stream_fails_stays_usable(started):
    """There is nobody to disagree with."""
    r = started("contiguous", 1)
    r.faults.plant("infinirtStreamSynchronize", r.ids[0])
    with pytest.raises(InfiniCoreError, match=rf"^[^:]*: infinirtStreamSynchronize: {SAID}"):
        r.step()
    r.step()


# --- capturing fails ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, ndev", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(
    "function, after",
    [
        ("infinirtStreamBeginCapture", 0),
        ("infiniopGemm", PRODUCTS["paged"] + 1),
        ("infinicclAllReduce", 2),
        ("infinirtStreamEndCapture", 0),
        ("infinirtGraphInstantiate", 0),
    ],
)
def test_a_device_that_cannot_capture_makes_calls(function, after, rank, ndev, started):
    """Only that device: the others replay their graphs, and meet it in the collectives."""
    if function.startswith("infiniccl") and ndev == 1:
        return  # it calls none
    r = started("paged", ndev)
    r.step()
    launched = {device: r.faults.count("infinirtGraphLuanch", device) for device in r.ids}
    r.faults.plant(function, r.ids[rank], after)
    for _ in range(5):  # the first of these is the one that is captured
        r.step()
    assert r.faults.met
    for device in r.ids:
        replayed = r.faults.count("infinirtGraphLuanch", device) - launched[device]
        assert replayed == (0 if device == r.ids[rank] else 5)
    assert r.engine.counter("captures_failed") == int(rank == 0)
    assert r.engine.counter("graphs_replayed") == (0 if rank == 0 else 5)
    sums = 0 if ndev == 1 else 2 * LAYERS + 1
    assert r.engine.counter("collectives") == sums * r.engine.counter("steps")


# --- caches ---------------------------------------------------------------------------------------------------------------------------------------

COPIES = 2 * LAYERS * KV_HEADS // 2  # on each of two devices: keys and values of each head of each layer


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "function, after", [("infinirtMalloc", 0), ("infinirtMemcpyAsync", 0), ("infinirtMemcpyAsync", COPIES - 1)]
)
def test_a_duplicate_that_fails_leaves_nothing_behind(function, after, rank, started):
    r = started("contiguous", 2)
    before = r.state()
    for _ in range(2):
        r.faults.plant(function, r.ids[rank], after)
        with pytest.raises(InfiniCoreError, match="duplicateKVCache"):
            r.engine.duplicate_cache(r.caches[0], LENGTHS[0])
        assert r.faults.met and r.state() == before
    copy = r.engine.duplicate_cache(r.caches[0], LENGTHS[0])
    assert r.bytes_of(copy) == before[1][0]
    r.step()
    assert r.bytes_of(copy) == before[1][0]
    r.engine.drop_cache(copy)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "function, after", [("infinirtMalloc", 0), ("infinirtMalloc", 1), ("infinirtMemcpyAsync", COPIES - 1)]
)
def test_a_cache_that_cannot_grow_stays_as_it_is(function, after, rank, started):
    """Contiguous caches move to larger memory: both requests' or none's."""
    r = started("contiguous", 2)
    r.step((40, 40))
    before = r.state()
    r.faults.plant(function, r.ids[rank], after)
    with pytest.raises(InfiniCoreError):
        r.step((40, 44))
    assert r.faults.met and r.state() == before
    r.step((40, 44))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shared_block_that_cannot_be_copied_stays_shared(rank, started):
    r = started("paged", 2)
    copy = r.engine.duplicate_cache(r.caches[1], LENGTHS[1])
    before, shared = r.state(), r.bytes_of(copy)
    r.faults.plant("infinirtMemcpyAsync", r.ids[rank])
    with pytest.raises(InfiniCoreError, match=SAID):
        r.step()
    assert r.faults.met and r.state() == before and r.bytes_of(copy) == shared
    r.step()
    assert r.bytes_of(copy) == shared
    r.engine.drop_cache(copy)


# --- every allocation and every copy --------------------------------------------------------------------------------------------------------------


def life(r: Requests, attempt: Callable[[Callable[[], Any]], Any]) -> None:
    """Everything that takes memory, each through ``attempt``."""
    r.caches = [attempt(lambda: r.engine.create_cache(10)), attempt(lambda: r.engine.create_cache(0))]
    attempt(lambda: r.step(LENGTHS))
    copy = attempt(lambda: r.engine.duplicate_cache(r.caches[0], 9))
    for _ in range(3):
        attempt(r.step)
    attempt(lambda: r.step((30, 2)))
    attempt(lambda: r.engine.reserve_cache(r.caches[1], 90))
    attempt(r.step)
    out = attempt(lambda: r.engine.infer([3], [1], [9], [copy], [1.0], [1], [1.0], [0.5]))
    assert out[0] == int(r.simulated.expected(np.append(r.text[0][:9], 3))[-1].argmax())
    r.engine.drop_cache(copy)
    attempt(r.step)


# Descriptors are so many that each thirteenth has to do, but for a slow run.
@pytest.mark.parametrize(
    "function, by",
    [
        ("infinirtMalloc", 1),
        ("infinirtMallocHost", 1),
        ("infinirtMemcpy", 1),
        ("infinirtMemcpyAsync", 1),
        ("infiniopCreateTensorDescriptor", 13),
        pytest.param("infiniopCreateTensorDescriptor", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kv, ndev", [("paged", 2), ("contiguous", 2), ("contiguous", 1)])
def test_every_one_in_turn_fails(function, by, kv, ndev, builds, build_engine):
    """The first, the second, ... until there are no more: what was asked for can be asked for again, and nothing is left when the model goes."""
    options = FAULTY[kv]
    faults = Faults(builds[kv])
    reference = build_engine.reference(build_engine.checkpoint(config()))
    bounds = bounds_of(build_engine, *options)
    failed: list[str] = []

    for after in range(0, 5000, by):
        faults.plant(function, after=after)
        met: list[str] = []
        try:
            s = open_simulated(builds[kv], reference, bounds, ndev)
        except InfiniCoreError as error:
            failed.append(str(error))
            assert (faults.live_allocations, faults.failed_frees) == (0, 0), (after, error)
            continue
        r = Requests(s, faults, [], options[1])

        def attempt(call: Callable[[], Any]) -> Any:
            lengths = r.lengths()
            try:
                return call()
            except InfiniCoreError as error:
                met.append(str(error))
                assert r.lengths() == lengths, (after, error)
                return call()

        try:
            life(r, attempt)
        finally:
            s.engine.close()
        assert (faults.live_allocations, faults.failed_frees) == (0, 0), (after, met)
        assert len(met) == int(faults.met), after  # a fault is never swallowed
        failed += met
        if not faults.met:
            break
    assert failed and not faults.met and all(SAID_OF_MEMORY.search(text) for text in failed), sorted(set(failed))

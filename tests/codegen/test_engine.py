"""Compiled engines against onnxruntime: every way to feed a request, ragged batches, and all that can be done with caches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from frontend.export import export
from frontend.onnx_import import import_onnx
from frontend.ort import Reference
from ir.interp import run
from passes.lower import to_fused
from runtime.engine import Engine, OutOfKVMemory
from runtime.errors import InfiniCoreError
from runtime.structs import NUMPY_DTYPES
from tests.codegen.engines import Builder, open_engine
from tests.models import relative_l2
from tests.passes.helpers import empty_caches, ragged_inputs

# id -> (configuration, options of the build). "any" is an engine for every InfiniCore since 0.1.0: contiguous caches.
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "any-two-f32": ("two", dict(infinicore="any", dtype="f32")),
    "any-one-f32": ("one", dict(infinicore="any", dtype="f32")),
    "contiguous-four-f32": ("four", dict(kv="contiguous", dtype="f32")),
    "contiguous-even-bf16": ("even", dict(kv="contiguous", dtype="bf16")),
    "paged-one-f32": ("one", dict(kv="paged", dtype="f32")),
    "paged-three-f32": ("three", dict(kv="paged", dtype="f32")),
    "paged-wide-f32": ("wide", dict(kv="paged", dtype="f32")),
    "paged-even-bf16": ("even", dict(kv="paged", dtype="bf16")),
    "paged-two-f16": ("two", dict(kv="paged", dtype="f16")),
}
# tests/codegen/test_real_infinicore.py runs this file on an installed InfiniCore as well: engines that were compiled for what is there.
if INSTALLED := os.environ.get("QWEN3_TEST_EQUIVALENCE", ""):
    CASES = {
        f"installed-{model}-{dtype}": (model, dict(infinicore=INSTALLED, dtype=dtype))
        for model, dtype in (("one", "f32"), ("two", "f32"), ("three", "f32"), ("wide", "f32"), ("even", "bf16"))
    }
F32 = [name for name in CASES if name.endswith("f32")]
PAGED = [name for name, (_, options) in CASES.items() if options.get("kv") == "paged"]
CONTIGUOUS = [name for name in CASES if name not in PAGED]


def some(*names: str) -> list[str]:
    """These cases; on an installed InfiniCore, its own in float32."""
    return F32 if INSTALLED else list(names)


# Lengths around the edges of blocks (16 tokens) and of vector registers.
PROMPTS = (1, 2, 15, 16, 17, 33, 50)
# Both sides sum in float32: each rounds about sqrt(terms) * 6e-8 per sum, terms <= 512, over at most four layers, so 1e-5 is an order of magnitude of room for
# either side. Two runs of the same engine differ by what other blocking of the same sums does, and by nothing in onnxruntime.
EXACT, ALONE = 1e-5, 5e-6
PIECES: dict[str, Callable[[int], list[int]]] = {
    "whole": lambda n: [n],
    "pieces": lambda n: (
        [s for s in (1, 7, n - 8) if s > 0][: n if n < 3 else 3] if n >= 9 else [n - n // 2, n // 2][: 1 + (n > 1)]
    ),
    "tokens": lambda n: [1] * n,
}


@dataclass
class Subject:
    """An open engine, its reference, and the bound on its logits' relative L2 error."""

    engine: Engine
    reference: Reference
    dtype: str
    bound: float
    vocabulary: int

    def expected(self, tokens: np.ndarray) -> np.ndarray:
        return self.reference.logits(tokens)[0]

    def tokens(self, n: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng([seed, n]).integers(0, self.vocabulary, n)

    def feed(self, cache: int, tokens: np.ndarray, start: int = 0) -> np.ndarray:
        """Logits of every token, fed at once."""
        return self.engine.forward(tokens, [len(tokens)], [start], [cache], range(len(tokens)))

    def filled(self, tokens: np.ndarray) -> int:
        cache = self.engine.create_cache(0)
        self.feed(cache, tokens)
        return cache

    def bytes_of(self, cache: int) -> bytes:
        length = self.engine.cache_length(cache)
        return self.engine.export_cache(cache, 0, length, NUMPY_DTYPES[self.dtype]).tobytes()


def rounding_error(builder: Builder, checkpoint: Path, reference: Reference, dtype: str) -> float:
    """The error that this dtype cannot avoid: of the fused graph in our interpreter, which rounds each op's result once, over all prompts of PROMPTS."""
    file = checkpoint / "fused.onnx"
    export(checkpoint, file, opset=18)
    graph = to_fused(import_onnx(file), dtype)
    vocabulary = graph.type("logits").shape[-1]
    found, expected = [], []
    for n in PROMPTS:
        tokens = np.random.default_rng([0, n]).integers(0, vocabulary, n)
        inputs = ragged_inputs(graph, [tokens], [0], empty_caches(graph, 1, n), np.arange(n))
        found.append(run(graph, inputs, folder=checkpoint)["logits"].astype(np.float64))
        expected.append(reference.logits(tokens)[0])
    return relative_l2(np.concatenate(found), np.concatenate(expected))


@pytest.fixture(scope="session")
def bounds(build_engine: Builder) -> Callable[[str], float]:
    """The bound of a case. In half types the engine may err twice as much as our interpreter: it rounds at the same places, but its kernels keep (or round)
    intermediate values of their own, and two sets of roundings that have nothing to do with each other differ by sqrt(2) times one of them."""

    @lru_cache(maxsize=None)
    def bound(name: str) -> float:
        model, options = CASES[name]
        if options["dtype"] == "f32":
            return EXACT
        checkpoint = build_engine.checkpoint(model)
        return 2 * rounding_error(build_engine, checkpoint, build_engine.reference(checkpoint), options["dtype"])

    return bound


@pytest.fixture
def subject(build_engine: Builder, bounds: Callable[[str], float]) -> Iterator[Callable[[str], Subject]]:
    opened: list[Engine] = []

    def start(name: str) -> Subject:
        model, options = CASES[name]
        engine = open_engine(build_engine(model, **options))
        opened.append(engine)
        reference = build_engine.reference(build_engine.checkpoint(model))
        return Subject(engine, reference, options["dtype"], bounds(name), engine.meta.dvoc)

    yield start
    for engine in opened:
        engine.close()


# --- one request ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", PIECES)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_onnxruntime(subject, name, how):
    s = subject(name)
    found, expected = [], []
    for n in PROMPTS:
        tokens, cache, start, rows = s.tokens(n), s.engine.create_cache(0), 0, []
        sizes = PIECES[how](n)
        assert sum(sizes) == n
        for size in sizes:
            rows.append(s.feed(cache, tokens[start : start + size], start))
            start += size
        assert s.engine.cache_length(cache) == n
        s.engine.drop_cache(cache)
        found.append(np.concatenate(rows))
        expected.append(s.expected(tokens))
        if s.dtype == "f32":
            assert relative_l2(found[-1], expected[-1]) <= EXACT, n
    # In half types one short prompt says little: the error of all of them together has a bound.
    assert relative_l2(np.concatenate(found), np.concatenate(expected)) <= s.bound


# --- batches --------------------------------------------------------------------------------------------------------------------------------------

# (tokens in the cache, new ones): prefill, pieces and decode, in no order; starts and ends on and beside the edges of blocks.
RAGGED = ((0, 7), (5, 1), (16, 4), (31, 1), (0, 1), (15, 2), (32, 1), (3, 30), (47, 17))


@pytest.mark.parametrize("name", CASES)
def test_ragged_batches_equal_the_requests_alone(subject, name):
    s = subject(name)
    tokens = [s.tokens(start + new, seed=i + 1) for i, (start, new) in enumerate(RAGGED)]
    alone = []
    for (start, new), ids in zip(RAGGED, tokens):
        cache = s.filled(ids[:start]) if start else s.engine.create_cache(0)
        alone.append(s.feed(cache, ids[start:], start))
        s.engine.drop_cache(cache)
    caches = [s.filled(ids[:start]) if start else s.engine.create_cache(0) for (start, _), ids in zip(RAGGED, tokens)]
    flat = np.concatenate([ids[start:] for (start, _), ids in zip(RAGGED, tokens)])
    together = s.engine.forward(
        flat, [new for _, new in RAGGED], [start for start, _ in RAGGED], caches, range(len(flat))
    )
    ends = np.cumsum([new for _, new in RAGGED])
    wanted = np.concatenate([s.expected(ids)[start:] for (start, _), ids in zip(RAGGED, tokens)])
    assert relative_l2(together, wanted) <= s.bound
    if s.dtype == "f32":
        for (start, new), end, expected in zip(RAGGED, ends, alone):
            assert relative_l2(together[end - new : end], expected) <= ALONE, (start, new)
    # What the batch left in the caches goes on as if each had been alone.
    step = s.engine.forward([5] * len(RAGGED), [1] * len(RAGGED), [start + new for start, new in RAGGED], caches)
    after = np.stack([s.expected(np.append(ids, 5))[-1] for ids in tokens])
    assert relative_l2(step, after) <= s.bound


@pytest.mark.parametrize("name", some("any-two-f32", "contiguous-four-f32", "paged-three-f32"))
def test_rows_choose_logits(subject, name):
    s = subject(name)
    a, b, c = s.tokens(9, 1), s.tokens(1, 2), s.tokens(5, 3)
    flat, lengths = np.concatenate([a, b, c]), [9, 1, 5]
    every = np.concatenate([s.expected(ids) for ids in (a, b, c)])

    def fresh(rows):
        caches = [s.engine.create_cache(0) for _ in lengths]
        return s.engine.forward(flat, lengths, [0, 0, 0], caches, rows)

    for rows in ([0], [14], [9], [8, 9, 14], [14, 0, 7, 7, 9, 2], list(range(15))):
        assert relative_l2(fresh(rows), every[rows]) <= EXACT, rows
    assert (
        relative_l2(fresh(None), every[[8, 9, 14]]) <= EXACT
    )  # the last of each request, also where the engine reorders requests


@pytest.mark.parametrize("name", some("any-two-f32", "paged-wide-f32"))
def test_sampling_takes_the_likeliest_of_each_request(subject, name):
    s = subject(name)
    prompts = [s.tokens(n, seed=n) for n in (4, 1, 17, 2)]
    caches = [s.engine.create_cache(0) for _ in prompts]
    flat, lengths = np.concatenate(prompts), [len(p) for p in prompts]
    found = s.engine.infer(flat, lengths, [0] * 4, caches, [1.0] * 4, [1] * 4, [1.0] * 4, [0.5] * 4)
    assert found.tolist() == [int(s.expected(p)[-1].argmax()) for p in prompts]
    # Temperature 0 means the same, and a request's numbers stay its own: only the third draws.
    caches = [s.engine.create_cache(0) for _ in prompts]
    mixed = s.engine.infer(flat, lengths, [0] * 4, caches, [0.0, 0.0, 5.0, 0.0], [50] * 4, [1.0] * 4, [0.9999] * 4)
    assert [mixed[i] for i in (0, 1, 3)] == [found[i] for i in (0, 1, 3)] and mixed[2] != found[2]


# --- caches ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", F32)
def test_a_smaller_position_overwrites_the_tail(subject, name):
    s = subject(name)
    first, second = s.tokens(40, 1), s.tokens(11, 2)
    cache = s.filled(first)
    for position in (23, 16, 0):
        found = s.feed(cache, second, position)
        assert s.engine.cache_length(cache) == position + 11
        assert relative_l2(found, s.expected(np.append(first[:position], second))[position:]) <= EXACT, position
        s.feed(cache, first[position:], position)


@pytest.mark.parametrize("name", CASES)
def test_duplicates_diverge_and_the_original_stays(subject, name):
    s = subject(name)
    prompt, left, right = s.tokens(37, 1), s.tokens(9, 2), s.tokens(9, 3)
    original = s.filled(prompt)
    before = s.bytes_of(original)
    copies = [s.engine.duplicate_cache(original, n) for n in (37, 37, 32, 20)]
    assert [s.engine.cache_length(c) for c in copies] == [37, 37, 32, 20]
    found = [s.feed(c, branch, n) for c, branch, n in zip(copies, (left, right, left, right), (37, 37, 32, 20))]
    assert s.bytes_of(original) == before
    expected = [s.expected(np.append(prompt[:n], b))[n:] for b, n in ((left, 37), (right, 37), (left, 32), (right, 20))]
    assert relative_l2(np.concatenate(found), np.concatenate(expected)) <= s.bound
    # The other way round: the original goes on, and goes away; its copies stay.
    again = [s.bytes_of(c) for c in copies]
    s.feed(original, right, 30)
    s.engine.drop_cache(original)
    assert [s.bytes_of(c) for c in copies] == again


@pytest.mark.skipif(bool(INSTALLED), reason="about paged caches of the embedded library")
def test_a_duplicate_shares_blocks_until_it_writes(subject):
    s = subject("paged-three-f32")
    original = s.filled(s.tokens(37))
    free = s.engine.pool_info()["free_blocks"]
    copy = s.engine.duplicate_cache(original, 37)
    assert s.engine.pool_info()["free_blocks"] == free
    s.feed(copy, s.tokens(1), 37)  # writes into the third block, which both have
    assert s.engine.pool_info()["free_blocks"] == free - 1
    s.engine.drop_cache(original)
    assert s.engine.pool_info()["free_blocks"] == free  # two blocks are the copy's alone now
    s.engine.drop_cache(copy)
    info = s.engine.pool_info()
    assert info["free_blocks"] == info["total_blocks"]


@pytest.mark.parametrize("name", F32)
def test_trim_and_reserve(subject, name):
    s = subject(name)
    tokens = s.tokens(45, 1)
    cache = s.filled(tokens)
    s.engine.trim_cache(cache, 33)
    assert s.engine.cache_length(cache) == 33
    assert relative_l2(s.feed(cache, tokens[33:40], 33), s.expected(tokens[:40])[33:]) <= EXACT
    s.engine.reserve_cache(cache, 100)
    assert s.engine.cache_length(cache) == 40
    free = s.engine.pool_info()["free_blocks"]
    taken = s.engine.pool_info()["bytes_allocated"]
    s.feed(cache, s.tokens(60, 2), 40)
    assert s.engine.cache_length(cache) == 100
    assert (s.engine.pool_info()["free_blocks"], s.engine.pool_info()["bytes_allocated"]) == (free, taken)
    expected = s.expected(np.append(tokens[:40], s.tokens(60, 2)))[-1]
    s.engine.trim_cache(cache, 99)
    assert relative_l2(s.feed(cache, s.tokens(60, 2)[-1:], 99)[0], expected) <= EXACT
    s.engine.trim_cache(cache, 0)
    assert s.engine.cache_length(cache) == 0
    assert relative_l2(s.feed(cache, tokens), s.expected(tokens)) <= EXACT
    with pytest.raises(InfiniCoreError, match="seq_len is 46, the cache holds 45"):
        s.engine.trim_cache(cache, 46)
    with pytest.raises(InfiniCoreError, match="the context is"):
        s.engine.reserve_cache(cache, s.engine.meta.dctx + 1)


@pytest.mark.parametrize("name", CASES)
def test_export_and_import(subject, name):
    s = subject(name)
    kind = NUMPY_DTYPES[s.dtype]
    tokens, more = s.tokens(41, 1), s.tokens(6, 2)
    cache = s.filled(tokens)
    whole = s.engine.export_cache(cache, 0, 41, kind)
    part = s.engine.export_cache(cache, 13, 20, kind)
    assert np.array_equal(part.view(np.uint8), np.ascontiguousarray(whole[:, :, :, 13:33]).view(np.uint8))
    expected = s.feed(cache, more, 41)
    other = s.engine.create_cache(0)
    for start, stop in ((0, 13), (13, 33), (33, 41)):  # pieces that begin and end inside blocks
        s.engine.import_cache(other, start, whole[:, :, :, start:stop])
        assert s.engine.cache_length(other) == stop
    assert s.bytes_of(other) == whole.tobytes()
    assert np.array_equal(s.feed(other, more, 41), expected)
    # Importing in the middle drops what comes after.
    s.engine.import_cache(other, 20, whole[:, :, :, 20:30])
    assert s.engine.cache_length(other) == 30
    with pytest.raises(InfiniCoreError, match="do not follow 30"):
        s.engine.import_cache(other, 31, whole[:, :, :, 31:41])


@pytest.mark.skipif(bool(INSTALLED), reason="about paged caches of the embedded library")
def test_import_does_not_reach_a_duplicate(subject):
    s = subject("paged-even-bf16")
    cache = s.filled(s.tokens(30, 1))
    copy = s.engine.duplicate_cache(cache, 30)
    before = s.bytes_of(copy)
    zeros = np.zeros((s.engine.meta.nlayer, 2, s.engine.meta.nkvh, 7, s.engine.meta.dh), NUMPY_DTYPES["bf16"])
    s.engine.import_cache(cache, 11, zeros)
    assert s.bytes_of(copy) == before and s.bytes_of(cache) != before
    s.engine.import_cache(cache, 0, zeros)  # a shared block from its first token on
    assert s.bytes_of(copy) == before


# --- running out ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(INSTALLED), reason="about paged caches of the embedded library")
def test_an_exhausted_pool_changes_nothing(subject):
    s = subject("paged-three-f32")
    s.engine.set_pool_size(5 * 16)
    first, second = s.filled(s.tokens(40, 1)), s.filled(s.tokens(20, 2))  # three blocks and two
    assert s.engine.pool_info()["free_blocks"] == 0
    state = [(s.bytes_of(c), s.engine.cache_length(c)) for c in (first, second)]
    more = s.tokens(13, 3)
    with pytest.raises(OutOfKVMemory, match="KV pool: 1 blocks of 16 tokens needed, 0 free") as caught:
        # The first request alone would fit.
        s.engine.forward(np.concatenate([more[:3], more]), [3, 13], [40, 20], [first, second])
    assert caught.value.status == 13
    assert [(s.bytes_of(c), s.engine.cache_length(c)) for c in (first, second)] == state
    for call in (
        lambda: s.engine.reserve_cache(first, 49),
        lambda: s.engine.infer(more, [13], [20], [second], [1.0], [1], [1.0], [0.5]),
        lambda: s.engine.import_cache(first, 40, np.zeros((3, 2, 1, 9, 16), np.float32)),
    ):
        with pytest.raises(OutOfKVMemory):
            call()
    assert [(s.bytes_of(c), s.engine.cache_length(c)) for c in (first, second)] == state
    copy = s.engine.duplicate_cache(second, 20)  # takes no block, but its first token does
    with pytest.raises(OutOfKVMemory):
        s.feed(copy, more[:1], 20)
    s.engine.drop_cache(copy)
    s.engine.drop_cache(first)
    assert relative_l2(s.feed(second, more, 20), s.expected(np.append(s.tokens(20, 2), more))[20:]) <= EXACT
    with pytest.raises(InfiniCoreError, match="the pool is in use already"):
        s.engine.set_pool_size(1000)


@pytest.mark.skipif(bool(INSTALLED), reason="about paged caches of the embedded library")
def test_the_last_holder_of_a_shared_block_needs_no_copy(subject):
    s = subject("paged-three-f32")
    s.engine.set_pool_size(3 * 16)
    tokens, more = s.tokens(20, 1), s.tokens(2, 2)
    first = s.filled(tokens)  # two blocks of three, the second half full
    second = s.engine.duplicate_cache(first, 20)
    got = s.engine.forward(more, [1, 1], [20, 20], [first, second])  # both write into the shared block: one copy
    for i in range(2):
        assert relative_l2(got[i], s.expected(np.append(tokens, more[i]))[20]) <= EXACT
    third = s.engine.duplicate_cache(first, 16)
    s.engine.drop_cache(second)
    # Both give up the one block that they share, so both can have one each of the two that are free then.
    for cache in (first, third):
        s.engine.trim_cache(cache, 16)
    s.engine.forward(more, [1, 1], [16, 16], [first, third])
    assert s.engine.pool_info()["free_blocks"] == 0


@pytest.mark.skipif(bool(INSTALLED), reason="about paged caches of the embedded library")
def test_a_cache_that_does_not_fit_is_out_of_memory_too(subject):
    s = subject("paged-three-f32")
    s.engine.set_pool_size(32)
    with pytest.raises(OutOfKVMemory):
        s.engine.create_cache(33)
    assert s.engine.pool_info()["free_blocks"] == 2
    s.engine.create_cache(32)


# --- plans and counters ---------------------------------------------------------------------------------------------------------------------------

COUNTERS = ("plans_built", "plans_evicted", "descriptors_created", "device_allocations", "h2d_copies", "steps")


def counters(engine: Engine) -> dict[str, int]:
    return {name: engine.counter(name) for name in COUNTERS}


def grown(engine: Engine, before: dict[str, int]) -> dict[str, int]:
    return {name: engine.counter(name) - before[name] for name in COUNTERS}


@pytest.mark.parametrize("name", some("any-one-f32", "paged-three-f32"))
def test_plans_beyond_the_limit_are_evicted(subject, name):
    s = subject(name)
    tokens = s.tokens(80)
    expected = s.expected(tokens)
    cache = s.engine.create_cache(80)
    for n in (*range(1, 73), 1, 2, 72):
        found = s.engine.forward(tokens[:n], [n], [0], [cache])
        assert relative_l2(found[0], expected[n - 1]) <= EXACT, n
    assert s.engine.counter("plans_evicted") >= 72 - 64
    # Lengths 1 and 2 had to go and came again, 72 had stayed.
    before = counters(s.engine)
    s.engine.forward(tokens[:72], [72], [0], [cache])
    assert grown(s.engine, before)["plans_built"] == 0


@pytest.mark.parametrize("name", PAGED)
def test_a_steady_paged_step_makes_nothing_and_copies_once(subject, name):
    s = subject(name)
    lengths = (20, 3, 9)
    caches = [s.filled(s.tokens(n)) for n in lengths]
    position = list(lengths)

    def step() -> None:
        s.engine.infer([5, 6, 7], [1, 1, 1], position, caches, [1.0] * 3, [1] * 3, [1.0] * 3, [0.5] * 3)
        position[:] = [p + 1 for p in position]

    step()
    before = counters(s.engine)
    for _ in range(40):  # the first request outgrows its second and its third block
        step()
    assert grown(s.engine, before) == {**dict.fromkeys(COUNTERS, 0), "h2d_copies": 40, "steps": 40}


def test_contiguous_descriptors_do_not_depend_on_the_number_of_layers(subject):
    """InfiniCore fixes the number of keys when an operator is made, so each new length costs some: shared by all layers, and none of the rest is made again."""
    created = {}
    for name in CONTIGUOUS:
        s = subject(name)
        cache = s.filled(s.tokens(20))
        s.feed(cache, s.tokens(1), 20)
        before = counters(s.engine)
        for position in (21, 22, 23):
            s.feed(cache, s.tokens(1), position)
        per_step = {name: n / 3 for name, n in grown(s.engine, before).items()}
        assert (
            per_step["h2d_copies"] == per_step["steps"] == 1
            and per_step["plans_evicted"] == per_step["device_allocations"] == 0
        )
        before = counters(s.engine)
        s.feed(cache, s.tokens(1), 23)  # a length that has been there
        assert grown(s.engine, before)["descriptors_created"] == 0
        created[name] = per_step["descriptors_created"]
    assert len(set(created.values())) == 1, created
    # The copies into the cache (keys and values are alike), scores, softmax, values.
    assert max(created.values()) <= 5

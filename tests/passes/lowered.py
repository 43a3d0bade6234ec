"""Random models at stage "infini", and one ragged batch in the form that each kind of KV cache wants."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from frontend.export import export
from frontend.onnx_import import import_onnx
from ir.graph import Graph
from ir.interp import run
from ir.verify import verify
from passes.legalise import legalise
from passes.lower import to_fused
from passes.roles import assign_roles
from passes.targets import OpSupport, Target, targets
from tests.models import random_config, write_checkpoint
from tests.passes.helpers import assert_close, ragged_inputs

# Layers, heads, kv heads, head_dim, tied. The last one has a head size that every target's paged attention takes, and an inner size that every swiglu takes.
SHAPES = ((1, 3, 1, 10, True), (2, 6, 3, 6, False), (3, 6, 1, 4, True), (4, 2, 2, 14, False), (2, 4, 2, 64, False))
WIDE = SHAPES[4]
INNER = {WIDE: 104}
CONTEXT = 60
# Requests of one batch: tokens cached already, new ones. Requests of one token come first, as the engine sorts them; 16 is a block.
REQUESTS = ((5, 1), (0, 1), (16, 1), (0, 7), (3, 4), (14, 20), (31, 2))
CAPACITY = 37
_ROOT = Path(tempfile.mkdtemp(prefix="lowered-"))


def any_dtype(name: str, *without: str, **limits: dict) -> Target:
    """A target that has every op in every dtype, but for those named, and every collective; ``limits`` are what the records of some ops say besides."""
    names = set().union(*(t.ops for t in targets().values())) - set(without)
    ops = {op: OpSupport(("f64", "f32", "f16", "bf16"), **limits.get(op, {})) for op in names}
    return Target(name, 0, ops, False, ("AllReduce", "AllGather"))


@lru_cache(maxsize=None)
def folder(shape: tuple) -> Path:
    layers, heads, kv_heads, head_dim, tied = shape
    config = random_config(
        np.random.default_rng(SHAPES.index(shape)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        **({"intermediate_size": INNER[shape]} if shape in INNER else {}),
    )
    return write_checkpoint(_ROOT / str(SHAPES.index(shape)), config, 1)


@lru_cache(maxsize=None)
def fused(shape: tuple, dtype: str = "f64", disable: frozenset[str] = frozenset()) -> Graph:
    """A random model at stage "fused", its weights named by role."""
    path = folder(shape) / "model.onnx"
    if not path.is_file():
        export(folder(shape), path, opset=18)
    return assign_roles(to_fused(import_onnx(path), dtype, disable))[0]


def legal(graph: Graph, target: Target, kv: str = "auto") -> Graph:
    result = legalise(graph, target, kv=kv, max_positions=CONTEXT)
    verify(result)
    return result


@dataclass(frozen=True)
class Batch:
    """REQUESTS on a model: inputs for the fused graph, and for paged caches the same caches in blocks."""

    contiguous: dict[str, np.ndarray]
    paged: dict[str, np.ndarray]
    tables: np.ndarray
    block: int

    def inputs(self, graph: Graph) -> dict[str, np.ndarray]:
        source = self.paged if graph.meta["kv"] == "paged" else self.contiguous
        return {v.name: source[v.name] for v in graph.inputs}

    def cache(self, name: str, r: int, array: np.ndarray, length: int, paged: bool) -> np.ndarray:
        """[G, length, D] of one request, from a graph's result."""
        if not paged:
            return array[r, :, :length]
        blocks = array[self.tables[r]]
        return blocks.transpose(1, 0, 2, 3).reshape(array.shape[1], -1, array.shape[3])[:, :length]


def batch(graph: Graph, seed: int = 0, block: int = 16, garbage: float = 7.5, keys: float = 1.0) -> Batch:
    """A batch for a fused graph. Everything in the caches that holds no token is ``garbage``: nobody may read or write it. Cached keys are ``keys`` times what the
    model's are."""
    rng = np.random.default_rng(seed)
    vocabulary = graph.type("logits").shape[-1]
    tokens = [rng.integers(0, vocabulary, new) for _, new in REQUESTS]
    starts = [start for start, _ in REQUESTS]
    total = sum(new for _, new in REQUESTS)
    columns = -(-CAPACITY // block) + 1
    used = [-(-(start + new) // block) for start, new in REQUESTS]
    pool = sum(used) + 2  # two blocks are nobody's
    order = rng.permutation(pool)[: sum(used)]
    tables = np.zeros((len(REQUESTS), columns), np.int32)
    where = 0
    for r, n in enumerate(used):
        tables[r, :n] = order[where : where + n]
        where += n
    caches, blocks = {}, {}
    for value in graph.inputs:
        if "_cache." not in value.name:
            continue
        _, groups, _, dim = value.type.shape
        full = np.full((len(REQUESTS), groups, CAPACITY, dim), garbage)
        split = np.full((pool, groups, block, dim), garbage)
        for r, start in enumerate(starts):
            full[r, :, :start] = rng.normal(size=(groups, start, dim)) * (keys if value.name[0] == "k" else 1.0)
            for t in range(start):
                split[tables[r, t // block], :, t % block] = full[r, :, t]
        caches[value.name], blocks[value.name] = full, split
    rows = np.concatenate([rng.permutation(total)[:5], [total - 1, 0, 0]])
    contiguous = ragged_inputs(graph, tokens, starts, caches, rows)
    lengths = [new for _, new in REQUESTS]
    slots = [
        tables[r, t // block] * block + t % block
        for r, (start, new) in enumerate(REQUESTS)
        for t in range(start, start + new)
    ]
    paged = {
        **{k: contiguous[k] for k in ("tokens", "positions", "rows")},
        **blocks,
        "slots": np.array(slots, np.int64),
        "block_tables": tables,
        "seq_lens": np.array([start + new for start, new in REQUESTS], np.int32),
        "cu_lens": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    }
    return Batch(contiguous, paged, tables, block)


def assert_same(
    before: Graph,
    found: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    data: Batch,
    paged: bool,
    bound: float = 1e-12,
    keys: float = 1.0,
) -> None:
    """A graph's results equal those of the fused graph ``before``, and what no token was written to is as it was."""
    assert_close(found["logits"], expected["logits"], "logits", bound)
    for name in expected:
        if name == "logits":
            continue
        for r, (start, new) in enumerate(REQUESTS):
            a, b = (
                data.cache(name, r, array, start + new, p)
                for array, p in ((found[name], paged), (expected[name], False))
            )
            assert_close(a, b * (keys if name[0] == "k" else 1.0), f"{name} of request {r}", bound)
            if not paged:
                assert (found[name][r, :, start + new :] == 7.5).all(), name
        if paged:
            taken = {
                int(b)
                for r, (start, new) in enumerate(REQUESTS)
                for b in data.tables[r, : -(-(start + new) // data.block)]
            }
            free = [b for b in range(len(found[name])) if b not in taken]
            assert len(free) == 2 and (found[name][free] == 7.5).all(), name


@lru_cache(maxsize=None)
def expected(
    shape: tuple, dtype: str = "f64", disable: frozenset[str] = frozenset()
) -> tuple[Batch, dict[str, np.ndarray]]:
    """REQUESTS through the fused graph in float64."""
    graph = fused(shape, dtype, disable)
    data = batch(graph)
    return data, run(graph, data.contiguous, folder=folder(shape), float64=True)


def check(
    shape: tuple, graph: Graph, dtype: str = "f64", disable: frozenset[str] = frozenset(), keys: float = 1.0
) -> None:
    """An "infini" graph of fused(shape, dtype, disable) computes what that does, in float64; its cached keys are ``keys`` times as large."""
    data, wanted = expected(shape, dtype, disable)
    before = fused(shape, dtype, disable)
    if keys != 1.0:
        data = batch(before, keys=keys)
    found = run(graph, data.inputs(graph), folder=folder(shape), float64=True)
    assert_same(before, found, wanted, data, graph.meta["kv"] == "paged", keys=keys)

"""Random models at each stage, and inputs for them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from frontend.export import export
from frontend.onnx_import import import_onnx
from ir.graph import Graph
from ir.interp import run
from ir.text import parse, to_text
from passes.lower import MODEL_PIPELINE, to_model
from passes.pipeline import Pass, run_passes
from tests.models import random_config, write_checkpoint

# Passes keep values: in float64 only the order of sums may change. A result is a sum of at most a few hundred products through at most four layers; each
# rounding is 1.1e-16 of the largest term, and a norm divides by what was rounded: 1e-12 of the largest element leaves three digits of room.
EXACT = 1e-12

# Layers, heads, kv heads, head_dim, tied: every kind of ratio, odd sizes. The other dimensions are drawn so that all differ.
SHAPES = (
    (1, 1, 1, 10, True),
    (2, 6, 3, 8, False),
    (3, 6, 1, 4, True),
    (4, 4, 2, 6, False),
    (2, 3, 3, 14, True),
    (1, 8, 2, 12, False),
)

_ROOT = Path(tempfile.mkdtemp(prefix="passes-"))


@lru_cache(maxsize=None)
def checkpoint(shape: tuple, dtype: str = "bf16", **overrides) -> Path:
    layers, heads, kv_heads, head_dim, tied = shape
    seed = SHAPES.index(shape)
    config = random_config(
        np.random.default_rng(seed),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )
    return write_checkpoint(_ROOT / f"{seed}-{dtype}", config, seed, dtype)


@lru_cache(maxsize=None)
def imported(shape: tuple, opset: int = 18, kv: bool = True, dtype: str = "bf16") -> Graph:
    """Our own export of a random model, at stage "onnx"."""
    folder = checkpoint(shape, dtype)
    path = folder / f"{opset}-{kv}.onnx"
    export(folder, path, opset=opset, kv=kv)
    return import_onnx(path)


@lru_cache(maxsize=None)
def model(shape: tuple, opset: int = 18, kv: bool = True, dtype: str = "bf16") -> Graph:
    """The same at stage "model"."""
    return to_model(imported(shape, opset, kv, dtype))


@lru_cache(maxsize=None)
def steps(shape: tuple, opset: int = 18, kv: bool = True) -> list[tuple[Pass, Graph, Graph]]:
    """Each pass of the model pipeline with the graph before and after it."""
    graph, result = imported(shape, opset, kv), []
    for p in MODEL_PIPELINE:
        after = run_passes(graph, [p])
        result.append((p, graph, after))
        graph = after
    return result


def sizes(graph: Graph) -> tuple[int, int]:
    """Layers and vocabulary."""
    return len([o for o in graph.outputs if o.endswith(".key")]), graph.type("logits").shape[-1]  # type: ignore[return-value]


def padded_inputs(
    graph: Graph, rng: np.random.Generator, new: int, past: int, padding: list[int]
) -> dict[str, np.ndarray]:
    """One batched step with padding on the left; one entry of ``padding`` per request. Positions count from the first real token."""
    batch, total = len(padding), past + new
    mask = np.array([[0] * p + [1] * (total - p) for p in padding], np.int64)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, past:]
    vocabulary = graph.type("logits").shape[-1]
    inputs = {"input_ids": rng.integers(0, vocabulary, (batch, new)), "attention_mask": mask, "position_ids": positions}
    for value in graph.inputs:
        if value.name.startswith("past_key_values"):
            _, heads, _, dim = value.type.shape
            inputs[value.name] = rng.normal(size=(batch, heads, past, dim))
    return inputs


def valid(name: str, array: np.ndarray, padding: list[int], past: int) -> list[np.ndarray]:
    """The parts of an output that mean something: what a padded query computes is nobody's business."""
    if name == "logits":
        return [array[b, max(p - past, 0) :] for b, p in enumerate(padding)]
    return [array[b, :, p:] for b, p in enumerate(padding)]


def assert_close(found: np.ndarray, expected: np.ndarray, what: str, bound: float = EXACT) -> None:
    assert found.shape == expected.shape, f"{what}: {found.shape}, expected {expected.shape}"
    if expected.size:
        error = np.abs(found - expected).max()
        assert error <= bound * max(np.abs(expected).max(), 1e-300), f"{what}: differs by {error}"


def assert_same_step(
    before: Graph, after: Graph, folder: Path, new: int, past: int, padding: list[int], seed: int = 0
) -> None:
    """Two graphs of batch x sequence compute the same in float64."""
    inputs = padded_inputs(before, np.random.default_rng(seed), new, past, padding)
    a = run(before, inputs, folder=folder, float64=True)
    b = run(after, inputs, folder=folder, float64=True)
    assert set(a) == set(b) == set(before.outputs)
    for name in a:
        for x, y in zip(valid(name, b[name], padding, past), valid(name, a[name], padding, past), strict=True):
            assert_close(x, y, name)


def bare(graph: Graph) -> Graph:
    """Without what does not affect meaning: origins and history."""
    return replace(graph, meta={}, nodes=tuple(replace(n, origin=()) for n in graph.nodes))


def assert_round_trip(graph: Graph) -> None:
    assert parse(to_text(graph)) == graph


def ragged_inputs(
    graph: Graph, tokens: list[np.ndarray], starts: list[int], caches: Mapping[str, np.ndarray], rows: np.ndarray
) -> dict[str, np.ndarray]:
    """A ragged batch for a fused graph: request r gets ``tokens[r]`` at positions from ``starts[r]`` on."""
    return {
        "tokens": np.concatenate(tokens).astype(np.int32),
        "positions": np.concatenate([np.arange(s, s + len(t)) for s, t in zip(starts, tokens)]).astype(np.int32),
        "lens": np.array([len(t) for t in tokens], np.int32),
        "starts": np.array(starts, np.int32),
        "rows": rows.astype(np.int32),
        **caches,
    }


def empty_caches(graph: Graph, requests: int, capacity: int, fill: float = 0.0) -> dict[str, np.ndarray]:
    caches = {}
    for value in graph.inputs:
        if "_cache." in value.name:
            _, heads, _, dim = value.type.shape
            caches[value.name] = np.full((requests, heads, capacity, dim), fill)
    return caches

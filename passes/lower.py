"""The pipelines from an imported ONNX graph to stage "fused", as ordered lists, and the function that runs them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ir.errors import GraphError
from ir.graph import Graph
from ir.types import DTYPES
from passes.canonical import canonicalise
from passes.flatten import flatten
from passes.fold import clean, fold_constants
from passes.fuse import fuse_with, retype
from passes.pipeline import Pass, optional_names, run_passes
from passes.raise_attention import raise_attention
from passes.raise_ops import raise_with
from passes.raise_rope import raise_rope

_BOTH = ("onnx", "model")


def _raise(name: str, run: Callable[[Graph], tuple[Graph, int]], doc: str) -> Pass:
    return Pass(name, run, "onnx", "onnx", doc, stages=_BOTH)


def _fuse(name: str, doc: str) -> Pass:
    return Pass(name, fuse_with(name), "fused", "fused", doc, optional=True)


MODEL_PIPELINE: tuple[Pass, ...] = (
    Pass(
        "fold_constants",
        fold_constants,
        "onnx",
        "onnx",
        "evaluate what depends on constants only; follow shapes symbolically",
    ),
    Pass("clean", clean, "onnx", "onnx", "drop no-ops, join transpositions, compute equal things once"),
    _raise("raise_linear", raise_with("raise_linear"), "products with constant matrices"),
    _raise("raise_rms_norm", raise_with("raise_rms_norm"), "root-mean-square norms"),
    _raise("raise_silu", raise_with("raise_silu"), "x * sigmoid(x)"),
    _raise("raise_rope", raise_rope, "rotary embeddings, their angles proven by evaluation"),
    _raise("raise_attention", raise_attention, "attention, its mask proven causal by evaluation"),
    _raise("raise_embedding", raise_with("raise_embedding"), "rows of a table"),
    _raise("cancel_transposes", clean, "transpositions that two raised ops added back to back"),
    _raise("raise_structure", raise_with("raise_structure"), "sums, products and reshapes"),
    Pass("canonicalise", canonicalise, "onnx", "model", "one order and one set of names, whatever the exporter"),
)

FUSED_PIPELINE: tuple[Pass, ...] = (
    Pass(
        "flatten", flatten, "model", "fused", "batch x sequence to a ragged batch of tokens; attention owns the caches"
    ),
    _fuse("fuse_swiglu", "silu and product to one op"),
    _fuse("merge_qkv", "query, key and value projections to one linear"),
    _fuse("merge_gate_up", "gate and up projections to one linear"),
    _fuse("fuse_add_rms_norm", "residual sum and the norm after it to one op"),
    _fuse("fuse_norm_rope", "per-head norm and rope to one op"),
)

OPTIONAL = tuple(optional_names([*MODEL_PIPELINE, *FUSED_PIPELINE]))


def to_model(graph: Graph, *, dump_dir: Path | str | None = None, log: Callable[[str], Any] | None = None) -> Graph:
    """An imported graph at stage "model".

    Raises:
        UnsupportedError: something in it is no part of a dense causal decoder; names the node and why.
    """
    return run_passes(graph, MODEL_PIPELINE, dump_dir=dump_dir, log=log)


def to_fused(
    graph: Graph,
    dtype: str,
    disable: Collection[str] = (),
    dump_dir: Path | str | None = None,
    log: Callable[[str], Any] | None = None,
) -> Graph:
    """An imported graph (stage "onnx", or already "model") at stage "fused".

    Args:
        dtype: of activations, caches and weights: "f32", "f16" or "bf16".
        disable: names of optional passes to leave out (see ``OPTIONAL``).
        dump_dir: gets the graph as text after each pass.

    Raises:
        UnsupportedError: something in it is no part of a dense causal decoder; names the node and why.
        GraphError: ``dtype`` is no float dtype, or ``disable`` names no optional pass.
    """
    if dtype not in DTYPES or not DTYPES[dtype].is_float:
        raise GraphError(f"dtype {dtype!r}: expected one of {', '.join(d.name for d in DTYPES.values() if d.is_float)}")
    unknown = sorted(set(disable) - set(OPTIONAL))
    if unknown:
        raise GraphError(f"pass {unknown[0]!r} cannot be disabled; these can: {', '.join(OPTIONAL)}")
    passes = [
        *FUSED_PIPELINE,
        Pass("retype", retype(dtype), "fused", "fused", f"activations, caches and weights in {dtype}"),
    ]
    if graph.stage == "onnx":
        passes = [*MODEL_PIPELINE, *passes]
    return run_passes(graph, passes, disable=disable, dump_dir=dump_dir, log=log)

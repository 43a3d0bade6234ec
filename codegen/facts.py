"""What the emitted engine must know of the model, read off the graph: the graph decides, not the model's name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ir import constants
from ir.errors import UnsupportedError
from ir.graph import Graph
from ir.optable import with_defaults


@dataclass(frozen=True)
class ModelFacts:
    """The fields of Qwen3Meta, and what goes with them."""

    dtype: str
    nlayer: int
    d: int
    nh: int
    nkvh: int
    dh: int
    di: int
    dctx: int
    dvoc: int
    epsilon: float
    theta: float
    end_token: int
    inv_freq: tuple[float, ...]
    attention_factor: float
    eos_token_ids: tuple[int, ...]
    block_size: int


def theta_of(inv_freq: np.ndarray) -> float:
    """The rotary base whose powers the frequencies are, rounded to what a configuration would say; 0 where they are no such powers (scaled rope)."""
    half = len(inv_freq)
    if half < 2:
        return 0.0
    theta = float(inv_freq[1]) ** -float(half)
    theta = float(f"{theta:.4g}")
    rebuilt = theta ** -(np.arange(half) / half)
    return theta if np.allclose(rebuilt, inv_freq, rtol=1e-4) else 0.0


def model_facts(graph: Graph, *, max_context: int, eos_token_ids: tuple[int, ...], block_size: int) -> ModelFacts:
    """Facts of a fused graph whose weights are named by role.

    Raises:
        UnsupportedError: layers differ in a size that the C interface has one field for.
    """
    attentions = [n for n in graph.nodes if n.op == "attention_cached"]
    shapes = {(graph.type(n.inputs[0]).shape[1:], graph.type(n.inputs[1]).shape[1:]) for n in attentions}
    if len(shapes) != 1:
        raise UnsupportedError(
            f"{graph.name}: layers with different heads: {sorted(map(str, shapes))}; Qwen3Meta has one nh, nkvh and dh"
        )
    (nh, dh), (nkvh, _) = next(iter(shapes))
    table = graph.constants["input_embd"].value.type
    vocabulary = graph.type(graph.outputs[0]).shape[-1]
    if table.shape[0] != vocabulary:
        raise UnsupportedError(
            f"{graph.name}: the embedding has {table.shape[0]} rows, the logits {vocabulary}; Qwen3Meta has one dvoc"
        )
    downs = {graph.type(c).shape[1] for c in graph.constants if c.startswith("ffn_down.")}
    if len(downs) != 1:
        raise UnsupportedError(
            f"{graph.name}: layers with different intermediate sizes {sorted(map(str, downs))}; Qwen3Meta has one di"
        )
    ropes = [n for n in graph.nodes if n.op in ("norm_rope", "rope")]
    inv_freq = constants.load(graph.constants["inv_freq"].data, None).astype(np.float32)
    epsilons = {float(np.float32(n.attrs["epsilon"])) for n in graph.nodes if "epsilon" in n.attrs}
    scales = {n.attrs["scale"] for n in attentions}
    if not all(math.isfinite(s) for s in scales):
        raise UnsupportedError(f"{graph.name}: an attention's scale is not finite")
    missing = [f"attn_{x}_norm.0" for x in "qk" if f"attn_{x}_norm.0" not in graph.constants]
    if missing:
        raise UnsupportedError(
            f"{graph.name}: there is no {missing[0]}: models without per-head norms are not compiled yet"
        )
    return ModelFacts(
        dtype=next(n.outputs[0].type.dtype for n in graph.nodes if n.op == "embedding"),
        nlayer=len(attentions),
        d=_number(table.shape[1]),
        nh=_number(nh),
        nkvh=_number(nkvh),
        dh=_number(dh),
        di=_number(next(iter(downs))),
        dctx=max_context,
        dvoc=_number(vocabulary),
        epsilon=min(epsilons),
        theta=theta_of(inv_freq),
        end_token=eos_token_ids[0] if eos_token_ids else 0,
        inv_freq=tuple(float(f) for f in inv_freq),
        attention_factor=float(with_defaults(ropes[0].op, ropes[0].attrs)["attention_factor"]),
        eos_token_ids=eos_token_ids,
        block_size=block_size,
    )


def _number(dim: object) -> int:
    if not isinstance(dim, int):
        raise UnsupportedError(f"a size of the model is symbolic: {dim}")
    return dim

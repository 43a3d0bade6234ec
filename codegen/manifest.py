"""manifest.json: everything that the runtime must know of a build, the weights' recipes above all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegen.facts import ModelFacts
from ir.constants import Cast, Concat, ConstData, FileSlice, Inline, Slice, Transpose
from ir.errors import GraphError
from ir.graph import Graph

FORMAT = 1
INFINI_DTYPE = {"f16": 12, "f32": 13, "bf16": 19}
PER_LAYER = ("attn_norm", "attn_qkv", "attn_q_norm", "attn_k_norm", "attn_o", "ffn_norm", "ffn_gate_up", "ffn_down")
OWN_FILE = "weights.safetensors"


def recipe(data: ConstData, own: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    """A constant as JSON; what lies in no file of the checkpoint goes to ``own``, the build's own weights."""
    if isinstance(data, FileSlice):
        return dict(file=data.file, name=data.name, dtype=data.dtype, shape=list(data.shape), offset=data.offset)
    if isinstance(data, Concat):
        return dict(concat=[recipe(p, own, f"{name}.{i}") for i, p in enumerate(data.parts)], axis=data.axis)
    if isinstance(data, Transpose):
        return dict(transpose=recipe(data.part, own, name), perm=list(data.perm))
    if isinstance(data, Cast):
        return dict(cast=recipe(data.part, own, name), dtype=data.dtype)
    if isinstance(data, Slice):
        return dict(slice=recipe(data.part, own, name), axis=data.axis, start=data.start, stop=data.stop)
    if isinstance(data, Inline):
        own[name] = data.array
        return dict(file=OWN_FILE, name=name, dtype=data.dtype, shape=list(data.shape), offset=None, build=True)
    raise GraphError(f"weight {name}: no recipe for {type(data).__name__}")


def weights(graph: Graph, facts: ModelFacts) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest's ``weights``, and the arrays that the build must carry itself."""
    own: dict[str, np.ndarray] = {}
    recipes = {name: recipe(c.data, own, name) for name, c in graph.constants.items() if name != "inv_freq"}
    code = INFINI_DTYPE[facts.dtype]
    table: dict[str, Any] = dict(dt_norm=code, dt_mat=code, transpose_linear_weights=0)
    table["input_embd"] = recipes["input_embd"]
    table["output_norm"] = recipes["output_norm"]
    table["output_embd"] = recipes.get("output_embd", recipes["input_embd"])
    for role in PER_LAYER:
        table[role] = [recipes[f"{role}.{i}"] for i in range(facts.nlayer)]
    table["attn_qkv_b"] = None
    return table, own


def meta(facts: ModelFacts) -> dict[str, Any]:
    """The fields of Qwen3Meta, in order."""
    sizes = {k: getattr(facts, k) for k in ("nlayer", "d", "nh", "nkvh", "dh", "di", "dctx", "dvoc")}
    scales = {k: 1.0 for k in ("scale_input", "scale_output", "scale_o", "scale_down")}
    single = {k: float(np.float32(getattr(facts, k))) for k in ("epsilon", "theta")}
    return dict(dt_logits=INFINI_DTYPE[facts.dtype], **sizes, **single, end_token=facts.end_token, **scales)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dump(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"

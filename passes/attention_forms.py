"""Forms of attention: on a paged cache, and on contiguous ones by gemm, causal_softmax, gemm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ir.errors import UnsupportedError
from ir.graph import Graph, GraphEditor, Node, Value
from ir.types import DTYPES, Dim, TensorType, dim_bind, dim_divide, sym
from passes.lowering import Lowering

PAGED = ("paged_caching", "paged_attention", "paged_attention_prefill")
CONTIGUOUS = ("gemm", "causal_softmax", "rearrange")


def describe_paged(low: Lowering, node: Node, op: str) -> dict[str, Any]:
    dim = node.outputs[0].type.shape[-1]
    return dict(rank=4 if op == "paged_caching" else 3, head_dim=dim if isinstance(dim, int) else None)


def describe_contiguous(low: Lowering, node: Node, op: str) -> dict[str, Any]:
    """How many matrices a gemm takes is settled in ``contiguous``, how long rows of scores may be in ``refuse_contiguous``."""
    return dict(rank=3) if op == "causal_softmax" else {}


def refuse_paged(low: Lowering, nodes: Sequence[Node]) -> str:
    return low.index_refusal("paged_caching") or low.index_refusal("paged_attention", "paged_attention_prefill")


def refuse_contiguous(low: Lowering, nodes: Sequence[Node]) -> str:
    return _long_rows(low) or _scale_refusal(low, nodes)


def _long_rows(low: Lowering) -> str:
    """A row of scores has an element per token of the context."""
    most = low.support("causal_softmax").max_row_bytes
    if most is None or low.max_positions * DTYPES[low.dtype].bytes <= most:
        return ""
    tokens = most // DTYPES[low.dtype].bytes
    return (
        f"causal_softmax on {low.target.name} takes rows of at most {most} bytes: "
        f"{tokens} tokens of context in {low.dtype}, not {low.max_positions}"
    )


def _scale_refusal(low: Lowering, nodes: Sequence[Node]) -> str:
    alphas = low.support("gemm").alphas
    reasons = [_unfoldable(low.graph, n) for n in nodes if alphas and (n.attrs["scale"], 0) not in alphas]
    if alphas and (1, 0) not in alphas:
        reasons.append("its plain products need 1")
    reason = next(filter(None, reasons), "")
    if not reason:
        return ""
    pairs = ", ".join(f"({a:g}, {b:g})" for a, b in alphas)
    return f"gemm on {low.target.name} takes (alpha, beta) {pairs}: {reason}"


def _unfoldable(graph: Graph, node: Node) -> str:
    """Why the scale of an attention cannot go into the rope tables of its queries and keys."""
    scale = node.attrs["scale"]
    if not scale > 0:
        return f"the scale {scale:g} of {node.output} has no square root to put into rope tables"
    for name in node.inputs[:2]:
        rope = graph.producers.get(name)
        if rope is None or rope.op not in ("rope", "norm_rope"):
            return f"the scale of {node.output} cannot go into rope tables: {name} comes from no rope"
        alone = graph.consumers[name] == [node] and node.inputs.count(name) == 1 and name not in graph.outputs
        if not alone:
            return f"the scale of {node.output} cannot go into rope tables: {name} is read elsewhere too"
    return ""


def fold_scales(low: Lowering, nodes: Sequence[Node]) -> None:
    """Where gemm takes no factor but 1: queries and keys are each multiplied with the root of the scale as they are rotated, so the cached keys are too."""
    alphas = low.support("gemm").alphas
    for node in nodes:
        if alphas and (node.attrs["scale"], 0) not in alphas:
            low.rope_factors.update(dict.fromkeys(node.inputs[:2], math.sqrt(node.attrs["scale"])))
            low.notes["attention_cached"] = (
                f"the scale is in the rope tables, since gemm on {low.target.name} takes no factor"
            )


def paged(low: Lowering, node: Node) -> None:
    q, k, v, k_cache, v_cache, lens, starts = node.inputs
    groups, dim = low.type(k).shape[1:]
    cache = TensorType(low.dtype, (sym("B"), groups, low.target.block_size, dim))
    requests = low.graph.type(lens).shape[0]
    slot, index = low.index_dtype("paged_caching"), low.index_dtype("paged_attention", "paged_attention_prefill")
    extra = {
        "slots": TensorType(slot, low.graph.type(q).shape[:1]),
        "block_tables": TensorType(index, (requests, sym("M"))),
        "seq_lens": TensorType(index, (requests,)),
        "cu_lens": TensorType(index, (sym("R1"),)),
    }
    for name, type_ in extra.items():
        low.add_input(name, type_)
    for name in (k_cache, v_cache):
        low.retype_input(name, cache)
    k_new, v_new = low.calls(
        "infini.paged_caching", [k_cache, v_cache, k, v, "slots"], [v.name for v in node.outputs[1:]], node
    )
    attrs = dict(scale=node.attrs["scale"])
    out = low.call(
        "infini.paged_attention_ragged",
        [q, k_new, v_new, "block_tables", "seq_lens", "cu_lens"],
        node.output,
        node,
        **attrs,
    )
    low.put(node, out, k_new, v_new)


def contiguous(low: Lowering, node: Node) -> None:
    q, k, v = (low.type(name) for name in node.inputs[:3])
    gemm, groups = low.support("gemm"), dim_bind(k.shape[1], low.full)
    each = bool(gemm.ranks and 3 not in gemm.ranks) or (low.dtype in gemm.single_batch_dtypes and groups != 1)
    if each:
        low.notes["attention_cached"] = (
            f"one gemm per head, since gemm on {low.target.name} takes one matrix in {low.dtype}"
        )
    scale = 1.0 if node.inputs[0] in low.rope_factors else node.attrs["scale"]
    bodies = {
        name: request_body(name, q, k, scale, length, each, gemm.row_major_output)
        for name, length in (("prefill", sym("len")), ("decode", 1))
    }
    low.put(node, *low.calls("loop.requests", list(node.inputs), [v.name for v in node.outputs], node, **bodies))


def request_body(
    name: str, q: TensorType, k: TensorType, scale: float, length: Dim, each: bool = False, pitched: bool = False
) -> Graph:
    """Attention of one request on a contiguous cache [G, cap, D], as gemm, causal_softmax, gemm; query heads of one kv head are one matrix.

    A single token's rows lie as the gemm wants them already, so decode needs no copies but those into the cache.

    Args:
        each: gemms take one matrix at a time.
        pitched: rows of scores are ``ld`` elements apart, which is total but at least 2: rows of one element would lie as columns do.
    """
    heads, dim = q.shape[1:]
    groups = k.shape[1]
    dtype = q.dtype
    cache = TensorType(dtype, (groups, sym("cap"), dim))
    inputs = (
        Value("q", q.with_shape(length, heads, dim)),
        Value("k", k.with_shape(length, groups, dim)),
        Value("v", k.with_shape(length, groups, dim)),
        Value("k_cache", cache),
        Value("v_cache", cache),
    )
    edit = GraphEditor(Graph(name, "infini", inputs, (), {}, ()))

    def add(op: str, operands: list[str], hint: str, **attrs) -> str:
        return edit.add(op, operands, [hint], attrs)[0]

    def append(into: str, x: str) -> str:
        rows = add("view.permute", [x], x + "_heads", perm=(1, 0, 2))
        return add("infini.rearrange_into", [into, rows], into + "_new", axis=1, start=sym("pos"))

    total, ratio = sym("total"), dim_divide(heads, groups)
    if ratio is None:
        raise UnsupportedError(f"{heads} query heads are not a multiple of {groups} key/value heads")
    k_new, v_new = append("k_cache", "k"), append("v_cache", "v")
    keys = add("view.slice", [k_new], "keys", axis=1, start=0, size=total)
    values = add("view.slice", [v_new], "values", axis=1, start=0, size=total)
    keys_t = add("view.permute", [keys], "keys_t", perm=(0, 2, 1))
    if length == 1:
        q_heads = add("view.reshape", ["q"], "q_heads", shape=(groups, ratio, dim))
    else:
        q_rows = add("view.permute", ["q"], "q_rows", perm=(1, 0, 2))
        q_packed = add("infini.rearrange", [q_rows], "q_packed")
        q_heads = add("view.reshape", [q_packed], "q_heads", shape=(groups, ratio * length, dim))
    options: dict[str, Any] = dict(each=True) if each else {}
    pitch = dict(pitch=sym("ld")) if pitched else {}
    scores = add("infini.gemm", [q_heads, keys_t], "scores", alpha=scale, **options, **pitch)
    rows = add("view.reshape", [scores], "score_rows", shape=(heads, length, total))
    probs = add("infini.causal_softmax", [rows], "probs")
    weights = add("view.reshape", [probs], "weights", shape=(groups, ratio * length, total))
    mixed = add("infini.gemm", [weights, values], "mixed", **options)
    if length == 1:
        out = add("view.reshape", [mixed], "out", shape=(1, heads, dim))
    else:
        by_head = add("view.reshape", [mixed], "mixed_heads", shape=(heads, length, dim))
        by_token = add("view.permute", [by_head], "mixed_tokens", perm=(1, 0, 2))
        out = add("infini.rearrange", [by_token], "out")
    edit.outputs = [out, k_new, v_new]
    return edit.finish()

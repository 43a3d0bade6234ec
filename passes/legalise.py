"""From "fused" to "infini": every fused op becomes the best sequence of InfiniCore calls that the target has.

``FORMS`` is the whole of it: per fused op, its forms in order of preference, each with the InfiniCore ops that it needs. The first form whose needs the
target's record meets for every node of the op is taken; why the earlier ones were not is recorded in ``meta["legalised"]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ir.errors import UnsupportedError
from ir.graph import Graph, Node
from passes import attention_forms as attention
from passes import forms
from passes.clobbers import protect
from passes.forms import indices, rename_to
from passes.lowering import Form, Lowering
from passes.targets import Target

__all__ = ["FORMS", "Form", "Lowering", "legalise"]

FORMS: dict[str, tuple[Form, ...]] = {
    "embedding": (
        Form("embedding", ("embedding",), forms.rows("infini.embedding", 0, "embedding"), refusal=indices("embedding")),
        Form("one copy per token", (), forms.rows("infini.copy_rows", 0)),
    ),
    "gather_rows": (
        Form(
            "embedding", ("embedding",), forms.rows("infini.gather_rows", 1, "embedding"), refusal=indices("embedding")
        ),
        Form("one copy per row", (), forms.rows("infini.copy_chosen_rows", 1)),
    ),
    "linear": (Form("gemm", ("gemm",), forms.linear, refusal=forms.no_factor),),
    "rms_norm": (Form("rms_norm", ("rms_norm",), rename_to("infini.rms_norm", "epsilon")),),
    "add": (Form("add", ("add",), forms.add),),
    "mul": (Form("mul", ("mul",), rename_to("infini.mul")),),
    "silu": (Form("silu", ("silu",), rename_to("infini.silu")),),
    "add_rms_norm": (
        Form("add_rms_norm", ("add_rms_norm",), forms.add_rms_norm),
        Form("add, rms_norm", ("add", "rms_norm"), forms.add_then_norm),
    ),
    "swiglu": (Form("swiglu", ("swiglu",), forms.swiglu), Form("silu, mul", ("silu", "mul"), forms.silu_mul)),
    "rope": (Form("rope", ("rope",), forms.rope, refusal=indices("rope")),),
    "norm_rope": (Form("rms_norm, rope", ("rms_norm", "rope"), forms.norm_rope, refusal=indices("rope")),),
    "attention_cached": (
        Form(
            "paged",
            attention.PAGED,
            attention.paged,
            described=attention.describe_paged,
            refusal=attention.refuse_paged,
        ),
        Form(
            "contiguous",
            attention.CONTIGUOUS,
            attention.contiguous,
            described=attention.describe_contiguous,
            refusal=attention.refuse_contiguous,
        ),
    ),
    "all_reduce": (Form("AllReduce", (), rename_to("infini.all_reduce"), "AllReduce"),),
    "all_gather": (Form("AllGather", (), rename_to("infini.all_gather", "size"), "AllGather"),),
    "split": (Form("views", (), forms.split),),
    "reshape": (Form("view", (), forms.reshape),),
}


def legalise(graph: Graph, target: Target, *, kv: str = "auto", max_positions: int) -> Graph:
    """Lower a fused graph (weights named by role) to calls that ``target`` has.

    Besides ``legalised`` and ``kv``, ``meta`` gets ``inner_multiple`` where a device's part of the inner size must be a multiple of it, and ``gemm_alphas`` where the
    target's gemm takes these pairs (alpha, beta) only, which the weights' scales are part of.

    Args:
        kv: ``paged`` or ``contiguous`` to insist on one form of attention, ``auto`` for the best that is legal. ``paged`` makes do with ops that are not known to work.
        max_positions: rows of the rope tables, tokens of the longest request.

    Raises:
        UnsupportedError: no form of an op is legal; names target, op, dtype and the reasons.
    """
    low = Lowering(graph, target, max_positions)
    nodes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        nodes.setdefault(node.op, []).append(node)
    chosen = {op: _choose(low, op, found, kv) for op, found in nodes.items()}
    if chosen["attention_cached"][0].name == "contiguous":
        attention.fold_scales(low, nodes["attention_cached"])
    for node in graph.nodes:
        chosen[node.op][0].lower(low, node)
    record = [
        [op, form.name, "; ".join(filter(None, (why, low.notes.get(op, "")))), len(nodes[op])]
        for op, (form, why) in chosen.items()
    ]
    if low.support("gemm").alphas:
        low.meta["gemm_alphas"] = [list(pair) for pair in low.support("gemm").alphas]
    meta = {**graph.meta, **low.meta, "legalised": record, "kv": chosen["attention_cached"][0].name}
    low.edit.outputs = list(graph.outputs)
    result = low.edit.finish(stage="infini", meta=meta)
    read = {i for n in result.nodes for i in n.inputs}
    # lens and starts go where the paged form reads block tables instead.
    result = replace(result, inputs=tuple(v for v in result.inputs if v.name in read or v.name in result.outputs))
    return protect(result, target)


def _choose(low: Lowering, op: str, nodes: Sequence[Node], kv: str) -> tuple[Form, str]:
    reasons: list[str] = []
    for form in FORMS.get(op, ()):
        asked = kv in ("auto", form.name) or op != "attention_cached"
        reason = _refusal(low, form, nodes, kv) if asked else "not asked for"
        if not reason:
            return form, "; ".join(reasons)
        reasons.append(f"{form.name}: {reason}")
    what = "; ".join(reasons) or "the op has no form"
    raise UnsupportedError(f"target {low.target.name}: {op} in {low.dtype} cannot be compiled ({what})")


def _refusal(low: Lowering, form: Form, nodes: Sequence[Node], kv: str) -> str:
    """Why a form cannot stand for these nodes, or ""."""
    if form.collective:
        return low.target.collective_refusal(form.collective, low.dtype)
    for op in form.needs:
        for node in nodes:
            uncertain_ok = kv == form.name == "paged"
            refusal = low.target.refusal(op, low.dtype, **form.described(low, node, op), uncertain_ok=uncertain_ok)
            if refusal:
                return refusal
    return form.refusal(low, nodes)

"""Tables that the emitted engine shows: the model's constants, where scratch memory lies, a step's integer inputs."""

from __future__ import annotations

import re
from typing import Any

from codegen import cpp
from codegen.facts import ModelFacts
from ir.graph import Graph
from ir.types import DTYPES, Dim
from passes.plan import Plan
from passes.targets import Target

MAX_PLANS = 64
INPUT_TYPES = {"i32": "int32_t", "i64": "int64_t"}


def areas(plan: Plan, paged: bool) -> list[dict[str, Any]]:
    """The scratch structs: name, buffers with their address expressions, size."""
    wanted: list[tuple[str, str, tuple[str, ...]]] = [("Scratch", "main", ("T", "L"))]
    if not paged:
        wanted += [("DecodeScratch", "decode", ("total",)), ("PrefillScratch", "prefill", ("len", "total"))]
    return [_area(plan, name, scope, symbols) for name, scope, symbols in wanted]


def _area(plan: Plan, name: str, scope: str, symbols: tuple[str, ...]) -> dict[str, Any]:
    groups = plan.groups.get(scope, {})
    base: list[str] = []
    bases: dict[Dim, str] = {}
    for unit, size in sorted(groups.items(), key=lambda kv: str(kv[0])):
        bases[unit] = " + ".join(base)
        base.append(_aligned(unit, size))
    mine = [
        b
        for b in plan.buffers.values()
        if b.kind == "scratch" and (b.name.startswith(scope + ".") if scope != "main" else not _foreign(b.name, plan))
    ]
    buffers = []
    for b in mine:
        local = b.name if scope == "main" else b.name.split(".", 1)[1]
        offset = " * ".join(
            x
            for x in ("" if b.offset == 0 else str(b.offset), cpp.dim(b.unit) if b.offset and b.unit != 1 else "")
            if x
        )
        expression = " + ".join(x for x in ("base", bases[b.unit], offset) if x)
        buffers.append(
            dict(
                name=cpp.identifier(local),
                expr=expression,
                type=f"{b.bytes} bytes per {b.unit}" if b.unit != 1 else f"{b.bytes} bytes",
            )
        )
    params = ", ".join(f"size_t {s}" for s in symbols)
    spelled = " ".join(b["expr"] for b in buffers)
    total = " + ".join(base) or "0"
    # Rows of a matrix are at least two elements apart where one would look like a column.
    pitch = "const size_t ld = std::max<size_t>(total, 2);" if re.search(r"\bld\b", total) else ""
    unused = [s for s in symbols if not re.search(rf"\b{s}\b", spelled + pitch * bool(re.search(r"\bld\b", spelled)))]
    return dict(
        name=name,
        buffers=buffers,
        params=params,
        params_comma=", " + params,
        total=total,
        pitch=pitch,
        pitched=bool(re.search(r"\bld\b", spelled)),
        unused=unused,
    )


def inputs(graph: Graph) -> list[dict[str, Any]]:
    """The step's integer inputs, widest first so that each is aligned."""
    sizes = {
        "T": "shape.tokens",
        "L": "shape.rows",
        "R": "shape.requests",
        "M": "shape.blocks",
        "R1": "(shape.requests + 1)",
    }
    fields: list[dict[str, Any]] = []
    for value in graph.inputs:
        if value.type.dtype in INPUT_TYPES and value.name not in ("lens", "starts"):
            count = " * ".join(sizes[str(d)] for d in value.type.shape)
            width = DTYPES[value.type.dtype].bytes
            fields.append(
                dict(
                    name=value.name,
                    type=INPUT_TYPES[value.type.dtype],
                    shape=cpp.type_comment(value.type),
                    bytes=f"size_t{{{width}}} * {count}",
                    width=width,
                )
            )
    return sorted(fields, key=lambda f: -f["width"])


def constants(facts: ModelFacts, target: Target, attention_factor: float) -> list[dict[str, str]]:
    """The model's constants as the top of qwen3.cpp shows them."""
    rows = [
        ("infiniDevice_t", "DEVICE", f"static_cast<infiniDevice_t>({target.device})", target.name),
        (
            "infiniDtype_t",
            "DT",
            f"INFINI_DTYPE_{DTYPES[facts.dtype].infini}",
            "of weights, activations, caches and logits",
        ),
        ("uint32_t", "NLAYER", str(facts.nlayer), "layers"),
        ("uint32_t", "D", str(facts.d), "hidden size"),
        ("uint32_t", "NH", str(facts.nh), "query heads"),
        ("uint32_t", "NKVH", str(facts.nkvh), "key and value heads"),
        ("uint32_t", "DH", str(facts.dh), "head size"),
        ("uint32_t", "DI", str(facts.di), "intermediate size"),
        ("uint32_t", "DCTX", str(facts.dctx), "largest context"),
        ("uint32_t", "DVOC", str(facts.dvoc), "vocabulary"),
        ("float", "EPSILON", cpp.float_literal(facts.epsilon), "of every RMS norm"),
        ("float", "THETA", cpp.float_literal(facts.theta), "rotary base"),
        ("float", "ATTENTION_FACTOR", cpp.float_literal(attention_factor), "multiplies the rotary tables"),
        ("uint32_t", "END_TOKEN", str(facts.end_token), ""),
        ("size_t", "MAX_PLANS", str(MAX_PLANS), "shapes whose operators are kept"),
    ]
    return [dict(type=t, name=n, value=v, comment=c) for t, n, v, c in rows]


def _foreign(name: str, plan: Plan) -> bool:
    """Whether a scratch buffer belongs to a request's body."""
    return any(name.startswith(scope + ".") for scope in ("prefill", "decode"))


def _aligned(unit: Dim, size: int) -> str:
    """The bytes of one group, rounded up to whole lines so that the next starts on one."""
    amount = f"{size} * {cpp.dim(unit)}" if unit != 1 else str(size)
    return amount if size % 64 == 0 else f"({amount} + 63) / 64 * 64"

"""The whole way down: from an ONNX graph to a planned program of InfiniCore calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codegen.facts import ModelFacts, model_facts
from codegen.names import follows_rule
from ir.errors import UnsupportedError
from ir.graph import Graph
from passes.legalise import legalise
from passes.lower import to_fused
from passes.pipeline import Pass, run_passes
from passes.plan import Plan, plan_memory
from passes.roles import assign_roles
from passes.roll import roll_layers
from passes.shard import shard
from passes.targets import Target


@dataclass(frozen=True)
class Program:
    """A compiled model before it is spelled out in C++."""

    fused: Graph
    graph: Graph
    plan: Plan
    facts: ModelFacts
    target: Target


def lower(
    graph: Graph,
    *,
    target: Target,
    dtype: str,
    kv: str = "auto",
    max_context: int,
    eos_token_ids: tuple[int, ...] = (),
    dump_dir: Path | None = None,
    log: Callable[[str], Any] | None = None,
) -> Program:
    """Lower an imported ONNX graph for a target.

    Args:
        kv: ``auto``, ``paged`` or ``contiguous``.
        max_context: tokens per request; the rope tables have as many rows.

    Raises:
        UnsupportedError: something in the graph cannot be compiled, for this target or at all.
    """
    fused = to_fused(graph, dtype, dump_dir=dump_dir, log=log)
    roles = Pass("assign_roles", assign_roles, "fused", "fused", "weights get the names of their slots in Qwen3Weights")
    fused = run_passes(fused, [roles], dump_dir=dump_dir, log=log)
    facts = model_facts(fused, max_context=max_context, eos_token_ids=eos_token_ids, block_size=target.block_size)

    def legal(g: Graph) -> tuple[Graph, int]:
        result = legalise(g, target, kv=kv, max_positions=max_context)
        return result, sum(row[3] for row in result.meta["legalised"])

    cut = Pass(
        "shard",
        lambda g: shard(g, gather="AllGather" in target.collectives),
        "fused",
        "fused",
        "sizes that several devices share become symbols; they meet after attention and feed-forward, and at the logits",
    )
    passes = [
        *([cut] if "AllReduce" in target.collectives else []),
        Pass("legalise", legal, "fused", "infini", f"every op as InfiniCore calls that {target.name} has"),
        Pass(
            "roll_layers",
            lambda g: roll_layers(g, follows_rule),
            "infini",
            "infini",
            "isomorphic layers become one loop",
        ),
    ]
    low = run_passes(fused, passes, dump_dir=dump_dir, log=log)
    plan = plan_memory(low)
    low = replace(low, meta={**low.meta, "memory": memory_summary(plan)})
    return Program(fused, low, plan, facts, target)


def memory_summary(plan: Plan) -> dict[str, Any]:
    """Scratch memory in bytes per unit of what it grows with, planned and without sharing."""
    alone: dict[str, int] = {}
    for buffer in plan.buffers.values():
        if buffer.kind == "scratch":
            alone[str(buffer.unit)] = alone.get(str(buffer.unit), 0) + buffer.bytes
    planned = {str(unit): size for groups in plan.groups.values() for unit, size in groups.items()}
    return dict(scratch_bytes_per=planned, buffers_bytes_per=alone)


def check_quant(quant: str) -> None:
    if quant != "none":
        raise UnsupportedError(f"--quant {quant}: only none is there; weights keep the dtype that --dtype names")

"""Weights get the names of the slots that they fill in Qwen3Weights: ``attn_qkv.3``, ``output_norm``, ...

A weight's role follows from where it stands in the graph, not from what an exporter called it.
"""

from __future__ import annotations

from ir.errors import UnsupportedError
from ir.graph import Graph, Node, rename
from ir.optable import with_defaults


def assign_roles(graph: Graph) -> tuple[Graph, int]:
    """Rename the constants of a fused graph by role.

    Raises:
        UnsupportedError: a weight stands where a dense decoder has none, or one is missing; names the value.
    """
    names: dict[str, str] = {}
    owners: dict[str, str] = {}

    def name(constant: str, role: str) -> None:
        if constant not in graph.constants:
            raise UnsupportedError(f"{graph.name}: {constant}, where {role} belongs, is computed and not a weight")
        if names.setdefault(constant, role) != role and role != "output_embd":
            raise UnsupportedError(f"{graph.name}: {constant} is used as {names[constant]} and as {role}")
        if owners.setdefault(names[constant], constant) != constant:
            raise UnsupportedError(
                f"{graph.name}: {owners[names[constant]]} and {constant} both stand where {role} does; the engine has one"
            )

    layers = [n for n in graph.nodes if n.op == "attention_cached"]
    if not layers:
        raise UnsupportedError(f"{graph.name}: there is no attention in it; the engine is made for dense decoders")
    for node in graph.nodes:
        if node.op == "embedding":
            name(node.inputs[1], "input_embd")
        elif node.op in ("norm_rope", "rope"):
            name(node.inputs[3 if node.op == "norm_rope" else 2], "inv_freq")
    factors = {with_defaults(n.op, n.attrs)["attention_factor"] for n in graph.nodes if n.op in ("norm_rope", "rope")}
    if len(factors) > 1:
        raise UnsupportedError(
            f"{graph.name}: rotary tables are scaled by {' and by '.join(map(str, sorted(factors)))}; the engine has one pair"
        )
    for i, attention in enumerate(layers):
        _attention_roles(graph, attention, i, name)
    head = _producer(graph, graph.outputs[0], "linear", "the logits")
    name(head.inputs[1], "output_embd")
    final = _source(graph, head.inputs[0])
    if final.op not in ("rms_norm", "add_rms_norm"):
        raise UnsupportedError(
            f"{graph.name}: {final.op} {final.output} feeds the last linear; a norm does in a dense decoder"
        )
    name(final.inputs[-1], "output_norm")
    unnamed = [c for c in graph.constants if c not in names]
    if unnamed:
        raise UnsupportedError(f"{graph.name}: constant {unnamed[0]} has no place in a dense decoder's weights")
    return _rename(graph, names), len(names)


def _attention_roles(graph: Graph, attention: Node, i: int, name) -> None:
    for operand, role in ((0, "attn_q_norm"), (1, "attn_k_norm")):
        rotated = _source(graph, attention.inputs[operand])
        normed = rotated if rotated.op == "norm_rope" else _source(graph, rotated.inputs[0])
        if normed.op in ("norm_rope", "rms_norm"):
            name(normed.inputs[1], f"{role}.{i}")
    packed = _source(graph, attention.inputs[2])
    if packed.op != "linear":
        raise UnsupportedError(
            f"{graph.name}: {packed.op} {packed.output} makes the values of layer {i}; a merged linear does in a dense decoder"
        )
    name(packed.inputs[1], f"attn_qkv.{i}")
    if len(packed.inputs) > 2 and packed.inputs[2]:
        name(packed.inputs[2], f"attn_qkv_b.{i}")
    norm = _source(graph, packed.inputs[0])
    name(norm.inputs[-1], f"attn_norm.{i}")
    out = _reader(graph, attention.output, "linear")
    name(out.inputs[1], f"attn_o.{i}")
    ffn_norm = _norm_after(graph, out.output)
    name(ffn_norm.inputs[-1], f"ffn_norm.{i}")
    gate_up = _reader(graph, ffn_norm.output, "linear")
    name(gate_up.inputs[1], f"ffn_gate_up.{i}")
    act = _reader(graph, gate_up.output, "swiglu", "mul")
    name(_reader(graph, act.output, "linear").inputs[1], f"ffn_down.{i}")


_TRANSPARENT = ("reshape", "split", "gather_rows", "silu")


def _source(graph: Graph, value: str) -> Node:
    """The node behind a value, through reshapes, splits and row choices."""
    node = graph.producers.get(value)
    while node is not None and node.op in _TRANSPARENT:
        node = graph.producers.get(node.inputs[0])
    if node is None:
        raise UnsupportedError(f"{graph.name}: {value} comes straight from an input; a dense decoder computes it")
    return node


def _producer(graph: Graph, value: str, op: str, what: str) -> Node:
    node = graph.producers.get(value)
    if node is None or node.op != op:
        raise UnsupportedError(
            f"{graph.name}: {what} ({value}) should come from {op}, not from {node.op if node else 'an input'}"
        )
    return node


def _reader(graph: Graph, value: str, *ops: str) -> Node:
    """The first node of one of these ops that reads a value, through reshapes and splits."""
    todo = [value]
    while todo:
        for node in graph.consumers[todo.pop()]:
            if node.op in ops:
                return node
            if node.op in _TRANSPARENT:
                todo.extend(v.name for v in node.outputs)
    raise UnsupportedError(f"{graph.name}: no {' or '.join(ops)} reads {value}")


def _norm_after(graph: Graph, branch: str) -> Node:
    """The norm of the residual sum that takes in ``branch``."""
    for node in graph.consumers[branch]:
        if node.op == "add_rms_norm":
            return node
        if node.op == "add":
            return _reader(graph, node.output, "rms_norm")
    raise UnsupportedError(f"{graph.name}: {branch} is not added to a residual stream that is then normalised")


def _rename(graph: Graph, names: dict[str, str]) -> Graph:
    """Rename constants; an activation that has a slot's name (``attn_norm.3``, the norm's result) makes way (``attn_norm_out.3``)."""
    names = dict(names)
    slots = set(names.values())
    taken = set(graph.values) | slots
    for value in graph.values:
        if value in slots and value not in names:
            base, dot, layer = value.partition(".")
            names[value] = next(n for n in (f"{base}_out{'_' * i}{dot}{layer}" for i in range(99)) if n not in taken)
            taken.add(names[value])
    return rename(graph, names)

"""Copies of operands that a call destroys although somebody still needs them.

Some kernels write over an input (a target's record says which: ``clobbers``). Where nobody reads the memory afterwards that is free; where somebody does, the call gets a
copy. What comes after what is not known yet, since later passes may put calls in another order: only readers that the call itself depends on are surely before it.
"""

from __future__ import annotations

from dataclasses import replace

from ir.errors import UnsupportedError
from ir.graph import Graph, Node, Value
from ir.ops_infini import WRITES_INTO
from passes.targets import Target

# Calls whose tensors are not the node's results and then its operands: the InfiniCore ops that they are, and these ops' tensors.
_ORDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "infini.gather_rows": (("embedding",), "o0 i1 i0"),
    "infini.rearrange_into": (("rearrange",), "o0 i1"),
    "infini.paged_caching": (("paged_caching",), "i0 i1 i2 i3 i4"),
    "infini.paged_attention_ragged": (("paged_attention", "paged_attention_prefill"), "o0 i0 i1 i2 i3 i4 i5"),
}


def protect(graph: Graph, target: Target) -> Graph:
    """Insert the copies, in loops' bodies too; ``meta["legalised"]`` says how many.

    Raises:
        UnsupportedError: a copy is needed and the target has no rearrange.
    """
    if not any(s.clobbers for s in target.ops.values()):
        return graph
    graph, copies = _protected(graph, target)
    rows = [[op, "on a copy", f"{op} on {target.name} destroys what it reads", n] for op, n in copies.items()]
    if not rows:
        return graph
    return replace(graph, meta={**graph.meta, "legalised": [*graph.meta.get("legalised", []), *rows]})


def _protected(graph: Graph, target: Target) -> tuple[Graph, dict[str, int]]:
    copies: dict[str, int] = {}
    nodes: list[Node] = []
    taken = set(graph.values)
    for node in graph.nodes:
        attrs = dict(node.attrs)
        for key, value in attrs.items():
            if isinstance(value, Graph):
                attrs[key], more = _protected(value, target)
                copies.update({op: copies.get(op, 0) + n for op, n in more.items()})
        node = replace(node, attrs=attrs)
        for op, name in _destroyed(node, target):
            if not _needed(graph, name, node):
                continue
            refusal = target.refusal("rearrange", graph.type(name).dtype)
            if refusal:
                raise UnsupportedError(f"target {target.name}: {op} destroys {name}, which is still needed; {refusal}")
            copy = Value(_fresh(f"{name}_copy", taken), graph.type(name))
            nodes.append(Node("infini.rearrange", (name,), (copy,), {}, node.origin))
            node = replace(node, inputs=tuple(copy.name if i == name else i for i in node.inputs))
            copies[op] = copies.get(op, 0) + 1
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes)), copies


def _destroyed(node: Node, target: Target) -> list[tuple[str, str]]:
    """(InfiniCore op, operand of the node) for each operand that the call destroys."""
    if not node.op.startswith("infini."):
        return []
    tensors = [f"o{i}" for i in range(len(node.outputs))] + [f"i{i}" for i in range(len(node.inputs))]
    ops, order = _ORDERS.get(node.op, ((node.op.removeprefix("infini."),), " ".join(tensors)))
    found: dict[str, str] = {}
    for op in ops:
        for position in target.ops[op].clobbers if op in target.ops else ():
            tensor = order.split()[position]
            if tensor[0] == "i":
                found.setdefault(node.inputs[int(tensor[1:])], op)
    return [(op, name) for name, op in found.items()]


def _needed(graph: Graph, name: str, node: Node) -> bool:
    """Whether anything that lies in the memory of ``name`` is the caller's, or may be read after ``node`` has run."""
    same, todo = {name}, [name]
    while todo:
        value = todo.pop()
        near = [n for n in (*graph.consumers[value], graph.producers.get(value)) if n]
        for other in {v for n in near for shared in _sharing(n) if value in shared for v in shared} - same:
            same.add(other)
            todo.append(other)
    setup = {v.name for n in graph.nodes if n.op.startswith("setup.") for v in n.outputs}
    outer = {v.name for v in graph.inputs} | set(graph.constants) | set(graph.outputs) | setup
    if same & outer:
        return True
    before = _ancestors(graph, node)
    readers = {
        reader.output for value in same for reader in graph.consumers[value] if not reader.op.startswith("view.")
    }
    return bool(readers - before - {node.output})


def _sharing(node: Node) -> list[set[str]]:
    """Sets of the node's values that lie in the same memory whatever the plan."""
    if node.op.startswith("view."):
        return [{*node.inputs, *(v.name for v in node.outputs)}]
    into = {1: 3, 2: 4} if node.op == "loop.requests" else WRITES_INTO.get(node.op, {})
    return [{node.outputs[result].name, node.inputs[operand]} for result, operand in into.items()]


def _ancestors(graph: Graph, node: Node) -> set[str]:
    """First results of the nodes that ``node`` depends on."""
    found: set[str] = set()
    todo = list(node.inputs)
    while todo:
        producer = graph.producers.get(todo.pop())
        if producer is not None and producer.output not in found:
            found.add(producer.output)
            todo.extend(i for i in producer.inputs if i)
    return found


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name

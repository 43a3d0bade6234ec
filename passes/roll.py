"""Layer rolling: the longest run of isomorphic stretches of the call sequence becomes one ``loop.layers``.

Nothing here knows what a layer is. The nodes are put in a canonical order, their signatures (op, attributes, result types) are searched for the period that covers
most of them, and the dataflow between the stretches decides what is carried from run to run, what differs per run (weights, caches) and what is the same.
What does not repeat stays as it is, before or after the loop; a graph in which nothing repeats is returned unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ir.graph import Graph, Node, Value
from ir.types import TensorType


def roll_layers(graph: Graph, accept: Callable[[Sequence[str]], bool] = lambda names: True) -> tuple[Graph, int]:
    """Roll the graph's layers; returns it and the number of runs of the loop (0: nothing was rolled).

    ``accept`` says whether the runs of a loop can find values with these names, one per run; a stretch with others is left as it is.
    """
    nodes = canonical_order(graph)
    ordered = replace(graph, nodes=tuple(nodes))
    for start, period, count in _candidates(nodes):
        flow = _dataflow(ordered, start, period, count)
        if flow is not None and all(accept(names) for names in flow.per_layer.values()):
            return _build(ordered, start, period, count, flow), count
    return ordered, 0


def canonical_order(graph: Graph) -> list[Node]:
    """Set-up nodes first, then depth-first from the outputs: an order that depends on the dataflow alone, so that equal layers look equal."""
    index = {v.name: i for i, n in enumerate(graph.nodes) for v in n.outputs}
    setup = [i for i, n in enumerate(graph.nodes) if n.op.startswith("setup.")]
    order, done = [], set()
    for root in setup + [index[o] for o in graph.outputs if o in index]:
        stack = [(root, False)]
        while stack:
            i, ready = stack.pop()
            if ready:
                order.append(i)
                continue
            if i in done:
                continue
            done.add(i)
            stack.append((i, True))
            stack.extend(
                (index[name], False)
                for name in reversed(graph.nodes[i].inputs)
                if name in index and index[name] not in done
            )
    return [graph.nodes[i] for i in order]


def _candidates(nodes: Sequence[Node]) -> list[tuple[int, int, int]]:
    """(start, period, count) of every maximal repetition, those that cover most first."""
    ids: dict[str, int] = {}
    signature = [
        ids.setdefault(
            f"{n.op} {sorted(n.attrs.items(), key=lambda kv: kv[0])} {[v.type for v in n.outputs]}", len(ids)
        )
        for n in nodes
    ]
    found = []
    for period in range(1, len(nodes) // 2 + 1):
        run = 0
        for i in range(len(nodes) - period + 1):
            if i + period < len(nodes) and signature[i] == signature[i + period]:
                run += 1
                continue
            count = run // period + 1
            if count > 1:
                # Where a part of a stretch is left over, the loop may begin at any of that many places.
                found += [(i - run + shift, period, count) for shift in range(run % period + 1)]
            run = 0
    return sorted(found, key=lambda c: (-c[1] * c[2], c[1], c[0]))


@dataclass
class _Flow:
    """How values pass through the loop, by the name that the first stretch uses."""

    carried: dict[str, str] = field(
        default_factory=dict
    )  # operand of the first stretch -> the value of that stretch which the next reads there
    per_layer: dict[str, list[str]] = field(
        default_factory=dict
    )  # operand of the first stretch -> what each stretch reads there
    invariant: list[str] = field(default_factory=list)


def _dataflow(graph: Graph, start: int, period: int, count: int) -> _Flow | None:
    """Classify the stretches' operands; None where they are not isomorphic."""
    where = {v.name: (i, k) for i, n in enumerate(graph.nodes) for k, v in enumerate(n.outputs)}
    flow = _Flow()
    for i in range(start, start + period):
        for k, first in enumerate(graph.nodes[i].inputs):
            reads = [
                graph.nodes[i + j * period].inputs[k] if k < len(graph.nodes[i + j * period].inputs) else ""
                for j in range(count)
            ]
            if not first or not all(reads):
                if any(reads):
                    return None
                continue
            if where.get(first, (-1, 0))[0] >= start:  # made in the same stretch
                at, out = where[first]
                if any(where.get(r) != (at + j * period, out) for j, r in enumerate(reads)):
                    return None
            elif all(r == first for r in reads):
                if first not in flow.invariant:
                    flow.invariant.append(first)
            elif where.get(reads[1], (-1, 0))[0] >= start:  # made by the stretch before
                at, out = where[reads[1]]
                if at >= start + period or any(
                    where.get(r) != (at + (j - 1) * period, out) for j, r in enumerate(reads) if j
                ):
                    return None
                if graph.type(first) != graph.type(reads[1]) or flow.carried.setdefault(first, reads[1]) != reads[1]:
                    return None
            else:
                types = {graph.type(r) for r in reads}
                outside = all(r not in where or where[r][0] < start for r in reads)
                if len(types) > 1 or not outside or flow.per_layer.setdefault(first, reads) != reads:
                    return None
    operands = [*flow.carried, *flow.per_layer, *flow.invariant]
    # A value that plays two parts (the first state of what is carried, and read by every run) has one name, which the body would take for both.
    return flow if len(set(operands)) == len(operands) else None


def _build(graph: Graph, start: int, period: int, count: int, flow: _Flow) -> Graph:
    stretch = graph.nodes[start : start + period]
    end = start + period * count
    made = {
        v.name: (i - start, k) for i, n in enumerate(graph.nodes[start:end], start) for k, v in enumerate(n.outputs)
    }
    outside = {name for n in graph.nodes[end:] for name in n.inputs} | set(graph.outputs)
    final = {
        graph.nodes[i + (count - 1) * period].outputs[k].name for i, k in _places(graph, start, flow.carried.values())
    }
    # What later nodes or the caller read of each run, beyond the carried values' last state.
    collected = [
        (i, k)
        for i, node in enumerate(stretch)
        for k, v in enumerate(node.outputs)
        if any(graph.nodes[start + i + j * period].outputs[k].name in outside - final for j in range(count))
    ]
    names = _short_names(graph, stretch, flow)
    inputs = [Value(names[n], graph.type(n)) for n in [*flow.carried, *flow.per_layer, *flow.invariant]]
    body_nodes = tuple(
        replace(
            n,
            inputs=tuple(names[i] if i else "" for i in n.inputs),
            outputs=tuple(Value(names[v.name], v.type) for v in n.outputs),
            origin=tuple(dict.fromkeys(o for j in range(count) for o in graph.nodes[start + s + j * period].origin)),
        )
        for s, n in enumerate(stretch)
    )
    body_outputs = tuple(names[v] for v in flow.carried.values()) + tuple(
        names[stretch[i].outputs[k].name] for i, k in collected
    )
    body = Graph("layer", graph.stage, tuple(inputs), body_outputs, {}, body_nodes)
    last = (count - 1) * period
    outputs = [graph.nodes[i + last].outputs[k] for i, k in _places(graph, start, flow.carried.values())]
    outputs += [graph.nodes[start + i + j * period].outputs[k] for i, k in collected for j in range(count)]
    operands = [*flow.carried, *(r for reads in flow.per_layer.values() for r in reads), *flow.invariant]
    attrs = dict(
        body=body, count=count, carried=len(flow.carried), per_layer=len(flow.per_layer), collected=len(collected)
    )
    loop = Node("loop.layers", tuple(operands), tuple(outputs), attrs)
    assert all(made[v.name] for v in outputs)
    return replace(graph, nodes=graph.nodes[:start] + (loop,) + graph.nodes[end:])


def _places(graph: Graph, start: int, values) -> list[tuple[int, int]]:
    where = {v.name: (i, k) for i, n in enumerate(graph.nodes) for k, v in enumerate(n.outputs)}
    return [where[v] for v in values]


def _short_names(graph: Graph, stretch: Sequence[Node], flow: _Flow) -> dict[str, str]:
    """Names inside the body: those of the first stretch without their layer numbers (``attn_qkv.0`` -> ``attn_qkv``), kept apart where they clash."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for name in [*flow.carried, *flow.per_layer, *flow.invariant, *(v.name for n in stretch for v in n.outputs)]:
        parts = [p for p in name.split(".") if not p.isdigit()]
        short, n = ".".join(parts) or name, 1
        while short in taken:
            n += 1
            short = f"{'.'.join(parts)}_{n}"
        taken.add(short)
        names[name] = short
    return names


def body_types(loop: Node) -> dict[str, TensorType]:
    """The types of every value of a loop's body."""
    return {name: v.type for name, v in loop.attrs["body"].values.items()}

"""The last step to stage "model": every op checked, one order and one set of names, whatever exporter the graph came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ir.errors import UnsupportedError
from ir.graph import Graph, Node, Value, rename, toposort
from ir.optable import infer, lookup
from ir.types import DTYPES, TensorType
from passes import raise_attention, raise_ops, raise_rope
from passes.match import Rule, explain

_COMMUTATIVE = ("add", "mul")


def canonicalise(graph: Graph) -> tuple[Graph, int]:
    """Make a graph of stage "model" out of one whose ops have all been raised.

    - Operands of add and mul: the one that more ops lead to comes first.
    - Order: depth first from the logits, operands from left to right.
    - Names: those of a decoder (``q.0``, ``attn_norm.0``, ...) where the graph looks like one, weights as Hugging Face calls them, else op and number.
      Inputs and outputs keep theirs.

    Raises:
        UnsupportedError: an op is left that stage "model" does not have; names it, and the rule that came closest.
    """
    foreign = next((n for n in _by_interest(graph) if "model" not in lookup(n.op).stages), None)
    if foreign is not None:
        raise UnsupportedError(_explain(graph, foreign))
    graph = replace(graph, stage="model")
    graph = _retyped(_ordered(_ordered_operands(_joined_reshapes(graph))))
    names = Names(graph).run()
    return rename(graph, names), len(names)


def _by_interest(graph: Graph) -> list[Node]:
    """Nodes on activations first: masks and angles are left over because what reads them is."""
    active: set[str] = set()
    for node in graph.nodes:
        if node.op in ("embedding", "linear") or any(i in active for i in node.inputs):
            active.update(v.name for v in node.outputs)
    floats = {n.output for n in graph.nodes if DTYPES[n.outputs[0].type.dtype].is_float}
    return sorted(graph.nodes, key=lambda n: (n.output not in active, n.output not in floats))


def _explain(graph: Graph, node: Node) -> str:
    rules: list[Rule] = [rule() for rules in raise_ops.RULES.values() for rule in rules]
    rules += [*raise_rope.rope_rules(graph), *raise_attention.attention_rules(graph)]
    near, edge = {v.name: None for v in node.outputs}, [node]
    for _ in range(12):
        edge = [reader for n in edge for v in n.outputs for reader in graph.consumers[v.name]][:20]
        near.update({v.name: None for n in edge for v in n.outputs})
    closest = explain(graph, rules, list(near))
    where = f" (ONNX node {' ; '.join(node.origin)})" if node.origin else ""
    return f"{graph.name}: {node.op} -> {node.output}{where} is part of nothing that can be compiled" + (
        f"; closest: {closest}" if closest else ""
    )


def _joined_reshapes(graph: Graph) -> Graph:
    """A reshape of a reshape is one reshape; a reshape to the same shape is none."""
    source: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(source.get(i, i) if node.op != "reshape" else i for i in node.inputs))
        if node.op == "reshape":
            before = graph.producers.get(node.inputs[0])
            x = before.inputs[0] if before is not None and before.op == "reshape" else node.inputs[0]
            node = replace(node, inputs=(source.get(x, x),))
            if graph.type(node.inputs[0]).shape == tuple(node.attrs["shape"]) and node.output not in graph.outputs:
                source[node.output] = node.inputs[0]
                continue
        nodes.append(node)
    return replace(graph, nodes=tuple(toposort(nodes, graph.outputs, graph.name)))


def _ordered_operands(graph: Graph) -> Graph:
    depth: dict[str, int] = {}
    nodes = []
    for node in graph.nodes:
        if node.op in _COMMUTATIVE:
            a, b = node.inputs
            if depth.get(a, 0) < depth.get(b, 0):
                node = replace(node, inputs=(b, a))
        d = 1 + max((depth.get(i, 0) for i in node.inputs), default=0)
        # Reshapes are spelt differently often, so they do not count.
        d -= node.op == "reshape"
        depth.update({v.name: d for v in node.outputs})
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _ordered(graph: Graph) -> Graph:
    order: list[Node] = []
    done: set[str] = set()
    for output in graph.outputs:
        todo = [output]
        while todo:
            node = graph.producers.get(todo[-1])
            if node is None or node.output in done:
                todo.pop()
                continue
            waiting = [i for i in node.inputs if (p := graph.producers.get(i)) is not None and p.output not in done]
            if waiting:
                todo.extend(reversed(waiting))
            else:
                done.add(node.output)
                order.append(node)
                todo.pop()
    used = list(dict.fromkeys(i for n in order for i in n.inputs))
    constants = {name: graph.constants[name] for name in used if name in graph.constants}
    return replace(graph, nodes=tuple(order), constants=constants)


def _retyped(graph: Graph) -> Graph:
    """Types by the op table's rules from the inputs on: an importer's symbols for dimensions that it could not follow go."""
    types: dict[str, TensorType] = {v.name: v.type for v in graph.inputs}
    types.update({k: c.value.type for k, c in graph.constants.items()})
    nodes = []
    for node in graph.nodes:
        results = infer(node.op, [types[i] if i else None for i in node.inputs], node.attrs)
        outputs = tuple(Value(v.name, t) for v, t in zip(node.outputs, results, strict=True))
        types.update({v.name: v.type for v in outputs})
        nodes.append(replace(node, outputs=outputs))
    return replace(graph, nodes=tuple(nodes))


class Names:
    """New names for the values and weights of a decoder, by their place in it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names: dict[str, str] = {}
        self.fixed = {v.name for v in graph.inputs} | set(graph.outputs)
        self.taken = set(self.fixed)
        self.layer = 0

    def run(self) -> dict[str, str]:
        graph = self.graph
        attentions = [n for n in graph.nodes if n.op == "attention"]
        for node in graph.nodes:
            if node.op == "embedding":
                self.give(node.output, "hidden.0")
                self.give(node.inputs[1], "model.embed_tokens.weight")
            elif node.op == "rope":
                self.give(node.inputs[2], "inv_freq")
        for self.layer, node in enumerate(attentions):
            self._attention(node)
        self._head(len(attentions))
        counts: dict[str, int] = {}
        for node in graph.nodes:
            for value in node.outputs:
                if value.name not in self.names:
                    counts[node.op] = counts.get(node.op, -1) + 1
                    self.give(value.name, f"{node.op}.{counts[node.op]}")
        for name in graph.constants:
            if name not in self.names:
                self.give(name, name if name not in self.taken else f"{name}.weight")
        return {old: new for old, new in self.names.items() if old != new}

    def give(self, value: str, name: str) -> None:
        if value in self.fixed or value in self.names:
            return
        unique, n = name, 1
        while unique in self.taken:
            unique, n = f"{name}_{n}", n + 1
        self.taken.add(unique)
        self.names[value] = unique

    def weight(self, node: Node, module: str) -> None:
        for name, part in zip(node.inputs[1:], ("weight", "bias")):
            self.give(name, f"{module}.{part}")

    def producer(self, value: str, *ops: str) -> Node | None:
        node = self.graph.producers.get(value)
        return node if node is not None and node.op in ops else None

    def reader(self, value: str, *ops: str, where: Callable[[Node], bool] = lambda n: True) -> Node | None:
        return next((n for n in self.graph.consumers[value] if n.op in ops and where(n)), None)

    def _attention(self, node: Node) -> None:
        i, module = self.layer, f"model.layers.{self.layer}"
        packed = None
        for value, letter in zip(node.inputs[:3], "qkv"):
            while (source := self.producer(value, "rope", "rms_norm", "reshape", "linear", "split")) is not None:
                if source.op == "rope":
                    self.give(value, f"{letter}_rope.{i}")
                elif source.op == "rms_norm":
                    if source.outputs[0].type.rank < 4:
                        break
                    self.give(value, f"{letter}_norm.{i}")
                    self.weight(source, f"{module}.self_attn.{letter}_norm")
                elif source.op == "reshape":
                    self.give(value, f"{letter}_heads.{i}")
                elif source.op == "split":
                    self.give(value, f"{letter}.{i}")
                    packed = self.producer(source.inputs[0], "linear")
                    value = source.inputs[0]
                    break
                else:
                    self.give(value, f"{letter}.{i}")
                    self.weight(source, f"{module}.self_attn.{letter}_proj")
                value = source.inputs[0]
        if packed is not None:
            self.give(packed.output, f"qkv.{i}")
            self.weight(packed, f"{module}.self_attn.qkv_proj")
            value = packed.inputs[0]
        norm = self.producer(value, "rms_norm")
        if norm is not None:
            self.give(value, f"attn_norm.{i}")
            self.weight(norm, f"{module}.input_layernorm")
            self.give(norm.inputs[0], f"hidden.{i}")
        for result, name in zip(node.outputs, (f"attn.{i}", f"keys.{i}", f"values.{i}")):
            self.give(result.name, name)
        self._after(node.output, i, module)

    def _after(self, value: str, i: int, module: str) -> None:
        flat = self.reader(value, "reshape")
        if flat is not None:
            value = flat.output
            self.give(value, f"attn_flat.{i}")
        out = self.reader(value, "linear")
        if out is None:
            return
        self.give(out.output, f"o.{i}")
        self.weight(out, f"{module}.self_attn.o_proj")
        total = self.reader(out.output, "add")
        norm = self.reader(total.output, "rms_norm") if total is not None else None
        if total is None or norm is None:
            return
        self.give(total.output, f"hidden_mid.{i}")
        self.give(norm.output, f"ffn_norm.{i}")
        self.weight(norm, f"{module}.post_attention_layernorm")
        gate = self.reader(norm.output, "linear", where=lambda n: self.reader(n.output, "silu") is not None)
        act = self.reader(gate.output, "silu") if gate is not None else None
        product = self.reader(act.output, "mul") if act is not None else None
        if gate is None or act is None or product is None:
            return
        self.give(gate.output, f"gate.{i}")
        self.weight(gate, f"{module}.mlp.gate_proj")
        self.give(act.output, f"act.{i}")
        self.give(product.output, f"ffn.{i}")
        up = next(
            (p for v in product.inputs if v != act.output and (p := self.producer(v, "linear")) is not None), None
        )
        if up is not None:
            self.give(up.output, f"up.{i}")
            self.weight(up, f"{module}.mlp.up_proj")
        down = self.reader(product.output, "linear")
        if down is None:
            return
        self.give(down.output, f"down.{i}")
        self.weight(down, f"{module}.mlp.down_proj")
        after = self.reader(down.output, "add")
        if after is not None:
            self.give(after.output, f"hidden.{i + 1}")

    def _head(self, layers: int) -> None:
        head = self.producer(self.graph.outputs[0], "linear") if self.graph.outputs else None
        if head is None:
            return
        self.weight(head, "lm_head")
        norm = self.producer(head.inputs[0], "rms_norm")
        if norm is not None:
            self.give(norm.output, "final_norm")
            self.weight(norm, "model.norm")
            self.give(norm.inputs[0], f"hidden.{layers}")

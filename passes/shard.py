"""Tensor parallelism: one graph that every device runs on its part of the weights, whatever the number of devices.

What is cut has a symbol for a size: ``G`` key/value heads, ``I`` elements of the feed-forward's inner size and ``V`` rows of the vocabulary on this device, all of them
on one device. Each device computes whole heads and whole inner elements, so the only places where devices meet are the sums after the attention's and the feed-forward's
last linear, and the logits (Shoeybi et al., 2019, Megatron-LM).

``graph.meta["shard"]`` has the symbols' values on one device; ``graph.meta["cuts"]`` says per role along which axis a weight is cut and how many elements each of its
parts has: ``attn_qkv`` is cut inside of its queries, its keys and its values, not across them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ir.constants import Concat, ConstData, Slice
from ir.errors import UnsupportedError
from ir.graph import Constant, Graph, Node, Value
from ir.optable import infer
from ir.types import Dim, Sym, TensorType, dim_bind, dim_sum, known_dims, sym

KV_HEADS, INNER, VOCABULARY = sym("G"), sym("I"), sym("V")
_MEANING = {"G": "key/value heads", "I": "intermediate elements", "V": "rows of the vocabulary"}


def shard(graph: Graph, *, gather: bool = True) -> tuple[Graph, int]:
    """Cut a fused graph whose weights are named by role.

    Args:
        gather: cut the head's weight and gather the logits; without, every device computes all of them.

    Returns the graph and the number of places where devices meet. A head that shares its weight with the embedding gets a constant of its own, ``output_embd``, with
    the same data: the embedding is not cut.

    Raises:
        UnsupportedError: layers differ in a size that has one symbol, or something is no part of a dense decoder.
    """
    return _Sharder(graph, gather).run()


class _Sharder:
    def __init__(self, graph: Graph, gather: bool) -> None:
        self.graph = graph
        self.gather = gather
        self.inner = self._one({graph.type(c).shape[1] for c in graph.constants if c.startswith("ffn_down.")}, "inner")
        attentions = [n for n in graph.nodes if n.op == "attention_cached"]
        heads = {(graph.type(n.inputs[0]).shape[1:], graph.type(n.inputs[1]).shape[1]) for n in attentions}
        (self.heads, self.head_dim), self.groups = self._one(heads, "heads")
        self.ratio = self.heads // self.groups
        self.full = {"G": self.groups, "I": self.inner}
        rows = [self.heads * self.head_dim, *[self.groups * self.head_dim] * 2]
        self.cuts: dict[str, dict[str, Any]] = {
            "attn_qkv": {"axis": 0, "parts": rows},
            "attn_qkv_b": {"axis": 0, "parts": rows},
            "attn_o": {"axis": 1, "parts": rows[:1]},
            "ffn_gate_up": {"axis": 0, "parts": [self.inner] * 2},
            "ffn_down": {"axis": 1, "parts": [self.inner]},
        }
        self.constants = dict(graph.constants)
        self.nodes: list[Node] = []
        self.types: dict[str, TensorType] = {}
        self.names: dict[str, str] = {}  # a partial sum -> the sum of all devices, which everybody reads instead
        self.met = 0

    def _one(self, found: set, what: str) -> Any:
        if len(found) != 1:
            raise UnsupportedError(
                f"{self.graph.name}: layers differ in their {what} ({', '.join(sorted(map(str, found)))}), so devices cannot share them alike"
            )
        return found.pop()

    def run(self) -> tuple[Graph, int]:
        graph = self.graph
        head = graph.producers[graph.outputs[0]] if self.gather else None
        if head is not None:
            self._own_head(head)
        self.constants = {name: self._cut(name, c) for name, c in self.constants.items()}
        inputs = tuple(self._cut_cache(v) for v in graph.inputs)
        self.types = {v.name: v.type for v in [*inputs, *(c.value for c in self.constants.values())]}
        for node in graph.nodes:
            self._node(node, node is head)
        present = {
            n.inputs[i].split(".")[0] for n in self.nodes for i in (1, 2) if n.op == "linear" and i < len(n.inputs)
        }
        cuts = {role: cut for role, cut in self.cuts.items() if role in present}
        used = {i for n in self.nodes for i in n.inputs}
        return replace(
            graph,
            inputs=inputs,
            constants={k: c for k, c in self.constants.items() if k in used},
            nodes=tuple(self.nodes),
            meta={**graph.meta, "shard": self.full, "cuts": cuts},
        ), self.met

    def _own_head(self, head: Node) -> None:
        weight = self.graph.constants[head.inputs[1]]
        rows = weight.value.type.shape[0]
        self.full["V"] = rows
        self.cuts["output_embd"] = {"axis": 0, "parts": [rows]}
        self.constants["output_embd"] = replace(weight, value=Value("output_embd", weight.value.type))

    def _cut(self, name: str, constant: Constant) -> Constant:
        role = name.split(".")[0]
        cut = self.cuts.get(role)
        if cut is None:
            return constant
        type_ = constant.value.type
        part: Dim = {"output_embd": VOCABULARY, "ffn_gate_up": 2 * INNER, "ffn_down": INNER}.get(role, 0)
        if part == 0:
            heads = self.ratio if role == "attn_o" else self.ratio + 2
            part = heads * self.head_dim * KV_HEADS
        shape = list(type_.shape)
        if shape[cut["axis"]] != sum(cut["parts"]):
            raise UnsupportedError(
                f"{self.graph.name}: {name} is {type_}; expected {sum(cut['parts'])} elements on axis {cut['axis']} to share among devices"
            )
        shape[cut["axis"]] = part
        return replace(constant, value=Value(name, type_.with_shape(*shape)))

    def _cut_cache(self, value: Value) -> Value:
        if value.name.split(".")[0] not in ("k_cache", "v_cache"):
            return value
        requests, _, capacity, dim = value.type.shape
        return Value(value.name, value.type.with_shape(requests, KV_HEADS, capacity, dim))

    def _node(self, node: Node, is_head: bool) -> None:
        inputs = tuple(self.names.get(i, i) for i in node.inputs)
        if is_head:
            inputs = (inputs[0], "output_embd", *inputs[2:])
        attrs = self._attrs(node, inputs)
        results = infer(node.op, [self.types[i] if i else None for i in inputs], attrs)
        outputs = tuple(Value(v.name, t) for v, t in zip(node.outputs, results, strict=True))
        role = inputs[1].split(".")[0] if node.op == "linear" else ""
        if is_head:
            outputs = (Value(self._fresh(f"{node.output}_part"), outputs[0].type),)
        self._append(replace(node, inputs=inputs, outputs=outputs, attrs=attrs))
        if is_head:
            whole = Value(node.output, node.outputs[0].type)
            self._append(Node("all_gather", (outputs[0].name,), (whole,), {"size": self.full["V"]}, node.origin))
        elif role in ("attn_o", "ffn_down"):
            base, dot, number = node.output.rpartition(".")
            base, dot, number = (base, dot, number) if number.isdigit() else (node.output, "", "")
            whole = Value(self._fresh(f"{base}_sum{dot}{number}"), outputs[0].type)
            self.names[node.output] = whole.name
            self._append(Node("all_reduce", (node.output,), (whole,), {}, node.origin))
        self.met += is_head or role in ("attn_o", "ffn_down")

    def _append(self, node: Node) -> None:
        self.nodes.append(node)
        self.types.update({v.name: v.type for v in node.outputs})

    def _fresh(self, name: str) -> str:
        while name in self.graph.values or name in self.types:
            name += "_"
        return name

    def _attrs(self, node: Node, inputs: tuple[str, ...]) -> dict[str, Any]:
        """Sizes in attributes, where the operand's axis has become symbolic."""
        before, after = self.graph.type(node.inputs[0]), self.types[inputs[0]]
        if before == after:
            return dict(node.attrs)
        if node.op == "split":
            axis = node.attrs["axis"]
            sizes = tuple(self._scaled(s, before.shape[axis], after.shape[axis], node) for s in node.attrs["sizes"])
            if dim_sum(sizes) == after.shape[axis]:
                return {**node.attrs, "sizes": sizes}
        if node.op == "reshape":
            return {**node.attrs, "shape": self._reshaped(node, before.shape, after.shape)}
        return dict(node.attrs)

    def _scaled(self, size: Dim, before: Dim, after: Dim, node: Node) -> Dim:
        """A size of an axis of ``before`` elements that has ``after`` now, in the same proportion to the one device's whole."""
        names = after.names if isinstance(after, Sym) else ()
        whole = self.full[names[0]] if len(names) == 1 else 0
        if not whole or not isinstance(size, int) or size % whole or dim_bind(after, self.full) != before:
            raise UnsupportedError(
                f"{self.graph.name}: {node.op} {node.output} cuts {before} elements at {size}, which devices cannot share"
            )
        return size // whole * sym(names[0])

    def _reshaped(self, node: Node, before: tuple[Dim, ...], after: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """The shape that a reshape gives: the axis that the cut one becomes (whole heads), or is a part of, takes its symbol."""
        wanted = tuple(node.attrs["shape"])
        at = next(i for i, (a, b) in enumerate(zip(before, after)) if a != b)
        if wanted[:at] != before[:at] or at >= len(wanted):
            raise UnsupportedError(f"{self.graph.name}: reshape {node.output} mixes what devices share with other axes")
        return (*wanted[:at], self._scaled(wanted[at], before[at], after[at], node), *wanted[at + 1 :])


# --- one device's part ----------------------------------------------------------------------------------------------------------------------------


def instantiate(graph: Graph, ndev: int, rank: int) -> Graph:
    """What device ``rank`` of ``ndev`` runs: a sharded graph (of any stage) with its sizes as numbers and its parts of the weights.

    Raises:
        UnsupportedError: a size cannot be shared among so many devices; names it.
    """
    full: Mapping[str, int] = graph.meta.get("shard", {})
    if not 0 <= rank < ndev:
        raise UnsupportedError(f"{graph.name}: there is no device {rank} of {ndev}")
    for name, size in full.items():
        if size % ndev:
            raise UnsupportedError(f"{graph.name}: {size} {_MEANING[name]} cannot be shared among {ndev} devices alike")
    here = {name: size // ndev for name, size in full.items()}
    cuts = graph.meta.get("cuts", {})
    constants = {
        name: Constant(
            Value(name, known_dims(c.value.type, here)), part_of(c.data, cuts.get(name.split(".")[0]), ndev, rank)
        )
        for name, c in graph.constants.items()
    }
    meta = {k: v for k, v in graph.meta.items() if k not in ("shard", "cuts")}
    return replace(_bound(graph, here), constants=constants, meta=meta)


def part_of(data: ConstData, cut: Mapping[str, Any] | None, ndev: int, rank: int) -> ConstData:
    """Device ``rank``'s part of a weight, by an entry of ``meta["cuts"]``; all of it where there is none."""
    if cut is None or ndev == 1:
        return data
    pieces: list[ConstData] = []
    start = 0
    for size in cut["parts"]:
        mine = size // ndev
        pieces.append(Slice(data, cut["axis"], start + rank * mine, start + (rank + 1) * mine))
        start += size
    return pieces[0] if len(pieces) == 1 else Concat(tuple(pieces), cut["axis"])


def _bound(graph: Graph, symbols: Mapping[str, int]) -> Graph:
    """A graph with the values of these symbols in every type and attribute, loops' bodies included."""

    def value(v: Value) -> Value:
        return Value(v.name, known_dims(v.type, symbols))

    def attr(a: Any) -> Any:
        if isinstance(a, Graph):
            return _bound(a, symbols)
        if isinstance(a, tuple):
            return tuple(map(attr, a))
        return dim_bind(a, symbols) if isinstance(a, Sym) else a

    nodes = tuple(
        replace(n, outputs=tuple(map(value, n.outputs)), attrs={k: attr(v) for k, v in n.attrs.items()})
        for n in graph.nodes
    )
    return replace(graph, inputs=tuple(map(value, graph.inputs)), nodes=nodes)

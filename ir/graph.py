"""The graph: frozen dataclasses in SSA form, and the editor that passes use to make the next one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ir.constants import ConstData
from ir.errors import GraphError
from ir.types import TensorType

STAGES = ("onnx", "model", "fused", "infini")


@dataclass(frozen=True)
class Value:
    """A tensor in the graph. Names are unique within a graph and are what nodes refer to."""

    name: str
    type: TensorType


@dataclass(frozen=True)
class Constant:
    """A value that is known before the engine runs."""

    value: Value
    data: ConstData

    @property
    def name(self) -> str:
        return self.value.name


@dataclass(frozen=True)
class Node:
    """One operation. ``inputs`` are value names, ``""`` for an absent optional one; ``origin`` names the ONNX nodes that it came from."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    origin: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        """The name of the first output."""
        return self.outputs[0].name


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order. ``meta`` holds what travels along (pass history, model facts) and does not affect meaning."""

    name: str
    stage: str
    inputs: tuple[Value, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Constant]
    nodes: tuple[Node, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def values(self) -> dict[str, Value]:
        """Every value by name."""
        table: dict[str, Value] = {}
        for value in self._defined():
            if value.name in table:
                raise GraphError(f"{self.name}: value {value.name} is defined twice")
            table[value.name] = value
        return table

    def _defined(self) -> Iterator[Value]:
        yield from self.inputs
        for constant in self.constants.values():
            yield constant.value
        for node in self.nodes:
            yield from node.outputs

    @cached_property
    def producers(self) -> dict[str, Node]:
        """The node that computes each value; inputs and constants are absent."""
        return {v.name: node for node in self.nodes for v in node.outputs}

    @cached_property
    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that read each value (a node that reads it twice is listed once)."""
        table: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    table[name].append(node)
        return table

    def type(self, name: str) -> TensorType:
        try:
            return self.values[name].type
        except KeyError:
            raise GraphError(f"{self.name}: there is no value called {name}") from None

    def counts(self) -> dict[str, int]:
        """How often each op occurs, most frequent first; a loop's body counts once."""
        table: dict[str, int] = {}
        for node in self.nodes:
            table[node.op] = table.get(node.op, 0) + 1
        return dict(sorted(table.items(), key=lambda kv: (-kv[1], kv[0])))


class GraphEditor:
    """A graph being rewritten. Make edits, then ``finish()``: dead nodes and constants go, the order is restored.

    Replacing a value redirects its readers; a value that replaces one of the graph's outputs takes over its name in ``finish``.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.name = graph.name
        self.stage = graph.stage
        self.inputs: list[Value] = list(graph.inputs)
        self.outputs: list[str] = list(graph.outputs)
        self.constants: dict[str, Constant] = dict(graph.constants)
        self.nodes: list[Node] = list(graph.nodes)
        self.meta: dict[str, Any] = dict(graph.meta)
        self._names = set(graph.values)
        self._replaced: dict[str, str] = {}
        self._hints: dict[str, str] = {}  # a fresh name that had to take a number -> the name it asked for
        self._numbers: dict[str, int] = {}  # the last number that a hint was given

    def fresh(self, hint: str) -> str:
        """An unused name: the hint itself, or the hint with a number (which ``finish`` drops where the hint has become free)."""
        name, n = hint, self._numbers.get(hint, 0)
        while name in self._names:
            n += 1
            name = f"{hint}_{n}"
        self._numbers[hint] = n
        self._names.add(name)
        if name != hint:
            self._hints[name] = hint
        return name

    def constant(self, hint: str, data: ConstData, type: TensorType | None = None) -> str:
        """Add a constant (or find an equal one) and return its name."""
        known = self._by_data.get(data)
        if known in self.constants:
            return known
        name = self.fresh(hint)
        self.constants[name] = Constant(Value(name, type or TensorType(data.dtype, tuple(data.shape))), data)
        self._by_data[data] = name
        return name

    @cached_property
    def _by_data(self) -> dict[ConstData, str]:
        return {c.data: name for name, c in reversed(self.constants.items())}

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        hints: Sequence[str] = ("",),
        attrs: Mapping[str, Any] | None = None,
        types: Sequence[TensorType] | None = None,
        origin: Iterable[str] = (),
    ) -> tuple[str, ...]:
        """Append a node; output types come from the op table unless given. Returns the outputs' names."""
        from ir.optable import infer  # the table's references import this module

        attrs = dict(attrs or {})
        if types is None:
            types = infer(op, [self.type(i) if i else None for i in inputs], attrs)
        outputs = tuple(Value(self.fresh(h or op), t) for h, t in zip(hints, types, strict=True))
        self.nodes.append(Node(op, tuple(inputs), outputs, attrs, tuple(dict.fromkeys(origin))))
        self._types.update({v.name: v.type for v in outputs})
        return tuple(v.name for v in outputs)

    @cached_property
    def _types(self) -> dict[str, TensorType]:
        return {name: value.type for name, value in self.graph.values.items()}

    def type(self, name: str) -> TensorType:
        if name in self.constants:
            return self.constants[name].value.type
        return self._types[name]

    def set_type(self, name: str, type: TensorType) -> None:
        """Declare that an input (which the caller has replaced in ``inputs``) has another type now."""
        self._types[name] = type

    def add_input(self, name: str, type: TensorType) -> str:
        value = Value(self.fresh(name), type)
        self.inputs.append(value)
        self._types[value.name] = type
        return value.name

    def replace(self, old: str, new: str) -> None:
        """Every reader of ``old`` will read ``new``."""
        self._replaced[old] = new

    def resolve(self, name: str) -> str:
        """What ``name`` stands for after the replacements so far."""
        seen = set()
        while name in self._replaced:
            if name in seen:
                raise GraphError(f"{self.name}: replacing {name} by itself")
            seen.add(name)
            name = self._replaced[name]
        return name

    def finish(self, **changes: Any) -> Graph:
        """The rewritten graph, pruned and in topological order; ``changes`` override Graph fields (``stage``, ``meta``)."""
        nodes = [replace(n, inputs=tuple(self.resolve(i) if i else "" for i in n.inputs)) for n in self.nodes]
        outputs = tuple(self.resolve(o) for o in self.outputs)
        nodes = toposort(nodes, outputs, self.name)
        used = {i for n in nodes for i in n.inputs} | set(outputs)
        constants = {k: c for k, c in self.constants.items() if k in used}
        fields = dict(
            name=self.name,
            stage=self.stage,
            inputs=tuple(self.inputs),
            outputs=outputs,
            constants=constants,
            nodes=tuple(nodes),
            meta=self.meta,
        )
        graph = Graph(**{**fields, **changes})
        return rename(graph, self._names_to_give_back(graph))

    def _names_to_give_back(self, graph: Graph) -> dict[str, str]:
        """Outputs keep their names, and a value that stands for one that went takes its name over."""
        live = set(graph.values)
        computed = {v.name for n in graph.nodes for v in n.outputs}
        names: dict[str, str] = {}
        wishes = [*zip(graph.outputs, self.outputs), *self._hints.items()]
        for name, wish in wishes:
            if (
                name != wish
                and wish not in live
                and name not in names
                and (name in computed or name in graph.constants)
            ):
                names[name] = wish
                live.add(wish)
        return names


def rename(graph: Graph, names: Mapping[str, str]) -> Graph:
    """The same graph with values (inputs and constants too) under other names; what is not in ``names`` keeps its own."""
    if not names:
        return graph

    def value(v: Value) -> Value:
        return Value(names[v.name], v.type) if v.name in names else v

    renamed = [names.get(v, v) for v in graph.values]
    if len(set(renamed)) != len(renamed):
        twice = sorted(n for n in set(renamed) if renamed.count(n) > 1)
        raise GraphError(f"{graph.name}: renaming gives two values the name {twice[0]}")
    nodes = [
        replace(n, inputs=tuple(names.get(i, i) for i in n.inputs), outputs=tuple(map(value, n.outputs)))
        for n in graph.nodes
    ]
    return replace(
        graph,
        inputs=tuple(map(value, graph.inputs)),
        outputs=tuple(names.get(o, o) for o in graph.outputs),
        constants={names.get(k, k): replace(c, value=value(c.value)) for k, c in graph.constants.items()},
        nodes=tuple(nodes),
    )


def toposort(nodes: Sequence[Node], outputs: Sequence[str], where: str) -> list[Node]:
    """The nodes that the outputs need, in an order that keeps the given one where it can."""
    producer = {v.name: i for i, n in enumerate(nodes) for v in n.outputs}
    order: list[int] = []
    state: dict[int, int] = {}  # 1: being visited, 2: done
    needed = [producer[o] for o in outputs if o in producer]
    live: set[int] = set()
    stack = list(needed)
    while stack:
        i = stack.pop()
        if i in live:
            continue
        live.add(i)
        stack.extend(producer[name] for name in nodes[i].inputs if name in producer)
    for root in sorted(live):
        todo = [root]
        while todo:
            i = todo[-1]
            if state.get(i) == 2:
                todo.pop()
                continue
            state[i] = 1
            waiting = [producer[n] for n in nodes[i].inputs if n in producer and state.get(producer[n]) != 2]
            if any(state.get(w) == 1 for w in waiting):
                raise GraphError(f"{where}: {nodes[i].op} {nodes[i].output} depends on itself")
            if waiting:
                todo.extend(reversed(waiting))
            else:
                state[i] = 2
                order.append(i)
                todo.pop()
    return [nodes[i] for i in order]

"""Understanding subgraphs by running them on samples: what a mask hides, which angles a table holds, where a chain of reshapes puts an element.

Exporters spell these things differently and change the spelling with every release; what they compute stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ir import interp
from ir.constants import Inline
from ir.errors import Qwen3Error
from ir.graph import Graph, Node, Value, toposort
from ir.types import DTYPES, Dim, Sym, TensorType, bind


@dataclass(frozen=True)
class Interface:
    """The graph inputs of a decoder by what they are for; "" where there is none. ``pasts`` are the caches."""

    ids: str
    mask: str
    positions: str
    pasts: tuple[str, ...]


def interface(graph: Graph) -> Interface:
    """Tell the inputs apart: ids index a constant table, the mask is as long as past and new tokens together (or is called mask)."""
    pairs = [v for v in graph.inputs if v.type.rank == 2 and not DTYPES[v.type.dtype].is_float]
    pasts = tuple(v.name for v in graph.inputs if v.type.rank == 4)
    ids = next((v.name for v in pairs if any(_looks_up(graph, n, v.name) for n in graph.consumers[v.name])), "")
    new = graph.type(ids).shape if ids else None
    rest = [v for v in pairs if v.name != ids]
    mask = next((v.name for v in rest if "mask" in v.name.lower() or v.type.shape != new), "")
    positions = next((v.name for v in rest if v.name != mask and v.type.shape == new), "")
    return Interface(ids, mask, positions, pasts)


def _looks_up(graph: Graph, node: Node, ids: str) -> bool:
    if node.op == "embedding":
        return node.inputs[0] == ids
    return node.op == "onnx.Gather" and node.inputs[1] == ids and node.inputs[0] in graph.constants


class Subgraph:
    """What some values depend on, as a graph of its own."""

    def __init__(self, graph: Graph, outputs: Sequence[str], cut: Mapping[str, Value] | None = None) -> None:
        """``cut`` names values that become inputs instead of being computed."""
        cut = dict(cut or {})
        nodes, todo, seen = [], list(outputs), set()
        while todo:
            node = graph.producers.get(name := todo.pop())
            if name in cut or node is None or id(node) in seen:
                continue
            seen.add(id(node))
            nodes.append(node)
            todo.extend(i for i in node.inputs if i)
        used = {i for n in nodes for i in n.inputs} | set(outputs)
        inputs = [v for v in graph.inputs if v.name in used and v.name not in cut] + [
            v for n, v in cut.items() if n in used
        ]
        constants = {k: graph.constants[k] for k in used if k in graph.constants}
        ordered = toposort(nodes[::-1], outputs, graph.name)
        self.graph = Graph(graph.name, graph.stage, tuple(inputs), tuple(outputs), constants, tuple(ordered))

    @property
    def inputs(self) -> set[str]:
        return {v.name for v in self.graph.inputs}

    @cached_property
    def unknown_constant(self) -> str:
        """A constant whose values lie in a file, if there is one: such a subgraph is more than arithmetic on positions."""
        return next((c.name for c in self.graph.constants.values() if not isinstance(c.data, Inline)), "")

    def run(self, inputs: Mapping[str, np.ndarray], float64: bool = True) -> list[np.ndarray] | None:
        """The outputs, in float64 unless that does not matter; None where the sample lies outside of what the subgraph can take (a table that ends)."""
        try:
            with np.errstate(all="ignore"):
                results = interp.run(self.graph, inputs, float64=float64)
        except (Qwen3Error, ValueError, IndexError, MemoryError):
            return None
        return [results[o] for o in self.graph.outputs]


@dataclass(frozen=True)
class Sample:
    """Sizes of one trial run, and the contents of the integer inputs."""

    batch: int
    new: int
    past: int
    mask: np.ndarray
    positions: np.ndarray

    def arrays(self, graph: Graph, roles: Interface) -> dict[str, np.ndarray]:
        """An array for each input of a subgraph; caches are zeros that take no memory."""
        arrays = {}
        for value in graph.inputs:
            if value.name == roles.mask:
                array = self.mask
            elif value.name == roles.positions:
                array = self.positions
            elif value.name == roles.ids:
                array = np.zeros((self.batch, self.new), np.int64)
            else:
                sizes = [self.batch, None, self.past, None]
                shape = [d if isinstance(d, int) else s for d, s in zip(value.type.shape, sizes)]
                # In its own dtype: converting would take the memory after all.
                array = np.broadcast_to(
                    np.zeros((), DTYPES[value.type.dtype].numpy), [1 if s is None else s for s in shape]
                )
            arrays[value.name] = array.astype(DTYPES[value.type.dtype].numpy, copy=False)
        return arrays


def between(graph: Graph, start: str, end: str, array: np.ndarray) -> np.ndarray | None:
    """The value ``end`` where ``start`` is the given array; None where it depends on more than ``start`` and constants.

    A shape that is computed is taken from the type of what it shapes, its symbols from ``array``: it may well depend on other inputs' sizes.
    """
    symbols = _symbols(graph.type(start).shape, array.shape)
    cut, given, todo = {start: Value(start, graph.type(start))}, {start: array}, [end]
    while todo:
        node = graph.producers.get(name := todo.pop())
        if name in cut or node is None:
            continue
        todo.extend(i for i in node.inputs if i)
        if node.op in SHAPED and node.inputs[1] not in graph.constants:
            target = node.outputs[0].type.shape
            if any(n not in symbols for d in target if isinstance(d, Sym) for n in d.names):
                return None
            sizes = np.array([bind(d, symbols) for d in target], np.int64)
            if not np.array_equal(given.setdefault(node.inputs[1], sizes), sizes):
                return None
            cut[node.inputs[1]] = Value(node.inputs[1], TensorType("i64", (len(sizes),)))
    sub = Subgraph(graph, [end], cut)
    if sub.inputs - set(cut) or sub.unknown_constant:
        return None
    results = sub.run({name: given[name] for name in sub.inputs})
    return results[0] if results else None


# Ops whose second operand is the shape of their result.
SHAPED = ("onnx.Reshape", "onnx.Expand")


def _symbols(shape: Sequence[Dim], sizes: Sequence[int]) -> dict[str, int]:
    return {d.names[0]: n // d.coef for d, n in zip(shape, sizes) if isinstance(d, Sym) and len(d.names) == 1}


def counting(graph: Graph, name: str) -> np.ndarray:
    """An array 1, 2, 3, ... of a value's shape, its symbols replaced by small numbers that all differ and differ from the value's own sizes."""
    shape = graph.type(name).shape
    taken = {d for d in shape if isinstance(d, int)}
    sizes: dict[str, int] = {}
    for dim in shape:
        for symbol in dim.names if isinstance(dim, Sym) else ():
            if symbol not in sizes:
                sizes[symbol] = next(n for n in range(2, 100) if n not in taken)
                taken.add(sizes[symbol])
    numbers = [d if isinstance(d, int) else d.coef * int(np.prod([sizes[n] for n in d.names])) for d in shape]
    return np.arange(1, 1 + int(np.prod(numbers)), dtype=np.float64).reshape(numbers)

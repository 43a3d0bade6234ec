"""Symbolic shapes and integer vectors of an ONNX graph, from its inputs' symbols.

Exporters compute shapes with ops (Shape, Gather, Concat, ...) and shape inference names what it cannot follow with symbols of its own. Here the dimensions
are followed instead, so that the same dimension has the same name wherever it turns up, and a computed shape is known as a list of dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ir.constants import Inline
from ir.graph import Graph, Node
from ir.types import Dim, Sym, TensorType, dim_divide, dim_product, sym

_LARGE = 2**31  # a slice bound at least this far is "to the end"
_VECTOR = 16  # integer vectors up to this length are followed


@dataclass(frozen=True)
class Ints:
    """An integer tensor of rank 0 or 1 whose elements are dimensions; None where one is not known."""

    dims: tuple[Dim | None, ...]
    scalar: bool = False

    def static(self) -> tuple[int, ...] | None:
        """The elements where all are numbers."""
        known = tuple(d for d in self.dims if isinstance(d, int))
        return known if len(known) == len(self.dims) else None


Shape = tuple[Dim | None, ...]


class Shapes:
    """The types and integer values of a graph's values, followed node by node."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.types: dict[str, TensorType] = {v.name: v.type for v in graph.inputs}
        self.ints: dict[str, Ints] = {}
        self._sums = _declared_sums(graph)
        for name, constant in graph.constants.items():
            self.types[name] = constant.value.type
            data = constant.data
            if (
                isinstance(data, Inline)
                and data.array.dtype.kind in "iu"
                and data.array.ndim <= 1
                and data.array.size <= _VECTOR
            ):
                self.ints[name] = Ints(tuple(int(i) for i in data.array.reshape(-1)), data.array.ndim == 0)
        for node in graph.nodes:
            self._visit(node)

    def _visit(self, node: Node) -> None:
        rule = _RULES.get(node.op)
        shapes = rule(self, node) if rule else None
        for i, value in enumerate(node.outputs):
            shape = shapes[i] if shapes and i < len(shapes) else None
            if shape is None or len(shape) != value.type.rank:
                self.types[value.name] = value.type
            else:
                dims = [d if d is not None else old for d, old in zip(shape, value.type.shape)]
                self.types[value.name] = TensorType(value.type.dtype, tuple(dims))
        follow = _VALUES.get(node.op)
        found = follow(self, node) if follow else None
        if found is not None and len(found.dims) <= _VECTOR:
            self.ints[node.output] = found

    def shape(self, node: Node, i: int) -> tuple[Dim, ...]:
        return self.types[node.inputs[i]].shape

    def numbers(self, node: Node, i: int) -> tuple[int, ...] | None:
        """An operand's elements where they are numbers; None where the operand is absent or not known."""
        found = self.ints.get(node.inputs[i]) if i < len(node.inputs) else None
        return found.static() if found else None

    def add(self, a: Dim | None, b: Dim | None) -> Dim | None:
        if a is None or b is None:
            return None
        if a == 0 or b == 0:
            return b if a == 0 else a
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if isinstance(a, Sym) and isinstance(b, Sym) and a.names == b.names:
            return Sym(a.coef + b.coef, a.names)
        if any(isinstance(d, int) and d < 0 for d in (a, b)):
            return None
        key = frozenset((a, b))
        if key not in self._sums:
            self._sums[key] = sym("_plus_".join(sorted(str(d).replace("*", "_") for d in (a, b))))
        return self._sums[key]

    def subtract(self, a: Dim | None, b: Dim | None) -> Dim | None:
        if a is None or b is None:
            return None
        if a == b:
            return 0
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        for parts, total in self._sums.items():
            if total == a and b in parts and len(parts) == 2:
                return next(p for p in parts if p != b)
        return a if b == 0 else None

    def broadcast(self, *shapes: Sequence[Dim]) -> Shape:
        rank = max(len(s) for s in shapes)
        result: list[Dim | None] = []
        for column in zip(*((1,) * (rank - len(s)) + tuple(s) for s in shapes)):
            sizes = set(column) - {1}
            numbers = [d for d in sizes if isinstance(d, int)]
            result.append(1 if not sizes else numbers[0] if numbers else sizes.pop() if len(sizes) == 1 else None)
        return tuple(result)


def _declared_sums(graph: Graph) -> dict[frozenset, Dim]:
    """The name of past + sequence: that of the attention mask's length, else that of the present keys' length as the file declares it."""
    pasts = {v.type.shape[2] for v in graph.inputs if v.type.rank == 4}
    pairs = [v.type.shape for v in graph.inputs if v.type.rank == 2]
    if len(pasts) != 1 or not pairs:
        return {}
    (past,), new = pasts, pairs[0][1]
    totals = [s[1] for s in pairs if s[1] not in (new, past)] or [
        graph.type(o).shape[2]
        for o in graph.outputs
        if graph.type(o).rank == 4 and isinstance(graph.type(o).shape[2], Sym)
    ]
    if not totals or not isinstance(new, Sym) or not isinstance(past, Sym):
        return {}
    return {frozenset((past, new)): totals[0]}


Rule = Callable[[Shapes, Node], "Sequence[Shape | None] | None"]
_RULES: dict[str, Rule] = {}
_VALUES: dict[str, Callable[[Shapes, Node], "Ints | None"]] = {}


def _rule(ops: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        _RULES.update({f"onnx.{name}": fn for name in ops.split()})
        return fn

    return register


def _value(ops: str) -> Callable:
    def register(fn: Callable) -> Callable:
        _VALUES.update({f"onnx.{name}": fn for name in ops.split()})
        return fn

    return register


# Shapes


@_rule(
    "Abs Cast Clip Cos CumSum Exp Floor Identity IsNaN Log Neg Not Reciprocal Sigmoid Sin Softmax Sqrt Swish Tanh Trilu RMSNormalization RotaryEmbedding"
)
def _same(s: Shapes, node: Node):
    return [s.shape(node, 0)]


@_rule("Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Or Pow Sub Sum Where Xor")
def _elementwise(s: Shapes, node: Node):
    return [s.broadcast(*(s.types[i].shape for i in node.inputs))]


@_rule("MatMul")
def _matmul(s: Shapes, node: Node):
    a, b = s.shape(node, 0), s.shape(node, 1)
    return [(*s.broadcast(a[:-2], b[:-2]), a[-2], b[-1])] if len(a) > 1 and len(b) > 1 else None


@_rule("Gemm")
def _gemm(s: Shapes, node: Node):
    a, b = s.shape(node, 0), s.shape(node, 1)
    return [(a[1] if node.attrs.get("transA") else a[0], b[0] if node.attrs.get("transB") else b[1])]


@_rule("Transpose")
def _transpose(s: Shapes, node: Node):
    shape = s.shape(node, 0)
    return [tuple(shape[p] for p in node.attrs.get("perm") or reversed(range(len(shape))))]


@_rule("Reshape")
def _reshape(s: Shapes, node: Node):
    source, target = s.shape(node, 0), s.ints.get(node.inputs[1])
    if target is None:
        return None
    shape: list[Dim | None] = [
        source[i] if d == 0 and not node.attrs.get("allowzero") and i < len(source) else d
        for i, d in enumerate(target.dims)
    ]
    if shape.count(-1) == 1:
        rest = [d for d in shape if d != -1]
        known = [d for d in rest if d is not None]
        shape[shape.index(-1)] = (
            dim_divide(dim_product(source), dim_product(known)) if len(known) == len(rest) else None
        )
    elif shape.count(None) == 1:
        known = [d for d in shape if d is not None]
        shape[shape.index(None)] = dim_divide(dim_product(source), dim_product(known))
    return [tuple(shape)]


@_rule("Unsqueeze")
def _unsqueeze(s: Shapes, node: Node):
    axes = s.numbers(node, 1)
    if axes is None:
        return None
    rank = len(s.shape(node, 0)) + len(axes)
    places, rest = {a % rank for a in axes}, iter(s.shape(node, 0))
    return [tuple(1 if i in places else next(rest) for i in range(rank))]


@_rule("Squeeze")
def _squeeze(s: Shapes, node: Node):
    shape, axes = s.shape(node, 0), s.numbers(node, 1)
    if axes is None:
        return None
    return [tuple(d for i, d in enumerate(shape) if i not in {a % len(shape) for a in axes})]


@_rule("Expand")
def _expand(s: Shapes, node: Node):
    target = s.ints.get(node.inputs[1])
    if target is None:
        return None
    unknown = [d if d is not None else sym("?") for d in target.dims]
    return [tuple(None if d == sym("?") else d for d in s.broadcast(s.shape(node, 0), unknown))]


@_rule("Concat")
def _concat(s: Shapes, node: Node):
    shapes = [s.types[i].shape for i in node.inputs]
    axis = node.attrs["axis"] % len(shapes[0])
    total: Dim | None = 0
    for shape in shapes:
        total = s.add(total, shape[axis])
    return [(*shapes[0][:axis], total, *shapes[0][axis + 1 :])]


@_rule("Split")
def _split(s: Shapes, node: Node):
    shape = s.shape(node, 0)
    axis, count = node.attrs.get("axis", 0) % len(shape), len(node.outputs)
    sizes = s.numbers(node, 1)
    if sizes is None and isinstance(shape[axis], int) and shape[axis] % count == 0:
        sizes = (shape[axis] // count,) * count
    return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes] if sizes else None


@_rule("Slice")
def _slice(s: Shapes, node: Node):
    shape: list[Dim | None] = list(s.shape(node, 0))
    rank = len(shape)
    starts, ends = s.ints.get(node.inputs[1]), s.ints.get(node.inputs[2])
    if starts is None or ends is None:
        return None
    axes = s.numbers(node, 3) or tuple(range(len(starts.dims)))
    steps = s.numbers(node, 4) or (1,) * len(axes)
    for axis, start, end, step in zip(axes, starts.dims, ends.dims, steps):
        shape[axis % rank] = _length(s, shape[axis % rank], start, end, step)
    return [tuple(shape)]


def _length(s: Shapes, size: Dim | None, start: Dim | None, end: Dim | None, step: int) -> Dim | None:
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(size)[start:end:step])
    if step != 1 or (isinstance(start, int) and start < 0):
        return None
    if isinstance(end, int) and (end >= _LARGE or end < 0):
        end = s.subtract(size, -end) if end < 0 else size
    return s.subtract(end, start) if end == size else None


@_rule("Gather")
def _gather(s: Shapes, node: Node):
    shape, axis = s.shape(node, 0), node.attrs.get("axis", 0)
    axis %= len(shape)
    return [(*shape[:axis], *s.shape(node, 1), *shape[axis + 1 :])]


@_rule("ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum")
def _reduce(s: Shapes, node: Node):
    shape = s.shape(node, 0)
    axes = s.numbers(node, 1) or node.attrs.get("axes")
    if not axes:
        return None
    places = {a % len(shape) for a in axes}
    keep = node.attrs.get("keepdims", 1)
    return [tuple(1 if i in places else d for i, d in enumerate(shape) if keep or i not in places)]


@_rule("Attention")
def _attention(s: Shapes, node: Node):
    q, k, v = (s.shape(node, i) for i in range(3))
    if len(q) != 4:
        return None
    total: Dim | None = k[2]
    if len(node.inputs) > 4 and node.inputs[4]:
        total = s.add(s.shape(node, 4)[2], k[2])
    return [(*q[:3], v[3]), (*k[:2], total, k[3]), (*v[:2], total, v[3])]


# Values


@_value("Shape")
def _shape_of(s: Shapes, node: Node):
    return Ints(tuple(s.shape(node, 0)[node.attrs.get("start", 0) : node.attrs.get("end")]))


@_value("Size")
def _size_of(s: Shapes, node: Node):
    return Ints((dim_product(s.shape(node, 0)),), scalar=True)


@_value("Cast Identity")
def _pass_on(s: Shapes, node: Node):
    return s.ints.get(node.inputs[0]) if node.outputs[0].type.dtype in ("i64", "i32") else None


@_value("Unsqueeze Squeeze Reshape")
def _reshaped(s: Shapes, node: Node):
    found, rank = s.ints.get(node.inputs[0]), node.outputs[0].type.rank
    if found is None or rank > 1 or (rank == 0 and len(found.dims) != 1):
        return None
    return Ints(found.dims, rank == 0)


@_value("Gather")
def _picked(s: Shapes, node: Node):
    found, places = s.ints.get(node.inputs[0]), s.ints.get(node.inputs[1])
    where = places.static() if places else None
    if (
        found is None
        or places is None
        or where is None
        or any(not -len(found.dims) <= i < len(found.dims) for i in where)
    ):
        return None
    return Ints(tuple(found.dims[i] for i in where), places.scalar)


@_value("Slice")
def _sliced(s: Shapes, node: Node):
    found, start, end = s.ints.get(node.inputs[0]), s.numbers(node, 1), s.numbers(node, 2)
    if found is None or found.scalar or not start or not end:
        return None
    return Ints(found.dims[start[0] : end[0] : (s.numbers(node, 4) or (1,))[0]])


@_value("Concat")
def _joined(s: Shapes, node: Node):
    dims: list[Dim | None] = []
    for name in node.inputs:
        known = s.ints.get(name)
        length = s.types[name].shape[0] if s.types[name].rank == 1 else None
        if known is None and not (
            isinstance(length, int) and length <= _VECTOR and node.outputs[0].type.dtype == "i64"
        ):
            return None
        dims.extend(known.dims if known else (None,) * length)  # type: ignore[operator]
    return Ints(tuple(dims))


@_value("ReduceProd")
def _product_of(s: Shapes, node: Node):
    found = s.ints.get(node.inputs[0])
    if found is None or None in found.dims:
        return None
    return Ints((dim_product([d for d in found.dims if d is not None]),), node.outputs[0].type.rank == 0)


@_value("Add Sub Mul Div Max Equal Where")
def _arithmetic(s: Shapes, node: Node):
    operands = [s.ints.get(name) for name in node.inputs]
    if any(o is None for o in operands):
        return None
    columns = [o.dims for o in operands if o is not None]
    n = max(map(len, columns))
    if any(len(c) not in (1, n) for c in columns):
        return None
    fn = _ARITHMETIC[node.op]
    rows = zip(*(c if len(c) == n else c * n for c in columns))
    return Ints(tuple(fn(s, *row) for row in rows), all(o.scalar for o in operands if o is not None))


def _times(s: Shapes, a: Dim | None, b: Dim | None) -> Dim | None:
    return None if a is None or b is None else a * b


def _over(s: Shapes, a: Dim | None, b: Dim | None) -> Dim | None:
    if isinstance(a, int) and isinstance(b, int) and b:
        return int(np.sign(a) * np.sign(b)) * (abs(a) // abs(b))
    return None if a is None or b is None else dim_divide(a, b)


def _equal(s: Shapes, a: Dim | None, b: Dim | None) -> Dim | None:
    # A dimension is never negative, so that the usual test for -1 has an answer.
    if a is None or b is None:
        return None
    if isinstance(a, int) and isinstance(b, int) or a == b:
        return int(a == b)
    return 0 if any(isinstance(d, int) and d < 0 for d in (a, b)) else None


def _where(s: Shapes, condition: Dim | None, a: Dim | None, b: Dim | None) -> Dim | None:
    return None if condition is None else a if condition else b


def _maximum(s: Shapes, a: Dim | None, b: Dim | None) -> Dim | None:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else None


_ARITHMETIC: Mapping[str, Callable[..., Dim | None]] = {
    "onnx.Add": Shapes.add,
    "onnx.Sub": Shapes.subtract,
    "onnx.Mul": _times,
    "onnx.Div": _over,
    "onnx.Max": _maximum,
    "onnx.Equal": _equal,
    "onnx.Where": _where,
}

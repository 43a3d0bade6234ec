"""Passes of stage "onnx": constants and shapes folded, no-ops and duplicates dropped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ir import constants
from ir.constants import Cast, Concat, ConstData, FileSlice, Inline, Slice, Transpose
from ir.graph import Constant, Graph, GraphEditor, Node, Value
from ir.interp import run_node
from ir.types import DTYPES, Dim, Sym, TensorType
from passes.shapes import Ints, Shapes

_SMALL = 1 << 20  # elements: larger results of arithmetic stay computed
_LAZY = 4096  # elements: from here on moving or converting a constant makes a recipe, and no new array


def fold_constants(graph: Graph) -> tuple[Graph, int]:
    """Evaluate what depends on constants only, give every value the shape that follows from the inputs' symbols, and replace computed shapes by constants.

    Weights become recipes (``Transpose``, ``Cast``, ``Slice``, ``Concat``) and are not read.
    """
    folder = _Folder(graph)
    return folder.run()


class _Folder:
    def __init__(self, graph: Graph) -> None:
        self.shapes = Shapes(graph)
        self.editor = GraphEditor(graph)
        self.graph = graph
        self.count = 0
        self.sizes = _sizes_of_inputs(graph)
        self.nodes: list[Node] = []
        self.types: dict[str, TensorType] = {}

    def run(self) -> tuple[Graph, int]:
        editor = self.editor
        for node in self.graph.nodes:
            node = replace(node, inputs=tuple(editor.resolve(i) if i else "" for i in node.inputs))
            if self._constant_result(node) or self._known_integers(node):
                self.count += 1
                continue
            before = node
            node = self._constant_shape(node)
            self.count += before is not node
            outputs = tuple(Value(v.name, self.shapes.types[v.name]) if v.name else v for v in node.outputs)
            self.nodes.append(replace(node, outputs=outputs))
        editor.nodes = self.nodes
        return editor.finish(), self.count

    def _put(self, node: Node, data: ConstData, i: int = 0) -> None:
        self.editor.replace(node.outputs[i].name, self.editor.constant(node.outputs[i].name, data))

    def _constant_result(self, node: Node) -> bool:
        """All operands are constants: evaluate, or note what is to be done."""
        known = self.editor.constants
        if not node.inputs or any(i and i not in known for i in node.inputs):
            return False
        operands = [known[i].data if i else None for i in node.inputs]
        results = _recipe(node, operands)
        if results is None:
            if any(o is not None and not isinstance(o, Inline) for o in operands):
                operands = [_materialise(o) for o in operands]
                if any(i and o is None for i, o in zip(node.inputs, operands)):
                    return False
            if any(_elements(self.shapes.types[v.name]) > _SMALL for v in node.outputs):
                return False
            env = {i: o.array for i, o in zip(node.inputs, operands) if isinstance(o, Inline)}
            run_node(
                replace(node, outputs=tuple(Value(v.name, self.shapes.types[v.name]) for v in node.outputs)),
                env,
                {},
                False,
            )
            results = [Inline(env[v.name]) for v in node.outputs]
        for i, data in enumerate(results):
            self._put(node, data, i)
        return True

    def _known_integers(self, node: Node) -> bool:
        """An integer result that is known: a constant, or one size of an input."""
        found = self.shapes.ints.get(node.output)
        if found is None or len(node.outputs) != 1:
            return False
        static, dtype = found.static(), DTYPES[node.outputs[0].type.dtype].numpy
        if static is not None:
            self._put(node, Inline(np.array(static[0] if found.scalar else static, dtype)))
            return True
        return self._size_of_input(node, found)

    def _size_of_input(self, node: Node, found: Ints) -> bool:
        """Ask the input whose axis it is instead of whatever value the exporter had at hand: that value may be dead otherwise."""
        if len(found.dims) != 1 or found.dims[0] not in self.sizes or node.outputs[0].type.dtype != "i64":
            return False
        name, axis = self.sizes[found.dims[0]]
        if node.op == "onnx.Shape" and node.inputs[0] == name:
            return False
        size = Node(
            "onnx.Shape",
            (name,),
            (Value(self.editor.fresh(f"{name}.size"), TensorType("i64", (1,))),),
            {"start": axis, "end": axis + 1},
            node.origin,
        )
        if found.scalar:
            self.nodes.append(size)
            axes = self.editor.constant("axis_0", Inline(np.array([0], np.int64)))
            size = Node(
                "onnx.Squeeze", (size.output, axes), (Value(node.output, node.outputs[0].type),), {}, node.origin
            )
        else:
            size = replace(size, outputs=(Value(node.output, node.outputs[0].type),))
        self.nodes.append(size)
        return True

    def _constant_shape(self, node: Node) -> Node:
        """The shape operand of Reshape and Expand as a constant, with 0 and -1 for the dimensions that are symbols."""
        if node.op not in ("onnx.Reshape", "onnx.Expand") or node.inputs[1] in self.editor.constants:
            return node
        source, target = self.shapes.types[node.inputs[0]].shape, self.shapes.types[node.output].shape
        write = _reshape_constant if node.op == "onnx.Reshape" else _expand_constant
        wanted = write(source, target)
        if wanted is None or self.shapes.ints.get(node.inputs[1]) is None:
            return node
        constant = self.editor.constant(f"{node.output}.shape", Inline(np.array(wanted, np.int64)))
        attrs = {k: v for k, v in node.attrs.items() if k != "allowzero"}
        return replace(node, inputs=(node.inputs[0], constant), attrs=attrs)


def _sizes_of_inputs(graph: Graph) -> dict[Dim, tuple[str, int]]:
    """For each symbol the input and axis that define it; those of the smallest rank first, so that no cache is asked for what the ids can tell."""
    table: dict[Dim, tuple[str, int]] = {}
    for value in sorted(graph.inputs, key=lambda v: v.type.rank):
        for axis, dim in enumerate(value.type.shape):
            if isinstance(dim, Sym) and dim.coef == 1 and len(dim.names) == 1:
                table.setdefault(dim, (value.name, axis))
    return table


def _elements(type_: TensorType) -> int:
    numbers = [d for d in type_.shape if isinstance(d, int)]
    return int(np.prod(numbers, dtype=np.int64))


def _reshape_constant(source: tuple[Dim, ...], target: tuple[Dim, ...]) -> list[int] | None:
    wanted = [
        d if isinstance(d, int) else 0 if i < len(source) and source[i] == d else -1 for i, d in enumerate(target)
    ]
    return wanted if wanted.count(-1) <= 1 else None


def _expand_constant(source: tuple[Dim, ...], target: tuple[Dim, ...]) -> list[int] | None:
    padded = (1,) * (len(target) - len(source)) + source
    wanted = [1 if a == b else b for a, b in zip(padded, target)]
    return [d for d in wanted if isinstance(d, int)] if all(isinstance(d, int) for d in wanted) else None


def _materialise(data: ConstData | None) -> ConstData | None:
    """A recipe over inline values as values; None where a file is needed."""
    if data is None or isinstance(data, Inline):
        return data
    return None if _reads_file(data) else Inline(constants.load(data, None))


def _reads_file(data: ConstData) -> bool:
    if isinstance(data, Concat):
        return any(map(_reads_file, data.parts))
    return isinstance(data, FileSlice) or (not isinstance(data, Inline) and _reads_file(data.part))


def _recipe(node: Node, operands: list[ConstData | None]) -> list[ConstData] | None:
    """What a node does to a weight, as a recipe; None where there is no such recipe, or the constant is small enough to evaluate."""
    data = operands[0]
    if data is None or (isinstance(data, Inline) and data.array.size < _LAZY):
        return None
    if node.op == "onnx.Identity":
        return [data]
    if node.op == "onnx.Cast" and DTYPES[data.dtype].is_float and DTYPES[node.attrs["to"]].is_float:
        return [converted(data, node.attrs["to"])]
    if node.op == "onnx.Transpose":
        return [transposed(data, tuple(node.attrs.get("perm") or reversed(range(len(data.shape)))))]
    if node.op == "onnx.Concat":
        return [Concat(tuple(o for o in operands if o is not None), node.attrs["axis"] % len(data.shape))]
    if node.op == "onnx.Split":
        return _split_recipe(node, data, operands[1] if len(operands) > 1 else None)
    return None


def _split_recipe(node: Node, data: ConstData, sizes: ConstData | None) -> list[ConstData] | None:
    axis, count = node.attrs.get("axis", 0) % len(data.shape), len(node.outputs)
    if sizes is None and data.shape[axis] % count:
        return None
    lengths = [data.shape[axis] // count] * count if sizes is None else [int(n) for n in constants.load(sizes, None)]
    stops = np.cumsum(lengths).tolist()
    return [Slice(data, axis, stop - n, stop) for n, stop in zip(lengths, stops)]


def transposed(data: ConstData, perm: tuple[int, ...]) -> ConstData:
    """A transposed constant; two transpositions become one, or none."""
    if isinstance(data, Transpose):
        return transposed(data.part, tuple(data.perm[p] for p in perm))
    if isinstance(data, Cast):
        return Cast(transposed(data.part, perm), data.dtype)
    return data if perm == tuple(range(len(perm))) else Transpose(data, perm)


def converted(data: ConstData, dtype: str) -> ConstData:
    """A constant of another float dtype; a widening before is left out, because it changes no value."""
    stored = unwidened(data)
    return stored if stored.dtype == dtype else Cast(stored, dtype)


def unwidened(data: ConstData) -> ConstData:
    """The constant without a Cast that changes none of its values: a weight as it is stored, whatever the exporter computes in."""
    while isinstance(data, Cast) and holds(data.dtype, data.part.dtype):
        data = data.part
    return data


_MANTISSA_EXPONENT = {"bf16": (8, 8), "f16": (11, 5), "f32": (24, 8), "f64": (53, 11)}


def holds(wide: str, narrow: str) -> bool:
    """Does one float dtype hold every value of another?"""
    if wide not in _MANTISSA_EXPONENT or narrow not in _MANTISSA_EXPONENT:
        return False
    return all(a >= b for a, b in zip(_MANTISSA_EXPONENT[wide], _MANTISSA_EXPONENT[narrow]))


# --- clean ----------------------------------------------------------------------------------------------------------------------------------------


def clean(graph: Graph) -> tuple[Graph, int]:
    """Drop Identity and no-op Cast, Reshape, Transpose, Expand and arithmetic, join transpositions, and compute equal things once."""
    editor, count = GraphEditor(graph), 0
    nodes: dict[str, Node] = {}
    seen: dict[tuple, Node] = {}
    given = {v.name for v in graph.inputs}
    kept: list[Node] = []
    merged = _equal_constants(graph, editor)
    for node in graph.nodes:
        node = replace(node, inputs=tuple(editor.resolve(i) if i else "" for i in node.inputs))
        node = _join_transposes(node, nodes)
        same = _same_value(node, graph, nodes, editor)
        # An output that is an input or a constant needs a node of its own.
        if same is not None and not (
            node.output in graph.outputs and (same in given or same in editor.constants or same in graph.outputs)
        ):
            editor.replace(node.output, same)
            count += 1
            continue
        key = _key(node)
        twin = seen.get(key)
        if twin is not None and not any(v.name in graph.outputs for v in node.outputs):
            for old, new in zip(node.outputs, twin.outputs):
                editor.replace(old.name, new.name)
            count += 1
            continue
        seen.setdefault(key, node)
        nodes.update({v.name: node for v in node.outputs})
        kept.append(node)
    editor.nodes = kept
    result = editor.finish()
    return result, count + merged


def _equal_constants(graph: Graph, editor: GraphEditor) -> int:
    first: dict[ConstData, str] = {}
    count = 0
    for name, constant in graph.constants.items():
        same = first.setdefault(constant.data, name)
        if same != name and name not in graph.outputs:
            editor.replace(name, same)
            count += 1
    return count


def _key(node: Node) -> tuple:
    return (node.op, node.inputs, tuple(sorted((k, repr(v)) for k, v in node.attrs.items())), len(node.outputs))


def perm_of(node: Node) -> tuple[int, ...]:
    """A Transpose's order of axes."""
    return tuple(node.attrs.get("perm") or reversed(range(node.outputs[0].type.rank)))


def _join_transposes(node: Node, nodes: dict[str, Node]) -> Node:
    before = nodes.get(node.inputs[0]) if node.op == "onnx.Transpose" else None
    if before is None or before.op != "onnx.Transpose":
        return node
    perm = tuple(perm_of(before)[p] for p in perm_of(node))
    return replace(node, inputs=before.inputs, attrs={"perm": perm}, origin=(*before.origin, *node.origin))


def _same_value(node: Node, graph: Graph, nodes: dict[str, Node], editor: GraphEditor) -> str | None:
    """The operand that a node hands on unchanged."""
    if node.op == "onnx.Identity":
        return node.inputs[0]
    if not node.inputs or not node.op.startswith("onnx."):
        return None
    x = node.inputs[0]
    unchanged = editor.type(x) == node.outputs[0].type if x else False
    if node.op in ("onnx.Cast", "onnx.Expand", "onnx.Reshape"):
        # Equal symbolic shapes before and after a Reshape or Expand: row-major order makes it the identity.
        return x if unchanged else _cast_back(node, nodes)
    if node.op == "onnx.Transpose":
        return x if perm_of(node) == tuple(range(len(perm_of(node)))) else None
    if node.op == "onnx.Concat" and len(node.inputs) == 1:
        return x
    return _neutral(node, editor)


def _cast_back(node: Node, nodes: dict[str, Node]) -> str | None:
    """Cast to a wider type and back."""
    before = nodes.get(node.inputs[0])
    if node.op != "onnx.Cast" or before is None or before.op != "onnx.Cast":
        return None
    narrow = _type_of(before.inputs[0], nodes)
    return (
        before.inputs[0]
        if narrow and narrow.dtype == node.outputs[0].type.dtype and holds(before.outputs[0].type.dtype, narrow.dtype)
        else None
    )


def _type_of(name: str, nodes: dict[str, Node]) -> TensorType | None:
    node = nodes.get(name)
    return next((v.type for v in node.outputs if v.name == name), None) if node else None


_NEUTRAL = {"onnx.Mul": (1, True), "onnx.Div": (1, False), "onnx.Add": (0, True), "onnx.Sub": (0, False)}


def _neutral(node: Node, editor: GraphEditor) -> str | None:
    """x * 1, x / 1, x + 0, x - 0."""
    if node.op not in _NEUTRAL:
        return None
    number, either = _NEUTRAL[node.op]
    for x, c in (node.inputs, node.inputs[::-1]) if either else (node.inputs,):
        constant: Constant | None = editor.constants.get(c)
        if constant and isinstance(constant.data, Inline) and constant.data.array.size == 1:
            if constant.data.array.reshape(-1)[0] == number and editor.type(x) == node.outputs[0].type:
                return x
    return None

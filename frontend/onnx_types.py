"""Types of an ONNX graph's values, from ONNX's own shape inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, helper, shape_inference

from ir.constants import ConstData
from ir.errors import GraphError
from ir.types import DTYPES, Dim, Sym, TensorType, dtype_from_onnx, sym


def element_type(code: int, where: str) -> str:
    """The IR's name of an ONNX element type; ``where`` says whose it is.

    Raises:
        GraphError: the IR has no such type.
    """
    try:
        return dtype_from_onnx(code)
    except GraphError:
        known = TensorProto.DataType.Name(code) if code in TensorProto.DataType.values() else code
        raise GraphError(f"{where}: element type {known} is not supported") from None


def unused_name(hint: str, taken: set[str]) -> str:
    """The hint, or the hint with a number; it is taken from then on."""
    name, n = hint, 1
    while name in taken:
        name, n = f"{hint}_{n}", n + 1
    taken.add(name)
    return name


@dataclass
class Types:
    """The type of every value: declared, inferred, or of unknown dimensions, which become fresh symbols."""

    model: ModelProto
    constants: Mapping[str, ConstData]
    _table: dict[str, TensorType] = field(default_factory=dict)
    _symbols: dict[str, Sym] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        protos = self._infer()
        # Symbols that the file names come first, so that a fresh one never takes such a name.
        for type_ in protos.values():
            for dim in type_.tensor_type.shape.dim:
                if dim.WhichOneof("value") == "dim_param" and dim.dim_param:
                    self._symbol(dim.dim_param)
        for name, type_ in protos.items():
            self._table[name] = self._type(name, type_)

    def of(self, name: str) -> TensorType:
        if name in self.constants:
            constant = self.constants[name]
            return TensorType(constant.dtype, tuple(constant.shape))
        try:
            return self._table[name]
        except KeyError:
            producer = next((n for n in self.model.graph.node if name in n.output), None)
            where = f"node {producer.name}: op {producer.op_type}: " if producer else ""
            raise GraphError(f"{where}shape inference does not tell the type of {name}{self._reason()}") from None

    def _reason(self) -> str:
        """What strict inference complains of; the lenient one passes over a node that it cannot make sense of."""
        try:
            shape_inference.infer_shapes(_without_values(self.model), strict_mode=True, data_prop=True)
        except (shape_inference.InferenceError, RuntimeError, ValueError) as error:
            return " (" + " ".join(str(error).split()) + ")"
        return ""

    def _infer(self) -> dict[str, TypeProto]:
        """ONNX's inference, and again as long as it can be helped over a node."""
        slim = _without_values(self.model)
        guessed: dict[str, TypeProto] = {}
        while True:
            try:
                inferred = shape_inference.infer_shapes(slim, data_prop=True)
            except (shape_inference.InferenceError, RuntimeError, ValueError) as error:
                raise GraphError(f"shape inference: {error}") from None
            graph = inferred.graph
            found = {v.name: v.type for v in (*graph.input, *graph.value_info, *graph.output) if _has_rank(v.type)}
            types = {**guessed, **found}
            added = self._guess(slim, types)
            if not added:
                return types
            slim.graph.value_info.extend(added)
            guessed.update({v.name: v.type for v in added})

    def _guess(self, slim: ModelProto, types: Mapping[str, TypeProto]) -> list[ValueInfoProto]:
        """Types of results that inference passes over although their operands are known."""
        known = {**types, **{n: _constant_type(c) for n, c in self.constants.items()}}
        nodes = [n for n in slim.graph.node if n.op_type in _GUESSES]
        return [v for node in nodes for v in _GUESSES[node.op_type](node, known) if v.name not in types]

    def _type(self, name: str, type_: TypeProto) -> TensorType:
        tensor = type_.tensor_type
        dims: list[Dim] = []
        for axis, dim in enumerate(tensor.shape.dim):
            kind = dim.WhichOneof("value")
            if kind == "dim_value" and dim.dim_value >= 0:
                dims.append(dim.dim_value)
            elif kind == "dim_param" and dim.dim_param:
                dims.append(self._symbol(dim.dim_param))
            else:
                dims.append(self._symbol(f"{name} axis {axis}", f"u{len(self._symbols)}"))
        return TensorType(element_type(tensor.elem_type, f"value {name}"), tuple(dims))

    def _symbol(self, text: str, hint: str = "") -> Sym:
        """One symbol per text: different texts never share one, however similar they look as identifiers."""
        if text not in self._symbols:
            self._symbols[text] = sym(unused_name(sym(hint or text).names[0], self._taken))
        return self._symbols[text]


def _has_rank(type_: TypeProto) -> bool:
    return (
        type_.WhichOneof("value") == "tensor_type"
        and type_.tensor_type.HasField("shape")
        and type_.tensor_type.elem_type != 0
    )


# Initializers of at most this many elements may be shapes, axes or other values that inference reads.
_SMALL = 64


def _without_values(model: ModelProto) -> ModelProto:
    """A copy for shape inference: large and external initializers become inputs, as only their types matter."""
    copy = ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    source, graph = model.graph, copy.graph
    graph.name = source.name
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.value_info.extend(v for v in source.value_info if _has_rank(v.type))
    inputs = {v.name for v in source.input}
    for tensor in source.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and np.prod(tensor.dims, dtype=np.int64) <= _SMALL:
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return copy


# What inference passes over -------------------------------------------------------------------------------------------


def _constant_type(data: ConstData) -> TypeProto:
    return helper.make_tensor_type_proto(DTYPES[data.dtype].onnx, data.shape)


def _of_rank(operand: int) -> Callable[[NodeProto, Mapping[str, TypeProto]], Iterator[ValueInfoProto]]:
    """A result whose rank is the length of an operand, whatever its values."""

    def guess(node: NodeProto, known: Mapping[str, TypeProto]) -> Iterator[ValueInfoProto]:
        target = known.get(node.input[operand])
        dims = target.tensor_type.shape.dim if target else []
        if len(dims) != 1 or dims[0].WhichOneof("value") != "dim_value":
            return
        rank = dims[0].dim_value
        if operand == 0:  # ConstantOfShape
            kind = next((a.t.data_type for a in node.attribute if a.name == "value"), TensorProto.FLOAT)
        elif node.input[0] in known:
            kind = known[node.input[0]].tensor_type.elem_type
            if node.op_type == "Expand":
                rank = max(rank, len(known[node.input[0]].tensor_type.shape.dim))
        else:
            return
        yield helper.make_tensor_value_info(node.output[0], kind, [None] * rank)

    return guess


def _present(node: NodeProto, known: Mapping[str, TypeProto]) -> Iterator[ValueInfoProto]:
    """Attention's present_key and present_value: like the past ones, except for the length."""
    for past, present in zip(node.input[4:6], node.output[1:3]):
        if past in known:
            info = ValueInfoProto(name=present)
            info.type.CopyFrom(known[past])
            info.type.tensor_type.shape.dim[2].Clear()
            yield info


_GUESSES = {"Reshape": _of_rank(1), "Expand": _of_rank(1), "ConstantOfShape": _of_rank(0), "Attention": _present}

"""ONNX files to the IR, stage "onnx": one node per ONNX node, weights left where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from frontend.onnx_file import Places, find_weights_folder, read_model
from frontend.onnx_types import Types, element_type, unused_name
from ir import ops_onnx  # noqa: F401  (enters the rows that nodes are looked up in)
from ir.constants import ConstData, FileSlice, Inline
from ir.errors import GraphError, UnsupportedError
from ir.graph import Constant, Graph, Node, Value
from ir.optable import OPS
from ir.types import DTYPES, TensorType
from ir.verify import verify

OPSETS = range(13, 26)


def import_onnx(path: str | Path, weights_folder: str | Path | None = None) -> Graph:
    """Read a file as a graph at stage "onnx".

    Args:
        weights_folder: where external data lie (default: see ``onnx_file.find_weights_folder``). FileSlice constants
            name files inside it.

    Raises:
        GraphError: the file is missing, damaged, or has types that the IR lacks.
        UnsupportedError: another opset, an op that is not in the table, control flow; names node, op and domain.
        CheckpointError: a file of external data is missing or too short.
    """
    path = Path(path)
    model = read_model(path)
    folder = find_weights_folder(path, model, weights_folder)
    try:
        return _import(model, path, folder)
    except (GraphError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None


def _import(model: ModelProto, path: Path, folder: Path) -> Graph:
    opset = _check_opsets(model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    graph = model.graph
    if graph.sparse_initializer:
        raise UnsupportedError(
            f"initializer {graph.sparse_initializer[0].values.name}: sparse tensors are not supported"
        )
    _check_nodes(graph.node)
    _name_everything(graph)
    constants = _constants(graph, folder)
    types = Types(model, constants)
    initializers = {t.name for t in graph.initializer}
    inputs = tuple(Value(v.name, types.of(v.name)) for v in graph.input if v.name not in initializers)
    nodes = tuple(_node(n, types) for n in graph.node if n.op_type != "Constant")
    used = {name for n in nodes for name in n.inputs} | {o.name for o in graph.output}
    producer = f"{model.producer_name} {model.producer_version}".strip()
    meta = {
        "opset": opset,
        "producer": producer,
        "metadata_props": {p.key: p.value for p in model.metadata_props},
        "source": path.name,
    }
    outputs = tuple(o.name for o in graph.output)
    kept = {k: Constant(Value(k, TensorType(c.dtype, tuple(c.shape))), c) for k, c in constants.items() if k in used}
    return verify(Graph(graph.name or "main", "onnx", inputs, outputs, kept, nodes, meta))


def _check_opsets(model: ModelProto) -> int:
    versions = {o.domain: o.version for o in model.opset_import}
    version = versions.get("", versions.get("ai.onnx"))
    if version is None:
        raise UnsupportedError(
            f"no opset of the standard domain (found {', '.join(versions)}), "
            f"expected {OPSETS.start} to {OPSETS.stop - 1}"
        )
    if version not in OPSETS:
        raise UnsupportedError(f"opset {version}, expected {OPSETS.start} to {OPSETS.stop - 1}")
    return version


def op_name(node: NodeProto) -> str:
    """The op table's name of a node's op: ``onnx.MatMul``, ``onnx.com.microsoft.GroupQueryAttention``."""
    domain = "" if node.domain in ("", "ai.onnx") else node.domain + "."
    return f"onnx.{domain}{node.op_type}"


def _check_nodes(nodes: Iterable[NodeProto]) -> None:
    for node in nodes:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            continue
        where = f"node {node.name or '(no name)'}: op {node.op_type} of domain {node.domain or 'ai.onnx'}"
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise UnsupportedError(f"{where}: control flow (a graph inside a node) is not supported")
        if op_name(node) not in OPS:
            raise UnsupportedError(f"{where} is not supported")


def _name_everything(graph: GraphProto) -> None:
    """Nodes without a name get one, and so do absent outputs before a present one: the IR refers to all by name."""
    taken = {n.name for n in graph.node} | {o for n in graph.node for o in n.output}
    for i, node in enumerate(graph.node):
        while node.output and not node.output[-1]:
            del node.output[-1]
        if not node.name:
            node.name = unused_name(f"{node.op_type}_{i}", taken)
        for j, name in enumerate(node.output):
            if not name:
                node.output[j] = unused_name(f"{node.name}_unused_{j}", taken)


# Constants


def _constants(graph: GraphProto, folder: Path) -> dict[str, ConstData]:
    result: dict[str, ConstData] = {}
    places = Places(folder)
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            result[tensor.name] = _external(tensor, places)
        else:
            result[tensor.name] = _inline(tensor, f"initializer {tensor.name}")
    for node in graph.node:
        if node.op_type == "Constant":
            result[node.output[0]] = _constant_node(node)
    return result


def _inline(tensor: TensorProto, where: str) -> Inline:
    dtype = element_type(tensor.data_type, where)
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, OverflowError) as error:
        raise GraphError(f"{where}: its values do not fit its shape {list(tensor.dims)} ({error})") from None
    return Inline(array.astype(DTYPES[dtype].numpy, copy=False))


def _external(tensor: TensorProto, places: Places) -> FileSlice:
    dtype = element_type(tensor.data_type, f"initializer {tensor.name}")
    place = places.of(tensor)
    return FileSlice(place.location, tensor.name, dtype, tuple(tensor.dims), place.offset)


def _constant_node(node: NodeProto) -> Inline:
    where = f"node {node.name}: op Constant"
    values = {a.name: a for a in node.attribute}
    if "value" in values:
        if values["value"].t.data_location == TensorProto.EXTERNAL:
            raise UnsupportedError(f"{where}: external data outside of the initializers are not supported")
        return _inline(values["value"].t, where)
    for name, dtype in {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }.items():
        if name in values:
            return Inline(np.asarray(helper.get_attribute_value(values[name]), dtype))
    raise UnsupportedError(f"{where} with {', '.join(values) or 'no value'} is not supported")


# Nodes


def _node(node: NodeProto, types: Types) -> Node:
    attrs = {a.name: v for a in node.attribute if (v := _attribute(node, a)) is not None}
    inputs = list(node.input)
    while inputs and not inputs[-1]:
        inputs.pop()
    outputs = tuple(Value(name, types.of(name)) for name in node.output)
    return Node(op_name(node), tuple(inputs), outputs, attrs, (node.name,))


def _attribute(node: NodeProto, attribute: AttributeProto) -> Any:
    where = f"node {node.name}: op {node.op_type}: attribute {attribute.name}"
    if attribute.ref_attr_name:
        raise UnsupportedError(f"{where} refers to a function's attribute")
    value = helper.get_attribute_value(attribute)
    if attribute.name == "to" and node.op_type == "Cast":
        return element_type(value, where)
    if attribute.type == AttributeProto.TENSOR:
        array = _inline(value, where).array
        if array.size != 1:
            raise UnsupportedError(f"{where}: a tensor of shape {list(array.shape)}, expected one number")
        first = array.reshape(-1)[0]
        return float(first) if array.dtype.kind == "V" else first.item()
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (int, float)):
        return value
    if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS, AttributeProto.STRINGS):
        return tuple(v.decode() if isinstance(v, bytes) else v for v in value)
    raise UnsupportedError(f"{where} of type {AttributeProto.AttributeType.Name(attribute.type)} is not supported")

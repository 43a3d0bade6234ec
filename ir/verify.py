"""The verifier, driven by the op table: run after every pass."""

from __future__ import annotations

from collections.abc import Collection

from ir.errors import GraphError
from ir.graph import STAGES, Graph, Node
from ir.optable import lookup, with_defaults
from ir.types import TensorType, known_dims


def verify(graph: Graph, stages: Collection[str] = ()) -> Graph:
    """Check a graph and return it.

    Args:
        stages: the stages whose ops are legal here, if not the graph's own only: on the way from one stage to the next a graph holds ops of both.

    Raises:
        GraphError: names node, op and stage: a value read before it is defined or defined twice, an unknown op or one that is not legal at this
            stage, a wrong number of operands, an unknown or missing attribute, or a result type other than the op's rule gives.
    """
    if graph.stage not in STAGES:
        raise GraphError(f"{graph.name}: unknown stage {graph.stage!r}; stages are {', '.join(STAGES)}")
    defined = {v.name for v in graph.inputs} | set(graph.constants)
    graph.values  # raises where a name is defined twice
    for constant in graph.constants.values():
        # A weight that devices share is whole here: its type's symbols stand for one device's part, meta["shard"] for all of it.
        whole = known_dims(constant.value.type, graph.meta.get("shard", {}))
        if TensorType(constant.data.dtype, tuple(constant.data.shape)) != whole:
            raise GraphError(
                f"{graph.name}: constant {constant.name} is {constant.value.type}, its data is {constant.data.dtype}{list(constant.data.shape)}"
            )
    for node in graph.nodes:
        _check_node(graph, node, defined, stages or (graph.stage,))
        defined.update(v.name for v in node.outputs)
    for name in graph.outputs:
        if name not in defined:
            raise GraphError(f"{graph.name}: output {name} is not defined")
    return graph


def _check_node(graph: Graph, node: Node, defined: set[str], stages: Collection[str]) -> None:
    where = f"{graph.name}: {node.op} -> {node.outputs[0].name if node.outputs else '(nothing)'} at stage {graph.stage}"
    definition = lookup(node.op)
    if not set(definition.stages).intersection(stages):
        raise GraphError(f"{where}: the op is legal at stage {', '.join(definition.stages)} only")
    most = definition.max_inputs()
    if len(node.inputs) < definition.min_inputs() or (most is not None and len(node.inputs) > most):
        raise GraphError(
            f"{where}: {len(node.inputs)} operands, the op takes {' '.join(definition.operands) or 'none'}"
        )
    for i, name in enumerate(node.inputs):
        if not name:
            if i < len(definition.operands) and not definition.operands[i].endswith(("?", "*")):
                raise GraphError(f"{where}: operand {definition.operands[i]} is required")
        elif name not in defined:
            raise GraphError(f"{where}: reads {name}, which is not defined before it")
    unknown = set(node.attrs) - set(definition.attrs)
    if unknown:
        raise GraphError(f"{where}: the op has no attribute {sorted(unknown)[0]}")
    absent = [k for k, v in definition.attrs.items() if v is ... and k not in node.attrs]
    if absent:
        raise GraphError(f"{where}: attribute {absent[0]} is missing")
    if definition.results is not None and len(node.outputs) != definition.results:
        raise GraphError(f"{where}: {len(node.outputs)} results, the op gives {definition.results}")
    if definition.infer is None:
        return
    types = [graph.type(i) if i else None for i in node.inputs]
    try:
        inferred = list(definition.infer(types, with_defaults(node.op, node.attrs)))
    except GraphError as error:
        raise GraphError(f"{where}: {error}") from None
    for value, type_ in zip(node.outputs, inferred, strict=True):
        if value.type != type_:
            raise GraphError(f"{where}: {value.name} is {value.type}, its op's rule gives {type_}")

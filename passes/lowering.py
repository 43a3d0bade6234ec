"""A fused graph on its way to InfiniCore calls: what the forms of passes.legalise have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ir.errors import UnsupportedError
from ir.graph import Graph, GraphEditor, Node, Value
from ir.types import DTYPES, Dim, TensorType, dim_bind, dim_sum
from passes.targets import OpSupport, Target

INDEX_DTYPES = ("i32", "i64")  # what the engine can write, the better one first


@dataclass(frozen=True)
class Form:
    """One way to compute a fused op.

    Attributes:
        needs: the InfiniCore ops that it calls.
        lower: writes it in place of one node.
        collective: the function of infiniccl that it calls.
        described: how the form calls one of its ops for a node, as Target.refusal takes it.
        refusal: a reason that is none of a single op's.
    """

    name: str
    needs: tuple[str, ...]
    lower: Callable[["Lowering", Node], None]
    collective: str = ""
    described: Callable[["Lowering", Node, str], Mapping[str, Any]] = lambda low, node, op: like_result(low, node)
    refusal: Callable[["Lowering", Sequence[Node]], str] = lambda low, nodes: ""


def like_result(low: "Lowering", node: Node) -> dict[str, Any]:
    """A call whose operand 0 is like the node's first result. What devices share counts whole."""
    type_ = node.outputs[0].type
    last = dim_bind(type_.shape[-1], low.full)
    if not isinstance(last, int):
        return dict(rank=type_.rank)
    return dict(rank=type_.rank, last_dim=last, row_bytes=last * DTYPES[type_.dtype].bytes)


class Lowering:
    """A fused graph on its way to InfiniCore calls."""

    def __init__(self, graph: Graph, target: Target, max_positions: int) -> None:
        self.graph = graph
        self.full: Mapping[str, int] = graph.meta.get("shard", {})  # on one device
        self.target = target
        self.edit = GraphEditor(replace(graph, nodes=(), outputs=()))
        self.done: set[str] = set()  # results of fused nodes that were lowered together with an earlier one
        self.max_positions = max_positions
        self.dtype = activation_dtype(graph)
        self.rope_factors: dict[str, float] = {}  # result of a rope -> what its tables are multiplied with besides
        self.notes: dict[str, str] = {}  # fused op -> what is unusual about the form that was taken
        self.meta: dict[str, Any] = {}
        self._tables: dict[tuple, tuple[str, ...]] = {}

    def call(self, op: str, inputs: list[str], hint: str, node: Node, **attrs) -> str:
        return self.calls(op, inputs, [hint], node, **attrs)[0]

    def calls(self, op: str, inputs: list[str], hints: list[str], node: Node, **attrs) -> tuple[str, ...]:
        """Append a node that stands for (a part of) a fused one."""
        return self.edit.add(op, [self.edit.resolve(i) for i in inputs], hints, attrs, origin=node.origin)

    def put(self, node: Node, *results: str) -> None:
        """These values are the fused node's results."""
        for old, new in zip(node.outputs, results, strict=True):
            if old.name != new:
                self.edit.replace(old.name, new)
            self.done.add(old.name)

    def support(self, op: str) -> OpSupport:
        """The record's entry of an op that the target has."""
        return self.target.ops[op]

    def slices(self, node: Node, x: str, axis: int, hints: Sequence[str], sizes: Sequence[Dim]) -> list[str]:
        """Consecutive parts of one axis of ``x``, as views."""
        results = []
        for i, (hint, size) in enumerate(zip(hints, sizes, strict=True)):
            start = dim_sum(sizes[:i])
            if start is None:
                raise UnsupportedError(
                    f"{self.graph.name}: {hint} starts at the sum of {', '.join(map(str, sizes[:i]))}"
                )
            results.append(self.call("view.slice", [x], hint, node, axis=axis, start=start, size=size))
        return results

    def index_dtype(self, *ops: str) -> str:
        """The dtype of indices that all of these ops take here; "" if there is none that the engine can write."""
        for dtype in INDEX_DTYPES:
            if all(not self.support(op).index_dtypes or dtype in self.support(op).index_dtypes for op in ops):
                return dtype
        return ""

    def index_refusal(self, *ops: str) -> str:
        if self.index_dtype(*ops):
            return ""
        takes = "; ".join(f"{op} takes {', '.join(self.support(op).index_dtypes)}" for op in ops)
        return f"indices on {self.target.name}: {takes}; the engine has {' or '.join(INDEX_DTYPES)}"

    def add_input(self, name: str, type_: TensorType) -> None:
        """An input that the fused graph does not have; it is added once."""
        if not any(v.name == name for v in self.edit.inputs):
            self.edit.add_input(name, type_)

    def retype_input(self, name: str, type_: TensorType) -> None:
        if any(v.name == name for v in self.edit.inputs):
            self.edit.inputs = [Value(v.name, type_) if v.name == name else v for v in self.edit.inputs]
            self.edit.set_type(name, type_)

    def index_input(self, name: str, *ops: str) -> None:
        """Give an input of indices the dtype that these ops take."""
        self.retype_input(name, self.type(name).with_dtype(self.index_dtype(*ops)))

    def type(self, name: str) -> TensorType:
        return self.edit.type(self.edit.resolve(name))

    def rope_tables(self, node: Node, inv_freq: str, attention_factor: float) -> tuple[str, str]:
        key = (inv_freq, attention_factor)
        if key not in self._tables:
            attrs = dict(positions=self.max_positions, dtype=self.dtype, attention_factor=attention_factor)
            self._tables[key] = self.calls("setup.rope_table", [inv_freq], ["sin_table", "cos_table"], node, **attrs)
        sin, cos = self._tables[key]
        return sin, cos


def activation_dtype(graph: Graph) -> str:
    """The dtype of the residual stream: what the embedding gives."""
    for node in graph.nodes:
        if node.op == "embedding":
            return node.outputs[0].type.dtype
    raise UnsupportedError(f"{graph.name}: there is no embedding in it")


def short(node: Node, i: int = 0) -> str:
    """A result's name without its layer number: ``q.3`` -> ``q``. Layers become one loop, so their values share names."""
    return (
        node.outputs[i].name.rsplit(".", 1)[0]
        if node.outputs[i].name.rsplit(".", 1)[-1].isdigit()
        else node.outputs[i].name
    )

"""The op table: one row per op, with its stage, operands, attributes, shape rule, numpy reference and one line of doc.

Everything else is driven by it: the verifier, the interpreter, the text form's attribute checks and the documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ir.errors import GraphError
from ir.types import TensorType

# A shape rule gets the operands' types (None where an optional one is absent) and the attributes, and returns the results' types; it raises
# GraphError for operands that do not fit. A reference gets arrays in the dtype that the interpreter computes in.
InferFn = Callable[[Sequence[Any], Mapping[str, Any]], Sequence[TensorType]]
ReferenceFn = Callable[..., Any]


@dataclass(frozen=True)
class OpDef:
    """One op.

    Attributes:
        name: as printed; ONNX ops are ``onnx.Name``, InfiniCore calls ``infini.name``.
        stages: where it is legal (see ir.graph.STAGES).
        operands: names of the inputs; a trailing ``?`` marks an optional one, a trailing ``*`` any number.
        attrs: attribute names with their defaults; ``...`` marks one that must be given.
        infer: the shape rule; None where only the importer knows (ONNX ops, whose types come from ONNX's own inference).
        reference: numpy implementation, called as ``reference(inputs, attrs, context)``; returns one array or a list of them.
        doc: one line.
        results: number of outputs, or None where it varies.
    """

    name: str
    stages: tuple[str, ...]
    operands: tuple[str, ...]
    doc: str
    infer: InferFn | None
    reference: ReferenceFn
    attrs: Mapping[str, Any] = field(default_factory=dict)
    results: int | None = 1

    def min_inputs(self) -> int:
        return sum(not o.endswith(("?", "*")) for o in self.operands)

    def max_inputs(self) -> int | None:
        return None if any(o.endswith("*") for o in self.operands) else len(self.operands)


@dataclass(frozen=True)
class Context:
    """What a reference may need beside its operands: the node's output types with every symbol bound, whether all is computed in float64, and who the
    other devices are (see ir.interp.Communicator)."""

    types: tuple[TensorType, ...]
    symbols: Mapping[str, int]
    float64: bool
    communicator: Any = None


OPS: dict[str, OpDef] = {}


def op(
    name: str,
    stages: str | Sequence[str],
    operands: str,
    doc: str,
    *,
    infer: InferFn | None = None,
    attrs: Mapping[str, Any] | None = None,
    results: int | None = 1,
) -> Callable[[ReferenceFn], ReferenceFn]:
    """Decorate a numpy reference ``fn(inputs, attrs, context)`` to enter it into the table. ``operands`` is a space-separated list."""

    def register(reference: ReferenceFn) -> ReferenceFn:
        if name in OPS:
            raise GraphError(f"op {name} is in the table twice")
        where = (stages,) if isinstance(stages, str) else tuple(stages)
        OPS[name] = OpDef(name, where, tuple(operands.split()), doc, infer, reference, dict(attrs or {}), results)
        return reference

    return register


def lookup(name: str) -> OpDef:
    """The row of an op.

    Raises:
        GraphError: there is no such op.
    """
    _load_all()
    try:
        return OPS[name]
    except KeyError:
        raise GraphError(f"there is no op called {name}") from None


def infer(name: str, types: Sequence[TensorType | None], attrs: Mapping[str, Any]) -> list[TensorType]:
    """Result types by the op's shape rule."""
    rule = lookup(name).infer
    if rule is None:
        raise GraphError(f"op {name} has no shape rule: give its result types")
    return list(rule(types, with_defaults(name, attrs)))


def with_defaults(name: str, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes with those left out at their defaults."""
    defaults = {k: v for k, v in lookup(name).attrs.items() if v is not ...}
    return {**defaults, **attrs}


def _load_all() -> None:
    # The rows live in one module per stage; importing a module enters its rows.
    import ir.ops_infini  # noqa: F401
    import ir.ops_model  # noqa: F401
    import ir.ops_onnx  # noqa: F401
    import ir.ops_views  # noqa: F401


def results(value: Any) -> list[np.ndarray]:
    """A reference's result as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]

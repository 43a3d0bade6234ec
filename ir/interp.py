"""The interpreter: runs any graph at any stage with numpy.

Two modes. ``float64=True`` computes every floating-point value in float64 and never rounds: what a pass preserves, it preserves to about 1e-12.
Otherwise each op computes in float32 (float64 for f64 tensors) and rounds once to its result's dtype, as InfiniCore's kernels do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from ir import constants
from ir.errors import GraphError
from ir.graph import Graph, Node
from ir.optable import Context, lookup, results, with_defaults
from ir.types import DTYPES, Sym, TensorType, dtype_of, known_dims


class Communicator(Protocol):
    """One device's side of the collectives: every device calls the same ones in the same order (see ir.ranks)."""

    def all_reduce(self, x: np.ndarray) -> np.ndarray:
        """The sum of all devices' ``x``."""

    def all_gather(self, x: np.ndarray) -> np.ndarray:
        """All devices' ``x`` side by side on the last axis."""


def run(
    graph: Graph,
    inputs: Mapping[str, np.ndarray],
    *,
    folder: Path | None = None,
    float64: bool = False,
    symbols: Mapping[str, int] | None = None,
    keep: set[str] | None = None,
    communicator: Communicator | None = None,
) -> dict[str, np.ndarray]:
    """Execute a graph.

    Args:
        inputs: an array per graph input, of its type; floating-point ones may be of any float dtype.
        folder: the checkpoint's folder, where constants that lie in files are found.
        float64: compute in float64 without rounding.
        symbols: values of symbols that no input's shape binds. What devices share has its value on one device unless given.
        keep: names of further values to return.
        communicator: reaches the devices that run the other parts of the graph; None where this one runs all of it.

    Returns:
        The graph's outputs by name, and the values in ``keep``.

    Raises:
        GraphError: an input is missing or has another shape than the graph says.
    """
    table = {**graph.meta.get("shard", {}), **bind_inputs(graph, inputs, dict(symbols or {}))}
    env: dict[str, np.ndarray] = {}
    for value in graph.inputs:
        env[value.name] = _enter(np.asarray(inputs[value.name]), value.type, float64)
    wanted = set(graph.outputs) | (keep or set())
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    for name, constant in graph.constants.items():
        if name in last_use or name in wanted:
            env[name] = _enter(constants.load(constant.data, folder), constant.value.type, float64)
    for i, node in enumerate(graph.nodes):
        run_node(node, env, table, float64, communicator)
        for name in node.inputs:
            if last_use.get(name) == i and name not in wanted:
                env.pop(name, None)
    missing = wanted - set(env)
    if missing:
        raise GraphError(f"{graph.name}: no node computes {sorted(missing)[0]}")
    return {name: env[name] for name in wanted}


def run_node(
    node: Node,
    env: dict[str, np.ndarray],
    symbols: Mapping[str, int],
    float64: bool,
    communicator: Communicator | None = None,
) -> None:
    """Execute one node on ``env`` (value name -> array), adding its results."""
    definition = lookup(node.op)
    arguments = [_widen(env[i], float64) if i else None for i in node.inputs]
    # A result's symbols may be data-dependent in ONNX graphs (Shape arithmetic); those types stay symbolic.
    types = tuple(known_dims(v.type, symbols) for v in node.outputs)
    context = Context(types, symbols, float64, communicator)
    outputs = results(definition.reference(arguments, with_defaults(node.op, node.attrs), context))
    if len(outputs) < len(node.outputs):
        raise GraphError(
            f"{node.op} {node.output}: the reference gives {len(outputs)} results, the graph wants {len(node.outputs)}"
        )
    for value, type_, array in zip(node.outputs, types, outputs):
        if not value.name:
            continue
        array = np.asarray(array)
        known = [d for d in type_.shape if isinstance(d, int)]
        if len(known) == len(type_.shape) and array.shape != type_.shape:
            raise GraphError(f"{node.op} {value.name}: result has shape {list(array.shape)}, the graph says {type_}")
        env[value.name] = _enter(array, value.type, float64)


def bind_inputs(graph: Graph, inputs: Mapping[str, np.ndarray], symbols: dict[str, int]) -> dict[str, int]:
    """The symbols' values, from the inputs' shapes."""
    for value in graph.inputs:
        if value.name not in inputs:
            raise GraphError(f"{graph.name}: input {value.name} ({value.type}) is missing")
        shape = np.shape(inputs[value.name])
        if len(shape) != value.type.rank:
            raise GraphError(f"{graph.name}: input {value.name} has shape {list(shape)}, expected {value.type}")
        for dim, size in zip(value.type.shape, shape):
            if isinstance(dim, Sym) and len(dim.names) == 1:
                name = dim.names[0]
                if size % dim.coef or symbols.setdefault(name, size // dim.coef) * dim.coef != size:
                    raise GraphError(
                        f"{graph.name}: input {value.name} has shape {list(shape)}, expected {value.type} with {name}={symbols[name]}"
                    )
            elif isinstance(dim, int) and dim != size:
                raise GraphError(f"{graph.name}: input {value.name} has shape {list(shape)}, expected {value.type}")
    return symbols


def _is_float(array: np.ndarray) -> bool:
    return DTYPES[dtype_of(array)].is_float


def _widen(array: np.ndarray, float64: bool) -> np.ndarray:
    """Half types compute in float32."""
    if not float64 and _is_float(array) and array.dtype.itemsize < 4:
        return array.astype(np.float32)
    return array


def _enter(array: np.ndarray, type_: TensorType, float64: bool) -> np.ndarray:
    """An array as the environment holds it: in its own dtype, or float64."""
    dtype = DTYPES[type_.dtype]
    want = np.dtype(np.float64) if float64 and dtype.is_float else dtype.numpy
    return array if array.dtype == want else array.astype(want)

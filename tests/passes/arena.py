"""Executes a planned "infini" graph with every value in the memory that the plan gives it: a plan that lets two live values share bytes gives wrong numbers.

Scratch memory is one numpy byte array per unit group, poisoned (0xff: not a number in every float type) before the run; values are strided views into it. Each node
reads its operands from there, computes with the op's own reference, and writes its results to their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ir import constants
from ir.graph import Graph, Node
from ir.interp import Communicator, bind_inputs
from ir.optable import Context, lookup, results, with_defaults
from ir.types import DTYPES, TensorType, bind
from passes.plan import Place, Plan, contiguous_strides

POISON = 0xFF


class Arena:
    """One run of a plan.

    Args:
        graph: with every float in f64 (but for rotary frequencies).
        inputs: as for ir.interp.run; arrays are copied.
        symbols: of sizes that no input binds.
        communicator: as for ir.interp.run.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        inputs: Mapping[str, np.ndarray],
        folder: Path | None = None,
        symbols: Mapping[str, int] | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        self.graph, self.plan = graph, plan
        self.communicator = communicator
        self.symbols = {**graph.meta.get("shard", {}), **bind_inputs(graph, inputs, dict(symbols or {}))}
        self.memory: dict[str, tuple[np.ndarray, int]] = {}  # buffer -> bytes and where it begins in them
        self.alias: dict[str, str] = {}  # the first run's buffer -> this run's
        for value in graph.inputs:
            self._own(value.name, np.asarray(inputs[value.name]).astype(DTYPES[value.type.dtype].numpy))
        for constant in graph.constants.values():
            self._own(
                constant.name, constants.load(constant.data, folder).astype(DTYPES[constant.value.type.dtype].numpy)
            )
        self.scratch("main", self.symbols)

    def run(self) -> dict[str, np.ndarray]:
        self._nodes(self.graph, "main", self.symbols)
        return {name: self.output(name) for name in self.graph.outputs}

    def output(self, name: str) -> np.ndarray:
        """A result. A cache that a loop collects is read where it lies: all runs have the place of the first."""
        if "_cache_out." in name:
            kind, _, layer = name.partition("_cache_out.")
            buffer = f"{kind}_cache.{layer}"
            array = self.memory[buffer][0]
            type_ = self.graph.type(name)
            return array.view(DTYPES[type_.dtype].numpy).reshape([bind(d, self.symbols) for d in type_.shape]).copy()
        return self.view(self.plan.place("main", name), self.symbols).copy()

    # --- memory -----------------------------------------------------------------------------------------------------------------------------------

    def _own(self, name: str, array: np.ndarray) -> None:
        self.memory[name] = (np.frombuffer(bytearray(np.ascontiguousarray(array).tobytes()), np.uint8), 0)

    def scratch(self, scope: str, symbols: Mapping[str, int]) -> None:
        """Fresh, poisoned memory for a scope's groups: one array each, so that running out of one is an error and not a neighbour's loss."""
        groups = {
            unit: np.full(size * bind(unit, symbols), POISON, np.uint8)
            for unit, size in self.plan.groups.get(scope, {}).items()
        }
        for buffer in self.plan.buffers.values():
            bodies = ("prefill.", "decode.")
            mine = buffer.name.startswith(scope + ".") if scope != "main" else not buffer.name.startswith(bodies)
            if buffer.kind == "scratch" and mine:
                begin = buffer.offset * bind(buffer.unit, symbols)
                assert begin + buffer.bytes * bind(buffer.unit, symbols) <= len(groups[buffer.unit]), buffer
                self.memory[buffer.name] = (groups[buffer.unit], begin)

    def view(self, place: Place, symbols: Mapping[str, int]) -> np.ndarray:
        """A value as a view of its memory."""
        array, begin = self.memory[self.alias.get(place.buffer, place.buffer)]
        dtype = DTYPES[place.type.dtype].numpy
        begin += sum(bind(term, symbols) for term in place.offset) * dtype.itemsize
        shape = tuple(bind(d, symbols) for d in place.type.shape)
        strides = tuple(bind(s, symbols) * dtype.itemsize for s in place.strides)
        end = begin + sum((n - 1) * s for n, s in zip(shape, strides)) + dtype.itemsize
        assert 0 not in shape and 0 <= begin and end <= len(array), f"{place} lies outside its buffer"
        return np.lib.stride_tricks.as_strided(array[begin:].view(np.uint8)[: end - begin].view(dtype), shape, strides)

    # --- execution --------------------------------------------------------------------------------------------------------------------------------

    def _nodes(self, graph: Graph, scope: str, symbols: Mapping[str, int]) -> None:
        for node in graph.nodes:
            if node.op == "loop.layers":
                self._layers(node, scope, symbols)
            elif node.op == "loop.requests":
                self._requests(node, scope, symbols)
            else:
                self._node(node, scope, symbols)

    def _node(self, node: Node, scope: str, symbols: Mapping[str, int]) -> None:
        places = self.plan.places[scope]
        operands = [self.view(places[name], symbols) for name in node.inputs]
        types = tuple(TensorType(v.type.dtype, tuple(bind(d, symbols) for d in v.type.shape)) for v in node.outputs)
        # Copies, so that no result is computed in the operands' own memory by chance.
        copies = [np.array(o, np.float64 if o.dtype.kind == "f" else o.dtype) for o in operands]
        found = results(
            lookup(node.op).reference(
                copies, with_defaults(node.op, node.attrs), Context(types, symbols, True, self.communicator)
            )
        )
        for value, array in zip(node.outputs, found):
            if node.op.startswith("setup."):
                self._own(places[value.name].buffer, np.asarray(array, DTYPES[value.type.dtype].numpy))
            elif node.op.startswith("view."):
                assert np.array_equal(self.view(places[value.name], symbols), array, equal_nan=True), (
                    f"{node.op} {value.name}: its place shows something else"
                )
            else:
                np.copyto(self.view(places[value.name], symbols), array)

    def _layers(self, loop: Node, scope: str, symbols: Mapping[str, int]) -> None:
        body, count, carried, per_layer = (loop.attrs[k] for k in ("body", "count", "carried", "per_layer"))
        outer = self.plan.places[scope]
        for i in range(count):
            self.alias = {}
            for k in range(per_layer):
                names = loop.inputs[carried + k * count : carried + (k + 1) * count]
                self.alias[outer[names[0]].buffer] = outer[names[i]].buffer
            self._nodes(body, body.name, symbols)
        self.alias = {}

    def _requests(self, node: Node, scope: str, symbols: Mapping[str, int]) -> None:
        """As the engine does it: one request after another, with scratch memory that is made anew for each."""
        places = self.plan.places[scope]
        lens, starts = (self.view(places[name], symbols) for name in node.inputs[5:7])
        row = 0
        for r, (n, start) in enumerate(zip(lens.tolist(), starts.tolist())):
            which = "decode" if n == 1 else "prefill"
            body: Graph = node.attrs[which]
            capacity = bind(self.graph.type(self._first_cache()).shape[2], symbols)
            here = {**symbols, "len": n, "pos": start, "total": start + n, "cap": capacity, "ld": max(start + n, 2)}
            self.scratch(which, here)
            for argument, name in zip(("q", "k", "v", "out"), (*node.inputs[:3], node.output)):
                place = places[name]
                array, begin = self.memory[place.buffer]
                item = DTYPES[place.type.dtype].bytes
                begin += (
                    sum(bind(term, symbols) for term in place.offset) + row * bind(place.strides[0], symbols)
                ) * item
                self.memory[argument] = (array, begin)
            for argument, name in zip(("k_cache", "v_cache"), node.inputs[3:5]):
                place = places[name]
                array, begin = self.memory[self.alias.get(place.buffer, place.buffer)]
                size = bind(contiguous_strides(place.type.shape)[0], symbols) * DTYPES[place.type.dtype].bytes
                self.memory[argument] = (array, begin + r * size)
            self._nodes(body, which, here)
            row += n

    def _first_cache(self) -> str:
        return next(v.name for v in self.graph.inputs if v.name.startswith("k_cache"))

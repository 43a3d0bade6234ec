"""Memory planning by liveness: where every value of an "infini" graph lives.

Views share their operand's memory. Calls that InfiniCore allows in place (ir.ops_infini.IN_PLACE) write over an operand that nobody reads later. What is joined
is allocated side by side. A value that a loop carries stays in one place from run to run. The rest gets scratch memory, reused as soon as it is free.

Sizes are symbolic: scratch buffers are grouped by their symbol (``T``, ``L``, ``len*total``), and offsets are planned within a group as bytes per unit of it, so
one plan serves every batch size: the address of a buffer is its group's base plus ``offset`` times the symbol's value. Sizes that devices share (passes.shard) count as
one device's: an upper bound, so one plan serves every number of devices. The places of values keep all symbols.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ir.errors import GraphError
from ir.graph import Graph, Node
from ir.ops_infini import IN_PLACE, WRITES_INTO, scratch_dims
from ir.optable import with_defaults
from ir.types import Dim, TensorType, dim_product, dim_sum

ALIGNMENT = 64  # bytes: a cache line, and what vector loads of every target like


@dataclass(frozen=True)
class Place:
    """Where a value lies: elements from the start of a buffer (a sum of terms), and a stride per axis, in elements."""

    buffer: str
    offset: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    type: TensorType

    def contiguous(self) -> bool:
        return all(
            s == want or d == 1
            for s, want, d in zip(self.strides, contiguous_strides(self.type.shape), self.type.shape)
        )


@dataclass(frozen=True)
class Buffer:
    """Memory that one or more values take in turn.

    Attributes:
        kind: ``scratch``, or ``weight``, ``input``, ``cache``, ``table``, ``argument`` for memory that the plan does not own.
        bytes: static bytes per unit.
        unit: the product of symbols that the size grows with.
        offset: scratch only: static bytes per unit from the base of the unit's group.
    """

    name: str
    kind: str
    dtype: str
    bytes: int
    unit: Dim
    offset: int = 0


@dataclass(frozen=True)
class Plan:
    """The places of every value, per graph (``main``, the layer's and the requests' bodies), and the scratch memory that they need."""

    places: Mapping[str, Mapping[str, Place]]
    buffers: Mapping[str, Buffer]
    groups: Mapping[
        str, Mapping[Dim, int]
    ]  # graph -> unit -> static bytes per unit; a layer's scratch is the main graph's

    def place(self, graph: str, value: str) -> Place:
        return self.places[graph][value]


def contiguous_strides(shape: Iterable[Dim]) -> tuple[Dim, ...]:
    """Row-major strides in elements."""
    dims = list(shape)
    return tuple(dim_product(dims[i + 1 :]) for i in range(len(dims)))


@dataclass
class _Storage:
    """Values that share one piece of memory, and when each is alive."""

    buffer: Buffer
    live: list[tuple[int, int]] = field(default_factory=list)

    def conflicts(self, other: "_Storage") -> bool:
        return any(a <= d and c <= b for a, b in self.live for c, d in other.live)


def plan_memory(
    graph: Graph,
    arguments: Mapping[str, Place] | None = None,
    scope: str = "main",
    full: Mapping[str, int] | None = None,
) -> Plan:
    """Plan a graph at stage "infini".

    Args:
        arguments: places of the graph's inputs that lie in the caller's memory, and of ``"out"``, where its first output must go.
        full: values of symbols that do not count as symbols in buffers' sizes; what ``meta["shard"]`` says if not given.

    Raises:
        GraphError: a view cannot be expressed with strides, or a loop carries a value that cannot stay in one place.
    """
    planner = _Planner(arguments or {}, scope, graph.meta.get("shard", {}) if full is None else full)
    planner.run(graph)
    return planner.result()


class _Planner:
    def __init__(self, arguments: Mapping[str, Place], scope: str, full: Mapping[str, int]) -> None:
        self.arguments = arguments
        self.scope = scope
        self.full = full
        self.places: dict[str, dict[str, Place]] = {}
        self.buffers: dict[str, Buffer] = {}
        self.storages: dict[str, _Storage] = {}
        self.groups: dict[str, Mapping[Dim, int]] = {}
        self.time = 0

    def run(self, graph: Graph) -> None:
        places = self.places.setdefault(self.scope, {})
        for value in graph.inputs:
            places[value.name] = self.arguments.get(value.name) or self._owned(
                value.name, value.type, _input_kind(value.name)
            )
        for constant in graph.constants.values():
            places[constant.name] = self._owned(constant.name, constant.value.type, "weight")
        targets = {}
        if "out" in self.arguments:
            targets[_root(graph, graph.outputs[0])] = self.arguments["out"]
        self._block(graph, self.scope, targets, set(graph.outputs))

    def _owned(self, name: str, type_: TensorType, kind: str) -> Place:
        """A place in memory that somebody else allocates."""
        size, unit = scratch_dims(type_, self.full)
        self.buffers[name] = Buffer(name, kind, type_.dtype, size, unit)
        return Place(name, (), contiguous_strides(type_.shape), type_)

    def _block(self, graph: Graph, scope: str, targets: Mapping[str, Place], live_out: set[str]) -> None:
        """Place the values that a sequence of nodes defines. ``targets`` fixes the place of some."""
        places = self.places[scope]
        last = _last_uses(graph, live_out)
        joins = {
            part: (node, i) for node in graph.nodes if node.op == "view.join" for i, part in enumerate(node.inputs)
        }
        base = self.time
        ends = [base + e for e in _extents(graph)]
        for index, node in enumerate(graph.nodes):
            now = self.time
            if node.op == "loop.layers":
                self._layers(graph, node, scope, last, ends)
                continue
            for k, value in enumerate(node.outputs):
                end = ends[last[value.name]] if last[value.name] < len(ends) else 10**9
                if node.op.startswith("view."):
                    places[value.name] = self._view(node, places, joins)
                elif node.op.startswith("setup."):
                    places[value.name] = self._owned(value.name, value.type, "table")
                else:
                    places[value.name] = self._result(graph, node, k, index, places, targets, joins, last, now, end)
            if node.op == "loop.requests":
                self._requests(node, places)
            self.time = now + 1

    def _result(self, graph, node: Node, k: int, index: int, places, targets, joins, last, now: int, end: int) -> Place:
        """The place of a call's k-th result."""
        value = node.outputs[k]
        into = WRITES_INTO.get(node.op, {}).get(k)
        if node.op == "loop.requests" and k > 0:
            into = 2 + k
        if into is not None:
            return places[node.inputs[into]]
        operand = IN_PLACE.get(node.op, {}).get(k)
        if operand is not None and value.name not in joins:  # a part of a join has its place
            place = places[node.inputs[operand]]
            # The operand's memory is free for the taking if nobody reads any of it after this call and no other operand lies in it.
            others = [places[n].buffer for i, n in enumerate(node.inputs) if n and i != operand]
            mine = place.buffer in self.storages and place.buffer not in others
            wanted = targets.get(value.name)
            if (
                mine
                and _free_after(graph, node.inputs[operand], index, places, last)
                and (wanted is None or wanted.buffer == place.buffer)
            ):
                self.storages[place.buffer].live.append((now, end))
                return replace(place, type=value.type)
        if value.name in targets:
            place = targets[value.name]
            place = Place(place.buffer, place.offset, contiguous_strides(value.type.shape), value.type)
            self._occupy(place.buffer, now, end, value.name)
            return place
        if value.name in joins:
            return self._part_of_join(
                graph, joins[value.name], value, places, now, end
            )  # a part lives as long as the whole
        return self._scratch(value.name, value.type, now, end, with_defaults(node.op, node.attrs).get("pitch"))

    def _scratch(self, name: str, type_: TensorType, now: int, end: int, pitch: Dim | None = None) -> Place:
        # Rows that are further apart than they are long: memory of a wider tensor.
        whole = type_ if pitch is None else type_.with_shape(*type_.shape[:-1], pitch)
        size, unit = scratch_dims(whole, self.full)
        base, _, number = name.rpartition(".")
        name = base if base and number.isdigit() else name  # all layers share the buffer
        name = name if self.scope == "main" else f"{self.scope}.{name}"
        unique, n = name, 1
        while unique in self.buffers:
            n += 1
            unique = f"{name}_{n}"
        buffer = Buffer(unique, "scratch", type_.dtype, size, unit)
        self.buffers[unique] = buffer
        self.storages[unique] = _Storage(buffer, [(now, end)])
        return Place(unique, (), contiguous_strides(whole.shape), type_)

    def _occupy(self, buffer: str, now: int, end: int, name: str) -> None:
        storage = self.storages.get(buffer)
        if storage is None:
            return
        # now itself is taken: a call must not write over what it reads unless InfiniCore allows it
        if any(a <= end and now <= b for a, b in storage.live):
            raise GraphError(
                f"{name} must stay in {buffer} from run to run, but that is still read when {name} is written"
            )
        storage.live.append((now, end))

    def _part_of_join(self, graph, join: tuple[Node, int], value, places, now: int, until: int) -> Place:
        node, i = join
        joined = node.outputs[0]
        if joined.name not in places:
            places[joined.name] = self._scratch(joined.name, joined.type, now, until)
        whole, axis = places[joined.name], node.attrs["axis"]
        before = dim_sum(graph.type(part).shape[axis] for part in node.inputs[:i])
        if before is None:
            raise GraphError(f"join {joined.name}: the sizes of axis {axis} have no sum")
        offset = (before * whole.strides[axis],) if before != 0 else ()
        return Place(whole.buffer, whole.offset + offset, whole.strides, value.type)

    def _view(self, node: Node, places, joins) -> Place:
        if node.op == "view.join":
            if node.output not in places:
                raise GraphError(f"join {node.output}: its parts are not results of calls")
            return places[node.output]
        place, type_, attrs = places[node.inputs[0]], node.outputs[0].type, node.attrs
        if node.op == "view.permute":
            return Place(place.buffer, place.offset, tuple(place.strides[p] for p in attrs["perm"]), type_)
        if node.op == "view.slice":
            start = attrs["start"]
            offset = () if start == 0 else (place.strides[attrs["axis"]] * start,)
            return Place(place.buffer, place.offset + offset, place.strides, type_)
        strides = reshape_strides(place.type.shape, place.strides, type_.shape)
        if strides is None:
            raise GraphError(
                f"{node.output}: {place.type} with strides [{', '.join(map(str, place.strides))}] cannot be seen as {type_} without a copy"
            )
        return Place(place.buffer, place.offset, strides, type_)

    def _layers(self, graph: Graph, loop: Node, scope: str, last, ends) -> None:
        """A loop's body runs in the same memory each time."""
        body, carried, per_layer, count = (loop.attrs[k] for k in ("body", "carried", "per_layer", "count"))
        outer = self.places[scope]
        inner = self.places.setdefault(body.name, {})
        firsts = list(loop.inputs[:carried])
        firsts += [loop.inputs[carried + i * count] for i in range(per_layer)]
        firsts += list(loop.inputs[carried + per_layer * count :])
        for value, first in zip(body.inputs, firsts, strict=True):
            inner[value.name] = replace(outer[first], type=value.type)
        start = self.time
        end = start + len(body.nodes)
        uses = _last_uses(body, set(body.outputs))
        targets = {}
        for i in range(carried):
            place = inner[body.inputs[i].name]
            if place.buffer in self.storages:
                read = uses.get(body.inputs[i].name, -1)
                storage = self.storages[place.buffer]
                storage.live = [(a, min(b, start - 1)) for a, b in storage.live] + [(start, start + max(read, 0))]
            targets[_root(body, body.outputs[i])] = place
        for buffer in {inner[v.name].buffer for v in body.inputs[carried:]} & set(self.storages):
            self.storages[buffer].live.append((start, end))
        self._block(body, body.name, targets, set(body.outputs))
        for i in range(carried):
            made, kept = inner[body.outputs[i]], inner[body.inputs[i].name]
            if made.buffer != kept.buffer or made.strides != kept.strides:
                raise GraphError(
                    f"{body.name}: carried value {body.outputs[i]} lies in {made.buffer}, its next run reads {kept.buffer}"
                )
        self.time = end
        for i, value in enumerate(loop.outputs):
            inside = body.outputs[i] if i < carried else body.outputs[carried + (i - carried) // count]
            place = inner[inside]
            if i >= carried and place.buffer in self.storages:
                raise GraphError(f"{body.name}: {inside} is read after the loop but lies in scratch memory")
            outer[value.name] = replace(place, type=value.type)
            if place.buffer in self.storages:
                until = ends[last[value.name]] if last[value.name] < len(ends) else 10**9
                self.storages[place.buffer].live.append((end, max(until, end)))

    def _requests(self, node: Node, places) -> None:
        """The bodies of one request get scratch memory of their own, since they run while the step's is in use."""
        for which in ("prefill", "decode"):
            body: Graph = node.attrs[which]
            arguments = {}
            for value, operand in zip(body.inputs[:3], node.inputs[:3]):
                arguments[value.name] = Place(value.name, (), places[operand].strides, value.type)
            for value in body.inputs[3:5]:
                arguments[value.name] = Place(value.name, (), contiguous_strides(value.type.shape), value.type)
            out = body.type(body.outputs[0])
            if not places[node.output].contiguous():
                raise GraphError(f"{node.output}: the attention's result is not contiguous")
            arguments["out"] = Place("out", (), contiguous_strides(out.shape), out)
            plan = plan_memory(body, arguments, which, self.full)
            self.places.update({which: dict(plan.places[which])})
            self.buffers.update({n: b for n, b in plan.buffers.items() if b.kind == "scratch"})
            self.groups.update(plan.groups)

    def result(self) -> Plan:
        units = [s.buffer.unit for s in self.storages.values()]
        for storage in self.storages.values():
            if units.count(storage.buffer.unit) > 1:  # neighbours: whole lines, whatever the symbol's value
                storage.buffer = replace(storage.buffer, bytes=-(-storage.buffer.bytes // ALIGNMENT) * ALIGNMENT)
        order = sorted(self.storages.values(), key=lambda s: (-s.buffer.bytes, s.buffer.name))
        placed: list[_Storage] = []
        for storage in order:
            neighbours = [p.buffer for p in placed if p.buffer.unit == storage.buffer.unit and p.conflicts(storage)]
            offset = 0
            for other in sorted(neighbours, key=lambda b: b.offset):
                if offset + storage.buffer.bytes <= other.offset:
                    break
                offset = max(offset, other.offset + other.bytes)
            storage.buffer = replace(storage.buffer, offset=offset)
            placed.append(storage)
        buffers = {**self.buffers, **{s.buffer.name: s.buffer for s in placed}}
        groups: dict[Dim, int] = {}
        for s in placed:
            groups[s.buffer.unit] = max(groups.get(s.buffer.unit, 0), s.buffer.offset + s.buffer.bytes)
        return Plan(self.places, buffers, {**self.groups, self.scope: groups})


def reshape_strides(
    shape: tuple[Dim, ...], strides: tuple[Dim, ...], wanted: tuple[Dim, ...]
) -> tuple[Dim, ...] | None:
    """Strides that show the same elements, in the same order, under another shape; None where that needs a copy."""
    runs: list[tuple[list[Dim], Dim]] = []  # maximal groups of axes that lie densely, with the innermost stride
    for d, s in zip(shape, strides):
        if d == 1:
            continue
        if runs and runs[-1][1] == d * s:
            runs[-1] = (runs[-1][0] + [d], s)
        else:
            runs.append(([d], s))
    result: list[Dim] = []
    todo = [d for d in wanted if d != 1]
    for dims, inner in runs:
        total = dim_product(dims)
        taken: list[Dim] = []
        while dim_product(taken) != total:
            if not todo:
                return None
            taken.append(todo.pop(0))
            if len(taken) > 32:
                return None
        result += [dim_product(taken[i + 1 :]) * inner for i in range(len(taken))]
    if todo:
        return None
    strides_iter = iter(result)
    full: list[Dim] = []
    for d in wanted:
        full.append(1 if d == 1 else next(strides_iter))
    # an axis of one element may have any stride: give it the dense one
    for i in range(len(full) - 1, -1, -1):
        if wanted[i] == 1:
            full[i] = full[i + 1] * wanted[i + 1] if i + 1 < len(full) else 1
    return tuple(full)


def _input_kind(name: str) -> str:
    return "cache" if name.split(".")[0] in ("k_cache", "v_cache") else "input"


def _root(graph: Graph, value: str) -> str:
    """The call's result (or input) that a value is a view of."""
    while (
        value in graph.producers
        and graph.producers[value].op.startswith("view.")
        and graph.producers[value].op != "view.join"
    ):
        value = graph.producers[value].inputs[0]
    return value


def _extents(graph: Graph) -> list[int]:
    """The last moment of each node, counted from the block's start: a loop takes as long as its body."""
    moments, now = [], 0
    for node in graph.nodes:
        now += len(node.attrs["body"].nodes) if node.op == "loop.layers" else 1
        moments.append(now - 1)
    return moments


def _last_uses(graph: Graph, live_out: set[str]) -> dict[str, int]:
    """For every value, the index of the last node that reads it or something that shares its memory; ``len(nodes)`` if it outlives the graph."""
    last = {name: -1 for name in graph.values}
    for name in live_out:
        last[name] = len(graph.nodes)
    for index in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[index]
        view = node.op.startswith("view.")
        for name in node.inputs:
            if name:
                uses = max((last[v.name] for v in node.outputs), default=-1) if view else index
                last[name] = max(last[name], uses, index)
    for node in graph.nodes:
        for v in node.outputs:
            last[v.name] = max(last[v.name], graph.nodes.index(node))
    return last


def _free_after(graph: Graph, operand: str, index: int, places, last) -> bool:
    """Whether nothing that lies in the operand's buffer is read after node ``index``."""
    buffer = places[operand].buffer
    return all(last[name] <= index for name, place in places.items() if place.buffer == buffer and name in last)

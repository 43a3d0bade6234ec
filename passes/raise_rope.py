"""Raising rotary position embeddings: the rotation by its shape, its angles by evaluation.

Whatever subgraph computes cos and sin, it is run on sample positions, and must give cos(position * inv_freq) * factor and the same of sin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ir.constants import Inline
from ir.graph import Graph, GraphEditor
from passes.evaluate import Interface, Sample, Subgraph, between, counting, interface
from passes.match import Elsewhere, Match, Op, Or, Pattern, Rule, Var, apply
from passes.raise_ops import transpose

# Two requests with positions in no order: a table that depends on the place in the sequence, or on its length, does not pass. The last position is tried large
# first, and smaller where the graph's tables end earlier.
_POSITIONS = np.array([[3, 0, 1, 2, 57, 12, 0], [1, 0, 9, 33, 40, 2, 61]])
_LARGEST = (131071, 40000, 8191, 2047, 511, 64)

# Angles are compared in float64, where a position times a float32 frequency is exact to 1e-11 at 131071.
_EXACT = 1e-9
# Tables that an exporter rounded to float32 carry the rounding of the angle (relative 2^-23, so up to position * 2^-23) and of the cosine itself.
_ROUNDED = 2.0**-23


@dataclass(frozen=True)
class Angles:
    """What a pair of cos and sin values holds.

    Attributes:
        inv_freq: float32 [head_dim / 2].
        factor: what cos and sin are multiplied by.
        head_axis: the axis of size 1 that stands for the heads in a 4-D table: 1 or 2; 0 in a table without one.
    """

    inv_freq: np.ndarray
    factor: float
    head_axis: int


class Tables:
    """Finds the angles behind pairs of values, once per pair."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.roles: Interface = interface(graph)
        self._known: dict[tuple[str, str, int, str], Angles | str] = {}

    def angles(self, cos: str, sin: str, half: int, positions: str = "") -> Angles | str:
        """The angles, or the reason why there are none.

        Args:
            half: head_dim / 2.
            positions: where ``cos`` and ``sin`` are tables [max, half], the value that indexes their rows.
        """
        key = (cos, sin, half, positions)
        if key not in self._known:
            self._known[key] = self._find(cos, sin, half, positions)
        return self._known[key]

    def _find(self, cos: str, sin: str, half: int, positions: str) -> Angles | str:
        sub = Subgraph(self.graph, [cos, sin, *([positions] if positions else [])])
        if sub.unknown_constant:
            return f"{cos} and {sin} depend on weight {sub.unknown_constant}, not on positions only"
        if not self.roles.positions or self.roles.positions not in sub.inputs:
            return f"{cos} and {sin} do not depend on an input of positions (inputs: {', '.join(sorted(sub.inputs)) or 'none'})"
        found: Angles | str | None = None
        # Twice, so that frequencies which change with the largest position (dynamic scaling) are found out.
        for largest in (_LARGEST, (_POSITIONS.max(),)):
            run = self._run(sub, largest)
            if run is None:
                return f"{cos} and {sin} cannot be evaluated on sample positions"
            one = self._fit(sub.graph, *run, half)
            if isinstance(one, str):
                return f"{cos} and {sin} are no rotary angles: {one}"
            if isinstance(found, Angles) and (
                not np.array_equal(found.inv_freq, one.inv_freq) or found.factor != one.factor
            ):
                return f"{cos} and {sin} change their frequencies with the largest position (dynamic scaling)"
            found = one
        assert found is not None
        return found

    def _run(self, sub: Subgraph, largest) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        for last in largest:
            positions = _POSITIONS.copy()
            positions[1, -1] = last
            batch, new = positions.shape
            sample = Sample(batch, new, 0, np.ones(positions.shape, np.int64), positions)
            results = sub.run(sample.arrays(sub.graph, self.roles))
            if results is None:
                continue
            cos, sin = results[:2]
            if len(results) == 3:
                rows = results[2].astype(np.int64)
                if rows.max() >= len(cos):
                    continue
                cos, sin = cos[rows], sin[rows]
            return cos, sin, positions
        return None

    def _fit(self, graph: Graph, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, half: int) -> Angles | str:
        if cos.shape != sin.shape:
            return f"their shapes differ: {list(cos.shape)} and {list(sin.shape)}"
        batch, new = positions.shape
        head_axis = {(batch, 1, new): 1, (batch, new, 1): 2, (batch, new): 0}.get(cos.shape[:-1])
        if head_axis is None or cos.shape[-1] not in (half, 2 * half):
            return f"their shape on a sample of positions [{batch}, {new}] is {list(cos.shape)}"
        cos, sin = cos.reshape(batch, new, -1), sin.reshape(batch, new, -1)
        if cos.shape[-1] == 2 * half:
            if not (
                np.array_equal(cos[..., :half], cos[..., half:]) and np.array_equal(sin[..., :half], sin[..., half:])
            ):
                return "their two halves differ"
            cos, sin = cos[..., :half], sin[..., :half]
        radius = np.hypot(cos, sin)
        factor = float(radius.flat[0])
        if not np.allclose(radius, factor, rtol=4 * _ROUNDED, atol=0) or factor == 0:
            return "cos^2 + sin^2 is not the same everywhere"
        # A factor is a float32 in the graph, or one: what differs less than float32 can tell is its rounding.
        factor = 1.0 if abs(factor - 1) < 4 * _ROUNDED else float(np.float32(factor))
        for frequencies, tolerance in self._candidates(graph, cos, sin, positions, half):
            angles = positions[..., None] * frequencies.astype(np.float64)
            bound = _EXACT if tolerance == 0 else tolerance * (np.abs(angles) + 4)
            if (np.abs(cos / factor - np.cos(angles)) <= bound).all() and (
                np.abs(sin / factor - np.sin(angles)) <= bound
            ).all():
                return Angles(frequencies, factor, head_axis)
        return "they are not cos and sin of position * frequency"

    def _candidates(self, graph: Graph, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, half: int):
        """Frequencies to try: the float32 constants that the graph has, then what the angle at position 1 says; with the tolerance that each deserves."""
        constants = [c.data.array for c in graph.constants.values() if isinstance(c.data, Inline)]
        for array in constants:
            if array.dtype.kind == "f" and array.size in (half, 2 * half):
                flat = array.astype(np.float32).reshape(-1)
                if array.size == half or np.array_equal(flat[:half], flat[half:]):
                    yield flat[:half].copy(), 0
        for frequencies in [
            c.astype(np.float32).reshape(-1)[:half].copy()
            for c in constants
            if c.dtype.kind == "f" and c.size in (half, 2 * half)
        ]:
            yield frequencies, _ROUNDED
        at_one = np.argwhere(positions == 1)[0]
        frequencies = np.arctan2(sin[tuple(at_one)], cos[tuple(at_one)]).astype(np.float32)
        if (frequencies >= 0).all():
            yield frequencies, _ROUNDED


class _Rope(Rule):
    required = True

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def _half(self, match: Match) -> int | None:
        shape = match.type("x").shape
        return shape[-1] // 2 if len(shape) == 4 and isinstance(shape[-1], int) and shape[-1] % 2 == 0 else None

    def _angles(self, match: Match, half: int, positions: str = "") -> str | None:
        angles = self.tables.angles(match["cos"], match["sin"], half, positions)
        if isinstance(angles, str):
            return angles
        match.facts["angles"] = angles
        where = match.graph.type(self.tables.roles.positions).shape
        shape = match.type("x").shape
        rows = (shape[0], shape[1 if angles.head_axis == 2 else 2]) if len(shape) == 4 else shape[:2]
        return None if where == rows else f"positions are [{', '.join(map(str, where))}], x is {match.type('x')}"

    def _emit(self, match: Match, editor: GraphEditor, x: str, interleaved: bool = False) -> str:
        """rope of x [B, S, H, D]."""
        angles: Angles = match.facts["angles"]
        inv_freq = editor.constant("inv_freq", Inline(angles.inv_freq))
        attrs = {"attention_factor": angles.factor, "interleaved": interleaved}
        return editor.add(
            "rope", [x, self.tables.roles.positions, inv_freq], [f"{match.output}.rope"], attrs, origin=match.origin
        )[0]


class RotateHalf(_Rope):
    """x * cos + concat(-x2, x1) * sin, or its halves computed apart and joined."""

    name = "rope"

    def pattern(self) -> Pattern:
        x, cos, sin, a, b = (Var(n) for n in ("x", "cos", "sin", "a", "b"))
        turned = Op("Concat", Op("Neg", Var("second")), Var("first"), bind="turned")
        whole = Op("Add", Op("Mul", x, cos), Op("Mul", turned, sin))
        first = Op("Sub", Op("Mul", a, cos), Op("Mul", b, sin))
        second = Op("Add", Op("Mul", b, cos), Op("Mul", a, sin))
        return Or(whole, Op("Concat", first, second, bind="halves"))

    def check(self, match: Match) -> str | None:
        if "halves" in match.bound:
            node = match.graph.producers.get(match["a"])
            if node is None or not node.inputs:
                return Elsewhere("its halves are inputs")
            match.values["x"] = node.inputs[0]
        half = self._half(match)
        if half is None:
            return Elsewhere(f"{match['x']} is {match.type('x')}, not [.., .., .., head_dim]")
        wrong = self._wrong_halves(match, half)
        return wrong or self._angles(match, half)

    def _wrong_halves(self, match: Match, half: int) -> str | None:
        graph, x = match.graph, match["x"]
        sample = counting(graph, x)
        one, two = sample[..., :half], sample[..., half:]
        if "halves" in match.bound:
            wanted = {match["a"]: one, match["b"]: two}
        else:
            wanted = {match.bound["turned"].output: np.concatenate([-two, one], axis=-1)}
        for name, array in wanted.items():
            found = between(graph, x, name, sample)
            if found is None or not np.array_equal(found, array):
                return Elsewhere(f"{name} is not the halves of {x} swapped")
        return None

    def rewrite(self, match: Match, editor: GraphEditor) -> str:
        if match.facts["angles"].head_axis == 2:
            return self._emit(match, editor, match["x"])
        return transpose(editor, self._emit(match, editor, transpose(editor, match["x"])), hint=match.output)


class RotaryEmbedding(_Rope):
    """The op of opset 23: x [B, H, S, D] or [B, S, H * D]."""

    name = "rope"

    def pattern(self) -> Pattern:
        x, cos, sin = Var("x"), Var("cos"), Var("sin")
        return Or(
            Op("RotaryEmbedding", x, cos, sin, bind="op"),
            Op("RotaryEmbedding", x, cos, sin, Var("positions"), bind="op"),
        )

    def check(self, match: Match) -> str | None:
        attrs, x = match.bound["op"].attrs, match.type("x")
        heads = attrs.get("num_heads", 0)
        width = x.shape[-1]
        if x.rank == 3:
            if not heads or not isinstance(width, int) or width % heads:
                return f"x is {x} and num_heads is {heads}"
            width //= heads
        if not isinstance(width, int) or width % 2:
            return f"head_dim is {width}"
        if attrs.get("rotary_embedding_dim", 0) not in (0, width):
            return f"it turns {attrs['rotary_embedding_dim']} of {width} elements of a head; all are expected"
        match.facts["width"] = width
        return self._angles(match, width // 2, match["positions"] if "positions" in match else "")

    def rewrite(self, match: Match, editor: GraphEditor) -> str:
        interleaved = bool(match.bound["op"].attrs.get("interleaved", 0))
        type_, x = match.type("x"), match["x"]
        if type_.rank == 4:
            return transpose(editor, self._emit(match, editor, transpose(editor, x), interleaved), hint=match.output)
        heads, width = match.bound["op"].attrs["num_heads"], match.facts["width"]
        split = editor.add("reshape", [x], [f"{x}.heads"], {"shape": (*type_.shape[:2], heads, width)})[0]
        y = self._emit(match, editor, split, interleaved)
        return editor.add("reshape", [y], [match.output], {"shape": type_.shape})[0]


def raise_rope(graph: Graph) -> tuple[Graph, int]:
    """Raise rotary embeddings whose angles are proven; a rotation by anything else is an UnsupportedError."""
    return apply(graph, rope_rules(graph))


def rope_rules(graph: Graph) -> list[Rule]:
    tables = Tables(graph)
    return [RotateHalf(tables), RotaryEmbedding(tables)]

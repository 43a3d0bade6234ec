"""A small declarative matcher: a rule is a pattern drawn as code, a check that answers "no, because ...", and a rewrite.

    class Silu(Rule):
        def pattern(self):
            x = Var("x")
            return Op("Mul", x, Op("Sigmoid", x))

        def rewrite(self, match, editor):
            return editor.add("silu", [match["x"]], ["silu"])

Variants live inside one pattern: operands of commutative ops match in either order, ``Or`` lists alternatives, ``maybe`` makes a unary op optional.
Names that start with a capital are ONNX ops. When nothing matched, ``explain`` gives the best partial match and what stopped it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ir.constants import Inline
from ir.errors import UnsupportedError
from ir.graph import Graph, GraphEditor, Node

COMMUTATIVE = {"onnx.Add", "onnx.Mul", "onnx.And", "onnx.Or", "add", "mul"}


_RAISED = {"onnx.Add": "add", "onnx.Mul": "mul"}


class Pattern:
    """Base of the pattern nodes."""


@dataclass(frozen=True)
class Var(Pattern):
    """Any value; the same name twice must be the same value."""

    name: str


@dataclass(frozen=True)
class Const(Pattern):
    """A constant, bound to ``name``. ``scalar``: of one element, its number known; ``value``: equal to this number after rounding to the constant's dtype."""

    name: str = ""
    scalar: bool = False
    value: float | None = None


class Op(Pattern):
    """A node of one of ``ops`` ("Mul" or "Mul|Div") whose operands match; ``output`` picks which of its results the value is, None any."""

    def __init__(
        self, ops: str, *operands: Pattern, bind: str = "", output: int | None = 0, more: bool = False
    ) -> None:
        names = [f"onnx.{o}" if o[:1].isupper() else o for o in ops.split("|")]
        # What is already raised on the way from one stage to the next is still a sum or a product.
        self.ops = (*names, *(_RAISED[n] for n in names if n in _RAISED))
        self.operands = operands
        self.bind = bind
        self.output = output
        self.more = more  # further operands are allowed

    def __repr__(self) -> str:
        return "|".join(o for o in self.ops if o not in _RAISED.values()) or "|".join(self.ops)


class Or(Pattern):
    """The first alternative that leads to a match of the whole."""

    def __init__(self, *alternatives: Pattern) -> None:
        self.alternatives = alternatives


def maybe(ops: str, inner: Pattern, *more: Pattern) -> Pattern:
    """``inner``, or an op on it."""
    return Or(Op(ops, inner, *more), inner)


def cast(inner: Pattern) -> Pattern:
    """``inner``, through a Cast or not."""
    return maybe("Cast", inner)


@dataclass(frozen=True)
class Match:
    """What a pattern bound: values and nodes by their names in the pattern; ``facts`` is what the check found out for the rewrite."""

    graph: Graph
    output: str
    values: dict[str, str]
    nodes: tuple[Node, ...]
    bound: Mapping[str, Node]
    facts: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def number(self, name: str) -> float:
        """The number of a scalar constant."""
        return float(scalar(self.graph, self.values[name]))  # type: ignore[arg-type]

    def type(self, name: str):
        return self.graph.type(self.values[name])

    @property
    def origin(self) -> list[str]:
        """The ONNX nodes that the match covers, in graph order."""
        return list(dict.fromkeys(o for n in reversed(self.nodes) for o in n.origin))


def array(graph: Graph, name: str) -> np.ndarray | None:
    """The values of an inline constant, else None."""
    constant = graph.constants.get(name)
    return constant.data.array if constant and isinstance(constant.data, Inline) else None


def scalar(graph: Graph, name: str) -> Any | None:
    """The number of an inline constant of one element, else None."""
    values = array(graph, name)
    return values.reshape(-1)[0].item() if values is not None and values.size == 1 else None


@dataclass(frozen=True)
class _State:
    values: Mapping[str, str]
    nodes: tuple[Node, ...]
    bound: Mapping[str, Node]


class Matcher:
    """Matches patterns against one graph, and remembers the deepest partial match."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.best: tuple[int, str] = (0, "")

    def match(self, pattern: Pattern, value: str) -> Iterator[Match]:
        """Every way in which the pattern matches at a value."""
        for state in self._walk(pattern, value, _State({}, (), {})):
            yield Match(self.graph, value, dict(state.values), state.nodes, state.bound)

    def _fail(self, state: _State, reason: Callable[[], str]) -> None:
        if len(state.nodes) > self.best[0]:
            self.best = (len(state.nodes), f"after {' <- '.join(n.op for n in state.nodes)}: {reason()}")

    def _describe(self, value: str) -> str:
        node = self.graph.producers.get(value)
        kind = f"{node.op} ->" if node else ("constant" if value in self.graph.constants else "input")
        return f"{kind} {value or '(absent)'}"

    def _walk(self, pattern: Pattern, value: str, state: _State) -> Iterator[_State]:
        if isinstance(pattern, Or):
            for alternative in pattern.alternatives:
                yield from self._walk(alternative, value, state)
        elif isinstance(pattern, Var):
            known = state.values.get(pattern.name)
            if known is None:
                yield _State({**state.values, pattern.name: value}, state.nodes, state.bound)
            elif known == value:
                yield state
            else:
                self._fail(state, lambda: f"{pattern.name} is {known} and {value}")
        elif isinstance(pattern, Const):
            reason = self._constant(pattern, value)
            if reason:
                self._fail(state, lambda: reason)
            else:
                yield _State({**state.values, pattern.name: value}, state.nodes, state.bound) if pattern.name else state
        else:
            assert isinstance(pattern, Op)
            yield from self._operation(pattern, value, state)

    def _constant(self, pattern: Const, value: str) -> str:
        if value not in self.graph.constants:
            return f"expected a constant{f' {pattern.name}' if pattern.name else ''}, found {self._describe(value)}"
        number = scalar(self.graph, value)
        if (pattern.scalar or pattern.value is not None) and number is None:
            return f"constant {value} is no single number"
        if pattern.value is not None:
            dtype = self.graph.constants[value].data.array.dtype  # type: ignore[union-attr]
            if number != np.asarray(pattern.value).astype(dtype).item():
                return f"expected the constant {pattern.value}, found {number} ({value})"
        return ""

    def _operation(self, pattern: Op, value: str, state: _State) -> Iterator[_State]:
        node = self.graph.producers.get(value)
        if node is None or node.op not in pattern.ops:
            self._fail(state, lambda: f"expected {pattern}, found {self._describe(value)}")
            return
        if pattern.output is not None and node.outputs[pattern.output].name != value:
            self._fail(state, lambda: f"expected result {pattern.output} of {node.op}, found {value}")
            return
        bound = {**state.bound, pattern.bind: node} if pattern.bind else state.bound
        inside = _State(state.values, (*state.nodes, node), bound)
        inputs = list(node.inputs)
        while inputs and not inputs[-1] and len(inputs) > len(pattern.operands):
            inputs.pop()
        if len(inputs) < len(pattern.operands) or (len(inputs) > len(pattern.operands) and not pattern.more):
            self._fail(inside, lambda: f"{value} has {len(inputs)} operands, expected {len(pattern.operands)}")
            return
        orders = [inputs, inputs[::-1]] if node.op in COMMUTATIVE and len(inputs) == 2 else [inputs]
        for order in orders:
            yield from self._operands(pattern.operands, order, inside)

    def _operands(self, patterns: Sequence[Pattern], values: Sequence[str], state: _State) -> Iterator[_State]:
        if not patterns:
            yield state
            return
        for after in self._walk(patterns[0], values[0], state):
            yield from self._operands(patterns[1:], values[1:], after)


class Elsewhere(str):
    """A check's answer that says: the pattern does not apply here at all (operands taken the wrong way round, say)."""


class Rule:
    """One rewrite. ``required``: where the pattern matches, no other rule can help, so that a failing check is an UnsupportedError."""

    name = ""
    required = False

    def pattern(self) -> Pattern:
        """The subgraph, seen from its last value."""
        raise NotImplementedError

    def check(self, match: Match) -> str | None:
        """None where the rule may fire, else the reason why not. May leave what it found out in ``match.facts``."""
        return None

    def rewrite(self, match: Match, editor: GraphEditor) -> str | Mapping[str, str]:
        """Add the new nodes; return the value that stands for the matched one, or a mapping from old values to new ones."""
        raise NotImplementedError


def roots(pattern: Pattern) -> set[str]:
    """The ops that a match can end with."""
    if isinstance(pattern, Or):
        return set().union(*(roots(p) for p in pattern.alternatives))
    return set(pattern.ops) if isinstance(pattern, Op) else set()


def apply(graph: Graph, rules: Sequence[Rule], **finish: Any) -> tuple[Graph, int]:
    """One sweep of rules over a graph, in order; at each value the first rule that fires wins.

    Returns the graph and how many matches there were.

    Raises:
        UnsupportedError: a required rule's pattern matched, but its check says no.
    """
    matcher, editor, count = Matcher(graph), GraphEditor(graph), 0
    table: list[tuple[Rule, Pattern, set[str]]] = []
    for rule in rules:
        pattern = rule.pattern()
        table.append((rule, pattern, roots(pattern)))
    taken: set[str] = set()
    for node in graph.nodes:
        for rule, pattern, ends in table:
            if node.op in ends and node.output not in taken and _fire(rule, pattern, node, matcher, editor, taken):
                count += 1
                break
    return (editor.finish(**finish), count) if count else (graph, 0)


def _fire(rule: Rule, pattern: Pattern, node: Node, matcher: Matcher, editor: GraphEditor, taken: set[str]) -> bool:
    refusal = ""
    for value in node.outputs:
        for match in matcher.match(pattern, value.name) if value.name else ():
            reason = rule.check(match)
            if reason:
                refusal = refusal if isinstance(reason, Elsewhere) else reason
                continue
            result = rule.rewrite(match, editor)
            changes = {value.name: result} if isinstance(result, str) else result
            for old, new in changes.items():
                editor.replace(old, new)
            taken.update(changes)
            return True
    if refusal and rule.required:
        where = " ; ".join(node.origin) or node.output
        raise UnsupportedError(f"{rule.name} at {where}: {refusal}")
    return False


def explain(graph: Graph, rules: Sequence[Rule], values: Sequence[str]) -> str:
    """Why no rule fired at these values: the check's answer or the failure that most nodes had been matched for; of equals, one that names the first value."""
    best: tuple[int, bool, str] = (0, False, "")
    for value in values:
        node = graph.producers.get(value)
        for rule in rules:
            pattern = rule.pattern()
            if node is None or node.op not in roots(pattern):
                continue
            matcher = Matcher(graph)
            found = []
            for match in matcher.match(pattern, value):
                reason = rule.check(match)
                if reason:
                    found.append((len(match.nodes) + 1, f"no, because {reason}"))
            for depth, text in [*found, matcher.best]:
                if (depth, values[0] in text) > best[:2]:
                    best = (depth, values[0] in text, f"{rule.name} at {value}: {text}")
    return best[2]

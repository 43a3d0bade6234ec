"""Fusions at stage "fused". Each is optional: without it the graph computes the same with more calls."""

from __future__ import annotations

from dataclasses import replace

from ir.constants import Cast, Concat, ConstData
from ir.graph import Constant, Graph, GraphEditor, Node, Value
from ir.optable import infer
from ir.types import DTYPES, TensorType
from passes.fold import converted
from passes.match import Const, Match, Op, Or, Pattern, Rule, Var, apply


def _only_reader(graph: Graph, value: str, reader: str) -> bool:
    """Is a value read by the node that computes ``reader``, and by nothing else?"""
    readers = graph.consumers[value]
    return len(readers) == 1 and readers[0] is graph.producers.get(reader) and value not in graph.outputs


class Swiglu(Rule):
    """up * silu(gate)."""

    name = "swiglu"

    def pattern(self) -> Pattern:
        return Op("mul", Op("silu", Var("gate"), bind="silu"), Var("up"))

    def check(self, match: Match) -> str | None:
        act = match.bound["silu"].output
        if match["up"] == act:
            return "silu's result is multiplied by itself"
        return None if _only_reader(match.graph, act, match.output) else f"{act} is read elsewhere too"

    def rewrite(self, match: Match, editor: GraphEditor) -> str:
        return editor.add("swiglu", [match["up"], match["gate"]], [match.output], origin=match.origin)[0]


class AddRmsNorm(Rule):
    """A sum and the norm of it; the sum may have other readers."""

    name = "add_rms_norm"

    def pattern(self) -> Pattern:
        return Op("rms_norm", Op("add", Var("a"), Var("b"), bind="add"), Const("w"), bind="norm")

    def check(self, match: Match) -> str | None:
        graph, total = match.graph, match.bound["add"].output
        first = next(n for n in graph.consumers[total] if n.op == "rms_norm")
        return None if first is match.bound["norm"] else f"{total} is normalised by {first.output} already"

    def rewrite(self, match: Match, editor: GraphEditor) -> dict[str, str]:
        total = match.bound["add"].output
        attrs = {"epsilon": match.bound["norm"].attrs["epsilon"]}
        a, b = match.bound["add"].inputs
        y, s = editor.add("add_rms_norm", [a, b, match["w"]], [match.output, total], attrs, origin=match.origin)
        return {match.output: y, total: s}


class NormRope(Rule):
    """rope of a per-head norm that nothing else reads."""

    name = "norm_rope"

    def pattern(self) -> Pattern:
        return Op(
            "rope", Op("rms_norm", Var("x"), Const("w"), bind="norm"), Var("positions"), Var("inv_freq"), bind="rope"
        )

    def check(self, match: Match) -> str | None:
        norm = match.bound["norm"]
        return None if _only_reader(match.graph, norm.output, match.output) else f"{norm.output} is read elsewhere too"

    def rewrite(self, match: Match, editor: GraphEditor) -> str:
        operands = [match["x"], match["w"], match["positions"], match["inv_freq"]]
        attrs = {"epsilon": match.bound["norm"].attrs["epsilon"], **match.bound["rope"].attrs}
        return editor.add("norm_rope", operands, [match.output], attrs, origin=match.origin)[0]


def _merged(match: Match, editor: GraphEditor, linears: list[Node], hint: str, module: str) -> dict[str, str]:
    """One linear for several of one input, and a split of its result."""
    graph = match.graph

    def joined(i: int, what: str) -> str:
        parts: list[ConstData] = [graph.constants[n.inputs[i]].data for n in linears]
        return editor.constant(_weight_name(graph, linears[0].inputs[i], module, what), Concat(tuple(parts), 0))

    operands = [linears[0].inputs[0], joined(1, "weight")]
    if len(linears[0].inputs) > 2:
        operands.append(joined(2, "bias"))
    origin = [o for n in linears for o in n.origin]
    whole = editor.add("linear", operands, [hint], origin=origin)[0]
    sizes = tuple(n.outputs[0].type.shape[-1] for n in linears)
    names = [n.output for n in linears]
    axis = linears[0].outputs[0].type.rank - 1
    parts = editor.add("split", [whole], names, {"axis": axis, "sizes": sizes})
    return dict(zip(names, parts))


def _weight_name(graph: Graph, first: str, module: str, what: str) -> str:
    """``...layers.0.self_attn.q_proj.weight`` -> ``...layers.0.self_attn.qkv_proj.weight``."""
    parts = first.split(".")
    return ".".join([*parts[:-2], module, what]) if len(parts) > 2 else f"{first}.{module}.{what}"


def _suffix(name: str) -> str:
    """``q.3`` -> ``.3``."""
    return f".{name.rsplit('.', 1)[1]}" if "." in name and name.rsplit(".", 1)[1].isdigit() else ""


def _unmergeable(graph: Graph, linears: list[Node]) -> str | None:
    """Why linears cannot become one."""
    inputs = dict.fromkeys(n.inputs[0] for n in linears)
    if len(inputs) > 1:
        return f"their inputs differ: {', '.join(inputs)}"
    outputs = [n.output for n in linears]
    twice = next((o for o in outputs if outputs.count(o) > 1), None)
    if twice is not None:
        return f"{twice} is used twice"
    if len({len(n.inputs) for n in linears}) > 1:
        return "some have a bias and some have none"
    for i in range(1, len(linears[0].inputs)):
        names = [n.inputs[i] for n in linears]
        if any(n not in graph.constants for n in names):
            return "a weight is computed"
        dtypes = dict.fromkeys(graph.type(n).dtype for n in names)
        if len(dtypes) > 1:
            return f"their weights' dtypes differ: {', '.join(dtypes)}"
    if any(n.output in graph.outputs for n in linears):
        return "one of them is an output of the graph"
    return None


class MergeQkv(Rule):
    """Three linears of one input that lead to query, key and value of one attention."""

    name = "qkv"

    def pattern(self) -> Pattern:
        return Op("attention|attention_cached", Var("q"), Var("k"), Var("v"), more=True)

    def check(self, match: Match) -> str | None:
        linears = [_projection(match.graph, match[name]) for name in "qkv"]
        match.facts["linears"] = found = [n for n in linears if n is not None]
        if len(found) < 3:
            return f"{match['qkv'[linears.index(None)]]} does not come from a linear through norm, rope and reshape"
        return _unmergeable(match.graph, found)

    def rewrite(self, match: Match, editor: GraphEditor) -> dict[str, str]:
        linears: list[Node] = match.facts["linears"]
        return _merged(match, editor, linears, f"qkv{_suffix(linears[0].output)}", "qkv_proj")


def _projection(graph: Graph, value: str) -> Node | None:
    node = graph.producers.get(value)
    while node is not None and node.op in ("rope", "rms_norm", "norm_rope", "reshape"):
        node = graph.producers.get(node.inputs[0])
    return node if node is not None and node.op == "linear" else None


class MergeGateUp(Rule):
    """The two linears of a gated feed-forward, gate first."""

    name = "gate_up"

    def pattern(self) -> Pattern:
        gate = Op("linear", Var("x"), Const("gate_w"), bind="gate", more=True)
        up = Op("linear", Var("y"), Const("up_w"), bind="up", more=True)
        return Or(Op("swiglu", up, gate), Op("mul", Op("silu", gate), up))

    def check(self, match: Match) -> str | None:
        return _unmergeable(match.graph, [match.bound["gate"], match.bound["up"]])

    def rewrite(self, match: Match, editor: GraphEditor) -> dict[str, str]:
        gate, up = match.bound["gate"], match.bound["up"]
        return _merged(match, editor, [gate, up], f"gate_up{_suffix(gate.output)}", "gate_up_proj")


RULES: dict[str, type[Rule]] = {
    "fuse_swiglu": Swiglu,
    "merge_qkv": MergeQkv,
    "merge_gate_up": MergeGateUp,
    "fuse_add_rms_norm": AddRmsNorm,
    "fuse_norm_rope": NormRope,
}


def fuse_with(name: str):
    """The pass of one entry of RULES."""

    def run(graph: Graph) -> tuple[Graph, int]:
        return apply(graph, [RULES[name]()])

    return run


# --- retype ---------------------------------------------------------------------------------------------------------------------------------------


# Operands that stay as they are: rotary frequencies are float32 on every device.
_KEPT = {"rope": 2, "norm_rope": 3}


def retype(dtype: str):
    """The pass that sets the dtype of activations, caches and weights of a fused graph; stored weights are converted by a ``Cast`` in their recipe."""

    def run(graph: Graph) -> tuple[Graph, int]:
        kept = {n.inputs[_KEPT[n.op]] for n in graph.nodes if n.op in _KEPT}
        changed = 0

        def convert(type_: TensorType) -> TensorType:
            return type_.with_dtype(dtype) if DTYPES[type_.dtype].is_float else type_

        inputs = tuple(Value(v.name, convert(v.type)) for v in graph.inputs)
        types = {v.name: v.type for v in inputs}
        constants: dict[str, Constant] = {}
        for name, constant in graph.constants.items():
            type_ = constant.value.type
            if name not in kept and DTYPES[type_.dtype].is_float and type_.dtype != dtype:
                constant = Constant(Value(name, convert(type_)), _converted(constant.data, dtype))
                changed += 1
            constants[name] = constant
            types[name] = constant.value.type
        nodes = []
        for node in graph.nodes:
            attrs = {**node.attrs, "dtype": dtype} if node.op == "embedding" else node.attrs
            results = infer(node.op, [types[i] if i else None for i in node.inputs], attrs)
            outputs = tuple(Value(v.name, t) for v, t in zip(node.outputs, results, strict=True))
            changed += outputs != node.outputs
            types.update({v.name: v.type for v in outputs})
            nodes.append(replace(node, attrs=attrs, outputs=outputs))
        return replace(graph, inputs=inputs, constants=constants, nodes=tuple(nodes)), changed

    return run


def _converted(data: ConstData, dtype: str) -> ConstData:
    """A Cast around the whole, so that parts of a merged weight stay visible inside of it."""
    return converted(data, dtype) if isinstance(data, Cast) else Cast(data, dtype)

"""Raising single ops from stage "onnx" to stage "model": linear, rms_norm, silu, embedding, and what needs no recognising."""

from __future__ import annotations

from ir.constants import FileSlice, Inline
from ir.graph import Graph, GraphEditor
from ir.types import DTYPES, TensorType, dim_product
from passes.fold import transposed, unwidened
from passes.match import Const, Elsewhere, Match, Op, Or, Pattern, Rule, Var, apply, cast


def _weight(match: Match, name: str, editor: GraphEditor, swap: bool = False) -> str:
    """A weight as a model-stage op takes it: in its stored dtype, [out, in] where ``swap`` says that it is [in, out]."""
    constant = match.graph.constants[match[name]]
    data = unwidened(transposed(constant.data, (1, 0)) if swap else constant.data)
    leaf = data
    while not isinstance(leaf, (FileSlice, Inline)):
        leaf = leaf.parts[0] if hasattr(leaf, "parts") else leaf.part
    return editor.constant(leaf.name if isinstance(leaf, FileSlice) else constant.name, data)


def _rank(match: Match, name: str) -> int:
    return match.type(name).rank


class Linear(Rule):
    """MatMul with a constant matrix, and a constant vector added to it."""

    name = "linear"

    def pattern(self) -> Pattern:
        product = Op("MatMul", Var("x"), Const("w"))
        return Or(Op("Add", product, Const("bias")), product)

    def check(self, match: Match) -> str | None:
        if _rank(match, "w") != 2:
            return f"{match['w']} is {match.type('w')}, not a matrix"
        if "bias" in match:
            return (
                None
                if match.type("bias").shape == match.type("w").shape[1:]
                else f"what is added is {match.type('bias')}, not one number per feature"
            )
        return Elsewhere("it has a bias") if _biased(match) else None

    def rewrite(self, match: Match, editor: GraphEditor) -> str:
        operands = [match["x"], _weight(match, "w", editor, swap=True)]
        if "bias" in match:
            operands.append(_weight(match, "bias", editor))
        return editor.add("linear", operands, [match.output], origin=match.origin)[0]


def _biased(match: Match) -> bool:
    """Will the Add that reads this product be raised with it?"""
    readers = match.graph.consumers[match.output]
    if len(readers) != 1 or readers[0].op != "onnx.Add" or match.output in match.graph.outputs:
        return False
    other = [i for i in readers[0].inputs if i != match.output]
    return (
        len(other) == 1
        and other[0] in match.graph.constants
        and match.graph.type(other[0]).shape == match.type("w").shape[1:]
    )


class Gemm(Rule):
    """Gemm with a constant matrix."""

    name = "linear"

    def pattern(self) -> Pattern:
        return Or(
            Op("Gemm", Var("x"), Const("w"), Const("bias"), bind="gemm"), Op("Gemm", Var("x"), Const("w"), bind="gemm")
        )

    def check(self, match: Match) -> str | None:
        attrs = match.bound["gemm"].attrs
        if attrs.get("transA") or attrs.get("alpha", 1.0) != 1.0 or ("bias" in match and attrs.get("beta", 1.0) != 1.0):
            return "Gemm has transA, alpha or beta"
        if "bias" in match and _rank(match, "bias") != 1:
            return f"the bias is {match.type('bias')}, not one number per feature"
        return None

    def rewrite(self, match: Match, editor: GraphEditor) -> str:
        swap = not match.bound["gemm"].attrs.get("transB")
        operands = [match["x"], _weight(match, "w", editor, swap)]
        if "bias" in match:
            operands.append(_weight(match, "bias", editor))
        return editor.add("linear", operands, [match.output], origin=match.origin)[0]


class RmsNorm(Rule):
    """x / sqrt(mean(x^2) + epsilon) * w in all its spellings; the middle may be in a wider dtype."""

    name = "rms_norm"

    def pattern(self) -> Pattern:
        x = cast(Var("x"))
        square = Or(Op("Pow", x, Const(value=2.0)), Op("Mul", x, x))
        variance = Op("Add", Op("ReduceMean", square, bind="mean", more=True), Const("epsilon", scalar=True))
        root = Op("Sqrt", variance)
        inverse = Or(Op("Reciprocal", root), Op("Div", Const(value=1.0), root), Op("Pow", variance, Const(value=-0.5)))
        normalised = Or(Op("Mul", x, inverse), Op("Div", x, root))
        return Op("Mul", Const("w"), cast(normalised))

    def check(self, match: Match) -> str | None:
        x, mean = match.type("x"), match.bound["mean"].outputs[0].type
        if mean.shape != (*x.shape[:-1], 1):
            return f"the mean is not over the last axis: {mean} of {x}"
        return _norm_fits(match)

    def rewrite(self, match: Match, editor: GraphEditor) -> str:
        return _rms_norm(match, editor, match.number("epsilon"))


class RmsNormalization(Rule):
    """The op of opset 23."""

    name = "rms_norm"

    def pattern(self) -> Pattern:
        return Op("RMSNormalization", Var("x"), Const("w"), bind="norm")

    def check(self, match: Match) -> str | None:
        axis = match.bound["norm"].attrs.get("axis", -1)
        if axis not in (-1, _rank(match, "x") - 1):
            return f"it normalises from axis {axis} on, not the last one"
        return _norm_fits(match)

    def rewrite(self, match: Match, editor: GraphEditor) -> str:
        return _rms_norm(match, editor, float(match.bound["norm"].attrs.get("epsilon", 1e-5)))


def _norm_fits(match: Match) -> str | None:
    x, w, y = match.type("x"), match.type("w"), match.graph.type(match.output)
    if w.shape != x.shape[-1:]:
        return f"the weight is {w}, x is {x}"
    return None if y == x else f"it turns {x} into {y}"


def _rms_norm(match: Match, editor: GraphEditor, epsilon: float) -> str:
    operands = [match["x"], _weight(match, "w", editor)]
    return editor.add("rms_norm", operands, [match.output], {"epsilon": epsilon}, origin=match.origin)[0]


class Silu(Rule):
    """x * sigmoid(x), or x / (1 + e^-x)."""

    name = "silu"

    def pattern(self) -> Pattern:
        x = Var("x")
        denominator = Op("Add", Op("Exp", Op("Neg", x)), Const(value=1.0))
        return Or(Op("Mul", x, Op("Sigmoid", x)), Op("Div", x, denominator), Op("Swish", x, bind="swish"))

    def check(self, match: Match) -> str | None:
        alpha = match.bound["swish"].attrs.get("alpha", 1.0) if "swish" in match.bound else 1.0
        return None if alpha == 1.0 else f"Swish has alpha {alpha}"

    def rewrite(self, match: Match, editor: GraphEditor) -> str:
        return editor.add("silu", [match["x"]], [match.output], origin=match.origin)[0]


class Embedding(Rule):
    """Rows of a constant table by integer index, and the Cast after them."""

    name = "embedding"

    def pattern(self) -> Pattern:
        return cast(Op("Gather", Const("table"), Var("ids"), bind="gather"))

    def check(self, match: Match) -> str | None:
        table, gather = match.type("table"), match.bound["gather"]
        if table.rank != 2 or gather.attrs.get("axis", 0) != 0:
            return f"the table is {table}, by axis {gather.attrs.get('axis', 0)}: rows of a matrix are expected"
        if not DTYPES[table.dtype].is_float or not DTYPES[match.graph.type(match.output).dtype].is_float:
            return f"the table is {table}"
        if match.type("ids").dtype not in ("i32", "i64"):
            return f"the indices are {match.type('ids')}"
        readers = match.graph.consumers[match.output]
        cast_reads = readers and all(n.op == "onnx.Cast" and DTYPES[n.attrs["to"]].is_float for n in readers)
        return Elsewhere("a Cast reads it") if cast_reads and match.output == gather.output else None

    def rewrite(self, match: Match, editor: GraphEditor) -> str:
        dtype = match.graph.type(match.output).dtype
        return editor.add(
            "embedding",
            [match["ids"], _weight(match, "table", editor)],
            [match.output],
            {"dtype": dtype},
            origin=match.origin,
        )[0]


class Same(Rule):
    """Ops whose model-stage twin does the same: sum and product of equal shapes, product with a number, reshape, split."""

    name = "structure"

    def pattern(self) -> Pattern:
        x = Var("x")
        return Or(
            Op("Mul|Div", x, Const("factor", scalar=True), bind="scale"),
            Op("Add|Mul", x, Var("y"), bind="binary"),
            Op("Reshape|Squeeze|Unsqueeze|Flatten", x, bind="reshape", more=True),
            Op("Split", x, bind="split", more=True, output=None),
        )

    def check(self, match: Match) -> str | None:
        x, y = match.type("x"), match.graph.type(match.output)
        if not DTYPES[x.dtype].is_float:
            return f"{match['x']} is {x}"
        if "scale" in match.bound:
            if match.bound["scale"].op == "onnx.Div" and match.number("factor") == 0:
                return "it divides by zero"
            return None if x == y else f"it turns {x} into {y}"
        if "binary" in match.bound:
            return None if x == match.type("y") else f"its operands differ: {x} and {match.type('y')}"
        if "reshape" in match.bound:
            return None if dim_product(x.shape) == dim_product(y.shape) else f"its shape {y} is not known well enough"
        node = match.bound["split"]
        axis = node.attrs.get("axis", 0)
        return None if all(isinstance(v.type.shape[axis], int) for v in node.outputs) else "the sizes are not known"

    def rewrite(self, match: Match, editor: GraphEditor) -> str | dict[str, str]:
        node, x = match.nodes[0], match["x"]
        if "scale" in match.bound:
            factor = match.number("factor")
            value = factor if node.op == "onnx.Mul" else 1.0 / factor
            return editor.add("scale", [x], [match.output], {"value": value}, origin=match.origin)[0]
        if "binary" in match.bound:
            return editor.add(
                node.op.removeprefix("onnx.").lower(), [x, match["y"]], [match.output], origin=match.origin
            )[0]
        if "reshape" in match.bound:
            return editor.add(
                "reshape", [x], [match.output], {"shape": match.graph.type(match.output).shape}, origin=match.origin
            )[0]
        axis = node.attrs.get("axis", 0) % match.type("x").rank
        sizes = tuple(v.type.shape[axis] for v in node.outputs)
        names = [v.name for v in node.outputs]
        parts = editor.add("split", [x], names, {"axis": axis, "sizes": sizes}, origin=match.origin)
        return dict(zip(names, parts))


RULES: dict[str, tuple[type[Rule], ...]] = {
    "raise_linear": (Linear, Gemm),
    "raise_rms_norm": (RmsNorm, RmsNormalization),
    "raise_silu": (Silu,),
    "raise_embedding": (Embedding,),
    "raise_structure": (Same,),
}


def raise_with(name: str):
    """The pass of one entry of RULES."""

    def run(graph: Graph) -> tuple[Graph, int]:
        return apply(graph, [rule() for rule in RULES[name]])

    return run


def transpose(editor: GraphEditor, x: str, perm: tuple[int, ...] = (0, 2, 1, 3), hint: str = "") -> str:
    """An onnx.Transpose: rope and attention stand on other axes than ONNX's, and ``clean`` cancels what two neighbours add."""
    type_ = editor.type(x)
    result = TensorType(type_.dtype, tuple(type_.shape[p] for p in perm))
    return editor.add("onnx.Transpose", [x], [hint or f"{x}.t"], {"perm": perm}, [result])[0]

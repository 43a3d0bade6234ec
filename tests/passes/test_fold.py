"""Folding and cleaning: small cases, and random shape arithmetic against the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.constants import Cast, FileSlice, Inline, Slice, Transpose
from ir.graph import Graph
from ir.interp import run
from ir.text import parse
from ir.types import sym
from ir.verify import verify
from passes.fold import clean, converted, fold_constants, holds, transposed, unwidened
from passes.shapes import Shapes

FILE = 'file("m.safetensors", "w", bf16[6, 4], 128)'


def graph(body: str) -> Graph:
    return verify(parse(f"graph small @onnx {{\n{body}\n}}"))


def folded(body: str) -> Graph:
    return verify(fold_constants(graph(body))[0])


def cleaned(body: str) -> Graph:
    return verify(clean(graph(body))[0])


# --- recipes --------------------------------------------------------------------------------------------------------------------------------------

WEIGHT = FileSlice("m.safetensors", "w", "bf16", (6, 4), 128)


@pytest.mark.parametrize("order", [("Cast", "Transpose"), ("Transpose", "Cast")])
def test_weights_become_recipes_and_are_not_read(order):
    lines, shape, dtype, x = [f"input %x: f32[S, 4]\nconst %w: bf16[6, 4] = {FILE}"], [6, 4], "bf16", "w"
    for i, op in enumerate(order):
        shape, dtype = (shape[::-1], dtype) if op == "Transpose" else (shape, "f32")
        attrs = "{perm=(1, 0)}" if op == "Transpose" else "{to='f32'}"
        lines.append(f"%v{i}: {dtype}[{shape[0]}, {shape[1]}] = onnx.{op}(%{x}) {attrs}")
        x = f"v{i}"
    result = folded("\n".join([*lines, "%y: f32[S, 6] = onnx.MatMul(%x, %v1)\noutput %y"]))
    assert [n.op for n in result.nodes] == ["onnx.MatMul"]
    (constant,) = result.constants.values()
    assert unwidened(transposed(constant.data, (1, 0))) == WEIGHT


def test_a_packed_weight_is_sliced():
    body = f"const %w: bf16[6, 4] = {FILE}\nconst %n: i64[3] = inline(i64[3], 1, 2, 3)\n"
    body += (
        "%a: bf16[1, 4], %b: bf16[2, 4], %c: bf16[3, 4] = onnx.Split(%w, %n) {axis=0}\noutput %a\noutput %b\noutput %c"
    )
    result = folded(body)
    assert not result.nodes
    assert [result.constants[o].data for o in result.outputs] == [
        Slice(WEIGHT, 0, 0, 1),
        Slice(WEIGHT, 0, 1, 3),
        Slice(WEIGHT, 0, 3, 6),
    ]


def test_recipes_compose():
    assert transposed(transposed(WEIGHT, (1, 0)), (1, 0)) == WEIGHT
    assert transposed(Cast(WEIGHT, "f32"), (1, 0)) == Cast(Transpose(WEIGHT, (1, 0)), "f32")
    assert converted(Cast(WEIGHT, "f32"), "bf16") == WEIGHT  # widened and back
    assert converted(Cast(WEIGHT, "f32"), "f16") == Cast(WEIGHT, "f16")
    # Rounded to f16 in between: that must not be lost.
    assert converted(Cast(Cast(WEIGHT, "f16"), "f32"), "bf16") == Cast(Cast(WEIGHT, "f16"), "bf16")
    assert unwidened(Cast(WEIGHT, "f16")) == Cast(WEIGHT, "f16")


@pytest.mark.parametrize(
    "wide, narrow, yes",
    [
        ("f32", "bf16", True),
        ("f32", "f16", True),
        ("f16", "bf16", False),
        ("bf16", "f16", False),
        ("bf16", "f32", False),
        ("f32", "i64", False),
    ],
)
def test_which_dtype_holds_which(wide, narrow, yes):
    assert holds(wide, narrow) == yes


def test_small_arithmetic_is_evaluated():
    body = """const %theta: f32[] = inline(f32[], 10000.0)
const %i: f32[3] = inline(f32[3], 0.0, 0.5, 1.0)
input %x: f32[S, 3]
%p: f32[3] = onnx.Pow(%theta, %i)
%r: f32[3] = onnx.Reciprocal(%p)
%y: f32[S, 3] = onnx.Mul(%x, %r)
output %y"""
    result = folded(body)
    assert [n.op for n in result.nodes] == ["onnx.Mul"]
    data = result.constants[result.nodes[0].inputs[1]].data
    assert isinstance(data, Inline) and np.array_equal(
        data.array, 1 / np.power(np.float32(1e4), np.array([0, 0.5, 1], np.float32))
    )


# --- shapes ---------------------------------------------------------------------------------------------------------------------------------------


def test_a_computed_reshape_gets_a_constant_shape():
    body = """input %x: f32[B, S, 24]
const %zero: i64[] = inline(i64[], 0)
const %one: i64[] = inline(i64[], 1)
const %axis: i64[1] = inline(i64[1], 0)
const %rest: i64[2] = inline(i64[2], -1, 8)
%s: i64[3] = onnx.Shape(%x)
%b: i64[] = onnx.Gather(%s, %zero)
%t: i64[] = onnx.Gather(%s, %one)
%bb: i64[1] = onnx.Unsqueeze(%b, %axis)
%tt: i64[1] = onnx.Unsqueeze(%t, %axis)
%shape: i64[4] = onnx.Concat(%bb, %tt, %rest) {axis=0}
%y: f32[u0, u1, u2, 8] = onnx.Reshape(%x, %shape)
output %y"""
    result = folded(body)
    assert [n.op for n in result.nodes] == ["onnx.Reshape"]
    assert result.type("y").shape == (sym("B"), sym("S"), 3, 8)
    x = np.arange(2 * 5 * 24.0).reshape(2, 5, 24)
    assert np.array_equal(run(result, {"x": x})["y"], run(graph(body), {"x": x})["y"])


def test_sizes_are_asked_of_inputs():
    """The length of an activation is the length of the ids: the activation is then not needed for it."""
    body = f"""input %ids: i64[B, S]
const %w: bf16[6, 4] = {FILE}
const %one: i64[] = inline(i64[], 1)
const %zero: i64[] = inline(i64[], 0)
%x: bf16[B, S, 4] = onnx.Gather(%w, %ids)
%s: i64[3] = onnx.Shape(%x)
%n: i64[] = onnx.Gather(%s, %one)
%r: i64[u0] = onnx.Range(%zero, %n, %one)
output %r"""
    result = folded(body)
    assert "onnx.Gather" not in result.counts() and set(result.constants) == {"zero", "one", "axis_0"}
    assert np.array_equal(run(result, {"ids": np.zeros((2, 5), np.int64)})["r"], np.arange(5))


def test_past_and_sequence_add_up_to_the_masks_length():
    body = """input %ids: i64[B, S]
input %attention_mask: i64[B, N]
input %past: f32[B, 2, P, 4]
input %flat: f32[B, 2, 4*S]
const %shape: i64[4] = inline(i64[4], 0, 0, -1, 4)
%new: f32[B, 2, u1, 4] = onnx.Reshape(%flat, %shape)
%all: f32[B, 2, u0, 4] = onnx.Concat(%past, %new) {axis=2}
output %all"""
    assert folded(body).type("all").shape == (sym("B"), 2, sym("N"), 4)
    # Without a mask a name is made up, the same wherever the sum turns up.
    body = body.replace("input %attention_mask: i64[B, N]\n", "").replace("f32[B, 2, u0, 4]", "f32[B, 2, total, 4]")
    assert folded(body).type("all").shape == (sym("B"), 2, sym("total"), 4)


DIMS = st.sampled_from(["B", "S", "P", 1, 2, 3, 6])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_followed_shapes_are_right(data):
    """Random chains of moves: the shape that is followed, with numbers for its symbols, is the shape that comes out; so are the values of shape tensors."""
    sizes = {"B": 2, "S": 5, "P": 7}
    dims = data.draw(st.lists(DIMS, min_size=2, max_size=4))
    lines = [f"input %v0: f32[{', '.join(map(str, dims))}]"]
    rank, names = len(dims), ["v0"]
    for i in range(1, data.draw(st.integers(1, 5)) + 1):
        x = names[-1]
        unknown = lambda n, i=i: ", ".join(f"u{i}_{j}" for j in range(n))  # noqa: E731
        op = data.draw(st.sampled_from(["Transpose", "Unsqueeze", "Concat", "Reshape", "Expand", "Slice"]))
        if op == "Transpose":
            perm = data.draw(st.permutations(range(rank)))
            lines.append(f"%v{i}: f32[{unknown(rank)}] = onnx.Transpose(%{x}) {{perm=({', '.join(map(str, perm))},)}}")
        elif op == "Unsqueeze" and rank < 5:
            axis = data.draw(st.integers(0, rank))
            lines.append(f"const %c{i}: i64[1] = inline(i64[1], {axis})")
            rank += 1
            lines.append(f"%v{i}: f32[{unknown(rank)}] = onnx.Unsqueeze(%{x}, %c{i})")
        elif op == "Concat":
            lines.append(
                f"%v{i}: f32[{unknown(rank)}] = onnx.Concat(%{x}, %{x}) {{axis={data.draw(st.integers(0, rank - 1))}}}"
            )
        elif op == "Reshape":
            lines.append(f"const %c{i}: i64[2] = inline(i64[2], 0, -1)")
            rank = 2
            lines.append(f"%v{i}: f32[{unknown(2)}] = onnx.Reshape(%{x}, %c{i})")
        elif op == "Expand":
            lines.append(f"const %c{i}: i64[{rank}] = inline(i64[{rank}], {', '.join(['1'] * rank)})")
            lines.append(f"%v{i}: f32[{unknown(rank)}] = onnx.Expand(%{x}, %c{i})")
        else:
            axis = data.draw(st.integers(0, rank - 1))
            lines.append(
                f"const %a{i}: i64[1] = inline(i64[1], {axis})\nconst %s{i}: i64[1] = inline(i64[1], 0)\nconst %e{i}: i64[1] = inline(i64[1], 9223372036854775807)"
            )
            lines.append(f"%v{i}: f32[{unknown(rank)}] = onnx.Slice(%{x}, %s{i}, %e{i}, %a{i})")
        names.append(f"v{i}")
    lines.append(f"%shape: i64[{rank}] = onnx.Shape(%{names[-1]})")
    # Constants come before nodes in the text form's graphs; the parser takes them anywhere.
    g = graph("\n".join([*lines, f"output %{names[-1]}", "output %shape"]))
    x = np.zeros([d if isinstance(d, int) else sizes[d] for d in dims], np.float32)
    after = verify(fold_constants(g)[0])
    before_out, after_out = run(g, {"v0": x}), run(after, {"v0": x})
    for name in g.outputs:
        assert np.array_equal(before_out[name], after_out[name])
    followed = Shapes(g).types[names[-1]].shape
    for dim, size in zip(followed, before_out[names[-1]].shape, strict=True):
        if isinstance(dim, int):
            assert dim == size
        elif all(n in sizes for n in dim.names):
            assert dim.coef * np.prod([sizes[n] for n in dim.names]) == size


# --- clean ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "%y: f32[S, 4] = onnx.Identity(%r)",
        "%y: f32[S, 4] = onnx.Cast(%r) {to='f32'}",
        "%y: f32[S, 4] = onnx.Reshape(%r, %c)",
        "%y: f32[S, 4] = onnx.Transpose(%r) {perm=(0, 1)}",
        "%y: f32[S, 4] = onnx.Mul(%one, %r)",
        "%y: f32[S, 4] = onnx.Div(%r, %one)",
        "%y: f32[S, 4] = onnx.Add(%r, %nil)",
        "%t: f32[4, S] = onnx.Transpose(%r) {perm=(1, 0)}\n%y: f32[S, 4] = onnx.Transpose(%t) {perm=(1, 0)}",
        "%t: f64[S, 4] = onnx.Cast(%r) {to='f64'}\n%y: f32[S, 4] = onnx.Cast(%t) {to='f32'}",
    ],
)
def test_what_does_nothing_goes(line):
    head = "input %x: f32[S, 4]\nconst %c: i64[2] = inline(i64[2], 0, 4)\nconst %one: f32[] = inline(f32[], 1.0)\nconst %nil: f32[] = inline(f32[], 0.0)\n"
    result = cleaned(head + "%r: f32[S, 4] = onnx.Neg(%x)\n" + line + "\n%z: f32[S, 4] = onnx.Exp(%y)\noutput %z")
    assert [n.op for n in result.nodes] == ["onnx.Neg", "onnx.Exp"] and result.nodes[1].inputs == ("r",)


@pytest.mark.parametrize(
    "line",
    [
        "%t: f16[S, 4] = onnx.Cast(%r) {to='f16'}\n%y: f32[S, 4] = onnx.Cast(%t) {to='f32'}",  # it rounds
        "%y: f32[S, 4] = onnx.Div(%one, %r)",  # 1 / x
        "%y: f32[S, 4] = onnx.Sub(%nil, %r)",  # 0 - x
        "%y: f32[3, S, 4] = onnx.Mul(%r, %ones)\n",  # it broadcasts
        "%y: f32[4, S] = onnx.Reshape(%r, %c)",
    ],
)
def test_what_does_something_stays(line):
    head = "input %x: f32[S, 4]\nconst %c: i64[2] = inline(i64[2], 4, -1)\nconst %one: f32[] = inline(f32[], 1.0)\nconst %nil: f32[] = inline(f32[], 0.0)\n"
    head += "const %ones: f32[3, 1, 1] = inline(f32[3, 1, 1], 1.0, 1.0, 1.0)\n"
    result = cleaned(head + "%r: f32[S, 4] = onnx.Neg(%x)\n" + line + "\noutput %y")
    assert len(result.nodes) == 1 + line.strip().count("\n") + 1


def test_equal_things_are_computed_once():
    body = """input %x: f32[S, 4]
const %a: f32[] = inline(f32[], 0.5)
const %b: f32[] = inline(f32[], 0.5)
%y: f32[S, 4] = onnx.Mul(%x, %a)
%z: f32[S, 4] = onnx.Mul(%x, %b)
%w: f32[S, 4] = onnx.Add(%y, %z)
%s: f32[S, 4] = onnx.Softmax(%w) {axis=0}
%t: f32[S, 4] = onnx.Softmax(%w) {axis=1}
%u: f32[S, 4] = onnx.Sub(%s, %t)
output %u"""
    result = cleaned(body)
    assert result.counts() == {"onnx.Softmax": 2, "onnx.Add": 1, "onnx.Mul": 1, "onnx.Sub": 1}
    assert len(result.constants) == 1


def test_outputs_keep_their_names():
    body = "input %x: f32[S, 4]\n%r: f32[S, 4] = onnx.Neg(%x)\n%y: f32[S, 4] = onnx.Identity(%r)\n%z: f32[S, 4] = onnx.Identity(%x)\noutput %y\noutput %z"
    result = cleaned(body)
    assert result.outputs == ("y", "z") and result.counts() == {"onnx.Identity": 1, "onnx.Neg": 1}

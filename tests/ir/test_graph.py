"""Graphs, the editor, the verifier and the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

from ir.constants import Inline
from ir.errors import GraphError
from ir.graph import Graph, GraphEditor, Node, Value, rename, toposort
from ir.interp import run
from ir.text import parse
from ir.types import TensorType, sym
from ir.verify import verify

BODY = """input %x: f32[S, 4]
const %w: f32[4] = inline(f32[4], 1.0, 2.0, 3.0, 4.0)
%n: f32[S, 4] = rms_norm(%x, %w) {epsilon=1e-06}
%s: f32[S, 4] = silu(%n)
%y: f32[S, 4] = add(%s, %x)
output %y"""


def graph(body: str = BODY, stage: str = "model") -> Graph:
    return parse(f"graph g @{stage} {{\n{body}\n}}")


# --- editor ---------------------------------------------------------------------------------------------------------------------------------------


def test_replacing_prunes_and_keeps_the_outputs_names():
    editor = GraphEditor(graph())
    new = editor.add("mul", ["s", "s"], ["y"])[0]
    assert new == "y_1"
    editor.replace("y", new)
    after = verify(editor.finish())
    assert after.outputs == ("y",) and after.producers["y"].op == "mul" and "add" not in after.counts()
    editor = GraphEditor(graph())
    editor.replace("s", "x")
    after = verify(editor.finish())
    assert after.counts() == {"add": 1} and not after.constants


def test_replacements_chain_and_never_circle():
    editor = GraphEditor(graph())
    editor.replace("n", "s")
    editor.replace("s", "x")
    assert editor.resolve("n") == "x"
    editor.replace("x", "n")
    with pytest.raises(GraphError, match="by itself"):
        editor.resolve("n")


def test_constants_are_shared():
    editor = GraphEditor(graph())
    assert editor.constant("v", Inline(np.array([1, 2, 3, 4], np.float32))) == "w"
    first = editor.constant("v", Inline(np.array([5.0])))
    assert editor.constant("other", Inline(np.array([5.0]))) == first == "v"
    assert editor.constant("w", Inline(np.array([6.0]))) == "w_1"


def test_many_constants_take_no_time_each():
    """Not quadratic: 20000 additions among 20000 constants would be 2e8 comparisons."""
    editor = GraphEditor(graph())
    names = {editor.constant("c", Inline(np.array([i]))) for i in range(20000)}
    assert len(names) == 20000 and editor.constant("c", Inline(np.array([77]))) in names


def test_fresh_names_come_back():
    """A value that takes the place of another takes its name, where that has become free."""
    editor = GraphEditor(graph())
    new = editor.add("scale", ["n"], ["s"], {"value": 2.0})[0]
    editor.replace("s", new)
    after = editor.finish()
    assert after.producers["s"].op == "scale"
    kept = GraphEditor(graph())
    kept.replace("y", kept.add("mul", ["s", kept.add("scale", ["n"], ["s"], {"value": 2.0})[0]], ["y"])[0])
    after = verify(kept.finish())
    assert after.producers["s"].op == "silu" and after.producers["s_1"].op == "scale"


def test_the_order_is_restored_and_cycles_are_found():
    a, b, c = (
        Node("silu", (i,), (Value(o, TensorType("f32", (4,))),)) for i, o in (("x", "a"), ("a", "b"), ("b", "c"))
    )
    assert toposort([c, a, b], ["c"], "g") == [a, b, c]
    assert toposort([a, b, c], ["b"], "g") == [a, b]
    loop = Node("silu", ("c",), (Value("a", TensorType("f32", (4,))),))
    with pytest.raises(GraphError, match="depends on itself"):
        toposort([loop, b, c], ["c"], "g")


def test_rename():
    after = verify(rename(graph(), {"x": "in", "w": "weight", "n": "normed", "y": "out"}))
    assert [v.name for v in after.inputs] == ["in"] and after.outputs == ("out",) and set(after.constants) == {"weight"}
    assert after.producers["normed"].inputs == ("in", "weight") and after.nodes[-1].inputs == ("s", "in")


# --- verifier -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "rms_norm(%x, %w)",
            "rms_norm(%x, %z)",
            "g: rms_norm -> n at stage model: reads z, which is not defined before it",
        ),
        ("silu(%n)", "silu(%y)", "silu -> s at stage model: reads y"),
        ("silu(%n)", "swiglu(%n, %n)", "swiglu -> s at stage model: the op is legal at stage fused only"),
        ("silu(%n)", "relu(%n)", "there is no op called relu"),
        ("silu(%n)", "silu(%n, %n)", "silu -> s at stage model: 2 operands, the op takes x"),
        ("silu(%n)", "silu(_)", "operand x is required"),
        ("{epsilon=1e-06}", "", "attribute epsilon is missing"),
        ("{epsilon=1e-06}", "{epsilon=1e-06, axis=1}", "the op has no attribute axis"),
        ("%s: f32[S, 4]", "%s: f32[S, 5]", "s is f32[S, 5], its op's rule gives f32[S, 4]"),
        ("%s: f32[S, 4]", "%s: f16[S, 4]", "s is f16[S, 4], its op's rule gives f32[S, 4]"),
        ("add(%s, %x)", "add(%s, %w)", "add -> y at stage model: operands differ: f32[S, 4] and f32[4]"),
        ("output %y", "output %z", "output z is not defined"),
        ("%s: f32[S, 4]", "%x: f32[S, 4]", "value x is defined twice"),
        ("%s: f32[S, 4] = silu", "%s: f32[S, 4], %t: f32[S, 4] = silu", "2 results, the op gives 1"),
        ("const %w: f32[4]", "const %w: f32[5]", "constant w is f32[5], its data is f32[4]"),
    ],
)
def test_the_verifier_names_what_is_wrong(old, new, message):
    assert old in BODY
    verify(graph())
    with pytest.raises(GraphError) as caught:
        verify(graph(BODY.replace(old, new, 1)))
    assert message in str(caught.value)


def test_stages():
    with pytest.raises(GraphError, match="unknown stage 'other'"):
        verify(graph(stage="other"))
    mixed = graph(BODY.replace("silu(%n)", "onnx.Sigmoid(%n)"))
    with pytest.raises(GraphError, match="legal at stage onnx only"):
        verify(mixed)
    verify(mixed, stages=("onnx", "model"))


# --- interpreter ----------------------------------------------------------------------------------------------------------------------------------


def test_symbols_come_from_the_inputs():
    x = np.arange(12.0).reshape(3, 4)
    assert run(graph(), {"x": x}, float64=True)["y"].shape == (3, 4)
    with pytest.raises(GraphError, match=r"input x \(f32\[S, 4\]\) is missing"):
        run(graph(), {})
    with pytest.raises(GraphError, match=r"input x has shape \[3, 5\], expected f32\[S, 4\]"):
        run(graph(), {"x": np.zeros((3, 5))})
    two = graph("input %a: f32[S, 4]\ninput %b: f32[S, 4]\n%y: f32[S, 4] = add(%a, %b)\noutput %y")
    with pytest.raises(GraphError, match="with S=3"):
        run(two, {"a": np.zeros((3, 4)), "b": np.zeros((2, 4))})


def test_keep_returns_inner_values():
    out = run(graph(), {"x": np.ones((2, 4))}, float64=True, keep={"n", "w"})
    assert set(out) == {"y", "n", "w"} and np.array_equal(out["w"], [1, 2, 3, 4])
    with pytest.raises(GraphError, match="no node computes nothing"):
        run(graph(), {"x": np.ones((2, 4))}, keep={"nothing"})


@pytest.mark.parametrize("dtype, digits", [("f32", 24), ("f16", 11), ("bf16", 8)])
def test_results_are_rounded_once_per_op(dtype, digits):
    """In a graph's own dtype each op computes in float32 and rounds its result; in float64 nothing rounds."""
    body = f"input %a: {dtype}[S]\ninput %b: {dtype}[S]\n%p: {dtype}[S] = mul(%a, %b)\n%y: {dtype}[S] = add(%p, %a)\noutput %y"
    rng = np.random.default_rng(0)
    g = graph(body)
    a, b = (rng.normal(size=50) for _ in range(2))
    exact = run(g, {"a": a, "b": b}, float64=True, keep={"p"})
    assert np.array_equal(exact["p"], a * b) and np.array_equal(exact["y"], a * b + a)
    found = run(g, {"a": a, "b": b})["y"]
    from ir.types import DTYPES

    narrow = lambda x: np.asarray(x).astype(DTYPES[dtype].numpy)  # noqa: E731
    wide = lambda x: x.astype(np.float32)  # noqa: E731
    product = narrow(wide(narrow(a)) * wide(narrow(b)))
    expected = narrow(wide(product) + wide(narrow(a)))
    assert found.dtype == DTYPES[dtype].numpy and np.array_equal(found, expected)
    # Four roundings of values up to |a b| + |a|, of half a unit in the last place each.
    assert (np.abs(wide(found) - exact["y"]) <= 4 * 2.0**-digits * (np.abs(a * b) + np.abs(a)) * 1.01).all()


def test_a_reference_that_disagrees_with_the_type_is_caught():
    bad = graph(BODY.replace("%s: f32[S, 4] = silu(%n)", "%s: f32[S, 2, 2] = silu(%n)"))
    with pytest.raises(GraphError, match=r"silu s: result has shape \[3, 4\], the graph says f32\[3, 2, 2\]"):
        run(bad, {"x": np.zeros((3, 4))})


def test_unbound_symbols_can_be_given():
    g = graph("input %x: f32[2*S]\n%y: f32[S, 2] = reshape(%x) {shape=(<S>, 2)}\noutput %y")
    assert run(g, {"x": np.zeros(6)})["y"].shape == (3, 2)
    assert sym("S") in verify(g).type("y").shape

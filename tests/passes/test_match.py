"""The matcher and the pipeline runner."""

from __future__ import annotations

import pytest

from ir.errors import GraphError, UnsupportedError
from ir.graph import Graph
from ir.text import parse, read, to_text
from ir.verify import verify
from passes.match import Const, Matcher, Op, Or, Rule, Var, apply, cast, explain
from passes.pipeline import Pass, run_passes


def graph(body: str, stage: str = "onnx") -> Graph:
    return verify(parse(f"graph small @{stage} {{\n{body}\n}}"))


HEAD = "input %x: f32[S, 4]\ninput %y: f32[S, 4]\nconst %two: f32[] = inline(f32[], 2.0)\nconst %w: f32[4] = inline(f32[4], 1.0, 2.0, 3.0, 4.0)\n"


def matches(pattern, body, value="r"):
    matcher = Matcher(graph(HEAD + body + "\noutput %r"))
    return [dict(m.values) for m in matcher.match(pattern, value)], matcher.best[1]


def test_commutative_operands_match_in_either_order():
    pattern = Op("Add", Op("Neg", Var("a")), Var("b"))
    for operands in ("%n, %y", "%y, %n"):
        found, _ = matches(pattern, f"%n: f32[S, 4] = onnx.Neg(%x)\n%r: f32[S, 4] = onnx.Add({operands})")
        assert found == [{"a": "x", "b": "y"}]
    found, reason = matches(
        Op("Sub", Op("Neg", Var("a")), Var("b")), "%n: f32[S, 4] = onnx.Neg(%x)\n%r: f32[S, 4] = onnx.Sub(%y, %n)"
    )
    assert not found and reason == "after onnx.Sub: expected onnx.Neg, found input y"


def test_both_orders_are_tried_where_both_fit():
    found, _ = matches(Op("Mul", Var("a"), Var("b")), "%r: f32[S, 4] = onnx.Mul(%x, %y)")
    assert found == [{"a": "x", "b": "y"}, {"a": "y", "b": "x"}]


def test_the_same_name_is_the_same_value():
    assert matches(Op("Mul", Var("a"), Var("a")), "%r: f32[S, 4] = onnx.Mul(%x, %x)")[0]
    found, reason = matches(Op("Mul", Var("a"), Var("a")), "%r: f32[S, 4] = onnx.Mul(%x, %y)")
    assert not found and "a is x and y" in reason


def test_alternatives_and_optional_casts():
    pattern = Op("Neg", cast(Or(Op("Sqrt", Var("a")), Op("Exp", Var("a")))))
    assert matches(pattern, "%e: f32[S, 4] = onnx.Exp(%x)\n%r: f32[S, 4] = onnx.Neg(%e)")[0] == [{"a": "x"}]
    body = "%e: f32[S, 4] = onnx.Sqrt(%x)\n%c: f16[S, 4] = onnx.Cast(%e) {to='f16'}\n%r: f16[S, 4] = onnx.Neg(%c)"
    assert matches(pattern, body)[0] == [{"a": "x"}]


def test_constants():
    body = "%r: f32[S, 4] = onnx.Mul(%x, %two)"
    assert matches(Op("Mul", Var("a"), Const("c", value=2.0)), body)[0] == [{"a": "x", "c": "two"}]
    found, reason = matches(Op("Pow", Var("a"), Const(value=3.0)), "%r: f32[S, 4] = onnx.Pow(%x, %two)")
    assert not found and "expected the constant 3.0, found 2.0" in reason
    found, reason = matches(Op("Pow", Var("a"), Const(scalar=True)), "%r: f32[S, 4] = onnx.Pow(%x, %w)")
    assert not found and "w is no single number" in reason
    # Equal after rounding: 0.1 is no float32.
    body = (
        HEAD
        + "const %tenth: f32[] = inline(f32[], 0.10000000149011612)\n%r: f32[S, 4] = onnx.Pow(%x, %tenth)\noutput %r"
    )
    assert list(Matcher(graph(body)).match(Op("Pow", Var("a"), Const(value=0.1)), "r"))


def test_numbers_of_operands():
    body = "const %s: i64[2] = inline(i64[2], 1, 3)\n%r: f32[S, 1], %q: f32[S, 3] = onnx.Split(%x, %s) {axis=1}"
    assert matches(Op("Split", Var("a"), more=True), body)[0]
    found, reason = matches(Op("Split", Var("a")), body)
    assert not found and "2 operands, expected 1" in reason
    assert matches(Op("Split", Var("a"), more=True, output=1), body, "q")[0]
    assert not matches(Op("Split", Var("a"), more=True), body, "q")[0]


class Double(Rule):
    """x + x -> x * 2 where x is not y."""

    name = "double"

    def pattern(self):
        return Op("Add", Var("x"), Var("x"))

    def check(self, match):
        return "x is y" if match["x"] == "y" else None

    def rewrite(self, match, editor):
        return editor.add(
            "onnx.Mul", [match["x"], "two"], [match.output], types=[match.graph.type(match.output)], origin=match.origin
        )[0]


def test_apply_rewrites_every_match_once():
    body = (
        HEAD
        + "%a: f32[S, 4] = onnx.Add(%x, %x)  // first\n%b: f32[S, 4] = onnx.Add(%a, %a)\n%r: f32[S, 4] = onnx.Add(%b, %y)\noutput %r"
    )
    after, count = apply(graph(body), [Double()])
    assert count == 2 and [n.op for n in after.nodes] == ["onnx.Mul", "onnx.Mul", "onnx.Add"]
    # The names of what went are given to what stands in their place; origins travel along.
    assert after.nodes[1].inputs == ("a", "two") and after.nodes[0].origin == ("first",)


def test_a_rule_says_why_it_did_not_fire():
    g = graph(HEAD + "%r: f32[S, 4] = onnx.Add(%y, %y)\noutput %r")
    after, count = apply(g, [Double()])
    assert (after, count) == (g, 0)
    assert explain(g, [Double()], ["r"]) == "double at r: no, because x is y"

    class Must(Double):
        required = True

    with pytest.raises(UnsupportedError, match="double at r: x is y"):
        apply(g, [Must()])


# --- pipeline -------------------------------------------------------------------------------------------------------------------------------------


def same(g: Graph) -> tuple[Graph, int]:
    return g, 3


def test_a_pass_that_breaks_the_graph_is_named(tmp_path):
    g = graph(HEAD + "%r: f32[S, 4] = onnx.Add(%y, %y)\noutput %r")

    def breaks(g: Graph) -> tuple[Graph, int]:
        from dataclasses import replace

        return replace(g, nodes=()), 1

    bad = Pass("bad", breaks, "onnx", "onnx", "drops everything")
    with pytest.raises(GraphError, match="after pass bad: small: output r is not defined"):
        run_passes(g, [bad], dump_dir=tmp_path)
    # The dump of the broken graph is there to look at.
    assert sorted(f.name for f in tmp_path.iterdir()) == ["00-import.ir", "01-bad.ir"]
    assert run_passes(g, [bad], check=False).nodes == ()
    stage = Pass("stage", same, "onnx", "model", "claims another stage")
    with pytest.raises(GraphError, match="pass stage made a graph of stage onnx, not model"):
        run_passes(g, [stage])


def test_order_disable_history_and_log(tmp_path):
    g = graph(HEAD + "%r: f32[S, 4] = onnx.Add(%y, %y)\noutput %r")
    a, b = Pass("a", same, "onnx", "onnx", ""), Pass("b", same, "onnx", "onnx", "", optional=True)
    lines: list[str] = []
    after = run_passes(g, [a, b, a], disable={"b"}, dump_dir=tmp_path, log=lines.append)
    assert [h[:2] for h in after.meta["passes"]] == [["a", 3], ["a", 3]] and len(lines) == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["00-import.ir", "01-a.ir", "02-a.ir"]
    assert read(tmp_path / "02-a.ir") == after and to_text(after).count("\n") > 5
    with pytest.raises(GraphError, match="pass a cannot be disabled; these can: b"):
        run_passes(g, [a, b], disable={"a"})

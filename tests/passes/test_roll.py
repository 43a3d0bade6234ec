"""Rolling layers into a loop: the same values, everything that repeats and nothing that does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ir.graph import Graph, GraphEditor, Node, Value
from ir.interp import run
from ir.text import parse, to_text
from ir.types import TensorType, sym
from ir.verify import verify
from passes.roll import canonical_order, roll_layers
from passes.targets import targets
from tests.passes.helpers import assert_close
from tests.passes.lowered import SHAPES, any_dtype, check, fused, legal

ALL = any_dtype("test")


def loops(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op == "loop.layers"]


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rolled_layers_compute_the_same(shape, kv):
    rolled, runs = roll_layers(legal(fused(shape), ALL, kv))
    verify(rolled)
    check(shape, rolled)
    layers = shape[0]
    assert runs == (layers if layers > 1 else 0) and len(loops(rolled)) == (layers > 1)
    assert parse(to_text(rolled)) == rolled


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
def test_the_whole_layer_is_in_the_loop(kv):
    flat = legal(fused(SHAPES[3]), ALL, kv)
    rolled, runs = roll_layers(flat)
    (loop,) = loops(rolled)
    body = loop.attrs["body"]
    assert runs == loop.attrs["count"] == 4
    assert len(rolled.nodes) - 1 + 4 * len(body.nodes) == len(flat.nodes)
    # Outside: the rope tables, the embedding, the first norm, the chosen rows, the views of the head's weight and the head itself.
    outside = [n.op for n in rolled.nodes if n.op.startswith("infini.")]
    assert outside == ["infini.embedding", "infini.rms_norm", "infini.gather_rows", "infini.gemm"]
    assert loop.attrs["carried"] == 2  # the residual stream and its norm
    assert loop.attrs["collected"] == 2  # keys and values
    merged = [
        r for r in body.inputs if r.name in ("attn_qkv", "attn_o", "ffn_gate_up", "ffn_down", "k_cache", "v_cache")
    ]
    assert len(merged) == 6


@pytest.mark.parametrize("name", sorted(targets()))
def test_layers_roll_on_every_target(name):
    dtype = "bf16"
    rolled, runs = roll_layers(legal(fused(SHAPES[4], dtype), targets()[name]))
    assert runs == 2
    check(SHAPES[4], rolled, dtype)


def test_one_layer_stays_unrolled():
    for kv in ("paged", "contiguous"):
        flat = legal(fused(SHAPES[0]), ALL, kv)
        rolled, runs = roll_layers(flat)
        assert runs == 0 and not loops(rolled)
        assert sorted(n.output for n in rolled.nodes) == sorted(n.output for n in flat.nodes)


# --- chains of synthetic layers -------------------------------------------------------------------------------------------------------------------

WIDTH = 6
X = TensorType("f64", (sym("T"), WIDTH))
W = TensorType("f64", (WIDTH,))


def chain(
    layers: int,
    change: Callable[[GraphEditor, int, str], str] = lambda edit, i, x: x,
    epsilon: Callable[[int], float] = lambda i: 1e-6,
) -> Graph:
    """x -> x + silu(rms_norm(x) * x) per layer; ``change`` may add to a layer."""
    weights = tuple(Value(f"w.{i}", W) for i in range(layers))
    edit = GraphEditor(Graph("chain", "infini", (Value("x", X), *weights), (), {}, ()))
    x = "x"
    for i in range(layers):
        y = edit.add("infini.rms_norm", [x, f"w.{i}"], [f"y.{i}"], dict(epsilon=epsilon(i)))[0]
        y = edit.add("infini.mul", [y, x], [f"m.{i}"])[0]
        y = change(edit, i, edit.add("infini.silu", [y], [f"s.{i}"])[0])
        x = edit.add("infini.add", [x, y], [f"x.{i}"])[0]
    edit.outputs = [x]
    return edit.finish()


def feeds(graph: Graph) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {v.name: rng.normal(size=(5, WIDTH) if v.name == "x" else WIDTH) for v in graph.inputs}


def rolled_same(graph: Graph) -> tuple[Graph, int]:
    """Rolls, and checks that nothing changed: bit for bit, since the same functions run on the same numbers."""
    rolled, runs = roll_layers(graph)
    verify(rolled)
    a, b = run(graph, feeds(graph), float64=True), run(rolled, feeds(graph), float64=True)
    assert set(a) == set(b) == set(graph.outputs)
    for name in a:
        assert np.array_equal(a[name], b[name]), name
    return rolled, runs


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_equal_layers_roll_whole(layers):
    rolled, runs = rolled_same(chain(layers))
    assert runs == layers and [n.op for n in rolled.nodes] == ["loop.layers"]


def extra(layer: int) -> Callable[[GraphEditor, int, str], str]:
    return lambda edit, i, y: edit.add("infini.mul", [y, y], [f"again.{i}"])[0] if i == layer else y


@pytest.mark.parametrize("layers, odd, runs", [(5, 0, 4), (5, 4, 4), (5, 3, 3), (2, 0, 0), (2, 1, 0)])
def test_a_layer_with_an_op_more_stays_outside(layers, odd, runs):
    rolled, found = rolled_same(chain(layers, extra(odd)))
    assert found == runs
    for loop in loops(rolled):
        assert len(loop.attrs["body"].nodes) == 4


@pytest.mark.parametrize("odd, runs", [(0, 4), (4, 4), (3, 3)])
def test_a_layer_with_another_epsilon_stays_outside(odd, runs):
    rolled, found = rolled_same(chain(5, epsilon=lambda i: 1e-3 if i == odd else 1e-6))
    assert found == runs
    assert {n.attrs["epsilon"] for n in loops(rolled)[0].attrs["body"].nodes if n.op == "infini.rms_norm"} == {1e-6}


def test_layers_that_all_differ_are_not_rolled():
    rolled, runs = rolled_same(chain(4, epsilon=lambda i: 10.0**-i))
    assert runs == 0 and not loops(rolled)


def test_layers_that_alternate_roll_in_pairs():
    rolled, runs = rolled_same(chain(6, epsilon=lambda i: 1e-3 if i % 2 else 1e-6))
    assert runs == 3 and len(loops(rolled)[0].attrs["body"].nodes) == 8


def test_layers_with_other_heads_are_not_rolled():
    """The same ops on another number of heads: result types differ, so the layers do."""

    def heads(edit: GraphEditor, i: int, y: str) -> str:
        n = 2 if i == 0 else 3
        split = edit.add("view.reshape", [y], [f"h.{i}"], dict(shape=(sym("T"), n, WIDTH // n)))[0]
        split = edit.add("infini.silu", [split], [f"hs.{i}"])[0]
        return edit.add("view.reshape", [split], [f"j.{i}"], dict(shape=(sym("T"), WIDTH)))[0]

    rolled, runs = rolled_same(chain(2, heads))
    assert runs == 0 and not loops(rolled)
    rolled, runs = rolled_same(chain(4, heads))
    assert runs == 3


def test_a_layer_that_reads_further_back_is_not_rolled_with_the_rest():
    """Layer 2 adds what layer 0 gave: ops and types are all alike, only the wiring tells."""
    graph = chain(4)
    nodes = [replace(n, inputs=(n.inputs[0], "x")) if n.output == "m.2" else n for n in graph.nodes]
    rolled, runs = rolled_same(replace(graph, nodes=tuple(nodes)))
    for loop in loops(rolled):
        assert "m.2" not in {v.name for v in loop.outputs}
    assert runs < 4


def test_what_is_read_of_every_run_is_collected():
    graph = replace(chain(4), outputs=("x.3", "y.0", "y.1", "y.2", "y.3"))
    rolled, runs = rolled_same(graph)
    assert runs == 4 and loops(rolled)[0].attrs["collected"] == 1


def test_one_weight_for_all_layers_is_invariant():
    graph = chain(4)
    nodes = tuple(replace(n, inputs=(n.inputs[0], "w.0")) if n.op == "infini.rms_norm" else n for n in graph.nodes)
    rolled, runs = rolled_same(replace(graph, nodes=nodes))
    (loop,) = loops(rolled)
    assert runs == 4 and loop.attrs["per_layer"] == 0 and loop.inputs == ("x", "w.0")


def test_order_depends_on_dataflow_alone():
    graph = legal(fused(SHAPES[1]), ALL, "paged")
    expected = [n.output for n in canonical_order(graph)]
    rng = np.random.default_rng(0)
    for _ in range(5):
        order = list(rng.permutation(len(graph.nodes)))
        shuffled = replace(graph, nodes=tuple(graph.nodes[i] for i in order))
        # The setup nodes' own order is the graph's; there is one here.
        assert [n.output for n in canonical_order(shuffled)] == expected


def test_a_rolled_graph_rolls_no_further():
    rolled, _ = roll_layers(legal(fused(SHAPES[3]), ALL, "paged"))
    again, runs = roll_layers(rolled)
    assert runs == 0 and len(again.nodes) == len(rolled.nodes)


def test_the_loop_equals_its_body_run_by_hand():
    graph = chain(3)
    rolled, _ = roll_layers(graph)
    (loop,) = rolled.nodes
    body, data = loop.attrs["body"], feeds(graph)
    x = data["x"]
    for i in range(3):
        x = run(body, {body.inputs[0].name: x, body.inputs[1].name: data[f"w.{i}"]}, float64=True)[body.outputs[0]]
    assert_close(run(rolled, data, float64=True)["x.2"], x, "x.2", 0.0)

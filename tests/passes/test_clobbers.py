"""Calls that destroy an operand: a copy where somebody still needs it, none where nobody does, proven in memory that is destroyed as the record says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ir.errors import UnsupportedError
from ir.graph import Graph, GraphEditor, Node, Value
from ir.interp import run
from ir.types import TensorType, sym
from ir.verify import verify
from passes.clobbers import protect
from passes.plan import plan_memory
from passes.roll import roll_layers
from passes.targets import Target, targets
from tests.passes.arena import Arena
from tests.passes.lowered import SHAPES, WIDE, any_dtype, assert_same, expected, folder, fused, legal

T = sym("T")
SQUARE = TensorType("f64", (3, 5, 5))
# As on Ascend, whose causal_softmax masks its input where it lies.
MASKS = any_dtype("masks", causal_softmax=dict(clobbers=(1,)))


class Destroying(Arena):
    """Fills with garbage what calls destroy: ``clobbers`` has the operands by op, as positions in the node."""

    def __init__(self, *args, clobbers: dict[str, tuple[int, ...]], **options) -> None:
        self.clobbers = clobbers
        super().__init__(*args, **options)

    def _node(self, node: Node, scope: str, symbols) -> None:
        super()._node(node, scope, symbols)
        results = [self.plan.place(scope, v.name) for v in node.outputs]
        for i in self.clobbers.get(node.op, ()):
            place = self.plan.place(scope, node.inputs[i])
            if all(place.buffer != r.buffer or place.offset != r.offset for r in results):
                self.view(place, symbols)[...] = np.nan


SOFTMAX = {"infini.causal_softmax": (0,)}


def graph_of(
    *steps: tuple[str, list[str], str], outputs: list[str], inputs: dict[str, TensorType] | None = None
) -> Graph:
    values = {"a": SQUARE, "b": SQUARE} if inputs is None else inputs
    edit = GraphEditor(Graph("g", "infini", tuple(Value(n, t) for n, t in values.items()), (), {}, ()))
    for op, operands, name in steps:
        attrs = dict(axis=0, start=1, size=2) if op == "view.slice" else {}
        edit.add(op, operands, [name], attrs)
    edit.outputs = outputs
    return edit.finish()


SCORES = ("infini.gemm", ["a", "b"], "scores")
PROBS = ("infini.causal_softmax", ["scores"], "probs")


def copies(graph: Graph) -> list[str]:
    return [n.inputs[0] for n in graph.nodes if n.op == "infini.rearrange"]


def protected_same(graph: Graph, target: Target = MASKS, clobbers: dict[str, tuple[int, ...]] = SOFTMAX) -> Graph:
    """Protects, and runs the result in memory that calls destroy."""
    after = verify(protect(graph, target))
    rng = np.random.default_rng(7)
    inputs = {v.name: rng.normal(size=v.type.shape) for v in graph.inputs}
    wanted = run(graph, inputs, float64=True)
    arena = Destroying(after, plan_memory(after), inputs, clobbers=clobbers)
    found = arena.run()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    for name, array in inputs.items():
        np.testing.assert_array_equal(arena.output(name), array, err_msg=name)
    return after


def test_scores_that_are_still_needed_are_copied():
    graph = graph_of(SCORES, PROBS, ("infini.mul", ["probs", "scores"], "y"), outputs=["y"])
    after = protected_same(graph)
    assert copies(after) == ["scores"]
    assert [n.op for n in after.nodes] == ["infini.gemm", "infini.rearrange", "infini.causal_softmax", "infini.mul"]
    assert after.meta["legalised"] == [
        ["causal_softmax", "on a copy", "causal_softmax on masks destroys what it reads", 1]
    ]


def test_without_the_copy_the_numbers_would_be_wrong():
    graph = graph_of(SCORES, PROBS, ("infini.mul", ["probs", "scores"], "y"), outputs=["y"])
    inputs = {v.name: np.ones((3, 5, 5)) for v in graph.inputs}
    found = Destroying(graph, plan_memory(graph), inputs, clobbers=SOFTMAX).run()["y"]
    assert np.isnan(found).all()


def test_scores_that_nobody_needs_are_not_copied():
    graph = graph_of(SCORES, PROBS, ("infini.mul", ["probs", "a"], "y"), outputs=["y"])
    assert protected_same(graph) == graph


def test_a_reader_that_the_call_depends_on_is_before_it():
    graph = graph_of(
        SCORES,
        ("infini.silu", ["scores"], "act"),
        ("infini.add", ["act", "scores"], "sum"),
        ("infini.causal_softmax", ["sum"], "probs"),
        outputs=["probs"],
    )
    # sum's only reader is the softmax; what it was made of may be overwritten, and nobody asks for it.
    assert copies(protected_same(graph)) == []


def test_a_reader_whose_place_in_the_order_is_open_counts_as_later():
    graph = graph_of(
        SCORES,
        ("infini.silu", ["scores"], "early"),
        PROBS,
        ("infini.add", ["early", "probs"], "y"),
        outputs=["y"],
    )
    assert copies(protected_same(graph)) == ["scores"]


def test_views_share_memory():
    half = ("view.slice", ["scores"], "half")
    graph = graph_of(SCORES, PROBS, half, ("infini.silu", ["half"], "y"), outputs=["y", "probs"])
    assert copies(protected_same(graph)) == ["scores"]
    # The call destroys a view of what is needed as a whole.
    graph = graph_of(
        SCORES,
        half,
        ("infini.causal_softmax", ["half"], "probs"),
        ("infini.silu", ["scores"], "y"),
        outputs=["y", "probs"],
    )
    assert copies(protected_same(graph)) == ["half"]
    # Views that only the call itself reads are nobody's.
    graph = graph_of(SCORES, half, ("infini.causal_softmax", ["half"], "probs"), outputs=["probs"])
    assert copies(protected_same(graph)) == []


def test_what_is_the_callers_is_copied():
    assert copies(protected_same(graph_of(("infini.causal_softmax", ["a"], "probs"), outputs=["probs"]))) == ["a"]
    graph = graph_of(SCORES, PROBS, outputs=["scores", "probs"])
    assert copies(protected_same(graph)) == ["scores"]


def test_two_calls_on_one_operand_need_two_copies():
    graph = graph_of(
        SCORES,
        PROBS,
        ("infini.causal_softmax", ["scores"], "again"),
        ("infini.mul", ["probs", "again"], "y"),
        outputs=["y"],
    )
    after = protected_same(graph)
    assert copies(after) == ["scores", "scores"] and after.meta["legalised"][0][3] == 2


def test_positions_are_those_of_create():
    """Embedding's tensors are out, index, table, and the same op chooses rows: the table is the second operand of one and the first of the other."""
    rows = dict(x=TensorType("f64", (5, 3)), rows=TensorType("i32", (2,)))
    made = ("infini.silu", ["x"], "made")
    odd = any_dtype("odd", embedding=dict(clobbers=(2,)))
    graph = graph_of(
        made,
        ("infini.gather_rows", ["made", "rows"], "chosen"),
        ("infini.silu", ["made"], "y"),
        outputs=["y", "chosen"],
        inputs=rows,
    )
    assert copies(protect(graph, odd)) == ["made"]
    assert copies(protect(graph, any_dtype("odd", embedding=dict(clobbers=(0,))))) == []
    with pytest.raises(UnsupportedError, match="embedding destroys rows, .* rearrange on odd takes .*, not i32"):
        protect(graph, any_dtype("odd", embedding=dict(clobbers=(1,))))


def test_a_target_that_destroys_nothing_changes_nothing():
    graph = graph_of(SCORES, PROBS, ("infini.mul", ["probs", "scores"], "y"), outputs=["y"])
    for target in (any_dtype("any"), targets()["nvidia"], targets()["cpu"]):
        assert protect(graph, target) is graph
    # Ascend does, by its record.
    single = replace(graph, inputs=tuple(replace(v, type=v.type.with_dtype("f32")) for v in graph.inputs))
    assert copies(protect(single, replace(targets()["ascend"], ops=targets()["ascend"].ops | any_f64()))) == ["scores"]


def any_f64() -> dict:
    """Ascend's rearrange in the dtype of these graphs."""
    return {"rearrange": any_dtype("any").ops["rearrange"]}


def test_a_copy_that_cannot_be_made_is_an_error():
    graph = graph_of(SCORES, PROBS, outputs=["scores", "probs"])
    odd = any_dtype("odd", "rearrange", causal_softmax=dict(clobbers=(1,)))
    with pytest.raises(UnsupportedError, match="target odd: causal_softmax destroys scores, .*; odd has no rearrange"):
        protect(graph, odd)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_needs_no_copies(shape):
    """The scores of attention are read once: by the softmax that destroys them."""
    graph = legal(fused(shape), MASKS, "contiguous")
    plain = legal(fused(shape), any_dtype("masks"), "contiguous")
    assert graph.nodes == plain.nodes and graph.meta["legalised"] == plain.meta["legalised"]
    rolled = roll_layers(graph)[0]
    data, wanted = expected(shape)
    found = Destroying(rolled, plan_memory(rolled), data.inputs(rolled), folder(shape), clobbers=SOFTMAX).run()
    assert_same(fused(shape), found, wanted, data, False)


def test_ascends_attention_needs_no_copies_either():
    graph = legal(fused(WIDE, "bf16"), targets()["ascend"], "contiguous")
    body = next(n for n in graph.nodes if n.op == "loop.requests").attrs["decode"]
    assert copies(body) == [] and all(row[1] != "on a copy" for row in graph.meta["legalised"])


def test_caches_that_a_body_shares_with_the_caller_are_copied():
    """A product that destroys the values' matrix would destroy the cache: it lies there by way of rearrange_into and a slice."""
    odd = any_dtype("odd", gemm=dict(clobbers=(2,)))
    graph = legal(fused(SHAPES[1]), odd, "contiguous")
    for which in ("prefill", "decode"):
        body = next(n for n in graph.nodes if n.op == "loop.requests").attrs[which]
        taken = [n.inputs[0] for n in body.nodes if n.op == "infini.rearrange" and n.output.endswith("_copy")]
        assert taken == ["keys_t", "values"]
    # Weights are read by every step.
    assert "attn_qkv.0.t" in copies(graph)
    rolled = roll_layers(graph)[0]
    data, wanted = expected(SHAPES[1])
    destroyed = {"infini.gemm": (1,)}
    found = Destroying(rolled, plan_memory(rolled), data.inputs(rolled), folder(SHAPES[1]), clobbers=destroyed).run()
    assert_same(fused(SHAPES[1]), found, wanted, data, False)

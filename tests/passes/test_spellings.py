"""However an exporter writes it, the graph at stage "model" is the same."""

from __future__ import annotations

import numpy as np
import pytest

from ir.text import to_text
from ir.verify import verify
from passes.lower import to_model
from tests.passes.helpers import SHAPES, assert_same_step, bare, checkpoint, imported, model
from tests.passes.respell import SPELLINGS, respell, shuffled

# Which opsets a spelling changes: at 23 norms, rope and attention are ops of their own.
ONLY_18 = {
    "reciprocal",
    "power",
    "division",
    "square",
    "expanded_by_shape",
    "scale_on_both",
    "scale_on_queries",
    "scale_by_division",
}
ONLY_18 |= {"keys_through_three_axes", "mask_by_where", "softmax_without_nan", "rope_by_halves"}


def expect_same(graph, shape, kv=True):
    verify(graph)
    found = to_model(graph)
    assert to_text(bare(found)) == to_text(bare(model(shape, 18, kv)))


@pytest.mark.parametrize("name", sorted(SPELLINGS))
@pytest.mark.parametrize("opset", [18, 23])
def test_one_other_spelling(name, opset):
    if opset == 23 and name in ONLY_18:
        return  # nothing there to spell otherwise
    shape = SHAPES[1]
    graph = respell(imported(shape, opset), name, seed=3)
    assert graph.nodes != imported(shape, opset).nodes, "the spelling changed nothing"
    if name not in (
        "tables_of_angles",
        "scale_on_both",
        "scale_by_division",
        "mask_by_where",
    ):  # these round differently
        assert_same_step(imported(shape, opset), graph, checkpoint(shape), 3, 2, [0, 3])
    expect_same(graph, shape)


@pytest.mark.parametrize("seed", range(16))
def test_many_spellings_at_once(seed):
    """Some nodes in one spelling, some in another, in another order."""
    rng = np.random.default_rng(seed)
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    opset = int(rng.choice([18, 18, 23]))
    kv = bool(rng.random() < 0.75)
    graph = imported(shape, opset, kv)
    # Those that look for one spelling come before those that change it.
    for name in (
        SPELLINGS
        if seed % 2
        else (
            "division",
            "rope_by_halves",
            "mask_by_where",
            "computed_shapes",
            "softmax_without_nan",
            "swapped_operands",
            "identities",
        )
    ):
        if name != "tables_of_angles" and rng.random() < 0.6 and not (opset == 23 and name in ONLY_18):
            try:
                graph = respell(graph, name, seed, share=0.6)
            except (AssertionError, KeyError, StopIteration, AttributeError, IndexError, TypeError, ValueError):
                continue  # an earlier spelling left nothing of the form that this one looks for
    expect_same(shuffled(graph, rng), shape, kv)

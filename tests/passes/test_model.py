"""From ONNX to stage "model": every pass keeps the values, and every spelling ends as the same graph."""

from __future__ import annotations

import numpy as np
import pytest

from ir.interp import run
from ir.optable import lookup
from ir.text import to_text
from passes.lower import MODEL_PIPELINE, to_model
from tests.models import random_weights, reference_logits
from tests.passes.helpers import (
    SHAPES,
    assert_round_trip,
    assert_same_step,
    bare,
    checkpoint,
    imported,
    model,
    padded_inputs,
    steps,
)

# New tokens, past, padding on the left of each request.
STEPS = ((5, 0, [0, 2, 3]), (1, 6, [4, 0]), (3, 4, [0, 1, 5]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("opset", [18, 23])
def test_the_model_stage_computes_what_the_onnx_graph_does(shape, opset):
    folder = checkpoint(shape)
    for new, past, padding in STEPS:
        assert_same_step(imported(shape, opset), model(shape, opset), folder, new, past, padding)


@pytest.mark.parametrize("name", [p.name for p in MODEL_PIPELINE])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
@pytest.mark.parametrize("opset", [18, 23])
def test_each_pass_keeps_the_values_and_prints(name, shape, opset):
    _, before, after = next(s for s in steps(shape, opset) if s[0].name == name)
    assert_same_step(before, after, checkpoint(shape), 3, 4, [0, 5])
    assert_round_trip(after)
    assert after.inputs == before.inputs and after.outputs == before.outputs


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("opset", [18, 23])
def test_without_a_cache(shape, opset):
    before, after = imported(shape, opset, False), model(shape, opset, False)
    assert_same_step(before, after, checkpoint(shape), 6, 0, [0, 3])
    assert all(n.attrs.get("total") is None and len(n.outputs) == 3 for n in after.nodes if n.op == "attention")


@pytest.mark.parametrize("shape, kv", [*((s, True) for s in SHAPES), (SHAPES[1], False), (SHAPES[2], False)], ids=str)
def test_both_opsets_give_the_same_graph(shape, kv):
    a, b = (to_text(bare(model(shape, opset, kv))) for opset in (18, 23))
    assert a == b


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_weights_of_other_dtypes_stay_as_they_are_stored(dtype):
    shape = SHAPES[1]
    graph = model(shape, 18, True, dtype)
    weights = [c for c in graph.constants.values() if c.name != "inv_freq"]
    assert {c.value.type.dtype for c in weights} == {dtype}
    assert_same_step(imported(shape, 18, True, dtype), graph, checkpoint(shape, dtype), 4, 2, [0, 1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_graph_is_a_decoder_op_for_op(shape):
    layers, heads, kv_heads, head_dim, tied = shape
    graph = model(shape)
    expected = {
        "embedding": 1,
        "linear": 7 * layers + 1,
        "rms_norm": 4 * layers + 1,
        "rope": 2 * layers,
        "attention": layers,
    }
    expected |= {"silu": layers, "mul": layers, "add": 2 * layers, "reshape": 4 * layers}
    assert graph.counts() == dict(sorted(expected.items(), key=lambda kv: (-kv[1], kv[0])))
    assert all("model" in lookup(n.op).stages for n in graph.nodes)
    # Weights: the checkpoint's own names and files, no transposition, no copy; one constant where the head is tied.
    names = [n for n in graph.constants if n != "inv_freq"]
    assert all(graph.constants[n].data.name == n for n in names)  # type: ignore[union-attr]
    assert ("lm_head.weight" in names) == (not tied)
    assert len(names) == 11 * layers + (2 if tied else 3)
    rope = graph.constants["inv_freq"].value.type
    assert rope.dtype == "f32" and rope.shape == (head_dim // 2,)


def test_values_have_names_that_a_reader_knows():
    graph = model(SHAPES[1])
    for name in (
        "hidden.0 attn_norm.1 q.0 k.1 v.0 q_norm.0 k_rope.1 attn.1 o.0 ffn_norm.0 gate.1 up.0 act.0 down.1 hidden.2 final_norm logits"
    ).split():
        assert name in graph.values, name
    assert graph.producers["q.1"].origin == ("/model/layers.1/self_attn/q_proj/MatMul",)


def test_the_result_agrees_with_the_definition_of_the_model():
    """Against a model written down apart from everything here."""
    import json

    shape = SHAPES[1]
    folder = checkpoint(shape, "f32")
    config = json.loads((folder / "config.json").read_text())
    tokens = [3, 17, 5, 5, 29, 1]
    inputs = padded_inputs(model(shape, 18, True, "f32"), np.random.default_rng(0), len(tokens), 0, [0])
    inputs["input_ids"] = np.array([tokens])
    found = run(model(shape, 18, True, "f32"), inputs, folder=folder, float64=True)["logits"][0]
    expected = reference_logits(config, random_weights(config, SHAPES.index(shape)), tokens)
    # The graph's frequencies, scale and epsilon are float32 (relative 6e-8); at positions up to 5 that moves an angle by 3e-7, and two layers double it.
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_history_counts_and_dumps(tmp_path):
    lines: list[str] = []
    graph = to_model(imported(SHAPES[0]), dump_dir=tmp_path, log=lines.append)
    names = [p.name for p in MODEL_PIPELINE]
    assert [h[0] for h in graph.meta["passes"]] == names
    assert dict(h[:2] for h in graph.meta["passes"])["raise_rope"] == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["00-import.ir"] + [
        f"{i:02}-{n}.ir" for i, n in enumerate(names, 1)
    ]
    assert len(lines) == len(names)
    assert (tmp_path / f"{len(names):02}-canonicalise.ir").read_text() == to_text(graph)

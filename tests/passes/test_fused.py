"""From stage "model" to stage "fused": ragged batches against the model one request at a time, and every combination of fusions."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import pytest

from ir.constants import Cast, Concat
from ir.errors import GraphError
from ir.graph import Graph
from ir.interp import run
from ir.optable import lookup
from passes.lower import FUSED_PIPELINE, OPTIONAL, to_fused
from passes.pipeline import run_passes
from tests.passes.helpers import (
    SHAPES,
    assert_close,
    assert_round_trip,
    checkpoint,
    empty_caches,
    imported,
    model,
    ragged_inputs,
    sizes,
)

# Requests of one batch: tokens already cached, and new ones (prefill, chunk, decode, nothing new).
REQUESTS = ((0, 7), (5, 1), (3, 4), (2, 0), (0, 1))
CAPACITY = 11


@lru_cache(maxsize=None)
def fused(
    shape: tuple, disable: frozenset = frozenset(), opset: int = 18, kv: bool = True, dtype: str = "f32"
) -> Graph:
    return to_fused(imported(shape, opset, kv), dtype, disable)


@lru_cache(maxsize=None)
def expected(shape: tuple) -> tuple:
    """The same requests through stage "model", one at a time: tokens, logits of new tokens, keys and values of all layers."""
    graph, folder = model(shape), checkpoint(shape)
    layers, vocabulary = sizes(graph)
    rng = np.random.default_rng(5)
    result = []
    for start, new in REQUESTS:
        tokens = rng.integers(0, vocabulary, start + new)
        inputs = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, start + new), np.int64),
            "position_ids": np.arange(start + new)[None],
        }
        for value in graph.inputs:
            if value.name.startswith("past"):
                inputs[value.name] = np.zeros((1, value.type.shape[1], 0, value.type.shape[3]))
        out = run(graph, inputs, folder=folder, float64=True)
        presents = [[out[f"present.{i}.{part}"][0] for part in ("key", "value")] for i in range(layers)]
        result.append((tokens, out["logits"][0, start:], presents))
    return tuple(result)


def check(graph: Graph, shape: tuple, bound: float = 1e-12) -> None:
    """One ragged batch in float64. Caches hold garbage where nothing was written: nobody may read it."""
    reference = expected(shape)
    caches = empty_caches(graph, len(REQUESTS), CAPACITY, fill=7.5)
    for r, (start, _) in enumerate(REQUESTS):
        for i, parts in enumerate(reference[r][2]):
            for name, part in zip(("k", "v"), parts):
                caches[f"{name}_cache.{i}"][r, :, :start] = part[:, :start]
    tokens = [ref[0][start:] for (start, _), ref in zip(REQUESTS, reference)]
    total = sum(len(t) for t in tokens)
    rows = np.array([total - 1, 0, 6, 6])
    out = run(
        graph,
        ragged_inputs(graph, tokens, [s for s, _ in REQUESTS], caches, rows),
        folder=checkpoint(shape),
        float64=True,
    )
    logits = np.concatenate([ref[1] for ref in reference])
    assert_close(out["logits"], logits[rows], "logits", bound)
    for r, (start, new) in enumerate(REQUESTS):
        for i, parts in enumerate(reference[r][2]):
            for name, part in zip(("k", "v"), parts):
                found = out[f"{name}_cache_out.{i}"][r]
                assert_close(found[:, : start + new], part, f"{name} {i} of request {r}", bound)
                assert (found[:, start + new :] == 7.5).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("opset", [18, 23])
def test_a_ragged_batch_computes_what_the_model_does(shape, opset):
    check(fused(shape, opset=opset), shape)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_graph_without_caches_gets_them(shape):
    check(fused(shape, kv=False), shape)


@pytest.mark.parametrize(
    "disable",
    [frozenset(c) for n in (1, 2, 5) for c in itertools.combinations(OPTIONAL, n)],
    ids=lambda d: "+".join(sorted(d)),
)
def test_any_fusion_can_be_left_out(disable):
    graph = fused(SHAPES[1], disable)
    check(graph, SHAPES[1])
    ran = {h[0] for h in graph.meta["passes"]}
    assert ran.isdisjoint(disable) and ran >= set(OPTIONAL) - disable


@pytest.mark.parametrize("name", [p.name for p in FUSED_PIPELINE])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_each_pass_keeps_the_values_and_prints(name, shape):
    names = [p.name for p in FUSED_PIPELINE]
    graph = run_passes(model(shape), FUSED_PIPELINE[: names.index(name) + 1])
    assert_round_trip(graph)
    check(graph, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_graph_op_for_op(shape):
    layers = shape[0]
    graph = fused(shape, dtype="bf16")
    expected_counts = {
        "embedding": 1,
        "rms_norm": 1,  # the first layer's: nothing is added before it
        "add_rms_norm": 2 * layers,
        "linear": 4 * layers + 1,
        "split": 2 * layers,
        "reshape": 4 * layers,
        "norm_rope": 2 * layers,
        "attention_cached": layers,
        "swiglu": layers,
        "gather_rows": 1,
    }
    assert graph.counts() == dict(sorted(expected_counts.items(), key=lambda kv: (-kv[1], kv[0])))
    matches = dict(h[:2] for h in graph.meta["passes"])
    assert matches["merge_qkv"] == matches["merge_gate_up"] == matches["fuse_swiglu"] == layers
    assert matches["fuse_add_rms_norm"] == matches["fuse_norm_rope"] == 2 * layers
    names = ["tokens", "positions", "lens", "starts", "rows", *(f"{c}_cache.{i}" for i in range(layers) for c in "kv")]
    assert [v.name for v in graph.inputs] == names
    assert list(graph.outputs) == ["logits", *(f"{c}_cache_out.{i}" for i in range(layers) for c in "kv")]
    assert graph.producers["logits"].inputs[0] == graph.nodes[-2].output and graph.nodes[-2].op == "gather_rows"
    assert all("fused" in lookup(n.op).stages for n in graph.nodes)
    assert [str(d) for d in graph.type("logits").shape] == ["L", str(sizes(model(shape))[1])]


def test_merged_weights_are_recipes_in_order():
    graph = fused(SHAPES[1], dtype="bf16")
    for name, parts in (("self_attn.qkv_proj", "q k v"), ("mlp.gate_up_proj", "gate up")):
        data = graph.constants[f"model.layers.1.{name}.weight"].data
        assert isinstance(data, Concat) and data.axis == 0
        assert [p.name.split(".")[-2] for p in data.parts] == [f"{p}_proj" for p in parts.split()]  # type: ignore[union-attr]
    split = graph.producers["gate.1"]
    assert [v.name for v in split.outputs] == ["gate.1", "up.1"] and graph.producers["ffn.1"].inputs == (
        "up.1",
        "gate.1",
    )
    assert [v.name for v in graph.producers["q.0"].outputs] == ["q.0", "k.0", "v.0"]
    assert graph.producers["ffn_norm.1"].inputs[:2] == ("o.1", "hidden.1")
    assert [v.name for v in graph.producers["final_norm"].outputs] == ["final_norm", "hidden.2"]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f64"])
def test_retype(dtype):
    graph = fused(SHAPES[1], dtype=dtype)
    for value in graph.values.values():
        integers = value.name in ("tokens", "positions", "lens", "starts", "rows")
        assert value.type.dtype == ("i32" if integers else "f32" if value.name == "inv_freq" else dtype), value.name
    assert graph.producers["hidden.0"].attrs["dtype"] == dtype
    for constant in graph.constants.values():
        if constant.name != "inv_freq":  # the checkpoint is bf16
            assert isinstance(constant.data, Cast) == (dtype != "bf16")
    assert_round_trip(graph)
    # In float64 no dtype rounds, and the checkpoint's bf16 fits into the others: all but f16, which rounds numbers below 2^-14 by up to 2^-25 (3e-8). A sum of
    # a hundred such errors times activations of order one stays below 3e-6.
    check(graph, SHAPES[1], 3e-6 if dtype == "f16" else 1e-12)


def test_f16_weights_are_rounded_once():
    """A bf16 weight becomes f16 by rounding to nearest even, where it becomes one at all."""
    graph, folder = fused(SHAPES[1], dtype="f16"), checkpoint(SHAPES[1])
    from ir import constants

    name = "model.layers.0.mlp.down_proj.weight"
    wide = constants.load(model(SHAPES[1]).constants[name].data, folder).astype(np.float32)
    narrow = constants.load(graph.constants[name].data, folder)
    assert narrow.dtype == np.float16 and np.array_equal(narrow, wide.astype(np.float16))


def test_arguments_are_checked():
    with pytest.raises(GraphError, match="raise_rope.*merge_qkv"):
        to_fused(imported(SHAPES[0]), "f32", {"raise_rope"})
    with pytest.raises(GraphError, match="'int4'.*bf16"):
        to_fused(imported(SHAPES[0]), "int4")
    with pytest.raises(
        GraphError, match="takes a graph of stage onnx, not fused|takes a graph of stage model, not fused"
    ):
        to_fused(fused(SHAPES[0]), "f32")
    with pytest.raises(GraphError, match="flatten cannot be disabled"):
        run_passes(model(SHAPES[0]), FUSED_PIPELINE, disable={"flatten"})


def test_dumps_continue_their_numbers(tmp_path):
    graph = to_fused(imported(SHAPES[0]), "bf16", dump_dir=tmp_path)
    files = sorted(f.name for f in tmp_path.iterdir())
    assert len(files) == len(graph.meta["passes"]) + 1
    assert files[0] == "00-import.ir" and files[-1].endswith("-retype.ir") and "13-fuse_swiglu.ir" in files

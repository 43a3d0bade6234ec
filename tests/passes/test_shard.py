"""Tensor parallelism: devices that run parts of a graph compute together what one device does, in the memory that was planned for one."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from frontend.export import export
from frontend.onnx_import import import_onnx
from frontend.ort import Reference
from ir import constants
from ir.errors import GraphError, UnsupportedError
from ir.graph import Constant, Graph, Node, Value
from ir.interp import run
from ir.ranks import Rank, run_ranks
from ir.text import parse, to_text
from ir.types import TensorType, sym
from ir.verify import verify
from passes.lower import to_fused
from passes.plan import plan_memory
from passes.roles import assign_roles
from passes.roll import roll_layers
from passes.shard import instantiate, part_of, shard
from tests.models import random_config, write_checkpoint
from tests.passes.arena import Arena
from tests.passes.helpers import assert_close
from tests.passes.lowered import SHAPES, Batch, any_dtype, assert_same, batch, fused, legal

ALL = any_dtype("test")
_ROOT = Path(tempfile.mkdtemp(prefix="shard-"))
# Key/value heads, query heads per one of them, head size, layers, tied: what is cut divides by four, and all sizes differ.
MODELS = ((4, 1, 6, 2, True), (4, 3, 10, 1, False), (8, 2, 4, 3, True), (12, 3, 2, 2, False))
# A sum of a few hundred products is split in up to four, and what comes out of it goes through at most three layers: as in tests/passes/helpers.py.
BOUND = 1e-12


@dataclass(frozen=True)
class Model:
    folder: Path
    graph: Graph
    data: Batch
    wanted: dict[str, np.ndarray]


@lru_cache(maxsize=None)
def model(shape: tuple) -> Model:
    groups, ratio, dim, layers, tied = shape
    seed = MODELS.index(shape)
    rng = np.random.default_rng(seed)
    config = random_config(
        rng,
        num_hidden_layers=layers,
        num_attention_heads=groups * ratio,
        num_key_value_heads=groups,
        head_dim=dim,
        tie_word_embeddings=tied,
        vocab_size=4 * int(rng.integers(23, 30)),
        intermediate_size=4 * int(rng.integers(31, 37)),
        hidden_size=int(rng.integers(13, 23)),
    )
    sizes = [config[k] for k in ("vocab_size", "intermediate_size", "hidden_size")] + [dim, groups * dim]
    assert len({*sizes, ratio * groups * dim}) == len(sizes) + (ratio > 1)
    folder = write_checkpoint(_ROOT / str(seed), config, seed)
    export(folder, folder / "model.onnx", opset=18)
    graph = assign_roles(to_fused(import_onnx(folder / "model.onnx"), "f64"))[0]
    data = batch(graph, seed)
    return Model(folder, graph, data, run(graph, data.contiguous, folder=folder, float64=True))


@lru_cache(maxsize=None)
def lowered(shape: tuple, stage: str, gather: bool = True) -> Graph:
    """The model's sharded graph: "fused", or legalised and rolled with paged or contiguous caches."""
    graph, _ = shard(model(shape).graph, gather=gather)
    verify(graph)
    return graph if stage == "fused" else roll_layers(legal(graph, ALL, stage))[0]


def share(name: str, array: np.ndarray, ndev: int, rank: int) -> np.ndarray:
    """A device's part of an input: its heads of a cache, all of anything else."""
    if "_cache." not in name:
        return array
    heads = array.shape[1] // ndev
    return array[:, rank * heads : (rank + 1) * heads]


def inputs_of(graph: Graph, data: Batch) -> dict[str, np.ndarray]:
    source = data.paged if graph.meta.get("kv") == "paged" else data.contiguous
    return {v.name: source[v.name] for v in graph.inputs}


def together(results: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What devices have computed as one device would: all have the same logits, each its heads of the caches."""
    for other in results[1:]:
        assert np.array_equal(other["logits"], results[0]["logits"])
    joined = {k: np.concatenate([r[k] for r in results], axis=1) for k in results[0] if k != "logits"}
    return {"logits": results[0]["logits"], **joined}


@pytest.mark.parametrize("gather", [True, False], ids=["gather", "whole_head"])
@pytest.mark.parametrize("ndev", [1, 2, 4])
@pytest.mark.parametrize("stage", ["fused", "paged", "contiguous"])
@pytest.mark.parametrize("shape", MODELS, ids=str)
def test_devices_compute_together_what_one_does(shape, stage, ndev, gather):
    it, graph = model(shape), lowered(shape, stage, gather)
    inputs = inputs_of(graph, it.data)

    def device(rank: Rank) -> dict[str, np.ndarray]:
        part = verify(instantiate(graph, ndev, rank.rank))
        mine = {k: share(k, a, ndev, rank.rank) for k, a in inputs.items()}
        return run(part, mine, folder=it.folder, float64=True, communicator=rank)

    found = together(list(run_ranks(ndev, device)))
    assert_same(it.graph, found, it.wanted, it.data, graph.meta.get("kv") == "paged", BOUND)


@pytest.mark.parametrize("ndev", [1, 2, 4])
@pytest.mark.parametrize("kv", ["paged", "contiguous"])
@pytest.mark.parametrize("shape", MODELS[:3], ids=str)
def test_one_plan_serves_every_number_of_devices(shape, kv, ndev):
    """Devices run in memory that is planned once, of one device's sizes, with their own shapes, strides and offsets in it."""
    it, graph = model(shape), lowered(shape, kv)
    plan = plan_memory(graph)
    inputs = inputs_of(graph, it.data)
    symbols = {name: size // ndev for name, size in graph.meta["shard"].items()}

    def device(rank: Rank) -> dict[str, np.ndarray]:
        parts = instantiate(graph, ndev, rank.rank).constants
        mine = {k: share(k, a, ndev, rank.rank) for k, a in inputs.items()}
        return Arena(replace(graph, constants=parts), plan, mine, it.folder, symbols, rank).run()

    found = together(list(run_ranks(ndev, device)))
    assert_same(it.graph, found, it.wanted, it.data, kv == "paged", BOUND)


@pytest.mark.parametrize("shape", MODELS[:2], ids=str)
@pytest.mark.parametrize("ndev", [2, 4])
def test_devices_agree_with_onnxruntime(shape, ndev):
    """Greedy steps of one request, token by token after a prompt, on contiguous caches."""
    it, graph = model(shape), lowered(shape, "contiguous")
    prompt, steps, capacity = [5, 60, 3, 17, 2], 3, 9
    wanted, cache = Reference(it.folder / "model.onnx").logits(prompt)
    groups, dim = shape[0], shape[2]
    layers = {v.name: np.zeros((1, groups, capacity, dim)) for v in graph.inputs if "_cache." in v.name}
    state = [{k: share(k, a, ndev, r) for k, a in layers.items()} for r in range(ndev)]
    tokens, start = prompt, 0
    for _ in range(steps):
        feeds = dict(tokens=tokens, positions=range(start, start + len(tokens)), lens=[len(tokens)], starts=[start])
        arrays = {k: np.array(list(v), np.int32) for k, v in {**feeds, "rows": range(len(tokens))}.items()}

        def device(rank: Rank) -> dict[str, np.ndarray]:
            part = instantiate(graph, ndev, rank.rank)
            return run(part, {**arrays, **state[rank.rank]}, folder=it.folder, float64=True, communicator=rank)

        results = list(run_ranks(ndev, device))
        logits = results[0]["logits"]
        # onnxruntime computes in float32: sums of a few hundred products through three layers, relative to the largest logit.
        assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max()
        state = [{k.replace("_out.", "."): v for k, v in r.items() if k != "logits"} for r in results]
        start += len(tokens)
        tokens = [int(logits[-1].argmax())]
        wanted, cache = Reference(it.folder / "model.onnx").logits(tokens, cache)


@pytest.mark.parametrize("disable", ["fuse_swiglu", "fuse_add_rms_norm", "fuse_norm_rope"])
@pytest.mark.parametrize("stage", ["fused", "paged", "contiguous"])
def test_what_was_not_fused_is_shared_too(stage, disable):
    it = model(MODELS[0])
    before = assign_roles(to_fused(import_onnx(it.folder / "model.onnx"), "f64", {disable}))[0]
    graph, met = shard(before)
    assert met == 5
    if stage != "fused":
        graph = roll_layers(legal(graph, ALL, stage))[0]
    inputs = inputs_of(graph, it.data)

    def device(rank: Rank) -> dict[str, np.ndarray]:
        mine = {k: share(k, a, 2, rank.rank) for k, a in inputs.items()}
        return run(instantiate(graph, 2, rank.rank), mine, folder=it.folder, float64=True, communicator=rank)

    assert_same(it.graph, together(list(run_ranks(2, device))), it.wanted, it.data, stage == "paged", BOUND)


def test_biases_of_queries_keys_and_values_are_cut_with_their_rows():
    """Nothing legal takes a bias yet; what is cut does not depend on that."""
    it = model(MODELS[1])
    rng = np.random.default_rng(11)
    bias = Constant(Value("attn_qkv_b.0", TensorType("f64", (200,))), constants.Inline(rng.normal(size=200)))
    nodes = tuple(
        replace(n, inputs=(*n.inputs[:2], bias.name)) if n.op == "linear" and n.inputs[1] == "attn_qkv.0" else n
        for n in it.graph.nodes
    )
    whole = verify(replace(it.graph, nodes=nodes, constants={**it.graph.constants, bias.name: bias}))
    graph = verify(shard(whole)[0])
    assert str(graph.type(bias.name)) == "f64[50*G]" and graph.meta["cuts"]["attn_qkv_b"]["parts"] == [120, 40, 40]
    wanted = run(whole, it.data.contiguous, folder=it.folder, float64=True)

    def device(rank: Rank) -> dict[str, np.ndarray]:
        mine = {k: share(k, a, 4, rank.rank) for k, a in it.data.contiguous.items()}
        return run(instantiate(graph, 4, rank.rank), mine, folder=it.folder, float64=True, communicator=rank)

    assert_same(it.graph, together(list(run_ranks(4, device))), wanted, it.data, False, BOUND)


# --- what is cut, and how -------------------------------------------------------------------------------------------------------------------------


def test_sizes_and_meeting_places():
    it = model(MODELS[1])  # 4 kv heads, 12 heads of 10, one layer, a head of its own
    graph, met = shard(it.graph)
    assert met == 3
    hidden, inner, vocabulary = (
        it.graph.type("input_embd").shape[1],
        it.graph.type("ffn_down.0").shape[1],
        it.graph.type("output_embd").shape[0],
    )
    assert graph.meta["shard"] == {"G": 4, "I": inner, "V": vocabulary}
    assert graph.meta["cuts"] == {
        "attn_qkv": {"axis": 0, "parts": [120, 40, 40]},
        "attn_o": {"axis": 1, "parts": [120]},
        "ffn_gate_up": {"axis": 0, "parts": [inner, inner]},
        "ffn_down": {"axis": 1, "parts": [inner]},
        "output_embd": {"axis": 0, "parts": [vocabulary]},
    }
    shapes = {
        "attn_qkv.0": f"[50*G, {hidden}]",
        "attn_o.0": f"[{hidden}, 30*G]",
        "ffn_gate_up.0": f"[2*I, {hidden}]",
        "ffn_down.0": f"[{hidden}, I]",
        "output_embd": f"[V, {hidden}]",
        "input_embd": f"[{vocabulary}, {hidden}]",
        "attn_q_norm.0": "[10]",
        "attn_norm.0": f"[{hidden}]",
        "k_cache.0": "[R, G, C, 10]",
        "v_cache.0": "[R, G, C, 10]",
        "logits": f"[L, {vocabulary}]",
        "logits_part": "[L, V]",
        "o_sum.0": f"[T, {hidden}]",
        "down_sum.0": f"[T, {hidden}]",
    }
    assert {k: str(graph.type(k)).removeprefix("f64") for k in shapes} == shapes
    assert graph.counts()["all_reduce"] == 2 and graph.counts()["all_gather"] == 1
    for name in ("o.0", "down.0"):  # partial sums are read by nobody else
        assert [n.op for n in graph.consumers[name]] == ["all_reduce"]
    assert {k: c.data for k, c in graph.constants.items()} == {k: c.data for k, c in it.graph.constants.items()}
    assert parse(to_text(graph)) == graph


def test_the_head_is_cut_only_where_it_can_be_gathered():
    it = model(MODELS[1])
    graph, met = shard(it.graph, gather=False)
    assert met == 2 and "all_gather" not in graph.counts() and "V" not in graph.meta["shard"]
    assert graph.type("output_embd") == it.graph.type("output_embd") and "output_embd" not in graph.meta["cuts"]


def test_a_tied_head_has_its_own_part_and_the_embedding_is_whole():
    it = model(MODELS[0])
    assert "output_embd" not in it.graph.constants
    graph, _ = shard(it.graph)
    assert graph.constants["output_embd"].data == graph.constants["input_embd"].data
    assert str(graph.type("output_embd").shape[0]) == "V" and isinstance(graph.type("input_embd").shape[0], int)
    head = next(n for n in legal(graph, ALL).nodes if n.output == "logits_part")
    assert head.attrs["scale"] == "scale_output"
    whole, _ = shard(it.graph, gather=False)
    assert "output_embd" not in whole.constants


def test_parts_of_weights():
    it, ndev = model(MODELS[1]), 2
    graph, _ = shard(it.graph)
    for name, cut in (("attn_qkv.0", graph.meta["cuts"]["attn_qkv"]), ("ffn_down.0", graph.meta["cuts"]["ffn_down"])):
        whole = constants.load(it.graph.constants[name].data, it.folder)
        pieces = [constants.load(part_of(it.graph.constants[name].data, cut, ndev, r), it.folder) for r in range(ndev)]
        if cut["axis"] == 1:
            assert np.array_equal(np.concatenate(pieces, axis=1), whole)
            continue
        # Rows of queries, keys and values: each device has its heads of each.
        q, k, v = np.split(whole, [120, 160])
        for r, piece in enumerate(pieces):
            expected = [x[r * len(x) // 2 : (r + 1) * len(x) // 2] for x in (q, k, v)]
            assert np.array_equal(piece, np.concatenate(expected))
    data = it.graph.constants["attn_norm.0"].data
    assert part_of(data, None, 4, 3) is data and part_of(data, graph.meta["cuts"]["attn_o"], 1, 0) is data


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_and_sharing_of_buffers_are_those_of_one_device(shape, kv):
    whole = roll_layers(legal(fused(shape), ALL, kv))
    cut = roll_layers(legal(shard(fused(shape), gather=False)[0], ALL, kv))
    assert cut[1] == whole[1]
    a, b = plan_memory(whole[0]), plan_memory(cut[0])
    assert a.buffers == b.buffers and a.groups == b.groups
    for scope, places in a.places.items():
        for name, place in places.items():
            assert b.places[scope][name].buffer == place.buffer
    # Cutting the head takes one buffer more: a device's part of the logits.
    head = roll_layers(legal(shard(fused(shape))[0], ALL, kv))
    c = plan_memory(head[0])
    assert head[1] == whole[1]
    more = {n for n, b in c.buffers.items() if b.kind == "scratch"} - {
        n for n, b in a.buffers.items() if b.kind == "scratch"
    }
    assert more == {"logits_part"}
    assert {u: s for u, s in c.groups["main"].items() if u != sym("L")} == {
        u: s for u, s in a.groups["main"].items() if u != sym("L")
    }
    row = c.buffers["logits_part"]
    assert c.groups["main"][sym("L")] - a.groups["main"][sym("L")] <= row.bytes
    assert {k: v for k, v in c.groups.items() if k != "main"} == {k: v for k, v in a.groups.items() if k != "main"}


def test_sums_take_the_memory_of_their_parts():
    plan = plan_memory(lowered(MODELS[2], "paged"))
    for name in ("o", "down"):
        assert plan.place("layer", f"{name}_sum").buffer == plan.place("layer", name).buffer == name
    assert plan.place("main", "logits").buffer != plan.place("main", "logits_part").buffer


def test_places_are_symbolic():
    plan = plan_memory(lowered(MODELS[2], "contiguous"))  # eight kv heads, two query heads each, of four
    k = plan.place("layer", "k_heads")
    assert [str(s) for s in k.type.shape] == ["T", "G", "4"] and [str(s) for s in k.strides] == ["16*G", "4", "1"]
    assert [str(o) for o in k.offset] == ["8*G"]
    up = plan.place("layer", "up")
    assert [str(s) for s in up.strides] == ["2*I", "1"] and [str(o) for o in up.offset] == ["I"]
    assert str(plan.place("main", "logits_part").strides[0]) == "V"
    for buffer in plan.buffers.values():
        assert not {"G", "I", "V"} & set(str(buffer.unit).split("*"))


def test_a_graph_for_one_device_stays_as_it_was():
    """What legalise and the plan give for graphs that are not cut does not know of devices."""
    graph = legal(model(MODELS[1]).graph, ALL)
    assert not {"shard", "cuts", "inner_multiple"} & set(graph.meta)
    assert all(isinstance(d, int) for c in graph.constants.values() for d in c.value.type.shape)
    assert not any("all_" in n.op for n in graph.nodes)


# --- refusals -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fused", "paged", "contiguous"])
@pytest.mark.parametrize(
    "symbol, what", [("G", "key/value heads"), ("I", "intermediate elements"), ("V", "rows of the vocabulary")]
)
def test_sizes_that_do_not_divide_are_named(symbol, what, stage):
    graph = lowered(MODELS[2], stage)  # everything divides by four
    odd = replace(graph, meta={**graph.meta, "shard": {**graph.meta["shard"], symbol: 58}})
    with pytest.raises(UnsupportedError, match=f"58 {what} cannot be shared among 4 devices alike"):
        instantiate(odd, 4, 3)
    with pytest.raises(UnsupportedError, match="8 key/value heads cannot be shared among 3 devices alike"):
        instantiate(graph, 3, 0)


def test_the_vocabulary_divides_or_is_not_cut():
    graph = fused(SHAPES[4])  # 135 rows, two kv heads
    with pytest.raises(UnsupportedError, match="135 rows of the vocabulary cannot be shared among 2 devices"):
        whole = shard(graph)[0]
        instantiate(replace(whole, meta={**whole.meta, "shard": {**whole.meta["shard"], "I": 104}}), 2, 0)
    assert instantiate(shard(graph, gather=False)[0], 2, 1).type("logits").shape[-1] == 135


def test_there_are_only_so_many_devices():
    for rank, ndev in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(UnsupportedError, match=f"there is no device {rank} of {ndev}"):
            instantiate(lowered(MODELS[0], "fused"), ndev, rank)


def test_targets_without_the_collective_are_refused():
    graph, _ = shard(model(MODELS[1]).graph)
    with pytest.raises(
        UnsupportedError, match="target odd: all_reduce in f64 cannot be compiled .*odd has no AllReduce"
    ):
        legal(graph, replace(ALL, name="odd", collectives=()))
    with pytest.raises(UnsupportedError, match="all_gather in f64 cannot be compiled .*odd has no AllGather"):
        legal(graph, replace(ALL, name="odd", collectives=("AllReduce",)))
    with pytest.raises(
        UnsupportedError, match="all_reduce in f64 cannot be compiled .*AllReduce on odd takes f32, f16, not f64"
    ):
        legal(graph, replace(ALL, name="odd", collective_dtypes=("f32", "f16")))
    legal(graph, replace(ALL, collective_dtypes=("f32", "f64")))
    half, _ = shard(model(MODELS[1]).graph, gather=False)
    legal(half, replace(ALL, collectives=("AllReduce",)))


def test_layers_that_differ_cannot_be_shared_alike():
    graph = fused(SHAPES[1])
    data = constants.Slice(graph.constants["ffn_down.1"].data, 1, 0, 5)
    narrow = Constant(Value("ffn_down.1", TensorType("f64", tuple(data.shape))), data)
    odd = replace(graph, constants={**graph.constants, "ffn_down.1": narrow})
    with pytest.raises(UnsupportedError, match="layers differ in their inner"):
        shard(odd)


def test_cuts_through_heads_are_refused():
    """A split that does not separate whole heads: devices could not have their parts of it."""
    graph = model(MODELS[1]).graph
    nodes = [
        replace(n, attrs={**n.attrs, "sizes": (121, 39, 40)}) if n.op == "split" and len(n.outputs) == 3 else n
        for n in graph.nodes
    ]
    with pytest.raises(UnsupportedError, match="split q.0 cuts 200 elements at 121, which devices cannot share"):
        shard(replace(graph, nodes=tuple(nodes)))


def test_constants_and_their_whole_sizes_are_verified():
    graph = lowered(MODELS[1], "fused")
    with pytest.raises(GraphError, match=r"constant attn_o.0 is f64\[\d+, 30\*G\], its data is f64\[\d+, 120\]"):
        verify(replace(graph, meta={**graph.meta, "shard": {**graph.meta["shard"], "G": 5}}))


def test_unlike_tensors_in_a_collective_are_an_error():
    node = Node("all_reduce", ("x",), (Value("y", TensorType("f64", (sym("N"),))),))
    graph = Graph("g", "fused", (Value("x", TensorType("f64", (sym("N"),))),), ("y",), {}, (node,))

    def device(rank: Rank) -> dict[str, np.ndarray]:
        return run(graph, {"x": np.ones(3 + rank.rank)}, communicator=rank)

    with pytest.raises(GraphError, match=r"different tensors: float64\[3\], float64\[4\]"):
        run_ranks(2, device)
    assert_close(run(graph, {"x": np.ones(3)})["y"], np.ones(3), "y", 0.0)  # alone, a sum of one

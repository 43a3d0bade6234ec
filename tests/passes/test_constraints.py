"""What a target's record limits shapes the calls, and nothing else does. What targets can is written down here by hand, apart from targets.json."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ir.errors import UnsupportedError
from ir.graph import Graph, Node
from ir.interp import run
from ir.ops_infini import IN_PLACE
from ir.text import parse, to_text
from ir.types import bind
from passes.plan import Place, Plan, plan_memory
from passes.roll import roll_layers
from passes.shard import instantiate, shard
from passes.targets import targets
from tests.passes.arena import Arena
from tests.passes.lowered import SHAPES, WIDE, any_dtype, assert_same, batch, check, expected, folder, fused, legal

TWO = SHAPES[1]  # six heads of six, three kv heads
ONE = SHAPES[2]  # one kv head


def bodies(graph: Graph) -> list[Graph]:
    return [b for n in graph.nodes if n.op == "loop.requests" for b in (n.attrs["prefill"], n.attrs["decode"])]


def gemms(graph: Graph) -> list[Node]:
    return [n for b in bodies(graph) for n in b.nodes if n.op == "infini.gemm"]


def why(graph: Graph, op: str) -> str:
    return next(reason for name, _, reason, _ in graph.meta["legalised"] if name == op)


def in_memory(shape: tuple, graph: Graph, keys: float = 1.0) -> None:
    _, wanted = expected(shape)
    data = batch(fused(shape), keys=keys)
    found = Arena(graph, plan_memory(graph), data.inputs(graph), folder(shape)).run()
    assert_same(fused(shape), found, wanted, data, graph.meta["kv"] == "paged", keys=keys)


# --- uncertain ops --------------------------------------------------------------------------------------------------------------------------------


def test_uncertain_ops_are_used_only_where_paged_caches_are_asked_for():
    for name in ("cambricon", "metax", "moore"):
        assert legal(fused(WIDE, "bf16"), targets()[name]).meta["kv"] == "contiguous"
        graph = legal(fused(WIDE, "bf16"), targets()[name], "paged")
        assert graph.meta["kv"] == "paged"
        check(WIDE, graph, "bf16")
    # qy's add_rms_norm is uncertain too, and has nothing to do with the caches: it is never taken. Its paged attention is absent, not uncertain.
    for kv in ("auto", "contiguous"):
        assert "infini.add_rms_norm" not in legal(fused(WIDE, "bf16"), targets()["qy"], kv).counts()
    with pytest.raises(UnsupportedError, match="qy has no paged_attention"):
        legal(fused(WIDE, "bf16"), targets()["qy"], "paged")


# --- swiglu and other shapes ----------------------------------------------------------------------------------------------------------------------


def test_the_inner_size_must_suit_swiglu():
    limited = any_dtype("odd", swiglu=dict(last_multiple=8))
    assert fused(TWO).constants["ffn_down.0"].value.type.shape[1] % 8  # type: ignore[operator]
    graph = legal(fused(TWO), limited)
    assert "infini.swiglu" not in graph.counts() and "multiple of 8" in why(graph, "swiglu")
    check(TWO, graph)
    graph = legal(fused(WIDE), limited)  # 104
    assert "infini.swiglu" in graph.counts() and why(graph, "swiglu") == ""
    assert "inner_multiple" not in graph.meta  # known when compiling
    without = any_dtype("odd", "silu", swiglu=dict(last_multiple=8))
    with pytest.raises(
        UnsupportedError, match=r"swiglu in f64 cannot .* multiple of 8, not \d+; silu, mul: odd has no silu"
    ):
        legal(fused(TWO), without)


def test_a_devices_part_of_the_inner_size_is_left_to_the_engine():
    sharded = shard(fused(WIDE))[0]
    graph = legal(sharded, any_dtype("odd", swiglu=dict(last_multiple=8)))
    assert graph.meta["inner_multiple"] == 8 and "infini.swiglu" in graph.counts()
    assert "inner_multiple" not in legal(sharded, any_dtype("odd")).meta
    # Of all of it, the compiler can tell.
    off = legal(shard(fused(TWO))[0], any_dtype("odd", swiglu=dict(last_multiple=8)))
    assert "infini.swiglu" not in off.counts() and "inner_multiple" not in off.meta


def test_ranks():
    graph = legal(fused(TWO), any_dtype("odd", swiglu=dict(ranks=(3,))))
    assert "infini.swiglu" not in graph.counts() and "rank 3, not 2" in why(graph, "swiglu")
    assert "infini.swiglu" in legal(fused(TWO), any_dtype("odd", swiglu=dict(ranks=(2, 3)))).counts()


def test_rows_of_scores_are_as_long_as_the_context():
    rows = any_dtype("odd", causal_softmax=dict(max_row_bytes=60 * 8))  # CONTEXT tokens in f64
    assert legal(fused(TWO), rows, "contiguous").meta["kv"] == "contiguous"
    rows = any_dtype("odd", causal_softmax=dict(max_row_bytes=60 * 8 - 1))
    with pytest.raises(
        UnsupportedError,
        match="causal_softmax on odd takes rows of at most 479 bytes: 59 tokens of context in f64, not 60",
    ):
        legal(fused(TWO), rows, "contiguous")
    assert legal(fused(TWO), rows).meta["kv"] == "paged"  # paged attention has no such rows


def test_norms_rows():
    width = fused(TWO).type("hidden.0").shape[-1] * 8  # type: ignore[operator]
    legal(fused(TWO), any_dtype("odd", rms_norm=dict(max_row_bytes=width)))
    with pytest.raises(UnsupportedError, match=f"at most {width - 1} bytes, not {width}"):
        legal(fused(TWO), any_dtype("odd", rms_norm=dict(max_row_bytes=width - 1)))


# --- gemm -----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit",
    [dict(single_batch_dtypes=("f64",)), dict(ranks=(2,))],
    ids=["single_batch", "ranks"],
)
def test_one_gemm_per_matrix(limit):
    graph = roll_layers(legal(fused(TWO), any_dtype("odd", gemm=limit), "contiguous"))[0]
    assert parse(to_text(graph)) == graph
    body = next(n for n in graph.nodes if n.op == "loop.layers").attrs["body"]
    assert [n.attrs.get("each") for n in gemms(body)] == [True] * 4
    assert all("each" not in n.attrs for g in (graph, body) for n in g.nodes)  # products with weights are 2-D
    assert "one gemm per head, since gemm on odd takes one matrix" in why(graph, "attention_cached")
    in_memory(TWO, graph)


def test_gemms_of_several_matrices_stay_one_call_where_they_may():
    limit = any_dtype("odd", gemm=dict(single_batch_dtypes=("f32",)))
    assert not any(n.attrs.get("each") for n in gemms(legal(fused(TWO), limit, "contiguous")))  # f64
    limit = any_dtype("odd", gemm=dict(single_batch_dtypes=("f64",)))
    graph = legal(fused(ONE), limit, "contiguous")  # one kv head: one matrix
    assert (
        not any(n.attrs.get("each") for n in gemms(graph)) and why(graph, "attention_cached") == "paged: not asked for"
    )
    assert legal(fused(TWO), limit).meta["kv"] == "paged" and not gemms(legal(fused(TWO), limit))
    # What devices share counts whole: there may be one device.
    assert all(n.attrs.get("each") for n in gemms(legal(shard(fused(TWO))[0], limit, "contiguous")))


@pytest.mark.parametrize("name, dtype, each", [("qy", "f32", True), ("qy", "bf16", False), ("hygon", "f32", False)])
def test_batches_on_qy_are_wrong_in_f32(name, dtype, each):
    found = gemms(legal(fused(WIDE, dtype), targets()[name], "contiguous"))
    assert len(found) == 2 * 4 and all(bool(n.attrs.get("each")) == each for n in found)


def root(graph: Graph) -> float:
    """The root of the attention's scale, which an exporter has written as float32."""
    (scale,) = {n.attrs["scale"] for n in graph.nodes if n.op == "attention_cached"}
    return math.sqrt(scale)


ONLY_ONE = dict(alphas=((1, 0), (1, 1)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_gemm_takes_no_factor_the_rope_tables_carry_the_scale(shape):
    factor = root(fused(shape))
    assert factor == pytest.approx(shape[3] ** -0.25, rel=1e-7)
    graph = roll_layers(legal(fused(shape), any_dtype("odd", gemm=ONLY_ONE), "contiguous"))[0]
    inner = [n.attrs["body"] for n in graph.nodes if n.op == "loop.layers"] or [graph]
    assert {n.attrs["alpha"] for g in inner for n in gemms(g) if "alpha" in n.attrs} == {1.0}
    tables = [n for n in graph.nodes if n.op == "setup.rope_table"]
    assert [n.attrs["attention_factor"] for n in tables] == [factor]
    assert graph.meta["gemm_alphas"] == [[1, 0], [1, 1]]
    assert "the scale is in the rope tables, since gemm on odd takes no factor" in why(graph, "attention_cached")
    in_memory(shape, graph, keys=factor)


def test_the_scale_stays_where_gemm_takes_it():
    pair = next(n.attrs["scale"] for n in fused(TWO).nodes if n.op == "attention_cached")
    for target, kv in (
        (any_dtype("any"), "contiguous"),
        (any_dtype("odd", gemm=ONLY_ONE), "paged"),
        (any_dtype("odd", gemm=dict(alphas=((pair, 0), (1, 0)))), "contiguous"),
    ):
        graph = legal(fused(TWO), target, kv)
        tables = [n for n in graph.nodes if n.op == "setup.rope_table"]
        assert [n.attrs["attention_factor"] for n in tables] == [1.0]
        assert {n.attrs["alpha"] for n in gemms(graph) if "alpha" in n.attrs} <= {pair}
        check(TWO, graph)
    assert "gemm_alphas" not in legal(fused(TWO), any_dtype("any")).meta


def test_unfused_ropes_carry_it_too():
    off = frozenset(["fuse_norm_rope"])
    graph = legal(fused(TWO, "f64", off), any_dtype("odd", gemm=ONLY_ONE), "contiguous")
    check(TWO, graph, "f64", off, keys=root(fused(TWO)))


def scaled(graph: Graph, scale: float, layer: int | None = None) -> Graph:
    return replace(
        graph,
        nodes=tuple(
            replace(n, attrs={**n.attrs, "scale": scale})
            if n.op == "attention_cached" and layer in (None, int(n.output.rsplit(".", 1)[1]))
            else n
            for n in graph.nodes
        ),
    )


def test_scales_that_rope_tables_cannot_carry():
    limited = any_dtype("odd", gemm=ONLY_ONE)
    with pytest.raises(
        UnsupportedError, match=r"takes \(alpha, beta\) \(1, 0\), \(1, 1\): the scale -0.5 of .* has no square root"
    ):
        legal(scaled(fused(TWO), -0.5), limited, "contiguous")
    assert legal(scaled(fused(TWO), -0.5), limited).meta["kv"] == "paged"
    # Queries that something else reads as well.
    graph = fused(TWO)
    query = next(n for n in graph.nodes if n.op == "attention_cached").inputs[0]
    with pytest.raises(UnsupportedError, match="is read elsewhere too"):
        legal(replace(graph, outputs=(*graph.outputs, query)), limited, "contiguous")
    # Queries that are not rotated.
    attention = next(n for n in graph.nodes if n.op == "attention_cached")
    raw = graph.producers[query].inputs[0]
    nodes = [replace(n, inputs=(raw, *n.inputs[1:])) if n is attention else n for n in graph.nodes]
    with pytest.raises(UnsupportedError, match="comes from no rope"):
        legal(replace(graph, nodes=tuple(nodes)), limited, "contiguous")
    with pytest.raises(UnsupportedError, match="linear in f64 cannot be compiled .*gemm on odd takes no factor 1"):
        legal(graph, any_dtype("odd", gemm=dict(alphas=((0.5, 0),))))


def test_a_scale_of_one_needs_no_tables():
    graph = legal(scaled(fused(TWO), 1.0), any_dtype("odd", gemm=ONLY_ONE), "contiguous")
    assert {n.attrs["attention_factor"] for n in graph.nodes if n.op == "setup.rope_table"} == {1.0}
    assert why(graph, "attention_cached") == "paged: not asked for"


def test_layers_with_scales_of_their_own_have_tables_of_their_own():
    before = scaled(fused(TWO), 0.25, 0)
    graph = legal(before, any_dtype("odd", gemm=ONLY_ONE), "contiguous")
    factors = [n.attrs["attention_factor"] for n in graph.nodes if n.op == "setup.rope_table"]
    assert factors == [0.5, root(fused(TWO))]
    data = batch(before)
    zero = {k: v * 0 if "_cache." in k else v for k, v in data.contiguous.items()}
    zero["starts"], zero["positions"] = zero["starts"] * 0, zero["positions"]  # nothing cached yet
    wanted = run(before, zero, folder=folder(TWO), float64=True)["logits"]
    found = run(graph, zero, folder=folder(TWO), float64=True)["logits"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


def test_results_of_one_column_are_not_column_major():
    """A result of one column, as the scores of the first token are, has a row stride of 1, which says column-major: its rows are laid further apart."""
    limited = any_dtype("odd", gemm=dict(row_major_output=True))
    graph = roll_layers(legal(fused(TWO), limited, "contiguous"))[0]
    assert parse(to_text(graph)) == graph
    plan = plan_memory(graph)
    for scope in ("decode", "prefill"):
        scores = plan.place(scope, "scores")
        assert [str(s) for s in scores.strides[1:]] == ["ld", "1"] and not scores.contiguous()
        assert plan.place(scope, "probs").buffer == scores.buffer
    assert {str(u) for u in plan.groups["decode"]} == {"ld"} and "ld*len" in {str(u) for u in plan.groups["prefill"]}
    in_memory(TWO, graph)
    assert not any(n.attrs.get("pitch") for n in gemms(legal(fused(TWO), any_dtype("any"), "contiguous")))
    assert not gemms(legal(fused(TWO), limited, "paged"))


# --- indices --------------------------------------------------------------------------------------------------------------------------------------


def dtypes(graph: Graph) -> dict[str, str]:
    return {v.name: v.type.dtype for v in graph.inputs if "_cache." not in v.name}


def test_indices_have_the_dtype_that_the_target_takes():
    every = any_dtype("any")
    usual = dict(
        tokens="i32", positions="i32", rows="i32", slots="i32", block_tables="i32", seq_lens="i32", cu_lens="i32"
    )
    assert dtypes(legal(fused(TWO), every)) == usual
    assert dtypes(legal(fused(TWO), every, "contiguous")) == dict.fromkeys(
        ("tokens", "positions", "rows", "lens", "starts"), "i32"
    )
    wide = any_dtype("odd", embedding=dict(index_dtypes=("i64",)), paged_caching=dict(index_dtypes=("i64",)))
    graph = legal(fused(TWO), wide)
    assert dtypes(graph) == {**usual, "tokens": "i64", "rows": "i64", "slots": "i64"}
    check(TWO, graph)
    graph = legal(fused(TWO), any_dtype("odd", rope=dict(index_dtypes=("u8", "i64", "u64"))))
    assert dtypes(graph) == {**usual, "positions": "i64"}
    check(TWO, graph)
    # Tables and lengths share one dtype: decode and prefill read the same.
    mixed = dict(
        paged_attention=dict(index_dtypes=("i32", "i64")), paged_attention_prefill=dict(index_dtypes=("i64", "u32"))
    )
    graph = legal(fused(TWO), any_dtype("odd", **mixed))
    assert dtypes(graph) == {**usual, "block_tables": "i64", "seq_lens": "i64", "cu_lens": "i64"}
    check(TWO, graph)


@pytest.mark.parametrize("name", ["cpu", "nvidia", "ascend", "kunlun", "qy", "embedded"])
def test_indices_of_real_targets(name):
    """Everybody takes i32 where it is an index, and slots are i64 everywhere."""
    for graph in (legal(fused(WIDE, "bf16"), targets()[name]), legal(fused(WIDE, "bf16"), targets()["nvidia"])):
        assert {v for k, v in dtypes(graph).items() if k != "slots"} == {"i32"}
        assert dtypes(graph).get("slots", "i64") == "i64"


def test_index_dtypes_that_the_engine_cannot_write():
    with pytest.raises(UnsupportedError, match="norm_rope in f64 .*rope takes u8, u64; the engine has i32 or i64"):
        legal(fused(TWO), any_dtype("odd", rope=dict(index_dtypes=("u8", "u64"))))
    graph = legal(fused(TWO), any_dtype("odd", embedding=dict(index_dtypes=("u32",))))
    assert "infini.copy_rows" in graph.counts() and "infini.copy_chosen_rows" in graph.counts()
    disjoint = dict(paged_attention=dict(index_dtypes=("i32",)), paged_attention_prefill=dict(index_dtypes=("i64",)))
    graph = legal(fused(TWO), any_dtype("odd", **disjoint))
    assert graph.meta["kv"] == "contiguous" and "paged_attention takes i32; paged_attention_prefill takes i64" in why(
        graph, "attention_cached"
    )


# --- every call as the target takes it ------------------------------------------------------------------------------------------------------------

SIZES = (  # tokens, rows, requests, blocks, columns, capacity, length and position within a request
    dict(T=1, L=1, R=1, B=3, M=1, R1=2, C=40, len=1, pos=0),
    dict(T=7, L=2, R=3, B=9, M=4, R1=4, C=40, len=5, pos=11),
)


def strides(place: Place, symbols: dict[str, int]) -> list[int]:
    return [bind(s, symbols) for s in place.strides]


def calls(graph: Graph, plan: Plan, scope: str = "main"):
    """(node, its operands' places, its results' places) of every call of a graph and the bodies in it."""
    places = plan.places[scope]
    for node in graph.nodes:
        if node.op == "loop.layers":
            yield from calls(node.attrs["body"], plan, node.attrs["body"].name)
        elif node.op == "loop.requests":
            for which in ("prefill", "decode"):
                yield from calls(node.attrs[which], plan, which)
        elif node.op.startswith("infini."):
            yield node, [places[i] for i in node.inputs], [places[v.name] for v in node.outputs]


@pytest.mark.parametrize("ndev", [1, 2])
@pytest.mark.parametrize("kv", ["paged", "contiguous"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", sorted(targets()))
def test_calls_are_such_as_the_target_takes(name, dtype, kv, ndev):
    target = targets()[name]
    paged = {"nvidia", "ascend", "iluvatar", "hygon", "ali", "cambricon", "metax", "moore", "embedded"}
    if kv == "paged" and (name not in paged or (dtype == "f32" and name != "embedded")):
        return  # refused: tests/passes/test_legalise.py
    graph = fused(WIDE, dtype)
    if ndev > 1:
        if "AllReduce" not in target.collectives:
            return
        graph = shard(graph, gather="AllGather" in target.collectives)[0]
    graph = roll_layers(legal(graph, target, kv))[0]
    plan = plan_memory(graph)
    for sizes in SIZES:
        symbols = {k: v // ndev for k, v in graph.meta.get("shard", {}).items()}
        symbols.update(sizes, cap=sizes["C"], total=sizes["pos"] + sizes["len"], ld=max(sizes["pos"] + sizes["len"], 2))
        for node, operands, results in calls(graph, plan):
            check_call(name, dtype, node, operands, results, symbols)


def check_call(
    name: str, dtype: str, node: Node, operands: list[Place], results: list[Place], symbols: dict[str, int]
) -> None:
    where = f"{name}: {node.op} {node.output} {symbols}"
    op = node.op.removeprefix("infini.")
    shapes = [[bind(d, symbols) for d in p.type.shape] for p in [*results, *operands]]
    steps = [strides(p, symbols) for p in [*results, *operands]]
    if op == "gemm":
        for s in steps:
            assert s[-1] == 1 or s[-2] == 1, where
        assert not (name in ("ascend", "moore") and steps[0][-2] == 1), where
        assert name != "ascend" or node.attrs.get("alpha", 1.0) == 1.0, where
        many = len(shapes[0]) == 3 and not node.attrs.get("each")
        assert not (name == "qy" and dtype == "f32" and many), where
    if op in ("rms_norm", "add_rms_norm", "swiglu", "causal_softmax"):
        assert all(s[-1] == 1 for s in steps) and len(shapes[0]) in (2, 3), where
    if op == "rope":
        assert len(shapes[0]) == 3 and steps[0][-1] == steps[1][-1] == 1, where
        assert name != "ascend" or shapes[0][-1] % 16 == 0, where
        for operand in operands[1:]:
            assert operand.contiguous(), where
    if op in ("embedding", "gather_rows"):
        assert all(p.contiguous() for p in [*operands, *results]), where
    if op == "paged_attention_ragged":
        assert steps[0][1] == steps[1][1] == shapes[0][2] and shapes[0][2] == 64, where  # heads lie one after the other
    if op == "paged_caching":
        assert all(s[1] == 64 and s[2] == 1 for s in steps[4:6]), where
    if op == "add_rms_norm":
        assert (results[0].buffer, results[0].offset) != (results[1].buffer, results[1].offset), where
    if op == "rearrange":
        assert 0 not in steps[0], where
    for i, result in enumerate(
        results
    ):  # results in an operand's memory only where InfiniCore allows it, and with its layout
        for k, operand in enumerate(operands):
            if operand.buffer == result.buffer and operand.offset == result.offset and op != "rearrange_into":
                assert IN_PLACE[node.op].get(i) == k and operand.strides == result.strides, where


def test_an_instantiated_graph_is_as_legal():
    graph = legal(
        shard(fused(WIDE), gather=False)[0], any_dtype("odd", gemm=dict(single_batch_dtypes=("f64",))), "contiguous"
    )
    part = instantiate(graph, 2, 1)
    assert all(n.attrs["each"] for n in gemms(part))

"""The memory plan, proven by execution: graphs run with every value where the plan puts it, in memory that was poisoned first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import GraphError
from ir.graph import Graph, GraphEditor, Value
from ir.interp import run
from ir.types import TensorType, bind, sym
from ir.verify import verify
from passes.plan import ALIGNMENT, Plan, plan_memory, reshape_strides
from passes.roll import roll_layers
from tests.passes.arena import Arena
from tests.passes.lowered import SHAPES, any_dtype, assert_same, expected, folder, fused, legal

T, L = sym("T"), sym("L")
VARIANTS = [(), ("add_rms_norm",), ("swiglu",), ("embedding",), ("add_rms_norm", "swiglu", "embedding")]


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rolled", [True, False], ids=["rolled", "flat"])
def test_models_run_in_planned_memory(shape, kv, rolled):
    graph = legal(fused(shape), any_dtype("test"), kv)
    if rolled:
        graph = roll_layers(graph)[0]
    in_memory(shape, graph)


@pytest.mark.parametrize("without", VARIANTS, ids="+".join)
@pytest.mark.parametrize("kv", ["paged", "contiguous"])
def test_other_sequences_of_calls_do_too(kv, without):
    in_memory(SHAPES[2], roll_layers(legal(fused(SHAPES[2]), any_dtype("test", *without), kv))[0])


@pytest.mark.parametrize("disable", ["fuse_swiglu", "fuse_add_rms_norm", "fuse_norm_rope"])
def test_unfused_models_do_too(disable):
    off = frozenset([disable])
    for kv in ("paged", "contiguous"):
        in_memory(SHAPES[2], roll_layers(legal(fused(SHAPES[2], "f64", off), any_dtype("test"), kv))[0], off)


def in_memory(shape: tuple, graph: Graph, disable: frozenset[str] = frozenset()) -> None:
    data, wanted = expected(shape, "f64", disable)
    found = Arena(graph, plan_memory(graph), data.inputs(graph), folder(shape)).run()
    assert_same(fused(shape, "f64", disable), found, wanted, data, graph.meta["kv"] == "paged")


def scratch(plan: Plan, scope: str = "main") -> dict[str, int]:
    return {str(unit): size for unit, size in plan.groups[scope].items()}


def test_memory_is_reused():
    for shape in ((2, 6, 3, 6, False), (3, 6, 1, 4, True), (4, 2, 2, 14, False)):
        graph = roll_layers(legal(fused(shape, "f32"), any_dtype("test"), "paged"))[0]
        plan = plan_memory(graph)
        separate: dict[str, int] = {}
        for buffer in plan.buffers.values():
            if buffer.kind == "scratch":
                separate[str(buffer.unit)] = separate.get(str(buffer.unit), 0) + buffer.bytes
        assert scratch(plan)["T"] < separate["T"]
        flat = plan_memory(legal(fused(shape, "f32"), any_dtype("test"), "paged"))
        assert scratch(flat)["T"] <= 1.5 * scratch(plan)["T"]  # unrolled layers use each other's memory


def test_the_residual_stream_stays_in_one_place():
    graph, _ = roll_layers(legal(fused(SHAPES[3], "f32"), any_dtype("test"), "paged"))
    plan = plan_memory(graph)
    loop = next(n for n in graph.nodes if n.op == "loop.layers")
    body = loop.attrs["body"]
    for i in range(loop.attrs["carried"]):
        before, after = plan.place("layer", body.inputs[i].name), plan.place("layer", body.outputs[i])
        assert (before.buffer, before.offset, before.strides) == (after.buffer, after.offset, after.strides)


# --- synthetic graphs -----------------------------------------------------------------------------------------------------------------------------

X = TensorType("f64", (T, 6))
STEPS = ("add", "mul", "silu", "swiglu", "rms_norm", "add_rms_norm", "gemm", "slice", "reshape", "turn", "join", "pick")


def random_graph(steps: list[tuple[str, int, int]], outputs: list[int]) -> Graph:
    """A graph of [T, 6], [T, 3], [T, 2, 3], [T, 12] and [L, 6] values; each step is an op and two numbers that choose its operands."""
    inputs = (
        Value("x", X),
        Value("y", X),
        Value("rows", TensorType("i32", (L,))),
        Value("w", TensorType("f64", (6,))),
        Value("m", TensorType("f64", (6, 6))),
    )
    edit = GraphEditor(Graph("random", "infini", inputs, (), {}, ()))
    # The plan never writes over inputs, so start from results of calls.
    full = [edit.add("infini.silu", [name], [name + "_in"])[0] for name in ("x", "y")]
    picked: list[str] = []
    for number, (op, i, j) in enumerate(steps):
        a, b = full[i % len(full)], full[j % len(full)]
        hint = [f"{op}.{number}"]
        if op in ("add", "mul", "swiglu"):
            full += edit.add(f"infini.{op}", [a, b], hint)
        elif op == "silu":
            full += edit.add("infini.silu", [a], hint)
        elif op == "rms_norm":
            full += edit.add("infini.rms_norm", [a, "w"], hint, dict(epsilon=1e-6))
        elif op == "add_rms_norm":
            full += edit.add("infini.add_rms_norm", [a, b, "w"], [*hint, f"sum.{number}"], dict(epsilon=1e-6))
        elif op == "gemm":
            full += edit.add("infini.gemm", [a, "m"], hint, dict(alpha=0.5))
        elif op == "slice":  # the halves of one, multiplied, and laid side by side again
            halves = [
                edit.add("view.slice", [a], [f"half.{number}.{s}"], dict(axis=1, start=s, size=3))[0] for s in (0, 3)
            ]
            product = edit.add("infini.mul", halves, [f"product.{number}"])[0]
            other = edit.add("infini.silu", [halves[1]], [f"other.{number}"])[0]
            full += edit.add("view.join", [product, other], hint, dict(axis=1))
        elif op == "reshape":
            seen = edit.add("view.reshape", [a], [f"seen.{number}"], dict(shape=(T, 2, 3)))[0]
            seen = edit.add("infini.silu", [seen], [f"act.{number}"])[0]
            full += edit.add("view.reshape", [seen], hint, dict(shape=(T, 6)))
        elif op == "turn":
            turned = edit.add("view.permute", [a], [f"turned.{number}"], dict(perm=(1, 0)))[0]
            packed = edit.add("infini.rearrange", [turned], [f"packed.{number}"])[0]
            back = edit.add("view.permute", [packed], [f"back.{number}"], dict(perm=(1, 0)))[0]
            full += edit.add("infini.rearrange", [back], hint)
        elif op == "join":
            parts = [
                edit.add("infini.rms_norm", [v, "w"], [f"part.{number}.{s}"], dict(epsilon=1e-6))[0]
                for s, v in enumerate((a, b))
            ]
            both = edit.add("view.join", parts, [f"both.{number}"], dict(axis=1))[0]
            full += edit.add("view.slice", [both], hint, dict(axis=1, start=3, size=6))
        else:
            picked += edit.add("infini.gather_rows", [a, "rows"], hint)
    wanted = [full[o % len(full)] for o in outputs] + picked[-1:]
    edit.outputs = [edit.add("infini.silu", [name], [f"out.{k}"])[0] for k, name in enumerate(wanted)]
    return edit.finish()


@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=25),
    outputs=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    tokens=st.integers(1, 5),
)
def test_random_graphs_run_in_planned_memory(steps, outputs, tokens):
    graph = random_graph(steps, outputs)
    verify(graph)
    rng = np.random.default_rng(len(steps))
    inputs = {
        "x": rng.normal(size=(tokens, 6)),
        "y": rng.normal(size=(tokens, 6)),
        "rows": rng.integers(0, tokens, 3).astype(np.int32),
        "w": rng.normal(size=6),
    }
    inputs["m"] = rng.normal(size=(6, 6))
    plan = plan_memory(graph)
    wanted = run(graph, inputs, float64=True)
    found = Arena(graph, plan, inputs).run()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-12, atol=0, err_msg=name)
    check_layout(plan, {"T": tokens, "L": 3})


def check_layout(plan: Plan, symbols: dict[str, int]) -> None:
    """Buffers lie in their group, and where several share one, each begins on a whole line whatever the symbol is."""
    for scope, groups in plan.groups.items():
        if scope != "main":
            continue
        buffers = [b for b in plan.buffers.values() if b.kind == "scratch"]
        for b in buffers:
            assert b.offset + b.bytes <= groups[b.unit]
            assert b.offset * bind(b.unit, symbols) % ALIGNMENT == 0


def test_the_executor_finds_a_bad_plan():
    """Two live values in the same bytes: the check above would notice."""
    graph = random_graph([("gemm", 0, 0), ("gemm", 1, 0), ("add", 2, 3)], [4])
    plan = plan_memory(graph)
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.normal(size=(2, 6)),
        "y": rng.normal(size=(2, 6)),
        "rows": np.zeros(1, np.int32),
        "w": rng.normal(size=6),
        "m": rng.normal(size=(6, 6)),
    }
    inputs = {v.name: inputs[v.name] for v in graph.inputs}
    wanted = run(graph, inputs, float64=True)["out.0"]
    assert np.allclose(Arena(graph, plan, inputs).run()["out.0"], wanted)
    squeezed = replace(
        plan, buffers={k: replace(b, offset=0) if b.kind == "scratch" else b for k, b in plan.buffers.items()}
    )
    assert not np.allclose(Arena(graph, squeezed, inputs).run()["out.0"], wanted)


def test_results_take_their_operands_memory_where_they_may():
    def places(consumer: str, reads_again: bool) -> tuple[str, str]:
        edit = GraphEditor(Graph("g", "infini", (Value("x", X), Value("w", TensorType("f64", (6,)))), (), {}, ()))
        a = edit.add("infini.rms_norm", ["x", "w"], ["a"], dict(epsilon=1e-6))[0]
        attrs = dict(epsilon=1e-6) if consumer == "rms_norm" else {}
        b = edit.add(f"infini.{consumer}", [a, "w"] if attrs else [a], ["b"], attrs)[0]
        last = edit.add("infini.add", [b, a if reads_again else b], ["c"])[0]
        edit.outputs = [last]
        plan = plan_memory(edit.finish())
        return plan.place("main", "a").buffer, plan.place("main", "b").buffer

    assert len(set(places("silu", False))) == 1
    assert len(set(places("silu", True))) == 2  # a is read again
    assert len(set(places("rms_norm", False))) == 2  # InfiniCore does not promise rms_norm in place


# --- what cannot be planned -----------------------------------------------------------------------------------------------------------------------


def view_of(*steps: tuple[str, dict], shape: tuple = (T, 6)) -> Graph:
    edit = GraphEditor(Graph("g", "infini", (Value("x", TensorType("f64", shape)),), (), {}, ()))
    name = "x"
    for i, (op, attrs) in enumerate(steps):
        name = edit.add(op, [name], [f"v.{i}"], attrs)[0]
    edit.outputs = [name]
    return edit.finish()


@pytest.mark.parametrize(
    "graph",
    [
        view_of(("view.slice", dict(axis=1, start=1, size=4)), ("view.reshape", dict(shape=(4 * T,)))),
        view_of(("view.permute", dict(perm=(1, 0))), ("view.reshape", dict(shape=(6 * T,)))),
        view_of(("view.permute", dict(perm=(1, 0, 2))), ("view.reshape", dict(shape=(3, 2 * T))), shape=(T, 3, 2)),
    ],
    ids=["slice", "permute", "swap"],
)
def test_reshapes_that_need_a_copy_are_refused(graph):
    with pytest.raises(
        GraphError, match=r"v\.1: f64\[.*\] with strides \[.*\] cannot be seen as f64\[.*\] without a copy"
    ):
        plan_memory(graph)


def test_joins_of_what_is_no_result_are_refused():
    edit = GraphEditor(Graph("g", "infini", (Value("x", X), Value("y", X)), (), {}, ()))
    edit.outputs = list(edit.add("view.join", ["x", "y"], ["j"], dict(axis=1)))
    with pytest.raises(GraphError, match="join j: its parts are not results of calls"):
        plan_memory(edit.finish())


def test_a_loop_that_reads_what_it_overwrites_is_refused():
    """The next run's state is made by an op that may not write over its operand, while the old state is still read."""
    body_edit = GraphEditor(
        Graph("layer", "infini", (Value("x", X), Value("m", TensorType("f64", (6, 6)))), (), {}, ())
    )
    made = body_edit.add("infini.gemm", ["x", "m"], ["made"])[0]
    body_edit.outputs = [made]
    body = body_edit.finish()
    edit = GraphEditor(
        Graph("g", "infini", (Value("x", X), Value("m.0", body.type("m")), Value("m.1", body.type("m"))), (), {}, ())
    )
    start = edit.add("infini.silu", ["x"], ["start"])[0]
    attrs = dict(body=body, count=2, carried=1, per_layer=1, collected=0)
    edit.outputs = list(edit.add("loop.layers", [start, "m.0", "m.1"], ["end"], attrs))
    with pytest.raises(GraphError, match="made must stay in start from run to run"):
        plan_memory(edit.finish())


@pytest.mark.parametrize(
    "shape, strides, wanted, result",
    [
        ((4, 6), (6, 1), (24,), (1,)),
        ((4, 6), (6, 1), (2, 2, 3, 2), (12, 6, 2, 1)),
        ((4, 6), (10, 1), (4, 2, 3), (10, 3, 1)),
        ((4, 6), (10, 1), (24,), None),
        ((4, 6), (10, 1), (2, 2, 6), (20, 10, 1)),
        ((4, 6), (1, 4), (24,), None),
        ((1, 6), (99, 1), (6,), (1,)),
        ((T, 6), (6, 1), (T, 2, 3), (6, 3, 1)),
        ((T, 6), (18, 1), (T, 2, 3), (18, 3, 1)),
        ((T, 6), (18, 1), (6 * T,), None),
        ((2, T, 3), (3 * T, 3, 1), (2 * T, 3), (3, 1)),
    ],
)
def test_strides_of_reshapes(shape, strides, wanted, result):
    assert reshape_strides(shape, strides, wanted) == result


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(data=st.data())
def test_strides_of_reshapes_show_the_same_elements(data):
    """Against numpy: where strides are given, they show the elements in order; where numpy needs no copy, strides are found."""
    wanted = data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    shape = data.draw(st.permutations(wanted))
    padded = [n + data.draw(st.integers(0, 1)) for n in shape]
    base = np.arange(int(np.prod(padded)))
    whole = base.reshape(padded)
    view = whole[tuple(slice(0, n) for n in shape)]
    strides = tuple(s // base.itemsize for s in view.strides)
    found = reshape_strides(tuple(shape), strides, tuple(wanted))
    free = view.reshape(wanted)
    shares = np.shares_memory(free, whole)
    assert (found is not None) == shares, (shape, strides, wanted)
    if found is not None:
        shown = np.lib.stride_tricks.as_strided(base, tuple(wanted), tuple(s * base.itemsize for s in found))
        assert np.array_equal(shown, free)

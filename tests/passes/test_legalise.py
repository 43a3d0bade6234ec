"""From "fused" to "infini": the same values on every target, in the best form that its record allows, and refusals that say why."""

from __future__ import annotations

import itertools

import pytest

from ir.errors import UnsupportedError
from passes.legalise import FORMS
from passes.targets import TARGETS, OpSupport, Target, select, targets
from tests.passes.lowered import SHAPES, WIDE, any_dtype, check, fused, legal

RECORDS = [*TARGETS, "embedded"]

# Who has the paged ops for half types and a head of 64, per target. Written down here apart from targets.json, so that the two check each other.
PAGED = {"nvidia", "ascend", "iluvatar", "hygon", "ali", "embedded"}
UNCERTAIN = {"cambricon", "metax", "moore"}  # a part of paged attention is not known to work
ADD_RMS_NORM = {"cpu", "nvidia", "cambricon", "metax", "moore", "iluvatar", "hygon", "ali", "embedded"}


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_either_form_computes_what_the_fused_graph_does(shape, kv):
    graph = legal(fused(shape), any_dtype("test"), kv)
    assert graph.meta["kv"] == kv and graph.stage == "infini"
    check(shape, graph)


@pytest.mark.parametrize("without", ["embedding", "add_rms_norm", "swiglu", "embedding add_rms_norm swiglu"])
@pytest.mark.parametrize("kv", ["paged", "contiguous"])
def test_missing_ops_are_replaced(kv, without):
    graph = legal(fused(SHAPES[1]), any_dtype("test", *without.split()), kv)
    assert not {f"infini.{op}" for op in without.split()} & set(graph.counts())
    check(SHAPES[1], graph)


DISABLED = [frozenset(c) for c in itertools.combinations(("fuse_swiglu", "fuse_add_rms_norm", "fuse_norm_rope"), 1)]


@pytest.mark.parametrize("disable", [*DISABLED, frozenset().union(*DISABLED)], ids=lambda d: "+".join(sorted(d)))
@pytest.mark.parametrize("kv", ["paged", "contiguous"])
def test_what_was_not_fused_is_compiled_too(disable, kv):
    check(SHAPES[1], legal(fused(SHAPES[1], "f64", disable), any_dtype("test"), kv), "f64", disable)


@pytest.mark.parametrize("kv", ["auto", "contiguous"])
@pytest.mark.parametrize("name", RECORDS)
def test_every_target(name, kv):
    target = targets()[name]
    graph = legal(fused(WIDE, "bf16"), target, kv)
    assert graph.meta["kv"] == ("paged" if kv == "auto" and name in PAGED else "contiguous")
    assert ("infini.add_rms_norm" in graph.counts()) == (name in ADD_RMS_NORM)
    # No factor for ascend's gemm: cached keys carry the root of the scale, and so does each of q and k: 64 ** -0.5 in all.
    check(WIDE, graph, "bf16", keys=64**-0.25 if name == "ascend" and kv == "contiguous" else 1.0)
    forms = {op: form for op, form, _, _ in graph.meta["legalised"]}
    assert forms.keys() <= FORMS.keys() and forms["attention_cached"] == graph.meta["kv"]


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_in_every_dtype_is_compiled_or_refused_in_words(name):
    for dtype, shape in itertools.product(("f32", "f16", "bf16"), (SHAPES[0], WIDE)):
        target = targets()[name]
        half = dtype != "f32"
        if name == "ascend" and shape != WIDE:
            with pytest.raises(UnsupportedError, match=r"rope on ascend .* multiple of 16, not 10"):
                legal(fused(shape, dtype), target)
            continue
        has_paged = name in PAGED and (name == "embedded" or (half and shape == WIDE))
        assert legal(fused(shape, dtype), target).meta["kv"] == ("paged" if has_paged else "contiguous")
        if has_paged or (name in UNCERTAIN and half and shape == WIDE):
            assert legal(fused(shape, dtype), target, "paged").meta["kv"] == "paged"
            continue
        with pytest.raises(UnsupportedError) as caught:
            legal(fused(shape, dtype), target, "paged")
        text = str(caught.value)
        assert (
            text.startswith(f"target {name}: attention_cached in {dtype} cannot be compiled (paged: ")
            and "contiguous: not asked for" in text
        )
        assert "\n" not in text


def test_an_engine_for_any_infinicore_uses_what_the_first_release_has():
    target = select("cpu", "any")
    assert {"gemm", "rms_norm", "rope", "swiglu", "causal_softmax", "rearrange", "random_sample"} <= set(target.ops)
    late = {op for op, support in targets()["cpu"].ops.items() if support.since >= "2025-10-01"}
    assert late and not late & set(target.ops)
    graph = legal(fused(SHAPES[2], "f32"), target)
    assert graph.meta["kv"] == "contiguous"
    used = {op.removeprefix("infini.") for op in graph.counts()}
    assert not used & late
    check(SHAPES[2], graph, "f32")


def test_why_a_better_form_was_not_taken_is_recorded():
    graph = legal(fused(WIDE, "bf16"), targets()["qy"])
    why = {op: (form, reason) for op, form, reason, _ in graph.meta["legalised"]}
    assert why["attention_cached"] == ("contiguous", "paged: qy has no paged_attention")
    assert why["add_rms_norm"] == ("add, rms_norm", "add_rms_norm: add_rms_norm on qy is uncertain")
    counts = {op: n for op, _, _, n in graph.meta["legalised"]}
    assert counts["attention_cached"] == 2 and counts["linear"] == 9


def without(target: Target, *ops: str, **changed: OpSupport) -> Target:
    kept = {k: v for k, v in target.ops.items() if k not in ops}
    return Target("odd", target.device, {**kept, **changed}, target.graph_capture, target.collectives)


@pytest.mark.parametrize(
    "target, text",
    [
        (without(targets()["cpu"], "gemm"), "target odd: linear in f32 cannot be compiled (gemm: odd has no gemm)"),
        (
            without(targets()["cpu"], "rope"),
            "target odd: norm_rope in f32 cannot be compiled (rms_norm, rope: odd has no rope)",
        ),
        (
            without(targets()["cpu"], "causal_softmax"),
            "target odd: attention_cached in f32 cannot be compiled (paged: odd has no paged_caching; contiguous: odd has no causal_softmax)",
        ),
        (
            without(targets()["cpu"], "swiglu", "silu"),
            "swiglu in f32 cannot be compiled (swiglu: odd has no swiglu; silu, mul: odd has no silu)",
        ),
        (
            without(targets()["cpu"], rms_norm=OpSupport(("f16",))),
            "rms_norm in f32 cannot be compiled (rms_norm: rms_norm on odd takes f16, not f32)",
        ),
        (without(targets()["cpu"], gemm=OpSupport(("f32",), uncertain=True)), "gemm on odd is uncertain"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals_name_target_op_dtype_and_reason(target, text):
    with pytest.raises(UnsupportedError) as caught:
        legal(fused(SHAPES[0], "f32"), target)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_the_head_size_is_a_reason():
    with pytest.raises(UnsupportedError, match=r"paged_attention on nvidia takes head_dim 64, 128, 192, 256, not 10"):
        legal(fused(SHAPES[0], "bf16"), targets()["nvidia"], "paged")
    with pytest.raises(UnsupportedError, match=r"paged_attention on nvidia takes f16, bf16, not f32"):
        legal(fused(WIDE, "f32"), targets()["nvidia"], "paged")


def test_unknown_targets_are_refused():
    with pytest.raises(
        UnsupportedError,
        match=r"unknown target 'tpu'; targets are cpu nvidia|unknown target 'tpu'; targets are cpu, nvidia",
    ):
        select("tpu", "embedded")


def test_weights_keep_their_roles_and_lie_where_they_were():
    for name in ("cpu", "embedded"):
        graph, before = legal(fused(SHAPES[3], "f32"), targets()[name]), fused(SHAPES[3], "f32")
        assert graph.constants == before.constants

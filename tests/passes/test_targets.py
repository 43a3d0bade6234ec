"""What the records say, held against expectations that were written by hand from InfiniCore's sources and notes, not from the records."""

from __future__ import annotations

from pathlib import Path

import pytest

import passes.targets as module
from ir.errors import UnsupportedError
from passes.legalise import FORMS
from passes.targets import (
    CONSTRAINTS,
    OPERANDS,
    TARGETS,
    Target,
    record_of,
    select,
    targets,
)

ROOT = Path(__file__).parents[2]
FILE = Path(module.__file__).parent / "targets.json"
RECORDS = [*TARGETS, "embedded"]

ALL = set("cpu nvidia cambricon ascend metax moore iluvatar kunlun hygon qy ali".split())
CUDA = {"nvidia", "iluvatar", "hygon", "qy", "ali"}
DEVICES = dict(
    cpu=0,
    nvidia=1,
    cambricon=2,
    ascend=3,
    metax=4,
    moore=5,
    iluvatar=6,
    kunlun=7,
    hygon=8,
    qy=9,
    ali=10,
)
FLOOR = "gemm rms_norm add swiglu rope causal_softmax rearrange embedding random_sample".split()
HAS = {
    **dict.fromkeys(FLOOR, ALL),
    "add_rms_norm": ALL - {"ascend", "kunlun"},
    "mul": ALL - {"ascend", "cambricon"},
    "silu": ALL - {"ascend", "cambricon", "kunlun", "qy"},
    "silu_and_mul": CUDA | {"moore"},
    "paged_attention": ALL - {"cpu", "kunlun", "qy"},
    "paged_attention_prefill": ALL - {"cpu", "kunlun", "qy"},
    "paged_caching": ALL - {"cpu", "kunlun"},
    "kv_caching": CUDA | {"metax"},
    "per_channel_quant_int8": {"nvidia", "moore", "hygon", "qy"},
    "scaled_mm": {"nvidia", "moore", "hygon", "qy"},
    "linear_mxfp4": {"cpu", "nvidia", "metax", "moore", "hygon"},
}
UNCERTAIN = {
    ("qy", "add_rms_norm"),
    ("cambricon", "paged_attention_prefill"),
    ("metax", "paged_attention_prefill"),
    ("moore", "paged_attention_prefill"),
    ("moore", "scaled_mm"),
}
CAPTURE = {"nvidia", "iluvatar", "hygon", "qy", "ali", "metax", "ascend"}
BASIC = ("CommInitAll", "CommDestroy", "AllReduce")
EVERY_INT = {"i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64"}

# The KV form where nothing is asked for, as (f32, bf16, f16).
ATTENTION = {
    "embedded": ("paged", "paged", "paged"),
    "cpu": ("contiguous", "contiguous", "contiguous"),
    "nvidia": ("contiguous", "paged", "paged"),
    "cambricon": ("contiguous", "contiguous", "contiguous"),
    "ascend": ("contiguous", "paged", "paged"),
    "metax": ("contiguous", "contiguous", "contiguous"),
    "moore": ("contiguous", "contiguous", "contiguous"),
    "iluvatar": ("contiguous", "paged", "paged"),
    "kunlun": ("contiguous", "contiguous", "contiguous"),
    "hygon": ("contiguous", "paged", "paged"),
    "qy": ("contiguous", "contiguous", "contiguous"),
    "ali": ("contiguous", "paged", "paged"),
}
# Where --kv paged works in half types though auto does not take it.
PAGED_IF_ASKED = {"cambricon", "metax", "moore"}


# --- the facts ------------------------------------------------------------------------------------------------------------------------------------


def test_there_are_eleven_targets_with_their_device_numbers():
    assert set(TARGETS) == ALL and len(TARGETS) == 11
    assert {name: targets()[name].device for name in TARGETS} == DEVICES
    assert list(targets()) == [*DEVICES, "embedded"] and targets()["embedded"].device == 0
    assert [name for name in RECORDS if targets()[name].host_memory] == ["cpu", "embedded"]
    assert {t.block_size for t in targets().values()} == {16}


@pytest.mark.parametrize("op", HAS)
def test_who_has_the_op(op):
    assert {name for name in TARGETS if op in targets()[name].ops} == HAS[op]


def test_no_other_ops_are_recorded():
    assert set(HAS) == set().union(*(targets()[name].ops for name in TARGETS)) == set(OPERANDS)


def test_what_is_uncertain():
    assert {(n, op) for n, t in targets().items() for op, s in t.ops.items() if s.uncertain} == UNCERTAIN


@pytest.mark.parametrize("name", RECORDS)
def test_dtypes(name):
    ops = targets()[name].ops
    for op, support in ops.items():
        dtypes = set(support.dtypes)
        half_only = op in ("paged_attention", "paged_attention_prefill", "scaled_mm") and name != "embedded"
        assert {"f16", "bf16"} <= dtypes and ("f32" in dtypes) == (not half_only), op
    f64 = {op for op, s in ops.items() if "f64" in s.dtypes}
    if name in ("cambricon", "kunlun"):
        assert f64 == ({"rearrange"} if name == "cambricon" else set())
    if name == "cpu":
        assert f64 == set("rms_norm add_rms_norm add mul silu swiglu rope rearrange random_sample".split())
    if name in CUDA:
        assert f64 >= {"add", "mul", "rope", "random_sample"} and not f64 & {"rms_norm", "swiglu", "gemm"}
    if name != "embedded":
        assert {"i32", "i64"} <= set(ops["add"].dtypes) and {"i32", "i64"} <= set(ops["rearrange"].dtypes)


@pytest.mark.parametrize("name", TARGETS)
def test_index_dtypes(name):
    found = {op: set(s.index_dtypes) for op, s in targets()[name].ops.items() if s.index_dtypes}
    expected = {
        "rope": {"i32", "i64", "u32", "u64"} if name == "kunlun" else EVERY_INT,
        "embedding": {"i32", "i64"},
        "random_sample": {"i32", "i64"} if name in ("ascend", "kunlun") else EVERY_INT,
        "paged_attention": {"i32", "i64", "u32"},
        "paged_attention_prefill": {"i32", "i64", "u32"},
        "paged_caching": {"i64"},
        "kv_caching": {"i32", "i64"},
    }
    assert found == {op: dtypes for op, dtypes in expected.items() if name in HAS[op]}


@pytest.mark.parametrize("name", TARGETS)
def test_head_dims(name):
    found = {op: s.head_dims for op, s in targets()[name].ops.items() if s.head_dims}
    paged = ("paged_attention", "paged_attention_prefill")
    assert found == ({} if name in ("cpu", "kunlun", "qy") else dict.fromkeys(paged, (64, 128, 192, 256)))


def test_head_dims_of_the_embedded_library_are_free():
    assert not any(s.head_dims for s in targets()["embedded"].ops.values())


@pytest.mark.parametrize("name", TARGETS)
def test_collectives(name):
    target = targets()[name]
    if name == "cpu":
        assert target.collectives == () and target.collective_dtypes == ()
    elif name in CUDA:
        assert len(target.collectives) == 14 and {"AllReduce", "AllGather", "Broadcast"} <= set(target.collectives)
        assert set(target.collective_dtypes) == {"f32", "f16", "bf16", "i32", "i64", "u32", "u64"}
    else:
        assert target.collectives == BASIC and set(target.collective_dtypes) == {"f32", "f16", "bf16"}


def test_the_embedded_library_has_all_collectives():
    embedded, nvidia = targets()["embedded"], targets()["nvidia"]
    assert embedded.collectives == nvidia.collectives
    assert set(embedded.collective_dtypes) == EVERY_INT | {"f16", "bf16", "f32", "f64"}
    assert embedded.collective_refusal("AllGather", "bf16") == ""


# --- graph capture --------------------------------------------------------------------------------------------------------------------------------

REPLAYABLE = set(
    "gemm rms_norm add_rms_norm rope swiglu silu_and_mul causal_softmax paged_attention paged_attention_prefill "
    "paged_caching kv_caching embedding rearrange".split()
)


def test_who_can_capture():
    assert {name for name, t in targets().items() if t.graph_capture} == CAPTURE


@pytest.mark.parametrize("name", RECORDS)
def test_which_ops_may_be_replayed(name):
    target = targets()[name]
    found = {op: s.graph_capture for op, s in target.ops.items() if s.graph_capture is not None}
    if name not in CAPTURE:
        assert found == {}
        return
    yes = (REPLAYABLE | {"add"}) & set(target.ops)
    no = {"mul", "silu"} & set(target.ops)
    if name == "metax":  # its add is the generic elementwise one
        yes, no = yes - {"add"}, no | {"add"}
    if name == "ascend":  # these two plan anew in every call; sampling goes over the host
        yes, no = yes - {"causal_softmax", "rearrange"}, {"random_sample"}
    assert found == {**dict.fromkeys(yes, True), **dict.fromkeys(no, False)}


@pytest.mark.parametrize("name", sorted(CAPTURE - {"qy"}))
def test_a_paged_decode_step_may_be_replayed(name):
    ops = targets()[name].ops
    step = "embedding gemm rms_norm rope swiglu paged_caching paged_attention".split()
    step.append("add_rms_norm" if "add_rms_norm" in ops else "add")
    assert all(ops[op].graph_capture is True for op in step)


# --- constraints ----------------------------------------------------------------------------------------------------------------------------------

# On every target that has the op.
COMMON = {
    "gemm": {"ranks": (2, 3)},
    "rms_norm": {"ranks": (2, 3), "unit_last_stride": (0, 1, 2)},
    "add_rms_norm": {"ranks": (2, 3), "unit_last_stride": (0, 1, 2, 3, 4)},
    "silu_and_mul": {"contiguous": (0, 1)},
    "rope": {"ranks": (3, 4), "unit_last_stride": (0, 1), "contiguous": (2, 3, 4)},
    "causal_softmax": {"ranks": (2, 3)},
    "embedding": {"contiguous": (0, 1, 2)},
    "random_sample": {"ranks": (0,), "unit_last_stride": (1,)},
    "paged_attention": {"ranks": (3,), "unit_last_stride": (0, 1, 2, 3, 4, 5), "packed_heads": (0, 1)},
    "paged_attention_prefill": {"ranks": (3,), "unit_last_stride": (0, 1, 2, 3, 4, 5, 6)},
    "paged_caching": {"ranks": (4,), "unit_last_stride": (0, 1, 2, 3, 4), "packed_heads": (2, 3)},
    "kv_caching": {"ranks": (4,)},
}
# Kernels that take the last stride of a softmax for 1, and those whose swiglu knows two and three dimensions only.
SOFTMAX = {"causal_softmax": {"unit_last_stride": (0, 1)}}
SWIGLU = {"swiglu": {"ranks": (2, 3)}}
OWN: dict[str, dict[str, dict]] = {
    **{name: {**SOFTMAX, **SWIGLU} for name in ("nvidia", "iluvatar", "hygon", "ali", "metax")},
    "cpu": {},
    "embedded": {},
    "cambricon": {"rope": {"ranks": (3,)}},
    "ascend": {
        "gemm": {"row_major_output": True, "alphas": ((1, 0), (1, 1))},
        "swiglu": {"ranks": (2, 3), "last_multiple": 8, "unit_last_stride": (0, 1, 2)},
        "rope": {"ranks": (3,), "last_multiple": 16},
        "causal_softmax": {"clobbers": (1,)},
    },
    "moore": {**SOFTMAX, **SWIGLU, "gemm": {"row_major_output": True}},
    "kunlun": {
        "rms_norm": {"max_row_bytes": 40960},
        "causal_softmax": {"unit_last_stride": (0, 1), "max_row_bytes": 40960},
    },
    "qy": {**SOFTMAX, **SWIGLU, "gemm": {"single_batch_dtypes": ("f32",)}},
}


@pytest.mark.parametrize("name", RECORDS)
def test_constraints(name):
    for op, support in targets()[name].ops.items():
        found = {key: getattr(support, key) for key in CONSTRAINTS if getattr(support, key)}
        assert found == {**COMMON.get(op, {}), **OWN[name].get(op, {})}, op


def test_what_was_decided_has_its_reason_in_a_note():
    ops = targets()["ascend"].ops
    assert any("executor" in n for n in ops["add"].notes) and any("in place" in n for n in ops["causal_softmax"].notes)
    assert any("destroy answers 5" in n for n in ops["embedding"].notes)
    assert any("temporary array" in n for n in targets()["metax"].ops["add"].notes)
    assert any("swapped" in n for n in targets()["moore"].ops["gemm"].notes)
    assert any("computes nothing" in n for n in targets()["nvidia"].ops["scaled_mm"].notes)


# --- how forms follow -----------------------------------------------------------------------------------------------------------------------------


def form(target: Target, op: str, dtype: str, uncertain_ok: bool = False) -> str:
    for candidate in FORMS[op]:
        if not any(target.refusal(need, dtype, uncertain_ok=uncertain_ok) for need in candidate.needs):
            return candidate.name
    return "none"


@pytest.mark.parametrize("name", RECORDS)
def test_attention_per_dtype(name):
    found = tuple(form(targets()[name], "attention_cached", dtype) for dtype in ("f32", "bf16", "f16"))
    assert found == ATTENTION[name]
    asked = form(targets()[name], "attention_cached", "bf16", uncertain_ok=True)
    assert asked == ("paged" if name in PAGED_IF_ASKED else ATTENTION[name][1])


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", RECORDS)
def test_what_stands_in(name, dtype):
    target = targets()[name]
    fused_norm = name not in ("ascend", "kunlun", "qy")
    assert form(target, "add_rms_norm", dtype) == ("add_rms_norm" if fused_norm else "add, rms_norm")
    assert form(target, "embedding", dtype) == "embedding" and form(target, "swiglu", dtype) == "swiglu"


# --- refusals -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, op, arguments, text",
    [
        ("ascend", "mul", dict(dtype="f16"), "ascend has no mul"),
        ("kunlun", "add_rms_norm", dict(dtype="f16"), "kunlun has no add_rms_norm"),
        ("qy", "add_rms_norm", dict(dtype="f16"), "add_rms_norm on qy is uncertain"),
        ("qy", "add_rms_norm", dict(dtype="f16", uncertain_ok=True), ""),
        ("qy", "add_rms_norm", dict(dtype="i32", uncertain_ok=True), "takes f16, bf16, f32, not i32"),
        ("nvidia", "paged_attention", dict(dtype="f32"), "paged_attention on nvidia takes f16, bf16, not f32"),
        ("nvidia", "paged_attention", dict(dtype="f16", head_dim=80), "takes head_dim 64, 128, 192, 256, not 80"),
        ("nvidia", "paged_attention", dict(dtype="f16", head_dim=192), ""),
        ("embedded", "paged_attention", dict(dtype="f32", head_dim=6), ""),
        ("cpu", "rms_norm", dict(dtype="f32", rank=4), "rms_norm on cpu takes operands of rank 2, 3, not 4"),
        ("cpu", "swiglu", dict(dtype="f32", rank=4), ""),
        ("nvidia", "swiglu", dict(dtype="f32", rank=1), "takes operands of rank 2, 3, not 1"),
        ("ascend", "rope", dict(dtype="f16", rank=4), "takes operands of rank 3, not 4"),
        ("ascend", "swiglu", dict(dtype="f16", last_dim=3072), ""),
        ("ascend", "swiglu", dict(dtype="f16", last_dim=12), "takes a last dimension that is a multiple of 8, not 12"),
        ("moore", "swiglu", dict(dtype="f16", last_dim=12), ""),
        ("kunlun", "causal_softmax", dict(dtype="f32", row_bytes=40960), ""),
        (
            "kunlun",
            "causal_softmax",
            dict(dtype="f32", row_bytes=40964),
            "takes rows of at most 40960 bytes, not 40964",
        ),
        ("qy", "gemm", dict(dtype="f32", batch=1), ""),
        ("qy", "gemm", dict(dtype="f32", batch=7), "gemm on qy takes one matrix per call in f32, not 7"),
        ("qy", "gemm", dict(dtype="bf16", batch=7), ""),
        ("nvidia", "gemm", dict(dtype="f32", batch=7), ""),
    ],
)
def test_refusals(name, op, arguments, text):
    found = targets()[name].refusal(op, **arguments)
    assert (found.endswith(text) if text else found == "") and "\n" not in found


def test_refusals_of_collectives():
    assert targets()["cpu"].collective_refusal("AllReduce", "f32") == "cpu has no AllReduce"
    assert targets()["metax"].collective_refusal("AllGather", "f32") == "metax has no AllGather"
    assert (
        targets()["metax"].collective_refusal("AllReduce", "i32") == "AllReduce on metax takes f32, f16, bf16, not i32"
    )
    assert targets()["metax"].collective_refusal("AllReduce", "bf16") == ""
    assert targets()["ali"].collective_refusal("AllGather", "i32") == ""


# --- select ---------------------------------------------------------------------------------------------------------------------------------------

FIRST = set("gemm rms_norm add mul swiglu rope causal_softmax rearrange random_sample".split())


@pytest.mark.parametrize(
    "name, ops",
    [
        ("cpu", FIRST),
        ("nvidia", FIRST),
        ("metax", FIRST),
        ("iluvatar", FIRST),
        ("cambricon", FIRST - {"mul"}),
        ("kunlun", FIRST),
        ("ascend", FIRST - {"mul", "add", "rope"}),
        ("moore", FIRST - {"mul", "add"}),
        ("hygon", FIRST - {"mul", "add"}),
        ("qy", set()),
        ("ali", set()),
    ],
)
def test_any_has_what_the_first_release_has(name, ops):
    assert set(select(name, "any").ops) == ops
    assert select(name, "any").collectives == targets()[name].collectives


def test_embedded_and_folders():
    assert select("cpu", "embedded") is targets()["embedded"]
    for name in ALL - {"cpu"}:
        assert select(name, "embedded") == select(name, "/opt/infini") == targets()[name]
    with pytest.raises(UnsupportedError, match="unknown target 'embedded'; targets are cpu, nvidia, cambricon, ascend"):
        select("embedded", "embedded")


def test_an_older_install_lacks_what_came_later():
    nvidia = targets()["nvidia"]
    # Of that day on main: embedding and today's add_rms_norm, which came together, and silu_and_mul half a year later.
    assert set(nvidia.ops) - set(nvidia.as_of("2026-02-13").ops) >= {"embedding", "kv_caching", "silu_and_mul"}
    assert set(nvidia.ops) - set(nvidia.as_of("2026-02-14").ops) == {"kv_caching", "silu_and_mul", "linear_mxfp4"}
    assert targets()["kunlun"].ops["embedding"].since == "2026-07-07"
    assert {targets()[n].ops["embedding"].since for n in ("ascend", "cambricon")} == {"2026-06-15"}
    assert targets()["embedded"].as_of("2000-01-01") == targets()["embedded"]


def test_what_an_older_install_lacks_is_refused_with_the_day():
    ascend = select("ascend", "any")
    rest = "(there since 2026-06-09: --infinicore DIR for an installation that has it)"
    assert ascend.refusal("rope", "bf16") == f"rope on ascend is not in InfiniCore 0.1.0 {rest}"
    assert ascend.refusal("mul", "bf16") == "ascend has no mul" and ascend.refusal("gemm", "bf16") == ""
    assert "not in InfiniCore of 2026-06-09 " in targets()["ascend"].as_of("2026-06-09").refusal("rope", "bf16")
    assert targets()["ascend"].as_of("2026-06-10").refusal("rope", "bf16") == ""
    assert record_of(ascend).keys() == record_of(targets()["ascend"]).keys()  # a record is no place for reasons

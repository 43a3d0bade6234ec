"""Simulated devices: records, and what they refuse at create and at the call."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ir.errors import InfiniCoreError, UnsupportedError
from runtime.infinicpu import simulator

from .lib import (
    BAD_DTYPE,
    BAD_PARAM,
    BAD_SHAPE,
    BAD_STRIDES,
    BF16,
    DEVICE_NOT_FOUND,
    DEVICE_TYPE_NOT_SUPPORTED,
    F16,
    F32,
    INSUFFICIENT_WORKSPACE,
    SUCCESS,
    Spec,
    f,
    library,
    runtime,
)
from .simulated import Memory, Op, create_status, error, simulate, simulating, synchronize, use

I32, I64 = np.dtype(np.int32), np.dtype(np.int64)

PLAIN = """device 3 ascend
op add dtypes=f32,f16
op gemm dtypes=f32,f16
op silu dtypes=f32
op swiglu dtypes=f32
op causal_softmax dtypes=f32
op embedding dtypes=f32 index_dtypes=i32,i64
"""


# ---- Records ----


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("op add dtypes=f32", "there is no line: device NUMBER NAME"),
        ("device 11 new", "line 1: there is no device type 11"),
        ("device x new", "line 1: 'x' is no whole number"),
        ("device 3", "line 1: expected one line: device NUMBER NAME"),
        ("device 3 a\n\ndevice 4 b", "line 3: expected one line: device NUMBER NAME"),
        ("device 3 a\nwarp 32", "line 2: unknown key 'warp'"),
        ("device 3 a\ngraph_capture yes", "line 2: 'yes' is neither 0 nor 1"),
        ("device 3 a\ncollective_dtypes f32 f99", "line 2: 'f99' is no dtype"),
        ("device 3 a\nop", "line 2: an op needs a name"),
        ("device 3 a\nop add", "line 2: op add has no dtypes"),
        ("device 3 a\nop add dtypes=f32 rank=2", "line 2: unknown field 'rank=2' of op add"),
        ("device 3 a\nop add dtypes=f32 ranks=-2", "line 2: '-2' is no whole number"),
        ("device 3 a\nop gemm dtypes=f32 alphas=1", "line 2: '1' is no pair ALPHA:BETA"),
        ("device 3 a\nop gemm dtypes=f32 alphas=1:x", "line 2: 'x' is no number"),
        ("device 3 a\nop add dtypes=f32\nop add dtypes=f16", "line 3: op add is there twice"),
    ],
)
def test_a_wrong_record_is_refused_in_one_line(record: str, message: str) -> None:
    assert simulate(record) == BAD_PARAM
    assert error() == f"record: {message}"
    count = ctypes.c_int(-1)
    assert runtime().infinirtGetDeviceCount(3, ctypes.byref(count)) == SUCCESS and count.value == 0


def test_a_device_is_there_as_long_as_its_record() -> None:
    counts = (ctypes.c_int * 11)()
    kind, number = ctypes.c_int(), ctypes.c_int()
    with simulating(PLAIN, "device 7 kunlun\nop add dtypes=f32"):
        assert runtime().infinirtGetAllDeviceCount(counts) == SUCCESS
        assert list(counts) == [8, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0]
        use(7, 5)
        assert runtime().infinirtGetDevice(ctypes.byref(kind), ctypes.byref(number)) == SUCCESS
        assert (kind.value, number.value) == (7, 5)
        assert runtime().infinirtSetDevice(3, 8) == DEVICE_NOT_FOUND
        assert runtime().infinirtSetDevice(4, 0) == DEVICE_TYPE_NOT_SUPPORTED
        assert error() == ""
    assert runtime().infinirtSetDevice(7, 0) == DEVICE_TYPE_NOT_SUPPORTED


def test_a_record_stays_while_its_memory_is_allocated() -> None:
    with simulating(PLAIN):
        with Memory(8):
            assert simulate(None) == BAD_PARAM and simulate(PLAIN) == BAD_PARAM
            assert error() == "record: memory of ascend is allocated: its record cannot change"
            assert simulate("device 7 kunlun\nop add dtypes=f32") == SUCCESS  # another device's
        assert simulate(PLAIN + "op mul dtypes=f32") == SUCCESS
        assert create_status("Mul", [Spec((3,), F32)] * 3) == SUCCESS


def test_records_as_json() -> None:
    record = {
        "name": "ascend",
        "device": 3,
        "graph_capture": True,
        "collectives": ["AllReduce", "CommInitAll"],
        "collective_dtypes": [],
        "block_size": 16,
        "ops": {
            "gemm": {"dtypes": ("f16", "bf16"), "since": "2025-03-21", "alphas": [[1, 0], [0.5, 1]], "notes": ["a b"]},
            "swiglu": {"dtypes": ["f32"], "ranks": [2, 3], "last_multiple": 8, "uncertain": False, "head_dims": None},
        },
    }
    assert simulator.record_text(record).splitlines() == [
        "device 3 ascend",
        "graph_capture 1",
        "collectives AllReduce CommInitAll",
        "op gemm dtypes=f16,bf16 alphas=1:0,0.5:1",
        "op swiglu dtypes=f32 ranks=2,3 last_multiple=8 uncertain=0",
    ]
    simulator.simulate(library(), record)
    use(3)
    assert create_status("SwiGLU", [Spec((2, 12), F32)] * 3) == BAD_SHAPE
    assert simulator.last_violation(library()) == "ascend: swiglu: the last dimension 12 is no multiple of 8"
    with Memory(8), pytest.raises(InfiniCoreError, match="memory of ascend is allocated"):
        simulator.simulate(library(), None)
    simulator.simulate(library(), None)
    use(0)
    with pytest.raises(UnsupportedError, match="ascend: the simulator does not know warp"):
        simulator.record_text({**record, "warp": 32})


# ---- What create refuses ----

ROPE = [Spec((5, 3, 8), F32), Spec((5, 3, 8), F32), Spec((5,), I64), Spec((9, 4), F32), Spec((9, 4), F32)]


def gemm(m: int, n: int, k: int, c_strides: tuple[int, ...] | None = None, dtype: np.dtype = F32) -> list[Spec]:
    return [Spec((m, n), dtype, c_strides), Spec((m, k), dtype), Spec((k, n), dtype)]


def gemm3(batch: int, dtype: np.dtype) -> list[Spec]:
    return [Spec((batch, 2, 5), dtype), Spec((batch, 2, 7), dtype), Spec((batch, 7, 5), dtype)]


def caching(k: Spec) -> list[Spec]:
    return [Spec((4, 3, 2, 8), F16)] * 2 + [k, Spec((5, 3, 8), F16), Spec((5,), I64)]


def embedding(index: np.dtype) -> list[Spec]:
    return [Spec((5, 4), F32), Spec((5,), index), Spec((9, 4), F32)]


# op, its line in the record; operands that it takes; operands that it refuses, with which status and words.
RULES = {
    "an op that is not there": (
        "silu dtypes=f32", ("Silu", [Spec((3, 5), F32)] * 2),
        ("Add", [Spec((3, 5), F32)] * 3), DEVICE_TYPE_NOT_SUPPORTED, "add: this device has none"),
    "dtypes": (
        "add dtypes=f32,f16", ("Add", [Spec((3, 5), F16)] * 3),
        ("Add", [Spec((3, 5), BF16)] * 3), BAD_DTYPE, "add: takes f32, f16, not bf16"),
    "dtypes are the logits' where the output is an index": (
        "random_sample dtypes=f16 index_dtypes=i32", ("RandomSample", [Spec((), I32), Spec((9,), F16)]),
        ("RandomSample", [Spec((), I32), Spec((9,), F32)]), BAD_DTYPE, "random_sample: takes f16, not f32"),
    "index dtypes": (
        "embedding dtypes=f32 index_dtypes=i32", ("Embedding", embedding(I32)),
        ("Embedding", embedding(I64)), BAD_DTYPE, "embedding: takes indices in i32, not i64"),
    "index dtypes of an output": (
        "random_sample dtypes=f32 index_dtypes=i32", ("RandomSample", [Spec((), I32), Spec((9,), F32)]),
        ("RandomSample", [Spec((), I64), Spec((9,), F32)]), BAD_DTYPE, "random_sample: takes indices in i32, not i64"),
    "index dtypes of positions": (
        "rope dtypes=f32 index_dtypes=i64", ("RoPE", ROPE, [1]),
        ("RoPE", [*ROPE[:2], Spec((5,), I32), *ROPE[3:]], [1]), BAD_DTYPE, "rope: takes indices in i64, not i32"),
    "head sizes": (
        "rope dtypes=f32 head_dims=8,64", ("RoPE", ROPE, [1]),
        ("RoPE", [Spec((5, 3, 6), F32)] * 2 + [Spec((5,), I64)] + [Spec((9, 3), F32)] * 2, [1]), BAD_SHAPE,
        "rope: takes heads of 8, 64, not 6"),
    "ranks": (
        "silu dtypes=f32 ranks=2,3", ("Silu", [Spec((2, 3, 5), F32)] * 2),
        ("Silu", [Spec((2, 3, 5, 7), F32)] * 2), BAD_SHAPE, "silu: takes operands of rank 2, 3, not 4"),
    "a last dimension that must be a multiple": (
        "swiglu dtypes=f32 last_multiple=8", ("SwiGLU", [Spec((3, 24), F32)] * 3),
        ("SwiGLU", [Spec((8, 12), F32)] * 3), BAD_SHAPE, "swiglu: the last dimension 12 is no multiple of 8"),
    "one matrix at a time in a dtype": (
        "gemm dtypes=f32,f16 single_batch_dtypes=f32", ("Gemm", gemm3(1, F32)),
        ("Gemm", gemm3(3, F32)), BAD_SHAPE, "gemm: a batch of 3 is wrong in f32"),
    "... and in no other": (
        "gemm dtypes=f32,f16 single_batch_dtypes=f16", ("Gemm", gemm3(3, F32)),
        ("Gemm", gemm3(3, F16)), BAD_SHAPE, "gemm: a batch of 3 is wrong in f16"),
    "long rows": (
        "silu dtypes=f32,f16 max_row_bytes=40", ("Silu", [Spec((3, 10), F32)] * 2),
        ("Silu", [Spec((3, 11), F32)] * 2), BAD_SHAPE, "silu: a row of 44 bytes is longer than 40"),
    "a column-major output": (
        "gemm dtypes=f32 row_major_output=1", ("Gemm", gemm(3, 5, 7)),
        ("Gemm", gemm(3, 5, 7, (1, 3))), BAD_STRIDES, "gemm: the output's row stride is 1: it must be row-major"),
    "... of one column": (
        "gemm dtypes=f32 row_major_output=1", ("Gemm", gemm(3, 1, 7, (2, 1))),
        ("Gemm", gemm(3, 1, 7)), BAD_STRIDES, "gemm: the output's row stride is 1: it must be row-major"),
    "last strides": (
        "add dtypes=f32 unit_last_stride=0,2",
        ("Add", [Spec((3, 5), F32), Spec((3, 5), F32, (1, 3)), Spec((3, 5), F32, (9, 1))]),
        ("Add", [Spec((3, 5), F32), Spec((3, 5), F32), Spec((3, 5), F32, (1, 3))]), BAD_STRIDES,
        "add: operand 2's last stride is 3, not 1"),
    "heads that lie one after the other": (
        "paged_caching dtypes=f16 packed_heads=2", ("PagedCaching", caching(Spec((5, 3, 8), F16, (40, 8, 1)))),
        ("PagedCaching", caching(Spec((5, 3, 8), F16, (40, 12, 1)))), BAD_STRIDES,
        "paged_caching: operand 2's heads do not lie one after the other"),
    "... where there are several": (
        "paged_caching dtypes=f16 packed_heads=2,3",
        ("PagedCaching", [Spec((4, 1, 2, 8), F16)] * 2 + [Spec((5, 1, 8), F16, (40, 12, 1))] * 2 + [Spec((5,), I64)]),
        ("PagedCaching", caching(Spec((5, 3, 8), F16, (40, 9, 1)))), BAD_STRIDES,
        "paged_caching: operand 2's heads do not lie one after the other"),
    "contiguous operands": (
        "add dtypes=f32 contiguous=1", ("Add", [Spec((3, 5), F32, (6, 1)), Spec((3, 5), F32), Spec((3, 5), F32)]),
        ("Add", [Spec((3, 5), F32), Spec((3, 5), F32, (6, 1)), Spec((3, 5), F32)]), BAD_STRIDES,
        "add: operand 1 is not contiguous"),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_create_refuses(rule: str) -> None:
    line, taken, refused, status, words = RULES[rule]
    with simulating(f"device 3 ascend\nop {line}"):
        assert create_status(*taken) == SUCCESS and error() == ""
        assert create_status(*refused) == status
        assert error() == f"ascend: {words}"


def test_an_uncertain_op_must_be_asked_for() -> None:
    record = "device 3 ascend\nop add dtypes=f32 uncertain=1\nop silu dtypes=f32 uncertain=0"
    with simulating(record):
        assert create_status("Add", [Spec((3,), F32)] * 3) == DEVICE_TYPE_NOT_SUPPORTED
        assert error() == "ascend: add: uncertain on this device"
        assert create_status("Silu", [Spec((3,), F32)] * 2) == SUCCESS
    with simulating(record + "\nuncertain_ok 1"):
        assert create_status("Add", [Spec((3,), F32)] * 3) == SUCCESS


def test_scalars_that_were_not_planned() -> None:
    x = np.arange(6, dtype=F32).reshape(2, 3)
    for rule, statuses in (("alphas=1:0,1:1", (0, 0, INSUFFICIENT_WORKSPACE)), ("ranks=2", (0, 0, 0))):
        with simulating(f"device 3 ascend\nop gemm dtypes=f32 {rule}"), Memory(x) as a, Memory(x) as b, Memory(16) as c:
            with Op("Gemm", [Spec((2, 2), F32), Spec((2, 3), F32), Spec((3, 2), F32)]) as op:
                pairs = ((1, 0), (1, 1), (0.5, 0))
                assert [op(c, a, b, scalars=(f(p), f(q))) for p, q in pairs] == list(statuses)
                assert synchronize() == SUCCESS
    assert error() == ""


def test_violations_are_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    with simulating(PLAIN):
        for _ in range(3):
            assert create_status("Mul", [Spec((3,), F32)] * 3) == DEVICE_TYPE_NOT_SUPPORTED
        assert create_status("Add", [Spec((3,), BF16)] * 3) == BAD_DTYPE
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["ascend: mul: this device has none", "ascend: add: takes f32, f16, not bf16"]

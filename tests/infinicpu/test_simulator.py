"""Simulated devices: what a record refuses at create and at the call, and what may happen to their memory."""

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
from .simulated import D2D, D2H, H2D, H2H, Memory, Op, create_status, error, simulate, simulating, synchronize, use

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


# ---- Memory ----


def test_memory_is_poisoned_before_and_after_its_life() -> None:
    with simulating(PLAIN):
        block, host = Memory(1000), Memory(24, host=True)
        for memory in (block, host):
            assert ctypes.string_at(memory.address.value, memory.size) == b"\xff" * memory.size
        block.write(np.zeros(1000, np.uint8))
        address = block.address.value
        assert block.free() == SUCCESS and ctypes.string_at(address, 1000) == b"\xff" * 1000
        again = Memory(1000)
        assert again.address.value != address  # freed memory is not given out at once
        assert again.free() == SUCCESS and host.free() == SUCCESS and error() == ""


def test_frees() -> None:
    rt, local = runtime(), ctypes.create_string_buffer(16)
    with simulating(PLAIN):
        block, host = Memory(16), Memory(16, host=True)
        assert rt.infinirtFree(block.at(4)) == BAD_PARAM and "not allocated by infinirt" in error()
        assert rt.infinirtFree(local) == BAD_PARAM and rt.infinirtFree(None) == SUCCESS
        assert rt.infinirtFree(host.address) == BAD_PARAM and "is from infinirtMallocHost" in error()
        assert rt.infinirtFreeHost(block.address) == BAD_PARAM and "not from infinirtMallocHost" in error()
        use(3, 2)
        assert block.free() == BAD_PARAM
        assert error() == "ascend: free: the memory is ascend 0's, the current device is ascend 2"
        use(0)
        assert block.free() == BAD_PARAM  # as on a thread that never chose its device
        use(3)
        assert block.free() == SUCCESS and host.free() == SUCCESS
        assert block.free() == BAD_PARAM and error() == "ascend: free: the memory was freed before"


def test_copies() -> None:
    """What each kind of copy takes for its ends: this device's memory, another's, the host's, pinned host memory."""
    with simulating(PLAIN):
        use(3, 1)
        other = Memory(16)
        use(3, 0)
        block, second, pinned = Memory(16), Memory(16), Memory(16, host=True)
        freed = Memory(16)
        assert freed.free() == SUCCESS
        local = ctypes.c_void_p(ctypes.addressof(buffer := ctypes.create_string_buffer(16)))
        ends = {"d": block.address, "o": other.address, "h": local, "p": pinned.address, "f": freed.address}
        good = {H2D: ("dh", "dp"), D2H: ("hd", "pd"), D2D: ("dd",), H2H: ("hp", "ph", "hh", "pp")}
        for kind, allowed in good.items():
            for to in ends:
                for source in ends:
                    status = runtime().infinirtMemcpy(ends[to], ends[source], ctypes.c_size_t(16), kind)
                    assert status == (SUCCESS if to + source in allowed else BAD_PARAM), (kind, to, source)
        copy = runtime().infinirtMemcpy
        assert copy(block.at(1), local, ctypes.c_size_t(16), H2D) == BAD_PARAM
        assert error() == "ascend: memcpy: the destination of 16 bytes is not inside one allocation (of 16 bytes)"
        assert copy(block.at(1), local, ctypes.c_size_t(15), H2D) == SUCCESS
        assert copy(block.at(16), local, ctypes.c_size_t(0), H2D) == SUCCESS
        assert copy(freed.address, local, ctypes.c_size_t(4), H2D) == BAD_PARAM and error().endswith("is freed memory")
        assert copy(other.address, local, ctypes.c_size_t(4), H2D) == BAD_PARAM
        assert error() == "ascend: memcpy: the destination is memory of ascend 1, not of ascend 0"
        fill = runtime().infinirtMemset
        assert (
            fill(local, 0, ctypes.c_size_t(4)) == BAD_PARAM
            and error() == "ascend: memset: the destination is host memory"
        )
        assert fill(block.address, 7, ctypes.c_size_t(16)) == SUCCESS and set(block.read(np.uint8)) == {7}
        use(0)  # a thread that never chose its device
        assert copy(block.address, local, ctypes.c_size_t(4), H2D) == BAD_PARAM
        assert error() == "cpu: memcpy: the destination is device memory (of ascend 0)"
        assert copy(local, local, ctypes.c_size_t(4), H2D) == SUCCESS
        use(3, 1)
        assert other.free() == SUCCESS
        use(3, 0)
        assert all(memory.free() == SUCCESS for memory in (block, second, pinned)) and len(buffer.raw) == 16


def test_operands_lie_in_one_allocation_of_the_device() -> None:
    x = np.arange(15, dtype=F32).reshape(3, 5)
    with simulating(PLAIN):
        use(3, 1)
        other = Memory(60)
        use(3, 0)
        freed = Memory(60)
        assert freed.free() == SUCCESS
        with Memory(60) as y, Memory(x) as source, Memory(60, host=True) as pinned, Op("Silu", [x, x]) as op:
            assert op(y, source) == SUCCESS and op(y, y) == SUCCESS and synchronize() == SUCCESS and error() == ""
            for place, words in (
                (ctypes.c_void_p(x.ctypes.data), "is host memory"),
                (pinned, "is host memory"),
                (freed, "is freed memory"),
                (other, "is memory of ascend 1, not of ascend 0"),
                (y.at(4), "of 60 bytes is not inside one allocation (of 60 bytes)"),
                (y.at(-4), "of 60 bytes is not inside one allocation (of 60 bytes)"),
            ):
                assert op(place, source) == BAD_PARAM and error() == f"ascend: silu: operand 0 {words}"
                assert op(y, place) == BAD_PARAM and error() == f"ascend: silu: operand 1 {words}"
            assert op(y, source, workspace=(ctypes.c_void_p(x.ctypes.data), 256)) == BAD_PARAM
            assert error() == "ascend: silu: the workspace is host memory"
            assert op(y, source, workspace=(op.workspace.address, 257)) == BAD_PARAM  # type: ignore[union-attr]
            assert op(y, source, workspace=(op.workspace.address, 0)) == INSUFFICIENT_WORKSPACE  # type: ignore[union-attr]
        # Strides count: rows of 5 that are 7 apart need 19 elements, and none after the last one; reversed ones too.
        for strides, first, needed in (((7, 1), 0, 19), ((1, 3), 0, 15), ((-5, 1), 10, 15), ((0, 1), 0, 5)):
            specs = [Spec((3, 5), F32), Spec((3, 5), F32, strides)]
            with Memory(60) as y, Memory(4 * needed) as source, Op("Silu", specs) as op:
                assert op(y, source.at(4 * first)) == SUCCESS
                assert op(y, source.at(4 * first + 4)) == BAD_PARAM and op(y, source.at(4 * first - 4)) == BAD_PARAM
                assert synchronize() == SUCCESS
        with Op("Silu", [Spec((0, 5), F32)] * 2) as op:  # nothing is nowhere
            assert op(None, ctypes.c_void_p(64)) == SUCCESS and synchronize() == SUCCESS
        use(3, 1)
        assert other.free() == SUCCESS
        use(3, 0)


def test_an_operator_runs_on_the_device_that_it_was_made_for() -> None:
    with simulating(PLAIN), Memory(12) as x, Op("Silu", [Spec((3,), F32)] * 2) as op:
        use(3, 1)
        assert op(x, x) == BAD_PARAM
        assert error() == "ascend: silu: the current device is not the one that the descriptor was made for"
        use(3, 0)
        assert op(x, x) == SUCCESS and synchronize() == SUCCESS


# ---- What a call destroys ----


def test_the_workspace_is_destroyed_by_every_call() -> None:
    with simulating(PLAIN), Memory(np.ones(3, F32)) as x, Op("Silu", [Spec((3,), F32)] * 2) as op:
        with Memory(np.zeros(300, np.uint8)) as workspace:
            assert op(x, x, workspace=(workspace.address, 290)) == SUCCESS and synchronize() == SUCCESS
            content = workspace.read(np.uint8)
            assert (content[:290] == 255).all() and (content[290:] == 0).all()


@pytest.mark.parametrize("clobbers", [True, False])
def test_inputs_that_a_call_destroys(clobbers: bool) -> None:
    x = np.array([[1, 2, 3, 9], [4, 5, 6, 9]], F32)
    specs = [Spec((2, 3), F32), Spec((2, 3), F32, (4, 1))]
    record = f"device 3 ascend\nop causal_softmax dtypes=f32 {'clobbers=1' if clobbers else ''}"
    with simulating(record), Memory(x) as source, Memory(24) as y, Op("CausalSoftmax", specs) as op:
        assert op(y, source) == SUCCESS and synchronize() == SUCCESS
        after = source.read(F32, (2, 4))
        assert np.isnan(after[:, :3]).all() if clobbers else (after == x).all()
        assert (after[:, 3] == 9).all()  # what lies between the rows is not its business
        assert np.isfinite(y.read(F32)).all()
    in_place = [Spec((2, 3), F32, (4, 1))] * 2
    with simulating(record), Memory(x) as source, Op("CausalSoftmax", in_place) as op:
        assert op(source, source) == SUCCESS and synchronize() == SUCCESS
        assert np.isfinite(source.read(F32)).all()


def test_rows_of_an_embedding_that_are_not_there() -> None:
    table = np.arange(12, dtype=F32).reshape(3, 4)
    with simulating(PLAIN), Memory(table) as weights, Memory(np.array([2, 3, 0, -1], I64)) as index, Memory(64) as out:
        with Op("Embedding", [Spec((4, 4), F32), Spec((4,), I64), Spec((3, 4), F32)]) as op:
            out.write(np.zeros(16, F32))
            assert op(out, index, weights) == SUCCESS and synchronize() == SUCCESS
            rows = out.read(F32, (4, 4))
            assert (rows[0] == table[2]).all() and (rows[2] == table[0]).all() and np.isnan(rows[[1, 3]]).all()


# ---- The CPU's own record: its memory is the host's ----


def test_a_record_of_the_cpu() -> None:
    x, y, workspace = np.ones((2, 3), F32), np.zeros((2, 3), F32), np.zeros(256, np.uint8)
    with simulating("device 0 cpu\nop silu dtypes=f32 ranks=2\nop causal_softmax dtypes=f32 clobbers=1"):
        assert create_status("Silu", [Spec((2, 3, 4), F32)] * 2) == BAD_SHAPE
        assert error() == "cpu: silu: takes operands of rank 2, not 3"
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (y, x)]
        with Op("Silu", [y, x]) as op:  # at once, and wherever the operands lie
            assert op(*pointers, workspace=(ctypes.c_void_p(workspace.ctypes.data), 256)) == SUCCESS
            assert np.isfinite(y).all() and (y != 0).all() and (workspace == 255).all()
        with Op("CausalSoftmax", [y, x]) as op:
            assert op(*pointers) == SUCCESS
        assert np.isfinite(y).all() and np.isnan(x).all()
        with Memory(8) as block:
            assert ctypes.string_at(block.address.value, 8) == b"\xff" * 8
        assert block.free() == BAD_PARAM and error() == "cpu: free: the memory was freed before"
        assert runtime().infinirtStreamBeginCapture(None, 0) == DEVICE_TYPE_NOT_SUPPORTED


def test_the_plain_cpu_is_as_it_was() -> None:
    with simulating(PLAIN):
        use(0)
        x = np.ones((2, 3), F32)
        with Op("Mul", [x, x, x]) as op:  # not in the record, which is another device's
            pointer = ctypes.c_void_p(x.ctypes.data)
            assert op(pointer, pointer, pointer) == SUCCESS
        with Memory(np.zeros(8, np.uint8)) as block:
            assert (block.read(np.uint8) == 0).all()
    x = np.full((2, 3), 3, F32)
    with Op("Add", [x, x, x]) as op:
        pointer = ctypes.c_void_p(x.ctypes.data)
        assert op(pointer, pointer, pointer) == SUCCESS and (x == 6).all()
        assert op.workspace is not None and op.workspace.size == 0


def test_violations_are_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    with simulating(PLAIN):
        for _ in range(3):
            assert create_status("Mul", [Spec((3,), F32)] * 3) == DEVICE_TYPE_NOT_SUPPORTED
        assert create_status("Add", [Spec((3,), BF16)] * 3) == BAD_DTYPE
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["ascend: mul: this device has none", "ascend: add: takes f32, f16, not bf16"]

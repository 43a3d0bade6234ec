"""Simulated devices: where operands and copies may lie, what a call destroys, and devices beside the simulated ones."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .lib import BAD_PARAM, BAD_SHAPE, DEVICE_TYPE_NOT_SUPPORTED, F32, INSUFFICIENT_WORKSPACE, SUCCESS, Spec, runtime
from .simulated import D2D, D2H, H2D, H2H, Memory, Op, create_status, error, simulating, synchronize, use

I64 = np.dtype(np.int64)

PLAIN = """device 3 ascend
op add dtypes=f32,f16
op silu dtypes=f32
op rearrange dtypes=f32
op causal_softmax dtypes=f32
op embedding dtypes=f32 index_dtypes=i32,i64
"""


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


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4).flatmap(
        lambda shape: st.tuples(st.just(shape), st.tuples(*[st.integers(-5, 5)] * len(shape)))
    ),
)
def test_operands_reach_from_their_lowest_to_their_highest_element(layout: tuple[list[int], tuple[int, ...]]) -> None:
    shape, strides = layout
    offsets = [sum(i * s for i, s in zip(index, strides, strict=True)) for index in np.ndindex(*shape)]
    lowest, highest = min(offsets), max(offsets)
    specs = [Spec(tuple(shape), F32), Spec(tuple(shape), F32, strides)]
    with simulating(PLAIN), Memory(4 * len(offsets)) as y, Op("Rearrange", specs) as op:
        with Memory(4 * (highest - lowest + 1)) as x:
            assert op(y, x.at(-4 * lowest)) == SUCCESS
            assert op(y, x.at(-4 * lowest - 4)) == BAD_PARAM and op(y, x.at(-4 * lowest + 4)) == BAD_PARAM
            assert synchronize() == SUCCESS


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

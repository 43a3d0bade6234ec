"""Streams of simulated devices: work waits until somebody asks for it."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest

from .lib import BAD_PARAM, DEVICE_TYPE_NOT_SUPPORTED, F32, SUCCESS, Spec, library, runtime
from .simulated import (
    D2D,
    D2H,
    H2D,
    H2H,
    Memory,
    Op,
    copy_async,
    error,
    event,
    simulate,
    simulating,
    stream,
    synchronize,
    use,
    values,
)

I32, I64 = np.dtype(np.int32), np.dtype(np.int64)

RECORD = """device 1 nvidia
op add dtypes=f32
op rope dtypes=f32
"""
THREE = Spec((3,), F32)


def is_done(made: ctypes.c_void_p) -> bool:
    answer = ctypes.c_int(-1)
    assert runtime().infinirtEventQuery(made, ctypes.byref(answer)) == SUCCESS
    return answer.value == 0


# ---- Deferral ----


@pytest.mark.parametrize("which", ["default", "own"])
def test_work_waits_for_synchronisation(which: str) -> None:
    with simulating(RECORD), stream() as own, Memory(values(1, 2, 3)) as x, Memory(12) as y:
        made = own if which == "own" else None
        host_in, host_out = values(4, 5, 6), values(0, 0, 0)
        with Op("Add", [THREE] * 3) as op:
            assert op(y, x, x, stream=made) == SUCCESS
            assert np.isnan(y.read(F32)).all()  # a synchronous copy waits for no stream
            assert copy_async(ctypes.c_void_p(host_out.ctypes.data), y, 12, D2H, made) == SUCCESS
            assert copy_async(x, ctypes.c_void_p(host_in.ctypes.data), 12, H2D, made) == SUCCESS
            assert (host_out == 0).all() and (x.read(F32) == values(1, 2, 3)).all()
            host_in[0] = 7  # the copy has not read it yet
            assert synchronize(made) == SUCCESS
            assert (y.read(F32) == values(2, 4, 6)).all() and (host_out == values(2, 4, 6)).all()
            assert (x.read(F32) == values(7, 5, 6)).all()
            assert runtime().infinirtMemsetAsync(y.address, 0, ctypes.c_size_t(8), made) == SUCCESS
            assert copy_async(x, y, 4, D2D, made) == SUCCESS
            assert (y.read(F32) == values(2, 4, 6)).all()
            assert synchronize(made) == SUCCESS and synchronize(made) == SUCCESS
            assert (y.read(F32) == values(0, 0, 6)).all() and (x.read(F32) == values(0, 5, 6)).all()


def test_a_stream_is_one_device_s_and_runs_alone() -> None:
    with simulating(RECORD), stream() as first, stream() as second, Memory(values(1, 2, 3)) as x, Memory(12) as y:
        with Memory(12) as z, Op("Add", [THREE] * 3) as op:
            assert op(y, x, x, stream=first) == SUCCESS
            assert synchronize(second) == SUCCESS and synchronize() == SUCCESS and np.isnan(y.read(F32)).all()
            use(1, 1)
            assert runtime().infinirtDeviceSynchronize() == SUCCESS  # another device's streams
            assert synchronize(first) == BAD_PARAM and error().endswith("the stream is another device's")
            use(1, 0)
            assert np.isnan(y.read(F32)).all()
            assert op(z, x, x, stream=second) == SUCCESS
            assert runtime().infinirtDeviceSynchronize() == SUCCESS
            assert (y.read(F32) == values(2, 4, 6)).all() and (z.read(F32) == values(2, 4, 6)).all()
            assert op(y, x, x, stream=ctypes.c_void_p(64)) == BAD_PARAM
            assert error() == "nvidia: add: no such stream of this device"
            use(0)  # a thread that never chose its device
            assert synchronize(first) == BAD_PARAM and synchronize() == SUCCESS
            use(1)


def test_destroying_a_stream_does_its_work() -> None:
    with simulating(RECORD), Memory(values(1, 2, 3)) as x, Op("Add", [THREE] * 3) as op:
        made = ctypes.c_void_p()
        assert runtime().infinirtStreamCreate(ctypes.byref(made)) == SUCCESS
        assert op(x, x, x, stream=made) == SUCCESS
        assert runtime().infinirtStreamDestroy(made) == SUCCESS
        assert (x.read(F32) == values(2, 4, 6)).all()
        assert op(x, x, x, stream=made) == BAD_PARAM and runtime().infinirtStreamDestroy(made) == BAD_PARAM


def test_a_failure_is_the_status_of_who_waits() -> None:
    shapes = [Spec((1, 1, 4), F32)] * 2 + [Spec((1,), I32)] + [Spec((2, 2), F32)] * 2
    with simulating(RECORD), stream() as made, Memory(values(1, 2, 3, 4)) as x, Memory(16) as table:
        with Op("RoPE", shapes, [1]) as op, Memory(np.array([2], I32)) as position, Memory(values(1, 2, 3)) as y:
            with Op("Add", [THREE] * 3) as add:
                assert op(x, x, position, table, table, stream=made) == SUCCESS
                assert add(y, y, y, stream=made) == SUCCESS
                assert synchronize() == SUCCESS  # another stream's
                assert synchronize(made) == BAD_PARAM
                assert error() == "nvidia: rope: failed with status 3 when it ran"
                assert (y.read(F32) == values(2, 4, 6)).all()  # what came after it ran nevertheless
                assert synchronize(made) == SUCCESS  # told once


def test_memory_that_is_freed_too_early() -> None:
    with simulating(RECORD), Memory(values(1, 2, 3)) as x, Op("Add", [THREE] * 3) as op:
        early, late = Memory(12), Memory(12)
        assert op(early, x, x) == SUCCESS and early.free() == SUCCESS
        assert synchronize() == BAD_PARAM and error() == "nvidia: add: operand 0 is freed memory"
        assert op(late, x, x) == SUCCESS and runtime().infinirtFreeAsync(late.address, None) == SUCCESS
        assert synchronize() == SUCCESS  # freed in the stream's order
        assert late.free() == BAD_PARAM
        target, source = Memory(12), Memory(12)
        assert copy_async(target, source, 12, D2D) == SUCCESS and source.free() == SUCCESS
        assert synchronize() == BAD_PARAM and error() == "nvidia: memcpy: the source is freed memory"
        assert runtime().infinirtMemsetAsync(target.address, 0, ctypes.c_size_t(12), None) == SUCCESS
        assert target.free() == SUCCESS
        assert synchronize() == BAD_PARAM and error() == "nvidia: memset: the destination is freed memory"


def test_a_descriptor_that_is_destroyed_too_early() -> None:
    with simulating(RECORD), Memory(values(1, 2, 3)) as x:
        op = Op("Add", [THREE] * 3)
        assert op(x, x, x) == SUCCESS
        assert op.destroy() == BAD_PARAM
        assert error() == "nvidia: add: the descriptor is destroyed while queued or captured work needs it"
        assert synchronize() == BAD_PARAM
        assert error() == "nvidia: add: its descriptor was destroyed before it ran"
        assert (x.read(F32) == values(1, 2, 3)).all()
        op.free_workspace()
        with Op("Add", [THREE] * 3) as other:  # destroyed at the end, after it ran
            assert other(x, x, x) == SUCCESS and synchronize() == SUCCESS


def test_events() -> None:
    rt, ms = runtime(), ctypes.c_float(-1)
    with simulating(RECORD), stream() as made, stream() as other, Memory(values(1, 2, 3)) as x, Memory(12) as y:
        with event() as before, event() as after, event(1) as mute, Op("Add", [THREE] * 3) as op:
            assert is_done(before) and rt.infinirtEventSynchronize(before) == SUCCESS  # never recorded
            assert rt.infinirtEventRecord(before, made) == SUCCESS and op(y, x, x, stream=made) == SUCCESS
            assert rt.infinirtEventRecord(after, made) == SUCCESS and op(x, x, x, stream=made) == SUCCESS
            assert rt.infinirtEventElapsedTime(ctypes.byref(ms), before, after) == BAD_PARAM
            assert error() == "nvidia: infinirtEventElapsedTime: the stream has not got to the event"
            # Another stream waits for the event: then its work finds y, but x still as it was.
            assert rt.infinirtStreamWaitEvent(other, after) == SUCCESS and op(y, y, y, stream=other) == SUCCESS
            assert np.isnan(y.read(F32)).all()
            assert synchronize(other) == SUCCESS
            assert (y.read(F32) == values(4, 8, 12)).all() and (x.read(F32) == values(1, 2, 3)).all()
            assert is_done(after) and rt.infinirtEventElapsedTime(ctypes.byref(ms), before, after) == SUCCESS
            assert ms.value >= 0
            assert rt.infinirtEventRecord(after, made) == SUCCESS and op(x, x, x, stream=made) == SUCCESS
            assert rt.infinirtEventSynchronize(after) == SUCCESS  # up to the event, not beyond
            assert (x.read(F32) == values(2, 4, 6)).all()
            assert synchronize(made) == SUCCESS and (x.read(F32) == values(4, 8, 12)).all()
            assert rt.infinirtEventRecord(mute, made) == SUCCESS and op(x, x, x, stream=made) == SUCCESS
            while not is_done(mute):  # polling gets there
                pass
            assert synchronize(made) == SUCCESS
            assert rt.infinirtEventElapsedTime(ctypes.byref(ms), before, mute) == BAD_PARAM
            use(1, 1)
            assert rt.infinirtEventRecord(after, None) == BAD_PARAM and error().endswith(
                "the event is another device's"
            )
            assert rt.infinirtEventSynchronize(after) == SUCCESS and is_done(
                after
            )  # whichever device of the type waits
            use(0)
            answer = ctypes.c_int()
            for name, arguments in (
                ("infinirtEventSynchronize", (after,)),
                ("infinirtEventQuery", (after, ctypes.byref(answer))),
                ("infinirtStreamWaitEvent", (None, after)),
            ):
                assert getattr(rt, name)(*arguments) == BAD_PARAM
                assert error() == f"cpu: {name}: the event is another type of device's"
            use(1, 0)


def test_a_stream_waits_for_another_device() -> None:
    with simulating(RECORD), event() as ready, Memory(values(1, 2, 3)) as x, Op("Add", [THREE] * 3) as op:
        assert op(x, x, x) == SUCCESS and runtime().infinirtEventRecord(ready, None) == SUCCESS
        use(1, 1)
        with stream() as made:
            assert runtime().infinirtStreamWaitEvent(made, ready) == SUCCESS
            assert synchronize(made) == SUCCESS  # does the other device's work too, as that device
        use(1, 0)
        assert (x.read(F32) == values(2, 4, 6)).all() and error() == ""


def test_several_threads_wait_for_one_stream() -> None:
    with simulating(RECORD), stream() as made, Memory(values(1, 1, 1)) as x, Op("Add", [THREE] * 3) as op:
        for _ in range(20):
            assert op(x, x, x, stream=made) == SUCCESS
        statuses: list[int] = []

        def wait() -> None:
            use(1)
            statuses.append(synchronize(made))

        threads = [threading.Thread(target=wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [SUCCESS] * 4 and (x.read(F32) == 2.0**20).all()


def test_a_call_may_do_nothing_here_too() -> None:
    with simulating(RECORD), Memory(values(1, 2, 3)) as x, Op("Add", [THREE] * 3) as op:
        library().infinicpuSetNoop(1)
        try:
            assert op(x, x, x) == SUCCESS and synchronize() == SUCCESS
        finally:
            library().infinicpuSetNoop(0)
        assert (x.read(F32) == values(1, 2, 3)).all()


def test_what_waits_is_forgotten_with_the_record() -> None:
    with simulating(RECORD):
        made, op = ctypes.c_void_p(), Op("Add", [Spec((0,), F32)] * 3)
        assert runtime().infinirtStreamCreate(ctypes.byref(made)) == SUCCESS
        op.free_workspace()
        one, two = values(1), values(2)
        ends = [ctypes.c_void_p(a.ctypes.data) for a in (one, two)]
        assert copy_async(*ends, 4, H2H, made) == SUCCESS and copy_async(*ends, 4, H2H) == SUCCESS
        assert simulate(None) == SUCCESS
        assert (
            runtime().infinirtMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(8)) == DEVICE_TYPE_NOT_SUPPORTED
        )
        assert runtime().infinirtDeviceSynchronize() == DEVICE_TYPE_NOT_SUPPORTED
        assert op(None, None, None) == DEVICE_TYPE_NOT_SUPPORTED
        assert simulate(RECORD) == SUCCESS and synchronize() == SUCCESS and synchronize(made) == SUCCESS and one[0] == 1
        assert op(None, None, None) == DEVICE_TYPE_NOT_SUPPORTED  # made for the record that was forgotten
        assert error() == "nvidia: add: its device's record was replaced or forgotten"
        assert runtime().infinirtStreamDestroy(made) == SUCCESS and op.destroy() == SUCCESS

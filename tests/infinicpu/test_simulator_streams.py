"""Streams of simulated devices: work waits until somebody asks for it, and can be captured and replayed."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from .lib import BAD_PARAM, DEVICE_TYPE_NOT_SUPPORTED, F32, NULL_POINTER, SUCCESS, Spec, f, library, runtime
from .simulated import D2D, D2H, H2D, Memory, Op, error, simulate, simulating, stream, synchronize, use

I32, I64 = np.dtype(np.int32), np.dtype(np.int64)
GLOBAL, THREAD_LOCAL, RELAXED = range(3)

RECORD = """device 1 nvidia
graph_capture 1
op add dtypes=f32 graph_capture=1
op mul dtypes=f32 graph_capture=0
op silu dtypes=f32
op rope dtypes=f32
op gemm dtypes=f32 graph_capture=1
op random_sample dtypes=f32 graph_capture=1
"""
THREE = Spec((3,), F32)


def copy_async(to: object, source: object, size: int, kind: int, made: ctypes.c_void_p | None = None) -> int:
    places = [p.address if isinstance(p, Memory) else p for p in (to, source)]
    return int(runtime().infinirtMemcpyAsync(places[0], places[1], ctypes.c_size_t(size), kind, made))


def values(*numbers: float) -> np.ndarray:
    return np.array(numbers, F32)


@contextlib.contextmanager
def event(flags: int = 0) -> Iterator[ctypes.c_void_p]:
    made = ctypes.c_void_p()
    assert runtime().infinirtEventCreateWithFlags(ctypes.byref(made), flags) == SUCCESS
    yield made
    assert runtime().infinirtEventDestroy(made) == SUCCESS


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


# ---- Graphs ----


def begin(made: ctypes.c_void_p | None, mode: int = GLOBAL) -> int:
    return int(runtime().infinirtStreamBeginCapture(made, mode))


def end(made: ctypes.c_void_p) -> tuple[int, ctypes.c_void_p]:
    graph = ctypes.c_void_p()
    return int(runtime().infinirtStreamEndCapture(made, ctypes.byref(graph))), graph


@contextlib.contextmanager
def executable(graph: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
    """What is instantiated from the graph, which is destroyed first."""
    made = ctypes.c_void_p()
    assert runtime().infinirtGraphInstantiate(ctypes.byref(made), graph, None, None, ctypes.c_size_t(0)) == SUCCESS
    assert runtime().infinirtGraphDestroy(graph) == SUCCESS
    yield made
    assert runtime().infinirtGraphExecDestroy(made) == SUCCESS


def test_a_graph_repeats_what_was_captured() -> None:
    """Pointers and scalars stay those of the capture; what the pointers lead to is read anew."""
    matrix = Spec((1, 1), F32)
    with simulating(RECORD), stream() as made, Memory(values(3)) as x, Memory(values(5)) as y, Memory(4) as z:
        host = values(3)
        with Op("Gemm", [matrix] * 3) as op:
            alpha = f(2)
            assert begin(made) == SUCCESS
            assert copy_async(x, ctypes.c_void_p(host.ctypes.data), 4, H2D, made) == SUCCESS
            assert op(z, x, y, scalars=(alpha, f(0)), stream=made) == SUCCESS
            assert op(y, x, x, scalars=(f(1), f(0)), stream=None) == SUCCESS  # another stream is not captured
            status, graph = end(made)
            assert status == SUCCESS and synchronize(made) == SUCCESS and np.isnan(z.read(F32)).all()
            assert synchronize() == SUCCESS and y.read(F32)[0] == 9
            with executable(graph) as run:
                alpha.value, host[0] = 100, 4
                assert runtime().infinirtGraphLuanch(run, made) == SUCCESS
                assert np.isnan(z.read(F32)).all()  # queued as other work
                assert synchronize(made) == SUCCESS and z.read(F32)[0] == 2 * 4 * 9
                y.write(values(7))
                host[0] = 10
                for _ in range(3):
                    assert runtime().infinirtGraphLuanch(run, None) == SUCCESS
                assert synchronize() == SUCCESS and z.read(F32)[0] == 2 * 10 * 7
                use(1, 1)
                assert runtime().infinirtGraphLuanch(run, None) == BAD_PARAM
                use(1, 0)
            assert runtime().infinirtGraphLuanch(None, made) == NULL_POINTER


def test_the_scalars_of_a_draw_are_frozen() -> None:
    with simulating(RECORD), stream() as made, Memory(values(0, 1, 0.5)) as logits, Memory(np.array([9], I32)) as token:
        with Op("RandomSample", [Spec((), I32), THREE]) as op:
            assert begin(made) == SUCCESS
            assert op(token, logits, scalars=(f(0), f(0), 1, f(1)), stream=made) == SUCCESS
            status, graph = end(made)
            assert status == SUCCESS
            with executable(graph) as run:
                for best in (1, 2, 0):
                    logits.write(np.eye(3, dtype=F32)[best])
                    assert runtime().infinirtGraphLuanch(run, made) == SUCCESS and synchronize(made) == SUCCESS
                    assert token.read(I32)[0] == best


def test_devices_without_graphs() -> None:
    with simulating("device 5 moore\ngraph_capture 0\nop add dtypes=f32 graph_capture=1"), stream() as made:
        assert begin(made) == DEVICE_TYPE_NOT_SUPPORTED
        assert end(made)[0] == DEVICE_TYPE_NOT_SUPPORTED
        assert runtime().infinirtGraphLuanch(None, made) == DEVICE_TYPE_NOT_SUPPORTED


def test_ops_that_may_not_be_replayed() -> None:
    with simulating(RECORD), stream() as made, Memory(values(1, 2, 3)) as x:
        for name, count, word in (("Mul", 3, "mul"), ("Silu", 2, "silu")):
            with Op(name, [THREE] * count) as op:
                assert begin(made) == SUCCESS
                assert op(*[x] * count, stream=made) == BAD_PARAM
                assert error() == f"nvidia: {word}: may not be replayed, or nobody knows that it may"
                status, graph = end(made)
                assert status == BAD_PARAM and graph.value is None
                assert error().endswith("capture: given up because of a call that was refused meanwhile")
                assert op(*[x] * count, stream=made) == SUCCESS and synchronize(made) == SUCCESS


def test_what_a_capture_forbids() -> None:
    rt = runtime()
    local = ctypes.c_void_p(ctypes.addressof(buffer := ctypes.create_string_buffer(12)))
    with simulating(RECORD), stream() as made, stream() as other, Memory(12) as x, event() as mark:
        spare, pointer, size = Memory(12), ctypes.c_void_p(), ctypes.c_size_t(12)
        by_mode = {
            "malloc": lambda: rt.infinirtMalloc(ctypes.byref(pointer), size),
            "free": lambda: rt.infinirtFree(spare.address),
            "memcpy": lambda: rt.infinirtMemcpy(x.address, local, size, H2D),
            "memset": lambda: rt.infinirtMemset(x.address, 0, size),
        }
        always = {
            "infinirtStreamSynchronize": lambda: rt.infinirtStreamSynchronize(made),
            "infinirtDeviceSynchronize": lambda: rt.infinirtDeviceSynchronize(),
            "infinirtStreamDestroy": lambda: rt.infinirtStreamDestroy(made),
            "infinirtEventRecord": lambda: rt.infinirtEventRecord(mark, made),
            "free": lambda: rt.infinirtFreeAsync(spare.address, made),
            "capture": lambda: begin(made),
        }
        for mode in (GLOBAL, THREAD_LOCAL, RELAXED):
            for word, call in [*always.items(), *(by_mode.items() if mode != RELAXED else ())]:
                assert begin(made, mode) == SUCCESS
                assert call() == BAD_PARAM and error().startswith(f"nvidia: {word}: "), word
                assert end(made)[0] == BAD_PARAM  # the capture is spoilt
        assert begin(made, RELAXED) == SUCCESS
        assert by_mode["memcpy"]() == SUCCESS and by_mode["memset"]() == SUCCESS and synchronize(other) == SUCCESS
        another = Memory(8)
        assert another.free() == SUCCESS
        status, graph = end(made)
        assert status == SUCCESS and rt.infinirtGraphDestroy(graph) == SUCCESS
        # Without a capture all of it is allowed.
        assert spare.free() == SUCCESS and rt.infinirtEventRecord(mark, made) == SUCCESS
        assert rt.infinirtDeviceSynchronize() == SUCCESS and len(buffer.raw) == 12


def test_captures_of_other_threads() -> None:
    """A thread's own allocations spoil its captures in every mode but relaxed; other threads' only global ones."""
    with simulating(RECORD), stream() as made:
        for mode, expected in ((GLOBAL, BAD_PARAM), (THREAD_LOCAL, SUCCESS), (RELAXED, SUCCESS)):
            assert begin(made, mode) == SUCCESS
            statuses: list[int] = []

            def allocate(statuses: list[int] = statuses) -> None:
                use(1, 1)
                pointer = ctypes.c_void_p()
                statuses.append(runtime().infinirtMalloc(ctypes.byref(pointer), ctypes.c_size_t(8)))
                if statuses[0] == SUCCESS:
                    assert runtime().infinirtFree(pointer) == SUCCESS
                graph = ctypes.c_void_p()
                use(1, 0)
                if mode != RELAXED:
                    assert runtime().infinirtStreamEndCapture(made, ctypes.byref(graph)) == BAD_PARAM

            thread = threading.Thread(target=allocate)
            thread.start()
            thread.join()
            status, graph = end(made)
            assert statuses == [expected] and status == expected
            if status == SUCCESS:
                assert runtime().infinirtGraphDestroy(graph) == SUCCESS


def test_captures_are_of_streams_that_can() -> None:
    with simulating(RECORD), stream() as made:
        assert begin(None) == BAD_PARAM and error() == "nvidia: capture: the default stream cannot capture"
        assert end(made)[0] == BAD_PARAM and error() == "nvidia: capture: the stream is not capturing"
        assert begin(ctypes.c_void_p(64)) == BAD_PARAM
        assert begin(made) == SUCCESS
        status, graph = end(made)
        with executable(graph) as run:  # of nothing
            assert runtime().infinirtGraphLuanch(run, made) == SUCCESS and synchronize(made) == SUCCESS
            assert runtime().infinirtGraphLuanch(graph, made) == BAD_PARAM  # destroyed
            assert error() == "nvidia: infinirtGraphLuanch: no such graph"
        assert runtime().infinirtGraphExecDestroy(run) == BAD_PARAM and runtime().infinirtGraphDestroy(None) == SUCCESS


def test_a_graph_needs_its_descriptors_and_its_memory() -> None:
    with simulating(RECORD), stream() as made, Memory(values(1, 2, 3)) as x:
        y, op = Memory(12), Op("Add", [THREE] * 3)
        assert begin(made) == SUCCESS and op(y, x, x, stream=made) == SUCCESS
        status, graph = end(made)
        assert status == SUCCESS
        with executable(graph) as run:
            assert runtime().infinirtGraphLuanch(run, made) == SUCCESS and synchronize(made) == SUCCESS
            assert y.free() == SUCCESS
            assert runtime().infinirtGraphLuanch(run, made) == SUCCESS and synchronize(made) == BAD_PARAM
            assert error() == "nvidia: add: operand 0 is freed memory"
            assert op.destroy() == BAD_PARAM
            assert runtime().infinirtGraphLuanch(run, made) == SUCCESS and synchronize(made) == BAD_PARAM
            assert error() == "nvidia: add: its descriptor was destroyed before it ran"
        op.free_workspace()
        # In the right order nobody complains.
        with Op("Add", [THREE] * 3) as good, Memory(12) as z:
            assert begin(made) == SUCCESS and good(z, x, x, stream=made) == SUCCESS
            status, graph = end(made)
            with executable(graph) as run:
                assert runtime().infinirtGraphLuanch(run, made) == SUCCESS and synchronize(made) == SUCCESS
            assert (z.read(F32) == values(2, 4, 6)).all()


def test_what_waits_is_forgotten_with_the_record() -> None:
    with simulating(RECORD):
        made, op = ctypes.c_void_p(), Op("Add", [Spec((0,), F32)] * 3)
        assert runtime().infinirtStreamCreate(ctypes.byref(made)) == SUCCESS
        op.free_workspace()
        assert simulate(None) == SUCCESS
        assert (
            runtime().infinirtMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(8)) == DEVICE_TYPE_NOT_SUPPORTED
        )
        assert runtime().infinirtDeviceSynchronize() == DEVICE_TYPE_NOT_SUPPORTED
        assert op(None, None, None) == DEVICE_TYPE_NOT_SUPPORTED
        assert runtime().infinirtStreamDestroy(made) == SUCCESS and op.destroy() == SUCCESS

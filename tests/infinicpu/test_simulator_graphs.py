"""Graphs of simulated devices: what a stream's capture records, what it forbids, and replays."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

import numpy as np

from .lib import BAD_PARAM, DEVICE_TYPE_NOT_SUPPORTED, F32, NULL_POINTER, SUCCESS, Spec, f, runtime
from .simulated import (
    H2D,
    Memory,
    Op,
    copy_async,
    error,
    event,
    simulating,
    stream,
    synchronize,
    use,
    values,
)

I32 = np.dtype(np.int32)
GLOBAL, THREAD_LOCAL, RELAXED = range(3)

RECORD = """device 1 nvidia
graph_capture 1
op add dtypes=f32 graph_capture=1
op mul dtypes=f32 graph_capture=0
op silu dtypes=f32
op gemm dtypes=f32 graph_capture=1
op random_sample dtypes=f32 graph_capture=1
"""
THREE = Spec((3,), F32)


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

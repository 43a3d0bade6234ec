"""The headers, infinirt, infiniccl, the switches, and how the library is built."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import runtime.infinicpu as infinicpu
from ir.errors import BuildError

from .lib import (
    BAD_PARAM,
    DEVICE_NOT_FOUND,
    DEVICE_TYPE_NOT_SUPPORTED,
    F32,
    NULL_POINTER,
    PROJECT,
    SOURCE,
    SUCCESS,
    Operator,
    call,
    collectives,
    library,
    runtime,
)

INCLUDE = SOURCE / "include"
HEADERS = sorted(p.relative_to(INCLUDE) for p in INCLUDE.rglob("*.h"))


@pytest.mark.parametrize("language", ["c99", "c++17"])
def test_headers_are_clean_alone_and_together(language: str, tmp_path: Path) -> None:
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", f"-std={language}", f"-I{INCLUDE}"]
    sources = [[header] for header in HEADERS] + [HEADERS]
    for i, headers in enumerate(sources):
        text = "".join(f'#include "{h}"\n' for h in headers) + "int main(void) { return 0; }\n"
        (tmp_path / f"t{i}.{'c' if language == 'c99' else 'cpp'}").write_text(text)
    result = subprocess.run(
        ["g++" if "+" in language else "gcc", *flags, *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_every_declared_function_is_exported() -> None:
    libraries = {"infinirt": runtime(), "infiniop": library(), "infiniccl": collectives(), "infinicpu": library()}
    for header in HEADERS:
        for name in re.findall(r"\b(infini(?:rt|op|ccl|cpu)[A-Z]\w*)\(", (INCLUDE / header).read_text()):
            assert getattr(libraries[re.match("infini[a-z]+", name)[0]], name), name  # type: ignore[index]


def test_devices() -> None:
    rt = runtime()
    counts = (ctypes.c_int * 11)()
    assert rt.infinirtInit() == SUCCESS and rt.infinirtGetAllDeviceCount(counts) == SUCCESS
    assert counts[0] == 8 and not any(counts[1:])
    kind, number = ctypes.c_int(-1), ctypes.c_int(-1)
    assert rt.infinirtSetDevice(0, 3) == SUCCESS
    assert rt.infinirtGetDevice(ctypes.byref(kind), ctypes.byref(number)) == SUCCESS and (kind.value, number.value) == (
        0,
        3,
    )
    with ThreadPoolExecutor(1) as pool:  # the current device is per thread
        pool.submit(rt.infinirtGetDevice, None, ctypes.byref(number)).result()
    assert number.value == 0
    assert rt.infinirtSetDevice(0, 8) == DEVICE_NOT_FOUND and rt.infinirtSetDevice(0, -1) == DEVICE_NOT_FOUND
    assert rt.infinirtSetDevice(1, 0) == DEVICE_TYPE_NOT_SUPPORTED
    handle, desc, device = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    assert library().infiniopCreateHandle(ctypes.byref(handle)) == SUCCESS
    assert rt.infinirtSetDevice(0, 0) == SUCCESS
    tensor, shape = ctypes.c_void_p(), (ctypes.c_size_t * 1)(4)
    library().infiniopCreateTensorDescriptor(ctypes.byref(tensor), ctypes.c_size_t(1), shape, None, 13)
    assert library().infiniopCreateSiluDescriptor(handle, ctypes.byref(desc), tensor, tensor) == SUCCESS
    assert library().infiniopGetDescriptorDeviceId(desc, ctypes.byref(device)) == SUCCESS and device.value == 3
    assert library().infiniopGetDescriptorDeviceType(desc, ctypes.byref(device)) == SUCCESS and device.value == 0
    library().infiniopDestroySiluDescriptor(desc)
    library().infiniopDestroyTensorDescriptor(tensor)
    library().infiniopDestroyHandle(handle)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_memory() -> None:
    rt = runtime()
    block, before = ctypes.c_void_p(), resident_bytes()
    assert rt.infinirtMalloc(ctypes.byref(block), ctypes.c_size_t(1 << 30)) == SUCCESS
    assert block.value is not None and block.value % (2 << 20) == 0
    assert resident_bytes() - before < 64 << 20  # a gigabyte that nobody wrote to takes no memory
    assert rt.infinirtFree(block) == SUCCESS
    a, b = ctypes.c_void_p(), ctypes.c_void_p()
    for pointer in (a, b):
        assert rt.infinirtMalloc(ctypes.byref(pointer), ctypes.c_size_t(100)) == SUCCESS
        assert pointer.value is not None and pointer.value % 64 == 0
    size = ctypes.c_size_t(100)
    assert rt.infinirtMemset(a, 7, size) == SUCCESS and rt.infinirtMemcpyAsync(b, a, size, 3, None) == SUCCESS
    assert ctypes.string_at(b, 100) == b"\x07" * 100
    assert (
        rt.infinirtMemcpy(None, a, size, 1) == NULL_POINTER
        and rt.infinirtMemcpy(None, None, ctypes.c_size_t(0), 1) == SUCCESS
    )
    assert (
        rt.infinirtFreeAsync(a, None) == SUCCESS
        and rt.infinirtFreeHost(b) == SUCCESS
        and rt.infinirtFree(None) == SUCCESS
    )
    assert rt.infinirtMalloc(ctypes.byref(a), ctypes.c_size_t(0)) == SUCCESS and a.value is None
    assert rt.infinirtMalloc(None, size) == NULL_POINTER
    assert rt.infinirtMalloc(ctypes.byref(a), ctypes.c_size_t(1 << 62)) != SUCCESS
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert rt.infinirtGetMemInfo(0, 0, ctypes.byref(free), ctypes.byref(total)) == SUCCESS
    assert 0 < free.value <= total.value


def test_streams_events_and_graphs() -> None:
    rt = runtime()
    stream, start, end, mute, ms = (
        ctypes.c_void_p(),
        ctypes.c_void_p(),
        ctypes.c_void_p(),
        ctypes.c_void_p(),
        ctypes.c_float(-1),
    )
    assert rt.infinirtStreamCreate(ctypes.byref(stream)) == SUCCESS
    for event, flags in ((start, 0), (end, 2), (mute, 1)):
        assert rt.infinirtEventCreateWithFlags(ctypes.byref(event), flags) == SUCCESS
        assert rt.infinirtEventRecord(event, stream) == SUCCESS
    assert rt.infinirtEventElapsedTime(ctypes.byref(ms), start, end) == SUCCESS and ms.value >= 0
    assert rt.infinirtEventElapsedTime(ctypes.byref(ms), start, mute) == BAD_PARAM
    ready = ctypes.c_int(-1)
    assert rt.infinirtEventQuery(end, ctypes.byref(ready)) == SUCCESS and ready.value == 0
    assert rt.infinirtStreamWaitEvent(stream, end) == SUCCESS and rt.infinirtStreamSynchronize(stream) == SUCCESS
    assert rt.infinirtStreamBeginCapture(stream, 0) == DEVICE_TYPE_NOT_SUPPORTED  # as InfiniCore's CPU
    for event in (start, end, mute):
        assert rt.infinirtEventDestroy(event) == SUCCESS
    assert rt.infinirtStreamDestroy(stream) == SUCCESS


def test_collectives_of_one() -> None:
    ccl = collectives()
    comm, one = ctypes.c_void_p(), (ctypes.c_int * 2)(0, 1)
    assert ccl.infinicclCommInitAll(1, ctypes.byref(comm), 1, one) == DEVICE_TYPE_NOT_SUPPORTED
    assert ccl.infinicclCommInitAll(0, ctypes.byref(comm), 1, one) == SUCCESS
    x, y = np.arange(5, dtype=F32), np.zeros(5, F32)
    args = (ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_size_t(5), 13)
    assert ccl.infinicclAllReduce(*args, 0, comm, None) == SUCCESS
    np.testing.assert_array_equal(x, y)
    assert ccl.infinicclSend(args[0], args[2], 13, 1, comm, None) == BAD_PARAM
    assert ccl.infinicclAllReduce(*args, 0, None, None) == NULL_POINTER
    assert ccl.infinicclCommDestroy(comm) == SUCCESS


class Counters(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("calls", "operators_created", "operators_alive", "tensors_created", "tensors_alive"),
            *("allocations", "allocations_alive", "copies_host_device", "copies_device_device"),
        )
    ]


def counters() -> dict[str, int]:
    now = Counters()
    assert library().infinicpuCounters(ctypes.byref(now)) == SUCCESS
    return {name: getattr(now, name) for name, _ in Counters._fields_}


def test_counters() -> None:
    before = counters()
    x = np.ones((2, 3), F32)
    operator = Operator("Silu", [x, x])
    for _ in range(5):
        assert operator(x, x) == SUCCESS
    change = {k: v - before[k] for k, v in counters().items()}
    assert (change["calls"], change["operators_created"], change["operators_alive"], change["tensors_created"]) == (
        5,
        1,
        1,
        2,
    )
    assert change["tensors_alive"] == 0 and change["allocations"] == 0
    operator.destroy()
    assert counters()["operators_alive"] == before["operators_alive"]


def test_noop_and_trace(capfd: pytest.CaptureFixture[str]) -> None:
    x, y = np.ones((2, 3), F32), np.zeros((2, 3), F32)
    try:
        library().infinicpuSetNoop(1)
        library().infinicpuSetTrace(1)
        call("Silu", [y, x])
        assert (y == 0).all()
        library().infinicpuSetNoop(0)
        call("Silu", [y, x[:, ::-1]])
        assert (y != 0).all()
    finally:
        library().infinicpuSetNoop(0)
        library().infinicpuSetTrace(0)
    call("Silu", [y, x])
    assert capfd.readouterr().err.splitlines() == ["silu f32[2,3] f32[2,3]", "silu f32[2,3] f32[2,3](3,-1)"]


def test_thread_count() -> None:
    number = ctypes.c_int()
    assert library().infinicpuGetNumThreads(ctypes.byref(number)) == SUCCESS and number.value >= 1
    assert library().infinicpuSetNumThreads(0) == BAD_PARAM


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_results_of_the_other_instruction_sets(isa: str) -> None:
    """The op tests again, in a process that uses at most `isa`; where the machine lacks it, the next lower one."""
    tests = [
        f"tests/infinicpu/{name}.py" for name in ("test_gemm", "test_rows", "test_attention", "test_random_sample")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, "INFINICPU_ISA": isa}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_build_gives_an_infini_root_and_finds_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_CACHE", str(PROJECT / "build" / "cache"))
    root = infinicpu.build()
    stamp = (root / ".infinicpu-build").stat().st_mtime_ns
    assert all((root / "lib" / f"lib{name}.so").exists() for name in infinicpu.LIBRARIES)
    assert all((root / "include" / header).exists() for header in HEADERS)
    assert infinicpu.build() == root and (root / ".infinicpu-build").stat().st_mtime_ns == stamp


def test_a_finished_build_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QWEN3_CACHE", str(PROJECT / "build" / "cache"))
    root = infinicpu.build()
    stamp = (root / ".infinicpu-build").stat().st_mtime_ns
    os.utime(root, (0, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    for compiler in ("", "no-such-compiler", "ccache clang++ -m64"):
        monkeypatch.setenv("CXX", compiler)
        assert infinicpu.build() == root
    monkeypatch.delenv("CXX")
    assert infinicpu.build() == root and (root / ".infinicpu-build").stat().st_mtime_ns == stamp
    assert time.time() - root.stat().st_mtime < 600  # used just now, so not the next one to be pruned


def finish(target: Path, key: str, options: list[str]) -> None:
    """In the place of a compilation: the least that passes for a finished build."""
    target.mkdir()
    (target / ".infinicpu-build").write_text(key)


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QWEN3_CACHE", str(tmp_path))
    monkeypatch.setattr(infinicpu, "_build_into", finish)
    now, day = time.time(), 24 * 3600

    def make(name: str, age: float) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
        os.utime(tmp_path / name, (now - age, now - age))

    for hours in range(1, 9):
        make(f"infinicpu-{hours}", hours * 3600)
        (tmp_path / f".infinicpu-{hours}.lock").write_text("")
    make(".infinicpu-1-left_over", 3 * day)
    make(".infinicpu-9-left_over", 3 * day)
    make(".infinicpu-2-under_way", 3600)
    make(".infinicpu-8-under_way", 3 * day)
    make("builds", 9 * day)  # another's
    (tmp_path / ".infinicpu-10.lock").write_text("")
    os.utime(tmp_path / ".infinicpu-10.lock", (now - 3 * day, now - 3 * day))
    with open(tmp_path / ".infinicpu-8.lock") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        root = infinicpu.build()
    kept = {f"infinicpu-{n}" for n in (1, 2, 3, 4, 8)} | {root.name}
    others = {".infinicpu-2-under_way", ".infinicpu-8-under_way", "builds"}
    assert {p.name for p in tmp_path.iterdir()} == kept | others | {f".{name}.lock" for name in kept}


def test_builds_that_were_just_used_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QWEN3_CACHE", str(tmp_path))
    monkeypatch.setattr(infinicpu, "_build_into", finish)
    roots = []
    for number in range(7):
        monkeypatch.setenv("CXXFLAGS", f"-DNUMBER={number}")
        roots.append(infinicpu.build())
    assert len(set(roots)) == 7 and all(root.is_dir() for root in roots)
    for number, root in enumerate(roots):  # the first one was built first, and is used again
        os.utime(root, (1000 + number, 1000 + number))
    monkeypatch.setenv("CXXFLAGS", "-DNUMBER=0")
    assert infinicpu.build() == roots[0]
    monkeypatch.setenv("CXXFLAGS", "-DNUMBER=7")
    assert infinicpu.build().is_dir()
    assert [root.is_dir() for root in roots] == [True, False, False, False, True, True, True]


def test_build_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="sanitize must be"):
        infinicpu.build(sanitize="memory")
    monkeypatch.setenv("QWEN3_CACHE", str(tmp_path / "cache"))
    compiler = tmp_path / "broken-g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$1" in --version|-dump*) echo 12.2.0; exit 0;; esac\necho "error: nothing works" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError) as caught:
        infinicpu.build()
    assert "\n" not in str(caught.value) and "cmake" in str(caught.value)
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler: install g\\+\\+"):
        infinicpu.build()

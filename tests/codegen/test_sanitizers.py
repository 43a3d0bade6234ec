"""The engine and the embedded library under AddressSanitizer (with leak check), UndefinedBehaviorSanitizer and ThreadSanitizer.

driver.cpp is linked with the engine's own source, all of it instrumented, and runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from codegen.toolchain import compiler
from runtime import infinicpu
from tests.codegen.engines import Builder

DRIVER = Path(__file__).with_name("driver.cpp")
# Sanitizers, threads of the embedded library: TSan watches the library's own pool too.
KINDS = {"plain": ("", 2), "address": ("address,undefined", 2), "thread": ("thread", 3)}
SETTINGS = {
    "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:exitcode=99",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=99",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=99",
}


@pytest.fixture(scope="session")
def driver(build_engine: Builder):
    """``driver(kind, model, **options) -> Path``: the compiled scenario."""
    made: dict[tuple, Path] = {}

    def make(kind: str, model: str, **options: str) -> Path:
        key = (kind, model, *sorted(options.items()))
        if key not in made:
            sanitize, _ = KINDS[kind]
            sources = build_engine(model, emit_only=True, **options)
            root = infinicpu.build(sanitize=sanitize)
            out = build_engine.root / f"driver-{len(made)}"
            flags = (
                [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
                if sanitize
                else ["-O1"]
            )
            command = [
                compiler(),
                "-std=c++17",
                "-Wall",
                "-Wextra",
                "-Werror",
                *flags,
                f"-I{sources}",
                "-isystem",
                f"{root}/include",
            ]
            command += [str(DRIVER), str(sources / "qwen3.cpp"), "-o", str(out)]
            command += [
                f"-L{root}/lib",
                f"-Wl,-rpath,{root}/lib",
                "-linfiniop",
                "-linfinirt",
                "-linfiniccl",
                "-lpthread",
            ]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            assert done.returncode == 0, done.stderr
            made[key] = out
        return made[key]

    return make


def run(program: Path, kind: str, rounds: int = 1, devices: int = 1) -> None:
    environment = {**os.environ, **SETTINGS, "INFINICPU_THREADS": str(KINDS[kind][1])}
    command = [str(program), str(rounds), str(devices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[:6000]}"
    assert "largest difference" in done.stdout and not done.stderr, done.stderr[:6000]


def test_the_scenario_itself(driver) -> None:
    """Without sanitizers, and in the other dtype: batch and alone agree."""
    run(driver("plain", "two", dtype="bf16", kv="paged"), "plain", 2)
    run(driver("plain", "two", dtype="f16", kv="contiguous"), "plain", 2)


@pytest.mark.parametrize("kind, kv", [("address", "paged"), ("thread", "contiguous")])
def test_under_sanitizers(driver, kind: str, kv: str) -> None:
    run(driver(kind, "two", dtype="f32", kv=kv), kind)


@pytest.mark.parametrize("kind", ["thread", pytest.param("address", marks=pytest.mark.slow)])
def test_several_devices_under_sanitizers(driver, kind: str) -> None:
    """A thread per device, and two callers; the random weights are read as the shards of two devices."""
    run(driver(kind, "wide", dtype="f32", kv="paged"), kind, 1, devices=2)


@pytest.mark.parametrize(
    "fault, text",
    [("overrun", "AddressSanitizer: heap-buffer-overflow"), ("leak", "LeakSanitizer: detected memory leaks")],
)
def test_the_sanitizer_is_awake(driver, fault: str, text: str) -> None:
    program = driver("address", "two", dtype="f32", kv="paged")
    done = subprocess.run([str(program), fault], env={**os.environ, **SETTINGS}, capture_output=True, text=True)
    assert done.returncode == 99 and text in done.stderr, done.stderr[:3000]


@pytest.mark.slow
@pytest.mark.parametrize("kind, kv", [("address", "contiguous"), ("thread", "paged")])
def test_the_other_caches_under_sanitizers(driver, kind: str, kv: str) -> None:
    run(driver(kind, "two", dtype="f32", kv=kv), kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("dtype, kv", [("bf16", "paged"), ("f16", "contiguous")])
def test_longer_and_in_half_types(driver, kind: str, dtype: str, kv: str) -> None:
    run(driver(kind, "three", dtype=dtype, kv=kv), kind, 4)

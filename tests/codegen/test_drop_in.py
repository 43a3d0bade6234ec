"""The emitted folder by itself: built with its own CMakeLists.txt, linked with an InfiniCore, driven from C++ without Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from codegen.toolchain import compiler, tool
from runtime import infinicpu
from tests.codegen.engines import Builder

DRIVER = Path(__file__).with_name("driver.cpp")


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_the_folder_builds_alone_and_links(build_engine: Builder, tmp_path: Path) -> None:
    sources = build_engine("wide", dtype="f32", kv="paged", emit_only=True)
    root = infinicpu.build()
    environment = {k: v for k, v in os.environ.items() if k not in ("INFINI_ROOT", "PYTHONPATH")}
    run(
        tool("cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-S", sources, "-B", tmp_path / "cmake",
        f"-DINFINI_ROOT={root}", "-DCMAKE_CXX_FLAGS=-O0", env=environment,
    )  # fmt: skip
    run(tool("cmake"), "--build", tmp_path / "cmake", env=environment)
    library = tmp_path / "cmake" / "libqwen3.so"
    program = tmp_path / "program"
    # Against the library, as another program would: the header, the library, InfiniCore.
    run(
        compiler(), "-std=c++17", "-O0", f"-I{sources}", "-isystem", f"{root}/include", DRIVER, library, f"-L{root}/lib",
        "-linfiniop", "-linfinirt", "-linfiniccl", f"-Wl,-rpath,{root}/lib", f"-Wl,-rpath,{library.parent}", "-lpthread", "-o", program,
    )  # fmt: skip
    assert "largest difference" in run(program, "1", "2", env=environment).stdout


def test_without_an_infinicore_it_says_what_is_missing(build_engine: Builder, tmp_path: Path) -> None:
    sources = build_engine("wide", dtype="f32", kv="paged", emit_only=True)
    command = [
        tool("cmake"),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-S",
        str(sources),
        "-B",
        str(tmp_path),
    ]
    done = subprocess.run([*command, f"-DINFINI_ROOT={tmp_path}"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "has no include/infiniop.h: set it with -DINFINI_ROOT=" in " ".join(done.stderr.split())  # cmake wraps lines

"""Compiling an emitted engine with cmake and ninja from pip and the machine's C++ compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from ir.errors import BuildError

LIBRARY = "libqwen3.so"


def tool(name: str) -> str:
    """cmake or ninja: the one that pip installed beside this Python, else the machine's."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if not found:
        raise BuildError(f"{name} is not installed: pip install {name}")
    return found


def compiler() -> str:
    """The C++ compiler: $CXX, else c++, g++ or clang++."""
    wanted = os.environ.get("CXX", "")
    names = [wanted] if wanted else ["g++", "c++", "clang++"]
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        f"no C++ compiler: {wanted} (from CXX) was not found"
        if wanted
        else "no C++ compiler: install g++ (11 or newer), or name one in CXX"
    )


def compile_engine(sources: Path, infini_root: Path, *, sanitize: str = "") -> Path:
    """Compile the engine in ``sources``; returns ``sources/libqwen3.so``.

    Args:
        infini_root: the InfiniCore whose headers it is compiled against. Its libraries are not linked: whoever loads the engine loads them first.
        sanitize: ``address,undefined`` or ``thread`` for a checked build.

    Raises:
        BuildError: no compiler, or the compiler's first error.
    """
    with tempfile.TemporaryDirectory(prefix="qwen3-build-") as folder:
        flags = f"-fsanitize={sanitize} -fno-omit-frame-pointer -g" if sanitize else ""
        configure = [
            tool("cmake"), "-G", "Ninja", "-S", str(sources), "-B", folder,
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_CXX_COMPILER={compiler()}",
            f"-DINFINI_ROOT={infini_root}",
            "-DQWEN3_LINK_INFINICORE=OFF",
            f"-DCMAKE_CXX_FLAGS={flags}",
            "-DCMAKE_SHARED_LINKER_FLAGS=-Wl,-z,lazy",
        ]  # fmt: skip
        _run(configure, "configuring the engine")
        _run([tool("cmake"), "--build", folder], "compiling the engine")
        target = sources / LIBRARY
        shutil.copy2(Path(folder) / LIBRARY, target)
        return target


def _run(command: list[str], what: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("CMAKE_GENERATOR",)}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode == 0:
        return
    lines = (
        [line for line in done.stdout.splitlines() if "error:" in line.lower()]
        or done.stdout.splitlines()[-1:]
        or ["no output"]
    )
    if os.environ.get("QWEN3_VERBOSE"):
        print(done.stdout, file=sys.stderr)
    raise BuildError(f"{what} failed: {lines[0].strip()} (all of it with QWEN3_VERBOSE=1)")

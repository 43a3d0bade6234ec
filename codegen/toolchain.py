"""Compiling an emitted engine with cmake and ninja from pip and the machine's C++ compiler."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ir.errors import BuildError

LIBRARY = "libqwen3.so"
# The oldest major version of each family that compiles C++17 and the vector code as we write them.
OLDEST = {"g++": 11, "clang": 14}


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler as ``CXX`` may name it: ``[launcher ...] path [flag ...]``."""

    path: str
    launcher: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def cmake_options(self) -> list[str]:
        """What tells cmake to use it."""
        options = [f"-DCMAKE_CXX_COMPILER={';'.join((self.path, *self.flags))}"]
        return options + ([f"-DCMAKE_CXX_COMPILER_LAUNCHER={';'.join(self.launcher)}"] if self.launcher else [])


def tool(name: str) -> str:
    """cmake or ninja: the one that pip installed beside this Python, else the machine's."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if not found:
        raise BuildError(f"{name} is not installed: pip install {name}")
    return found


def compiler() -> str:
    """Path of the C++ compiler: see :func:`find_compiler`."""
    return find_compiler().path


def find_compiler() -> Compiler:
    """The C++ compiler: $CXX, which may have a launcher before it and flags after it; else g++, c++ or clang++.

    Raises:
        BuildError: there is none, it does not run, or it is older than ``OLDEST``.
    """
    wanted = os.environ.get("CXX", "").strip()
    if wanted:
        found = _parse(wanted)
    else:
        paths = [path for path in map(shutil.which, ("g++", "c++", "clang++")) if path]
        if not paths:
            raise BuildError("no C++ compiler: install g++ (11 or newer), or name one in CXX")
        found = Compiler(paths[0])
    _check_version(found.path)
    return found


def _parse(wanted: str) -> Compiler:
    """CXX's words: the last one before the first flag is the compiler, what stands before it launches it."""
    whole = shutil.which(wanted)  # a path may have spaces
    if whole:
        return Compiler(whole)
    try:
        words = shlex.split(wanted)
    except ValueError as error:
        raise BuildError(f"no C++ compiler: CXX is {wanted!r} ({error})") from None
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    # Whatever runs first must be there, and so must the compiler.
    paths = {i: shutil.which(words[i]) for i in {0, count - 1} if 0 <= i < count}
    missing = [words[i] for i, path in paths.items() if path is None]
    if missing or not paths:
        raise BuildError(f"no C++ compiler: {(missing or [wanted])[0]} (from CXX) was not found")
    launcher = (str(paths[0]), *words[1 : count - 1]) if count > 1 else ()
    return Compiler(str(paths[count - 1]), launcher, tuple(words[count:]))


@lru_cache(maxsize=None)
def _check_version(path: str) -> None:
    """Refuse a compiler that is too old; asked once per process."""
    family = "clang" if "clang" in _ask(path, "--version") else "g++"
    # -dumpversion alone gives no more than the major version in some builds of g++; clang does not know the other one.
    version = _ask(path, *(["-dumpversion"] if family == "clang" else ["-dumpfullversion", "-dumpversion"])).strip()
    major = re.match(r"\d+", version)
    if major is None or int(major[0]) < OLDEST[family]:
        raise BuildError(f"{path} is {family} {version or 'of no version'}, expected {OLDEST[family]} or newer")


def _ask(path: str, *options: str) -> str:
    try:
        done = subprocess.run([path, *options], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}, expected a C++ compiler") from None
    if done.returncode != 0:
        reason = next(iter((done.stderr or done.stdout).strip().splitlines()), f"exit status {done.returncode}")
        raise BuildError(f"{path} {' '.join(options)} failed ({reason}): is it a C++ compiler?")
    return done.stdout


def compile_engine(sources: Path, infini_root: Path, *, sanitize: str = "", optimise: bool = True) -> Path:
    """Compile the engine in ``sources``; returns ``sources/libqwen3.so``.

    Args:
        infini_root: the InfiniCore whose headers it is compiled against. Its libraries are not linked: whoever loads the engine loads them first.
        sanitize: ``address,undefined`` or ``thread`` for a checked build.
        optimise: without, it compiles in a third of the time.

    Raises:
        BuildError: no compiler, one that is too old, or the compiler's first error.
    """
    with tempfile.TemporaryDirectory(prefix="qwen3-build-") as folder:
        flags = f"-fsanitize={sanitize} -fno-omit-frame-pointer -g" if sanitize else ""
        configure = [
            tool("cmake"), "-G", "Ninja", "-S", str(sources), "-B", folder,
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            *find_compiler().cmake_options(),
            f"-DINFINI_ROOT={infini_root}",
            "-DQWEN3_LINK_INFINICORE=OFF",
            f"-DCMAKE_BUILD_TYPE={'Release' if optimise else 'None'}",
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

"""The embedded InfiniCore: our own implementation of the InfiniCore C ABI for the CPU, and how it is built.

``build()`` compiles it once per set of sources, flags and instruction sets, keeps the result in the user's cache, and
returns a folder laid out like an InfiniCore installation: ``include/`` and ``lib/lib{infinirt,infiniop,infiniccl}.so``.
A finished one is found again without a compiler, and whatever compiler is installed by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ir.errors import BuildError

SOURCE_DIR = Path(__file__).resolve().parent
LIBRARIES = ("infinirt", "infiniop", "infiniccl")
SANITIZERS = ("", "address,undefined", "thread")
# A file in the finished folder that says from what it was built.
STAMP = ".infinicpu-build"
# The cache keeps this many builds beside the one in use, and all that were used within the last minutes: another
# process may be about to load them.
KEEP = 4
RECENT_SECONDS = 600
# What an interrupted build left behind is removed after this long.
STALE_SECONDS = 24 * 3600
# The build's name in the names of its folder, its lock and its temporary folders.
CACHE_NAME = re.compile(r"\.?(infinicpu-\w+)")
# Kernels beside the portable ones, best first, and the CPU features that tell the machine has them.
X86_KERNELS = {"avx512_bf16": "avx512_bf16", "avx512": "avx512bw", "avx2": "avx2"}
# "[3/23] Building ...", as ninja reports it.
NINJA_PROGRESS = re.compile(r"\[(\d+)/(\d+)\]")


def cache_root() -> Path:
    """Folder of everything that is built on first use: ``$QWEN3_CACHE``, else ``~/.cache/qwen3-infinicore``."""
    configured = os.environ.get("QWEN3_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "qwen3-infinicore"


def build(out_dir: Path | None = None, sanitize: str = "") -> Path:
    """Build the embedded InfiniCore, or find the one that was built before.

    Args:
        out_dir: where the result shall be; replaced if it holds another build. Default: a folder in the user's cache.
        sanitize: "", "address,undefined" or "thread".

    Returns:
        The folder with ``include/`` and ``lib/``, usable as ``INFINI_ROOT``.

    Raises:
        BuildError: no compiler or cmake, a folder that cannot be written, or a compiler error.
    """
    if sanitize not in SANITIZERS:
        raise BuildError(f"sanitize must be one of {', '.join(map(repr, SANITIZERS))}, not {sanitize!r}")
    options = [f"-DINFINICPU_SANITIZE={sanitize}", f"-DINFINICPU_ISAS={_best_kernels(plain=bool(sanitize))}"]
    key = _build_key(options)
    target = Path(out_dir).absolute() if out_dir is not None else cache_root() / f"infinicpu-{key[:16]}"
    if out_dir is None:
        with contextlib.suppress(OSError):  # not there yet, or a cache that is only read
            os.utime(target)  # used just now: see _prune
    if _is_current(target, key):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f".{target.name}.lock"):
            if not _is_current(target, key):  # another process may have built it meanwhile
                _build_into(target, key, options)
        if out_dir is None:
            _prune(target)
    except OSError as error:
        raise BuildError(f"cannot build the embedded InfiniCore in {target}: {error.strerror or error}") from error
    return target


def _is_current(target: Path, key: str) -> bool:
    try:
        return (target / STAMP).read_text() == key
    except OSError:
        return False


def _build_into(target: Path, key: str, options: list[str]) -> None:
    """Configure, compile and install in a temporary folder beside the target, then move the result into place."""
    # Only here: what is built already is used without the compiler's packages, and without a compiler.
    from codegen.toolchain import find_compiler

    compiler = find_compiler()
    cmake, ninja = _find_tool("cmake"), _find_tool("ninja")
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        tree, root = work / "build", work / "root"
        _run(
            [
                *(cmake, "-S", str(SOURCE_DIR), "-B", str(tree), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
                *(*compiler.cmake_options(), "-DCMAKE_INSTALL_LIBDIR=lib", *options),
            ]
        )
        _run([cmake, "--build", str(tree)], progress="building the embedded InfiniCore")
        _run([cmake, "--install", str(tree), "--prefix", str(root)])
        (root / STAMP).write_text(key)
        if target.exists():
            os.rename(target, work / "old")
        os.rename(root, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(command: list[str], progress: str = "") -> None:
    """Run a build step; its first error line becomes the BuildError. With `progress`, a terminal sees how far it is."""
    show = bool(progress) and sys.stderr.isatty()
    output: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            match = NINJA_PROGRESS.match(line)
            if show and match:
                print(f"\r{progress} [{match[1]}/{match[2]}]", end="", file=sys.stderr, flush=True)
    if show:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if process.returncode != 0:
        errors = [line.strip() for line in output if "error" in line.lower()] or [line.strip() for line in output[-1:]]
        reason = errors[0] if errors else f"exit status {process.returncode}"
        raise BuildError(f"building the embedded InfiniCore failed in {Path(command[0]).name}: {reason}")


def _find_tool(name: str) -> str:
    """A build tool: the pip package's of this interpreter first, then the one on the path."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise BuildError(f"{name} not found: install it with `pip install {name}`")
    return path


def _best_kernels(plain: bool = False) -> str:
    """The kernels worth compiling for this machine: compiling those of every machine takes three times as long.

    Args:
        plain: the portable ones alone; instrumented, the others take minutes to compile.
    """
    if plain:
        return "portable"
    try:
        features = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]))
    except OSError:
        return ";".join(X86_KERNELS)
    return next((name for name, feature in X86_KERNELS.items() if feature in features), "portable")


def _build_key(options: list[str]) -> str:
    """A hash of everything that the result depends on, short of the compiler: any of them makes one that serves."""
    digest = hashlib.sha256()
    flags = (os.environ.get("CXXFLAGS", ""), os.environ.get("LDFLAGS", ""))
    # A home folder may be shared by machines of other kinds.
    for text in (platform.machine(), *platform.libc_ver(), *flags, *options):
        digest.update(text.encode() + b"\0")
    sources = [SOURCE_DIR / "CMakeLists.txt", *SOURCE_DIR.glob("src/**/*"), *SOURCE_DIR.glob("include/**/*")]
    for path in sorted(p for p in sources if p.is_file()):
        digest.update(str(path.relative_to(SOURCE_DIR)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file; the kernel releases it even if the process dies. False: another holds it."""
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            # Pruning removes lock files: while we waited, another file may have come to the path.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    yield True
                    return


def _prune(current: Path) -> None:
    """Remove the builds that were used longest ago, and what interrupted builds left; never what is being built."""
    root = current.parent
    builds = sorted((p for p in root.glob("infinicpu-*") if p != current), key=_age)
    old = [p for p in builds[KEEP:] if _age(p) > RECENT_SECONDS]
    for path in old + [p for p in root.glob(".infinicpu-*") if _age(p) > STALE_SECONDS]:
        match = CACHE_NAME.match(path.name)
        if match is None or (path.suffix == ".lock" and (root / match[1]).exists()):
            continue
        lock = root / f".{match[1]}.lock"
        with contextlib.suppress(OSError), _lock(lock, wait=False) as held:
            if not held:
                continue
            if path in old and _age(path) > RECENT_SECONDS:
                # In one step, so that nobody meets half of a build.
                trash = tempfile.mkdtemp(prefix=f".{match[1]}-", dir=root)
                os.rename(path, trash)
                shutil.rmtree(trash, ignore_errors=True)
            elif path.is_dir() and path not in old:
                shutil.rmtree(path, ignore_errors=True)
            if not (root / match[1]).exists():
                lock.unlink()


def _age(path: Path) -> float:
    """Seconds since the last change; none for what is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


__all__ = ["build", "cache_root", "LIBRARIES"]

"""What this machine can do at most (memory bandwidth, arithmetic): a small C++ program, compiled on first use."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from runtime.builds import cache_root, file_lock
from runtime.errors import BuildError

_SOURCE = Path(__file__).resolve().parent.parent / "benchmarks" / "probe.cpp"
_NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_FLAGS = ["-std=c++17", "-O3", _NATIVE, "-pthread"]


def _program() -> Path:
    """The compiled probe, kept in the cache folder; BuildError when there is no compiler."""
    if not _SOURCE.is_file():
        raise BuildError(f"{_SOURCE} is missing: the benchmark needs a checkout of the project")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise BuildError("no C++ compiler found (g++, or set CXX), which the benchmark's probe needs")
    # The CPU is part of the key: native code in a home folder that several machines share would not run on all.
    cpu = (
        Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").is_file() else platform.processor()
    )
    stable = "\n".join(
        line for line in cpu.splitlines() if line.split(":")[0].strip() in ("model name", "flags", "Features")
    )
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join([compiler, *_FLAGS, stable]).encode()).hexdigest()[:16]
    path = cache_root() / "probes" / key
    with file_lock(path.with_suffix(".lock")):
        if not path.is_file():
            temporary = path.with_suffix(".part")
            done = subprocess.run(
                [compiler, *_FLAGS, "-o", str(temporary), str(_SOURCE)], capture_output=True, text=True
            )
            if done.returncode:
                raise BuildError(f"{_SOURCE.name} does not compile: {(done.stderr.splitlines() or ['?'])[0]}")
            os.replace(temporary, path)
    return path


def _run(*arguments: str) -> float:
    done = subprocess.run([str(_program()), *arguments], capture_output=True, text=True)
    try:
        return float(done.stdout)
    except ValueError:
        raise BuildError(f"the probe failed: {done.stderr.strip() or done.returncode}") from None


def _last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not tell."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)


def memory_bandwidth(threads: int, seconds: float = 0.4) -> float:
    """GB/s that ``threads`` threads together read from memory (a buffer of eight times the last-level cache)."""
    return _run("read", str(threads), str(min(8 * _last_level_cache(), 2 << 30)), str(seconds))


def arithmetic_peak(threads: int, dtype: str, seconds: float = 0.2) -> float:
    """GFLOP/s of multiply-adds in registers; for bf16 of dot products into float32 where the CPU has them."""
    return _run("bf16" if dtype == "bf16" else "f32", str(threads), str(seconds))

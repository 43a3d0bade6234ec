"""Builds on first use: asks the compiler for an engine when none is given, and keeps the newest ones in a cache folder.

The compiler's packages are imported here, lazily, and nowhere else in the runtime.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from runtime.errors import BuildError, ConfigError
from runtime.infinicpu import cache_root
from runtime.manifest import Build, read_build

__all__ = ["build_for", "cache_root", "file_lock"]

KEEP = 16
_SOURCES = ("codegen", "passes", "ir", "frontend", "runtime/infinicpu")
_SUFFIXES = {".py", ".j2", ".json", ".c", ".cc", ".cpp", ".h", ".hpp", ".txt", ".cmake"}


@lru_cache(maxsize=1)
def _compiler_hash() -> str:
    """Identity of the compiler itself: a build made by other sources is another build."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _model_identity(model: Path) -> list[Any]:
    """What a build depends on in a checkpoint: its place, its configuration, the headers of its weight files."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.json")):
        if not path.name.startswith("tokenizer"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 100_000_000))
        digest.update(path.name.encode() + b"\0" + header + str(path.stat().st_size).encode())
    return [str(model), digest.hexdigest()]


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """One process at a time; the others wait. BuildError when the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise BuildError(
            f"{path.parent}: cannot be written ({error.strerror}); set QWEN3_CACHE to one that can"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_for(
    model: Path | str,
    *,
    target: str = "cpu",
    dtype: str | None = None,
    quant: str = "none",
    kv: str = "auto",
    max_context: int | None = None,
    max_batch: int | None = None,
) -> Build:
    """The build for a checkpoint folder with these settings: from the cache, else made now.

    InfiniCore is the installed one when INFINI_ROOT is set, else the embedded one.

    Raises:
        Qwen3Error: whatever the compiler says about the checkpoint or the target; BuildError when the cache folder
            cannot be written.
    """
    model = Path(model).expanduser().resolve()
    if not model.is_dir():
        raise ConfigError(f"{model}: no such folder, expected a Hugging Face model directory")
    infinicore = os.environ.get("INFINI_ROOT") or "embedded"
    options: dict[str, Any] = dict(target=target, dtype=dtype, quant=quant, kv=kv, infinicore=infinicore)
    options.update(max_context=max_context, max_batch=max_batch)
    identity = [_model_identity(model), options, _compiler_hash(), os.uname().machine]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    root = cache_root() / "builds"
    folder = root / key
    with file_lock(root / f"{key}.lock"):
        if not (folder / "manifest.json").is_file():
            from codegen.build import build_model

            build_model(model=model, out=folder, progress=_show if sys.stderr.isatty() else None, **options)
        os.utime(folder)  # newest: used last
    _prune(root, keep=key)
    return read_build(folder)


def _show(line: str) -> None:
    print(f"building the engine: {line}", file=sys.stderr)


def _prune(root: Path, keep: str) -> None:
    """Drop the builds that were used longest ago. A process that has one loaded keeps its mapping."""
    with file_lock(root / "prune.lock"):
        # Unfinished ones have a dot in their names.
        folders = [path for path in root.iterdir() if path.is_dir() and "." not in path.name]
        folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for folder in folders[KEEP:]:
            if folder.name != keep:
                shutil.rmtree(folder, ignore_errors=True)
                (root / f"{folder.name}.lock").unlink(missing_ok=True)

"""Packed weights kept between loads: what has to be joined, cast or cut is written once per checkpoint to a file that later loads map.

A pack lies in ``$QWEN3_CACHE/weights/KEY/`` as ``packed.bin`` (the arrays one after another, each on a page of its own) and ``index.json``. The key covers the build's
recipes, the devices, and name, size and time of change of every source file, so a changed checkpoint has another pack. Any failure to write one only means that weights are packed into memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.builds import cache_root, file_lock
from runtime.recipes import Leaf, Node, leaves, nbytes_of
from runtime.structs import NUMPY_DTYPES

# Less than this is packed faster than it is looked up.
LEAST_BYTES = 32 << 20
# Packs that are kept beside the one in use; the most room that all of them take, in GiB (QWEN3_WEIGHT_CACHE_GB; 0: no packs).
KEEP = 8
DEFAULT_GB = 64
_ALIGNMENT = mmap.ALLOCATIONGRANULARITY


class Pack:
    """The packed arrays of one model: mapped if they lie in the cache, else made and put there.

    Args:
        identity: what decides the arrays beside the files: the recipes, the number of devices.
        nodes: the weights that have to be packed.
        sources: all weights, whose files the pack depends on.
    """

    def __init__(self, identity: Any, nodes: Sequence[Node], sources: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        self.places: list[tuple[int, int]] = []
        at = 0
        for node in self.nodes:
            self.places.append((at, nbytes_of(node)))
            at += -(-nbytes_of(node) // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = at
        self.key = _key(identity, sources)
        self.folder = cache_root() / "weights" / self.key
        self.remark: str | None = None  # what was found in the weights when they were looked through; None: nobody did
        self._map: mmap.mmap | None = None
        self._unfinished: Path | None = None

    @property
    def worthwhile(self) -> bool:
        return self.nbytes >= LEAST_BYTES and self.nbytes <= _most_bytes()

    def find(self) -> bool:
        """Map the pack if it is there; True if so."""
        try:
            index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
            if index["places"] != [list(place) for place in self.places]:
                return False
            with (self.folder / "packed.bin").open("rb") as file:
                if file.seek(0, os.SEEK_END) != self.nbytes:
                    return False
                self._map = mmap.mmap(file.fileno(), self.nbytes, access=mmap.ACCESS_READ)
            self.remark = index["remark"]
            os.utime(self.folder)  # used last
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def start(self) -> bool:
        """Make room for a new pack on the disk; False where that cannot be."""
        try:
            root = self.folder.parent
            root.mkdir(parents=True, exist_ok=True)
            self._unfinished = Path(tempfile.mkdtemp(prefix=f".{self.key}-", dir=root))
            with (self._unfinished / "packed.bin").open("w+b") as file:
                os.posix_fallocate(
                    file.fileno(), 0, self.nbytes
                )  # a full disk must show here, not as a signal at a write
                self._map = mmap.mmap(file.fileno(), self.nbytes)
        except OSError:
            self.abandon()
            return False
        return True

    def array(self, i: int) -> np.ndarray:
        """The i-th node's memory, as its shape and dtype."""
        assert self._map is not None
        node, (start, nbytes) = self.nodes[i], self.places[i]
        raw = np.frombuffer(self._map, np.uint8, nbytes, start)
        return np.ndarray(node.shape, NUMPY_DTYPES[node.dtype], buffer=raw.data)

    def finish(self, remark: str | None) -> None:
        """Put the pack in place for later loads; this process goes on with what it has mapped."""
        if self._unfinished is None:
            return
        try:
            index = dict(places=self.places, remark=remark)
            (self._unfinished / "index.json").write_text(json.dumps(index), encoding="utf-8")
            with file_lock(self.folder.parent / "packs.lock"):
                if not self.folder.exists():
                    os.rename(self._unfinished, self.folder)
                    self._unfinished = None
                _prune(self.folder.parent, self.key)
        except OSError:
            pass
        finally:
            self.abandon()

    def abandon(self) -> None:
        if self._unfinished is not None:
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished = None


def _key(identity: Any, nodes: Sequence[Node]) -> str:
    files: dict[str, tuple[int, int]] = {}
    shapes: list[Any] = []
    for node in nodes:
        shapes.append((node.dtype, node.shape, [_where(leaf, files) for leaf in leaves(node)]))
    text = json.dumps([identity, sorted(files.items()), shapes], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _where(leaf: Leaf, files: dict[str, tuple[int, int]]) -> tuple[str, int]:
    if leaf.file is None:
        return "", 0
    path = leaf.file.path.resolve()
    if str(path) not in files:
        status = path.stat()
        files[str(path)] = (status.st_size, status.st_mtime_ns)
    return str(path), leaf.offset


def _most_bytes() -> int:
    try:
        return int(float(os.environ.get("QWEN3_WEIGHT_CACHE_GB", DEFAULT_GB)) * (1 << 30))
    except ValueError:
        return DEFAULT_GB << 30


def _prune(root: Path, keep: str) -> None:
    """Drop the packs that were used longest ago, until few enough and little enough are left. Who has one mapped keeps it."""
    folders = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    folders.sort(key=lambda p: (p.name != keep, -p.stat().st_mtime))
    room = _most_bytes()
    for i, folder in enumerate(folders):
        file = folder / "packed.bin"
        room -= file.stat().st_size if file.is_file() else 0
        if i and (i > KEEP or room < 0):
            shutil.rmtree(folder, ignore_errors=True)

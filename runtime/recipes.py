"""Weights as recipes: trees of slices, concatenations, transposes and casts over tensors that lie in files or in memory.

A recipe that describes consecutive bytes of one file is a pointer into the mapped file (nothing is copied); every other
one is packed once into a buffer of its own, the source pages being dropped as they are read.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import numpy as np

from runtime.errors import BuildError, CheckpointError
from runtime.structs import NUMPY_DTYPES

_PAGE = mmap.PAGESIZE
_CHUNK_BYTES = 8 << 20  # packed and then dropped at a time
_SCAN_ELEMENTS = 1 << 17  # fits into a core's second-level cache together with its scratch copy
_MAX_HEADER = 100_000_000  # the safetensors library's own limit


class MappedFile:
    """A file mapped read-only. ``tensors`` is the safetensors header, empty for any other file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file, expected the weights that the build was made from") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped: {error}") from None
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.data_start = 0
        self.tensors: dict[str, Any] = {}
        if path.suffix == ".safetensors":
            self.data_start, self.tensors = _read_header(path, self.size, self._map)

    def drop_pages(self, start: int, nbytes: int) -> None:
        """Give back the memory of pages that were read; their contents stay in the file (and the page cache)."""
        first = start - start % _PAGE
        if hasattr(self._map, "madvise") and nbytes > _PAGE:
            self._map.madvise(mmap.MADV_DONTNEED, first, start + nbytes - first)


def _read_header(path: Path, size: int, data: mmap.mmap) -> tuple[int, dict[str, Any]]:
    length = struct.unpack("<Q", data[:8])[0] if size >= 8 else 0
    if size < 8 or length > _MAX_HEADER or 8 + length > size:
        raise CheckpointError(f"{path}: {size} bytes do not hold a safetensors header; is it truncated?")
    try:
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: malformed safetensors header ({error})") from None
    if 8 + length + end > size:
        raise CheckpointError(f"{path}: has {size} bytes, its tensors need {8 + length + end}; is it truncated?")
    return 8 + length, header


@dataclass(frozen=True, eq=False)
class Leaf:
    """One stored tensor: ``nbytes`` at absolute ``offset`` of ``file``, or an array in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: MappedFile | None = None
    offset: int = 0
    memory: np.ndarray | None = None

    def array(self) -> np.ndarray:
        if self.memory is not None:
            return self.memory
        assert self.file is not None
        raw = self.file.bytes[self.offset : self.offset + nbytes_of(self)]
        return np.ndarray(self.shape, NUMPY_DTYPES[self.dtype], buffer=raw.data)


@dataclass(frozen=True, eq=False)
class Concat:
    parts: tuple["Node", ...]
    axis: int
    dtype: str = field(init=False)
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        for part in self.parts:
            rest = [n for i, n in enumerate(part.shape) if i != self.axis]
            if part.dtype != self.parts[0].dtype or rest != [n for i, n in enumerate(shape) if i != self.axis]:
                raise BuildError(f"weight recipe joins {_show(self.parts[0])} and {_show(part)} along axis {self.axis}")
        object.__setattr__(self, "dtype", self.parts[0].dtype)
        object.__setattr__(self, "shape", tuple(shape))


@dataclass(frozen=True, eq=False)
class Transpose:
    part: "Node"
    perm: tuple[int, ...]
    dtype: str = field(init=False)
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.part.dtype)
        object.__setattr__(self, "shape", tuple(self.part.shape[axis] for axis in self.perm))


@dataclass(frozen=True, eq=False)
class Cast:
    part: "Node"
    dtype: str
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.part.shape)


@dataclass(frozen=True, eq=False)
class Slice:
    """Rows ``start:stop`` of ``axis``; ``part`` is always a Leaf, slices of anything else are pushed down."""

    part: Leaf
    index: tuple[slice, ...]
    dtype: str = field(init=False)
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.part.dtype)
        object.__setattr__(self, "shape", tuple(s.stop - s.start for s in self.index))


Node = Union[Leaf, Concat, Transpose, Cast, Slice]


def _show(node: Node) -> str:
    return f"{node.dtype}{list(node.shape)}"


def nbytes_of(node: Node) -> int:
    return math.prod(node.shape) * NUMPY_DTYPES[node.dtype].itemsize


def concat(parts: list[Node], axis: int) -> Node:
    return parts[0] if len(parts) == 1 else Concat(tuple(parts), axis)


def transpose(node: Node, perm: tuple[int, ...]) -> Node:
    if perm == tuple(range(len(perm))):
        return node
    if isinstance(node, Transpose):
        return transpose(node.part, tuple(node.perm[axis] for axis in perm))
    return Transpose(node, perm)


def cast(node: Node, dtype: str) -> Node:
    return node if node.dtype == dtype else Cast(node, dtype)


def slice_of(node: Node, axis: int, start: int, stop: int) -> Node:
    """``node[start:stop]`` along ``axis``, pushed down to the leaves so that only what is needed is read."""
    if not 0 <= start < stop <= node.shape[axis]:
        raise BuildError(f"weight recipe takes rows {start} to {stop} of axis {axis} of {_show(node)}")
    if (start, stop) == (0, node.shape[axis]):
        return node
    if isinstance(node, Leaf):
        index = [slice(0, n) for n in node.shape]
        index[axis] = slice(start, stop)
        return Slice(node, tuple(index))
    if isinstance(node, Slice):
        inner = list(node.index)
        inner[axis] = slice(inner[axis].start + start, inner[axis].start + stop)
        return Slice(node.part, tuple(inner))
    if isinstance(node, Cast):
        return Cast(slice_of(node.part, axis, start, stop), node.dtype)
    if isinstance(node, Transpose):
        return Transpose(slice_of(node.part, node.perm[axis], start, stop), node.perm)
    if axis != node.axis:
        return Concat(tuple(slice_of(part, axis, start, stop) for part in node.parts), node.axis)
    kept, at = [], 0
    for part in node.parts:
        low, high = max(start - at, 0), min(stop - at, part.shape[axis])
        if low < high:
            kept.append(slice_of(part, axis, low, high))
        at += part.shape[axis]
    return concat(kept, axis)


class Files:
    """The mapped files of a build: each one is opened once."""

    def __init__(self, weights_folder: Path, build_folder: Path) -> None:
        self._folders = {False: weights_folder, True: build_folder}
        self.open: dict[Path, MappedFile] = {}

    def get(self, name: str, own: bool = False) -> MappedFile:
        path = self._folders[own] / name
        if path not in self.open:
            self.open[path] = MappedFile(path)
        return self.open[path]


def parse(recipe: dict[str, Any], files: Files) -> Node:
    """A manifest's recipe as a tree, each leaf checked against its file.

    Raises:
        CheckpointError: the file is missing, truncated, or does not hold what the build was made from.
    """
    if "concat" in recipe:
        return concat([parse(part, files) for part in recipe["concat"]], int(recipe["axis"]))
    if "transpose" in recipe:
        return transpose(parse(recipe["transpose"], files), tuple(recipe["perm"]))
    if "cast" in recipe:
        return cast(parse(recipe["cast"], files), recipe["dtype"])
    if "slice" in recipe:
        return slice_of(parse(recipe["slice"], files), recipe["axis"], recipe["start"], recipe["stop"])
    return _parse_leaf(recipe, files)


def _parse_leaf(recipe: dict[str, Any], files: Files) -> Leaf:
    file = files.get(recipe["file"], bool(recipe.get("build")))
    name, dtype, shape, offset = recipe["name"], recipe["dtype"], tuple(recipe["shape"]), recipe.get("offset")
    if dtype not in NUMPY_DTYPES:
        raise BuildError(f"weight {name}: dtype {dtype} is not one of {' '.join(NUMPY_DTYPES)}")
    if file.path.suffix == ".safetensors":
        entry = file.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{file.path}: has no tensor {name}, which the build was made from; build it again")
        found = (str(entry["dtype"]).lower(), tuple(entry["shape"]))
        at = file.data_start + int(entry["data_offsets"][0])
        if found != (dtype, shape) or offset not in (None, at):
            raise CheckpointError(
                f"{file.path}: tensor {name} is {found[0]}{list(found[1])} at byte {at}, the build was made from "
                f"{dtype}{list(shape)}" + (f" at byte {offset}" if offset is not None else "") + "; build it again"
            )
        offset = at
    if offset is None:
        raise BuildError(f"weight {name}: no offset for it in {file.path}, which is not a safetensors file")
    leaf = Leaf(name, dtype, shape, file, int(offset))
    if leaf.offset + nbytes_of(leaf) > file.size:
        end = leaf.offset + nbytes_of(leaf)
        raise CheckpointError(f"{file.path}: has {file.size} bytes, but {name} ends at {end}; is it truncated?")
    return leaf


def _span(node: Node) -> tuple[MappedFile | int, int, int] | None:
    """(file, or the array's identity; first byte; bytes) where the node is consecutive bytes of one source."""
    if isinstance(node, Leaf):
        if node.memory is not None:
            array = node.memory
            return (id(array), 0, array.nbytes) if array.flags.c_contiguous else None
        return node.file, node.offset, nbytes_of(node)  # type: ignore[return-value]
    if isinstance(node, Slice):
        whole = _span(node.part)
        if whole is None or node.shape[1:] != node.part.shape[1:]:
            return None
        row = nbytes_of(node) // node.shape[0]
        return whole[0], whole[1] + node.index[0].start * row, nbytes_of(node)
    if isinstance(node, Concat) and node.axis == 0:
        spans = [_span(part) for part in node.parts]
        first = spans[0]
        end = first[1] if first else 0
        for span in spans:
            if span is None or first is None or span[0] != first[0] or span[1] != end:
                return None
            end += span[2]
        return (first[0], first[1], end - first[1]) if first else None
    return None


def view(node: Node) -> np.ndarray | None:
    """The node as an array that shares its source's bytes, or None where it has to be packed."""
    span, dtype = _span(node), NUMPY_DTYPES[node.dtype]
    if span is None:
        return None
    source, start, nbytes = span
    if isinstance(source, MappedFile):
        raw = source.bytes[start : start + nbytes]
    else:
        raw = leaves(node)[0].array().reshape(-1).view(np.uint8)[start : start + nbytes]
    if raw.ctypes.data % dtype.itemsize:
        return None  # a header of odd length: elements would not be aligned
    return np.ndarray(node.shape, dtype, buffer=raw.data)


def leaves(node: Node) -> list[Leaf]:
    if isinstance(node, Leaf):
        return [node]
    parts = node.parts if isinstance(node, Concat) else (node.part,)
    return [leaf for part in parts for leaf in leaves(part)]


def allocate(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An uninitialised array in anonymous pages of its own, in huge pages where the system has them."""
    nbytes = max(1, math.prod(shape) * NUMPY_DTYPES[dtype].itemsize)
    buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= 2 << 20:
        try:
            buffer.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without them: only slower
    return np.ndarray(shape, NUMPY_DTYPES[dtype], buffer=buffer)


def pack(node: Node, out: np.ndarray | None = None) -> np.ndarray:
    """The node's value in a contiguous array: ``out`` of its shape and dtype, or a new one."""
    out = allocate(node.shape, node.dtype) if out is None else out
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is found, and named, by the scan
        _write(node, out)
    return out


def _write(node: Node, out: np.ndarray) -> None:
    """Write the node's value into ``out`` (any strides; its dtype may differ: elements are converted)."""
    if isinstance(node, Concat):
        at = 0
        for part in node.parts:
            index = [slice(None)] * out.ndim
            index[node.axis] = slice(at, at + part.shape[node.axis])
            _write(part, out[tuple(index)])
            at += part.shape[node.axis]
    elif isinstance(node, Transpose):
        _write(node.part, out.transpose(np.argsort(node.perm)))
    elif isinstance(node, Cast):
        if out.dtype == NUMPY_DTYPES[node.dtype]:
            _write(node.part, out)
        else:  # a cast of a cast rounds twice: keep the one in the middle
            middle = pack(node)
            np.copyto(out, middle, casting="unsafe")
    elif isinstance(node, Leaf):
        _copy(node, node.array(), out)
    else:
        _copy(node.part, node.part.array()[node.index], out)


def _copy(leaf: Leaf, source: np.ndarray, out: np.ndarray) -> None:
    if source.dtype == out.dtype:  # plain bits move faster than elements of an extension type
        bits = np.dtype(f"u{out.dtype.itemsize}")
        source, out = source.view(bits), out.view(bits)
    if source.ndim == 0:
        out[...] = source
        return
    rows = max(1, _CHUNK_BYTES // max(1, abs(source.strides[0])))
    for start in range(0, source.shape[0], rows):
        chunk = source[start : start + rows]
        np.copyto(out[start : start + rows], chunk, casting="unsafe")
        if leaf.file is not None:
            first = chunk.ctypes.data - leaf.file.bytes.ctypes.data
            leaf.file.drop_pages(first, min(abs(source.strides[0]) * len(chunk), leaf.file.size - first))


# dtype -> (bits, exponent mask): all exponent bits set means NaN or infinity; no conversion to a wider type is needed.
_EXPONENT = {"bf16": (np.uint16, 0x7F80), "f16": (np.uint16, 0x7C00), "f32": (np.uint32, 0x7F800000)}


def has_nonfinite(array: np.ndarray, dtype: str) -> bool:
    """Whether a contiguous array holds NaN or infinity; reads it once, from cache-sized pieces."""
    if dtype not in _EXPONENT or not array.size:
        return False
    kind, mask = _EXPONENT[dtype]
    bits = array.reshape(-1).view(kind)
    scratch = np.empty(min(bits.size, _SCAN_ELEMENTS), kind)
    for start in range(0, bits.size, _SCAN_ELEMENTS):
        piece = bits[start : start + _SCAN_ELEMENTS]
        masked = np.bitwise_and(piece, kind(mask), out=scratch[: piece.size])
        if masked.max() == mask:
            return True
    return False

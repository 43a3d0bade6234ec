"""Constants as recipes: where a weight's bytes lie and what is done to them, without reading them.

A recipe is a small tree. Leaves are ``FileSlice`` (bytes inside a file of the checkpoint) and ``Inline`` (values kept in the graph); the rest
rearranges: ``Concat``, ``Transpose``, ``Cast``, ``Slice``. Passes compose recipes; the runtime follows them; ``load`` evaluates one with numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

import numpy as np

from ir.errors import CheckpointError
from ir.types import DTYPES, dtype_of


@dataclass(frozen=True)
class FileSlice:
    """``shape`` elements of ``dtype``, row-major, little-endian, at byte ``offset`` of ``file`` (a bare name inside the checkpoint's folder).

    ``offset`` is None in a graph made from a configuration alone: the tensor called ``name`` is then looked up when a checkpoint is there.
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int | None


@dataclass(frozen=True)
class Inline:
    """Values that live in the graph itself: frequencies, shapes, scalars, weights that an exporter stored inline."""

    array: np.ndarray = field(compare=False)
    key: bytes = b""

    def __post_init__(self) -> None:
        array = np.ascontiguousarray(self.array).reshape(np.shape(self.array))
        array.setflags(write=False)
        object.__setattr__(self, "array", array)
        # Equality and hashing by content: two exporters' copies of one table are one constant.
        object.__setattr__(self, "key", str((array.dtype, array.shape)).encode() + array.tobytes())

    @property
    def dtype(self) -> str:
        return dtype_of(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


@dataclass(frozen=True)
class Concat:
    parts: tuple["ConstData", ...]
    axis: int

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(p.shape[self.axis] for p in self.parts)
        return tuple(shape)


@dataclass(frozen=True)
class Transpose:
    part: "ConstData"
    perm: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.part.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.part.shape[p] for p in self.perm)


@dataclass(frozen=True)
class Cast:
    """Rounded to ``dtype`` (nearest even)."""

    part: "ConstData"
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape


@dataclass(frozen=True)
class Slice:
    """Elements ``start`` (included) to ``stop`` (excluded) of ``axis``: a shard, or one part of a packed weight."""

    part: "ConstData"
    axis: int
    start: int
    stop: int

    @property
    def dtype(self) -> str:
        return self.part.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.part.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)


ConstData = Union[FileSlice, Inline, Concat, Transpose, Cast, Slice]


def load(data: ConstData, folder: Path | None) -> np.ndarray:
    """The values of a recipe as an array of its own shape and dtype; file parts are memory-mapped, not read.

    Raises:
        CheckpointError: the file is not there, or too short.
    """
    if isinstance(data, Inline):
        return data.array
    if isinstance(data, FileSlice):
        return _map(data, folder)
    if isinstance(data, Concat):
        return np.concatenate([load(p, folder) for p in data.parts], axis=data.axis)
    if isinstance(data, Transpose):
        return load(data.part, folder).transpose(data.perm)
    if isinstance(data, Cast):
        return load(data.part, folder).astype(DTYPES[data.dtype].numpy)
    index = [slice(None)] * len(data.shape)
    index[data.axis] = slice(data.start, data.stop)
    return load(data.part, folder)[tuple(index)]


def _map(data: FileSlice, folder: Path | None) -> np.ndarray:
    if folder is None or data.offset is None:
        raise CheckpointError(f"weight {data.name}: the graph was made from a configuration alone, so it has no values")
    path = Path(folder) / data.file
    dtype = DTYPES[data.dtype].numpy
    count = int(np.prod(data.shape, dtype=np.int64))
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror} (weight {data.name})") from None
    if size < data.offset + count * dtype.itemsize:
        raise CheckpointError(
            f"{path}: has {size} bytes, but weight {data.name} ends at {data.offset + count * dtype.itemsize}; is it truncated?"
        )
    # Mapped as bytes first: the offset need not be a multiple of the element size.
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=data.offset, shape=(count * dtype.itemsize,))
    return raw.view(dtype).reshape(data.shape)

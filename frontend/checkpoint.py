"""A checkpoint's weights, lazily: only the safetensors headers are read, so that a graph can point at the bytes.

The safetensors library does not tell a tensor's absolute offset, which ONNX external data needs; the header (8 bytes of
length, then JSON) is therefore parsed here, with the library's own rules: no overlap, no hole, no byte left over.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from frontend.config import Qwen3Config, read_json
from ir.errors import CheckpointError, GraphError
from ir.types import DTYPES, dtype_from_safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the safetensors library's limit
WEIGHT_DTYPES = ("f32", "f16", "bf16")
# Element sizes of what the IR has no name for: such tensors are listed, and refused only where one is a weight.
_OTHER_SIZES = {"U64": 8, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``nbytes`` at absolute ``offset`` of ``file`` (a bare name).

    ``dtype`` is the IR's name (``"bf16"``) where it has one, else as stored.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by name."""

    folder: Path
    tensors: Mapping[str, TensorEntry]

    @staticmethod
    def open(model_dir: str | Path) -> "Checkpoint":
        """Read the headers of model.safetensors, or of the shards that model.safetensors.index.json names.

        Raises:
            CheckpointError: a file is missing, truncated or malformed; names it.
        """
        folder = Path(model_dir)
        if (folder / SINGLE).exists():
            return Checkpoint(folder, read_header(folder / SINGLE))
        if (folder / INDEX).exists():
            return Checkpoint(folder, _read_shards(folder))
        others = sorted(
            p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
        )
        found = f" (found {', '.join(others[:3])})" if others else ""
        raise CheckpointError(f"{folder}: no weights{found}, expected {SINGLE} or {INDEX}")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is malformed or does not cover the file exactly.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: has {size} bytes, too few for a safetensors file; is it truncated?")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER:
                raise CheckpointError(
                    f"{path}: header of {length} bytes, expected at most {MAX_HEADER}; is this a safetensors file?"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if len(raw) < length:
        raise CheckpointError(f"{path}: has {size} bytes, but its header alone ends at {8 + length}; is it truncated?")
    try:
        header = json.loads(raw, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, item, 8 + length) for name, item in header.items()}
    _check_cover(path, tensors, 8 + length, size)
    return tensors


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [k for k, _ in pairs]
        raise CheckpointError(f"{path}: the header names {next(n for n in names if names.count(n) > 1)} twice")
    return result


def _entry(path: Path, name: str, item: Any, start: int) -> TensorEntry:
    try:
        stored, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
        ok = isinstance(stored, str) and all(type(n) is int and n >= 0 for n in [*shape, begin, end])
    except (KeyError, TypeError, ValueError):
        ok = False
    if not ok:
        raise CheckpointError(
            f"{path}: tensor {name} has a malformed header entry, expected dtype, shape and data_offsets"
        )
    try:
        dtype = dtype_from_safetensors(stored)
        width = DTYPES[dtype].bytes
    except GraphError:
        dtype, width = stored, _OTHER_SIZES.get(stored, 0)
    if end < begin or (width and end - begin != math.prod(shape) * width):
        raise CheckpointError(
            f"{path}: tensor {name} ({dtype}{shape}) has data_offsets [{begin}, {end}], "
            f"expected {math.prod(shape) * width} bytes between them"
        )
    return TensorEntry(path.name, dtype, tuple(shape), start + begin, end - begin)


def _check_cover(path: Path, tensors: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    position, previous = start, ""
    for name, entry in sorted(tensors.items(), key=lambda kv: (kv[1].offset, kv[1].nbytes)):
        if entry.offset < position:
            raise CheckpointError(f"{path}: tensors {previous} and {name} overlap at byte {entry.offset}")
        if entry.offset + entry.nbytes > size:
            raise CheckpointError(
                f"{path}: has {size} bytes, but tensor {name} ends at {entry.offset + entry.nbytes}; is it truncated?"
            )
        if entry.offset > position:
            raise CheckpointError(
                f"{path}: bytes {position} to {entry.offset}, before tensor {name}, belong to no tensor"
            )
        position, previous = entry.offset + entry.nbytes, name
    if position != size:
        raise CheckpointError(f"{path}: has {size} bytes, but its tensors end at {position}")


def _read_shards(folder: Path) -> dict[str, TensorEntry]:
    path = folder / INDEX
    weight_map = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty, expected tensor names with their files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{path}: {name} is in {file!r}, expected a bare file name")
    files = sorted(set(weight_map.values()))
    absent = [f for f in files if not (folder / f).exists()]
    if absent:
        raise CheckpointError(f"{folder}: {_some(absent, 'shard')} named by {INDEX} missing")
    headers = {file: read_header(folder / file) for file in files}
    wrong = [name for name, file in weight_map.items() if name not in headers[file]]
    if wrong:
        raise CheckpointError(
            f"{folder / weight_map[wrong[0]]}: does not hold {_some(wrong, 'tensor')} that {INDEX} places in its shards"
        )
    return {name: headers[file][name] for name, file in weight_map.items()}


def check_weights(config: Qwen3Config, checkpoint: Checkpoint) -> None:
    """Every weight of the model is there with the right shape and a floating-point dtype, and nothing else is.

    Raises:
        CheckpointError: names up to three tensors and how many there are.
    """
    expected, have, folder = config.weight_shapes(), checkpoint.tensors, checkpoint.folder
    missing = [n for n in expected if n not in have]
    if missing:
        hint = " (tie_word_embeddings is false)" if missing == ["lm_head.weight"] else ""
        raise CheckpointError(f"{folder}: {_some(missing, 'weight')} missing{hint}")
    # Values the model does not use: frequencies that old files kept, and the copy of a tied embedding.
    extra = [n for n in have if n not in expected and not n.endswith(".rotary_emb.inv_freq") and n != "lm_head.weight"]
    if extra:
        raise CheckpointError(
            f"{folder}: {_some(extra, 'tensor')} that a Qwen3 model of this configuration does not have"
        )
    shaped = [n for n, shape in expected.items() if have[n].shape != shape]
    if shaped:
        first = shaped[0]
        raise CheckpointError(
            f"{folder / have[first].file}: {_some(shaped, 'weight')} of the wrong shape: "
            f"{first} is {list(have[first].shape)}, config.json makes it {list(expected[first])}"
        )
    typed = [n for n in expected if have[n].dtype not in WEIGHT_DTYPES]
    if typed:
        first = typed[0]
        raise CheckpointError(
            f"{folder / have[first].file}: {_some(typed, 'weight')} of an unsupported dtype: "
            f"{first} is {have[first].dtype}, expected one of {', '.join(WEIGHT_DTYPES)}"
        )


def _some(names: Sequence[str], what: str) -> str:
    """``weight a.b``, or ``4 weights (a, b, c, ...)``."""
    if len(names) == 1:
        return f"{what} {names[0]}"
    return f"{len(names)} {what}s ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


# The exponent bits of each dtype: all set means infinity or NaN. Bit tests need no conversion to float32.
_EXPONENT: dict[str, tuple[type, int]] = {
    "bf16": (np.uint16, 0x7F80),
    "f16": (np.uint16, 0x7C00),
    "f32": (np.uint32, 0x7F800000),
}


def nonfinite_weights(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> dict[str, int]:
    """How many NaN or infinite elements each tensor has; tensors without any are left out.

    Reads every byte once, 16 Mi elements at a time. Shows progress on a terminal.
    """
    chosen = {n: checkpoint.tensors[n] for n in (checkpoint.tensors if names is None else names)}
    total = sum(e.nbytes for e in chosen.values())
    found: dict[str, int] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking weights", disable=None, leave=False) as bar:
        for name, entry in chosen.items():
            if entry.dtype not in _EXPONENT or not entry.nbytes:
                continue
            kind, mask = _EXPONENT[entry.dtype]
            raw = np.memmap(checkpoint.folder / entry.file, np.uint8, "r", entry.offset, (entry.nbytes,))
            bits: np.ndarray = raw.view(kind)
            for begin in range(0, bits.size, _CHUNK):
                chunk = bits[begin : begin + _CHUNK]
                count = int(np.count_nonzero((chunk & kind(mask)) == mask))
                if count:
                    found[name] = found.get(name, 0) + count
                bar.update(chunk.nbytes)
    return found

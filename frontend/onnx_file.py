"""Reading .onnx files, and finding the files that their external data lie in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import GraphProto, ModelProto, TensorProto

from frontend.checkpoint import INDEX, SINGLE, Checkpoint, TensorEntry
from ir.errors import CheckpointError, GraphError
from ir.types import DTYPES, dtype_from_onnx

# metadata_props key: the checkpoint's folder, relative to the .onnx file's own.
CHECKPOINT_KEY = "checkpoint"


@dataclass(frozen=True)
class External:
    """Where an initializer's bytes lie. ``offset`` and ``length`` are None where the file does not say."""

    location: str
    offset: int | None
    length: int | None

    @property
    def unplaced(self) -> bool:
        """Is this a weight of a graph made from a configuration alone, known by its name only?"""
        return self.offset is None and self.length is None and self.location.endswith(".safetensors")


def read_model(path: str | Path) -> ModelProto:
    """Parse a file; external data stay unread.

    Raises:
        GraphError: the file is missing, truncated or no ONNX model.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise GraphError(f"{path}: {error.strerror}, expected an ONNX file") from None
    try:
        model = onnx.load_model_from_string(raw)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise GraphError(
            f"{path}: not a readable ONNX file ({len(raw)} bytes; {str(error).splitlines()[0]}); is it truncated?"
        ) from None
    # Protobuf accepts an empty file, and garbage that happens to look like unknown fields.
    if not model.ir_version or not model.opset_import or not model.graph.output:
        raise GraphError(
            f"{path}: not an ONNX model ({len(raw)} bytes without IR version, opset or outputs); is it truncated?"
        )
    if not _readable(model):
        raise GraphError(f"{path}: damaged ONNX file: a name in it is no UTF-8 text")
    return model


def _readable(message: Message) -> bool:
    """Are all strings text? Protobuf hands on what is none as bytes."""
    for descriptor, value in message.ListFields():
        if descriptor.type not in (descriptor.TYPE_STRING, descriptor.TYPE_MESSAGE):
            continue
        items = [value] if isinstance(value, (str, bytes, Message)) else value
        if descriptor.type == descriptor.TYPE_STRING and not all(isinstance(i, str) for i in items):
            return False
        if descriptor.type == descriptor.TYPE_MESSAGE and not all(_readable(i) for i in items):
            return False
    return True


def external_tensors(graph: GraphProto) -> Iterator[tuple[TensorProto, External]]:
    """The initializers whose values lie in other files."""
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor, external_place(tensor)


def external_place(tensor: TensorProto) -> External:
    """An external initializer's place.

    Raises:
        GraphError: no location, one outside of the folder, or a malformed number.
    """
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    parts = PurePosixPath(location).parts
    if not location or location.startswith("/") or ".." in parts:
        raise GraphError(
            f"initializer {tensor.name}: external data location {location!r}, "
            "expected a file name inside the model's folder"
        )
    numbers: list[int | None] = []
    for key in ("offset", "length"):
        text = entries.get(key)
        if text is not None and not text.isdecimal():
            raise GraphError(f"initializer {tensor.name}: external data {key} {text!r}, expected a number of bytes")
        numbers.append(None if text is None else int(text))
    return External(str(PurePosixPath(location)), *numbers)


class Places:
    """Where the external initializers of one model lie, checked against the files in ``folder``.

    Those known by name only are looked up in the folder's checkpoint, where there is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: Mapping[str, TensorEntry] | None = None
        self._sizes: dict[str, int] = {}

    def of(self, tensor: TensorProto) -> External:
        """The place, with offset and length; or ``unplaced``, where the folder holds no checkpoint.

        Raises:
            GraphError: the place is malformed, or its length is not that of the initializer's type.
            CheckpointError: the file is missing or too short, or the checkpoint lacks the tensor, or has it with
                another dtype or shape.
        """
        place = external_place(tensor)
        if place.unplaced:
            return self._by_name(tensor, place)
        nbytes = math.prod(tensor.dims) * DTYPES[dtype_from_onnx(tensor.data_type)].bytes
        if place.length not in (None, nbytes):
            raise GraphError(
                f"initializer {tensor.name}: external data of {place.length} bytes, its type and shape take {nbytes}"
            )
        offset, size = place.offset or 0, self._size(place.location, tensor.name)
        if offset + nbytes > size:
            raise CheckpointError(
                f"{self.folder / place.location}: has {size} bytes, "
                f"but weight {tensor.name} ends at {offset + nbytes}; is it truncated?"
            )
        return External(place.location, offset, nbytes)

    def _size(self, file: str, name: str) -> int:
        if file not in self._sizes:
            try:
                self._sizes[file] = (self.folder / file).stat().st_size
            except OSError as error:
                raise CheckpointError(f"{self.folder / file}: {error.strerror} (weight {name})") from None
        return self._sizes[file]

    def _by_name(self, tensor: TensorProto, place: External) -> External:
        if not any((self.folder / f).is_file() for f in (SINGLE, INDEX)):
            return place
        if self._tensors is None:
            self._tensors = Checkpoint.open(self.folder).tensors
        entry = self._tensors.get(tensor.name)
        want = f"{dtype_from_onnx(tensor.data_type)}{list(tensor.dims)}"
        found = "no such tensor" if entry is None else f"{entry.dtype}{list(entry.shape)}"
        if entry is None or found != want:
            raise CheckpointError(f"{self.folder}: weight {tensor.name}: found {found}, the graph takes {want}")
        return External(entry.file, entry.offset, entry.nbytes)


def find_weights_folder(path: str | Path, model: ModelProto | None = None, given: str | Path | None = None) -> Path:
    """Where a file's external data lie: in the given folder, else in the one that our exporter noted, else in its own.

    The noted folder comes first because files of the same names beside the .onnx file may be another checkpoint's, with
    equal headers and other values. A model without external data, or exported from a configuration alone, gets the
    file's own folder, or the given one.

    Raises:
        CheckpointError: a data file is in none of them; names it.
    """
    path = Path(path)
    model = model or read_model(path)
    files = sorted({place.location for _, place in external_tensors(model.graph) if not place.unplaced})
    noted = next((p.value for p in model.metadata_props if p.key == CHECKPOINT_KEY), None)
    if given is not None:
        places = [Path(given)]
    elif noted and files:
        places = [path.parent / noted, path.parent]
    else:
        places = [path.parent]
    for folder in places:
        if all((folder / f).is_file() for f in files):
            return folder
    # Say what is missing in the place where the weights were last known to be.
    absent = [f for f in files if not (places[0] / f).is_file()]
    raise CheckpointError(
        f"{path}: its weights file {absent[0]} is not in {' or '.join(str(p) for p in places)}; "
        "give the checkpoint's folder"
    )

"""onnxruntime: the one helper that opens every session, and a small reference runner on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto

from frontend.onnx_file import External, Places, external_tensors, find_weights_folder, read_model
from ir.errors import CheckpointError, ConfigError, GraphError
from ir.types import DTYPES, dtype_from_onnx

_FOLDER_KEY = "session.model_external_initializers_file_folder_path"


def open_session(
    onnx_path: str | Path,
    weights_folder: str | Path | None = None,
    threads: int | None = None,
    fold_weights: bool = True,
) -> onnxruntime.InferenceSession:
    """A CPU session on a file whose external data lie in ``weights_folder``.

    Without that folder, see ``onnx_file.find_weights_folder``. The weights may be symbolic links (the Hugging Face
    cache's layout), which onnxruntime itself refuses.

    Args:
        threads: threads within an op; default onnxruntime's own choice.
        fold_weights: widen half-precision weights once, on opening (slow to open, 4 bytes and more per parameter), and
            not in each step (opens at once, stays near the weights' own size, slow steps): false for a step or two of a
            big model.

    Raises:
        GraphError: the file is unreadable, or onnxruntime refuses it.
        CheckpointError: a file of weights is missing or too short.
    """
    path = Path(onnx_path)
    model = read_model(path)
    folder = find_weights_folder(path, model, weights_folder).resolve()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    disabled = []
    if fold_weights:
        # The higher levels take twice as long to open a big model, and do not make its steps faster.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    else:
        disabled.append("ConstantFolding")
        options.enable_cpu_mem_arena = False  # the arena would keep the widened weights of every layer
    placed = _place_all(model, path, folder)
    mapped: list[np.ndarray] = []
    if any((folder / place.location).is_symlink() for _, place in placed):
        mapped = [_map(folder / place.location, tensor, place) for tensor, place in placed]
        values = [
            onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type)
            for array, (tensor, _) in zip(mapped, placed)
        ]
        options.add_external_initializers([tensor.name for tensor, _ in placed], values)
    elif placed:
        options.add_session_config_entry(_FOLDER_KEY, str(folder))
    try:
        # From bytes: a session made from a path looks beside that path in some versions.
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:  # onnxruntime raises many kinds of its own
        raise GraphError(f"{path}: onnxruntime: {error}") from None
    # The session reads these arrays for as long as it lives.
    session._mapped_weights = mapped
    return session


def _place_all(model: ModelProto, path: Path, folder: Path) -> list[tuple[TensorProto, External]]:
    """The external initializers with their places, which are written into the model where it knew the names only."""
    places, result = Places(folder), []
    for tensor, noted in external_tensors(model.graph):
        place = places.of(tensor)
        if place.unplaced:
            raise CheckpointError(
                f"{path}: the graph was made from a configuration alone, so onnxruntime cannot run it"
            )
        if noted.unplaced:
            del tensor.external_data[:]
            for key, value in asdict(place).items():
                tensor.external_data.add(key=key, value=str(value))
        result.append((tensor, place))
    return result


def _map(path: Path, tensor: TensorProto, place: External) -> np.ndarray:
    """An initializer as onnxruntime takes it: element types that numpy lacks as integers of the same width."""
    dtype = DTYPES[dtype_from_onnx(tensor.data_type)]
    kind = np.dtype(np.uint16) if dtype.name == "bf16" else dtype.numpy
    raw = np.memmap(path, np.uint8, "r", place.offset or 0, (place.length or 0,))
    return raw.view(kind).reshape(tuple(tensor.dims))


@dataclass(frozen=True)
class Past:
    """A KV cache: arrays by past input's name, each [batch, kv_heads, length, head_dim]."""

    arrays: dict[str, np.ndarray]
    length: int


class Reference:
    """Runs an exported decoder on token lists: the numeric reference of everything that is compiled.

    Works with and without KV cache; inputs that a graph does not have (position_ids, attention_mask) are left out.
    """

    def __init__(
        self,
        onnx_path: str | Path,
        weights_folder: str | Path | None = None,
        threads: int | None = None,
        fold_weights: bool = True,
    ) -> None:
        self.path = Path(onnx_path)
        self.session = open_session(onnx_path, weights_folder, threads, fold_weights)
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.past_names = [n for n in self.inputs if n.startswith("past_key_values.")]
        self.present_names = [n.replace("past_key_values.", "present.", 1) for n in self.past_names]
        known = {"input_ids", "attention_mask", "position_ids", *self.past_names}
        unknown = sorted(set(self.inputs) - known)
        absent = [n for n in ("logits", *self.present_names) if n not in self.outputs]
        if "input_ids" not in self.inputs or unknown or absent:
            what = f"input {unknown[0]}" if unknown else f"no output {absent[0]}" if absent else "no input input_ids"
            raise GraphError(
                f"{self.path}: has {what}, expected input_ids, attention_mask, position_ids, past_key_values.N.* "
                "-> logits, present.N.*"
            )

    def run(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        past: Past | None = None,
    ) -> tuple[np.ndarray, Past | None]:
        """One step of a batch.

        Args:
            input_ids: integers [batch, sequence].
            attention_mask: [batch, past + sequence], 0 where a key is padding; default all ones.
            position_ids: [batch, sequence]; default counts on from the past.
            past: what an earlier step returned.

        Returns:
            logits (float32 [batch, sequence, vocab]) and the new past (None for a graph without KV cache).
        """
        batch, sequence = input_ids.shape
        before = past.length if past else 0
        if past and not self.past_names:
            raise ConfigError(f"{self.path}: the graph has no KV cache, so there can be no past")
        feeds = {"input_ids": np.asarray(input_ids, np.int64)}
        if attention_mask is None:
            attention_mask = np.ones((batch, before + sequence), np.int64)
        if position_ids is None:
            position_ids = np.broadcast_to(np.arange(before, before + sequence), (batch, sequence))
        if "attention_mask" in self.inputs:
            feeds["attention_mask"] = np.asarray(attention_mask, np.int64)
        if "position_ids" in self.inputs:
            feeds["position_ids"] = np.ascontiguousarray(position_ids, np.int64)
        feeds.update(past.arrays if past else self._empty(batch))
        results = self.session.run(["logits", *self.present_names], feeds)
        present = Past(dict(zip(self.past_names, results[1:])), before + sequence) if self.past_names else None
        return results[0].astype(np.float32, copy=False), present

    def _empty(self, batch: int) -> dict[str, np.ndarray]:
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        result = {}
        for name in self.past_names:
            _, heads, _, head_dim = self.inputs[name].shape
            result[name] = np.zeros((batch, heads, 0, head_dim), kinds[self.inputs[name].type])
        return result

    def logits(self, tokens: Sequence[int], past: Past | None = None) -> tuple[np.ndarray, Past | None]:
        """Logits (float32 [len(tokens), vocab]) of one sequence, continuing ``past``, and the new past."""
        if not len(tokens):
            raise ConfigError("no tokens given, expected at least one")
        result, present = self.run(np.asarray([list(tokens)], np.int64), past=past)
        return result[0], present

    def forward(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits (float32 [len, vocab]) of each sequence, without a past."""
        return [self.logits(tokens)[0] for tokens in sequences]

    def greedy(self, tokens: Sequence[int], steps: int) -> list[int]:
        """The ``steps`` most likely next tokens, one after the other (end tokens do not stop it)."""
        generated: list[int] = []
        pending, past = list(tokens), None
        for _ in range(steps):
            if self.past_names:
                result, past = self.logits(pending, past)
                pending = [int(result[-1].argmax())]
                generated += pending
            else:
                generated.append(int(self.logits([*tokens, *generated])[0][-1].argmax()))
        return generated

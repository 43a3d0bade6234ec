"""safetensors headers, shards, and the check of weights against a configuration."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from frontend import checkpoint as module
from frontend.checkpoint import INDEX, SINGLE, Checkpoint, check_weights, nonfinite_weights, read_header
from frontend.config import load_config
from ir.errors import CheckpointError
from tests.models import random_config, write_checkpoint

CONFIG = random_config(
    np.random.default_rng(2),
    num_hidden_layers=2,
    tie_word_embeddings=False,
    num_attention_heads=6,
    num_key_value_heads=2,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "model", CONFIG, seed=3)


def check(folder: Path) -> None:
    check_weights(load_config(folder), Checkpoint.open(folder))


def rewrite(folder: Path, change) -> None:
    """Load the weights, let ``change`` edit them, and write them back."""
    weights = load_file(str(folder / SINGLE))
    change(weights)
    save_file(weights, str(folder / SINGLE))


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_offsets_lead_to_the_values_that_the_library_reads(tmp_path, dtype, shards):
    folder = write_checkpoint(tmp_path, CONFIG, seed=5, dtype=dtype, shards=shards)
    opened = Checkpoint.open(folder)
    check(folder)
    numpy_dtype = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    for name, entry in opened.tensors.items():
        raw = (folder / entry.file).read_bytes()[entry.offset : entry.offset + entry.nbytes]
        with safe_open(str(folder / entry.file), "numpy") as file:
            np.testing.assert_array_equal(np.frombuffer(raw, numpy_dtype).reshape(entry.shape), file.get_tensor(name))


def test_sharded_and_single_hold_the_same(tmp_path):
    one = Checkpoint.open(write_checkpoint(tmp_path / "1", CONFIG, seed=5))
    many = Checkpoint.open(write_checkpoint(tmp_path / "4", CONFIG, seed=5, shards=4))
    assert len({e.file for e in many.tensors.values()}) == 4
    assert {n: (e.dtype, e.shape) for n, e in one.tensors.items()} == {
        n: (e.dtype, e.shape) for n, e in many.tensors.items()
    }
    for name, entry in one.tensors.items():
        other = many.tensors[name]
        a = (one.folder / entry.file).read_bytes()[entry.offset :][: entry.nbytes]
        assert a == (many.folder / other.file).read_bytes()[other.offset :][: other.nbytes]


ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "header, data, message",
    [
        (b"{", b"", "not valid JSON"),
        (b"[]", b"", "no JSON object"),
        (b"\xff\xfe", b"", "not valid JSON"),
        ({"a": 3}, b"", "tensor a has a malformed header entry"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "malformed"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"", "malformed"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}, b"", "malformed"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, b"", "malformed"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8), "expected 12 bytes between them"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8), "expected 8 bytes between them"),
        (ONE, bytes(7), "tensor a ends at .* is it truncated"),
        (ONE, bytes(9), "its tensors end at"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12), "belong to no tensor"),
        ({**ONE, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), "tensors a and b overlap"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
         bytes(16), "names a twice"),
    ],
)  # fmt: skip
def test_malformed_headers(tmp_path, header, data, message):
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_header_length(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(path)
    for content, message in (
        (b"", "has 0 bytes, too few"),
        (b"abc", "has 3 bytes, too few"),
        (struct.pack("<Q", 50) + b"{}", "header alone ends at 58"),
        (struct.pack("<Q", 2**63) + b"{}", "expected at most 100000000"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_header(path)
    assert read_header(raw_file(path, {"__metadata__": {"format": "pt"}, **ONE}, bytes(8))).keys() == {"a"}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_damaged_bytes_never_give_anything_but_a_checkpoint_error(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, str(path))
    raw = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 4))):
        raw[int(rng.integers(len(raw)))] = int(rng.integers(0, 256))
    path.write_bytes(bytes(raw[: int(rng.integers(0, len(raw) + 1))] if rng.integers(2) else raw))
    size = path.stat().st_size
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    assert all(8 < e.offset and e.offset + e.nbytes <= size for e in tensors.values())


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="no weights, expected model.safetensors or"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="found pytorch_model.bin"):
        Checkpoint.open(tmp_path)


def test_shard_errors(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG, seed=5, shards=3)
    index = json.loads((folder / INDEX).read_text())
    shard = "model-00002-of-00003.safetensors"

    def with_map(weight_map) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    for bad in (None, {}, [1]):
        with_map(bad)
        with pytest.raises(CheckpointError, match="weight_map is missing or empty"):
            Checkpoint.open(folder)
    for bad in ("../x.safetensors", "/x", "", "..", 3):
        with_map({**index["weight_map"], "model.norm.weight": bad})
        with pytest.raises(CheckpointError, match="model.norm.weight is in .*, expected a bare file name"):
            Checkpoint.open(folder)
    with_map({**index["weight_map"], "ghost": shard})
    with pytest.raises(CheckpointError, match=f"{shard}: does not hold tensor ghost"):
        Checkpoint.open(folder)
    with_map(index["weight_map"])
    (folder / shard).write_bytes((folder / shard).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{shard}: has .* is it truncated"):
        Checkpoint.open(folder)
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard} named by {INDEX} missing"):
        Checkpoint.open(folder)
    (folder / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Checkpoint.open(folder)


def test_missing_extra_and_wrong_weights(folder):
    rewrite(folder, lambda w: [w.pop(n) for n in list(w) if "mlp" in n])
    with pytest.raises(
        CheckpointError, match=r"6 weights \(model\.layers\.0\.mlp\.gate_proj\.weight, .*, \.\.\.\) missing"
    ):
        check(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("lm_head.weight"), r"weight lm_head\.weight missing \(tie_word_embeddings is false\)"),
        (lambda w: w.pop("model.norm.weight"), r"weight model\.norm\.weight missing"),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": np.ones(3, np.float32)}),
         r"tensor model\.layers\.0\.self_attn\.q_proj\.bias that a Qwen3 model"),
        (lambda w: w.update({"model.layers.2.mlp.up_proj.weight": np.ones(3, np.float32)}),
         r"tensor model\.layers\.2\.mlp\.up_proj\.weight that a Qwen3 model"),
        (lambda w: w.update({"model.layers.1.mlp.up_proj.weight": np.ascontiguousarray(w["model.layers.1.mlp.up_proj.weight"].T)}),
         r"model\.layers\.1\.mlp\.up_proj\.weight is \[\d+, \d+\], config\.json makes it \[\d+, \d+\]"),
        (lambda w: w.update({"model.norm.weight": w["model.norm.weight"].astype(np.float64)}),
         r"model\.norm\.weight is f64, expected one of f32, f16, bf16"),
        (lambda w: w.update({"model.norm.weight": w["model.norm.weight"].astype(np.int32)}), r"model\.norm\.weight is i32"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        check(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_unknown_dtype_is_listed_and_refused_as_weight(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG, seed=1)
    rewrite(folder, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].astype(ml_dtypes.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match="model.norm.weight is F8_E4M3, expected one of f32, f16, bf16"):
        check(folder)


def test_harmless_extras_and_mixed_dtypes(tmp_path):
    folder = write_checkpoint(tmp_path, {**CONFIG, "tie_word_embeddings": True}, seed=1)

    def change(weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float32)

    rewrite(folder, change)
    check(folder)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_nonfinite_weights(tmp_path, dtype, monkeypatch):
    folder = write_checkpoint(tmp_path, CONFIG, seed=1, dtype=dtype)
    assert nonfinite_weights(Checkpoint.open(folder)) == {}

    def change(weights) -> None:
        weights["model.norm.weight"][3] = np.nan
        weights["lm_head.weight"].reshape(-1)[[0, 40, -1]] = [np.inf, -np.inf, np.nan]

    rewrite(folder, change)
    monkeypatch.setattr(module, "_CHUNK", 37)  # counts must add up over chunks
    assert nonfinite_weights(Checkpoint.open(folder)) == {"model.norm.weight": 1, "lm_head.weight": 3}
    assert nonfinite_weights(Checkpoint.open(folder), ["model.norm.weight"]) == {"model.norm.weight": 1}


def test_only_headers_are_read(tmp_path):
    """64 GiB of (sparse) weights open at once."""
    path = tmp_path / SINGLE
    size = 1 << 36
    raw_file(path, {"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)
    assert Checkpoint.open(tmp_path).tensors["a"].nbytes == size

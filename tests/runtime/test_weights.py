"""Qwen3Meta and Qwen3Weights: from a manifest, from a state dict, for one device and for several."""

from __future__ import annotations

import ctypes
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from runtime.errors import CheckpointError, ConfigError
from runtime.manifest import read_build
from runtime.structs import NUMPY_DTYPES, Qwen3MetaCStruct
from runtime.weights import (
    LAYER_WEIGHTS,
    Qwen3MetaFromConfig,
    Qwen3WeightsImpl,
    Qwen3WeightsNaming,
    kv_bytes_per_token,
    matrix_flops_per_token,
    meta_from_manifest,
)
from tests.runtime import fakes

BF16 = NUMPY_DTYPES["bf16"]
S = fakes.SIZES
Q, KV = S["nh"] * S["dh"], S["nkvh"] * S["dh"]


def read(address: int, shape: tuple[int, ...], dtype: np.dtype = BF16) -> np.ndarray:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype).reshape(shape)


def layer(weights: Qwen3WeightsImpl, name: str, i: int, shape: tuple[int, ...], dtype: np.dtype = BF16) -> np.ndarray:
    return read(getattr(weights, name)[i], shape, dtype)


def expected_layer(tensors: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    naming = Qwen3WeightsNaming()
    return {
        "attn_norm": tensors[naming.attn_norm(i)],
        "attn_qkv": np.concatenate([tensors[naming.attn_q(i)], tensors[naming.attn_k(i)], tensors[naming.attn_v(i)]]),
        "attn_q_norm": tensors[naming.attn_q_norm(i)],
        "attn_k_norm": tensors[naming.attn_k_norm(i)],
        "attn_o": tensors[naming.attn_o(i)],
        "ffn_norm": tensors[naming.ffn_norm(i)],
        "ffn_gate_up": np.concatenate([tensors[naming.gate(i)], tensors[naming.up(i)]]),
        "ffn_down": tensors[naming.down(i)],
    }


@pytest.fixture(scope="module")
def meta() -> Qwen3MetaCStruct:
    return Qwen3MetaFromConfig(fakes.config())


def test_meta_from_config(meta: Qwen3MetaCStruct, tmp_path: Path) -> None:
    assert {name: getattr(meta, name) for name in S} == S
    assert (meta.dt_logits, meta.end_token) == (19, 597)
    assert meta.epsilon == np.float32(1e-6) and meta.theta == np.float32(1e6)
    assert [meta.scale_input, meta.scale_output, meta.scale_o, meta.scale_down] == [1, 1, 1, 1]

    fakes.write_checkpoint(tmp_path, tokenizer=False)
    as_object = types.SimpleNamespace(**fakes.config())
    newer = {**fakes.config(), "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e6}, "eos_token_id": [597, 595]}
    del newer["torch_dtype"], newer["rope_theta"]
    for same in (tmp_path, str(tmp_path / "config.json"), as_object, newer):
        assert bytes(Qwen3MetaFromConfig(same)) == bytes(meta)
    assert isinstance(meta, Qwen3MetaCStruct)
    assert Qwen3MetaFromConfig(fakes.config(), dtype=np.float32, max_tokens=40).dt_logits == 13
    assert Qwen3MetaFromConfig(fakes.config(), dtype="torch.float16", max_tokens=40).dctx == 40


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"rope_theta": None}, {}, "rope_theta is None, expected a positive float"),
        ({"hidden_size": 20.5}, {}, "hidden_size is 20.5"),
        ({"num_hidden_layers": 0}, {}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, {}, "vocab_size is True"),
        ({}, {"max_tokens": 97}, "max_tokens is 97, expected 1 to max_position_embeddings = 96"),
        ({}, {"max_tokens": 0}, "max_tokens is 0"),
        ({}, {"dtype": "int8"}, "dtype: found 'int8', expected one of"),
        ({}, {"dtype": object()}, "dtype: found <object"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Qwen3MetaFromConfig({**fakes.config(), **changes}, **options)


def test_config_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json: not a readable config.json"):
        Qwen3MetaFromConfig(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="holds a list, expected a JSON object"):
        Qwen3MetaFromConfig(tmp_path)


def test_naming_matches_the_checkpoint() -> None:
    tensors = fakes.state_dict()
    assert Qwen3WeightsNaming.match(tensors) and Qwen3WeightsNaming().match(tensors)
    assert not Qwen3WeightsNaming.match({name: t for name, t in tensors.items() if "q_norm" not in name})


def test_manifest_and_state_dict_give_the_same_weights(meta: Qwen3MetaCStruct, fake_build: Path) -> None:
    tensors = fakes.state_dict()
    build = read_build(fake_build)
    assert bytes(meta_from_manifest(build)) == bytes(meta)
    for weights in (
        Qwen3WeightsImpl.from_manifest(build),
        Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), tensors),
    ):
        assert (weights.nlayer, weights.dt_norm, weights.dt_mat, weights.transpose_linear_weights) == (3, 19, 19, 0)
        assert weights.input_embd == weights.output_embd  # tied: once in memory
        assert not weights.attn_qkv_b
        np.testing.assert_array_equal(
            read(weights.input_embd, (S["dvoc"], S["d"])), tensors["model.embed_tokens.weight"]
        )
        np.testing.assert_array_equal(read(weights.output_norm, (S["d"],)), tensors["model.norm.weight"])
        for i in range(S["nlayer"]):
            for name, value in expected_layer(tensors, i).items():
                np.testing.assert_array_equal(layer(weights, name, i, value.shape), value)
        total = sum(t.nbytes for t in tensors.values())
        assert weights.nbytes == weights.nbytes_per_token == total


def test_state_dict_tensors_are_used_in_place(meta: Qwen3MetaCStruct) -> None:
    tensors = fakes.state_dict()
    weights = Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), tensors)
    assert weights.input_embd == tensors["model.embed_tokens.weight"].ctypes.data
    assert weights.ffn_down[1] == tensors["model.layers.1.mlp.down_proj.weight"].ctypes.data


def test_untied_embedding_is_not_read_per_token(meta: Qwen3MetaCStruct) -> None:
    tensors = {**fakes.state_dict(), "lm_head.weight": fakes.state_dict(1)["model.embed_tokens.weight"]}
    weights = Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), tensors)
    assert weights.input_embd != weights.output_embd
    assert weights.nbytes - weights.nbytes_per_token == tensors["model.embed_tokens.weight"].nbytes


def test_dtypes_are_converted(meta: Qwen3MetaCStruct) -> None:
    tensors = fakes.state_dict(dtype=np.float32)
    weights = Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), tensors, dt_mat="f16", dt_norm=np.float32)
    assert (weights.dt_mat, weights.dt_norm) == (12, 13)
    expected = expected_layer(tensors, 2)
    np.testing.assert_array_equal(
        layer(weights, "attn_qkv", 2, expected["attn_qkv"].shape, np.dtype(np.float16)),
        expected["attn_qkv"].astype(np.float16),
    )
    np.testing.assert_array_equal(
        layer(weights, "attn_norm", 2, (S["d"],), np.dtype(np.float32)), expected["attn_norm"]
    )


def test_transposed_weights(meta: Qwen3MetaCStruct) -> None:
    tensors = fakes.state_dict()
    weights = Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), tensors, transpose_weight=True)
    assert weights.transpose_linear_weights == 1
    for name in ("attn_qkv", "attn_o", "ffn_gate_up", "ffn_down"):
        value = expected_layer(tensors, 1)[name].T
        np.testing.assert_array_equal(layer(weights, name, 1, value.shape), value)


@pytest.mark.parametrize("transposed", [False, True])
def test_shards_of_two_devices(meta: Qwen3MetaCStruct, fake_build: Path, transposed: bool) -> None:
    """[ndev, ...]: each device has its share of the q, k, v, gate and up rows, and of o's and down's columns."""
    tensors = fakes.state_dict()
    all_weights = [Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), tensors, ndev=2, transpose_weight=transposed)]
    if not transposed:
        all_weights.append(Qwen3WeightsImpl.from_manifest(read_build(fake_build), ndev=2))
    for weights in all_weights:
        for i in range(S["nlayer"]):
            naming = Qwen3WeightsNaming()
            q, k, v = (np.split(tensors[name(i)], 2) for name in (naming.attn_q, naming.attn_k, naming.attn_v))
            gate, up = (np.split(tensors[name(i)], 2) for name in (naming.gate, naming.up))
            shards = {
                "attn_qkv": [np.concatenate([q[r], k[r], v[r]]) for r in range(2)],
                "attn_o": np.split(tensors[naming.attn_o(i)], 2, axis=1),
                "ffn_gate_up": [np.concatenate([gate[r], up[r]]) for r in range(2)],
                "ffn_down": np.split(tensors[naming.down(i)], 2, axis=1),
            }
            for name, per_device in shards.items():
                expected = np.stack([shard.T if transposed else shard for shard in per_device])
                np.testing.assert_array_equal(layer(weights, name, i, expected.shape), expected)
            np.testing.assert_array_equal(layer(weights, "attn_norm", i, (S["d"],)), tensors[naming.attn_norm(i)])


def test_devices_must_divide_the_heads(meta: Qwen3MetaCStruct) -> None:
    with pytest.raises(ConfigError, match="ndev is 4, expected a divisor of the model's 6 attention heads"):
        Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), fakes.state_dict(), ndev=4)


def test_models_with_bias_and_without_head_norms(meta: Qwen3MetaCStruct) -> None:
    """Qwen2 and Llama checkpoints: a bias on q, k and v, no norm on q and k."""
    tensors = {name: t for name, t in fakes.state_dict().items() if "q_norm" not in name and "k_norm" not in name}
    for i in range(S["nlayer"]):
        for which, n in (("q", Q), ("k", KV), ("v", KV)):
            tensors[f"model.layers.{i}.self_attn.{which}_proj.bias"] = np.full(n, i + 1, np.float32).astype(BF16)
    weights = Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), tensors)
    assert not weights.attn_q_norm and not weights.attn_k_norm
    np.testing.assert_array_equal(layer(weights, "attn_qkv_b", 2, (Q + 2 * KV,)), np.full(Q + 2 * KV, 3, BF16))


def test_missing_and_misshapen_tensors(meta: Qwen3MetaCStruct) -> None:
    naming, name = Qwen3WeightsNaming(), "model.layers.2.mlp.up_proj.weight"
    tensors = fakes.state_dict()
    with pytest.raises(CheckpointError, match=f"weight {name} is missing"):
        Qwen3WeightsImpl(meta, naming, {key: t for key, t in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=rf"weight {name} is bfloat16\[20, 28\], expected bf16\[28, 20\]"):
        Qwen3WeightsImpl(meta, naming, {**tensors, name: tensors[name].T})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_weights_are_named_once(
    meta: Qwen3MetaCStruct, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    tensors, name = fakes.state_dict(), "model.layers.1.self_attn.k_proj.weight"
    tensors[name][3, 4] = value
    Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), tensors)
    assert capsys.readouterr().err == f"warning: weight {name} has NaN or infinite values\n"
    Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), tensors, check=False)
    assert capsys.readouterr().err == ""


def test_overflow_in_conversion_is_named(meta: Qwen3MetaCStruct, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, name = fakes.state_dict(), "model.layers.0.mlp.down_proj.weight"
    tensors[name][0, 0] = 1e6
    Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), tensors, dt_mat="f16")
    assert capsys.readouterr().err == f"warning: weight {name} (as f16) has NaN or infinite values\n"


def test_torch_tensors_without_importing_torch(meta: Qwen3MetaCStruct, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used of a torch tensor: detach, cpu, contiguous, dtype, view(int16) for bfloat16, numpy."""

    class Tensor:
        def __init__(self, array: np.ndarray, dtype: str) -> None:
            self.array, self.dtype = array, dtype

        def detach(self) -> Tensor:
            return self

        cpu = contiguous = detach

        def view(self, dtype: str) -> Tensor:
            return Tensor(self.array.view(np.int16), dtype)

        def numpy(self) -> np.ndarray:
            assert self.dtype != "torch.bfloat16"
            return self.array

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(int16="torch.int16"))
    tensors = fakes.state_dict()
    wrapped: dict[str, Any] = {name: Tensor(t, "torch.bfloat16") for name, t in tensors.items()}
    wrapped["model.norm.weight"] = Tensor(tensors["model.norm.weight"].astype(np.float32), "torch.float32")
    weights = Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), wrapped)
    np.testing.assert_array_equal(read(weights.output_norm, (S["d"],)), tensors["model.norm.weight"])
    assert weights.input_embd == tensors["model.embed_tokens.weight"].ctypes.data


def test_sizes_that_the_benchmark_uses(meta: Qwen3MetaCStruct) -> None:
    matrices = [t for name, t in fakes.state_dict().items() if t.ndim == 2 and "embed" not in name]
    assert matrix_flops_per_token(meta) == 2 * sum(t.size for t in matrices)
    assert kv_bytes_per_token(meta, "bf16") == 2 * S["nlayer"] * KV * ml_dtypes.bfloat16(0).nbytes


def test_every_pointer_array_has_one_entry_per_layer(meta: Qwen3MetaCStruct) -> None:
    weights = Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), fakes.state_dict())
    for name in LAYER_WEIGHTS:
        pointers = getattr(weights, name)
        assert not pointers or len({pointers[i] for i in range(S["nlayer"])}) == S["nlayer"]

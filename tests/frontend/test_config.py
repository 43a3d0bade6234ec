"""config.json: what is read, and that every bad field is one clear error naming file and field."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from frontend.config import load_config
from ir.errors import ConfigError
from tests.models import random_config, random_weights

GOOD = random_config(np.random.default_rng(1), num_attention_heads=6, num_key_value_heads=2, hidden_size=54)
DROP = object()


def write(folder: Path, changes: dict, generation: object = None) -> Path:
    fields = {k: v for k, v in {**GOOD, **changes}.items() if v is not DROP}
    (folder / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_reads_every_field(tmp_path):
    config = load_config(write(tmp_path, {}, {"eos_token_id": [7, 2]}))
    for field in ("vocab_size", "hidden_size", "num_attention_heads", "head_dim", "rope_theta", "rms_norm_eps"):
        assert getattr(config, field) == GOOD[field]
    assert config.dtype == "bf16"
    assert config.eos_token_ids == (7, 2)  # generation_config.json's first, each once
    assert config.bos_token_id == 1


@pytest.mark.parametrize(
    "changes, field, expected",
    [
        ({"torch_dtype": DROP, "dtype": "float16"}, "dtype", "f16"),
        ({"torch_dtype": "torch.float32"}, "dtype", "f32"),
        ({"rope_theta": DROP, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta", 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta", 5e5),
        ({"rope_scaling": {"type": "default"}}, "rope_theta", GOOD["rope_theta"]),
        ({"head_dim": DROP, "hidden_size": 48}, "head_dim", 8),
        ({"head_dim": None, "hidden_size": 48}, "head_dim", 8),
        ({"eos_token_id": None}, "eos_token_ids", ()),
        ({"eos_token_id": [4, 5]}, "eos_token_ids", (4, 5)),
        ({"layer_types": ["full_attention"] * GOOD["num_hidden_layers"]}, "hidden_size", 54),
        ({"use_sliding_window": False, "sliding_window": 4096}, "hidden_size", 54),
        ({"some_later_field": [1]}, "hidden_size", 54),
    ],
)
def test_spellings(tmp_path, changes, field, expected):
    assert getattr(load_config(write(tmp_path, changes)), field) == expected


SIZES = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
]


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -4, 2.0, "16", True, [8], 2**31])
def test_sizes_are_positive_whole_numbers(tmp_path, field, value):
    with pytest.raises(ConfigError, match=rf"config\.json: {field} is .*, expected a positive whole number"):
        load_config(write(tmp_path, {field: value}))


@pytest.mark.parametrize(
    "field",
    [s for s in SIZES if s != "head_dim"] + ["rope_theta", "rms_norm_eps", "tie_word_embeddings", "torch_dtype"],
)
def test_nothing_has_a_silent_default(tmp_path, field):
    with pytest.raises(ConfigError, match=rf"config\.json: {field} is missing, expected "):
        load_config(write(tmp_path, {field: DROP}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, expected a divisor of num_attention_heads = 6"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"head_dim": DROP, "hidden_size": 55}, "head_dim is null, expected a number, because hidden_size = 55"),
        ({"head_dim": DROP, "hidden_size": 54}, "head_dim is 9, expected an even number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps is "1e-6"'),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": float("inf")}, "rope_theta is Infinity"),
        ({"rope_theta": 10.0, "rope_parameters": {"rope_theta": 20.0}}, "rope_theta is 10.0, expected the same as"),
        ({"rope_theta": DROP, "rope_parameters": {"rope_theta": "x"}}, 'rope_parameters.rope_theta is "x"'),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_scaling.rope_type is "yarn"'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.type is "linear"'),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor is 2.0"),
        ({"rope_scaling": "yarn"}, 'rope_scaling is "yarn"'),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters.full_attention is"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"model_type": "qwen3_moe"}, 'model_type is "qwen3_moe", expected "qwen3"'),
        ({"model_type": DROP}, "model_type is missing"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures is"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"layer_types": ["sliding_attention"]}, 'layer_types is "sliding_attention"'),
        ({"layer_types": ["full_attention"] * 9}, 'layer_types is "9 entries"'),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"torch_dtype": "float64"}, 'torch_dtype is "float64", expected one of float32, float16, bfloat16'),
        ({"torch_dtype": 16}, "torch_dtype is 16"),
        ({"eos_token_id": "x"}, 'eos_token_id is "x"'),
        ({"eos_token_id": [1, -1]}, "eos_token_id is [1, -1]"),
        ({"bos_token_id": 1.5}, "bos_token_id is 1.5"),
    ],
)
def test_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, changes))
    text = str(caught.value)
    assert f"{tmp_path / 'config.json'}: {message}" in text
    assert "expected" in text and "\n" not in text


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load_config(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        load_config(tmp_path / "file")
    with pytest.raises(ConfigError, match="config.json: No such file"):
        load_config(tmp_path)
    for content, message in (("{", "not valid JSON"), ("[1]", "holds a list"), ("\x00", "not valid JSON")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b'"\xff"')
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(tmp_path)
    write(tmp_path, {}, {"eos_token_id": {}})
    with pytest.raises(ConfigError, match="generation_config.json: eos_token_id"):
        load_config(tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_weight_shapes_are_the_checkpoints(tmp_path, seed):
    fields = random_config(np.random.default_rng(seed))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = load_config(tmp_path)
    weights = random_weights(fields, seed)
    assert config.weight_shapes() == {n: w.shape for n, w in weights.items()} and config.parameters == sum(
        w.size for w in weights.values()
    )

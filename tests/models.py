"""Random small Qwen3 configurations and checkpoints, shared by every test.

All dimensions are pairwise distinct, so that a wrong wiring or a transposed weight cannot pass by chance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

NUMPY_DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def random_config(rng: np.random.Generator, **overrides: Any) -> dict[str, Any]:
    """The contents of a config.json of a small model: one to three layers, any ratio of heads to KV heads, tied or not.

    ``overrides`` fix fields; the others are drawn until vocabulary, hidden, query, key, intermediate and head sizes all
    differ (where the overrides allow it).
    """
    for _ in range(1000):
        kv_heads = int(rng.choice([1, 2, 3]))
        fields: dict[str, Any] = {
            "vocab_size": int(rng.integers(61, 140)),
            "hidden_size": int(rng.integers(19, 60)),
            "num_hidden_layers": int(rng.integers(1, 4)),
            "num_attention_heads": kv_heads * int(rng.choice([1, 2, 3, 4])),
            "num_key_value_heads": kv_heads,
            "head_dim": 2 * int(rng.integers(2, 9)),
            "intermediate_size": int(rng.integers(30, 110)),
            "max_position_embeddings": int(rng.integers(150, 300)),
            "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
            "rope_theta": float(rng.choice([1e4, 1e6])),
            "tie_word_embeddings": bool(rng.integers(2)),
            "torch_dtype": "bfloat16",
        }
        fields.update(overrides)
        if _distinct(fields) or not _SIZES - overrides.keys():
            break
    else:
        raise ValueError(f"no configuration with distinct dimensions fits {overrides}")
    fixed = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "use_cache": True,
    }
    return {**fixed, **fields}


_SIZES = {"vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"}


def _distinct(c: dict[str, Any]) -> bool:
    d, heads, kv = c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    if heads % kv:
        return False
    sizes = [c["vocab_size"], c["hidden_size"], d, heads * d, c["intermediate_size"]]
    # With as many KV heads as heads (or one KV head) two of the sizes are equal by definition.
    if kv not in (1, heads):
        sizes.append(kv * d)
    if heads == 1:
        sizes.remove(heads * d)
    return len(set(sizes)) == len(sizes)


def write_checkpoint(
    folder: Path | str,
    config: dict[str, Any],
    seed: int,
    dtype: str = "bf16",
    shards: int = 1,
) -> Path:
    """Write config.json, generation_config.json and the weights of a random model, and return the folder.

    Weights are normal(0, 1/sqrt(fan_in)), norms 1 +- 0.2: activations and logits stay of order one. The values depend
    on ``seed`` and the shapes, not on ``shards``; ``dtype`` only rounds them.

    Args:
        dtype: ``"f32"``, ``"f16"`` or ``"bf16"``; also written as config.json's torch_dtype.
        shards: number of safetensors files; more than one also writes model.safetensors.index.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "torch_dtype": TORCH_NAMES[dtype]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": config.get("bos_token_id"), "eos_token_id": [config["eos_token_id"], 0]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {n: w.astype(NUMPY_DTYPES[dtype]) for n, w in random_weights(config, seed).items()}
    names = list(weights)
    if shards == 1:
        save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return folder
    weight_map = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[n * len(names) // shards : (n + 1) * len(names) // shards]}
        save_file(part, str(folder / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def random_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """The float32 weights of a configuration by their checkpoint names; linear weights are [out, in].

    Written out here, apart from the frontend's own list, so that the two check each other.
    """
    rng = np.random.default_rng(seed)
    hidden, inner, d = config["hidden_size"], config["intermediate_size"], config.get("head_dim")
    d = d or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d

    def linear(out: int, fan_in: int) -> np.ndarray:
        return rng.normal(0.0, fan_in**-0.5, (out, fan_in)).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return rng.uniform(0.8, 1.2, size).astype(np.float32)

    weights = {"model.embed_tokens.weight": rng.normal(0.0, 1.0, (config["vocab_size"], hidden)).astype(np.float32)}
    for n in range(config["num_hidden_layers"]):
        p = f"model.layers.{n}."
        weights[p + "input_layernorm.weight"] = norm(hidden)
        weights[p + "self_attn.q_proj.weight"] = linear(q, hidden)
        weights[p + "self_attn.k_proj.weight"] = linear(kv, hidden)
        weights[p + "self_attn.v_proj.weight"] = linear(kv, hidden)
        weights[p + "self_attn.o_proj.weight"] = linear(hidden, q)
        weights[p + "self_attn.q_norm.weight"] = norm(d)
        weights[p + "self_attn.k_norm.weight"] = norm(d)
        weights[p + "mlp.gate_proj.weight"] = linear(inner, hidden)
        weights[p + "mlp.up_proj.weight"] = linear(inner, hidden)
        weights[p + "mlp.down_proj.weight"] = linear(hidden, inner)
        weights[p + "post_attention_layernorm.weight"] = norm(hidden)
    weights["model.norm.weight"] = norm(hidden)
    if config["tie_word_embeddings"]:
        # A tied head multiplies by the embedding itself: scaled as a head wants it.
        weights["model.embed_tokens.weight"] *= np.float32(hidden**-0.5)
    else:
        weights["lm_head.weight"] = linear(config["vocab_size"], hidden)
    return weights


def reference_logits(config: dict[str, Any], weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Logits (float64 [len(tokens), vocab]) of one sequence, straight from the model's definition.

    Shares nothing with the compiler, token by token and head by head: what it agrees with is right, not just equal to
    itself.
    """
    w = {n: a.astype(np.float64) for n, a in weights.items()}
    heads, kv_heads, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    d = config.get("head_dim") or config["hidden_size"] // heads
    half = d // 2
    frequencies = np.array([config["rope_theta"] ** (-2.0 * i / d) for i in range(half)])

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + eps) * weight

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies)
        return np.concatenate([z.real, z.imag])

    keys: dict[tuple[int, int], list[np.ndarray]] = {}
    values: dict[tuple[int, int], list[np.ndarray]] = {}
    rows = []
    for position, token in enumerate(tokens):
        x = w["model.embed_tokens.weight"][token]
        for n in range(config["num_hidden_layers"]):
            p = f"model.layers.{n}."
            y = norm(x, w[p + "input_layernorm.weight"])
            q, k, v = (
                (w[p + f"self_attn.{part}_proj.weight"] @ y).reshape(count, d)
                for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            for g in range(kv_heads):
                k_g = turn(norm(k[g], w[p + "self_attn.k_norm.weight"]), position)
                keys.setdefault((n, g), []).append(k_g)
                values.setdefault((n, g), []).append(v[g])
            attended = []
            for h in range(heads):
                g = h * kv_heads // heads
                q_h = turn(norm(q[h], w[p + "self_attn.q_norm.weight"]), position)
                scores = np.array(keys[n, g]) @ q_h / np.sqrt(d)
                share = np.exp(scores - scores.max())
                attended.append(share / share.sum() @ np.array(values[n, g]))
            x = x + w[p + "self_attn.o_proj.weight"] @ np.concatenate(attended)
            y = norm(x, w[p + "post_attention_layernorm.weight"])
            gate, up = w[p + "mlp.gate_proj.weight"] @ y, w[p + "mlp.up_proj.weight"] @ y
            x = x + w[p + "mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        rows.append(w[head] @ norm(x, w["model.norm.weight"]))
    return np.array(rows)


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, in float64."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))

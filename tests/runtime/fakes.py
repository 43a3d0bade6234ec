"""A small random checkpoint, a manifest for it as the compiler would write one, and the fake engine's library."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from runtime.qwen3 import InferTask, Qwen3ForCausalLM

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
SIZES = dict(nlayer=3, d=20, nh=6, nkvh=2, dh=8, di=28, dctx=96, dvoc=608)  # dvoc is the example tokenizer's
EPSILON, THETA = 1e-6, 1e6


def weight_shapes() -> dict[str, tuple[int, ...]]:
    s = SIZES
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (s["dvoc"], s["d"]),
        "model.norm.weight": (s["d"],),
    }
    for i in range(s["nlayer"]):
        for name, shape in {
            "input_layernorm": (s["d"],),
            "self_attn.q_proj": (s["nh"] * s["dh"], s["d"]),
            "self_attn.k_proj": (s["nkvh"] * s["dh"], s["d"]),
            "self_attn.v_proj": (s["nkvh"] * s["dh"], s["d"]),
            "self_attn.q_norm": (s["dh"],),
            "self_attn.k_norm": (s["dh"],),
            "self_attn.o_proj": (s["d"], s["nh"] * s["dh"]),
            "post_attention_layernorm": (s["d"],),
            "mlp.gate_proj": (s["di"], s["d"]),
            "mlp.up_proj": (s["di"], s["d"]),
            "mlp.down_proj": (s["d"], s["di"]),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return shapes


def state_dict(seed: int = 0, dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in weight_shapes().items()}


def config() -> dict[str, Any]:
    s = SIZES
    return {
        "model_type": "qwen3",
        "hidden_size": s["d"],
        "num_hidden_layers": s["nlayer"],
        "num_attention_heads": s["nh"],
        "num_key_value_heads": s["nkvh"],
        "head_dim": s["dh"],
        "intermediate_size": s["di"],
        "max_position_embeddings": s["dctx"],
        "vocab_size": s["dvoc"],
        "rms_norm_eps": EPSILON,
        "rope_theta": THETA,
        "torch_dtype": "bfloat16",
        "eos_token_id": 597,
        "tie_word_embeddings": True,
    }


def write_checkpoint(folder: Path, tensors: dict[str, np.ndarray] | None = None, tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors if tensors is not None else state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config()))
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(EXAMPLE / name, folder / name)
    return folder


def leaf(name: str) -> dict[str, Any]:
    shape = list(weight_shapes()[name])
    return {"file": "model.safetensors", "name": name, "dtype": "bf16", "shape": shape, "offset": None}


def manifest(checkpoint: Path) -> dict[str, Any]:
    s = SIZES

    def layers(*names: str) -> list[Any]:
        out = []
        for i in range(s["nlayer"]):
            parts = [leaf(f"model.layers.{i}.{name}.weight") for name in names]
            out.append(parts[0] if len(parts) == 1 else {"concat": parts, "axis": 0})
        return out

    embedding = leaf("model.embed_tokens.weight")
    return {
        "format": 1,
        "generator": "test",
        "target": "cpu",
        "record": "embedded",
        "device": 0,
        "infinicore": "embedded",
        "dtype": "bf16",
        "quant": "none",
        "kv": {"form": "paged", "block_size": 16, "dtype": "bf16"},
        "model": {
            "source": {"kind": "checkpoint", "path": str(checkpoint)},
            "weights_folder": str(checkpoint),
            "config_only": False,
            "eos_token_ids": [597, 595],
        },
        "meta": dict(
            dt_logits=19,
            **s,
            epsilon=EPSILON,
            theta=THETA,
            end_token=597,
            scale_input=1.0,
            scale_output=1.0,
            scale_o=1.0,
            scale_down=1.0,
        ),
        "weights": {
            "dt_norm": 19,
            "dt_mat": 19,
            "transpose_linear_weights": 0,
            "input_embd": embedding,
            "output_norm": leaf("model.norm.weight"),
            "output_embd": dict(embedding),
            "attn_norm": layers("input_layernorm"),
            "attn_qkv": layers("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attn_qkv_b": None,
            "attn_q_norm": layers("self_attn.q_norm"),
            "attn_k_norm": layers("self_attn.k_norm"),
            "attn_o": layers("self_attn.o_proj"),
            "ffn_norm": layers("post_attention_layernorm"),
            "ffn_gate_up": layers("mlp.gate_proj", "mlp.up_proj"),
            "ffn_down": layers("mlp.down_proj"),
        },
        "library": "libqwen3.so",
        "ops": [],
    }


def write_build(folder: Path, checkpoint: Path, library: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(library, folder / "libqwen3.so")
    (folder / "manifest.json").write_text(json.dumps({**manifest(checkpoint), **changes}))
    return folder


def compile_library(source: Path, out: Path, *flags: str) -> Path:
    command = [
        "g++",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O1",
        "-shared",
        "-fPIC",
        "-o",
        str(out),
        str(source),
    ]
    subprocess.run([*command, *flags], check=True)
    return out


def answer(model: Qwen3ForCausalLM, prompt: list[int], steps: int, **sampling: Any) -> list[int]:
    """The tokens of a request on its own."""
    task = InferTask("alone", prompt, steps, **sampling)
    return finish(model, [task])[0]


def finish(model: Qwen3ForCausalLM, tasks: list[InferTask]) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in tasks]
    while any(task.finish_reason is None for task in tasks):
        running = [(i, task) for i, task in enumerate(tasks) if task.finish_reason is None]
        for (i, task), token in zip(running, model.batch_infer_one_round([task for _, task in running])):
            task.next(token)
            out[i].append(token)
    return out

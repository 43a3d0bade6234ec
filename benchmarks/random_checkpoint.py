"""Write a random checkpoint with the shape of a real Qwen3 model, for benchmarks and tests at real size.

    python benchmarks/random_checkpoint.py --shape 1.7B -o build/random-1.7B

The weights are normal numbers scaled so that activations keep their size from layer to layer; they say nothing, but they cost what real ones cost.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from frontend.config import load_config
from ir.errors import BuildError, run_cli

# hidden, layers, heads, kv heads, head_dim, intermediate, tied
SHAPES = {
    "0.6B": (1024, 28, 16, 8, 128, 3072, True),
    "1.7B": (2048, 28, 16, 8, 128, 6144, True),
    "4B": (2560, 36, 32, 8, 128, 9728, True),
    "8B": (4096, 36, 32, 8, 128, 12288, False),
    "14B": (5120, 40, 40, 8, 128, 17408, False),
    "32B": (5120, 64, 64, 8, 128, 25600, False),
}
BLOCK = 1 << 22  # numbers that are drawn once; tensors take them from different offsets


def config_of(shape: str, layers: int | None = None) -> dict:
    """config.json of a Qwen3 model of this size."""
    hidden, depth, heads, kv_heads, head_dim, intermediate, tied = SHAPES[shape]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }


def write(out: Path, shape: str, layers: int | None, seed: int, config_only: bool) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config_of(shape, layers), indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}) + "\n", encoding="utf-8")
    if config_only:
        return 0
    shapes = load_config(out).weight_shapes()
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(BLOCK, dtype=np.float32)
    header, offset = {}, 0
    for name in sorted(shapes):
        size = 2 * int(np.prod(shapes[name]))
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = out / "model.safetensors.partial"
    try:
        with open(partial, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in tqdm(sorted(shapes), disable=not sys.stderr.isatty(), unit="tensor"):
                _write_tensor(file, name, shapes[name], normal, rng)
        os.replace(partial, out / "model.safetensors")
    finally:
        partial.unlink(missing_ok=True)
    return offset


def _write_tensor(file, name: str, shape: tuple[int, ...], normal: np.ndarray, rng: np.random.Generator) -> None:
    is_norm = len(shape) == 1
    scale = 0.2 if is_norm else shape[-1] ** -0.5
    values = (normal * np.float32(scale) + np.float32(is_norm)).astype(ml_dtypes.bfloat16)
    left, start = int(np.prod(shape)), int(rng.integers(BLOCK))
    while left:
        count = min(left, BLOCK - start)
        file.write(values[start : start + count].tobytes())
        left -= count
        start = int(rng.integers(BLOCK))  # elsewhere each time, so that no two rows are equal


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.7B")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config-only", action="store_true", help="config.json without weights")
    arguments = parser.parse_args(argv)
    try:
        size = write(arguments.out, arguments.shape, arguments.layers, arguments.seed, arguments.config_only)
    except OSError as error:
        raise BuildError(f"{arguments.out}: cannot be written: {error.strerror or error}") from None
    print(f"{arguments.out}: Qwen3-{arguments.shape} shape, {size / 1e9:.2f} GB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

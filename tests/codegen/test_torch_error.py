"""Half precision costs us no more than it costs PyTorch: the bf16 engine's distance from the float32 reference against that of transformers' own bf16 Qwen3."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from frontend.export import export
from frontend.ort import Reference
from runtime.qwen3 import Qwen3ForCausalLM
from tests.models import random_config, write_checkpoint

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[train]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[train]'")
pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
# The factor that the engine is allowed over PyTorch. Both round the same weights and activations to 8 bits of mantissa, but not in the same places
# (PyTorch rounds inside its norms and rotary embedding, InfiniCore's ops once at their ends), so over a few hundred rows of logits the two errors differ by chance.
FACTOR = 1.25


def prompts(vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, vocabulary, n).tolist() for n in (1, 2, 9, 33, 64, 120)]


def relative(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    difference = sum(float(np.sum((g - w) ** 2)) for g, w in zip(got, want))
    return (difference / sum(float(np.sum(w**2)) for w in want)) ** 0.5


def torch_logits(folder: Path, dtype: object, sequences: list[list[int]], implementation: str) -> list[np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=implementation
    ).eval()
    with torch.no_grad():
        return [model(torch.tensor([s])).logits[0].float().numpy() for s in sequences]


@pytest.mark.parametrize("which", ["tiny-qwen3", "random"])
def test_bf16_error_is_no_worse_than_pytorchs(which, tmp_path, build_engine):
    folder = (
        TINY
        if which == "tiny-qwen3"
        else write_checkpoint(tmp_path / "model", random_config(np.random.default_rng(3), num_hidden_layers=4), 3)
    )
    onnx = tmp_path / "model.onnx"
    export(folder, onnx, opset=18)
    reference = Reference(onnx, folder)
    build = build_engine(folder, dtype="bf16")
    with Qwen3ForCausalLM(None, build=build) as model:
        sequences = prompts(model.vocab_size())
        sequences = [s for s in sequences if len(s) <= model.max_context_len()]
        ours = relative(model.forward(sequences), reference.forward(sequences))
    exact = torch_logits(folder, torch.float32, sequences, "eager")
    theirs = min(relative(torch_logits(folder, torch.bfloat16, sequences, how), exact) for how in ("eager", "sdpa"))
    print(f"{which}: relative L2 error in bf16: engine {ours:.2e}, PyTorch {theirs:.2e}, ratio {ours / theirs:.2f}")
    assert ours <= FACTOR * theirs

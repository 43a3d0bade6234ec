"""Real sizes: the shape of Qwen3-1.7B with random weights (3.4 GB), two layers of it against onnxruntime, and the 32B configuration without weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.random_checkpoint import write
from codegen.build import build_model
from frontend.export import export
from frontend.ort import Reference
from runtime.qwen3 import Qwen3ForCausalLM

# Peak resident memory of loading and generating, as a multiple of the weights' own size.
MEMORY_FACTOR = 1.3

GENERATE = """
import json, sys, time
from runtime.qwen3 import InferTask, Qwen3ForCausalLM
started = time.monotonic()
with Qwen3ForCausalLM(None, build=sys.argv[1]) as model:
    loaded = time.monotonic() - started
    prompt = [(i * 7919 + 11) % model.vocab_size() for i in range(100)]
    task = InferTask(0, prompt, 8, 1.0, 1, 1.0, [])
    tokens = []
    for _ in range(8):
        tokens += model.batch_infer_one_round([task])
        task.next(tokens[-1])
# getrusage's ru_maxrss would count the process that started this one.
status = open("/proc/self/status").read()
peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
print(json.dumps(dict(loaded=loaded, tokens=tokens, peak=peak)))
"""


def generate(build: Path) -> dict:
    done = subprocess.run([sys.executable, "-c", GENERATE, str(build)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_32b_configuration_exports_and_builds(tmp_path):
    write(tmp_path / "32b", "32B", None, 0, config_only=True)
    onnx = tmp_path / "32b.onnx"
    export(tmp_path / "32b", onnx, opset=18, config_only=True)
    assert onnx.stat().st_size < 10 << 20
    out = build_model(model=tmp_path / "32b", out=tmp_path / "build", config_only=True)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["meta"]["nlayer"], manifest["meta"]["d"], manifest["meta"]["di"]) == (64, 5120, 25600)
    assert manifest["weights"]["attn_qkv"][63]["concat"][0]["offset"] is None
    assert (out / "libqwen3.so").is_file()
    # Sixty-four layers are one loop: the source is as short as that of a small model, but for the frequencies of larger heads.
    small = Path(__file__).parents[1] / "golden" / "cpu-embedded-bf16" / "qwen3.cpp"
    assert len((out / "qwen3.cpp").read_text().splitlines()) <= len(small.read_text().splitlines()) + 16


@pytest.mark.slow
def test_two_layers_of_1_7b_equal_onnxruntime(tmp_path):
    folder = tmp_path / "model"
    write(folder, "1.7B", 2, 0, config_only=False)
    onnx = tmp_path / "model.onnx"
    export(folder, onnx, opset=23)
    prompts = [np.random.default_rng(5).integers(0, 151936, n).tolist() for n in (1, 23)]
    want = Reference(onnx, folder).forward(prompts)
    for infinicore in ("embedded", "any"):
        build = build_model(
            model=folder, out=tmp_path / f"build-{infinicore}", dtype="f32", infinicore=infinicore, max_context=2048
        )
        with Qwen3ForCausalLM(None, build=build) as model:
            got = model.forward(prompts)
        for g, w in zip(got, want):
            assert np.linalg.norm(g - w) <= 1e-5 * np.linalg.norm(w)


@pytest.mark.slow
def test_1_7b_loads_and_generates_in_little_more_than_its_weights(tmp_path):
    folder = tmp_path / "model"
    size = write(folder, "1.7B", None, 0, config_only=False)
    build = build_model(model=folder, out=tmp_path / "build")
    result = generate(build)
    print(f"loaded in {result['loaded']:.1f} s, peak {result['peak'] / size:.3f} x the weights' {size / 1e9:.2f} GB")
    assert len(result["tokens"]) == 8
    assert result["peak"] < MEMORY_FACTOR * size

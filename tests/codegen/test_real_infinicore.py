"""Engines for every InfiniCore (record ``any``) on an installed one: the same file, the same tokens as on the embedded library, and onnxruntime's logits.

Run with INFINI_ROOT set to an installation (release 0.1.0 or later) with the CPU backend.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime.tokenizer import Tokenizer
from tests.models import relative_l2

ROOT = os.environ.get("QWEN3_TEST_INFINI_ROOT", "")
pytestmark = pytest.mark.skipif(not ROOT, reason="INFINI_ROOT is not set: no installed InfiniCore to run on")

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [44], [1, 2, 3], list(range(20, 53))]
QUESTIONS = ["123+456=", "7+8=", "999+2=", "hello", "你好", "500+499="]


def chat(question: str) -> list[int]:
    tokenizer = Tokenizer.find(TINY)
    assert tokenizer is not None
    return tokenizer.encode(
        tokenizer.apply_chat_template([{"role": "user", "content": question}], enable_thinking=False)
    )


# In a process of its own: there is one InfiniCore per process.
RUN = """
import json, sys
import numpy as np
from runtime.qwen3 import InferTask, Qwen3ForCausalLM
build, prompts, steps, chunk, out = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
with Qwen3ForCausalLM(None, build=build, prefill_chunk=chunk) as model:
    np.savez(out, *model.forward(prompts))
    tasks = [InferTask(i, p, steps, 1.0, 1, 1.0, []) for i, p in enumerate(prompts)]
    tokens = [[] for _ in tasks]
    for _ in range(steps):
        for task, one, token in zip(tasks, tokens, model.batch_infer_one_round(tasks)):
            one.append(token)
            task.next(token)
print(json.dumps(tokens))
"""


def run(
    build: Path, out: Path, root: str, steps: int = 24, chunk: int = 512, prompts: list[list[int]] = PROMPTS
) -> tuple[list[np.ndarray], list[list[int]]]:
    environment = {k: v for k, v in os.environ.items() if k != "INFINI_ROOT"} | ({"INFINI_ROOT": root} if root else {})
    command = [sys.executable, "-c", RUN, str(build), json.dumps(prompts), str(steps), str(chunk), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = np.load(f"{out}.npz")
    return [logits[name] for name in logits.files], json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_one_engine_gives_the_same_tokens_on_both(dtype, build_engine, tmp_path):
    # What the model was trained on: in half precision, two libraries may part ways at the near ties that noise leads to.
    prompts = [chat(q) for q in QUESTIONS] + (PROMPTS if dtype == "f32" else [])
    build = build_engine(TINY, dtype=dtype, infinicore="any")
    _, embedded_tokens = run(build, tmp_path / "embedded", "", 4, prompts=prompts)
    installed, installed_tokens = run(build, tmp_path / "installed", ROOT, 4, prompts=prompts)
    assert installed_tokens == embedded_tokens
    if dtype == "f32":
        for got, want in zip(installed, build_engine.reference(TINY).forward(prompts)):
            assert relative_l2(got, want) <= 1e-5


@pytest.mark.parametrize("infinicore", ["any", "installed"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_verify_on_the_installed_library(dtype, infinicore, build_engine):
    """Random prompts, logits within verify's bound, greedy tokens equal but for near ties: for an engine of every InfiniCore and one for what is there."""
    build = build_engine(TINY, dtype=dtype, infinicore=ROOT if infinicore == "installed" else "any")
    done = command("codegen", "verify", str(build), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["verdict"] in ("PASS", "AMBIGUOUS")


def test_the_whole_equivalence_suite_on_the_installed_library():
    """tests/codegen/test_engine.py with engines that were compiled for the installed InfiniCore and run on it."""
    environment = {**os.environ, "QWEN3_TEST_EQUIVALENCE": ROOT}
    environment.pop("INFINI_ROOT", None)
    suite = Path(__file__).with_name("test_engine.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(suite)],
        env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], env={**os.environ, "INFINI_ROOT": ROOT}, capture_output=True, text=True
    )


def test_pieces_and_batches_on_the_installed_library(build_engine, tmp_path):
    build = build_engine(TINY, dtype="f32", infinicore="any")
    whole, tokens = run(build, tmp_path / "whole", ROOT)
    pieces, tokens_of_pieces = run(build, tmp_path / "pieces", ROOT, chunk=5)
    assert tokens == tokens_of_pieces
    for got, want in zip(pieces, whole):
        assert relative_l2(got, want) <= 5e-6


def test_an_engine_of_the_embedded_library_is_refused_by_name(build_engine):
    build = build_engine(TINY, dtype="bf16")
    code = f"from runtime.qwen3 import Qwen3ForCausalLM; Qwen3ForCausalLM(None, build={str(build)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "INFINI_ROOT": ROOT}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "infiniop" in done.stderr.splitlines()[-1] and "record embedded" in done.stderr.splitlines()[-1]


def test_an_engine_compiled_against_its_headers(build_engine, tmp_path):
    build = build_engine(TINY, dtype="f32", infinicore=ROOT)
    _, tokens = run(build, tmp_path / "own", ROOT, steps=4)
    _, portable = run(build_engine(TINY, dtype="f32", infinicore="any"), tmp_path / "any", ROOT, steps=4)
    assert tokens == portable

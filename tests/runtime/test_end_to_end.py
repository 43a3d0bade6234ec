"""The compiled example: struct layout, logits against onnxruntime, batches, caches, sampling, text."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from codegen.build import build_model
from frontend.export import export
from frontend.ort import Reference
from runtime import bench, infinicore, infinicpu
from runtime.engine import Engine, OutOfKVMemory, load_library
from runtime.errors import ConfigError, InfiniCoreError, run_cli
from runtime.manifest import read_build
from runtime.qwen3 import InferTask, Qwen3ForCausalLM, Qwen3MetaFromConfig, Qwen3WeightsImpl, Qwen3WeightsNaming
from runtime.structs import PROTOTYPES, KVPoolInfoCStruct, Qwen3MetaCStruct, Qwen3WeightsCStruct, field_names
from tests.runtime.fakes import EXAMPLE
from tests.runtime.test_model import answer, finish

PROMPTS = [[596, 287, 198, 16, 17, 10, 19, 28, 597], [5], list(range(300, 341)), [16, 17, 18, 10, 19, 20, 21, 28]]
SAMPLED: dict[str, Any] = dict(temperature=1.1, topk=40, topp=0.95)


@pytest.fixture(scope="module", autouse=True)
def embedded() -> Iterator[None]:
    """Whatever the caller's INFINI_ROOT is: these builds are for the embedded library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("INFINI_ROOT", raising=False)
        yield


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Build the example once for each (dtype, kv)."""
    folder, made = tmp_path_factory.mktemp("builds"), {}

    def build(dtype: str, kv: str = "paged") -> Path:
        key = f"{dtype}-{kv}"
        if key not in made:
            made[key] = build_model(model=EXAMPLE, out=folder / key, dtype=dtype, kv=kv)
        return made[key]

    return build


@pytest.fixture(scope="module", params=[("f32", "paged"), ("f32", "contiguous"), ("bf16", "paged")], ids="-".join)
def model(request: pytest.FixtureRequest, builds: Any) -> Iterator[Qwen3ForCausalLM]:
    with Qwen3ForCausalLM(build=builds(*request.param)) as opened:
        yield opened


@pytest.fixture(scope="module")
def bf16(builds: Any) -> Iterator[Qwen3ForCausalLM]:
    with Qwen3ForCausalLM(EXAMPLE, build=builds("bf16")) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(EXAMPLE, file)
    return Reference(file, EXAMPLE, threads=1)


def relative_l2(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def needs_training() -> None:
    report = json.loads((EXAMPLE / "training_report.json").read_text())
    accuracy = report["accuracy"]["bf16"]["addition"]["accuracy"]
    if accuracy < 0.95:
        pytest.skip(f"the bundled checkpoint is not trained yet (addition {accuracy:.0%})")


# ------------------------------------------------------------------------------------------------ the C interface


def test_structs_have_the_headers_layout(builds: Any, tmp_path: Path) -> None:
    structs = {"Qwen3Meta": Qwen3MetaCStruct, "Qwen3Weights": Qwen3WeightsCStruct, "Qwen3KVPoolInfo": KVPoolInfoCStruct}
    lines = []
    for name, struct in structs.items():
        lines.append(f'std::printf("{name} %zu\\n", sizeof({name}));')
        lines += [f'std::printf("{name}.{f} %zu\\n", offsetof({name}, {f}));' for f in field_names(struct)]
    source = tmp_path / "layout.cc"
    source.write_text(
        '#include "qwen3_impl.hpp"\n#include <cstdio>\nint main() {\n' + "\n".join(lines) + "\nreturn 0;\n}\n"
    )
    includes = [f"-I{builds('bf16')}", f"-I{infinicpu.build() / 'include'}"]
    subprocess.run(["g++", "-std=c++17", "-Wno-invalid-offsetof", *includes, "-o", tmp_path / "a", source], check=True)
    printed = subprocess.run([tmp_path / "a"], capture_output=True, text=True, check=True).stdout
    expected = []
    for name, struct in structs.items():
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        expected += [f"{name}.{f} {getattr(struct, f).offset}" for f in field_names(struct)]
    assert printed.splitlines() == expected


def test_the_library_exports_the_interface(builds: Any, bf16: Qwen3ForCausalLM) -> None:
    library = load_library(builds("bf16") / "libqwen3.so")
    assert all(hasattr(library, name) for name in PROTOTYPES)
    assert bytes(library.getQwen3Meta().contents) == bytes(Qwen3MetaFromConfig(EXAMPLE))


def test_jiuges_way_of_making_a_model(builds: Any, bf16: Qwen3ForCausalLM) -> None:
    """Meta from the configuration and weights from a state dict, without a manifest."""
    meta = Qwen3MetaFromConfig(EXAMPLE)
    state = load_file(EXAMPLE / "model.safetensors")
    assert Qwen3WeightsNaming.match(state)
    weights = Qwen3WeightsImpl(meta, Qwen3WeightsNaming(), state)
    with Engine(load_library(builds("bf16") / "libqwen3.so"), meta, weights) as engine:
        logits = engine.forward(PROMPTS[0], [len(PROMPTS[0])], [0], [engine.create_cache()], range(len(PROMPTS[0])))
        np.testing.assert_array_equal(logits, bf16.forward(PROMPTS[:1])[0])
        with pytest.raises(InfiniCoreError, match="createQwen3Model"):
            meta_of_another = Qwen3MetaFromConfig(
                {**json.loads((EXAMPLE / "config.json").read_text()), "vocab_size": 9}
            )
            Engine(load_library(builds("bf16") / "libqwen3.so"), meta_of_another, weights)


def test_the_emitted_module(builds: Any, bf16: Qwen3ForCausalLM) -> None:
    spec = importlib.util.spec_from_file_location("emitted_qwen3", builds("bf16") / "qwen3.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.Qwen3() as model:
        assert model.generate("1+1=", 5)[0] == bf16.generate("1+1=", 5)[0]


# --------------------------------------------------------------------------------------------------- correctness


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
@pytest.mark.parametrize("chunk", [512, 7])
def test_logits_equal_onnxruntimes(builds: Any, reference: Reference, kv: str, chunk: int) -> None:
    """float32 against float32: 1e-5 relative is some hundred roundings (2**-24) of sums of up to 384 terms, four layers."""
    with Qwen3ForCausalLM(build=builds("f32", kv), prefill_chunk=chunk) as model:
        for ours, theirs in zip(model.forward(PROMPTS), reference.forward(PROMPTS)):
            assert ours.shape == theirs.shape and ours.dtype == np.float32
            assert relative_l2(ours, theirs) <= 1e-5


def test_perplexity_equals_onnxruntimes(builds: Any, reference: Reference) -> None:
    sequences = [PROMPTS[0], PROMPTS[2]]
    losses = []
    for tokens, logits in zip(sequences, reference.forward(sequences)):
        wide = logits.astype(np.float64)
        logp = (
            wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) - wide.max(1, keepdims=True)
        )
        losses += [-logp[i, token] for i, token in enumerate(tokens[1:])]
    with Qwen3ForCausalLM(build=builds("f32")) as model:
        # Logits of magnitude ~10 within 1e-5 of each other: losses within 1e-4.
        assert model.perplexity(sequences) == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_greedy_tokens_equal_onnxruntimes(builds: Any, reference: Reference) -> None:
    with Qwen3ForCausalLM(build=builds("f32")) as model:
        for prompt in PROMPTS[:1] + PROMPTS[2:]:
            assert answer(model, prompt, 12) == reference.greedy(prompt, 12)


def test_a_batch_equals_each_alone(model: Qwen3ForCausalLM) -> None:
    """Greedy and sampled, prompts of four lengths, answers that end at different times."""
    for sampling in ({}, SAMPLED):
        alone = [answer(model, prompt, 5 + 3 * i, seed=i, **sampling) for i, prompt in enumerate(PROMPTS)]
        tasks = [InferTask(i, prompt, 5 + 3 * i, seed=i, **sampling) for i, prompt in enumerate(PROMPTS)]
        assert finish(model, tasks) == alone


def test_a_prompt_may_join_while_others_decode(model: Qwen3ForCausalLM) -> None:
    first, second = InferTask(0, PROMPTS[0], 9), InferTask(1, PROMPTS[2], 6)
    tokens = []
    for step in range(9):
        tasks = [first] if step < 3 else [first, second]
        out = model.batch_infer_one_round([task for task in tasks if task.finish_reason is None])
        tokens.append(out[0])
        for task, token in zip([task for task in tasks if task.finish_reason is None], out):
            task.next(token)
    assert tokens == answer(model, PROMPTS[0], 9)


def test_prompts_in_pieces_give_the_same_answer(model: Qwen3ForCausalLM) -> None:
    expected = answer(model, PROMPTS[2], 8)
    whole, model.prefill_chunk = model.prefill_chunk, 11
    try:
        assert answer(model, PROMPTS[2], 8) == expected
    finally:
        model.prefill_chunk = whole


def test_sampling_depends_on_the_seed_alone(model: Qwen3ForCausalLM) -> None:
    def tokens(seed: int) -> list[int]:
        return answer(model, PROMPTS[1], 20, temperature=1.5, topk=100, topp=1.0, seed=seed)

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in range(4)}) == 4
    assert answer(model, PROMPTS[1], 8, temperature=0.0, topk=9) == answer(model, PROMPTS[1], 8)
    assert answer(model, PROMPTS[1], 8, temperature=2.0, topk=1) == answer(model, PROMPTS[1], 8)


# -------------------------------------------------------------------------------------------------------- caches


def test_reusing_a_prefix_equals_starting_afresh(model: Qwen3ForCausalLM) -> None:
    list(first := model.stream(PROMPTS[2], 10, end_tokens=[]))
    longer = [*PROMPTS[2], *first.tokens, 16, 17]
    branch = [*PROMPTS[2][:30], 10, 11, 12]
    for prompt, shared in ((longer, len(PROMPTS[2]) + 9), (branch, 30)):
        list(reused := model.stream(prompt, 8, end_tokens=[]))
        assert reused.reused == shared
        assert reused.tokens == answer(model, prompt, 8)


def test_copies_go_their_own_way(model: Qwen3ForCausalLM) -> None:
    engine, prompt = model.engine, PROMPTS[2]
    original = engine.create_cache()
    engine.forward(prompt, [len(prompt)], [0], [original])
    copy = engine.duplicate_cache(original, 20)
    for cache, length, token in ((copy, 20, 5), (original, len(prompt), 6), (copy, 21, 7), (original, 42, 8)):
        engine.forward([token], [1], [length], [cache])
    for cache, tokens in ((copy, [*prompt[:20], 5, 7]), (original, [*prompt, 6, 8])):
        assert engine.cache_length(cache) == len(tokens)
        fresh = engine.create_cache()
        expected = engine.forward([*tokens, 9], [len(tokens) + 1], [0], [fresh])
        found = engine.forward([9], [1], [len(tokens)], [cache])
        # The same numbers were computed one token at a time; the dtype bounds how far that may be off.
        assert relative_l2(found, expected) <= (1e-5 if model.build.data["dtype"] == "f32" else 3e-2)
        engine.drop_cache(fresh)
        engine.drop_cache(cache)


def test_trimmed_and_moved_caches_continue_the_same(model: Qwen3ForCausalLM) -> None:
    engine, prompt = model.engine, PROMPTS[2]
    dtype = {"f32": np.dtype(np.uint32), "bf16": np.dtype(np.uint16)}[model.build.data["dtype"]]
    cache = engine.create_cache()
    engine.forward(prompt, [len(prompt)], [0], [cache])
    expected = engine.forward([7], [1], [17], [engine.duplicate_cache(cache, 17)])
    saved = engine.export_cache(cache, 0, 17, dtype)
    assert saved.shape == (4, 2, 2, 17, 32)
    moved = engine.create_cache()
    engine.import_cache(moved, 0, saved)
    engine.trim_cache(cache, 17)
    for same in (moved, cache):
        assert engine.cache_length(same) == 17
        np.testing.assert_array_equal(engine.forward([7], [1], [17], [same]), expected)
        engine.drop_cache(same)


def test_every_block_comes_back(builds: Any) -> None:
    with Qwen3ForCausalLM(build=builds("bf16"), kv_pool_tokens=128) as model:
        model.drop_kv_cache(model.create_kv_cache())  # the first one makes the pool
        total = model.engine.pool_info()["total_blocks"]
        assert total == 128 / 16
        for prompt in PROMPTS * 3:
            model.generate(prompt, 9)
            model.forward([prompt])
        assert model.pool.num_caches > 0
        while model.pool.evict():
            pass
        assert model.engine.pool_info()["free_blocks"] == total
        tasks = [InferTask(i, list(range(100)), 9) for i in range(3)]
        with pytest.raises(OutOfKVMemory, match="INSUFFICIENT_WORKSPACE"):
            model.batch_infer_one_round(tasks)
        assert [task.pos for task in tasks] == [0, 0, 0]
        for task in tasks:
            assert (cache := task.release_kvcache()) is not None
            cache.drop()
        assert model.engine.pool_info()["free_blocks"] == total
        assert answer(model, PROMPTS[0], 4)


def test_nothing_is_left_behind(builds: Any) -> None:
    """The embedded library counts what is alive; a model that was used and closed leaves as much as it found."""
    with Qwen3ForCausalLM(build=builds("bf16")):
        pass  # the library is loaded now
    provider = infinicore.load(json.loads((builds("bf16") / "manifest.json").read_text()))

    def alive() -> tuple[int, ...]:
        counters = (ctypes.c_uint64 * 9)()
        assert provider.handles[1].infinicpuCounters(counters) == 0
        return counters[2], counters[4], counters[6]

    before = alive()
    for kv in ("paged", "contiguous"):
        with Qwen3ForCausalLM(build=builds("f32", kv)) as model:
            model.generate("1+2=", 6)
            answer(model, PROMPTS[0], 3)
            assert alive() > before
        assert alive() == before


# ---------------------------------------------------------------------------------------------------------- text


def test_it_adds(bf16: Qwen3ForCausalLM) -> None:
    needs_training()
    assert bf16.generate("123+456=")[0] == "579"
    assert bf16.generate([{"role": "user", "content": "123+456="}])[0] == "579"


def test_streaming_equals_generating(model: Qwen3ForCausalLM) -> None:
    for prompt in ("123+456=", "你好", "reverse: abc"):
        text, ms = model.generate(prompt, 20)
        pieces: list[str] = []
        assert model.generate(prompt, 20, stream=pieces.append)[0] == text == "".join(pieces)
        assert ms > 0 and "\ufffd" not in "".join(pieces[:-1])


def test_the_whole_context_can_be_used(bf16: Qwen3ForCausalLM) -> None:
    full = [16] * bf16.max_context_len()
    list(generation := bf16.stream(full, 5, end_tokens=[]))
    assert (len(generation.tokens), generation.finish_reason) == (1, "length")
    with pytest.raises(ConfigError, match=r"513 tokens, expected at most 512 \(the context\)"):
        bf16.stream([*full, 16])


def test_a_shorter_context(builds: Any) -> None:
    with Qwen3ForCausalLM(build=builds("bf16"), max_tokens=40) as model:
        assert model.max_context_len() == 40
        with pytest.raises(ConfigError, match="41 tokens, expected at most 40"):
            model.forward([[1] * 41])


def test_the_documentations_examples(
    builds: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every python block of docs/api.md prints what the text block after it says."""
    needs_training()
    root = EXAMPLE.parents[1]
    made = read_build(builds("bf16"))
    monkeypatch.setattr("runtime.builds.build_for", lambda model, **options: made)
    monkeypatch.chdir(root)
    page = (root / "docs" / "api.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\s*```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") >= 5
    names: dict[str, Any] = {}
    for code, expected in blocks:
        exec(code, names)
        assert capsys.readouterr().out == expected


# ------------------------------------------------------------------------------------------------------ commands


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "INFINI_ROOT"}
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment)


def test_the_command(builds: Any, bf16: Qwen3ForCausalLM) -> None:
    done = run_command(
        "runtime.generate", str(EXAMPLE), "--build", str(builds("bf16")), "--chat", "--prompt", "123+456="
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, bf16.generate("123+456=")[0] + "\n", "")
    done = run_command("runtime.generate", str(EXAMPLE / "nowhere"), "--prompt", "x")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "nowhere: no such folder" in done.stderr


def test_the_benchmark_leaves_the_operators_on(
    builds: Any, bf16: Qwen3ForCausalLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "memory_bandwidth", lambda threads: 20.0)
    monkeypatch.setattr(bench, "arithmetic_peak", lambda threads, dtype: 100.0)
    expected = answer(bf16, PROMPTS[0], 5)
    options = ["--prompt-len", "24", "--gen-len", "4", "--repeat", "2", "--batch", "2", "--json"]
    assert run_cli(bench.main, ["--build", str(builds("bf16")), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["host_us_per_step"] > 0 and report["decode_tok_s"] > 0 and report["settings"]["threads"] >= 1
    assert report["settings"]["infinicore"] == "embedded"
    assert answer(bf16, PROMPTS[0], 5) == expected

"""``python -m runtime.generate`` and ``python -m runtime.bench`` over the fake engine."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest

from runtime import bench, generate, probe
from runtime.errors import run_cli
from runtime.qwen3 import Qwen3ForCausalLM

PROMPT = "5,9,2,600,14"


@pytest.fixture
def command(fake_build: Path, no_infinicore: None, capsys: pytest.CaptureFixture[str]):
    """Run a command on the fake build; returns (exit status, stdout, stderr)."""

    def run(module: Any, *arguments: str, build: bool = True) -> tuple[int, str, str]:
        full = [*arguments, "--build", str(fake_build)] if build else list(arguments)
        status = run_cli(module.main, full)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_tokens_in_tokens_out(command: Any, fake_build: Path) -> None:
    status, out, err = command(generate, "--tokens", PROMPT, "--max-steps", "4")
    with Qwen3ForCausalLM(build=fake_build) as model:
        list(expected := model.stream([5, 9, 2, 600, 14], 4))
    assert (status, out, err) == (0, ",".join(map(str, expected.tokens)) + "\n", "")


def test_text_streamed_and_at_once_are_equal(command: Any) -> None:
    for options in ((), ("--chat",), ("--think",), ("--system", "Be brief.")):
        arguments = ("--prompt", "123+456=", *options)
        assert command(generate, *arguments) == command(generate, *arguments, "--stream")


def test_json(command: Any) -> None:
    status, out, _ = command(generate, "--prompt", "hi", "--chat", "--json", "--max-steps", "3", "--seed", "5")
    report = json.loads(out)
    assert status == 0 and report["seed"] == 5 and len(report["tokens"]) == 3
    assert set(report) == {
        "text", "tokens", "prompt_tokens", "finish_reason", "seed", "load_s", "first_token_ms", "ms_per_step"
    }  # fmt: skip


def test_sampling_options(command: Any) -> None:
    def tokens(*options: str) -> str:
        return command(generate, "--tokens", PROMPT, "--max-steps", "8", *options)[1]

    greedy = tokens()
    assert tokens("--temperature", "0") == tokens("--top-k", "1", "--temperature", "2") == greedy
    assert tokens("--temperature", "1", "--seed", "1") == tokens("--temperature", "1", "--seed", "1") != greedy
    assert tokens("--temperature", "1", "--seed", "2") != tokens("--temperature", "1", "--seed", "1")
    assert tokens("--top-p", "0.9", "--seed", "1") != greedy


def test_prompt_from_standard_input(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("123+456="))
    assert command(generate, "--prompt", "-") == command(generate, "--prompt", "123+456=")


def test_standard_input_that_is_not_text(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors))
        status, out, err = command(generate, "--prompt", "-")
        assert (status, out, err.count("\n")) == (2, "", 1) and "UTF-8 text" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected one of --prompt and --tokens, found none"),
        (("--prompt", "x", "--tokens", "1"), "found both"),
        (("--tokens", "1,x"), "--tokens is '1,x', expected numbers separated by commas"),
        (("--tokens", ""), "prompt: empty"),
        (("--tokens", "1,608"), "prompt: entry 1 is 608, expected a token id from 0 to 607"),
        (("--tokens", "1", "--chat"), "which need --prompt"),
        (("--prompt", "x", "--stream", "--json"), "--stream and --json exclude each other"),
        (("--prompt", "x", "--top-k", "0"), "top_k is 0"),
        (("--prompt", "x", "--top-p", "nan"), "top_p is nan"),
        (("--prompt", "x", "--temperature", "-1"), "temperature is -1.0"),
        (("--prompt", "x", "--max-steps", "0"), "max_steps is 0"),
        (("--prompt", "x", "--max-steps", "many"), "invalid int value: 'many'"),
        (("--prompt", "x", "--no-such-option"), "unrecognized arguments: --no-such-option"),
        (("--prompt", "x", "--dtype", "f8"), "dtype: found 'f8'"),
        (("--prompt", "x", "--device", "tpu"), "device: found 'tpu'"),
        (("--prompt", ""), "prompt: empty"),
        (("--prompt", "caf\udce9"), "expected UTF-8 text"),
        (("--prompt", "x", "--system", "\udce9"), "expected UTF-8 text"),
    ],
)
def test_bad_arguments_are_one_line(command: Any, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = command(generate, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err


def test_a_model_is_needed(command: Any) -> None:
    assert command(generate, "--prompt", "x", build=False) == (
        2, "", "error: MODEL_DIR is missing: give a Hugging Face folder, or --build with a build folder\n"
    )  # fmt: skip


@pytest.mark.parametrize("module", [generate, bench])
def test_help(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "MODEL_DIR" in text and "--threads" in text


def test_bench_keys(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "memory_bandwidth", lambda threads: 20.0)
    monkeypatch.setattr(bench, "arithmetic_peak", lambda threads, dtype: 100.0)
    # The engine is a stand-in here; other tests of this process may have loaded the embedded library.
    monkeypatch.setattr(bench.infinicore, "is_embedded", lambda: False)
    options = ("--prompt-len", "20", "--gen-len", "3", "--repeat", "2", "--batch", "2", "--prefill-chunk", "8")
    status, out, _ = command(bench, *options, "--json")
    report = json.loads(out)
    assert status == 0
    for name in ("prefill_tok_s", "decode_tok_s", "ttft_ms", "load_s", "peak_rss_bytes"):
        assert report[name] > 0
    assert (report["membw_gb_s"], report["matmul_gflop_s"], report["host_us_per_step"]) == (20, 100, None)
    assert 0 <= report["decode_share_of_bandwidth"] and 0 <= report["prefill_share_of_peak"]
    assert report["settings"]["prompt_len"] == 20 and report["settings"]["dtype"] == "bf16"
    assert report["spread"]["ttft_ms"][0] <= report["ttft_ms"] <= report["spread"]["ttft_ms"][1]
    status, out, _ = command(bench, *options)
    assert status == 0 and "decode_tok_s" in out
    status, out, err = command(bench, "--prompt-len", "95", "--gen-len", "2")
    assert (status, out) == (2, "") and "97 tokens, the context is 96" in err
    assert "--batch is 0, expected at least 1" in command(bench, "--batch", "0")[2]
    # Lengths that were not given fit into the context of 96.
    for given, lengths in (((), (64, 32)), (("--prompt-len", "90"), (90, 6)), (("--gen-len", "5"), (91, 5))):
        settings = json.loads(command(bench, *given, "--repeat", "1", "--json")[1])["settings"]
        assert (settings["prompt_len"], settings["gen_len"]) == lengths


def test_bench_makes_room_for_its_batch(fake_build: Path, no_infinicore: None) -> None:
    args = argparse.Namespace(batch=100, prompt_len=81, gen_len=2)
    with Qwen3ForCausalLM(build=fake_build) as model:
        bench._make_room(model, args)
        assert model.engine.pool_info()["total_blocks"] == 100 * 6  # 83 tokens in blocks of 16


def test_the_probe_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "_last_level_cache", lambda: 1 << 20)
    assert probe.memory_bandwidth(2, 0.02) > 0.1
    assert probe.arithmetic_peak(1, "f32", 0.02) > 0.1 and probe.arithmetic_peak(1, "bf16", 0.02) > 0.1
    monkeypatch.setattr(probe, "_SOURCE", tmp_path / "none.cpp")
    status = run_cli(lambda argv: probe.memory_bandwidth(1) and 0, [])
    assert status == 2

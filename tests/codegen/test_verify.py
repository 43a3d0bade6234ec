"""codegen verify: right engines pass, wrong ones fail, and everything else is one clear line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from codegen import command_verify
from codegen.__main__ import main
from codegen.build import from_checkpoint
from codegen.rounding import WORK, Compiled, Rounding, interpret, measure_rounding, within_budget
from codegen.verdict import AMBIGUOUS, FAIL, PASS, Bound, bound_of, judge, near_tie, verdict_of
from codegen.verify import Report, default_prompts, sizes_of, spread_tokens, verify
from frontend.export import export
from ir.errors import run_cli
from passes.lower import to_model
from passes.targets import select
from runtime.engine import Engine
from runtime.manifest import read_build
from tests.codegen.engines import EXAMPLE, Builder
from tests.models import random_weights, reference_logits, relative_l2

# The same configurations and options as other tests of engines, which share the builds.
BUILDS: dict[str, tuple[str, dict[str, str]]] = {
    "paged-f32": ("one", dict(kv="paged", dtype="f32")),
    "contiguous-f32": ("four", dict(kv="contiguous", dtype="f32")),
    "paged-bf16": ("even", dict(kv="paged", dtype="bf16")),
    "contiguous-bf16": ("even", dict(kv="contiguous", dtype="bf16")),
    "paged-f16": ("two", dict(kv="paged", dtype="f16")),
    "contiguous-f16": ("two", dict(kv="contiguous", dtype="f16")),
}


@pytest.fixture
def build(build_engine: Builder) -> Callable[[str], Path]:
    return lambda name: build_engine(BUILDS[name][0], **BUILDS[name][1])


@pytest.fixture
def copy(build: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a build whose manifest ``edit`` changes: an engine that was compiled once serves many tests."""

    def make(name: str, edit: Callable[[dict[str, Any]], object] = lambda manifest: None) -> Path:
        folder = tmp_path / "build"
        shutil.copytree(build(name), folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        edit(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return make


def checkpoint_of(build: Path) -> Path:
    return Path(json.loads((build / "manifest.json").read_text())["model"]["weights_folder"])


def move_to(folder: Path) -> Callable[[dict[str, Any]], None]:
    """The manifest of a build that was made from ``folder``."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest["model"].update(source=dict(kind="checkpoint", path=str(folder)), weights_folder=str(folder))

    return edit


def command(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = run_cli(main, ["verify", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


# --- engines --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDS)
def test_a_right_engine_passes(build, name):
    report = verify(build(name), steps=6)
    # Random models may hesitate between two tokens: a near-tie is no error.
    assert report.verdict in (PASS, AMBIGUOUS), report.reason
    assert [len(p) for p in report.prompts] == [1, 7, 33]
    assert all([s.step for s in row] == list(range(7)) for row in report.results)
    assert [row[-1].position for row in report.results] == [6, 12, 38]
    assert (report.bound.rounding is None) == name.endswith("f32")


def test_the_bundled_example_passes(build_engine, capsys):
    status, out, _ = command(capsys, build_engine(EXAMPLE), "--prompt", "123+456=", "--steps", 3)
    lines = out.splitlines()
    assert status == 0 and lines[-1].startswith("PASS: all 4 tokens equal")
    assert lines[2].split()[:2] == ["step", "relative"] and len(lines) == 3 + 4 + 1


def test_all_that_was_found_is_in_the_json(build, capsys):
    status, out, err = command(capsys, build("paged-f32"), "--tokens", "5,4,3", "--steps", "2", "--json")
    report = json.loads(out)
    assert status == 0 and err == "" and report["verdict"] == PASS
    assert report["prompts"] == [[5, 4, 3]] and [s["position"] for s in report["results"][0]] == [2, 3, 4]
    assert report["bound"]["relative_l2"] == 1e-5
    for step in report["results"][0]:
        assert step["engine_token"] == step["reference_token"] and 0 <= step["relative_l2"] <= 1e-5


@pytest.mark.parametrize("numbers", [[3], [2, 1]])
def test_devices_are_chosen_by_their_numbers(numbers, build_engine, monkeypatch, capsys):
    seen: list[list[int]] = []
    right = Engine.__init__

    def noted(self, library, meta, weights, device, dev_ids):
        seen.append(list(dev_ids))
        right(self, library, meta, weights, device, dev_ids)

    monkeypatch.setattr(Engine, "__init__", noted)
    options = ["--ndev", len(numbers), "--dev-ids", ",".join(map(str, numbers)), "--tokens", "5,4,3", "--steps", 1]
    status, out, err = command(capsys, build_engine(EXAMPLE), *options)
    assert status == 0, out + err
    assert seen == [numbers]


def test_both_sides_get_the_references_tokens(build):
    report = verify(build("paged-f32"), tokens=[9, 8], steps=4)
    chosen = [s.reference_token for s in report.results[0]]
    # As one prompt, the same tokens give the same last step.
    again = verify(build("paged-f32"), tokens=[9, 8, *chosen[:4]], steps=0)
    assert again.results[0][0].reference_token == chosen[4]


def test_a_weight_that_was_altered_fails(build, copy, tmp_path, capsys):
    original = checkpoint_of(build("paged-bf16"))
    altered = tmp_path / "altered"
    shutil.copytree(original, altered)
    weights = load_file(altered / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name] = -weights[name]
    save_file(weights, altered / "model.safetensors", metadata={"format": "pt"})
    out = copy("paged-bf16", move_to(altered))
    status, text, _ = command(capsys, out, "--model", original)
    assert status == 1
    # The graph is right: it is what the engine does with its weights that is not.
    assert "FAIL: prompt 0, step 0" in text and "look at the weights" in text
    # Against the altered checkpoint itself the engine is right.
    assert command(capsys, out)[0] == 0


@pytest.mark.parametrize("role", ["attn_o", "ffn_down", "attn_q_norm"])
def test_weights_of_two_layers_that_were_swapped_fail(copy, role):
    def swap(manifest: dict[str, Any]) -> None:
        recipes = manifest["weights"][role]
        recipes[0], recipes[1] = recipes[1], recipes[0]

    report = verify(copy("paged-bf16", swap), steps=3)
    assert report.verdict == FAIL and "look at the weights" in report.reason


def test_a_build_from_an_onnx_file_is_compared_with_that_file(build, copy, tmp_path):
    checkpoint = checkpoint_of(build("contiguous-f32"))
    for kv in (True, False):  # without KV cache the reference computes every step from the start
        file = tmp_path / f"{kv}.onnx"
        export(checkpoint, file, kv=kv)
        shutil.rmtree(tmp_path / "build", ignore_errors=True)
        source = dict(kind="onnx", path=str(file))
        report = verify(copy("contiguous-f32", lambda m: m["model"].update(source=source)), steps=2)
        assert report.verdict == PASS and report.reference == str(file)


def test_a_checkpoint_that_moved_is_given_with_model(build, copy, tmp_path, capsys):
    gone = tmp_path / "gone"
    out = copy("paged-f32", move_to(gone))
    status, _, err = command(capsys, out)
    assert status == 2 and str(gone) in err and "--model" in err
    assert verify(out, model=checkpoint_of(build("paged-f32")), steps=1).verdict == PASS


def test_a_build_without_weights_takes_those_of_model(build, copy, capsys):
    out = copy("paged-f32", lambda m: m["model"].update(config_only=True))
    status, _, err = command(capsys, out)
    assert status == 2 and "--config-only" in err and "--model" in err
    assert verify(out, model=checkpoint_of(build("paged-f32")), steps=1).verdict == PASS


# --- bad input ------------------------------------------------------------------------------------------------------------------------------------


def drop_library(folder: Path) -> None:
    (folder / "libqwen3.so").unlink()


def truncate(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def drop_sizes(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["meta"]["dctx"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


BAD_BUILDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (shutil.rmtree, "no manifest.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "truncated manifest": (truncate, "not readable"),
    "manifest without a size": (drop_sizes, "dctx"),
    "no library": (drop_library, "libqwen3.so is missing"),
}


@pytest.mark.parametrize("case", BAD_BUILDS)
def test_a_broken_build_is_one_line(copy, capsys, case):
    damage, expected = BAD_BUILDS[case]
    out = copy("paged-f32")
    damage(out)
    status, text, err = command(capsys, out)
    assert (status, text, err.count("\n")) == (2, "", 1) and expected in err and str(out) in err


def test_a_build_that_was_not_compiled_is_one_line(build_engine, capsys):
    status, text, err = command(capsys, build_engine("one", emit_only=True))
    assert (status, text, err.count("\n")) == (2, "", 1) and "--emit-only" in err


BAD_ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "token outside the vocabulary": (["--tokens", "1,VOCABULARY"], "--tokens: entry 1"),
    "negative token": (["--tokens=-1"], "--tokens: entry 0 is -1"),
    "no token": (["--tokens", ""], "--tokens: empty"),
    "no number": (["--tokens", "1,x"], "--tokens '1,x'"),
    "prompt and tokens": (["--tokens", "1", "--prompt", "a"], "found both"),
    "prompt longer than the context": (["--tokens", "CONTEXT", "--steps", "0"], "the build's context"),
    "prompt and steps longer than the context": (["--tokens", "1,2", "--steps", "CONTEXT-1"], "the build's context"),
    "more steps than the context": (["--steps", "CONTEXT"], "--steps"),
    "negative steps": (["--steps", "-1"], "--steps -1"),
    "steps that are no number": (["--steps", "many"], "--steps many"),
    "text without a tokenizer": (["--prompt", "hello"], "tokenizer.json"),
    "model that is not there": (["--model", "nowhere"], "nowhere"),
    "devices that are no numbers": (["--dev-ids", "0,x"], "--dev-ids '0,x'"),
    "negative device": (["--dev-ids=-1"], "dev_ids is [-1], expected device numbers, at least 0"),
    "more devices than shared": (["--dev-ids", "0,1"], "expected 1 different device numbers"),
    "device that is not there": (["--dev-ids", "99"], "there is no device 99 of target cpu"),
    "no device": (["--ndev", "0"], "--ndev 0: expected at least 1"),
    "model of other sizes": (["--model", str(EXAMPLE)], "was built for"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line(build, capsys, case):
    arguments, expected = BAD_ARGUMENTS[case]
    meta = json.loads((build("paged-f32") / "manifest.json").read_text())["meta"]
    context, vocabulary = meta["dctx"], meta["dvoc"]
    fill = {"CONTEXT-1": str(context - 1), "VOCABULARY": str(vocabulary)}
    fill["CONTEXT"] = str(context) if "--tokens" not in arguments else ",".join(["1"] * (context + 1))
    for key, value in fill.items():
        arguments = [a.replace(key, value) for a in arguments]
    status, text, err = command(capsys, build("paged-f32"), *arguments)
    assert (status, text, err.count("\n")) == (2, "", 1) and expected in err


def test_the_longest_prompt_that_fits_is_taken(build):
    context = sizes_of(read_build(build("paged-f32"))).context
    report = verify(build("paged-f32"), tokens=spread_tokens(context - 1, 50, 3), steps=1)
    assert report.verdict == PASS and report.results[0][-1].position == context - 1


# --- verdicts -------------------------------------------------------------------------------------------------------------------------------------

LOGITS = np.array([3.0, -1.0, 2.9, 0.5, -2.0, 1.0], np.float32)
BOUND = Bound(0.01, "for tests")
# rms of LOGITS is 1.99, the largest of 6 normal errors sqrt(2 ln 6) = 1.89 times their size: margins up to 2 * 0.01 * 1.99 * 1.89 = 0.0754.
TIE = 0.0754


def test_the_near_tie_bound_is_what_its_formula_says():
    assert near_tie(LOGITS, 0.01) == pytest.approx(TIE, rel=1e-2)
    assert near_tie(10 * LOGITS, 0.01) == pytest.approx(10 * TIE, rel=1e-2)


def test_equal_logits_pass():
    step = judge(2, 7, LOGITS, LOGITS, 0, BOUND)
    assert (step.verdict, step.relative_l2, step.max_abs, step.margin) == (PASS, 0.0, 0.0, 0.0)
    assert (step.step, step.position, step.engine_token, step.reference_token) == (2, 7, 0, 0)


@pytest.mark.parametrize(
    "gap, verdict", [(0.5 * TIE, AMBIGUOUS), (0.97 * TIE, AMBIGUOUS), (1.03 * TIE, FAIL), (1.0, FAIL)]
)
def test_another_token_is_ambiguous_where_the_reference_hesitates(gap, verdict):
    expected = LOGITS.copy()
    expected[2] = expected[0] - gap
    step = judge(0, 0, expected, expected, 2, BOUND)
    # rms changes a little with the gap: at most by 0.1 / 3 of one of six squares, under 1 %
    assert step.margin == pytest.approx(gap, abs=1e-6) and step.verdict == verdict


@pytest.mark.parametrize("size, verdict", [(0.9, PASS), (1.1, FAIL)])
def test_logits_outside_the_bound_fail_even_if_the_token_is_right(size, verdict):
    error = np.zeros(6, np.float32)
    error[1] = size * 0.01 * np.linalg.norm(LOGITS)
    assert judge(0, 0, LOGITS - error, LOGITS, 0, BOUND).verdict == verdict


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail(value):
    found = LOGITS.copy()
    found[4] = value
    step = judge(0, 0, found, LOGITS, 0, BOUND)
    assert step.verdict == FAIL and math.isnan(step.relative_l2)


def test_a_token_outside_the_vocabulary_fails():
    assert judge(0, 0, LOGITS, LOGITS, 6, BOUND).verdict == FAIL


def test_without_a_bound_nothing_passes():
    assert judge(0, 0, LOGITS, LOGITS, 0, Bound(None, "overflow")).verdict == FAIL


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(2, 500), st.floats(1e-6, 0.3))
def test_errors_of_at_most_half_the_near_tie_never_make_a_wrong_token(seed, size, bound):
    rng = np.random.default_rng(seed)
    expected = rng.normal(size=size)
    limit = near_tie(expected, bound)
    # Shrunk by a rounding of float64: the sum of two errors is then within the limit.
    found = expected + rng.uniform(-0.5, 0.5, size) * limit * (1 - 1e-9)
    step = judge(0, 0, found, expected, int(found.argmax()), Bound(math.inf, "any"))
    assert step.margin <= limit
    assert judge(0, 0, found, expected, int(found.argmax()), replace(BOUND, relative_l2=bound)).margin <= limit


def test_the_worst_step_decides():
    steps = [[judge(0, 0, LOGITS, LOGITS, 0, BOUND)] * 3]
    assert verdict_of(steps) == PASS
    near = LOGITS.copy()
    near[2] = near[0] - 0.5 * TIE
    steps.append([judge(0, 0, near, near, 2, BOUND)])
    assert verdict_of(steps) == AMBIGUOUS
    steps.append([judge(0, 0, LOGITS, LOGITS, 4, BOUND)])
    assert verdict_of(steps) == FAIL


def test_ambiguous_is_no_failure_of_the_command(monkeypatch, capsys):
    near = LOGITS.copy()
    near[2] = near[0] - 0.5 * TIE
    report = Report(
        "b", "cpu", "bf16", "paged", "m", "m", 0, BOUND, [[1]], [[judge(0, 0, near, near, 2, BOUND)]], AMBIGUOUS, "why"
    )
    monkeypatch.setattr(command_verify, "verify", lambda *a, **k: report)
    status, out, _ = command(capsys, "b")
    assert status == 0 and out.splitlines()[-1] == "AMBIGUOUS: why" and "near-tie" in out


def test_what_is_not_finite_is_null_in_the_json():
    step = judge(0, 0, LOGITS * math.nan, LOGITS, 0, BOUND)
    report = Report("b", "cpu", "bf16", "paged", "m", "m", 0, BOUND, [[1]], [[step]], FAIL, "why")
    assert report.to_json()["results"][0][0]["relative_l2"] is None
    json.dumps(report.to_json(), allow_nan=False)


# --- bounds ---------------------------------------------------------------------------------------------------------------------------------------


def test_float32_has_fixed_bounds():
    assert [bound_of(n, None).relative_l2 for n in (1, 8, 9, 36)] == [1e-5, 1e-5, 1e-4, 1e-4]


def test_half_types_have_twice_what_rounding_does():
    assert bound_of(28, Rounding(("bf16",), 0.004, 0.002, 57, True)).relative_l2 == 0.008
    overflow = bound_of(2, Rounding(("f16",), math.inf, math.inf, 57, True))
    assert overflow.relative_l2 is None and "overflows" in overflow.why


def compiled(folder: Path, kv: str) -> Compiled:
    return Compiled(to_model(from_checkpoint(folder, config_only=False).graph), select("cpu", "embedded"), kv)


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
def test_the_interpreted_calls_are_the_model(build_engine, kv):
    """Against the model's definition, which shares nothing with the compiler."""
    folder = build_engine.checkpoint("two", stored="f32")
    config = json.loads((folder / "config.json").read_text())
    weights = random_weights(config, 0)
    sequences = [spread_tokens(n, config["vocab_size"], n) for n in (1, 19, 6)]
    found = interpret(compiled(folder, kv).calls("f32", 19), folder, sequences)
    for rows, tokens in zip(found, sequences):
        # float32: some 1e-7 per sum over two layers
        assert relative_l2(rows, reference_logits(config, weights, tokens)) < 1e-5


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
def test_measured_rounding_follows_the_dtype(build_engine, kv):
    folder = build_engine.checkpoint("two", stored="f32")
    config = json.loads((folder / "config.json").read_text())
    sequences = [spread_tokens(n, config["vocab_size"], n) for n in (5, 23)]
    expected = [reference_logits(config, random_weights(config, 0), tokens)[-3:] for tokens in sequences]
    found = {d: measure_rounding(compiled(folder, kv), folder, sequences, expected, [d]) for d in ("bf16", "f16")}
    for rounding, graph_error in found.values():
        assert rounding is not None and rounding.complete and rounding.positions == 28
        assert graph_error < 1e-5 < rounding.median <= rounding.largest
    # bf16 has three bits less than f16, so 8 times the error; medians over 28 positions are good to a factor of two.
    assert 4 < found["bf16"][0].median / found["f16"][0].median < 16
    none, graph_error = measure_rounding(compiled(folder, kv), folder, sequences, expected, [])
    assert none is None and graph_error == found["f16"][1]
    # Wrong expectations are the graph's error and not its rounding.
    wrong = measure_rounding(compiled(folder, kv), folder, sequences, [-e for e in expected], ["f16"])
    assert wrong[0] == found["f16"][0] and wrong[1] == pytest.approx(2, abs=1e-4)


def test_a_model_that_overflows_has_no_bound(build_engine, tmp_path):
    folder = tmp_path / "loud"
    shutil.copytree(build_engine.checkpoint("one", stored="f32"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= np.float32(1e6)  # float16 ends at 65504
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rounding, _ = measure_rounding(compiled(folder, "paged"), folder, [[1, 2, 3]], [np.ones((1, 1))], ["f16"])
    assert rounding is not None and rounding.largest == math.inf


def test_large_models_are_measured_on_less():
    sequences = [[0] * 20, [0] * 5, [0] * 300]
    assert within_budget(sequences, 1000) == ([(0, 20), (1, 5), (2, 300)], True)
    # room for 30 tokens: the two short ones
    assert within_budget(sequences, int(WORK / 4 / 30)) == ([(0, 20), (1, 5)], False)
    assert within_budget([[0] * 300], int(WORK / 4 / 30)) == ([(0, 30)], False)
    assert within_budget([[0] * 300], 10**15) == ([(0, 2)], False)


# --- prompts --------------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(200, 160000), st.integers(0, 9))
def test_prompts_are_spread_over_the_vocabulary(count, vocabulary, seed):
    tokens = spread_tokens(count, vocabulary, seed)
    assert tokens == spread_tokens(count, vocabulary, seed) and len(set(tokens)) == count
    assert all(i * vocabulary // count <= t < (i + 1) * vocabulary // count for i, t in enumerate(sorted(tokens)))
    assert 0 <= min(tokens) and max(tokens) < vocabulary


def test_default_prompts_fit_a_small_context(build):
    sizes = replace(sizes_of(read_build(build("paged-f32"))), context=20)
    assert [len(p) for p in default_prompts(sizes, 16)] == [1, 4]
    assert [len(p) for p in default_prompts(sizes, 19)] == [1]

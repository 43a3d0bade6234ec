"""``python -m runtime.eval``: its numbers against their definitions, on the fake engine and on compiled ones."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.build import build_model
from runtime import eval as evaluation
from runtime import infinicore
from runtime.errors import BuildError, ConfigError, run_cli
from runtime.eval import divergence, evaluate_task, evaluate_text, fit_window, log_softmax, windows
from runtime.manifest import read_build
from runtime.qwen3 import Qwen3ForCausalLM
from tests.models import random_config, random_weights, reference_logits, write_checkpoint
from tests.runtime import fakes
from tests.runtime.fakes import EXAMPLE

CONTEXT = fakes.SIZES["dctx"]
TEXT = "Count the apples: 12+30=42. 你好！ Then read the word once more, and reverse: stone.\n"


@pytest.fixture(scope="session")
def other_build(fake_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake engine with other weights, which is another model."""
    folder = tmp_path_factory.mktemp("other-build")
    return fakes.write_build(
        folder / "out", fakes.write_checkpoint(folder / "model", fakes.state_dict(1)), fake_library
    )


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 4, encoding="utf-8")
    return path


def by_definition(own: list[np.ndarray], theirs: list[np.ndarray], targets: list[int]) -> dict[str, float]:
    """The report's numbers from one row of logits per predicted token, in plain Python floats, correctly summed."""

    def probabilities(row: np.ndarray) -> list[float]:
        shift = float(row.max())
        weights = [math.exp(float(x) - shift) for x in row]
        total = math.fsum(weights)
        return [weight / total for weight in weights]

    pairs = [(probabilities(a), probabilities(b)) for a, b in zip(own, theirs)]
    loss = math.fsum(-math.log(q[t]) for (q, _), t in zip(pairs, targets)) / len(targets)
    reference_loss = math.fsum(-math.log(p[t]) for (_, p), t in zip(pairs, targets)) / len(targets)
    kl = [math.fsum(b * math.log(b / a) for a, b in zip(q, p) if b) for q, p in pairs]
    return {
        "scored_tokens": len(targets),
        "perplexity": math.exp(loss),
        "reference_perplexity": math.exp(reference_loss),
        "perplexity_ratio": math.exp(loss - reference_loss),
        "kl_mean": math.fsum(kl) / len(kl),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": max(kl),
        "kl_max_token": kl.index(max(kl)) + 1,
        "top1_agreement": sum(q.index(max(q)) == p.index(max(p)) for q, p in pairs) / len(pairs),
    }


# ------------------------------------------------------------------------------------------------------------- formulas


def test_log_softmax_and_divergence_of_known_distributions() -> None:
    half = np.log(np.array([[0.5, 0.25, 0.25]]))
    third = np.zeros((1, 3))
    # Any shift of a row's logits is the same distribution, even where exp of them is no number.
    for shift in (0.0, 1e4, -1e4):
        np.testing.assert_allclose(log_softmax(half + shift), half, rtol=1e-11)
    # 0.5 ln(0.5 * 3) + 2 * 0.25 ln(0.25 * 3), and the other way round.
    there = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    back = (math.log(1 / 1.5) + 2 * math.log(1 / 0.75)) / 3
    assert divergence(half, log_softmax(third)) == pytest.approx([there], rel=1e-14)
    assert divergence(log_softmax(third), half) == pytest.approx([back], rel=1e-14)
    assert log_softmax(np.zeros((2, 5), np.float32)).dtype == np.float64
    # A token that has no probability to speak of adds nothing, and is not 0 times infinity.
    assert divergence(log_softmax(np.array([[0.0, -1e30]])), log_softmax(third[:, :2])) == pytest.approx([math.log(2)])


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data())
def test_windows_predict_every_token_once(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 70))
    window = data.draw(st.integers(2, count))
    stride = data.draw(st.integers(1, window - 1))
    predicted = []
    for start, stop, first in windows(count, window, stride):
        assert 0 <= start < first < stop <= min(start + window, count)
        assert start == 0 or first - start >= window - stride
        predicted += range(first, stop)
    assert predicted == list(range(1, count))


# ---------------------------------------------------------------------------------------- streaming, on the fake engine


@pytest.mark.parametrize(("window", "stride"), [(None, None), (96, 1), (50, 49), (17, 5), (2, 1)])
@pytest.mark.parametrize("piece", [512, 13, 1])
def test_numbers_are_those_of_the_definition(
    open_fake: Any,
    other_build: Path,
    window: int | None,
    stride: int | None,
    piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fake engine's logits depend on every token before them and on nothing else, so all ways agree to rounding."""
    ids = np.random.default_rng(3).integers(0, 608, 101).tolist()
    model, reference = open_fake(prefill_chunk=37), open_fake(build=other_build)
    monkeypatch.setattr(evaluation, "_LOGITS_BYTES", 4 * 608 * piece)
    monkeypatch.setattr(evaluation, "_SLICE_ELEMENTS", 608 * 3)
    scores = evaluate_text(model, ids, window=window, stride=stride, reference=reference)
    used = fit_window(len(ids), CONTEXT, window, stride)
    assert used == (window or CONTEXT, stride or CONTEXT // 2)
    own, theirs = [], []
    for start, stop, first in windows(len(ids), *used):
        for rows, m in ((own, model), (theirs, reference)):
            rows += list(m.forward([ids[start:stop]])[0][first - 1 - start : -1])
    found, expected = scores.summary(), by_definition(own, theirs, ids[1:])
    assert found.keys() == expected.keys() == set(evaluation.TEXT_KEYS)
    # Losses are about 10, sums of 608 float64 terms of rounding 2**-53 each: 1e-12 is a tenfold of that.
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    assert found["kl_mean"] > 0.1 and found["top1_agreement"] < 0.5  # two models, nothing in common
    pool = model.engine.pool_info()
    assert pool["free_blocks"] == pool["total_blocks"]


def test_one_window_is_the_models_own_perplexity(open_fake: Any) -> None:
    ids = np.random.default_rng(4).integers(0, 608, 61).tolist()
    model = open_fake()
    found = evaluate_text(model, ids).summary()
    assert found["perplexity"] == pytest.approx(model.perplexity([ids]), rel=1e-12)
    assert [name for name, value in found.items() if value is not None] == ["scored_tokens", "perplexity"]


def test_a_model_against_itself(open_fake: Any) -> None:
    ids = np.random.default_rng(5).integers(0, 608, 150).tolist()
    found = evaluate_text(open_fake(), ids, window=40, reference=open_fake()).summary()
    assert (found["kl_mean"], found["kl_max"], found["top1_agreement"], found["perplexity_ratio"]) == (0, 0, 1, 1)


def test_logits_that_are_not_finite_are_an_error(open_fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_fake()
    forward = model.engine.forward

    def overflowing(tokens: list[int], *rest: Any) -> np.ndarray:
        logits = forward(tokens, *rest)
        if 300 in tokens:
            logits[tokens.index(300), 7] = np.inf
        return logits

    monkeypatch.setattr(model.engine, "forward", overflowing)
    with pytest.raises(BuildError, match=r"logits after token 4 of the text \(id 300\) are not finite.*bf16"):
        evaluate_text(model, [1, 2, 3, 4, 300, 6, 7])
    pool = model.engine.pool_info()
    assert pool["free_blocks"] == pool["total_blocks"]


@pytest.mark.parametrize(
    ("count", "window", "stride", "message"),
    [
        (1, None, None, "1 token, expected at least 2"),
        (30, 31, None, r"window is 31, expected 2 to 30 \(the text's tokens\)"),
        (200, 97, None, r"window is 97, expected 2 to 96 \(the context\)"),
        (200, 1, None, "window is 1, expected 2"),
        (200, 20, 20, r"stride is 20, expected 1 to 19 \(less than the window\)"),
        (200, None, 0, "stride is 0, expected 1 to 95"),
    ],
)
def test_settings_that_do_not_fit(
    open_fake: Any, count: int, window: int | None, stride: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_text(open_fake(), list(range(count)), window=window, stride=stride)


# -------------------------------------------------------------------------------------- the command, on the fake engine


@pytest.fixture
def command(fake_build: Path, no_infinicore: None, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str, build: Path | None = fake_build) -> tuple[int, str, str]:
        status = run_cli(evaluation.main, [*arguments, *(() if build is None else ("--build", str(build)))])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_json_and_table(command: Any, text_file: Path, other_build: Path, open_fake: Any) -> None:
    options = ("--text", str(text_file), "--reference-build", str(other_build), "--window", "24", "--stride", "7")
    status, out, err = command(*options, "--json")
    report = json.loads(out)
    model, reference = open_fake(), open_fake(build=other_build)
    ids = model.tokenizer.encode(TEXT * 4)
    expected = evaluate_text(model, ids, window=24, stride=7, reference=reference).summary()
    assert (status, err) == (0, "")  # no progress in a pipe
    assert {name: report[name] for name in expected} == {
        name: pytest.approx(value, rel=1e-7) for name, value in expected.items()
    }
    assert set(report) == {*evaluation.TEXT_KEYS, "tasks", "settings"} and report["tasks"] == {}
    for name, value in dict(tokens=len(ids), window=24, stride=7, dtype="bf16", text=str(text_file)).items():
        assert report["settings"][name] == value
    assert report["settings"]["reference"]["build"] == str(other_build)
    status, out, err = command(*options)
    assert (status, err) == (0, "") and all(name in out for name in evaluation.TEXT_KEYS if name != "kl_max_token")
    # Without a reference, and with fewer tokens.
    status, out, _ = command("--text", str(text_file), "--reference", "none", "--limit", "11", "--json")
    report = json.loads(out)
    assert (status, report["scored_tokens"], report["kl_mean"]) == (0, 10, None)
    assert report["perplexity"] == pytest.approx(model.perplexity([ids[:11]]), rel=1e-7)


def test_tasks_alone(command: Any) -> None:
    """The fake engine knows nothing: what is counted, and what is shown of it."""
    status, out, err = command("--task", "additions", "--task", "reversals", "--samples", "33", "--json")
    report = json.loads(out)
    assert (status, err) == (0, "") and report["perplexity"] is None
    assert list(report["tasks"]) == ["additions", "reversals"]
    tasks = evaluation.load_tasks()
    for name, questions in (
        ("additions", tasks.addition_heldout(33, 1)),
        ("reversals", tasks.reversal_heldout(33, 1)),
    ):
        found = report["tasks"][name]
        assert (found["questions"], found["right"], found["accuracy"]) == (33, 0, 0)
        assert [wrong["question"] for wrong in found["wrong"]] == [task.prompt for task in questions[:10]]
        assert [wrong["expected"] for wrong in found["wrong"]] == [task.answer for task in questions[:10]]
    assert "additions" in command("--task", "additions", "--samples", "2")[1]
    # Another seed asks other questions; no more of them than the trainer does.
    other = json.loads(command("--task", "additions", "--samples", "3", "--seed", "2", "--json")[1])["tasks"][
        "additions"
    ]
    assert other["wrong"][0]["question"] != report["tasks"]["additions"]["wrong"][0]["question"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --text FILE, --task NAME or both, found none"),
        (("--task", "poems"), "invalid choice: 'poems'"),
        (("--task", "additions", "--samples", "0"), "--samples is 0, expected 1 to 4000"),
        (("--task", "additions", "--samples", "4001"), "--samples is 4001, expected 1 to 4000"),
        (("--text", "FILE", "--limit", "1"), "--limit is 1, expected at least 2"),
        (("--text", "no/such.txt"), "no/such.txt: No such file"),
        (("--text", "EMPTY"), "too short: 0 tokens, expected at least 2"),
        (("--text", "LATIN"), "byte 3 is 0xe9, expected UTF-8 text"),
        (("--text", "FILE", "--window", "97"), "window is 97, expected 2 to 96 (the context)"),
        (("--text", "FILE", "--window", "40", "--max-tokens", "30"), "window is 40, expected 2 to 30 (the context)"),
        (("--text", "FILE", "--window", "8", "--stride", "8"), "stride is 8, expected 1 to 7"),
        (("--text", "FILE", "--reference", "f16"), "invalid choice: 'f16'"),
        (("--text", "FILE", "--reference-build", "NOWHERE"), "expected a build folder"),
        (("--text", "FILE", "--dtype", "f32"), "was built for dtype bf16, asked for dtype f32"),
    ],
)
def test_bad_arguments_are_one_line(
    command: Any, tmp_path: Path, text_file: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    names = {
        "FILE": str(text_file),
        "EMPTY": str(tmp_path / "empty.txt"),
        "LATIN": str(tmp_path / "latin.txt"),
        "NOWHERE": str(tmp_path / "nowhere"),
    }
    status, out, err = command(*(names.get(argument, argument) for argument in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err


def test_what_a_checkpoint_may_lack(
    command: Any, fake_library: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = fakes.write_build(
        tmp_path / "silent", fakes.write_checkpoint(tmp_path / "model", tokenizer=False), fake_library
    )
    for option, value in (("--text", str(text_file)), ("--task", "additions")):
        status, out, err = command(option, value, build=silent)
        assert (status, out, err.count("\n")) == (2, "", 1) and "no tokenizer.json" in err
    # A build from an ONNX file whose folder has no configuration.
    bare = fakes.write_checkpoint(tmp_path / "bare")
    (bare / "config.json").unlink()
    status, out, err = command("--text", str(text_file), build=fakes.write_build(tmp_path / "o", bare, fake_library))
    assert (status, out, err.count("\n")) == (2, "", 1) and "--reference-build DIR" in err
    small = dict(fakes.manifest(tmp_path / "model"))["meta"] | {"dvoc": 607}
    other = fakes.write_build(tmp_path / "small", tmp_path / "model", fake_library, meta=small)
    status, out, err = command("--text", str(text_file), "--reference-build", str(other))
    assert (status, out, err.count("\n")) == (2, "", 1) and "has a vocabulary of 607" in err
    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "site" / "runtime" / "eval.py"))
    status, out, err = command("--task", "additions")
    assert (status, out, err.count("\n")) == (2, "", 1) and "run from a clone of the project" in err


def test_progress_on_a_terminal(open_fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for quiet, shown in ((None, True), (True, False)):
        monkeypatch.setattr("sys.stderr", terminal := Terminal())
        evaluate_text(open_fake(), list(range(100)), quiet=quiet)
        assert ("reading the text" in terminal.getvalue()) == shown


# ----------------------------------------------------------------------------------------------------- compiled engines


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with the example's vocabulary and tokenizer."""
    folder = tmp_path_factory.mktemp("random") / "model"
    config = random_config(np.random.default_rng(11), vocab_size=608, num_hidden_layers=2, max_position_embeddings=90)
    write_checkpoint(folder, config, seed=11)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """build_for without the user's cache: each (model, dtype) is built once, in a temporary folder."""
    folder, made = tmp_path_factory.mktemp("builds"), {}

    def build_for(model: Path | str, *, dtype: str | None = None, **_: Any) -> Any:
        key = f"{Path(model).name}-{dtype or 'bf16'}"
        if key not in made:
            made[key] = build_model(model=Path(model), out=folder / key, dtype=dtype)
        return read_build(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("INFINI_ROOT", raising=False)
        patch.setattr("runtime.builds.build_for", build_for)
        yield build_for


def test_a_compiled_model_by_its_definition(random_model: Path, builds: Any) -> None:
    """float32 against the model's own definition in float64; the reference is the engine's bf16 build."""
    config = json.loads((random_model / "config.json").read_text())
    # What the checkpoint holds: the float32 weights rounded to bf16.
    weights = {
        name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in random_weights(config, 11).items()
    }
    with Qwen3ForCausalLM(random_model, dtype="f32") as model, Qwen3ForCausalLM(random_model) as rounded:
        assert model.tokenizer is not None
        ids = model.tokenizer.encode(TEXT)
        found = evaluate_text(model, ids, window=29, stride=12, reference=rounded).summary()
        own, theirs = [], []
        for start, stop, first in windows(len(ids), 29, 12):
            own += list(reference_logits(config, weights, ids[start : stop - 1])[first - 1 - start :])
            theirs += list(rounded.forward([ids[start : stop - 1]])[0][first - 1 - start :])
    expected = by_definition(own, theirs, ids[1:])
    # Logits have size 1 and are right to 1e-5 (float32, two layers), so every log-probability is right to a few 1e-5
    # (bound 1e-4), and a divergence, which is about the square of bf16's 1e-2, to a few 1e-2 * 1e-5 (bound 1e-6).
    for name in ("perplexity", "reference_perplexity", "perplexity_ratio"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    for name in ("kl_mean", "kl_p99", "kl_max"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name
    assert found["kl_max"] > 1e-5
    # One position may be a tie for all that 1e-5 can tell.
    assert found["top1_agreement"] == pytest.approx(expected["top1_agreement"], abs=1.01 / len(own))


def test_precision_shows(random_model: Path, builds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command with its default reference: float32 differs in nothing from itself, bf16 in something."""
    (tmp_path / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    reports = {}
    for dtype in ("f32", "bf16"):
        options = [str(random_model), "--dtype", dtype, "--text", str(tmp_path / "text.txt"), "--json"]
        assert run_cli(evaluation.main, options) == 0
        out, err = capsys.readouterr()
        assert err == ""
        reports[dtype] = json.loads(out)
    f32, bf16 = reports["f32"], reports["bf16"]
    assert f32["settings"]["window"] == 90 and f32["settings"]["stride"] == 45
    assert f32["settings"]["reference"]["dtype"] == bf16["settings"]["reference"]["dtype"] == "f32"
    assert (f32["kl_mean"], f32["kl_max"], f32["top1_agreement"], f32["perplexity_ratio"]) == (0, 0, 1, 1)
    assert f32["perplexity"] == f32["reference_perplexity"] == bf16["reference_perplexity"]
    assert 0 < bf16["kl_mean"] < bf16["kl_max"] and bf16["perplexity"] != f32["perplexity"]
    # bf16 keeps 8 bits; two layers make logits of size 1 wrong by some 1e-2, and divergence goes with the square.
    assert bf16["kl_mean"] < 1e-2
    assert infinicore.is_embedded()


def test_the_reference_uses_the_processs_infinicore(open_fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another InfiniCore than the embedded one is loaded, the reference is built for that, on the same devices."""
    args = argparse.Namespace(
        model=None, build="x", device=None, dtype=None, quant="none", threads=3, max_tokens=50, ndev=2, dev_ids="1,3",
        reference_build=None,
    )  # fmt: skip
    model = open_fake()
    common = dict(threads=3, max_tokens=50, check_weights=False)
    checkpoint = dict(model_dir_path=model.build.checkpoint_folder, dtype="f32")
    monkeypatch.delenv("INFINI_ROOT", raising=False)
    monkeypatch.setattr(infinicore, "is_embedded", lambda: True)
    assert evaluation._reference_arguments(args, model) == {**common, **checkpoint, "device": 0}
    assert "INFINI_ROOT" not in os.environ
    monkeypatch.setattr(infinicore, "is_embedded", lambda: False)
    monkeypatch.setattr(infinicore, "description", lambda: {"infinicore": "/opt/infini"})
    monkeypatch.setattr(os, "environ", environment := dict(os.environ))
    assert evaluation._reference_arguments(args, model) == {
        **common, **checkpoint, "device": 0, "ndev": 2, "dev_ids": [1, 3]
    }  # fmt: skip
    assert environment["INFINI_ROOT"] == "/opt/infini"
    args.reference_build = "other"
    assert evaluation._reference_arguments(args, model) == {**common, "build": "other"}


def test_the_example_adds(builds: Any) -> None:
    with Qwen3ForCausalLM(EXAMPLE) as model:
        found = evaluate_task(model, "additions", 40)
        # 3999 of the trainer's 4000 are right, and these are the first forty of them.
        assert (found["questions"], found["right"], found["accuracy"], found["wrong"]) == (40, 40, 1.0, [])
        assert evaluate_task(model, "carry-chains", 10)["right"] == 10
        # The text that lies beside it, as in the documentation.
        assert len(evaluation.text_tokens(model, (EXAMPLE.parent / "eval_text.txt").read_text("utf-8"))) == 1122

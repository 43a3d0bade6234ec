"""``python -m runtime.eval``: what an engine's precision costs.

Perplexity and KL divergence on a text, right answers on the bundled example's tasks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from runtime import infinicore
from runtime.errors import BuildError, ConfigError, Parser, run_cli
from runtime.generate import add_model_arguments, model_arguments
from runtime.infertask import InferTask, check_tokens
from runtime.kvcache import KVCache
from runtime.qwen3 import Qwen3ForCausalLM
from runtime.structs import DeviceType

_DESCRIPTION = """Measure how well an engine predicts a text (--text), how far its predictions are from those of a
float32 reference of the same checkpoint (--reference), and how many of the bundled example's tasks it gets right
(--task).

The text is cut into windows of --window tokens that advance by --stride. Each token but the text's first is predicted
once, from the tokens before it in the first window that holds it. Natural logarithms, sums in float64.

  perplexity              exp of the mean negative log-likelihood per token: 1 is perfect, the vocabulary's size is what
                          guessing gets, more is being sure of what is wrong
  reference_perplexity    the same of the reference
  perplexity_ratio        perplexity / reference_perplexity
  kl_mean kl_p99 kl_max   KL divergence of the build's next-token distribution from the reference's, in nats: mean, 99th
                          percentile and largest of all positions; 0 is the same distribution
  kl_max_token            which token of the text (from 0) was to be predicted where it is largest
  top1_agreement          share of positions where both have the same likeliest token
  tasks                   per task: questions, greedy answers that are right to the letter, share, first wrong ones

The reference is a second engine in memory: float32 weights take 4 bytes per parameter. --reference none does without.
"""
_EXAMPLES = """examples:
  python -m runtime.eval examples/tiny-qwen3 --text examples/eval_text.txt --task additions
  python -m runtime.eval --build build/cpu --text FILE --reference-build build/other --json
"""

_WINDOW, _SAMPLES, _SEED = 512, 1000, 1  # the seed is the one that the trainer evaluates with
_LOGITS_BYTES = 64 << 20  # at most this much of float32 logits per model at a time
_SLICE_ELEMENTS = 1 << 20  # and so many of them in float64, so that these stay in the caches
_BATCH = 32  # questions at once
_MORE_TOKENS = 8  # than the right answer has: room for an answer that is wrong by being too long
_SHOWN = 10  # wrong answers in the report

# The report's keys about the text.
TEXT_KEYS = (
    "scored_tokens",
    "perplexity",
    "reference_perplexity",
    "perplexity_ratio",
    "kl_mean",
    "kl_p99",
    "kl_max",
    "kl_max_token",
    "top1_agreement",
)

# Of examples/tiny_tasks.py: the function, and how many different questions the trainer takes at most.
_TASKS = {
    "additions": ("addition_heldout", 4000),
    "carry-chains": ("carry_chains_heldout", 1000),
    "reversals": ("reversal_heldout", 1000),
}


# ---------------------------------------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class TextScores:
    """How each token of a text but the first was predicted; entry ``i`` of every array is about token ``i + 1``.

    Attributes:
        loss: float64 [n], -ln of the probability that the model gave the token.
        reference_loss: the same of the reference, or None without one.
        divergence: float64 [n], KL divergence in nats of the model's distribution from the reference's, or None.
        agrees: bool [n], whether both have the same likeliest token, or None.
    """

    loss: np.ndarray
    reference_loss: np.ndarray | None = None
    divergence: np.ndarray | None = None
    agrees: np.ndarray | None = None

    def summary(self) -> dict[str, float | int | None]:
        """The report's numbers; None where there is no reference.

        Perplexity is exp of the mean loss (Jelinek, Mercer, Bahl and Baker, "Perplexity: a measure of the difficulty of
        speech recognition tasks", J. Acoust. Soc. Am. 62, 1977).
        """
        found: dict[str, float | int | None] = dict.fromkeys(TEXT_KEYS)
        found.update(scored_tokens=len(self.loss), perplexity=_exp(self.loss.mean()))
        if self.reference_loss is not None and self.divergence is not None and self.agrees is not None:
            found.update(
                reference_perplexity=_exp(self.reference_loss.mean()),
                perplexity_ratio=_exp((self.loss - self.reference_loss).mean()),
                kl_mean=float(self.divergence.mean()),
                kl_p99=float(np.quantile(self.divergence, 0.99)),
                kl_max=float(self.divergence.max()),
                kl_max_token=int(self.divergence.argmax()) + 1,
                top1_agreement=float(self.agrees.mean()),
            )
        return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """ln of the softmax of every row, float64, from logits of any float dtype [n, V].

    Shifted by the row's largest logit, so that nothing overflows and the sum is at least 1 (Blanchard, Higham and
    Higham, "Accurately computing the log-sum-exp and softmax functions", IMA J. Numer. Anal. 41, 2021).
    """
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def divergence(reference: np.ndarray, model: np.ndarray) -> np.ndarray:
    """KL(reference || model) of every row in nats, float64 [n], from log-probabilities [n, V].

    The sum over the vocabulary of p ln(p / q), p the reference's probability and q the model's: what is lost by using q
    where p is true (Kullback and Leibler, "On information and sufficiency", Ann. Math. Stat. 22, 1951).
    """
    # Never negative but by rounding.
    return np.maximum((np.exp(reference) * (reference - model)).sum(axis=1), 0.0)


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first) of each window: tokens first..stop-1 are predicted in it, from those since start.

    Together the ranges first..stop-1 are 1..count-1, each token once. From the second window on a token has at least
    ``window - stride`` tokens before it (sliding windows, as usual for models with a bounded context).
    """
    start, done = 0, 1
    while done < count:
        stop = min(start + window, count)
        yield start, stop, done
        start, done = start + stride, stop


def evaluate_text(
    model: Qwen3ForCausalLM,
    tokens: Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    reference: Qwen3ForCausalLM | None = None,
    quiet: bool | None = None,
) -> TextScores:
    """Predict every token of a text but the first, and compare with a reference that reads the same.

    Memory does not grow with the text beyond a few numbers per token: logits exist for one piece of a window at a time.

    Args:
        tokens: at least two.
        window: tokens that the model sees at once; default 512, or what text and context have.
        stride: by how much windows advance, less than ``window``; default half of it.
        reference: a model with the same vocabulary.
        quiet: True shows no progress, None shows it on a terminal.

    Raises:
        ConfigError: the text is too short, a setting is out of range, or the vocabularies differ.
        BuildError: logits are not finite; names the build and the token.
    """
    models = [model] if reference is None else [model, reference]
    ids = check_tokens(tokens, model.vocab_size(), "text")
    window, stride = fit_window(len(ids), min(m.max_context_len() for m in models), window, stride)
    if reference is not None and reference.vocab_size() != model.vocab_size():
        raise ConfigError(
            f"{reference.build.folder}: has a vocabulary of {reference.vocab_size()}, "
            f"{model.build.folder} one of {model.vocab_size()}: no reference for it"
        )
    count = len(ids) - 1
    scores = TextScores(np.empty(count))
    if reference is not None:
        scores = TextScores(scores.loss, np.empty(count), np.empty(count), np.empty(count, bool))
    piece = max(1, _LOGITS_BYTES // (4 * model.vocab_size()))
    piece = min(piece, *(m.prefill_chunk for m in models))
    # Both are fed the same pieces: where a prompt is cut may change its logits' last bits.
    with tqdm(total=count, unit="token", desc="reading the text", disable=quiet, leave=False) as bar:
        for start, stop, first in windows(len(ids), window, stride):
            given = ids[start : stop - 1]
            caches = [KVCache(m) for m in models]
            try:
                for at in range(0, len(given), piece):
                    part = given[at : at + piece]
                    rows = range(max(first - 1 - start - at, 0), len(part))
                    # Where only the window's context is read, one row is the least that there is.
                    logits = [
                        m.engine.forward(part, [len(part)], [at], [cache.data()], rows or None)
                        for m, cache in zip(models, caches)
                    ]
                    if rows:
                        _score(models, logits, ids, start + at + rows.start, scores)
                        bar.update(len(rows))
                    del logits  # before the next ones are made
            finally:
                for cache in caches:
                    cache.drop()
    return scores


def _score(
    models: Sequence[Qwen3ForCausalLM], logits: Sequence[np.ndarray], ids: Sequence[int], at: int, scores: TextScores
) -> None:
    """Enter what the logits [n, V] after tokens at.. say about the tokens at+1.. ."""
    for model, values in zip(models, logits):
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            bad = at + int(finite.argmin())
            raise BuildError(
                f"{model.build.folder}: the logits after token {bad} of the text (id {ids[bad]}) are not finite; "
                f"it computes in {model.build.data['dtype']}"
            )
    step = max(1, _SLICE_ELEMENTS // logits[0].shape[1])
    for low in range(0, len(logits[0]), step):
        own = log_softmax(logits[0][low : low + step])
        here = slice(at + low, at + low + len(own))
        chosen = np.arange(len(own)), np.asarray(ids[here.start + 1 : here.stop + 1])
        scores.loss[here] = -own[chosen]
        if scores.reference_loss is None or scores.divergence is None or scores.agrees is None:
            continue
        theirs = log_softmax(logits[1][low : low + step])
        scores.reference_loss[here] = -theirs[chosen]
        scores.divergence[here] = divergence(theirs, own)
        scores.agrees[here] = logits[0][low : low + step].argmax(axis=1) == logits[1][low : low + step].argmax(axis=1)


def fit_window(count: int, context: int, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride for ``count`` tokens: what was asked for, or defaults; ConfigError where that does not fit."""
    if count < 2:
        raise ConfigError(f"text: {count} token, expected at least 2 (each is predicted from those before it)")
    if window is None:
        window = min(_WINDOW, context, count)
    for asked, low, high, what, why in (
        (window, 2, context, "window", "the context"),
        (window, 2, count, "window", "the text's tokens"),
        (window // 2 if stride is None else stride, 1, window - 1, "stride", "less than the window"),
    ):
        if not low <= asked <= high:
            raise ConfigError(f"{what} is {asked}, expected {low} to {high} ({why})")
    return window, window // 2 if stride is None else stride


def text_tokens(model: Qwen3ForCausalLM, text: str, what: str = "text") -> list[int]:
    """The token ids of a text, at least two; ConfigError names it ``what``."""
    if model.tokenizer is None:
        raise ConfigError(f"{what}: found text, and the checkpoint has no tokenizer.json to read it with")
    tokens = model.tokenizer.encode(text)
    if len(tokens) < 2:
        raise ConfigError(f"{what}: too short: {len(tokens)} tokens, expected at least 2")
    return tokens


def _read(file: str) -> str:
    # Not as a text file: its line ends are part of what is predicted.
    data = Path(file).expanduser().read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is {data[error.start]:#04x}, expected UTF-8 text") from None


# ---------------------------------------------------------------------------------------------------------------- tasks


def load_tasks() -> ModuleType:
    """examples/tiny_tasks.py, which defines the example's questions, right answers and held-out split."""
    path = Path(__file__).resolve().parent.parent / "examples" / "tiny_tasks.py"
    if not path.is_file():
        raise ConfigError(
            f"--task: {path} is missing: the tasks are the bundled example's, run from a clone of the project"
        )
    spec = importlib.util.spec_from_file_location("tiny_tasks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def greedy_answers(
    model: Qwen3ForCausalLM, questions: Sequence[str], lengths: Sequence[int], desc: str = "", quiet: bool | None = None
) -> list[str]:
    """The likeliest answer to every question, of at most so many tokens (``lengths``).

    Questions go into the checkpoint's chat template, with thinking off, if it has one.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError("--task: the checkpoint has no tokenizer.json to ask questions with")
    answers = []
    with tqdm(total=len(questions), unit="answer", desc=desc, disable=quiet, leave=False) as bar:
        for first in range(0, len(questions), _BATCH):
            tasks = [
                InferTask(question, model.prompt_tokens(question), length, end_tokens=model.eos_token_ids)
                for question, length in zip(questions[first : first + _BATCH], lengths[first : first + _BATCH])
            ]
            tokens: dict[int, list[int]] = {id(task): [] for task in tasks}
            while running := [task for task in tasks if task.finish_reason is None]:
                for task, token in zip(running, model.batch_infer_one_round(running)):
                    task.next(token, model.max_context_len())
                    if task.finish_reason != "stop":
                        tokens[id(task)].append(token)
            answers += [tokenizer.decode(tokens[id(task)]) for task in tasks]
            bar.update(len(tasks))
    return answers


def evaluate_task(
    model: Qwen3ForCausalLM, name: str, samples: int = _SAMPLES, seed: int = _SEED, quiet: bool | None = None
) -> dict[str, Any]:
    """Ask held-out questions of one of the example's tasks.

    Args:
        name: a key of the tasks: additions, carry-chains, reversals.
        samples: how many different questions; bounded by what the trainer itself takes (4000 sums, 1000 of the others).
        seed: equal seeds draw equal questions, and fewer samples are the first ones of more.

    Returns:
        questions, right, accuracy (0 to 1), and the first wrong ones as {question, answer, expected}.
    """
    tiny_tasks = load_tasks()
    function, most = _TASKS[name]
    tasks = getattr(tiny_tasks, function)(min(samples, most), seed=seed)
    encode = None if model.tokenizer is None else model.tokenizer.encode
    lengths = [len(encode(task.answer)) + _MORE_TOKENS if encode else 1 for task in tasks]
    answers = greedy_answers(model, [task.prompt for task in tasks], lengths, name, quiet)
    wrong = [
        {"question": task.prompt, "answer": answer, "expected": task.answer}
        for answer, task in zip(answers, tasks)
        if not tiny_tasks.exact_match(answer, task)
    ]
    right = len(tasks) - len(wrong)
    return {"questions": len(tasks), "right": right, "accuracy": right / len(tasks), "wrong": wrong[:_SHOWN]}


# -------------------------------------------------------------------------------------------------------------- command


def _reference_arguments(args: argparse.Namespace, model: Qwen3ForCausalLM) -> dict[str, Any]:
    """Arguments of Qwen3ForCausalLM for the reference, which has to use the InfiniCore that this process has."""
    common = dict(threads=args.threads, max_tokens=args.max_tokens, check_weights=False)
    if args.reference_build is not None:
        return dict(common, build=args.reference_build)
    folder = model.build.weights_folder(None if args.model is None else Path(args.model).expanduser())
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: no config.json to build the float32 reference from: give --reference-build DIR, "
            "or --reference none"
        )
    common.update(model_dir_path=folder, dtype="f32")
    if infinicore.is_embedded():
        return dict(common, device=DeviceType.DEVICE_TYPE_CPU)  # also where it plays another device
    os.environ.setdefault("INFINI_ROOT", infinicore.description()["infinicore"])
    own = model_arguments(args)
    return dict(common, device=model.build.data["device"], ndev=own["ndev"], dev_ids=own["dev_ids"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, measure, and return the report."""
    if args.text is None and not args.task:
        raise ConfigError("expected --text FILE, --task NAME or both, found none")
    for name, low, high in (("limit", 2, None), ("samples", 1, max(most for _, most in _TASKS.values()))):
        value = getattr(args, name)
        if value is not None and (value < low or (high is not None and value > high)):
            expected = f"at least {low}" if high is None else f"{low} to {high}"
            raise ConfigError(f"--{name} is {value}, expected {expected}")
    text = None if args.text is None else _read(args.text)
    scores, reference_about = None, None
    with Qwen3ForCausalLM(**model_arguments(args)) as model:
        settings = {"model": str(model.build.source), **_about(model)}
        if text is not None:
            tokens = text_tokens(model, text, args.text)[: args.limit]
            # Before the reference is built and loaded.
            window, stride = fit_window(len(tokens), model.max_context_len(), args.window, args.stride)
            settings.update(text=str(args.text), tokens=len(tokens), window=window, stride=stride)
            if args.reference == "none" and args.reference_build is None:
                scores = evaluate_text(model, tokens, window=window, stride=stride)
            else:
                with Qwen3ForCausalLM(**_reference_arguments(args, model)) as reference:
                    reference_about = _about(reference)
                    scores = evaluate_text(model, tokens, window=window, stride=stride, reference=reference)
        tasks = {name: evaluate_task(model, name, args.samples, args.seed) for name in dict.fromkeys(args.task)}
        settings.update(reference=reference_about, samples=args.samples, seed=args.seed, **infinicore.description())
    numbers = dict.fromkeys(TEXT_KEYS) if scores is None else scores.summary()
    return {**{name: _number(value) for name, value in numbers.items()}, "tasks": tasks, "settings": settings}


def _about(model: Qwen3ForCausalLM) -> dict[str, Any]:
    data = model.build.data
    return {
        "build": str(model.build.folder),
        "target": data["target"],
        "dtype": data["dtype"],
        "quant": data.get("quant", "none"),
    }


def _number(value: float | int | None) -> float | int | None:
    """Eight significant digits; what is not finite is null, because JSON has no word for it."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.8g}")


def _precision(about: dict[str, Any]) -> str:
    return about["dtype"] if about["quant"] == "none" else f"{about['dtype']} {about['quant']}"


def _print_table(report: dict[str, Any]) -> None:
    settings = report["settings"]
    print(f"{settings['model']}  {_precision(settings)}  {settings['target']}")

    def line(name: str, value: str, remark: str = "") -> None:
        print(f"{name:21} {value:>12}  {remark}".rstrip())

    def number(name: str, form: str = ".6g") -> str:
        return "-" if report[name] is None else format(report[name], form)

    if "text" in settings:
        where = f"{settings['text']}, window {settings['window']}, stride {settings['stride']}"
        line("scored_tokens", number("scored_tokens", "d"), where)
        line("perplexity", number("perplexity"))
    if settings["reference"] is not None:
        line("reference_perplexity", number("reference_perplexity"), _precision(settings["reference"]))
        line("perplexity_ratio", number("perplexity_ratio", ".6f"))
        for name in ("kl_mean", "kl_p99", "kl_max"):
            line(name, number(name, ".3e"), f"nats, at token {report['kl_max_token']}" if name == "kl_max" else "nats")
        line("top1_agreement", number("top1_agreement", ".2%"))
    for name, task in report["tasks"].items():
        line(name, f"{task['accuracy']:.2%}", f"{task['right']} of {task['questions']} right")


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m runtime.eval",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    text = parser.add_argument_group("text")
    text.add_argument("--text", metavar="FILE", help="UTF-8 text to predict")
    text.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"tokens seen at once (default: {_WINDOW}, or what text and context have)",
    )
    text.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (default: half a window)")
    text.add_argument("--limit", type=int, metavar="N", help="only the text's first N tokens")
    text.add_argument(
        "--reference",
        choices=("f32", "none"),
        default="f32",
        help="compare with the same checkpoint in float32, built and cached (default), or with nothing",
    )
    text.add_argument("--reference-build", metavar="DIR", help="compare with this build instead, of whatever precision")
    task = parser.add_argument_group("tasks of the bundled example")
    task.add_argument("--task", action="append", default=[], choices=tuple(_TASKS), help="may be given several times")
    task.add_argument(
        "--samples", type=int, default=_SAMPLES, metavar="N", help=f"questions per task (default: {_SAMPLES})"
    )
    task.add_argument(
        "--seed",
        type=int,
        default=_SEED,
        metavar="N",
        help=f"which held-out questions (default: {_SEED}, the trainer's)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    report = run(args := parser.parse_args(argv))
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _print_table(report)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""The built engine against onnxruntime, step by step, and the bounds that say what may differ.

Both sides get the same tokens at every step (onnxruntime's own greedy ones), so that a difference does not grow into another text. One step is right when the
relative L2 error of its logits is within the bound of the engine's dtype:

- f32: 1e-5 for models of up to 8 layers, 1e-4 for deeper ones: both sides sum in float32, in another order.
- f16, bf16: twice the error that rounding weights and activations to that dtype makes in the reference itself. It is measured: the graph of the build's
  InfiniCore calls is interpreted in that dtype and in float32, on the tokens that are compared. (That graph and not the one before legalisation, because it
  says which activations there are: attention by gemm, causal_softmax and gemm has scores and weights of its own, as the ONNX graph does; paged attention has
  none.) In float32 it has to agree with onnxruntime, so a wrong graph cannot widen the bound.

A token that differs is AMBIGUOUS rather than wrong when the reference itself hardly prefers its own (see ``near_tie``).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from codegen.build import from_checkpoint, from_onnx
from codegen.rounding import Compiled, measure_rounding
from codegen.verdict import FAIL, Bound, Step, bound_of, judge, verdict_of
from frontend.config import load_config
from frontend.export import export
from frontend.ort import Past, Reference
from ir.errors import BuildError, CheckpointError, ConfigError, GraphError
from ir.types import DTYPES
from passes.lower import to_model
from passes.targets import Target, target_of
from runtime import infinicore
from runtime.generation import schedule
from runtime.infertask import check_tokens
from runtime.manifest import Build, read_build
from runtime.qwen3 import Qwen3ForCausalLM, device_numbers
from runtime.tokenizer import Tokenizer

STEPS = 16
# Default prompts: one token (a prefill that looks like a decode step), a few, and enough to fill two blocks of a paged cache; with the steps after them every one
# crosses the end of a block.
PROMPT_LENGTHS = (1, 7, 33)
# One position's error may be small by chance: where fewer are compared, rounding is measured on the default prompts as well.
ROUNDING_POSITIONS = sum(PROMPT_LENGTHS)
# onnxruntime gives logits for every position: long prompts go in pieces, or they alone would take gigabytes.
REFERENCE_PIECE = 256

_REFERENCE_DTYPES = {"tensor(float16)": "f16", "tensor(bfloat16)": "bf16"}


@dataclass
class Report:
    """All that verify() found."""

    build: str
    target: str
    dtype: str
    kv: str
    reference: str
    weights: str
    steps: int
    bound: Bound
    prompts: list[list[int]]
    results: list[list[Step]]
    verdict: str = ""
    reason: str = ""
    graph_relative_l2: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; what is not finite is null."""
        return _plain(asdict(self))


@dataclass(frozen=True)
class Sizes:
    """What of the manifest is needed here."""

    target: str
    record: Target
    dtype: str
    kv: str
    layers: int
    vocabulary: int
    context: int
    source: Path
    is_onnx: bool
    weights_folder: Path
    config_only: bool
    meta: Mapping[str, Any]


def verify(
    out: str | Path,
    *,
    model: str | Path | None = None,
    text: str | None = None,
    tokens: Sequence[int] | None = None,
    steps: int = STEPS,
    ndev: int = 1,
    dev_ids: Sequence[int] | None = None,
    progress: Callable[[str], Any] | None = None,
) -> Report:
    """Compare a build with onnxruntime.

    Args:
        out: the build folder.
        model: a checkpoint folder to compare with; default: what the build was made from. The engine takes its weights from where the build says; from
            ``model`` only if there are none.
        text, tokens: one prompt, as text for the checkpoint's tokenizer or as token ids; default: a few random ones.
        steps: greedy tokens after each prompt.
        ndev: devices that share the engine's model.
        dev_ids: which devices, ``ndev`` different numbers; default: 0, 1, ...
        progress: called with a line per stage.

    Raises:
        Qwen3Error: the build cannot run here, its checkpoint is gone or another one, or the prompt does not fit.
    """
    say = progress or (lambda line: None)
    build = read_build(out)
    sizes = sizes_of(build)
    device = build.data["device"]
    build.library  # noqa: B018 - says what is missing, before the work
    chosen = None if model is None else Path(model)
    reference_folder, engine_folder = _folders(build, sizes, chosen)
    prompts = make_prompts(sizes, build, chosen, text, tokens, steps)
    if ndev < 1:
        raise ConfigError(f"--ndev {ndev}: expected at least 1")
    ids = device_numbers(ndev, dev_ids)
    infinicore.check_devices(infinicore.load(build.data, ndev=ndev, device_id=ids[0]), build.data, ids)
    seconds: dict[str, float] = {}

    def timed(name: str, line: str) -> Callable[[], None]:
        say(line)
        started = time.monotonic()
        return lambda: seconds.update({name: round(time.monotonic() - started, 3)})

    done = timed("reference", "running onnxruntime")
    with tempfile.TemporaryDirectory(prefix="qwen3-verify-") as folder:
        reference = _open_reference(sizes, chosen, reference_folder, Path(folder) / "model.onnx")
        expected = [run_reference(reference, prompt, steps) for prompt in prompts]
        rounds_to = _REFERENCE_DTYPES.get(reference.session.get_outputs()[0].type)
        del reference  # its float32 weights: the engine may need the memory
    done()
    vocabulary = expected[0].shape[1]
    if vocabulary != sizes.vocabulary:
        raise ConfigError(
            f"{reference_folder}: has a vocabulary of {vocabulary}, {out} was built for {sizes.vocabulary}"
        )
    greedy = [[int(row.argmax()) for row in rows[:steps]] for rows in expected]
    done = timed("engine", "running the engine")
    with Qwen3ForCausalLM(engine_folder, device=device, build=build.folder, ndev=ndev, dev_ids=ids) as engine:
        found, choices = run_engine(engine, prompts, greedy)
    done()
    dtypes = tuple(d for d in (sizes.dtype, rounds_to) if d is not None and d != "f32")
    sequences = [prompt + rest for prompt, rest in zip(prompts, greedy)]
    rounding, graph_error = None, None
    if dtypes:
        more = default_prompts(sizes, 0) if sum(map(len, sequences)) < ROUNDING_POSITIONS else []
        done = timed("rounding", f"measuring what rounding to {' and '.join(dtypes)} does")
        rounding, graph_error = measure_rounding(
            _compiled(sizes, chosen), reference_folder, sequences, expected, dtypes, more
        )
        done()
    bound = bound_of(sizes.layers, rounding)
    results = [
        [judge(s, len(prompt) - 1 + s, found[p][s], expected[p][s], choices[p][s], bound) for s in range(steps + 1)]
        for p, prompt in enumerate(prompts)
    ]
    report = Report(
        build=str(build.folder),
        target=build.data["target"],
        dtype=sizes.dtype,
        kv=sizes.kv,
        reference=str(reference_folder if chosen is not None or not sizes.is_onnx else sizes.source),
        weights=str(engine_folder or sizes.weights_folder),
        steps=steps,
        bound=bound,
        prompts=prompts,
        results=results,
        seconds=seconds,
    )
    report.verdict = verdict_of(results)
    if report.verdict == FAIL and graph_error is None:
        say("looking for the side that is wrong")
        _, graph_error = measure_rounding(_compiled(sizes, chosen), reference_folder, sequences, expected, ())
    report.graph_relative_l2 = graph_error
    limit = bound_of(sizes.layers, None).relative_l2 or 0.0
    if rounds_to in DTYPES and bound.relative_l2 is not None:
        limit += bound.relative_l2  # the reference is no better than that
    graph_agrees = graph_error is None or math.isnan(graph_error) or graph_error <= limit
    if not graph_agrees:
        report.verdict = FAIL  # what was measured is not the reference's rounding
    report.reason = _reason(report, graph_agrees)
    return report


# --- verdicts -------------------------------------------------------------------------------------------------------------------------------------


def _reason(report: Report, graph_agrees: bool) -> str:
    """One line that says what the verdict rests on."""
    steps = [step for row in report.results for step in row]
    differ = [s for s in steps if s.engine_token != s.reference_token]
    worst = max((s.relative_l2 for s in steps), key=lambda e: math.inf if math.isnan(e) else e)
    limit = "none" if report.bound.relative_l2 is None else f"{report.bound.relative_l2:.2e}"
    if report.verdict != FAIL:
        tokens = (
            f"all {len(steps)} tokens equal"
            if not differ
            else f"{len(differ)} of {len(steps)} tokens differ, where the reference hardly prefers its own"
        )
        return f"{tokens}, relative L2 at most {worst:.2e} (bound {limit})"
    failed = [(p, s) for p, row in enumerate(report.results) for s in row if s.verdict == FAIL]
    if not failed:
        return _whose_fault(report.graph_relative_l2, graph_agrees)
    p, first = failed[0]
    where = f"prompt {p}, step {first.step} (position {first.position})"
    if report.bound.relative_l2 is None:
        what = f"{report.bound.why}: build it in bf16 or f32"
        return f"{where}: {what}"
    if math.isnan(first.relative_l2):
        what = "the engine's logits are not finite"
    elif first.relative_l2 > report.bound.relative_l2:
        what = f"relative L2 {first.relative_l2:.2e}, bound {limit}"
    else:
        what = f"token {first.engine_token} instead of {first.reference_token}, which the reference prefers by {first.margin:.3g} (near-tie up to {first.near_tie:.3g})"
    return f"{where}: {what}; {_whose_fault(report.graph_relative_l2, graph_agrees)}"


def _whose_fault(graph_error: float | None, agrees: bool) -> str:
    if graph_error is None or math.isnan(graph_error):
        return "the compiled graph was not compared"
    if agrees:
        return f"the graph of its calls agrees with onnxruntime ({graph_error:.1e}): look at the weights, the emitted code and InfiniCore"
    return f"the graph of its calls differs from onnxruntime ({graph_error:.1e}): look at the import and the passes"


# --- what is compared -----------------------------------------------------------------------------------------------------------------------------


def sizes_of(build: Build) -> Sizes:
    """Raises BuildError where the manifest lacks something."""
    data = build.data
    try:
        meta, model = data["meta"], data["model"]
        return Sizes(
            target=data["target"],
            record=target_of(data["capabilities"]),
            dtype=data["dtype"],
            kv=data["kv"]["form"],
            layers=int(meta["nlayer"]),
            vocabulary=int(meta["dvoc"]),
            context=int(meta["dctx"]),
            source=Path(model["source"]["path"]),
            is_onnx=model["source"]["kind"] == "onnx",
            weights_folder=Path(model["weights_folder"]),
            config_only=bool(model["config_only"]),
            meta=meta,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BuildError(f"{build.folder / 'manifest.json'}: {error} is missing or malformed; build it again") from None


def _folders(build: Build, sizes: Sizes, model: Path | None) -> tuple[Path, Path | None]:
    """Where the reference's weights lie, and the folder that the engine is told to take its own from (None: where the build says)."""
    own = sizes.weights_folder.is_dir() and not sizes.config_only
    if model is not None:
        _check_model(model, sizes, build)
        return model, None if own else model
    if sizes.config_only:
        raise BuildError(
            f"{build.folder}: was compiled from a configuration alone (--config-only), so it has no weights; give a checkpoint with --model"
        )
    if not own or not sizes.source.exists():
        missing = sizes.weights_folder if not own else sizes.source
        raise CheckpointError(
            f"{missing}: {build.folder} was built from it, but it is not there; give a checkpoint with --model"
        )
    return sizes.weights_folder, None


def _check_model(model: Path, sizes: Sizes, build: Build) -> None:
    """A checkpoint of other sizes cannot be what was compiled."""
    config = load_config(model)
    fields = dict(
        nlayer="num_hidden_layers",
        d="hidden_size",
        nh="num_attention_heads",
        nkvh="num_key_value_heads",
        dh="head_dim",
        di="intermediate_size",
        dvoc="vocab_size",
    )
    for name, hugging_face in fields.items():
        has, wanted = getattr(config, hugging_face), sizes.meta.get(name)
        if has != wanted:
            raise ConfigError(f"{model}: has {hugging_face} {has}, {build.folder} was built for {wanted}")


def make_prompts(
    sizes: Sizes,
    build: Build,
    model: Path | None,
    text: str | None,
    tokens: Sequence[int] | None,
    steps: int,
) -> list[list[int]]:
    """The prompts' token ids, checked against vocabulary and context.

    Raises:
        ConfigError: both a text and tokens, a token outside the vocabulary, or more than the context holds.
    """
    if text is not None and tokens is not None:
        raise ConfigError("--prompt and --tokens: found both, expected one of them")
    if steps < 0:
        raise ConfigError(f"--steps {steps}: expected 0 or more")
    if steps + 1 > sizes.context:
        raise ConfigError(
            f"--steps {steps}: the build has a context of {sizes.context} tokens, expected at most {sizes.context - 1}"
        )
    if text is None and tokens is None:
        return default_prompts(sizes, steps)
    if tokens is not None:
        option, ids = "--tokens", list(tokens)
    else:
        option, ids = "--prompt", _encode(text or "", [model, build.checkpoint_folder, sizes.weights_folder])
    ids = check_tokens(ids, sizes.vocabulary, option)
    if len(ids) + steps > sizes.context:
        raise ConfigError(
            f"{option}: {len(ids)} tokens and {steps} steps, expected at most {sizes.context} together, the build's context"
        )
    return [ids]


def default_prompts(sizes: Sizes, steps: int) -> list[list[int]]:
    """Random prompts of PROMPT_LENGTHS tokens, or what of it the context holds beside ``steps``."""
    lengths = sorted({min(n, sizes.context - steps) for n in PROMPT_LENGTHS})
    return [spread_tokens(n, sizes.vocabulary, seed) for seed, n in enumerate(lengths)]


def _encode(text: str, folders: Sequence[Path | None]) -> list[int]:
    for folder in folders:
        tokenizer = Tokenizer.find(folder)
        if tokenizer is not None:
            return tokenizer.encode(text)
    places = " or ".join(str(f) for f in dict.fromkeys(folders) if f is not None)
    raise ConfigError(f"--prompt: there is no tokenizer.json in {places}; give --tokens instead")


def spread_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    """Random ids, one from each of ``count`` equal parts of the vocabulary, shuffled."""
    rng = np.random.default_rng(seed)
    starts = np.arange(count) * vocabulary // count
    ends = np.maximum((np.arange(count) + 1) * vocabulary // count, starts + 1)
    return rng.permutation(rng.integers(starts, ends)).tolist()


# --- the two sides --------------------------------------------------------------------------------------------------------------------------------


def _open_reference(sizes: Sizes, model: Path | None, folder: Path, temporary: Path) -> Reference:
    if model is None and sizes.is_onnx:
        return Reference(sizes.source)
    export(folder, temporary, opset=18)
    return Reference(temporary, folder)


def run_reference(reference: Reference, prompt: Sequence[int], steps: int) -> np.ndarray:
    """Logits after the prompt and after each of ``steps`` greedy tokens, [steps + 1, V]; a token is the argmax of the row before it.

    Raises:
        GraphError: they are not finite.
    """
    rows: list[np.ndarray] = []
    past: Past | None = None
    tokens = list(prompt)
    if reference.past_names:
        for start in range(0, len(tokens), REFERENCE_PIECE):
            logits, past = reference.logits(tokens[start : start + REFERENCE_PIECE], past)
        rows.append(logits[-1].copy())
        while len(rows) <= steps:
            logits, past = reference.logits([int(rows[-1].argmax())], past)
            rows.append(logits[-1].copy())
    else:
        while len(rows) <= steps:
            rows.append(reference.logits(tokens)[0][-1].copy())
            tokens.append(int(rows[-1].argmax()))
    if not all(np.isfinite(row).all() for row in rows):
        raise GraphError(f"{reference.path}: onnxruntime's logits are not finite, so there is nothing to compare with")
    return np.stack(rows)


def run_engine(
    model: Qwen3ForCausalLM, prompts: Sequence[Sequence[int]], given: Sequence[Sequence[int]]
) -> tuple[np.ndarray, list[list[int]]]:
    """All prompts as one ragged batch, then one token each per step.

    Args:
        given: [prompts][steps] the tokens that are fed.

    Returns:
        logits [prompts, steps + 1, V], and the tokens that the engine itself takes at each step, [prompts][steps + 1]. They come from a second call that
        computes the step's last token once more, over the cache's last entry.
    """
    engine, count, steps = model.engine, len(prompts), len(given[0])
    lengths = [len(p) for p in prompts]
    logits = np.empty((count, steps + 1, model.vocab_size()), np.float32)
    choices: list[list[int]] = [[] for _ in prompts]
    caches: list[int] = []
    try:
        for length in lengths:
            caches.append(model.create_kv_cache(length + steps))
        for pieces in schedule(lengths, model.prefill_chunk):
            batch = [t for i, start, stop in pieces for t in prompts[i][start:stop]]
            rows = engine.forward(
                batch, [b - a for _, a, b in pieces], [a for _, a, _ in pieces], [caches[i] for i, _, _ in pieces]
            )
            for row, (i, _, stop) in zip(rows, pieces):
                if stop == lengths[i]:
                    logits[i, 0] = row
        last = [p[-1] for p in prompts]
        for step in range(steps + 1):
            ones, positions = [1] * count, [n - 1 + step for n in lengths]
            if step:
                last = [tokens[step - 1] for tokens in given]
                logits[:, step] = engine.forward(last, ones, positions, caches)
            for tokens, token in zip(
                choices, engine.infer(last, ones, positions, caches, [1.0] * count, ones, [1.0] * count, [0.0] * count)
            ):
                tokens.append(int(token))
    finally:
        for cache in caches:
            engine.drop_cache(cache)
    return logits, choices


def _compiled(sizes: Sizes, model: Path | None) -> Compiled:
    """What the build was made of, imported again."""
    if sizes.is_onnx and model is None:
        source = from_onnx(sizes.source)
    else:
        source = from_checkpoint(model or sizes.source, config_only=False)
    return Compiled(to_model(source.graph), sizes.record, sizes.kv)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value

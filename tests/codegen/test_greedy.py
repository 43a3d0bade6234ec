"""The bundled example through compiled engines: greedy text like onnxruntime's, and sums that it never saw in training."""

from __future__ import annotations

import sys
from functools import lru_cache

import numpy as np
import pytest

from frontend.ort import Reference
from runtime.engine import Engine
from runtime.qwen3 import Qwen3ForCausalLM
from tests.codegen.engines import EXAMPLE, Builder

sys.path.insert(0, str(EXAMPLE.parent))
from tiny_tasks import accuracy, addition_heldout  # noqa: E402

STEPS = 200
CONTEXTS = {"embedded": dict(infinicore="embedded"), "any": dict(infinicore="any")}


def feed_whole(engine: Engine, cache: int, tokens: list[int]) -> np.ndarray:
    return engine.forward(tokens, [len(tokens)], [0], [cache])[0]


def feed_pieces(engine: Engine, cache: int, tokens: list[int]) -> np.ndarray:
    start, row = 0, None
    for stop in (1, 6, 15, len(tokens)):
        stop = min(stop, len(tokens))
        if stop > start:
            row = engine.forward(tokens[start:stop], [stop - start], [start], [cache])[0]
            start = stop
    assert row is not None
    return row


def feed_tokens(engine: Engine, cache: int, tokens: list[int]) -> np.ndarray:
    row = None
    for position, token in enumerate(tokens):
        row = engine.forward([token], [1], [position], [cache])[0]
    assert row is not None
    return row


FEEDS = {"whole": feed_whole, "pieces": feed_pieces, "tokens": feed_tokens}


@lru_cache(maxsize=None)
def reference_run(reference: Reference, prompt: tuple[int, ...]) -> tuple[list[int], np.ndarray]:
    """What onnxruntime generates greedily, and its logits [STEPS, vocabulary]."""
    tokens, rows, past, pending = [], [], None, list(prompt)
    for _ in range(STEPS):
        logits, past = reference.logits(pending, past)
        rows.append(logits[-1])
        pending = [int(logits[-1].argmax())]
        tokens += pending
    return tokens, np.stack(rows)


@pytest.mark.parametrize("how", FEEDS)
@pytest.mark.parametrize("infinicore", CONTEXTS)
def test_greedy_text_equals_onnxruntimes(build_engine: Builder, infinicore: str, how: str) -> None:
    """Every token is onnxruntime's, but for near ties: there the engine goes on with onnxruntime's token, and its own must be a true rival.

    Logits differ by the rounding of float32 sums; where the largest difference in a row is e, two tokens can change places only if they lie within 2 e of each
    other. e itself has a bound: 1e-5 of the row's norm (test_engine.py), of which one element may have all.
    """
    reference = build_engine.reference(EXAMPLE)
    with Qwen3ForCausalLM(build=build_engine(EXAMPLE, dtype="f32", **CONTEXTS[infinicore])) as model:
        engine = model.engine
        prompt = tuple(model.prompt_tokens("123+456="))
        expected, logits = reference_run(reference, prompt)
        cache = engine.create_cache(0)
        row, ties = FEEDS[how](engine, cache, list(prompt)), 0
        for step, token in enumerate(expected):
            error = float(np.abs(row - logits[step]).max())
            assert error <= 1e-5 * float(np.linalg.norm(logits[step])), step
            chosen = int(row.argmax())
            if chosen != token:
                assert logits[step][token] - logits[step][chosen] <= 2 * error, step
                ties += 1
            if step + 1 < STEPS:
                row = engine.forward([token], [1], [len(prompt) + step], [cache])[0]
        assert ties <= STEPS // 50


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_the_example_adds(build_engine: Builder, dtype: str) -> None:
    """At least 99 of 100 sums that were held back from training, in every dtype."""
    tasks = addition_heldout(500)
    with Qwen3ForCausalLM(build=build_engine(EXAMPLE, dtype=dtype)) as model:
        answers: list[str] = []
        for start in range(0, len(tasks), 125):  # batches of 125 requests
            answers += answer(model, [t.prompt for t in tasks[start : start + 125]])
    assert accuracy(answers, tasks) >= 0.99


def answer(model: Qwen3ForCausalLM, prompts: list[str]) -> list[str]:
    """Greedy answers in chat form, all prompts in one batch."""
    assert model.tokenizer is not None
    engine = model.engine
    ids = [model.prompt_tokens(p) for p in prompts]
    caches = [engine.create_cache(len(i) + 8) for i in ids]
    said: list[list[int]] = [[] for _ in prompts]
    active, pending, position = list(range(len(prompts))), ids, [0] * len(prompts)
    for _ in range(16):
        lengths = [len(pending[r]) for r in active]
        flat = [token for r in active for token in pending[r]]
        n = len(active)
        tokens = engine.infer(
            flat,
            lengths,
            [position[r] for r in active],
            [caches[r] for r in active],
            [1.0] * n,
            [1] * n,
            [1.0] * n,
            [0.5] * n,
        )
        for r, length, token in zip(active, lengths, tokens.tolist()):
            position[r] += length
            pending[r] = [token]
            said[r].append(token)
        active = [r for r in active if said[r][-1] not in model.eos_token_ids]
        if not active:
            break
    for cache in caches:
        engine.drop_cache(cache)
    return [model.tokenizer.decode([t for t in tokens if t not in model.eos_token_ids]) for tokens in said]

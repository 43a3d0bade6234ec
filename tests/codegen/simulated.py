"""Builds for the device simulator, and the comparison of their engines with onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frontend.ort import Reference
from runtime import infinicore
from runtime.engine import Engine, load_library
from runtime.manifest import read_build
from runtime.weights import Qwen3WeightsImpl, meta_from_manifest
from tests.codegen.engines import Builder
from tests.models import relative_l2

EXACT = 1e-5  # see tests/codegen/test_engine.py

# Sizes that four devices can share, heads as large as paged attention takes them everywhere, an inner size that is a multiple of 8 on each of four devices, and no two alike.
MODEL: dict[str, Any] = dict(
    vocab_size=212,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=160,
    max_position_embeddings=160,
    tie_word_embeddings=True,
)

# (tokens in the cache, new ones): prefill, pieces and decode, in no order; starts and ends on and beside the edges of blocks.
RAGGED = ((0, 7), (5, 1), (16, 4), (31, 1), (0, 1), (15, 2), (32, 1), (3, 30))


def config() -> dict[str, Any]:
    from tests.models import random_config

    return random_config(np.random.default_rng(0), **MODEL)


def build_all(builder: Builder, options: Sequence[dict[str, Any]]) -> dict[str, Path]:
    """Builds of MODEL by ``TARGET-DTYPE-KV``, two at a time: most of the time is the compiler's."""
    checkpoint = builder.checkpoint(config())

    def build(some: dict[str, Any]) -> Path:
        return builder(checkpoint, simulate=True, optimise=False, **some)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(build, options))
    return {"-".join(str(o[k]) for k in ("target", "dtype", "kv")): path for o, path in zip(options, found)}


@dataclass
class Simulated:
    """An open engine on simulated devices."""

    engine: Engine
    reference: Reference
    bound: float

    def tokens(self, n: int, seed: int) -> np.ndarray:
        return np.random.default_rng([seed, n]).integers(0, self.engine.meta.dvoc, n)

    def expected(self, tokens: np.ndarray) -> np.ndarray:
        return self.reference.logits(tokens)[0]


def open_simulated(build: Path, reference: Reference, bound: float, ndev: int = 1) -> Simulated:
    found = read_build(build)
    infinicore.load(found.data, ndev=ndev)
    weights = Qwen3WeightsImpl.from_manifest(found, None, ndev, False)
    # Not the first devices, and not in order: numbers are the caller's.
    ids = [5, 2, 7, 3][:ndev] if ndev > 1 else [0]
    meta = meta_from_manifest(found, None)
    return Simulated(Engine(load_library(found.library), meta, weights, found.data["device"], ids), reference, bound)


def compare(s: Simulated) -> float:
    """Prefill, ragged batches of everything, greedy decode: the largest relative L2 error. Fails where it is beyond the bound.

    In float32 each batch's logits have the bound; in half precision a few positions say little, and all those of steps that make one row per request are taken together.
    """
    worst = 0.0
    few: list[tuple[np.ndarray, np.ndarray]] = []

    def check(found: np.ndarray, expected: np.ndarray, what: str) -> None:
        nonlocal worst
        if s.bound > EXACT and len(found) < 40:
            few.append((found, expected))
            return
        error = relative_l2(found, expected)
        worst = max(worst, error)
        assert error <= s.bound, f"{what}: relative L2 {error:.2e}, bound {s.bound:.2e}"

    e = s.engine
    ids = [s.tokens(start + new, i) for i, (start, new) in enumerate(RAGGED)]
    wanted = [s.expected(tokens) for tokens in ids]
    caches = [e.create_cache(0) for _ in RAGGED]
    # Prefill: what each has in its cache already, all at once; several logits of each.
    have = [i for i, (start, _) in enumerate(RAGGED) if start]
    flat = np.concatenate([ids[i][: RAGGED[i][0]] for i in have])
    rows = e.forward(flat, [RAGGED[i][0] for i in have], [0] * len(have), [caches[i] for i in have], range(len(flat)))
    check(rows, np.concatenate([wanted[i][: RAGGED[i][0]] for i in have]), "prefill")
    # A ragged batch that mixes prompts, pieces of prompts and single tokens.
    flat = np.concatenate([tokens[start:] for (start, _), tokens in zip(RAGGED, ids)])
    rows = e.forward(flat, [n for _, n in RAGGED], [start for start, _ in RAGGED], caches, range(len(flat)))
    check(rows, np.concatenate([w[start:] for (start, _), w in zip(RAGGED, wanted)]), "mixed ragged batch")
    # Decode: the same shape again and again (a captured graph where the device has them), then fewer requests, then with a prompt among them.
    for step in range(4):
        new = [int(t) for t in s.tokens(len(ids), 100 + step)]
        ids = [np.append(tokens, t) for tokens, t in zip(ids, new)]
        logits = e.forward(new, [1] * len(ids), [len(tokens) - 1 for tokens in ids], caches)
        check(logits, np.stack([s.expected(tokens)[-1] for tokens in ids]), f"decode step {step}")
    for step in range(3):
        new = [int(t) for t in s.tokens(3, 200 + step)]
        ids[:3] = [np.append(tokens, t) for tokens, t in zip(ids[:3], new)]
        logits = e.forward(new, [1] * 3, [len(tokens) - 1 for tokens in ids[:3]], caches[:3])
        check(logits, np.stack([s.expected(tokens)[-1] for tokens in ids[:3]]), f"decode of three, step {step}")
    fresh, prompt = e.create_cache(0), s.tokens(19, 9)
    logits = e.forward([*prompt, 5], [19, 1], [0, len(ids[0])], [fresh, caches[0]])
    check(logits, np.stack([s.expected(prompt)[-1], s.expected(np.append(ids[0], 5))[-1]]), "decode beside a prompt")
    # A prompt that needs more scratch memory than anything before it: what was captured points to memory that is gone.
    ids[0] = np.append(ids[0], 5)
    long, large = s.tokens(150, 10), e.create_cache(0)
    check(e.forward(long, [150], [0], [large]), s.expected(long)[-1:], "long prompt")
    new = [int(t) for t in s.tokens(3, 300)]
    ids[:3] = [np.append(tokens, t) for tokens, t in zip(ids[:3], new)]
    logits = e.forward(new, [1] * 3, [len(tokens) - 1 for tokens in ids[:3]], caches[:3])
    check(logits, np.stack([s.expected(tokens)[-1] for tokens in ids[:3]]), "decode after a long prompt")
    for cache in [*caches, fresh, large]:
        e.drop_cache(cache)
    if few:
        assert sum(len(found) for found, _ in few) >= 40
        check(np.concatenate([f for f, _ in few]), np.concatenate([x for _, x in few]), "decode steps")
    return worst

"""Builds for the device simulator, and the comparison of their engines with onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from codegen.build import from_checkpoint
from codegen.rounding import Compiled, interpret, relative_errors
from frontend.ort import Reference
from passes.lower import to_model
from passes.targets import targets
from runtime import infinicore
from runtime.engine import Engine, load_library
from runtime.manifest import read_build
from runtime.weights import Qwen3WeightsImpl, meta_from_manifest
from tests.codegen.engines import Builder
from tests.codegen.test_engine import EXACT, PROMPTS, rounding_error
from tests.models import relative_l2

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


# Not the first devices, and not in order: numbers are the caller's.
DEVICE_IDS = (5, 2, 7, 3)


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


@dataclass(frozen=True)
class Bounds:
    """What may differ from onnxruntime, as relative L2: of many rows of logits together, and of any one row."""

    pooled: float
    row: float


# Rounding is measured on this many draws of prompts of all PROMPTS: 536 positions, more than a comparison has rows, so that the worst of them says what the worst row may be.
DRAWS = 4
FEW = 40  # rows: see Comparison


@lru_cache(maxsize=None)
def bounds_of(builder: Builder, target: str, dtype: str, kv: str) -> Bounds:
    """In float32 sums in another order (see test_engine.EXACT), of all rows as of one. In half precision twice what rounding alone does (see test_engine.bounds).

    Of many rows it is the error of rounding each result of the fused graph once. A single row's error is spread around that, by up to twice as much, and more where
    attention has scores of its own to round: so a row's bound is the largest error of any one position, in the graph of the build's own calls, as codegen.verify has it.
    """
    if dtype == "f32":
        return Bounds(EXACT, EXACT)
    checkpoint = builder.checkpoint(config())
    reference = builder.reference(checkpoint)
    graph = to_model(from_checkpoint(checkpoint, config_only=False).graph)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, MODEL["vocab_size"], n) for n in PROMPTS * DRAWS]
    rounded = interpret(Compiled(graph, targets()[target], kv).calls(dtype, max(PROMPTS)), checkpoint, prompts)
    worst = max(relative_errors(r, reference.logits(p)[0]).max() for r, p in zip(rounded, prompts))
    return Bounds(2 * rounding_error(builder, checkpoint, reference, dtype), 2 * float(worst))


@dataclass
class Comparison:
    """Rows of logits against the reference's: each within the bound of a row, and many together within the bound of many.

    In half precision a few rows say little: those of steps with fewer than FEW are taken together, by finish().
    """

    bounds: Bounds
    worst: float = 0.0
    few: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def check(self, found: np.ndarray, expected: np.ndarray, what: str) -> None:
        """Two arrays [rows, V] of one step; ``what`` names it."""
        errors = relative_errors(found, expected)
        row = int(np.argmax(np.where(np.isnan(errors), np.inf, errors)))
        assert errors[row] <= self.bounds.row, (
            f"{what}, row {row} of {len(errors)}: relative L2 {errors[row]:.2e}, bound {self.bounds.row:.2e}"
        )
        if self.bounds.pooled > EXACT and len(found) < FEW:
            self.few.append((found, expected))
        else:
            self._pooled(found, expected, what)

    def finish(self) -> float:
        """The largest relative L2 error of many rows together."""
        if self.few:
            assert sum(len(found) for found, _ in self.few) >= FEW
            found, expected = (np.concatenate(rows) for rows in zip(*self.few))
            self._pooled(found, expected, "all steps of few rows")
        return self.worst

    def _pooled(self, found: np.ndarray, expected: np.ndarray, what: str) -> None:
        error = relative_l2(found, expected)
        self.worst = max(self.worst, error)
        assert error <= self.bounds.pooled, (
            f"{what}, {len(found)} rows: relative L2 {error:.2e}, bound {self.bounds.pooled:.2e}"
        )


@dataclass
class Simulated:
    """An open engine on simulated devices."""

    engine: Engine
    reference: Reference
    bounds: Bounds

    def tokens(self, n: int, seed: int) -> np.ndarray:
        return np.random.default_rng([seed, n]).integers(0, self.engine.meta.dvoc, n)

    def expected(self, tokens: np.ndarray) -> np.ndarray:
        return self.reference.logits(tokens)[0]


def open_simulated(build: Path, reference: Reference, bounds: Bounds, ndev: int = 1) -> Simulated:
    found = read_build(build)
    infinicore.load(found.data, ndev=ndev)
    weights = Qwen3WeightsImpl.from_manifest(found, None, ndev, False)
    ids = DEVICE_IDS[:ndev] if ndev > 1 else [0]
    meta = meta_from_manifest(found, None)
    return Simulated(Engine(load_library(found.library), meta, weights, found.data["device"], ids), reference, bounds)


def compare(s: Simulated) -> float:
    """Prefill, ragged batches of everything, greedy decode: the largest relative L2 error of many rows. Fails where anything is beyond its bound: see Comparison."""
    comparison = Comparison(s.bounds)
    check = comparison.check
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
    return comparison.finish()

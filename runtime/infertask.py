"""One request: its tokens, its sampling settings, where it stands in its KV cache."""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np

from runtime.errors import ConfigError
from runtime.kvcache import KVCache

MAX_SEED = 2**64 - 1


def _whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    number = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if number is None or number < low or (high is not None and number > high):
        expected = f"a whole number from {low} to {high}" if high else f"a whole number, at least {low}"
        raise ConfigError(f"{name} is {value!r}, expected {expected}")
    return number


def _real(name: str, value: Any, low: float, high: float, expected: str, open_low: bool = False) -> float:
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high or (open_low and value == low):
        raise ConfigError(f"{name} is {value!r}, expected {expected}")
    return float(value)


def check_sampling(temperature: Any, topk: Any, topp: Any, seed: Any) -> tuple[float, int, float, int | None]:
    """The sampling settings, or ConfigError naming the first one that is out of range."""
    return (
        _real("temperature", temperature, 0.0, 1e6, "a number, at least 0 (0: always the likeliest token)"),
        _whole("top_k", topk, 1),
        _real("top_p", topp, 0.0, 1.0, "a number above 0, at most 1", open_low=True),
        None if seed is None else _whole("seed", seed, 0, MAX_SEED),
    )


def check_tokens(tokens: Any, vocabulary: int | None = None, what: str = "tokens") -> list[int]:
    """Token ids as a list of ints; ConfigError when there are none or one is no token."""
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
        raise ConfigError(f"{what}: found {type(tokens).__name__}, expected a list of token ids")
    ids = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
    if not ids:
        raise ConfigError(f"{what}: empty, expected at least one token")
    top = (vocabulary or 2**32) - 1
    for i, token in enumerate(ids):
        if type(token) is not int:
            if isinstance(token, bool) or not isinstance(token, numbers.Integral):
                raise ConfigError(f"{what}: entry {i} is {token!r}, expected a token id")
            token = ids[i] = int(token)
        if not 0 <= token <= top:
            raise ConfigError(f"{what}: entry {i} is {token}, expected a token id from 0 to {top}")
    return ids


class InferTask:
    """A request, as jiuge's users know it.

    Args:
        id: whatever names the request.
        tokens: the prompt; afterwards the tokens of the next step (the last sampled one).
        max_tokens: how many NEW tokens may be generated. (jiuge's limits the total position.)
        temperature: 0 means: always the likeliest token. topk: 1 means the same. topp: above 0, at most 1.
        end_tokens: tokens that end the answer.
        seed: equal seeds give equal tokens, whatever else is in the batch; None: a random one (kept in ``seed``).

    ``finish_reason`` is None, then ``"stop"`` (an end token) or ``"length"``. The task owns its KV cache: a batch makes
    one where none is bound, and it is freed with the task unless released.
    """

    def __init__(
        self,
        id: Any,
        tokens: Iterable[int],
        max_tokens: int = 50,
        temperature: float = 1.0,
        topk: int = 1,
        topp: float = 1.0,
        end_tokens: Iterable[int] = (),
        seed: int | None = None,
    ) -> None:
        self.id = id
        self.tokens = check_tokens(tokens)
        self.max_tokens = _whole("max_tokens", max_tokens, 1)
        self.temperature, self.topk, self.topp, chosen = check_sampling(temperature, topk, topp, seed)
        self.end_tokens = frozenset([end_tokens] if isinstance(end_tokens, int) else end_tokens)
        self.seed = secrets.randbits(64) if chosen is None else chosen
        self._random: np.random.Generator | None = None
        self._drawn, self._value = 0, 0.5
        self.pos = 0
        self.generated = 0
        self.finish_reason: str | None = None
        self._kv_cache: KVCache | None = None

    def bind_kvcache(self, kv_cache: KVCache, pos: int = 0) -> None:
        """Use this cache, which holds the first ``pos`` tokens already; ``tokens`` becomes what is left to compute."""
        if not 0 <= pos < len(self.tokens):
            raise ConfigError(
                f"bind_kvcache: pos is {pos}, expected 0 to {len(self.tokens) - 1} (a token must be left)"
            )
        self._kv_cache, self.pos, self.tokens = kv_cache, pos, self.tokens[pos:]

    def release_kvcache(self) -> KVCache | None:
        """Give up the cache and return it (None when none is bound)."""
        cache, self._kv_cache = self._kv_cache, None
        return cache

    def kvcache(self) -> KVCache | None:
        return self._kv_cache

    def random_value(self) -> float:
        """Uniform in [0, 1), float32, a function of the seed and the step alone; 0.5 where nothing is sampled."""
        if self.topk == 1 or self.temperature == 0:
            return 0.5
        if self._random is None:
            self._random = np.random.Generator(np.random.Philox(key=self.seed))
        while self._drawn <= self.generated:  # the same value again until next() is called
            self._value = float(self._random.random(dtype=np.float32))
            self._drawn += 1
        return self._value

    def next(self, out_token: int | None, max_context: int | None = None) -> None:
        """Take in the token that the last round gave: the tokens of that round are in the cache now.

        Sets ``finish_reason`` when the answer ends: at an end token, after max_tokens, or when the context is full.
        """
        if self._kv_cache is not None:
            self._kv_cache.update_tokens(self.tokens, self.pos)
        self.pos += len(self.tokens)
        if out_token is None or out_token in self.end_tokens:
            self.finish_reason = "stop"
            return
        self.generated += 1
        self.tokens = [int(out_token)]
        if self.generated >= self.max_tokens or (max_context is not None and self.pos >= max_context):
            self.finish_reason = "length"

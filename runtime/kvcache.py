"""KV caches that remember their tokens, and a pool that reuses them by longest common prefix."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from runtime.errors import ConfigError, InfiniCoreError


class CacheOwner(Protocol):
    """What caches need of a model (Qwen3ForCausalLM has it)."""

    def create_kv_cache(self, capacity: int = 0) -> int: ...

    def duplicate_kv_cache(self, cache: int, length: int) -> int: ...

    def trim_kv_cache(self, cache: int, length: int) -> None: ...

    def discard_kv_cache(self, cache: int) -> None:
        """Free it, now or soon; called by finalizers, so it must not wait for a lock."""


class CacheTask(Protocol):
    """What the pool needs of a task (InferTask has it)."""

    tokens: list[int]

    def bind_kvcache(self, kv_cache: KVCache, pos: int = 0) -> None: ...

    def release_kvcache(self) -> KVCache | None: ...


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists share at their start; compares slices, so that it runs at C speed."""
    limit, at, step = min(len(a), len(b)), 0, 64
    while at < limit:
        stop = min(at + step, limit)
        if a[at:stop] != b[at:stop]:
            break
        at, step = stop, step * 2
    else:
        return limit
    low, high = at, stop - 1  # they differ somewhere in at:stop
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[at:middle] == b[at:middle] else (low, middle - 1)
    return low


class KVCache:
    """One cache of a model and the tokens in it. Freed when dropped, collected, or when its model is closed."""

    def __init__(self, model: CacheOwner, handle: int | None = None, tokens: Sequence[int] = ()) -> None:
        self._model = model
        self._handle: int | None = model.create_kv_cache() if handle is None else handle
        self.tokens: list[int] = list(tokens)

    def data(self) -> int:
        """The engine's handle; ConfigError after drop()."""
        if self._handle is None:
            raise ConfigError("this KV cache was dropped")
        return self._handle

    def update_tokens(self, tokens: Sequence[int], pos: int) -> None:
        """Positions ``pos``.. now hold ``tokens``, and nothing comes after them."""
        self.tokens[pos:] = tokens

    def trim(self, length: int) -> None:
        """Forget every token from position ``length`` on."""
        if length < len(self.tokens):
            self._model.trim_kv_cache(self.data(), length)
            del self.tokens[length:]

    def duplicate(self, length: int) -> KVCache:
        """A cache of its own with the first ``length`` tokens."""
        return KVCache(self._model, self._model.duplicate_kv_cache(self.data(), length), self.tokens[:length])

    def drop(self, model: Any = None) -> None:
        """Free the engine's memory. May be called again; ``model`` is accepted for jiuge's callers."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._model.discard_kv_cache(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.drop()


class KVCachePool:
    """Caches shared by many requests, each taking the one whose tokens agree longest with its prompt.

    An idle cache that the prompt continues is taken as it is. One that the prompt only begins like, or one that is in
    use, is duplicated (copy-on-write where the build has paged caches), so that nobody's work is lost. Idle caches are
    kept, least recently used first to go, up to ``max_caches`` caches (those in use included) and ``max_idle_tokens``
    tokens. Acquiring never waits: when every cache is in use one more is made, and as many are freed on release.

    Args:
        model: what makes and frees caches (Qwen3ForCausalLM).
        max_caches: how many caches there may be at once, unless more than these are in use.
        max_idle_tokens: how many tokens idle caches may hold together; None: no limit.
        min_prefix: shorter agreements than this are not worth a duplicate.
    """

    def __init__(
        self, model: CacheOwner, max_caches: int = 32, max_idle_tokens: int | None = None, min_prefix: int = 16
    ) -> None:
        if max_caches < 1:
            raise ConfigError(f"max_caches is {max_caches}, expected at least 1")
        self._model, self.max_caches, self.max_idle_tokens, self.min_prefix = (
            model,
            max_caches,
            max_idle_tokens,
            min_prefix,
        )
        self._idle: list[KVCache] = []  # oldest first
        self._busy: list[KVCache] = []
        self._lock = threading.Lock()
        self._released: deque[KVCache] = deque()  # given back, perhaps by a finalizer, and not yet put in order
        self._shutdown = False

    @property
    def num_caches(self) -> int:
        return len(self._idle) + len(self._busy)  # what was released is busy until it is put in order

    @property
    def idle_tokens(self) -> int:
        return sum(len(cache.tokens) for cache in self._idle)

    def acquire_sync(self, task: CacheTask) -> int:
        """Bind a cache to the task, which then starts after the reused tokens; returns how many those are.

        At least one token of the prompt is always left to compute, because its logits are wanted.

        Raises:
            ConfigError: the pool was finalized.
        """
        with self._locked():
            self._check_open()
            cache, reused = self._take(task.tokens)
            if cache is not None:
                self._busy.append(cache)
        if cache is None:
            cache = KVCache(self._model)  # outside of the lock: making it may evict idle ones
            with self._locked():
                self._check_open()
                self._busy.append(cache)
        task.bind_kvcache(cache, reused)
        return reused

    def release_sync(self, task: CacheTask) -> None:
        """Give the task's cache back for others to continue. Never waits: a finalizer may call it in any thread."""
        cache = task.release_kvcache()
        if cache is not None:
            self._released.append(cache)
            self._settle_if_free()

    async def acquire(self, task: CacheTask) -> int:
        """acquire_sync without blocking the event loop."""
        return await asyncio.to_thread(self.acquire_sync, task)

    async def release(self, task: CacheTask) -> None:
        await asyncio.to_thread(self.release_sync, task)

    def evict(self) -> bool:
        """Free the idle cache that was used longest ago, for example when the engine ran out of KV memory."""
        with self._locked():
            if not self._idle:
                return False
            self._idle.pop(0).drop()
            return True

    def finalize(self) -> None:
        """Free every idle cache; those in use are freed when they are released. Acquiring fails from now on."""
        with self._locked():
            self._shutdown = True
            while self._idle:
                self._idle.pop().drop()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._settle()
            yield
        self._settle_if_free()  # what was released meanwhile found the lock taken

    def _settle_if_free(self) -> None:
        while self._released and self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Make released caches idle, and free those that are too many. The caller holds the lock."""
        while self._released:
            cache = self._released.popleft()
            self._busy = [other for other in self._busy if other is not cache]
            if self._shutdown or not cache.tokens:
                cache.drop()
            else:
                self._idle.append(cache)
        while self._idle and (
            self.num_caches > self.max_caches
            or (self.max_idle_tokens is not None and self.idle_tokens > self.max_idle_tokens)
        ):
            self._idle.pop(0).drop()

    def _check_open(self) -> None:
        if self._shutdown:
            raise ConfigError("the KV cache pool was finalized")

    def _take(self, prompt: Sequence[int]) -> tuple[KVCache | None, int]:
        """A cache with its first tokens in place and how many those are; (None, 0): a new one is to be made."""
        best, reused = None, 0
        for cache in [*self._idle, *self._busy]:
            length = common_prefix(cache.tokens, prompt[:-1])
            if length > reused:
                best, reused = cache, length
        if best is None or reused < min(self.min_prefix, len(prompt) - 1):
            self._make_room(None)
            return None, 0
        # The last few tokens of a reply are often stripped or tokenised anew: losing them is no reason to copy.
        few = len(best.tokens) - reused < self.min_prefix
        alone = self.num_caches >= self.max_caches and self._idle == [best]
        if best in self._idle and (few or alone):
            return self._continue(best, reused), reused
        self._make_room(best)
        try:
            return best.duplicate(reused), reused
        except InfiniCoreError:  # no memory for a copy (contiguous caches)
            if best in self._idle:
                return self._continue(best, reused), reused
            return None, 0

    def _continue(self, cache: KVCache, length: int) -> KVCache:
        self._idle.remove(cache)
        cache.trim(length)
        return cache

    def _make_room(self, keep: KVCache | None) -> None:
        """Leave room for one more cache, sparing ``keep`` where another one can go."""
        while self.num_caches >= self.max_caches and self._idle:
            victim = next((cache for cache in self._idle if cache is not keep), self._idle[0])
            self._idle.remove(victim)
            victim.drop()

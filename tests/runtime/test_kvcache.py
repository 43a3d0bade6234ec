"""Reusing caches by longest common prefix, with an owner that only counts."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import ConfigError, InfiniCoreError
from runtime.infertask import InferTask
from runtime.kvcache import KVCache, KVCachePool, common_prefix


class Owner:
    """Knows each live cache's length, as the engine does."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}
        self.made = self.copied = 0
        self.refuse_copies = False

    def create_kv_cache(self, capacity: int = 0) -> int:
        self.made += 1
        self.lengths[self.made] = 0
        return self.made

    def duplicate_kv_cache(self, cache: int, length: int) -> int:
        if self.refuse_copies:
            raise InfiniCoreError("duplicateKVCache", 13, "no memory")
        assert length <= self.lengths[cache]
        self.copied += 1
        copy = self.create_kv_cache()
        self.lengths[copy] = length
        return copy

    def trim_kv_cache(self, cache: int, length: int) -> None:
        assert length <= self.lengths[cache]
        self.lengths[cache] = length

    def discard_kv_cache(self, cache: int) -> None:
        del self.lengths[cache]


def run(owner: Owner, pool: KVCachePool, prompt: list[int], answer: list[int]) -> int:
    """A whole request; returns how many tokens were reused."""
    task = InferTask("t", prompt, max_tokens=100)
    reused = pool.acquire_sync(task)
    work(owner, task, answer)
    pool.release_sync(task)
    return reused


def work(owner: Owner, task: InferTask, answer: list[int]) -> None:
    for token in answer:
        cache = task.kvcache()
        assert cache is not None and owner.lengths[cache.data()] >= task.pos
        owner.lengths[cache.data()] = task.pos + len(task.tokens)
        task.next(token)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.integers(0, 500))
@settings(derandomize=True, max_examples=300, deadline=None)
def test_common_prefix(a: list[int], b: list[int], shared: int) -> None:
    a, b = [7] * shared + a, [7] * shared + b
    expected = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    assert common_prefix(a, b) == expected


def test_a_conversation_continues_in_its_own_cache() -> None:
    owner = Owner()
    pool = KVCachePool(owner)
    first = list(range(40))
    assert run(owner, pool, first, [100, 101, 102]) == 0
    # The prompt and all but the last sampled token, which was never fed back, are there.
    assert run(owner, pool, [*first, 100, 101, 102, 5, 6], [103]) == 42
    assert (owner.made, owner.copied, pool.num_caches) == (1, 0, 1)


def test_a_shared_beginning_is_copied_and_both_stay() -> None:
    owner = Owner()
    pool = KVCachePool(owner)
    system = list(range(40))
    run(owner, pool, [*system, *range(50, 80)], [1])
    assert run(owner, pool, [*system, *range(90, 120)], [2]) == 40
    assert owner.copied == 1 and pool.num_caches == 2
    assert run(owner, pool, [*system, *range(50, 80), 81], [1]) == 70  # the first one still has its tail


def test_losing_a_few_tokens_is_no_reason_to_copy() -> None:
    owner = Owner()
    pool = KVCachePool(owner)
    run(owner, pool, list(range(40)), [1])
    assert run(owner, pool, [*range(38), 77], [1]) == 38
    assert (owner.copied, pool.num_caches) == (0, 1)


def test_a_short_agreement_is_not_reused_unless_it_is_the_whole_prompt() -> None:
    owner = Owner()
    pool = KVCachePool(owner)
    run(owner, pool, [1, 2, 3, 4], [5])
    assert run(owner, pool, [1, 2, *range(50, 90)], [5]) == 0
    assert run(owner, pool, [1, 2, 3, 4], [5]) == 3  # the same prompt again: one token is left to compute
    assert run(owner, pool, [9], [5]) == 0


def test_a_cache_in_use_is_copied() -> None:
    owner = Owner()
    pool = KVCachePool(owner)
    prompt = list(range(40))
    busy = InferTask("busy", prompt, 10)
    pool.acquire_sync(busy)
    work(owner, busy, [100, 101])
    assert run(owner, pool, [*prompt, 100, 7], [1]) == 41
    assert owner.copied == 1
    work(owner, busy, [102])
    pool.release_sync(busy)
    assert pool.num_caches == 2


def test_no_memory_for_a_copy_means_starting_afresh_or_taking_it_over() -> None:
    owner = Owner()
    pool = KVCachePool(owner)
    run(owner, pool, list(range(80)), [1])
    owner.refuse_copies = True
    assert run(owner, pool, [*range(40), 99], [1]) == 40  # idle: taken over
    busy = InferTask("busy", list(range(40)), 10)
    pool.acquire_sync(busy)
    work(owner, busy, [1])
    assert run(owner, pool, [*range(40), 98], [1]) == 0  # in use: a new one


def test_the_least_recently_used_goes_first() -> None:
    owner = Owner()
    pool = KVCachePool(owner, max_caches=2)
    a, b, c = (list(range(start, start + 30)) for start in (0, 100, 200))
    for prompt in (a, b, a, c):  # b was used longest ago when c needs room
        run(owner, pool, prompt, [1])
    assert pool.num_caches == 2 and len(owner.lengths) == 2
    assert run(owner, pool, a, [1]) == 29
    assert run(owner, pool, b, [1]) == 0


def test_one_cache_is_enough() -> None:
    owner = Owner()
    pool = KVCachePool(owner, max_caches=1)
    run(owner, pool, list(range(80)), [1])
    assert run(owner, pool, [*range(40), 99], [1]) == 40
    assert run(owner, pool, [7, 8, 9], [1]) == 0
    assert len(owner.lengths) == 1


def test_idle_tokens_are_bounded() -> None:
    owner = Owner()
    pool = KVCachePool(owner, max_idle_tokens=100)
    for start in (0, 100, 200):
        run(owner, pool, list(range(start, start + 45)), [1])
    assert pool.idle_tokens <= 100 and pool.num_caches == 2
    run(owner, pool, list(range(300, 500)), [1])  # longer than the budget: not kept at all
    assert pool.num_caches == 0 and owner.lengths == {}


def test_evicting_and_finalizing() -> None:
    owner = Owner()
    pool = KVCachePool(owner)
    for start in (0, 100):
        run(owner, pool, list(range(start, start + 30)), [1])
    assert pool.evict() and len(owner.lengths) == 1
    assert run(owner, pool, list(range(100, 130)), [1]) == 29  # the newer one is left
    assert pool.evict() and not pool.evict()
    busy = InferTask("busy", [1, 2], 10)
    pool.acquire_sync(busy)
    pool.finalize()
    with pytest.raises(ConfigError, match="finalized"):
        pool.acquire_sync(InferTask("late", [1], 1))
    work(owner, busy, [3])
    pool.release_sync(busy)
    assert owner.lengths == {}


def test_acquiring_never_waits() -> None:
    """More requests at once than caches, in one thread: each gets one, and the pool shrinks again."""
    owner = Owner()
    pool = KVCachePool(owner, max_caches=2)
    tasks = [InferTask(i, [i, 60 + i, 70], 10) for i in range(5)]
    for task in tasks:
        assert pool.acquire_sync(task) == 0
        work(owner, task, [3])
    assert pool.num_caches == len(owner.lengths) == 5
    for left, task in zip((4, 3, 2, 2, 2), tasks):
        pool.release_sync(task)
        assert pool.num_caches == len(owner.lengths) == left


def test_a_release_never_waits() -> None:
    """A finalizer may release while any thread, its own included, is inside of the pool: the cache is kept for later."""
    owner = Owner()
    pool = KVCachePool(owner)
    task = InferTask("t", list(range(30)), 10)
    pool.acquire_sync(task)
    work(owner, task, [3])
    with pool._lock:
        pool.release_sync(task)
    assert pool.idle_tokens == 0
    assert run(owner, pool, list(range(30)), [3]) == 29 and owner.made == 1
    late = InferTask("late", list(range(30)), 10)
    pool.acquire_sync(late)
    with pool._locked():
        pool.release_sync(late)
    assert pool.idle_tokens == 29  # put in order by the one who had the lock


def test_acquiring_from_an_event_loop() -> None:
    owner = Owner()
    pool = KVCachePool(owner, max_caches=1)

    async def request(start: int) -> int:
        task = InferTask(start, list(range(start, start + 20)), 10)
        reused = await pool.acquire(task)
        work(owner, task, [1])
        await pool.release(task)
        return reused

    async def both() -> list[int]:
        return await asyncio.gather(request(0), request(0))

    # The second one copies the first one's tokens if they are there by then.
    assert sorted(asyncio.run(both()))[0] == 0 and pool.num_caches == 1


def test_caches_free_themselves() -> None:
    owner = Owner()
    cache = KVCache(owner)
    task = InferTask("t", [1, 2, 3], 5)
    task.bind_kvcache(cache)
    del cache
    assert len(owner.lengths) == 1  # the task owns it
    del task
    assert owner.lengths == {}
    dropped = KVCache(owner)
    dropped.drop()
    dropped.drop()
    with pytest.raises(ConfigError, match="was dropped"):
        dropped.data()


def test_trim_and_duplicate_keep_the_tokens_in_step() -> None:
    owner = Owner()
    cache = KVCache(owner)
    owner.lengths[cache.data()] = 4
    cache.update_tokens([1, 2, 3, 4], 0)
    copy = cache.duplicate(3)
    cache.trim(2)
    cache.trim(9)
    assert (cache.tokens, copy.tokens) == ([1, 2], [1, 2, 3])
    assert owner.lengths == {cache.data(): 2, copy.data(): 3}
    cache.update_tokens([8], 1)  # what comes after an overwritten position is gone
    assert cache.tokens == [1, 8]


def test_bad_limits() -> None:
    with pytest.raises(ConfigError, match="max_caches is 0"):
        KVCachePool(Owner(), max_caches=0)

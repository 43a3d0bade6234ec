"""Qwen3ForCausalLM, InferTask and Engine over the fake engine, whose answers depend on every token and position."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import OutOfKVMemory
from runtime.errors import ConfigError
from runtime.generation import schedule
from runtime.qwen3 import InferTask, KVCache, Qwen3ForCausalLM
from tests.runtime import fakes
from tests.runtime.fakes import answer, finish

PROMPT = [5, 9, 2, 600, 14, 7, 7, 1]


# ----------------------------------------------------------------------------------------------------- tasks


def test_next_advances_and_finishes() -> None:
    task = InferTask(3, [1, 2, 3], max_tokens=2, end_tokens=[9])
    task.next(4)
    assert (task.pos, task.tokens, task.generated, task.finish_reason) == (3, [4], 1, None)
    task.next(5)
    assert (task.pos, task.tokens, task.generated, task.finish_reason) == (4, [5], 2, "length")
    for ends in ([9], 9, {9}):
        task = InferTask(3, [1], 5, end_tokens=ends)
        task.next(9)
        assert (task.generated, task.finish_reason) == (0, "stop")
    task = InferTask(3, [1, 2, 3], 50)
    task.next(4, max_context=3)
    assert task.finish_reason == "length"


def test_random_values_depend_on_seed_and_step_alone() -> None:
    def values(seed: int) -> list[float]:
        task, out = InferTask("t", [1], 9, topk=5, seed=seed), []
        for _ in range(4):
            assert task.random_value() == task.random_value()
            out.append(task.random_value())
            task.next(1)
        return out

    assert values(7) == values(7)
    assert len({*values(7), *values(8)}) == 8
    assert all(0 <= value < 1 for value in values(7))
    assert InferTask("t", [1]).seed != InferTask("t", [1]).seed
    assert InferTask("t", [1], topk=1, seed=3).random_value() == 0.5  # greedy: nothing is drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tokens=[]), "tokens: empty"),
        (dict(tokens="text"), "tokens: found str, expected a list of token ids"),
        (dict(tokens=[1, -1]), "entry 1 is -1, expected a token id"),
        (dict(tokens=[1.5]), "entry 0 is 1.5"),
        (dict(tokens=[True]), "entry 0 is True"),
        (dict(max_tokens=0), "max_tokens is 0, expected a whole number, at least 1"),
        (dict(temperature=-0.5), "temperature is -0.5, expected a number, at least 0"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(temperature=math.inf), "temperature is inf"),
        (dict(topk=0), "top_k is 0, expected a whole number, at least 1"),
        (dict(topk=1.0), "top_k is 1.0"),
        (dict(topp=0.0), "top_p is 0.0, expected a number above 0, at most 1"),
        (dict(topp=1.01), "top_p is 1.01"),
        (dict(topp=math.nan), "top_p is nan"),
        (dict(seed=-1), "seed is -1, expected a whole number from 0 to 18446744073709551615"),
        (dict(seed=2**64), "seed is"),
    ],
)
def test_bad_settings_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        InferTask("t", **{"tokens": [1], **options})
    assert "\n" not in str(raised.value)


def test_numpy_values_are_welcome() -> None:
    task = InferTask(
        "t", np.array([1, 2], np.int64), np.int32(3), np.float32(0.5), np.int64(4), np.float64(0.5), seed=3
    )
    assert task.tokens == [1, 2] and all(type(token) is int for token in task.tokens)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 20))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_schedule(lengths: list[int], limit: int) -> None:
    done = [0] * len(lengths)
    for call in schedule(lengths, limit):
        assert 0 < sum(stop - start for _, start, stop in call) <= limit
        assert len({i for i, _, _ in call}) == len(call)
        for i, start, stop in call:
            assert start == done[i] and start % limit == 0  # cut where it would be cut alone
            done[i] = stop
    assert done == lengths


# --------------------------------------------------------------------------------------------------- batches


def test_a_batch_equals_each_alone(open_fake: Any) -> None:
    model = open_fake(prefill_chunk=7)
    prompts = [PROMPT, [3], list(range(100, 130)), [8, 8], list(range(14))]
    sampled = dict(temperature=0.9, topk=30, topp=0.8)
    alone = [answer(model, prompt, 6 + i, seed=i, **sampled) for i, prompt in enumerate(prompts)]
    tasks = [InferTask(i, prompt, 6 + i, seed=i, **sampled) for i, prompt in enumerate(prompts)]
    assert finish(model, tasks) == alone
    assert len({tuple(tokens[:6]) for tokens in alone}) == len(prompts)


def test_joining_a_batch_later_changes_nothing(open_fake: Any) -> None:
    model = open_fake()
    first, second = InferTask(0, PROMPT, 9, 1.0, 50, seed=1), InferTask(1, [4, 4], 5, 1.0, 50, seed=2)
    for _ in range(3):
        first.next(model.batch_infer_one_round([first])[0])
    finish(model, [second, first])
    cache = first.kvcache()
    assert cache is not None
    assert [*cache.tokens, *first.tokens] == PROMPT + answer(model, PROMPT, 9, temperature=1.0, topk=50, seed=1)


@pytest.mark.parametrize("chunk", [1, 3, 8, 512])
def test_prompts_in_pieces_give_the_same_answer(open_fake: Any, chunk: int) -> None:
    model = open_fake(prefill_chunk=chunk)
    assert answer(model, PROMPT, 5) == answer(open_fake(), PROMPT, 5)
    expected = open_fake().forward([PROMPT])[0]
    np.testing.assert_array_equal(model.forward([PROMPT])[0], expected)


def test_a_round_can_be_repeated_until_next_is_called(open_fake: Any) -> None:
    model = open_fake()
    task = InferTask("t", PROMPT, 5, 1.0, 50, seed=1)
    assert model.batch_infer_one_round([task]) == model.batch_infer_one_round([task])


def test_bad_batches(open_fake: Any) -> None:
    model = open_fake()
    assert model.batch_infer_one_round([]) == []
    with pytest.raises(ConfigError, match="task big: entry 1 is 608, expected a token id from 0 to 607"):
        model.batch_infer_one_round([InferTask("big", [1, 608])])
    with pytest.raises(ConfigError, match=r"task long: 97 tokens, expected at most 96 \(the context\)"):
        model.batch_infer_one_round([InferTask("long", [1] * 97)])
    a, b = InferTask("a", [1, 2]), InferTask("b", [1, 2])
    cache = KVCache(model)
    a.bind_kvcache(cache)
    b.bind_kvcache(cache)
    with pytest.raises(ConfigError, match="task b: shares its KV cache"):
        model.batch_infer_one_round([a, b])
    a.next(None)
    with pytest.raises(ConfigError, match=r"task a: is finished \(stop\)"):
        model.batch_infer_one_round([a])
    with pytest.raises(ConfigError, match="pos is 2, expected 0 to 1"):
        InferTask("c", [1, 2]).bind_kvcache(cache, 2)


def test_forward_and_perplexity(open_fake: Any) -> None:
    model = open_fake(prefill_chunk=4)
    sequences = [PROMPT, [3], [600, 2, 1]]
    logits = model.forward(sequences)
    assert [array.shape for array in logits] == [(8, 608), (1, 608), (3, 608)]
    assert all(array.dtype == np.float32 for array in logits)
    assert model.engine.pool_info()["free_blocks"] == model.engine.pool_info()["total_blocks"]  # no cache is kept
    losses = []
    for tokens, array in zip(sequences, logits):
        wide = array.astype(np.float64)
        logp = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
        losses += [-logp[i, token] for i, token in enumerate(tokens[1:])]
    expected = math.exp(sum(losses) / len(losses))
    two = [PROMPT, [600, 2, 1]]
    # float64 sums in another order: a few units in the last place of the exponent's argument.
    assert model.perplexity(two) == pytest.approx(expected, rel=1e-12)
    for bad in ([], [[1]], [[1, 2], [3]]):
        with pytest.raises(ConfigError, match="sequences of at least two tokens"):
            model.perplexity(bad)
    with pytest.raises(ConfigError, match="sequence 1: empty"):
        model.forward([[1], []])


# --------------------------------------------------------------------------------------------------- answers


def test_generate_is_what_the_tokens_say(open_fake: Any) -> None:
    model = open_fake()
    generation = model.stream(PROMPT, max_steps=12, end_tokens=[])
    text = "".join(generation)
    assert generation.tokens == answer(model, PROMPT, 12)
    assert text == model.tokenizer.decode(generation.tokens)
    assert (generation.finish_reason, len(generation.seconds)) == ("length", 12)
    seen: list[str] = []
    again, ms = model.generate(PROMPT, 12, stream=seen.append)
    assert text.startswith(again) and "".join(seen) == again and ms > 0


def test_end_tokens_stop_and_are_not_shown(open_fake: Any) -> None:
    model = open_fake()
    third = answer(model, PROMPT, 3)[2]
    generation = model.stream(PROMPT, 50, end_tokens=[third])
    list(generation)
    assert generation.finish_reason == "stop" and generation.tokens == answer(model, PROMPT, 2)
    assert model.eos_token_ids == [597, 595] == model.eos_token_id


def test_the_context_ends_an_answer(open_fake: Any) -> None:
    model = open_fake(max_tokens=20)
    assert model.max_context_len() == 20
    generation = model.stream(list(range(18)), 50, end_tokens=[])
    list(generation)
    # Positions 18 and 19 are fed back; the token sampled after the last of them has no place any more.
    assert (len(generation.tokens), generation.finish_reason) == (3, "length")
    list(full := model.stream(list(range(20)), 50, end_tokens=[]))
    assert len(full.tokens) == 1


def test_chat_is_the_default_for_text(open_fake: Any) -> None:
    model = open_fake(max_tokens=96)
    chat = model.prompt_tokens("123+456=")
    assert model.tokenizer.decode(chat, skip_special_tokens=False) == (
        "<|im_start|>user\n123+456=<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert model.prompt_tokens([{"role": "user", "content": "123+456="}]) == chat
    thinking = model.prompt_tokens("123+456=", enable_thinking=True)
    assert chat[: len(thinking)] == thinking and len(thinking) < len(chat)
    assert model.prompt_tokens("123+456=", chat=False) == model.tokenizer.encode("123+456=")
    assert "system\nBe brief." in model.tokenizer.decode(model.prompt_tokens("x", system="Be brief."))


def test_a_conversation_reuses_its_cache_and_answers_the_same(open_fake: Any) -> None:
    model, fresh = open_fake(), open_fake()
    list(first := model.stream(PROMPT, 10, end_tokens=[]))
    longer = [*PROMPT, *first.tokens, 4, 4]
    list(second := model.stream(longer, 10, end_tokens=[]))
    list(expected := fresh.stream(longer, 10, end_tokens=[]))
    assert second.reused == len(PROMPT) + 9 and expected.reused == 0
    assert second.tokens == expected.tokens
    list(branch := model.stream([*longer[:17], 9, 9], 10, end_tokens=[]))  # a copy of the beginning
    list(expected := fresh.stream([*longer[:17], 9, 9], 10, end_tokens=[]))
    assert branch.reused == 17 and branch.tokens == expected.tokens


def test_leaving_a_stream_early_gives_the_cache_back(open_fake: Any) -> None:
    model = open_fake(max_caches=1)
    for _ in range(3):
        with model.stream(PROMPT, 50, end_tokens=[]) as generation:
            next(generation)
    assert generation.finish_reason is None and model.pool.num_caches == 1
    model.stream(PROMPT, 50)  # never started: takes no cache
    text, _ = model.generate(PROMPT, 3)
    assert text


def test_more_streams_than_caches(open_fake: Any) -> None:
    model = open_fake(max_caches=2)
    streams = [model.stream(PROMPT, 9, end_tokens=[]) for _ in range(4)]
    for generation in streams:
        next(generation)  # all four are open in this thread
    for generation in streams:
        list(generation)
        assert generation.tokens == answer(model, PROMPT, 9)
    assert model.pool.num_caches == 2


def test_an_abandoned_stream_is_freed_without_the_garbage_collector(open_fake: Any) -> None:
    model = open_fake()
    gc.disable()
    try:
        generation = model.stream(PROMPT, 50, end_tokens=[])
        next(generation)
        gone = weakref.ref(generation)
        del generation
        assert gone() is None and model.pool._busy == [] and model.pool.num_caches == 1
    finally:
        gc.enable()


def test_a_finalizer_never_waits_for_the_engine_or_the_pool(open_fake: Any) -> None:
    """A stream and a cache are collected in a thread while another one holds both locks."""
    model = open_fake()
    held = [model.stream(PROMPT, 50, end_tokens=[]), KVCache(model)]
    next(held[0])
    free = model.engine.pool_info()
    with model.engine._lock, model.pool._lock:
        collector = threading.Thread(target=held.clear)
        collector.start()
        collector.join(timeout=30)
        assert not collector.is_alive() and held == []
        assert len(model.engine._caches) == 2
    while model.pool.evict():
        pass
    assert model.engine.pool_info()["free_blocks"] > free["free_blocks"]
    assert model.engine._caches == set()


def test_threads_share_a_model(open_fake: Any) -> None:
    model = open_fake()
    prompts = [[i, i + 1, 3] for i in range(6)]
    expected = [answer(model, prompt, 20) for prompt in prompts]
    found: dict[int, list[int]] = {}

    def work(i: int) -> None:
        generation = model.stream(prompts[i], 20, end_tokens=[])
        list(generation)
        found[i] = generation.tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(6)] == expected


def test_verbose_prints_the_answer(open_fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text, _ = open_fake().generate(PROMPT, 5, verbose=True)
    out, err = capsys.readouterr()
    assert out == text + "\n" and "ms per step" in err


def test_without_a_tokenizer_ids_go_in_and_out(fake_library: Path, tmp_path: Path, no_infinicore: None) -> None:
    checkpoint = fakes.write_checkpoint(tmp_path / "model", tokenizer=False)
    build = fakes.write_build(tmp_path / "out", checkpoint, fake_library)
    with Qwen3ForCausalLM(build=build) as model:
        text, _ = model.generate(PROMPT, 4)
        assert text == " ".join(map(str, answer(model, PROMPT, 4)))
        with pytest.raises(ConfigError, match="has no tokenizer.json, give token ids"):
            model.generate("hello")


def test_bad_prompts(open_fake: Any) -> None:
    model = open_fake()
    for prompt, message in [
        ("", "prompt: empty"),
        ("caf\udce9", r"prompt: character \d+ is '.udce9', expected UTF-8 text"),
        ([{"role": "user", "content": "\ud800"}], "expected UTF-8 text"),
        ([], "prompt: empty"),
        ([1, 608], "prompt: entry 1 is 608"),
        ("hello " * 200, r"prompt: \d+ tokens, expected at most 96"),
        (3, "prompt: found int, expected a list of token ids"),
        ([{"role": "nobody", "content": "x"}], "chat template: unknown role nobody"),
    ]:
        with pytest.raises(ConfigError, match=message):
            model.generate(prompt)
    with pytest.raises(ConfigError, match="max_steps is 0"):
        model.generate(PROMPT, max_steps=0)
    with pytest.raises(ConfigError, match="top_k is 0"):
        model.generate(PROMPT, topk_=0)
    assert model.pool.num_caches == 0


# ---------------------------------------------------------------------------------------------------- memory


def test_idle_caches_make_room(open_fake: Any) -> None:
    model = open_fake(kv_pool_tokens=64)  # four blocks of sixteen tokens
    for start in (0, 100, 200):
        model.generate([start, *range(start, start + 30)], 5)
    assert model.pool.num_caches == 1  # a prompt of 31 tokens and its answer need three blocks
    big = InferTask("big", list(range(60)), 2)
    model.batch_infer_one_round([big])
    assert model.pool.num_caches == 0


def test_running_out_changes_nothing(open_fake: Any) -> None:
    model = open_fake(kv_pool_tokens=32)
    a, b = InferTask("a", [1] * 16, 40), InferTask("b", [2] * 16, 40)
    tokens = model.batch_infer_one_round([a, b])
    for task, token in zip((a, b), tokens):
        task.next(token)
    with pytest.raises(OutOfKVMemory, match=r"inferBatch failed with status 13: KV pool.*INSUFFICIENT_WORKSPACE"):
        model.batch_infer_one_round([a, b])
    assert (a.pos, b.pos) == (16, 16)
    cache = b.release_kvcache()
    assert cache is not None
    cache.drop()
    assert model.batch_infer_one_round([a]) == [answer(open_fake(), [1] * 16, 2)[1]]

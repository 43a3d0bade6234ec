"""Tokens, text and chat templates."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from runtime.errors import CheckpointError, ConfigError
from runtime.tokenizer import Tokenizer, end_token_ids, render_chat
from tests.runtime.fakes import EXAMPLE

USER = [{"role": "user", "content": "123+456="}]


@lru_cache
def cached_example() -> Tokenizer:
    return Tokenizer(EXAMPLE)


@pytest.fixture
def example() -> Tokenizer:
    return cached_example()


def sentencepiece_like(folder: Path) -> Tokenizer:
    """A tokenizer as Llama's: words begin with a mark, unknown characters fall back to bytes."""
    words = ["▁", "▁he", "llo", "▁wor", "ld", "你", "好"]
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocabulary |= {word: 257 + i for i, word in enumerate(words)}
    hf = HFTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@lru_cache
def cached_fallback() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return sentencepiece_like(Path(folder))


@pytest.fixture
def fallback() -> Tokenizer:
    return cached_fallback()


def incremental(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.decoder()
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@given(st.text())
@settings(derandomize=True, max_examples=300, deadline=None)
def test_text_in_pieces_is_the_text(text: str) -> None:
    tokenizer = cached_example()
    ids = tokenizer.encode(text)
    assert "".join(incremental(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 607)))
@settings(derandomize=True, max_examples=300, deadline=None)
def test_any_tokens_in_pieces_decode_as_a_whole(ids: list[int]) -> None:
    """Also invalid UTF-8, special tokens, and ids of the padded vocabulary that no token has."""
    tokenizer = cached_example()
    assert "".join(incremental(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.sampled_from([257, 258, 259, 260, 261, 262, 263, *(1 + b for b in "é🎉".encode())]), max_size=12))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_other_decoders_never_take_text_back(ids: list[int]) -> None:
    """Byte-fallback decoders may turn whole runs into U+FFFD later; what was valid when it was shown stays."""
    tokenizer = cached_fallback()
    pieces = incremental(tokenizer, ids)
    whole = tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert "".join(pieces) == whole


def test_no_piece_holds_half_a_character(example: Tokenizer, fallback: Tokenizer) -> None:
    text = "你好, wörld 🎉!"
    for piece in incremental(example, example.encode(text)):
        assert "\ufffd" not in piece
    ids = [258, 259, 1 + 0xC3, 1 + 0xA9, 260, 261, 262, *(1 + b for b in "🎉".encode())]
    assert incremental(fallback, ids) == ["he", "llo", "", "é", " wor", "ld", "你", "", "", "", "🎉", ""]


def test_an_unfinished_character_becomes_one_mark_at_the_end(example: Tokenizer) -> None:
    ids = example.encode("你")
    assert len(ids) == 3
    assert incremental(example, ids[:2]) == ["", "", "\ufffd"]


def test_decoding_cost_does_not_grow_with_the_text(fallback: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    decode = fallback.decode

    def counting(tokens: Any, skip: bool = True) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens, skip)

    monkeypatch.setattr(fallback, "decode", counting)
    incremental(fallback, [258, 259, 1 + 0xFF] * 300 + [1 + 0xFF] * 300)
    assert longest <= 40


def test_special_tokens_are_silent_unless_asked_for(example: Tokenizer) -> None:
    ids = [example.token_id("<|im_start|>"), *example.encode("hi"), example.token_id("<|im_end|>")]
    assert "".join(incremental(example, ids)) == "hi"
    decoder = example.decoder(skip_special_tokens=False)
    assert "".join([*(decoder.push(token) for token in ids), decoder.flush()]) == "<|im_start|>hi<|im_end|>"


def test_example_template_equals_the_one_it_was_trained_with(
    example: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import tiny_tokenizer

    talk = [{"role": "system", "content": "Be short."}, *USER, {"role": "assistant", "content": "579"}, *USER]
    for messages in (USER, talk):
        for thinking in (False, True):
            expected = tiny_tokenizer.chat_prompt(messages, thinking)
            assert example.apply_chat_template(messages, enable_thinking=thinking) == expected
    sys.modules.pop("tiny_tokenizer")


def test_thinking_is_off_by_default(example: Tokenizer) -> None:
    assert example.apply_chat_template(USER).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert example.apply_chat_template(USER, enable_thinking=True).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}\n{% if loop.first %}{{ m.role }}{% endif %}\n{% endfor %}", "user"),  # trimmed blocks
        ("    {% if true %}x{% endif %}", "x"),  # stripped blocks
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'b': 1, 'a': '<é>'} | tojson }}", '{"b": 1, "a": "<é>"}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{% generation %}kept{% endgeneration %}", "kept"),
        ("{{ enable_thinking is defined }}{{ tools is none }}", "FalseTrue"),
        ("{{ messages[0].content.startswith('1') }}{{ messages[-1]['content'].split('+')[1] }}", "True456="),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ bos_token }}", "<s>"),
    ],
)
def test_templates_mean_what_they_mean_to_transformers(template: str, expected: str) -> None:
    assert render_chat(template, USER, bos_token="<s>") == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{% if %}", "chat template, line 1"),
        ("{{ messages.append(1) }}", "chat template"),  # the sandbox forbids changes
        ("{{ ''.__class__.__mro__ }}", "chat template"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[7].role }}", "chat template"),
    ],
)
def test_template_errors_are_one_line(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render_chat(template, USER)


def write_model(folder: Path, config: dict[str, Any], jinja: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(EXAMPLE / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


def test_where_templates_come_from(tmp_path: Path) -> None:
    def rendered(config: dict[str, Any], jinja: str | None = None) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return Tokenizer(write_model(folder, config, jinja)).apply_chat_template(USER)

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chosen"}]
    assert rendered({"chat_template": "text"}) == "text"
    assert rendered({"chat_template": named}) == "chosen"
    assert rendered({"chat_template": named[:1]}) == "tools"
    assert rendered({"chat_template": "text"}, "file wins") == "file wins"
    with pytest.raises(ConfigError, match="no chat template"):
        rendered({})
    with pytest.raises(CheckpointError, match="chat_template is no text"):
        rendered({"chat_template": 3})


def test_special_tokens_reach_the_template(tmp_path: Path) -> None:
    config = {"chat_template": "{{ bos_token }}{{ eos_token }}", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    assert Tokenizer(write_model(tmp_path, config)).apply_chat_template(USER) == "<s></s>"


def test_end_tokens_of_all_files(tmp_path: Path) -> None:
    write_model(tmp_path, {"eos_token": {"content": "<|im_start|>"}})
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    tokenizer = Tokenizer(tmp_path)
    assert end_token_ids(tmp_path, tokenizer, [5, 9]) == [9, 7, tokenizer.token_id("<|im_start|>"), 5]
    assert end_token_ids(tmp_path, None) == [9, 7]
    assert end_token_ids(None, None, [3]) == [3]


def test_folders_without_a_tokenizer_and_broken_ones(tmp_path: Path) -> None:
    assert Tokenizer.find(tmp_path) is None and Tokenizer.find(None) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json: not a readable tokenizer"):
        Tokenizer.find(tmp_path)
    shutil.copy(EXAMPLE / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="tokenizer_config.json: not valid JSON"):
        Tokenizer.find(tmp_path)

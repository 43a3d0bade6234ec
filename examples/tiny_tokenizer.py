"""Tokenizer and chat template of the bundled tiny Qwen3 model, in the layout that Qwen3 checkpoints have.

A byte-level BPE trained on the English half of ``tiny_tasks``: digits are one token each, common pieces of English words
are merged, Chinese stays at one token per UTF-8 byte. Special tokens follow the BPE's, as Qwen's do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_tasks as tasks
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 600  # 256 bytes, 339 merges, 5 added tokens
ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Like Qwen3's, the thinking marks are ordinary text to a decoder that drops special tokens.
ADDED = ((ENDOFTEXT, True), (IM_START, True), (IM_END, True), ("<think>", False), ("</think>", False))

# Words with at most one leading mark or space; single digits; runs of punctuation; line ends; other white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = r"""
{%- macro turn(role, text) -%}
    {{- '<|im_start|>' + role + '\n' + text + '<|im_end|>\n' -}}
{%- endmacro -%}
{#- A thinking block stays only in replies to the newest question: find where that question stands. -#}
{%- set seen = namespace(question=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set seen.question = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set reply = namespace(text=message.content if message.content is string else '', thought='') -%}
    {%- if message.role in ('system', 'user') -%}
        {{- turn(message.role, reply.text) -}}
    {%- elif message.role == 'assistant' -%}
        {%- if message.reasoning_content is string -%}
            {%- set reply.thought = message.reasoning_content.strip('\n') -%}
        {%- elif reply.text.startswith('<think>') and '</think>' in reply.text -%}
            {%- set parts = reply.text.split('</think>', 1) -%}
            {%- set reply.thought = parts[0].split('<think>', 1)[1].strip('\n') -%}
            {%- set reply.text = parts[1].lstrip('\n') -%}
        {%- endif -%}
        {%- if loop.index0 > seen.question and (loop.last or reply.thought) -%}
            {%- set reply.text = '<think>\n' + reply.thought.rstrip() + '\n</think>\n\n' + reply.text -%}
        {%- endif -%}
        {{- turn('assistant', reply.text) -}}
    {%- else -%}
        {{- raise_exception('unknown role ' + message.role + ': expected system, user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\n\n</think>\n\n' -}}
    {%- endif -%}
{%- endif -%}
""".strip()


def _corpus() -> list[str]:
    """Text to count pairs of letters in: the role names above all, then the fixed answers, then single words."""
    english = [task for task in tasks.fixed_answers() if task.prompt.isascii() and task.answer.isascii()]
    lines = ["user", "assistant", "system", "\n", "\n\n", "reverse: "] * 100
    lines += [text for task in english for text in (task.prompt, task.answer, tasks.FALLBACK_ANSWER)] * 3
    return lines + [prefix + word for word in tasks.WORDS for prefix in ("", " ")]


def train_tokenizer() -> Tokenizer:
    """Train the BPE (under a second, deterministic) and add the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(ADDED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    for text, special in ADDED:
        token = AddedToken(text, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"tokenizer has {tokenizer.get_vocab_size()} tokens, expected {VOCABULARY}")
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": special,
            }
            for text, special in ADDED
        },
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": ENDOFTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _raise_exception(message: str) -> None:
    raise ValueError(message)


_ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.globals["raise_exception"] = _raise_exception
_TEMPLATE = _ENVIRONMENT.from_string(CHAT_TEMPLATE)


def chat_prompt(messages: list[dict[str, str]], enable_thinking: bool = False) -> str:
    """The text after which the model's answer to ``messages`` begins."""
    return _TEMPLATE.render(messages=messages, add_generation_prompt=True, enable_thinking=enable_thinking)


def answer_ids(tokenizer: Tokenizer, task: tasks.Task) -> list[int]:
    """Token ids of the answer to train on, without an end token.

    Reversed words are spelled letter by letter: how BPE would cut an invented word has nothing to do with how it cut
    the word read backwards.
    """
    if task.kind == "reversal":
        alphabet = tokenizer.get_vocab()
        return [alphabet[letter] for letter in task.answer]
    return tokenizer.encode(task.answer).ids


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json into ``folder``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(tokenizer_config(tokenizer, max_length), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

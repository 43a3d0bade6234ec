"""Text and tokens: the checkpoint's own tokenizer and chat template, and decoding as tokens arrive."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFTokenizer

from runtime.errors import CheckpointError, ConfigError

Message = dict[str, Any]


# ------------------------------------------------------------------------------------------- chat templates


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; rendering just keeps them."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters, which prompts must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def render_chat(
    source: str,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    enable_thinking: bool | None = None,
    tools: Sequence[Any] | None = None,
    **extra: Any,
) -> str:
    """Render a chat template as transformers does; ``extra`` are further variables (bos_token, ...).

    Raises:
        ConfigError: the template is malformed, or refuses these messages.
    """
    variables = dict(extra, messages=list(messages), add_generation_prompt=add_generation_prompt, tools=tools)
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    try:
        return _compile(source).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from None
    except Exception as error:  # a template is foreign code: it may fail in any way
        raise ConfigError(f"chat template: {error}") from None


# ------------------------------------------------------------------------------------------------- decoding


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level BPE vocabulary, inverted."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_MAX_WAITING = 16  # tokens held back for a character to become complete; four bytes make the longest one


class IncrementalDecoder:
    """Text as tokens arrive: what push() and flush() return, joined, is what decoding all tokens at once gives.

    A character is returned when it is complete, and nothing that was returned is taken back. Special tokens (end of
    turn and the like) give nothing unless ``skip_special_tokens`` is False.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.byte_level else None
        self._ids: list[int] = []  # other decoders: the tokens that may still change each other's text
        self._shown = 0  # of those, how many are returned already

    def push(self, token: int) -> str:
        """The text that became certain with this token, often ``""``. Cost does not grow with the text's length."""
        if self._skip and token in self._tokenizer.special_ids:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self._tokenizer.token_bytes(token))
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD, as in a whole decode."""
        if self._utf8 is not None:
            text = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return text
        text = self._advance(final=True)
        self._ids, self._shown = [], 0
        return text

    def _advance(self, final: bool) -> str:
        """Decode the tokens that were returned last together with the new ones: decoders look at the neighbour."""
        before = self._tokenizer.decode(self._ids[: self._shown], self._skip)
        now = self._tokenizer.decode(self._ids, self._skip)
        waiting = len(self._ids) - self._shown
        if not now.startswith(before):  # byte-fallback decoders turn a whole run into U+FFFD: it cannot be taken back
            before, now = "", self._tokenizer.decode(self._ids[self._shown :], self._skip)
        if not final and waiting < _MAX_WAITING and (len(now) <= len(before) or now.endswith("\ufffd")):
            return ""
        self._ids, self._shown = self._ids[self._shown :], waiting
        return now[len(before) :]


class Tokenizer:
    """tokenizer.json with the chat template and end tokens that lie beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "tokenizer.json"
        try:
            self._hf = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path}: not a readable tokenizer ({error})") from None
        self._hf.no_padding()
        self._hf.no_truncation()
        self.config = read_json(folder / "tokenizer_config.json")
        self.vocab_size = self._hf.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(
            token for token, added in self._hf.get_added_tokens_decoder().items() if added.special
        )
        decoder = json.loads(self._hf.to_str()).get("decoder") or {}
        self.byte_level = decoder.get("type") == "ByteLevel"
        self._bytes: dict[int, bytes] = {}
        self.chat_template = _chat_template(folder, self.config)

    @classmethod
    def find(cls, folder: Path | None) -> Tokenizer | None:
        """The tokenizer in a folder, or None when there is none (token ids still work)."""
        return cls(folder) if folder is not None and (folder / "tokenizer.json").is_file() else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text; ConfigError when it is not Unicode (Python keeps stray bytes as lone surrogates)."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"prompt: character {error.start} is {text[error.start]!a}, expected UTF-8 text"
            ) from None
        return self._hf.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._hf.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a byte-level token stands for; ids without a token stand for nothing."""
        known = self._bytes.get(token)
        if known is None:
            text = self._hf.id_to_token(token) or ""
            plain = all(letter in _BYTES for letter in text)
            known = bytes(_BYTES[letter] for letter in text) if plain else text.encode("utf-8")
            self._bytes[token] = known
        return known

    def decoder(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        return IncrementalDecoder(self, skip_special_tokens)

    def token_id(self, text: str) -> int | None:
        return self._hf.token_to_id(text)

    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... as their texts, which chat templates may use."""
        found = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = self.config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[name] = value
        return found

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        enable_thinking: bool | None = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt text for a conversation of ``{"role": ..., "content": ...}`` messages.

        Raises:
            ConfigError: the checkpoint has no chat template, or its template refuses these messages.
        """
        if self.chat_template is None:
            raise ConfigError(f"{self.folder}: no chat template (tokenizer_config.json or chat_template.jinja)")
        variables: dict[str, Any] = {**self.special_tokens(), **extra}
        return render_chat(self.chat_template, messages, add_generation_prompt, enable_thinking, tools, **variables)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, where it is one text or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not readable ({error})") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    return template


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file; CheckpointError when it is not one."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, expected a JSON object")
    return data


def end_token_ids(folder: Path | None, tokenizer: Tokenizer | None, more: Iterable[int] = ()) -> list[int]:
    """Every token that ends an answer: generation_config.json's, config.json's and the tokenizer's, in this order."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json") if folder is not None else ():
        value = read_json(folder / name).get("eos_token_id")  # type: ignore[operator]
        found += value if isinstance(value, list) else [] if value is None else [value]
    if tokenizer is not None and (text := tokenizer.special_tokens().get("eos_token")) is not None:
        token = tokenizer.token_id(text)
        found += [] if token is None else [token]
    return list(dict.fromkeys(int(token) for token in [*found, *more]))

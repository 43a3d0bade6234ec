"""The Python interface: a model from a checkpoint folder or a build, and text or tokens out of it.

>>> from runtime.qwen3 import Qwen3ForCausalLM
>>> with Qwen3ForCausalLM("examples/tiny-qwen3") as model:
...     text, ms_per_step = model.generate("123+456=")
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from runtime import infinicore
from runtime.engine import Engine, OutOfKVMemory, load_library
from runtime.errors import (
    BuildError,
    CheckpointError,
    ConfigError,
    GraphError,
    InfiniCoreError,
    Qwen3Error,
    UnsupportedError,
)
from runtime.generation import Generation, Progress, schedule
from runtime.infertask import InferTask, check_sampling, check_tokens
from runtime.kvcache import KVCache, KVCachePool
from runtime.manifest import Build, read_build
from runtime.structs import DataType, DeviceType, Qwen3MetaCStruct, Qwen3WeightsCStruct, dtype_name
from runtime.tokenizer import Tokenizer, end_token_ids
from runtime.weights import Qwen3MetaFromConfig, Qwen3WeightsImpl, Qwen3WeightsNaming, meta_from_manifest

__all__ = [
    "BuildError",
    "CheckpointError",
    "ConfigError",
    "DataType",
    "DeviceType",
    "Generation",
    "GraphError",
    "InferTask",
    "InfiniCoreError",
    "KVCache",
    "KVCachePool",
    "OutOfKVMemory",
    "Qwen3Error",
    "Qwen3ForCausalLM",
    "Qwen3MetaCStruct",
    "Qwen3MetaFromConfig",
    "Qwen3WeightsCStruct",
    "Qwen3WeightsImpl",
    "Qwen3WeightsNaming",
    "UnsupportedError",
]

_LOGITS_BYTES = 128 << 20  # at most this much of float32 logits at a time where not all are wanted at once
_T = TypeVar("_T")


def device_numbers(ndev: int, dev_ids: Sequence[int] | None) -> list[int]:
    """The devices that ``ndev`` and ``dev_ids`` mean; ConfigError if these are not as many different numbers."""
    ids = list(range(ndev)) if dev_ids is None else list(dev_ids)
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ConfigError(f"dev_ids is {ids}, expected device numbers, at least 0")
    if len(ids) != ndev or len(set(ids)) != ndev:
        raise ConfigError(f"dev_ids is {ids}, expected {ndev} different device numbers (ndev)")
    return ids


class Qwen3ForCausalLM:
    """A loaded model.

    Args:
        model_dir_path: a Hugging Face folder. None with ``build``: the build remembers where it came from. A folder
            without weight files gives the tokenizer alone.
        device: DeviceType, its number or its name; default: the build's own, the CPU for a build made here.
        ndev: how many devices of that kind share the model (tensor parallel).
        max_tokens: context length, at most (default) what the build was compiled for.
        dtype: ``"f32" | "f16" | "bf16"`` or a numpy or torch dtype; default: the checkpoint's own.
        build: a folder made by ``python -m codegen build``; default: built on first use and cached.
        quant, kv: as for ``codegen build``; with ``build`` they must be what it was made with.
        threads: threads of the embedded library (INFINICPU_THREADS); default: all cores.
        kv_pool_tokens: how many tokens all caches hold together, for builds with paged caches.
        prefill_chunk: prompts are computed in pieces of at most this many tokens.
        max_caches: how many caches generate() and stream() keep for prefix reuse.
        check_weights: warn about NaN and infinite weights.
        dev_ids: which devices of that kind, ``ndev`` different numbers; default: 0, 1, ...

    Raises:
        Qwen3Error: one line saying what was found and what was expected.
    """

    def __init__(
        self,
        model_dir_path: str | os.PathLike[str] | None = None,
        device: DeviceType | int | str | None = None,
        ndev: int = 1,
        max_tokens: int | None = None,
        dtype: Any = None,
        build: str | os.PathLike[str] | None = None,
        *,
        quant: str = "none",
        kv: str = "auto",
        threads: int | None = None,
        kv_pool_tokens: int | None = None,
        prefill_chunk: int = 512,
        max_caches: int = 32,
        check_weights: bool = True,
        dev_ids: Sequence[int] | None = None,
    ) -> None:
        wanted = None if device is None else DeviceType.parse(device)
        for name, value in (
            ("ndev", ndev),
            ("prefill_chunk", prefill_chunk),
            ("max_caches", max_caches),
            ("kv_pool_tokens", 1 if kv_pool_tokens is None else kv_pool_tokens),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}, expected a whole number, at least 1")
        ids = device_numbers(ndev, dev_ids)
        dtype = None if dtype is None else dtype_name(dtype)
        folder = None if model_dir_path is None else Path(model_dir_path).expanduser()
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder, expected a Hugging Face model directory")
        infinicore.set_threads(threads)
        self.build = _open_build(build, folder, wanted, dtype, quant, kv)
        found_device = DeviceType.parse(self.build.data["device"])
        started = time.perf_counter()
        self.prefill_chunk = prefill_chunk
        meta = meta_from_manifest(self.build, max_tokens)
        library_path = self.build.library
        provider = infinicore.load(self.build.data, ndev=ndev, device_id=ids[0])
        infinicore.check_devices(provider, self.build.data, ids)
        # A build from ONNX may keep its weights elsewhere than where the tokenizer lies.
        weights = Qwen3WeightsImpl.from_manifest(self.build, self.build.weights_folder(folder), ndev, check_weights)
        self.weight_bytes, self.weight_bytes_per_token = weights.nbytes, weights.nbytes_per_token
        self._engine = Engine(load_library(library_path), meta, weights, found_device, ids)
        try:
            if kv_pool_tokens is not None:
                self._engine.set_pool_size(kv_pool_tokens)
            beside = self.build.checkpoint_folder if folder is None else folder
            text_folder = beside if beside.is_dir() else None
            self.tokenizer = Tokenizer.find(text_folder)
            self.eos_token_ids = end_token_ids(text_folder, self.tokenizer, self.build.eos_token_ids)
        except BaseException:
            self._engine.close()
            raise
        paged = self.build.data["kv"]["form"] == "paged"
        # Paged caches are bounded by their pool, contiguous ones only by memory.
        self.pool = KVCachePool(self, max_caches, None if paged else max(meta.dctx, 8192))
        self.load_seconds = time.perf_counter() - started

    # ----------------------------------------------------------------------------------------------- basics

    @property
    def engine(self) -> Engine:
        """The compiled engine, for what this class does not wrap."""
        return self._engine

    @property
    def meta(self) -> Qwen3MetaCStruct:
        return self._engine.meta

    @property
    def eos_token_id(self) -> list[int]:
        """Tokens that end an answer (a list, as in jiuge)."""
        return self.eos_token_ids

    def max_context_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(self._engine.meta.dctx)

    def vocab_size(self) -> int:
        return int(self._engine.meta.dvoc)

    def create_kv_cache(self, capacity: int = 0) -> int:
        """An engine's cache handle; idle caches of the pool make room where there is none."""
        return self._with_memory(lambda: self._engine.create_cache(capacity))

    def duplicate_kv_cache(self, cache: int, length: int) -> int:
        return self._engine.duplicate_cache(cache, length)

    def trim_kv_cache(self, cache: int, length: int) -> None:
        self._engine.trim_cache(cache, length)

    def drop_kv_cache(self, cache: int | KVCache) -> None:
        if isinstance(cache, KVCache):
            cache.drop()
        else:
            self._engine.drop_cache(cache)

    def discard_kv_cache(self, cache: int) -> None:
        """drop_kv_cache that never waits and never fails, for finalizers."""
        self._engine.discard_cache(cache)

    def close(self) -> None:
        """Free the engine, its caches and the mapped weights. May be called again."""
        self.pool.finalize()
        self._engine.close()

    destroy_model_instance = close

    def __enter__(self) -> Qwen3ForCausalLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- batches

    def batch_infer_one_round(self, tasks: Sequence[InferTask]) -> list[int]:
        """One token for each task, in order. Call ``task.next(token)`` to go on.

        Tasks may stand anywhere: some with whole prompts, others in the middle of an answer. Prompts longer than
        ``prefill_chunk`` are computed in pieces.

        Raises:
            ConfigError: a task is finished, has a token outside the vocabulary, or is longer than the context.
            OutOfKVMemory: the caches do not fit; no task has moved.
        """
        tasks = list(tasks)
        for task in tasks:
            self._check_task(task)
        for i, task in enumerate(tasks):
            if task.kvcache() is None:
                task.bind_kvcache(KVCache(self), 0)
            if any(task.kvcache() is other.kvcache() for other in tasks[:i]):
                raise ConfigError(f"task {task.id}: shares its KV cache with another task of the batch")
        result = [0] * len(tasks)
        for pieces in schedule([len(task.tokens) for task in tasks], self.prefill_chunk):
            out = self._infer_pieces(tasks, pieces)
            for token, (i, _, stop) in zip(out, pieces):
                if stop == len(tasks[i].tokens):
                    result[i] = int(token)
        return result

    def _infer_pieces(self, tasks: Sequence[InferTask], pieces: list[tuple[int, int, int]]) -> np.ndarray:
        chosen = [tasks[i] for i, _, _ in pieces]
        final = [stop == len(tasks[i].tokens) for i, _, stop in pieces]
        return self._with_memory(
            lambda: self._engine.infer(
                [token for i, start, stop in pieces for token in tasks[i].tokens[start:stop]],
                [stop - start for _, start, stop in pieces],
                [tasks[i].pos + start for i, start, _ in pieces],
                [task.kvcache().data() for task in chosen],  # type: ignore[union-attr]
                [task.temperature for task in chosen],
                # The token after a piece that is not the last is not wanted: the cheapest choice.
                [min(task.topk, self.vocab_size()) if last else 1 for task, last in zip(chosen, final)],
                [task.topp for task in chosen],
                [task.random_value() for task in chosen],
            )
        )

    def forward(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits at every position: a float32 array [length, vocabulary] per sequence. No cache is kept."""
        ids = [self._check_sequence(tokens, f"sequence {i}") for i, tokens in enumerate(sequences)]
        out = [np.empty((len(tokens), self.vocab_size()), np.float32) for tokens in ids]
        for i, start, logits in self._logits(ids, self.prefill_chunk):
            out[i][start : start + len(logits)] = logits
        return out

    def perplexity(self, sequences: Sequence[Sequence[int]]) -> float:
        """exp of the mean negative log-likelihood of every token after the first of its sequence (each has >= 2)."""
        ids = [self._check_sequence(tokens, f"sequence {i}") for i, tokens in enumerate(sequences)]
        if not ids or any(len(tokens) < 2 for tokens in ids):
            raise ConfigError("perplexity: expected sequences of at least two tokens each")
        total = 0.0
        for i, start, logits in self._logits(ids, max(1, _LOGITS_BYTES // (4 * self.vocab_size()))):
            targets = np.asarray(ids[i][start + 1 : start + 1 + len(logits)])
            wide = logits[: len(targets)].astype(np.float64)
            top = wide.max(axis=1, initial=-np.inf)
            log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
            total += float((log_sum - wide[np.arange(len(targets)), targets]).sum())
        return float(np.exp(total / sum(len(tokens) - 1 for tokens in ids)))

    def _logits(self, ids: list[list[int]], limit: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(sequence, position, logits [n, vocabulary]) in pieces; caches live as short as possible."""
        limit = min(limit, self.prefill_chunk)
        group: list[int] = []
        for i in range(len(ids) + 1):
            if group and (i == len(ids) or sum(len(ids[j]) for j in [*group, i]) > limit):
                yield from self._logits_of_group(ids, group, limit)
                group = []
            group.append(i)

    def _logits_of_group(
        self, ids: list[list[int]], group: list[int], limit: int
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        caches = [KVCache(self) for _ in group]
        try:
            for pieces in schedule([len(ids[i]) for i in group], limit):
                tokens = [token for g, start, stop in pieces for token in ids[group[g]][start:stop]]
                lengths = [stop - start for _, start, stop in pieces]
                positions = [start for _, start, _ in pieces]
                handles = [caches[g].data() for g, _, _ in pieces]
                rows = range(len(tokens))
                logits = self._with_memory(lambda: self._engine.forward(tokens, lengths, positions, handles, rows))
                at = 0
                for g, start, stop in pieces:
                    yield group[g], start, logits[at : at + stop - start]
                    at += stop - start
        finally:
            for cache in caches:
                cache.drop()

    # ----------------------------------------------------------------------------------------------- answers

    def generate(
        self,
        input_content: Any,
        max_steps: int = 50,
        topp_: float = 1.0,
        topk_: int = 1,
        temperature_: float = 1.0,
        seed: int | None = None,
        verbose: bool = False,
        chat: bool | None = None,
        enable_thinking: bool = False,
        system: str | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> tuple[str, float]:
        """Answer a prompt; see stream() for the arguments.

        ``verbose`` prints the answer as it comes and then the speed; ``stream`` is called with each piece of text.

        Returns:
            (the answer's text, milliseconds per step).
        """
        generation = self.stream(
            input_content, max_steps, topp_, topk_, temperature_, seed, chat, enable_thinking, system
        )
        pieces = []
        for piece in generation:
            pieces.append(piece)
            if stream is not None:
                stream(piece)
            if verbose:
                print(piece, end="", flush=True)
        if verbose:
            print()
            print(f"{len(generation.seconds)} steps, {generation.ms_per_step:.2f} ms per step", file=sys.stderr)
        return "".join(pieces), generation.ms_per_step

    def stream(
        self,
        input_content: Any,
        max_steps: int = 50,
        topp_: float = 1.0,
        topk_: int = 1,
        temperature_: float = 1.0,
        seed: int | None = None,
        chat: bool | None = None,
        enable_thinking: bool = False,
        system: str | None = None,
        end_tokens: Iterable[int] | None = None,
    ) -> Generation:
        """Like generate(), but returns an iterator over the text as it becomes certain.

        Args:
            input_content: a text, a list of chat messages (``{"role": "user", "content": "..."}``), or token ids.
            max_steps: how many tokens the answer may have.
            topp_, topk_, temperature_: the default topk_=1 takes the likeliest token. seed: see InferTask.
            chat: put a text into the checkpoint's chat template; default: if it has one.
            enable_thinking: for templates that know it. system: a system message to begin with.
            end_tokens: default: the checkpoint's own (``eos_token_ids``).

        Raises:
            ConfigError: the prompt is empty or longer than the context, or a setting is out of range.
        """
        tokens = self.prompt_tokens(input_content, chat, enable_thinking, system)
        ends = self.eos_token_ids if end_tokens is None else list(end_tokens)
        check_sampling(temperature_, topk_, topp_, seed)
        if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
            raise ConfigError(f"max_steps is {max_steps!r}, expected a whole number, at least 1")
        self._check_length(len(tokens), "prompt")
        task = InferTask("generate", tokens, max_steps, temperature_, topk_, topp_, ends, seed)
        progress = Progress()
        return Generation(tokens, task.seed, progress, self._pieces(task, progress))

    def prompt_tokens(
        self, input_content: Any, chat: bool | None = None, enable_thinking: bool = False, system: str | None = None
    ) -> list[int]:
        """The token ids that a prompt (text, chat messages or ids) becomes."""
        is_messages = isinstance(input_content, (list, tuple)) and any(isinstance(m, dict) for m in input_content)
        if not isinstance(input_content, str) and not is_messages:
            return check_tokens(input_content, self.vocab_size(), "prompt")
        if self.tokenizer is None:
            raise ConfigError("prompt: this checkpoint has no tokenizer.json, give token ids instead of text")
        if not is_messages and not input_content:
            raise ConfigError("prompt: empty, expected at least one character")
        use_chat = is_messages or (self.tokenizer.chat_template is not None if chat is None else chat)
        if not use_chat:
            text = input_content if system is None else f"{system}\n{input_content}"
            return check_tokens(self.tokenizer.encode(text), self.vocab_size(), "prompt")
        messages = list(input_content) if is_messages else [{"role": "user", "content": input_content}]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        text = self.tokenizer.apply_chat_template(messages, enable_thinking)
        return check_tokens(self.tokenizer.encode(text, add_special_tokens=False), self.vocab_size(), "prompt")

    def _pieces(self, task: InferTask, progress: Progress) -> Generator[str, None, None]:
        decoder = None if self.tokenizer is None else self.tokenizer.decoder()
        progress.reused = self.pool.acquire_sync(task)
        try:
            while task.finish_reason is None:
                started = time.perf_counter()
                token = self.batch_infer_one_round([task])[0]
                task.next(token, self.max_context_len())
                progress.seconds.append(time.perf_counter() - started)
                if task.finish_reason == "stop":
                    break
                progress.tokens.append(token)
                if decoder is None:
                    yield f" {token}" if len(progress.tokens) > 1 else str(token)
                elif piece := decoder.push(token):
                    yield piece
            if decoder is not None and (rest := decoder.flush()):
                yield rest
        finally:
            progress.finish_reason = task.finish_reason
            self.pool.release_sync(task)

    # ---------------------------------------------------------------------------------------------- internal

    def _with_memory(self, call: Callable[[], _T]) -> _T:
        """Run an engine call; while it lacks KV memory, free idle caches and try again."""
        while True:
            try:
                return call()
            except OutOfKVMemory:
                if not self.pool.evict():
                    raise

    def _check_task(self, task: InferTask) -> None:
        if task.finish_reason is not None:
            raise ConfigError(f"task {task.id}: is finished ({task.finish_reason})")
        check_tokens(task.tokens, self.vocab_size(), f"task {task.id}")
        self._check_length(task.pos + len(task.tokens), f"task {task.id}")

    def _check_sequence(self, tokens: Sequence[int], what: str) -> list[int]:
        ids = check_tokens(tokens, self.vocab_size(), what)
        self._check_length(len(ids), what)
        return ids

    def _check_length(self, length: int, what: str) -> None:
        if length > self.max_context_len():
            raise ConfigError(f"{what}: {length} tokens, expected at most {self.max_context_len()} (the context)")


def _open_build(
    build: str | os.PathLike[str] | None,
    folder: Path | None,
    device: DeviceType | None,
    dtype: str | None,
    quant: str,
    kv: str,
) -> Build:
    if build is None:
        if folder is None:
            raise ConfigError("model_dir_path: expected a model folder, or build=... with a build folder")
        from runtime.builds import build_for

        target = (DeviceType.DEVICE_TYPE_CPU if device is None else device).target
        return build_for(folder, target=target, dtype=dtype, quant=quant, kv=kv)
    found = read_build(build)
    for name, asked, has in (
        ("device", None if device is None else device.target, DeviceType.parse(found.data["device"]).target),
        ("dtype", dtype, found.data["dtype"]),
        ("quant", None if quant == "none" else quant, found.data.get("quant")),
        ("kv", None if kv == "auto" else kv, found.data["kv"]["form"]),
    ):
        if asked is not None and asked != has:
            raise ConfigError(f"{found.folder}: was built for {name} {has}, asked for {name} {asked}")
    return found

"""A thin wrapper of one compiled engine: arrays in, arrays out, statuses as exceptions. Knows nothing of text."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import BuildError, InfiniCoreError
from runtime.structs import (
    PROTOTYPES,
    STATUS_INTERNAL_ERROR,
    STATUS_NAMES,
    STATUS_OUT_OF_KV_MEMORY,
    KVPoolInfoCStruct,
    Qwen3MetaCStruct,
    Qwen3WeightsCStruct,
    declare,
    field_names,
)

_U32, _F32 = np.dtype(np.uint32), np.dtype(np.float32)


class OutOfKVMemory(InfiniCoreError):
    """The KV pool has no room for this step; nothing was changed. Drop or trim caches, or make the pool larger."""


def load_library(path: Path) -> ctypes.CDLL:
    """dlopen a libqwen3.so; InfiniCore has to be loaded already (runtime.infinicore.load)."""
    try:
        return declare(ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from None
    except AttributeError as error:
        raise BuildError(f"{path} is not an engine of this version: {error}; build it again") from None


def _array(values: Any, dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray(values, dtype)


def _pointer(array: np.ndarray | None, kind: Any) -> Any:
    return None if array is None else array.ctypes.data_as(kind)


_U32_POINTER, _F32_POINTER = ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_float)


class Engine:
    """One model of one library. Cache handles are plain integers, valid until dropped or until close().

    Args:
        library: a loaded libqwen3.so.
        meta, weights: as in qwen3_impl.hpp; on the CPU ``weights`` is kept alive until close().
        device: infiniDevice_t. dev_ids: which devices of that kind.

    Raises:
        InfiniCoreError: with the call, its infiniStatus_t and the engine's own text.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        meta: Qwen3MetaCStruct,
        weights: Qwen3WeightsCStruct,
        device: int = 0,
        dev_ids: Sequence[int] = (0,),
    ) -> None:
        self._library, self.meta = library, meta
        self._lock = threading.RLock()  # close() must not run under another thread's call
        self._caches: set[int] = set()
        self._discarded: deque[int] = deque()
        ids = (ctypes.c_int * len(dev_ids))(*dev_ids)
        self._model: int | None = library.createQwen3Model(
            ctypes.byref(meta), ctypes.byref(weights), int(device), len(dev_ids), ids
        )
        if not self._model:
            raise self._error("createQwen3Model", None)
        # The CPU uses them where they lie; other devices have copies by now.
        self._weights: Qwen3WeightsCStruct | None = weights if int(device) == 0 else None

    # ------------------------------------------------------------------------------------------------- steps

    def infer(
        self,
        tokens: Any,
        lengths: Any,
        positions: Any,
        caches: Sequence[int],
        temperature: Any,
        top_k: Any,
        top_p: Any,
        random: Any = None,
    ) -> np.ndarray:
        """One step of a ragged batch.

        Args:
            tokens: [sum(lengths)] ids, all requests one after another.
            lengths, positions: [requests] how many tokens each has and where in its cache they go.
            caches: [requests] handles, all different.
            temperature, top_k, top_p, random: [requests]; ``random`` in [0, 1), None: the engine's own generator.

        Returns:
            uint32 [requests]: the sampled token after each request's last one.

        Raises:
            OutOfKVMemory: no room; nothing was changed. InfiniCoreError: anything else.
        """
        lengths, positions = _array(lengths, _U32), _array(positions, _U32)
        out = np.empty(len(lengths), _U32)
        chance = None if random is None else _array(random, _F32)
        self._step(
            "inferBatch",
            _array(tokens, _U32),
            lengths,
            positions,
            caches,
            _array(temperature, _F32),
            _array(top_k, _U32),
            _array(top_p, _F32),
            chance,
            out,
        )
        return out

    def forward(self, tokens: Any, lengths: Any, positions: Any, caches: Sequence[int], rows: Any = None) -> np.ndarray:
        """Like infer(), but returns logits: float32 [len(rows), vocabulary].

        ``rows`` are indices into ``tokens``; None: the last token of each request.
        """
        lengths, positions = _array(lengths, _U32), _array(positions, _U32)
        chosen = None if rows is None else _array(rows, _U32)
        count = len(lengths) if chosen is None else len(chosen)
        logits = np.empty((count, self.meta.dvoc), _F32)
        self._step("forwardBatch", _array(tokens, _U32), lengths, positions, caches, chosen, count, logits)
        return logits

    def _step(
        self,
        call: str,
        tokens: np.ndarray,
        lengths: np.ndarray,
        positions: np.ndarray,
        caches: Sequence[int],
        *rest: Any,
    ) -> None:
        handles = (ctypes.c_void_p * len(caches))(*caches)
        kinds = PROTOTYPES[call][1][7:]
        converted = [_pointer(v, k) if v is None or isinstance(v, np.ndarray) else v for v, k in zip(rest, kinds)]
        with self._lock:
            self._check_caches(call, caches)
            status = getattr(self._library, call)(
                self._open(call),
                _pointer(tokens, _U32_POINTER),
                len(tokens),
                _pointer(lengths, _U32_POINTER),
                len(lengths),
                _pointer(positions, _U32_POINTER),
                handles,
                *converted,
            )
            if status:
                raise self._error(call, status)

    # ------------------------------------------------------------------------------------------------ caches

    def create_cache(self, capacity: int = 0) -> int:
        """A new, empty cache; ``capacity`` in tokens is a hint."""
        return self._new_cache("createKVCache", capacity)

    def duplicate_cache(self, cache: int, length: int) -> int:
        """A cache with the first ``length`` tokens of another one; blocks are shared copy-on-write where paged."""
        with self._lock:
            self._check_caches("duplicateKVCache", [cache])
            return self._new_cache("duplicateKVCache", cache, length)

    def trim_cache(self, cache: int, length: int) -> None:
        self._cache_call("trimKVCache", cache, length)

    def reserve_cache(self, cache: int, tokens: int) -> None:
        """Make room for ``tokens`` in total; OutOfKVMemory when there is none."""
        self._cache_call("reserveKVCache", cache, tokens)

    def cache_length(self, cache: int) -> int:
        """Tokens in the cache."""
        with self._lock:
            self._check_caches("lengthKVCache", [cache])
            return int(self._library.lengthKVCache(cache))

    def drop_cache(self, cache: int) -> None:
        """Free a cache. After close() this does nothing: the caches went with the model."""
        with self._lock:
            if self._model is None:
                return
            self._cache_call("dropKVCache", cache)
            self._caches.discard(cache)

    def discard_cache(self, cache: int) -> None:
        """drop_cache that never waits, for finalizers: where another thread is in a call, the next call frees the cache.

        A finalizer may run in any thread, whatever locks that thread holds.
        """
        self._discarded.append(cache)
        if self._lock.acquire(blocking=False):
            try:
                self._free_discarded()
            finally:
                self._lock.release()

    def export_cache(self, cache: int, start: int, tokens: int, dtype: np.dtype) -> np.ndarray:
        """K and V of a range of positions: [layers, 2, kv heads, tokens, head dim] in the build's KV dtype."""
        meta = self.meta
        out = np.empty((meta.nlayer, 2, meta.nkvh, tokens, meta.dh), dtype)
        self._cache_call("exportKVCache", cache, start, tokens, out.ctypes.data_as(ctypes.c_void_p))
        return out

    def import_cache(self, cache: int, start: int, values: np.ndarray) -> None:
        """The inverse of export_cache: write ``values`` at positions start..; the cache grows to hold them."""
        meta = self.meta
        expected = (meta.nlayer, 2, meta.nkvh, meta.dh)
        if values.ndim != 5 or (*values.shape[:3], values.shape[4]) != expected:
            raise BuildError(
                f"import_cache: values are {list(values.shape)}, expected [layers, 2, kv heads, n, head dim]"
            )
        values = np.ascontiguousarray(values)
        self._cache_call("importKVCache", cache, start, values.shape[3], values.ctypes.data_as(ctypes.c_void_p))

    def set_pool_size(self, tokens: int) -> None:
        """How many tokens all caches hold together (paged builds). Only before the first cache is made."""
        self._call("setKVPoolSize", tokens)

    def pool_info(self) -> dict[str, int]:
        """block_size, total_blocks, free_blocks (all 0 where caches are contiguous), bytes_per_token, bytes_allocated."""
        info = KVPoolInfoCStruct()
        self._call("getKVPoolInfo", ctypes.byref(info))
        return {name: int(getattr(info, name)) for name in field_names(KVPoolInfoCStruct)}

    # ------------------------------------------------------------------------------------------------- other

    def set_trace(self, on: bool) -> None:
        """Print every InfiniCore call to stderr."""
        self._call("setTrace", int(on))

    def set_capture(self, on: bool) -> None:
        """Decode steps as captured graphs (where the target has them; so at first) or as calls."""
        self._call("setCapture", int(on))

    def counter(self, name: str) -> int:
        """What the first device has done or holds so far; 0 for a name that is none of these.

        Args:
            name: ``steps``, ``plans_built``, ``plans_evicted``, ``descriptors_created``, ``device_allocations``, ``h2d_copies``, ``graphs_captured``,
                ``graphs_replayed``, ``captures_failed``, ``collectives``; or in bytes ``collective_bytes`` (that it put in), ``weight_bytes`` (that it reads),
                ``device_bytes`` (of device memory beside weights).
        """
        with self._lock:
            return int(self._library.getQwen3Counter(self._open("getQwen3Counter"), name.encode()))

    def compiled_meta(self) -> Qwen3MetaCStruct:
        """The constants that the library was compiled with."""
        return self._library.getQwen3Meta().contents

    @property
    def closed(self) -> bool:
        return self._model is None

    def close(self) -> None:
        """Free the model and every cache of it. May be called again."""
        with self._lock:
            if self._model is None:
                return
            model, self._model = self._model, None  # from here on a finalizer that runs in between frees nothing
            while self._caches:
                self._library.dropKVCache(model, self._caches.pop())
            self._library.destroyQwen3Model(model)
            self._weights = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_model", None) is not None:
            self.close()

    # ---------------------------------------------------------------------------------------------- internal

    def _open(self, call: str) -> int:
        if self._model is None:
            raise InfiniCoreError(call, STATUS_INTERNAL_ERROR, "the model is closed")
        self._free_discarded()
        return self._model

    def _free_discarded(self) -> None:
        while True:
            try:
                cache = self._discarded.popleft()
            except IndexError:  # not tested beforehand: a finalizer in this thread may empty it in between
                return
            if self._model is not None and cache in self._caches:
                self._caches.discard(cache)
                self._library.dropKVCache(self._model, cache)

    def _call(self, call: str, *arguments: Any) -> None:
        with self._lock:
            status = getattr(self._library, call)(self._open(call), *arguments)
            if status:
                raise self._error(call, status)

    def _cache_call(self, call: str, cache: int, *arguments: Any) -> None:
        with self._lock:
            self._check_caches(call, [cache])
            self._call(call, cache, *arguments)

    def _new_cache(self, call: str, *arguments: Any) -> int:
        with self._lock:
            handle = getattr(self._library, call)(self._open(call), *arguments)
            if not handle:
                raise self._error(call, None)
            self._caches.add(handle)
            return handle

    def _check_caches(self, call: str, caches: Sequence[int]) -> None:
        self._open(call)
        for cache in caches:
            if cache not in self._caches:
                raise InfiniCoreError(call, 3, f"KV cache {cache!r} is not one of this model, or was dropped")

    def _error(self, call: str, status: int | None) -> InfiniCoreError:
        """The exception for a failed call; one that returns a pointer has its status in the text alone."""
        text = (self._library.qwen3LastError() or b"").decode("utf-8", "replace")
        if status is None:
            found = re.findall(r"status (\d+)", text)
            status = int(found[-1]) if found else STATUS_INTERNAL_ERROR
        name = STATUS_NAMES.get(status, "unknown status")
        detail = text if name in text else f"{text} ({name})" if text else name
        kind = OutOfKVMemory if status == STATUS_OUT_OF_KV_MEMORY and call != "createQwen3Model" else InfiniCoreError
        return kind(call, status, detail)

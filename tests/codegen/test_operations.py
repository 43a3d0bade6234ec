"""Random sequences of operations on several caches of an engine, each step compared with onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import OutOfKVMemory
from runtime.structs import NUMPY_DTYPES
from tests.codegen.engines import open_engine
from tests.codegen.test_engine import CASES, EXACT, Subject
from tests.models import relative_l2


class Session:
    """Several caches of an engine beside the tokens that each should hold; every step is compared with onnxruntime."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.s = subject
        self.rng = np.random.default_rng(seed)
        self.caches: dict[int, list[int]] = {}
        self.refused = 0

    def run(self, operation: str) -> None:
        getattr(self, operation)()
        for cache, tokens in self.caches.items():
            assert self.s.engine.cache_length(cache) == len(tokens)

    def some(self) -> int:
        return int(self.rng.choice(list(self.caches)))

    def create(self) -> None:
        if len(self.caches) < 6:
            self.caches[self.s.engine.create_cache(int(self.rng.choice([0, 0, 20])))] = []

    def duplicate(self) -> None:
        if self.caches and len(self.caches) < 6:
            source = self.some()
            length = int(self.rng.integers(len(self.caches[source]) + 1))
            copy = self.s.engine.duplicate_cache(source, length)
            self.caches[copy] = self.caches[source][:length]

    def trim(self) -> None:
        if self.caches:
            cache = self.some()
            length = int(self.rng.integers(len(self.caches[cache]) + 1))
            self.s.engine.trim_cache(cache, length)
            self.caches[cache] = self.caches[cache][:length]

    def drop(self) -> None:
        if self.caches:
            cache = self.some()
            self.s.engine.drop_cache(cache)
            del self.caches[cache]

    def swap(self) -> None:
        """Out to the host and into another cache."""
        if self.caches and len(self.caches) < 6:
            cache = self.some()
            tokens = self.caches[cache]
            if tokens:
                values = self.s.engine.export_cache(cache, 0, len(tokens), NUMPY_DTYPES[self.s.dtype])
                self.s.engine.drop_cache(cache)
                del self.caches[cache]
                new = self.s.engine.create_cache(0)
                self.s.engine.import_cache(new, 0, values)
                self.caches[new] = tokens

    def step(self) -> None:
        """One batch: some caches, each with a few new tokens at or before its end."""
        if not self.caches:
            return
        chosen = [int(c) for c in self.rng.permutation(list(self.caches))[: self.rng.integers(1, len(self.caches) + 1)]]
        starts, new = [], []
        for cache in chosen:
            length = len(self.caches[cache])
            starts.append(length if self.rng.random() < 0.7 else int(self.rng.integers(length + 1)))
            room = self.s.engine.meta.dctx - starts[-1]
            count = min(1 if self.rng.random() < 0.5 else int(self.rng.integers(1, 20)), room)
            if count == 0:
                return
            new.append(self.rng.integers(0, self.s.vocabulary, count).tolist())
        before = {cache: self.s.bytes_of(cache) for cache in self.caches}
        try:
            found = self.s.engine.forward(np.concatenate(new), [len(n) for n in new], starts, chosen)
        except OutOfKVMemory:
            self.refused += 1
            assert {cache: self.s.bytes_of(cache) for cache in self.caches} == before
            self.drop()
            return
        for cache, start, tokens, logits in zip(chosen, starts, new, found):
            self.caches[cache] = self.caches[cache][:start] + tokens
            assert relative_l2(logits, self.s.expected(np.array(self.caches[cache]))[-1]) <= EXACT
        for cache in set(self.caches) - set(chosen):
            assert self.s.bytes_of(cache) == before[cache]


@pytest.mark.parametrize("name", ["any-two-f32", "paged-one-f32"])
@settings(derandomize=True, deadline=None, max_examples=8, database=None)
@given(data=st.data())
def test_any_sequence_of_operations(build_engine, name, data):
    model, options = CASES[name]
    names = st.sampled_from(["create", "create", "step", "step", "step", "step", "duplicate", "trim", "drop", "swap"])
    operations = ["create", "create", "step", *data.draw(st.lists(names, min_size=20, max_size=40))]
    seed = data.draw(st.integers(0, 2**32 - 1))
    with open_engine(build_engine(model, **options)) as engine:
        paged = options.get("kv") == "paged"
        if paged:
            engine.set_pool_size(14 * 16)  # less than six long caches want
        reference = build_engine.reference(build_engine.checkpoint(model))
        session = Session(Subject(engine, reference, "f32", EXACT, engine.meta.dvoc), seed)
        for operation in operations:
            try:
                session.run(operation)
            except OutOfKVMemory:
                assert paged and operation in ("create", "swap")
                return
        for cache in list(session.caches):
            engine.drop_cache(cache)
        info = engine.pool_info()
        assert info["free_blocks"] == info["total_blocks"]  # nothing leaked
        assert paged or info["bytes_allocated"] == 0

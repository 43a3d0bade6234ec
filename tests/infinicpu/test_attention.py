"""paged_caching, kv_caching, paged_attention (decode and prefill) and the composite attention against float64.

Bound: a score is a sum of at least 4 lanes of dim / 4 products, so it is off by d <= (dim / 4 + 8) u scale sum|q||k|. Weights
are exp(score - max): relative error d + (|score - max| + 8) u, in the numerator and, averaged, in the sum. The result
is a weighted mean of v, and sums of up to `length` terms: error <= (2 d + (2 reach + length + 32) u) sum w|v|.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from .lib import BAD_PARAM, F16, F32, FLOATS, Operator, call, f, library, smallest_step, strided, unit_roundoff

U = 2.0**-24
INDEX_DTYPES = [np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.uint32)]
seeds = st.integers(0, 99)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: int, scale: float, slope: float
) -> tuple[np.ndarray, np.ndarray]:
    """One query over k, v [total, dim] in float64; (result, error bound before the rounding to the dtype)."""
    q, k, v = (x.astype(np.float64) for x in (q, k[:visible], v[:visible]))
    if visible == 0:
        return np.zeros(v.shape[1]), np.zeros(v.shape[1])
    distance = np.arange(visible) - (visible - 1)
    scores = scale * (k @ q) + slope * distance
    size = abs(scale) * (np.abs(k) @ np.abs(q)) + abs(slope * distance)
    d = (len(q) / 4 + 8) * U * size.max()
    spread = scores - scores.max()
    weights = np.exp(spread)
    weights /= weights.sum()
    bound = (2 * d + (2 * np.abs(spread).max() + visible + 32) * U) * (weights @ np.abs(v))
    return weights @ v, bound


def check(actual: np.ndarray, exact: np.ndarray, bound: np.ndarray) -> None:
    total = bound + unit_roundoff(actual.dtype) * (np.abs(exact) + bound) + smallest_step(actual.dtype)
    error = np.abs(actual.astype(np.float64) - exact)
    assert (error <= total).all(), f"worst {np.max(error / total)} of the bound"


@dataclass
class Paged:
    """A cache of blocks with shuffled block tables, and the logical k, v of each sequence."""

    k_cache: np.ndarray
    v_cache: np.ndarray
    tables: np.ndarray
    lengths: np.ndarray
    k: list[np.ndarray]
    v: list[np.ndarray]


def make_paged(
    rng: np.random.Generator,
    lengths: list[int],
    kv_heads: int,
    dim: int,
    block: int,
    dtype: np.dtype,
    index: np.dtype,
    by_row: bool,
) -> Paged:
    """`by_row` lays the cache out as [blocks, block_size, kv_heads, dim] in memory."""
    width = max(1, *(-(-n // block) for n in lengths)) + 1
    blocks = len(lengths) * width + 2
    order = (0, 2, 1, 3) if by_row else (0, 1, 2, 3)
    k_cache, v_cache = (strided(rng, (blocks, kv_heads, block, dim), dtype, True, order) for _ in range(2))
    k_cache[...], v_cache[...] = np.nan, np.nan  # whatever is not written must not matter
    tables = rng.permutation(blocks)[: len(lengths) * width].reshape(len(lengths), width)
    used = tables.copy()
    ks, vs = [], []
    for i, length in enumerate(lengths):
        k, v = (rng.standard_normal((kv_heads, length, dim)).astype(dtype) for _ in range(2))
        for t in range(length):
            k_cache[tables[i, t // block], :, t % block] = k[:, t]
            v_cache[tables[i, t // block], :, t % block] = v[:, t]
        used[i, -(-length // block) :] = 2**30  # entries beyond the length are never looked at
        ks.append(k)
        vs.append(v)
    return Paged(k_cache, v_cache, used.astype(index), np.array(lengths, index), ks, vs)


geometry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(FLOATS),
        "index": st.sampled_from(INDEX_DTYPES),
        "group": st.sampled_from([1, 2, 3, 5, 8]),
        "kv_heads": st.integers(1, 3),
        "dim": st.sampled_from([8, 17, 64, 128]),
        "block": st.sampled_from([1, 3, 16, 64, 100]),
        "by_row": st.booleans(),
        "alibi": st.booleans(),
        "seed": seeds,
    }
)


def slopes_of(g: dict, heads: int) -> np.ndarray | None:
    return (2.0 ** -np.arange(1, heads + 1)).astype(F32) if g["alibi"] else None


@given(g=geometry, lengths=st.lists(st.sampled_from([0, 1, 2, 15, 63, 64, 65, 130, 300]), min_size=1, max_size=4))
@example(
    g=dict(dtype=F32, index=INDEX_DTYPES[0], group=2, kv_heads=1, dim=16, block=16, by_row=False, alibi=False, seed=1),
    lengths=[2500],
)
@example(
    g=dict(dtype=F16, index=INDEX_DTYPES[1], group=4, kv_heads=2, dim=64, block=32, by_row=True, alibi=True, seed=2),
    lengths=[1100, 3],
)
def test_decode(g: dict, lengths: list[int]) -> None:
    rng = np.random.default_rng(g["seed"])
    heads, dim = g["group"] * g["kv_heads"], g["dim"]
    cache = make_paged(rng, lengths, g["kv_heads"], dim, g["block"], g["dtype"], g["index"], g["by_row"])
    q, out = (strided(rng, (len(lengths), heads, dim), g["dtype"], True) for _ in range(2))
    slopes, scale = slopes_of(g, heads), dim**-0.5
    call("PagedAttention", [out, q, cache.k_cache, cache.v_cache, cache.tables, cache.lengths, slopes], [f(scale)])
    for i, length in enumerate(lengths):
        for h in range(heads):
            kv = h // g["group"]
            slope = 0.0 if slopes is None else float(slopes[h])
            check(out[i, h], *attend(q[i, h], cache.k[i][kv], cache.v[i][kv], length, scale, slope))


@given(
    g=geometry,
    parts=st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 9, 40]), st.sampled_from([0, 1, 63, 64, 200])), min_size=1, max_size=3
    ),
)
def test_prefill(g: dict, parts: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(g["seed"])
    heads, dim = g["group"] * g["kv_heads"], g["dim"]
    lengths = [new + past for new, past in parts]
    cache = make_paged(rng, lengths, g["kv_heads"], dim, g["block"], g["dtype"], g["index"], g["by_row"])
    starts = np.concatenate([[0], np.cumsum([new for new, _ in parts])]).astype(g["index"])
    total = int(starts[-1])
    q, out = (strided(rng, (total + 2, heads, dim), g["dtype"], True) for _ in range(2))  # two rows of no sequence
    before = out.copy()
    slopes, scale = slopes_of(g, heads), dim**-0.5
    arrays = [out, q, cache.k_cache, cache.v_cache, cache.tables, cache.lengths, starts, slopes]
    call("PagedAttentionPrefill", arrays, [f(scale)])
    for i, (new, past) in enumerate(parts):
        for j in {0, 1, new // 2, new - 1} & set(range(new)):
            for h in range(heads):
                kv = h // g["group"]
                slope = 0.0 if slopes is None else float(slopes[h])
                row = int(starts[i]) + j
                check(out[row, h], *attend(q[row, h], cache.k[i][kv], cache.v[i][kv], past + j + 1, scale, slope))
    np.testing.assert_array_equal(out[total:].astype(np.float32), before[total:].astype(np.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_prefill_padding_sequence_writes_zeros(dtype: np.dtype) -> None:
    """seq_len 0 with query rows: padding."""
    rng = np.random.default_rng(4)
    cache = make_paged(rng, [0, 5], 2, 16, 4, dtype, INDEX_DTYPES[0], False)
    q, out = (rng.standard_normal((5, 4, 16)).astype(dtype) for _ in range(2))
    starts = np.array([0, 3, 5], np.int32)
    call(
        "PagedAttentionPrefill",
        [out, q, cache.k_cache, cache.v_cache, cache.tables, cache.lengths, starts, None],
        [f(0.25)],
    )
    assert (out[:3].astype(np.float32) == 0).all() and np.isfinite(out[3:].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_prefill_and_decode_agree(dtype: np.dtype) -> None:
    """The same query as prefill's last row and as decode, alone and in a batch: the same tiles, so the same bits in f32
    up to where decode cuts the range (5e-6 covers that: some tens of roundings of 6e-8)."""
    rng = np.random.default_rng(5)
    lengths = [200, 77]
    cache = make_paged(rng, lengths, 2, 64, 16, dtype, INDEX_DTYPES[0], False)
    q = rng.standard_normal((277, 4, 64)).astype(dtype)
    prefill, decode, alone = np.empty_like(q), np.empty((2, 4, 64), dtype), np.empty((1, 4, 64), dtype)
    common = [cache.k_cache, cache.v_cache]
    starts = np.array([0, 200, 277], np.int32)
    call("PagedAttentionPrefill", [prefill, q, *common, cache.tables, cache.lengths, starts, None], [f(0.125)])
    last = np.ascontiguousarray(q[[199, 276]])
    call("PagedAttention", [decode, last, *common, cache.tables, cache.lengths, None], [f(0.125)])
    call("PagedAttention", [alone, last[:1], *common, cache.tables[:1], cache.lengths[:1], None], [f(0.125)])
    tolerance = 5e-6 + unit_roundoff(dtype) * 2 * (dtype != F32)
    for actual, expected in [(decode, prefill[[199, 276]]), (alone, prefill[[199]])]:
        np.testing.assert_allclose(
            actual.astype(np.float32), expected.astype(np.float32), rtol=tolerance, atol=tolerance
        )


def bad_decode(**changes: object) -> int:
    rng = np.random.default_rng(6)
    cache = make_paged(rng, [5, 9], 1, 8, 4, F32, INDEX_DTYPES[1], False)
    tables, lengths = cache.tables.copy(), cache.lengths.copy()
    if "length" in changes:
        lengths[1] = changes["length"]
    if "block" in changes:
        tables[1, 2] = changes["block"]
    out, q = np.full((2, 2, 8), 3, F32), np.ones((2, 2, 8), F32)
    operator = Operator("PagedAttention", [out, q, cache.k_cache, cache.v_cache, tables, lengths, None], [f(1.0)])
    status = operator(out, q, cache.k_cache, cache.v_cache, tables, lengths, None)
    operator.destroy()
    assert status == 0 or (out == 3).all()
    return status


def test_decode_refuses_what_lies_outside() -> None:
    assert bad_decode() == 0
    for change in [{"length": -1}, {"length": 17}, {"length": 2**40}, {"block": -1}, {"block": 10}, {"block": 2**40}]:
        assert bad_decode(**change) == BAD_PARAM, change


@pytest.mark.parametrize("starts", [[0, 6, 9], [-1, 5, 9], [0, 5, 4], [0, 5, 15]])
def test_prefill_refuses_bad_starts(starts: list[int]) -> None:
    """More new tokens than the length, negative, falling, beyond q."""
    rng = np.random.default_rng(7)
    cache = make_paged(rng, [5, 9], 1, 8, 4, F32, INDEX_DTYPES[1], False)
    out, q = np.full((14, 2, 8), 3, F32), np.ones((14, 2, 8), F32)
    arrays = [out, q, cache.k_cache, cache.v_cache, cache.tables, cache.lengths, np.array(starts, np.int64), None]
    call("PagedAttentionPrefill", arrays, [f(1.0)], status=BAD_PARAM)
    assert (out == 3).all()


@given(
    dtype=st.sampled_from(FLOATS),
    tokens=st.integers(0, 20),
    kv_heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    block=st.integers(1, 7),
    by_row=st.booleans(),
    seed=seeds,
)
def test_paged_caching(
    dtype: np.dtype, tokens: int, kv_heads: int, dims: tuple[int, int], block: int, by_row: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    blocks = 8
    order = (0, 2, 1, 3) if by_row else (0, 1, 2, 3)
    caches = [strided(rng, (blocks, kv_heads, block, d), dtype, True, order) for d in dims]
    sources = [strided(rng, (tokens, kv_heads, d), dtype, True) for d in dims]
    slots = rng.permutation(blocks * block)[:tokens].astype(np.int64)
    slots = np.concatenate([slots, np.full(tokens - len(slots), -1)]).astype(np.int64)
    slots[rng.random(tokens) < 0.3] = -rng.integers(1, 100)
    expected = [c.copy() for c in caches]
    for t, slot in enumerate(slots):
        for cache, source in zip(expected, sources, strict=True):
            if slot >= 0:
                cache[slot // block, :, slot % block] = source[t]
    call("PagedCaching", [*caches, *sources, slots])
    for actual, cache in zip(caches, expected, strict=True):
        np.testing.assert_array_equal(actual.astype(np.float32), cache.astype(np.float32))


def test_paged_caching_refuses_slots_beyond_the_cache() -> None:
    caches = [np.zeros((3, 1, 4, 2), F32) for _ in range(2)]
    source = np.ones((2, 1, 2), F32)
    call("PagedCaching", [*caches, source, source, np.array([0, 12], np.int64)], status=BAD_PARAM)
    assert (caches[0] == 0).all() and (caches[1] == 0).all()


@given(
    dtype=st.sampled_from(FLOATS),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 5), st.integers(1, 9)),
    index=st.sampled_from(INDEX_DTYPES[:2]),
    transposed=st.booleans(),
    seed=seeds,
)
def test_kv_caching(dtype: np.dtype, shape: tuple[int, ...], index: np.dtype, transposed: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, kv_heads, seq, dim = shape
    order = (0, 3, 2, 1) if transposed else None
    caches = [strided(rng, (batch, kv_heads, 11, dim), dtype, True, order) for _ in range(2)]
    sources = [strided(rng, shape, dtype, True) for _ in range(2)]
    past = rng.integers(0, 11 - seq + 1, batch).astype(index)
    expected = [c.copy() for c in caches]
    for cache, source in zip(expected, sources, strict=True):
        for b in range(batch):
            cache[b, :, past[b] : past[b] + seq] = source[b]
    call("KVCaching", [*caches, *sources, past])
    for actual, cache in zip(caches, expected, strict=True):
        np.testing.assert_array_equal(actual.astype(np.float32), cache.astype(np.float32))


@pytest.mark.parametrize("past", [-1, 9])
def test_kv_caching_refuses_lengths_beyond_the_cache(past: int) -> None:
    cache, source = np.zeros((1, 2, 11, 3), F32), np.ones((1, 2, 3, 3), F32)
    call("KVCaching", [cache, cache.copy(), source, source, np.array([past], np.int32)], status=BAD_PARAM)
    assert (cache == 0).all()


@given(
    dtype=st.sampled_from(FLOATS),
    group=st.sampled_from([1, 3, 4]),
    seq=st.sampled_from([1, 2, 7, 40]),
    pos=st.sampled_from([0, 1, 30, 100]),
    dim=st.sampled_from([4, 33, 64]),
    seed=seeds,
)
def test_composite(dtype: np.dtype, group: int, seq: int, pos: int, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kv_heads = 2
    heads, total = group * kv_heads, pos + seq
    q = strided(rng, (heads, seq, dim), dtype, True, (1, 0, 2))
    k, v = (strided(rng, (kv_heads, seq, dim), dtype, True, (1, 0, 2)) for _ in range(2))
    k_cache, v_cache = (strided(rng, (kv_heads, total + 3, dim), dtype, True) for _ in range(2))
    out = np.empty((seq, heads, dim), dtype)
    call("Attention", [out, q, k, v, k_cache, v_cache], [np.ctypeslib.as_ctypes(np.array(pos, np.uint64))])
    np.testing.assert_array_equal(k_cache[:, pos:total].astype(np.float32), k.astype(np.float32))
    np.testing.assert_array_equal(v_cache[:, pos:total].astype(np.float32), v.astype(np.float32))
    for j in {0, seq // 2, seq - 1}:
        for h in range(heads):
            kv = h // group
            check(out[j, h], *attend(q[h, j], k_cache[kv], v_cache[kv], pos + j + 1, dim**-0.5, 0.0))


def test_decode_is_the_same_with_any_number_of_threads() -> None:
    """How a long sequence is cut depends on the threads; the result only by roundings (bound as above)."""
    rng = np.random.default_rng(8)
    cache = make_paged(rng, [1500], 1, 64, 16, F32, INDEX_DTYPES[0], False)
    q = rng.standard_normal((1, 2, 64)).astype(F32)
    results = []
    try:
        for threads in (1, 2, 5):
            library().infinicpuSetNumThreads(threads)
            out = np.empty_like(q)
            call(
                "PagedAttention", [out, q, cache.k_cache, cache.v_cache, cache.tables, cache.lengths, None], [f(0.125)]
            )
            results.append(out)
    finally:
        library().infinicpuSetNumThreads(2)
    for out in results:
        for h in range(2):
            check(out[0, h], *attend(q[0, h], cache.k[0][0], cache.v[0][0], 1500, 0.125, 0.0))

"""Norms, elementwise functions, rope, causal_softmax, rearrange and embedding against float64.

u = 2^-24 is one f32 rounding; unit_roundoff(dtype) is the final one to the tensor's dtype.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .lib import BAD_PARAM, BF16, F16, F32, FLOATS, call, f, random_bits, smallest_step, strided, unit_roundoff

U = 2.0**-24
# exp is within 4 u (tested through softmax), and 1 / (1 + e) within two more roundings.
SILU_ROUNDINGS = 8
NORM_COMBOS = [(x, w) for x, w in itertools.product(FLOATS, FLOATS) if x != F32 or w == F32]

seeds = st.integers(0, 99)
row_dims = st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 128, 1024, 2049]))


def near(actual: np.ndarray, exact: np.ndarray, relative: float, extra: np.ndarray | float = 0.0) -> None:
    """|actual - exact| <= relative |exact| + extra, and one rounding to the dtype."""
    bound = relative * np.abs(exact) + extra
    bound = bound + unit_roundoff(actual.dtype) * (np.abs(exact) + bound) + smallest_step(actual.dtype)
    error = np.abs(actual.astype(np.float64) - exact)
    assert (error <= bound).all(), f"worst {np.max(error / bound)} of the bound"


def norm_roundings(dim: int) -> float:
    """Sum of squares: at least 16 partial sums of dim / 16 positive terms; its root halves the error; four more roundings."""
    return (dim / 32 + 10) * U


def rms_norm(x: np.ndarray, w: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * w.astype(np.float64)


@pytest.mark.parametrize("combo", NORM_COMBOS, ids=lambda c: f"{c[0]}-{c[1]}")
@given(dim=row_dims, rows=st.integers(0, 5), heads=st.integers(0, 4), gaps=st.booleans(), seed=seeds)
def test_rms_norm(combo: tuple[np.dtype, np.dtype], dim: int, rows: int, heads: int, gaps: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (rows, heads, dim) if heads else (rows, dim)
    x, y = strided(rng, shape, combo[0], gaps), strided(rng, shape, combo[0], gaps)
    w = rng.standard_normal(dim).astype(combo[1])
    exact = rms_norm(x.astype(np.float64), w, 1e-6)
    call("RMSNorm", [y, x, w], [f(1e-6)])
    near(y, exact, norm_roundings(dim))
    call("RMSNorm", [x, x, w], [f(1e-6)])  # in place: the same bits
    np.testing.assert_array_equal(x.astype(np.float64), y.astype(np.float64))


@pytest.mark.parametrize("combo", NORM_COMBOS, ids=lambda c: f"{c[0]}-{c[1]}")
@given(dim=row_dims, rows=st.integers(0, 5), alias=st.sampled_from(["", "ra", "rb", "ya", "yb", "ra yb"]), seed=seeds)
def test_add_rms_norm(combo: tuple[np.dtype, np.dtype], dim: int, rows: int, alias: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, y, residual = (strided(rng, (rows, dim), combo[0], True) for _ in range(4))
    w = rng.standard_normal(dim).astype(combo[1])
    total = a.astype(np.float64) + b.astype(np.float64)
    exact = rms_norm(total, w, 1e-5)
    # The f32 sum has one rounding of its own; a row of sums near 0 is scaled up by up to the norm's factor.
    scale = np.abs(1 / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * w.astype(np.float64))
    extra = scale * U * (np.abs(a.astype(np.float64)) + np.abs(b.astype(np.float64))) * 2
    sources = {"a": a, "b": b}
    for pair in alias.split():
        if pair[0] == "r":
            residual = sources[pair[1]]
        else:
            y = sources[pair[1]]
    call("AddRMSNorm", [y, residual, a, b, w], [f(1e-5)])
    near(y, exact, norm_roundings(dim), extra)
    near(residual, total, U)


def test_norm_of_extreme_rows() -> None:
    x = np.array([[0, 0, 0], [np.nan, 1, 1], [np.inf, 1, 1], [1e18, -1e18, 1e18]], F32)
    y = np.empty_like(x)
    with np.errstate(invalid="ignore"):
        call("RMSNorm", [y, x, np.ones(3, F32)], [f(1e-6)])
    assert (y[0] == 0).all() and np.isnan(y[1]).all() and np.isnan(y[2, 0]) and (y[2, 1:] == 0).all()
    near(y[3], np.array([1.0, -1.0, 1.0]), 10 * U)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


ELEMENTWISE = {
    "Add": (lambda a, b: a + b, 1),
    "Mul": (lambda a, b: a * b, 1),
    "SwiGLU": (lambda a, b: a * silu(b), SILU_ROUNDINGS + 1),
}
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple) | st.tuples(
    st.integers(0, 3), st.sampled_from([37, 300, 9000])
)


@pytest.mark.parametrize("name", ELEMENTWISE)
@given(
    shape=shapes,
    dtype=st.sampled_from((*FLOATS, np.dtype(np.float64))),
    gaps=st.booleans(),
    mode=st.integers(0, 4),
    seed=seeds,
)
def test_binary(name: str, shape: tuple[int, ...], dtype: np.dtype, gaps: bool, mode: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    function, roundings = ELEMENTWISE[name]
    order = list(rng.permutation(len(shape))) if mode == 1 else None
    a, b, c = (
        strided(rng, shape, dtype, gaps, order),
        strided(rng, shape, dtype, gaps),
        strided(rng, shape, dtype, gaps),
    )
    if mode == 2:
        b = np.broadcast_to(b[:1], shape)  # stride 0
    exact = function(a.astype(np.float64), b.astype(np.float64))
    if mode == 3:
        c = a
    if mode == 4:
        c = b
    call(name, [c, a, b])
    near(c, exact, roundings * (U if dtype != np.float64 else 2.0**-53))


@given(
    shape=shapes,
    dtype=st.sampled_from((*FLOATS, np.dtype(np.float64))),
    gaps=st.booleans(),
    in_place=st.booleans(),
    seed=seeds,
)
def test_silu(shape: tuple[int, ...], dtype: np.dtype, gaps: bool, in_place: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = strided(rng, shape, dtype, gaps)
    exact = silu(x.astype(np.float64))
    y = x if in_place else strided(rng, shape, dtype, gaps)
    call("Silu", [y, x])
    near(y, exact, SILU_ROUNDINGS * (U if dtype != np.float64 else 2.0**-53))


@pytest.mark.parametrize("dtype", [np.dtype(np.int32), np.dtype(np.int64)], ids=str)
def test_integer_add_wraps(dtype: np.dtype) -> None:
    a = np.array([1, -5, np.iinfo(dtype).max], dtype)
    c = np.empty_like(a)
    call("Add", [c, a, np.ones(3, dtype)])
    np.testing.assert_array_equal(c, [2, -4, np.iinfo(dtype).min])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(dim=row_dims, rows=st.integers(0, 4), seed=seeds)
def test_silu_and_mul(dtype: np.dtype, dim: int, rows: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, 2 * dim)).astype(dtype)
    y = np.empty((rows, dim), dtype)
    call("SiluAndMul", [y, x])
    gate, up = x[:, :dim].astype(np.float64), x[:, dim:].astype(np.float64)
    near(y, silu(gate) * up, (SILU_ROUNDINGS + 1) * U)


def test_silu_over_its_whole_range() -> None:
    x = np.concatenate(
        [np.linspace(-120, 120, 4999), np.logspace(-38, 38, 500), -np.logspace(-38, 38, 500), [0.0]]
    ).astype(F32)
    y = np.empty_like(x)
    call("Silu", [y, x])
    with np.errstate(over="ignore"):
        exact = silu(x.astype(np.float64))
    # Below -88, exp(-x) is infinite in f32 and the result 0 instead of about 1e-36.
    near(y, exact, SILU_ROUNDINGS * U, 1e-35)
    call("Silu", [y[:3], np.array([np.inf, np.nan, -np.inf], F32)])
    assert y[0] == np.inf and np.isnan(y[1])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_conversions_are_exact_and_round_to_even(dtype: np.dtype) -> None:
    """x + 0 leaves every half as it is, and x * y rounds as numpy does: all 65536 of them, NaN and subnormals too."""
    x = np.arange(65536, dtype=np.uint16).view(dtype)
    y = np.empty_like(x)
    call("Mul", [y, x, np.ones_like(x)])
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float32).astype(dtype)
    nan = np.isnan(x.astype(np.float32))
    np.testing.assert_array_equal(y[~nan].view(np.uint16), expected[~nan].view(np.uint16))
    assert np.isnan(y[nan].astype(np.float32)).all()
    rng = np.random.default_rng(3)
    a, b = random_bits(rng, 20000, dtype), random_bits(rng, 20000, dtype)
    c = np.empty_like(a)
    call("Mul", [c, a, b])
    with np.errstate(all="ignore"):
        expected = (a.astype(np.float32) * b.astype(np.float32)).astype(dtype)
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(c[~nan].view(np.uint16), expected[~nan].view(np.uint16))
    assert np.isnan(c[nan].astype(np.float32)).all()


POSITION_DTYPES = [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)]


@pytest.mark.parametrize("algo", [0, 1], ids=["gpt_j", "gpt_neox"])
@given(
    dtype=st.sampled_from((*FLOATS, np.dtype(np.float64))),
    pos_dtype=st.sampled_from(POSITION_DTYPES),
    half=st.one_of(st.integers(1, 20), st.sampled_from([32, 64])),
    batch=st.integers(0, 3),
    in_place=st.booleans(),
    seed=seeds,
)
def test_rope(
    algo: int, dtype: np.dtype, pos_dtype: np.dtype, half: int, batch: int, in_place: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tokens, heads, positions = int(rng.integers(0, 6)), 3, 50
    shape = (batch, tokens, heads, 2 * half) if batch else (tokens, heads, 2 * half)
    x = strided(rng, shape, dtype, True)
    y = x if in_place else strided(rng, shape, dtype, True)
    angles = rng.uniform(-4, 4, (positions, half))
    sines, cosines = np.sin(angles).astype(dtype), np.cos(angles).astype(dtype)
    pos = rng.integers(0, positions, (batch, tokens) if batch and seed % 2 else (tokens,)).astype(pos_dtype)
    s = np.broadcast_to(sines[pos.astype(int)].astype(np.float64)[..., None, :], (*shape[:-1], half))
    c = np.broadcast_to(cosines[pos.astype(int)].astype(np.float64)[..., None, :], (*shape[:-1], half))
    x64 = x.astype(np.float64)
    first, second = (np.s_[..., 0::2], np.s_[..., 1::2]) if algo == 0 else (np.s_[..., :half], np.s_[..., half:])
    exact, size = np.empty(shape), np.empty(shape)
    exact[first], exact[second] = x64[first] * c - x64[second] * s, x64[first] * s + x64[second] * c
    size[first] = np.abs(x64[first] * c) + np.abs(x64[second] * s)
    size[second] = np.abs(x64[first] * s) + np.abs(x64[second] * c)
    call("RoPE", [y, x, pos, sines, cosines], [algo])
    near(y, exact, 0.0, 3 * (U if dtype != np.float64 else 2.0**-53) * size)


@pytest.mark.parametrize("bad", [10, -1, 10**9])
def test_rope_refuses_positions_outside_the_table(bad: int) -> None:
    x = np.ones((3, 2, 8), F32)
    y = np.zeros_like(x)
    table = np.ones((10, 4), F32)
    call("RoPE", [y, x, np.array([0, bad, 9], np.int64), table, table], [1], status=BAD_PARAM)
    assert (y == 0).all()


@given(
    dtype=st.sampled_from(FLOATS),
    batch=st.integers(0, 3),
    seq=st.integers(0, 9),
    past=st.sampled_from([0, 1, 5, 40, 300]),
    mode=st.sampled_from(["apart", "in place", "transposed"]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=seeds,
)
def test_causal_softmax(dtype: np.dtype, batch: int, seq: int, past: int, mode: str, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    total = seq + past
    shape = (batch, seq, total) if batch else (seq, total)
    order = list(range(len(shape)))[::-1] if mode == "transposed" else None
    x = strided(rng, shape, dtype, True, order)
    x[...] = (x.astype(np.float32) * scale).astype(dtype)
    y = x if mode == "in place" else strided(rng, shape, dtype, True, order)
    visible = np.tril(np.ones((seq, total), bool), past)
    x64 = np.where(visible, x.astype(np.float64), -np.inf)
    if x64.size:
        spread = x64 - x64.max(-1, keepdims=True)
        weights = np.exp(spread)
        exact = weights / weights.sum(-1, keepdims=True)
        # exp's argument is off by one rounding of its size, in the numerator and, averaged, in the sum.
        reach = np.abs(np.where(np.isfinite(spread), spread, 0)).max()
    else:
        exact, reach = np.zeros(shape), 0.0
    call("CausalSoftmax", [y, x])
    near(y, exact, (2 * reach + total / 16 + 16) * U)
    assert (y.astype(np.float32)[..., ~visible] == 0).all() if y.size else True


def test_softmax_special_values() -> None:
    x = np.array([[0.0, -np.inf, 0.0], [np.nan, 1, 1], [-np.inf, -np.inf, -np.inf], [1e38, -1e38, 0]], F32)
    y = np.empty((4, 1, 3), F32)
    call("CausalSoftmax", [y, x[:, None, :]])
    np.testing.assert_array_equal(y[0, 0], [0.5, 0, 0.5])
    assert np.isnan(y[1]).all() and np.isnan(y[2]).all()  # no weight at all: as InfiniCore's formula
    np.testing.assert_array_equal(y[3, 0], [1, 0, 0])


def test_exp_is_within_four_roundings() -> None:
    """softmax([0, x]) = e^x / (1 + e^x) for x far below 0 is e^x itself."""
    x = np.linspace(-86, -17, 6001).astype(F32)
    rows = np.stack([np.zeros_like(x), x], -1)[:, None, :]
    y = np.empty_like(rows)
    call("CausalSoftmax", [y, rows])
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(y[:, 0, 1] / (exact / (1 + exact)) - 1) < 4 * U).all()


ALL_DTYPES = [*FLOATS, *(np.dtype(t) for t in (np.float64, np.int8, np.int16, np.int32, np.int64, np.uint8, bool))]


@given(
    shape=st.lists(st.integers(0, 6), max_size=5).map(tuple),
    dtype=st.sampled_from(ALL_DTYPES),
    broadcast=st.booleans(),
    backwards=st.booleans(),
    seed=seeds,
)
def test_rearrange(shape: tuple[int, ...], dtype: np.dtype, broadcast: bool, backwards: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    src = strided(rng, shape, dtype, True, rng.permutation(len(shape)))
    if broadcast and shape and shape[0]:
        src = np.broadcast_to(src[:1], shape)
    if backwards and shape:
        src = src[::-1]
    dst = strided(rng, shape, dtype, True, rng.permutation(len(shape)))
    call("Rearrange", [dst, src])
    np.testing.assert_array_equal(dst, src)


def test_rearrange_large_transpose() -> None:
    src = np.random.default_rng(1).standard_normal((3, 500, 301)).astype(F32)
    dst = np.empty((301, 3, 500), F32)
    call("Rearrange", [dst, src.transpose(2, 0, 1)])
    np.testing.assert_array_equal(dst, src.transpose(2, 0, 1))


@given(
    dtype=st.sampled_from(FLOATS),
    index=st.sampled_from([np.dtype(np.int32), np.dtype(np.int64)]),
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    dim=st.integers(0, 70),
    seed=seeds,
)
def test_embedding(dtype: np.dtype, index: np.dtype, shape: tuple[int, ...], dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((11, dim)).astype(dtype)
    ids = np.asarray(rng.integers(0, 11, shape), index)
    out = np.zeros((*shape, dim), dtype)
    call("Embedding", [out, ids, table])
    np.testing.assert_array_equal(out.astype(np.float32), table[ids].astype(np.float32))


@pytest.mark.parametrize("bad", [-1, 11, 2**31 - 1])
def test_embedding_refuses_indices_outside_the_table(bad: int) -> None:
    out = np.full((3, 4), 5, F32)
    call("Embedding", [out, np.array([1, bad, 2], np.int32), np.zeros((11, 4), F32)], status=BAD_PARAM)
    assert (out == 5).all()


def test_known_dtypes_have_the_expected_roundoff() -> None:
    assert unit_roundoff(BF16) == 2.0**-8 and unit_roundoff(F16) == 2.0**-11 and ml_dtypes.finfo(F32).eps == 2.0**-23

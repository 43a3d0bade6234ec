"""The references of the model and fused ops against loops that say what they mean, element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import GraphError
from ir.optable import OPS, Context, infer, lookup, with_defaults
from ir.types import TensorType, sym

PROFILE = settings(max_examples=25, deadline=None, derandomize=True)
SEED = st.integers(0, 10**6)

# Loops and numpy add up in different orders: a few hundred roundings of 1.1e-16 of values of order one.
BOUND = dict(rtol=1e-12, atol=1e-12)


def call(name: str, *inputs, **attrs):
    types = (
        tuple(
            infer(
                name,
                [None if x is None else TensorType("i32" if x.dtype.kind in "iu" else "f64", x.shape) for x in inputs],
                attrs,
            )
        )
        if name != "attention"
        else ()
    )
    return lookup(name).reference(list(inputs), with_defaults(name, attrs), Context(types, {}, True))


def normal(rng, *shape):
    return rng.normal(size=shape)


@PROFILE
@given(SEED, st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.booleans())
def test_linear(seed, rows, features, out, with_bias):
    rng = np.random.default_rng(seed)
    x, w, b = normal(rng, 2, rows, features), normal(rng, out, features), normal(rng, out)
    y = call("linear", x, w, *([b] if with_bias else []))
    for i in range(2):
        for r in range(rows):
            for o in range(out):
                expected = sum(x[i, r, k] * w[o, k] for k in range(features)) + (b[o] if with_bias else 0)
                assert math.isclose(y[i, r, o], expected, rel_tol=1e-12, abs_tol=1e-12)


def norm_loop(x, w, eps):
    y = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        mean = sum(v * v for v in x[index]) / x.shape[-1]
        y[index] = [v / math.sqrt(mean + eps) * s for v, s in zip(x[index], w)]
    return y


@PROFILE
@given(SEED, st.integers(1, 4), st.integers(1, 9))
def test_norms(seed, rows, width):
    rng = np.random.default_rng(seed)
    a, b, w = normal(rng, rows, width), normal(rng, rows, width), normal(rng, width)
    np.testing.assert_allclose(call("rms_norm", a, w, epsilon=1e-5), norm_loop(a, w, 1e-5), **BOUND)
    y, total = call("add_rms_norm", a, b, w, epsilon=1e-5)
    np.testing.assert_allclose(total, a + b, **BOUND)
    np.testing.assert_allclose(y, norm_loop(a + b, w, 1e-5), **BOUND)


@PROFILE
@given(SEED)
def test_silu_and_swiglu(seed):
    rng = np.random.default_rng(seed)
    gate, up = normal(rng, 3, 5) * 30, normal(rng, 3, 5)
    expected = np.array([[g / (1 + math.exp(-g)) for g in row] for row in gate])
    np.testing.assert_allclose(call("silu", gate), expected, **BOUND)
    np.testing.assert_allclose(call("swiglu", up, gate), up * expected, **BOUND)


def test_silu_does_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        y = call("silu", np.array([-1e4, -800.0, 0.0, 800.0, 1e4]))
    assert np.array_equal(y, [0, 0, 0, 800, 1e4])


def rope_loop(x, positions, inv_freq, factor, interleaved):
    y = np.empty_like(x)
    half = x.shape[-1] // 2
    for index in np.ndindex(x.shape[:-1]):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            z = complex(x[(*index, a)], x[(*index, b)]) * np.exp(1j * positions[index[:-1]] * inv_freq[i]) * factor
            y[(*index, a)], y[(*index, b)] = z.real, z.imag
    return y


@PROFILE
@given(SEED, st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_rope(seed, half, heads, interleaved):
    rng = np.random.default_rng(seed)
    x, inv_freq, w = normal(rng, 4, heads, 2 * half), rng.uniform(size=half), normal(rng, 2 * half)
    positions = rng.integers(0, 50, 4).astype(np.int32)
    attrs = {"attention_factor": 1.25, "interleaved": interleaved}
    expected = rope_loop(x, positions, inv_freq, 1.25, interleaved)
    np.testing.assert_allclose(call("rope", x, positions, inv_freq, **attrs), expected, **BOUND)
    found = call("norm_rope", x, w, positions, inv_freq, epsilon=1e-5, **attrs)
    np.testing.assert_allclose(found, rope_loop(norm_loop(x, w, 1e-5), positions, inv_freq, 1.25, interleaved), **BOUND)
    batched = call("rope", x.reshape(2, 2, heads, -1), positions.reshape(2, 2), inv_freq, **attrs)
    np.testing.assert_allclose(batched, expected.reshape(batched.shape), **BOUND)


def test_rope_turns_by_the_difference_of_positions():
    """What attention sees of two rotated vectors depends on how far they are apart only."""
    rng = np.random.default_rng(0)
    q, k, inv_freq = normal(rng, 1, 1, 8), normal(rng, 1, 1, 8), np.array([1.0, 0.1, 0.01, 0.001])

    def score(i, j):
        return float(
            (
                call("rope", q, np.array([i], np.int32), inv_freq) * call("rope", k, np.array([j], np.int32), inv_freq)
            ).sum()
        )

    assert math.isclose(score(7, 3), score(104, 100), rel_tol=1e-10)


def attention_loop(q, keys, values, scale, visible):
    """One query [D] over keys and values [N, D]."""
    scores = [scale * float(q @ k) if ok else -math.inf for k, ok in zip(keys, visible)]
    peak = max(scores, default=-math.inf)
    if peak == -math.inf:
        return np.zeros(values.shape[-1])
    shares = [math.exp(s - peak) for s in scores]
    return sum(s / sum(shares) * v for s, v in zip(shares, values))


@PROFILE
@given(
    SEED,
    st.integers(1, 2),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([(1, 1), (2, 1), (6, 3), (4, 2)]),
    st.booleans(),
)
def test_attention(seed, batch, new, past, heads, masked):
    rng = np.random.default_rng(seed)
    (h, g), d, total = heads, 5, past + new
    q, k, v = normal(rng, batch, new, h, d), normal(rng, batch, new, g, d), normal(rng, batch, new, g, d)
    past_k, past_v = (normal(rng, batch, g, past, d) for _ in range(2)) if past else (None, None)
    mask = rng.integers(0, 2, (batch, total)) if masked else None
    o, keys, values = call("attention", q, k, v, past_k, past_v, mask, scale=0.3, total=sym("total"))
    assert keys.shape == values.shape == (batch, g, total, d)
    for b in range(batch):
        all_k = np.concatenate(([past_k[b]] if past else []) + [k[b].transpose(1, 0, 2)], axis=1)
        all_v = np.concatenate(([past_v[b]] if past else []) + [v[b].transpose(1, 0, 2)], axis=1)
        assert np.array_equal(keys[b], all_k) and np.array_equal(values[b], all_v)
        for s in range(new):
            visible = [j <= past + s and (mask is None or mask[b, j] != 0) for j in range(total)]
            for head in range(h):
                expected = attention_loop(q[b, s, head], all_k[head * g // h], all_v[head * g // h], 0.3, visible)
                np.testing.assert_allclose(o[b, s, head], expected, **BOUND)


@PROFILE
@given(
    SEED,
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (6, 3), (4, 1)]),
)
def test_attention_cached(seed, requests, heads):
    rng = np.random.default_rng(seed)
    (h, g), d, capacity = heads, 4, 8
    tokens = sum(n for n, _ in requests)
    q, k, v = normal(rng, tokens, h, d), normal(rng, tokens, g, d), normal(rng, tokens, g, d)
    k_cache, v_cache = (normal(rng, len(requests), g, capacity, d) for _ in range(2))
    lens, starts = (np.array(x, np.int32) for x in zip(*requests))
    before = k_cache.copy()
    o, k_out, v_out = call("attention_cached", q, k, v, k_cache, v_cache, lens, starts, scale=0.4)
    assert np.array_equal(k_cache, before), "operands must not change"
    row = 0
    for r, (n, start) in enumerate(requests):
        all_k, all_v = k_cache[r].copy(), v_cache[r].copy()
        for i in range(n):
            all_k[:, start + i], all_v[:, start + i] = k[row + i], v[row + i]
        assert np.array_equal(k_out[r], all_k) and np.array_equal(v_out[r], all_v)
        for i in range(n):
            for head in range(h):
                end = start + i + 1
                expected = attention_loop(
                    q[row + i, head], all_k[head * g // h, :end], all_v[head * g // h, :end], 0.4, [True] * end
                )
                np.testing.assert_allclose(o[row + i, head], expected, **BOUND)
        row += n


def test_attention_cached_does_not_write_beyond_the_cache():
    x, c = np.zeros((2, 1, 4)), np.zeros((1, 1, 3, 4))
    with pytest.raises(GraphError, match="request 0 ends at 4, its cache holds 3"):
        call("attention_cached", x, x, x, c, c, np.array([2], np.int32), np.array([2], np.int32), scale=1.0)


def test_rows_and_tables():
    table = np.arange(12.0).reshape(4, 3)
    rows = np.array([3, 0, 3], np.int32)
    assert np.array_equal(call("embedding", rows, table), table[[3, 0, 3]])
    assert np.array_equal(call("gather_rows", table, rows), table[[3, 0, 3]])
    for bad in (4, -1):
        with pytest.raises(GraphError, match=f"index {bad} is outside 0..3"):
            call("embedding", np.array([bad], np.int32), table)
    parts = call("split", table, axis=1, sizes=(2, 1))
    assert [p.tolist() for p in parts] == [table[:, :2].tolist(), table[:, 2:].tolist()]
    assert np.array_equal(call("scale", table, value=0.5), table / 2)
    assert np.array_equal(call("reshape", table, shape=(2, 6)), table.reshape(2, 6))


S, B = sym("S"), sym("B")


def t(*shape, dtype="f32"):
    return TensorType(dtype, shape)


@pytest.mark.parametrize(
    "op, types, attrs, message",
    [
        ("linear", [t(S, 4), t(6, 5)], {}, "x has 4 features, w takes 5"),
        ("linear", [t(S, 4), t(6, 4), t(5)], {}, "bias is"),
        ("rms_norm", [t(S, 4), t(5)], {"epsilon": 1e-6}, "rms_norm: x is"),
        ("add", [t(S, 4), t(4)], {}, "operands differ"),
        ("mul", [t(S, 4), t(S, 4, dtype="f16")], {}, "operands differ"),
        ("reshape", [t(S, 4)], {"shape": (S, 5)}, "changes the number of elements"),
        ("split", [t(S, 4)], {"axis": 1, "sizes": (1, 2)}, "the sizes do not add up"),
        ("rope", [t(B, S, 2, 4), t(B, S, dtype="i64"), t(3)], {}, "head_dim is 4"),
        ("rope", [t(B, S, 2, 4), t(S, dtype="i64"), t(2)], {}, "positions are"),
        ("attention", [t(B, S, 4, 8), t(B, S, 3, 8), t(B, S, 3, 8)], {"scale": 1.0}, "not a multiple"),
        (
            "attention",
            [t(B, S, 4, 8), t(B, S, 2, 8), t(B, S, 2, 8), t(B, 2, sym("P"), 8)],
            {"scale": 1.0},
            "come together",
        ),
        (
            "attention",
            [t(B, S, 4, 8), *[t(B, S, 2, 8)] * 2, *[t(B, 2, sym("P"), 8)] * 2],
            {"scale": 1.0, "total": None},
            "names the total length",
        ),
        (
            "attention",
            [t(B, S, 4, 8), *[t(B, S, 2, 8)] * 2, None, None, t(B, sym("N"), dtype="i64")],
            {"scale": 1.0},
            "mask is",
        ),
        ("gather_rows", [t(S, 4), t(sym("L"))], {}, "gather_rows takes"),
        ("embedding", [t(S), t(5, 4)], {"dtype": ""}, "embedding takes"),
        ("all_gather", [t(S, 4)], {"size": 10}, "10 elements are no multiple of 4"),
        ("all_gather", [t()], {"size": 8}, "takes a tensor with axes"),
        ("all_reduce", [t(S, 4, dtype="i32")], {}, "takes a floating-point tensor"),
        ("split", [t(S, 6 * sym("G"))], {"axis": 1, "sizes": (4 * sym("G"), 2)}, "the sizes do not add up"),
        (
            "attention_cached",
            [
                t(S, 3 * sym("I"), 8),
                *[t(S, sym("G"), 8)] * 2,
                *[t(B, sym("G"), sym("C"), 8)] * 2,
                *[t(B, dtype="i32")] * 2,
            ],
            {"scale": 1.0},
            "3*I heads, G kv heads",
        ),
    ],
)
def test_shape_rules_refuse(op, types, attrs, message):
    with pytest.raises(GraphError) as caught:
        infer(op, types, attrs)
    assert message in str(caught.value)


def test_sizes_that_devices_share_are_symbols():
    heads = sym("G")
    assert infer("split", [t(S, 6 * heads)], {"axis": 1, "sizes": (4 * heads, heads, heads)}) == [
        t(S, 4 * heads),
        t(S, heads),
        t(S, heads),
    ]
    parts = lookup("split").reference(
        [np.arange(12).reshape(1, 12)], {"axis": 1, "sizes": (4 * heads, heads, heads)}, Context((), {"G": 2}, True)
    )
    assert [p.shape[1] for p in parts] == [8, 2, 2]
    q, kv = t(S, 3 * heads, 8), t(S, heads, 8)
    caches = [t(B, heads, sym("C"), 8)] * 2
    assert infer("attention_cached", [q, kv, kv, *caches, *[t(B, dtype="i32")] * 2], {"scale": 1.0})[0] == q
    assert infer("all_gather", [t(S, sym("V"))], {"size": 12}) == [t(S, 12)]


def test_every_op_has_a_line_of_doc():
    for row in OPS.values():
        assert row.doc and "\n" not in row.doc and row.stages

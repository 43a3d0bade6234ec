"""random_sample against InfiniCore's rule, written out with a full sort in float64."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from .lib import BAD_DTYPE, BAD_PARAM, F32, FLOATS, Operator, Spec, create_status, f

I32 = np.dtype(np.int32)


def sample(
    logits: np.ndarray, random_val: float, topp: float, topk: int, temperature: float, index: np.dtype = I32
) -> int:
    result = np.full((), 77, index)
    operator = Operator("RandomSample", [result, logits])
    assert operator.status == 0
    status = operator(result, logits, scalars=[f(random_val), f(topp), ctypes.c_int(topk), f(temperature)])
    operator.destroy()
    return int(result) if status == 0 else -status


def reference(logits: np.ndarray, random_val: float, topp: float, topk: int, temperature: float) -> tuple[int, float]:
    """The chosen index, and how far (relatively) the draw is from the next border."""
    x = logits.astype(np.float64)
    order = np.lexsort((np.arange(len(x)), -x))
    sums = np.cumsum(np.exp((x[order] - x.max()) / temperature))
    k = len(x) if topk < 0 or topk > len(x) else topk
    threshold = np.float32(random_val) * min(sums[k - 1], np.float32(topp) * sums[-1])
    return int(order[np.searchsorted(sums, threshold)]), float(np.abs(sums / threshold - 1).min())


@given(
    n=st.one_of(st.integers(1, 30), st.sampled_from([100, 1000, 5000])),
    dtype=st.sampled_from((*FLOATS, np.dtype(np.float64))),
    random_val=st.floats(2**-10, 1 - 2**-10, width=32),
    topp=st.sampled_from([0.1, 0.5, 0.9, 1.0, 2.0]),
    topk=st.sampled_from([2, 5, 50, 1500, 10**6, -1]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    spread=st.sampled_from([0.5, 5.0]),
    seed=st.integers(0, 99),
)
def test_draw(
    n: int, dtype: np.dtype, random_val: float, topp: float, topk: int, temperature: float, spread: float, seed: int
) -> None:
    logits = (np.random.default_rng(seed).standard_normal(n) * spread).astype(dtype)
    expected, margin = reference(logits, random_val, topp, topk, temperature)
    # Weights are within some roundings (|logit - max| / temperature + 8) u of exact: a draw that close to a border may
    # fall on either side.
    assume(margin > (2 * 2 * 5 * spread / temperature + 16) * 2.0**-24)
    assert sample(logits, random_val, topp, topk, temperature) == expected


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "arguments", [(0, 0.9, 50, 1.0), (0.5, 0, 50, 1.0), (0.5, 0.9, 1, 1.0), (0.5, 0.9, 50, 0), (0, 0.9, 0, 1.0)]
)
def test_argmax(dtype: np.dtype, arguments: tuple) -> None:
    logits = np.random.default_rng(1).standard_normal(1234).astype(dtype)
    logits[[100, 700, 1200]] = 9  # equal largest: the lowest index
    assert sample(logits, *arguments) == 100


def test_ties_are_taken_in_index_order() -> None:
    logits = np.zeros(8, F32)
    # Equal weights: with random_val r the sums 1..8 pass 8 r at index ceil(8 r) - 1; topk 4 halves that.
    assert [sample(logits, r, 1.0, -1, 1.0) for r in (0.1, 0.3, 0.9)] == [0, 2, 7]
    assert [sample(logits, r, 1.0, 4, 1.0) for r in (0.1, 0.3, 0.9)] == [0, 1, 3]


def test_distribution_of_many_draws() -> None:
    """Over a uniform grid of 1000 draws each index comes up in proportion to its weight, within one grid step per border."""
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], F32))
    counts = np.bincount([sample(logits, (i + 0.5) / 1000, 1.0, -1, 1.0) for i in range(1000)], minlength=4)
    assert (np.abs(counts - [100, 400, 200, 300]) <= 1).all()


@pytest.mark.parametrize("index", [np.dtype(f"{k}{s}") for k in "iu" for s in (1, 2, 4, 8)], ids=str)
def test_index_dtypes(index: np.dtype) -> None:
    logits = np.zeros(100, F32)
    logits[93] = 1
    assert sample(logits, 0, 1, 1, 1, index) == 93


def test_index_that_cannot_hold_the_vocabulary_is_refused() -> None:
    assert create_status("RandomSample", [Spec((), np.dtype(np.int8)), Spec((129,), F32)]) == BAD_DTYPE
    assert create_status("RandomSample", [Spec((), np.dtype(np.int8)), Spec((128,), F32)]) == 0


def test_special_logits() -> None:
    masked = np.full(50, -np.inf, F32)
    masked[[7, 31]] = 0.0
    assert {sample(masked, r, 1.0, -1, 1.0) for r in (0.01, 0.49, 0.51, 1.0)} == {7, 31}
    assert sample(np.full(5, -np.inf, F32), 0.5, 1.0, -1, 1.0) == 0
    nan = np.array([0.0, np.nan, 3.0, np.nan], F32)
    assert sample(nan, 0.0, 1.0, -1, 1.0) == 2 and sample(nan, 0.9, 1.0, -1, 1.0) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        (1.5, 1, 5, 1),
        (-0.1, 1, 5, 1),
        (np.nan, 1, 5, 1),
        (0.5, -1, 5, 1),
        (0.5, 1, 0, 1),
        (0.5, 1, 5, -1),
        (0.5, 1, 5, np.nan),
    ],
)
def test_refused_scalars(arguments: tuple) -> None:
    assert sample(np.zeros(9, F32), *arguments) == -BAD_PARAM

"""gemm against float64, over layouts, batches, dtypes and scalars.

Bound: every product has one rounding at most, and an element's sum is a chain of at most K + 4 f32 additions, so the error
is at most (K + 4) u sum|a||b| for u = 2^-24 (plus the same for beta c), and then one rounding to the dtype.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from .lib import BF16, F16, F32, FLOATS, Operator, call, f, smallest_step, strided, unit_roundoff

U = 2.0**-24


def reference(a: np.ndarray, b: np.ndarray, c: np.ndarray, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The exact result, and the sum of the magnitudes that went into it."""
    a64, b64, c64 = (x.astype(np.float64) for x in (a, b, c))
    exact = alpha * (a64 @ b64)
    size = abs(alpha) * (np.abs(a64) @ np.abs(b64))
    return (exact + beta * c64, size + abs(beta * c64)) if beta != 0 else (exact, size)


def check(c: np.ndarray, exact: np.ndarray, size: np.ndarray, k: int) -> None:
    bound = (k + 4) * U * size + unit_roundoff(c.dtype) * (np.abs(exact) + (k + 4) * U * size) + smallest_step(c.dtype)
    error = np.abs(c.astype(np.float64) - exact)
    assert (error <= bound).all(), f"worst {np.max(error / bound)} of the bound"


dims = st.one_of(st.integers(1, 9), st.sampled_from([16, 23, 31, 33, 64, 65, 100]))
layouts = st.tuples(st.booleans(), st.booleans(), st.booleans())


@given(
    dims,
    dims,
    st.one_of(dims, st.sampled_from([257, 515])),
    st.sampled_from(FLOATS),
    layouts,
    st.booleans(),
    st.integers(0, 99),
)
@example(1, 70, 129, BF16, (False, True, False), False, 1)
@example(50, 77, 300, F16, (False, True, False), True, 2)
@example(29, 200, 40, F32, (True, False, True), True, 3)
def test_matrix(m: int, n: int, k: int, dtype: np.dtype, columns: tuple[bool, ...], gaps: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = (
        strided(rng, shape, dtype, gaps, (1, 0) if column else (0, 1))
        for shape, column in zip([(m, k), (k, n), (m, n)], columns, strict=True)
    )
    alpha, beta = [(1.0, 0.0), (0.25, 1.0), (-1.5, 0.5)][seed % 3]
    exact, size = reference(a, b, c, alpha, beta)
    call("Gemm", [c, a, b], call_scalars=[f(alpha), f(beta)])
    check(c, exact, size, k)


@given(
    st.integers(2, 5), st.sampled_from(["abc", "bc", "ac"]), st.sampled_from(FLOATS), st.booleans(), st.integers(0, 99)
)
def test_batch(batch: int, batched: str, dtype: np.dtype, weight_layout: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    m, n, k = 7, 19, 35
    a = strided(rng, (batch if "a" in batched else 1, m, k), dtype, True)
    b = strided(rng, (batch if "b" in batched else 1, k, n), dtype, True, (0, 2, 1) if weight_layout else None)
    c = strided(rng, (batch, m, n), dtype, True)
    exact, size = reference(a, b, c, 1.0, 1.0)
    call("Gemm", [c, a, b], call_scalars=[f(1.0), f(1.0)])
    check(c, exact, size, k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_beta_zero_does_not_read_c(dtype: np.dtype) -> None:
    rng = np.random.default_rng(5)
    a, b = strided(rng, (6, 40), dtype, False), strided(rng, (40, 30), dtype, False, (1, 0))
    c = np.full((6, 30), np.nan, dtype)
    call("Gemm", [c, a, b], call_scalars=[f(1.0), f(0.0)])
    assert np.isfinite(c.astype(np.float32)).all()


# What a kernel does changes with the number of rows: columns one by one, tiles in place, packed panels, and their rests.
ROW_COUNTS = (*range(1, 21), 23, 31, 32, 33, 36)


@pytest.mark.parametrize("weight_layout", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(67, 301), (149, 1131)])  # more than one panel of columns, and piece of k
def test_a_row_does_not_depend_on_the_batch(dtype: np.dtype, weight_layout: bool, n: int, k: int) -> None:
    """Exactly the same bits, alone or among others: the summation order depends on the layout only."""
    rng = np.random.default_rng(6)
    rows = 45
    a, b = strided(rng, (rows, k), dtype, False), strided(rng, (k, n), dtype, False, (1, 0) if weight_layout else None)
    together = np.zeros((rows, n), dtype)
    call("Gemm", [together, a, b], call_scalars=[f(1.0), f(0.0)])
    exact, size = reference(a, b, together, 1.0, 0.0)
    check(together, exact, size, k)
    for count in ROW_COUNTS:
        alone = np.zeros((count, n), dtype)
        call("Gemm", [alone, a[7 : 7 + count], b], call_scalars=[f(1.0), f(0.0)])
        np.testing.assert_array_equal(alone.astype(np.float32), together[7 : 7 + count].astype(np.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_number_of_rows_with_strides(dtype: np.dtype) -> None:
    """Rows of A, B and C with gaps between them, and at addresses that no vector is aligned to."""
    rng = np.random.default_rng(7)
    for m in ROW_COUNTS:
        n, k = 50 + 3 * m, 2 * m + 61
        a, c = strided(rng, (m, k), dtype, True)[:, 1:], strided(rng, (m, n), dtype, True)
        b = strided(rng, (k, n), dtype, True, (1, 0))[1:]
        exact, size = reference(a, b, c, 0.5, -1.0)
        call("Gemm", [c, a, b], call_scalars=[f(0.5), f(-1.0)])
        check(c, exact, size, k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty_dimensions(dtype: np.dtype) -> None:
    for m, n, k in [(0, 5, 3), (4, 0, 3)]:
        call(
            "Gemm", [np.zeros((m, n), dtype), np.ones((m, k), dtype), np.ones((k, n), dtype)], call_scalars=[f(1), f(0)]
        )
    c = np.full((4, 5), 3, dtype)  # K = 0: nothing is added
    call("Gemm", [c, np.ones((4, 0), dtype), np.ones((5, 0), dtype).T], call_scalars=[f(1), f(2)])
    np.testing.assert_array_equal(c.astype(np.float32), 6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinity_and_nan_pass_through(dtype: np.dtype) -> None:
    a, b = np.ones((3, 50), dtype), np.ones((50, 8), dtype).T.copy().T
    a[1, 49], a[2, 3] = np.inf, np.nan
    c = np.zeros((3, 8), dtype)
    call("Gemm", [c, a, b], call_scalars=[f(1), f(0)])
    assert (c[0] == 50).all() and (c[1] == np.inf).all() and np.isnan(c[2].astype(np.float32)).all()


def test_large_problem_in_many_tasks() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.standard_normal((131, 700)).astype(F32), rng.standard_normal((900, 700)).astype(F32).T
    c = np.zeros((131, 900), F32)
    exact, size = reference(a, b, c, 1.0, 0.0)
    call("Gemm", [c, a, b], call_scalars=[f(1), f(0)])
    check(c, exact, size, 700)


def test_descriptor_is_reusable_with_other_scalars() -> None:
    a, b, c = np.ones((2, 3), F32), np.ones((3, 4), F32), np.zeros((2, 4), F32)
    operator = Operator("Gemm", [c, a, b])
    assert operator(c, a, b, scalars=[f(1), f(0)]) == 0 and (c == 3).all()
    assert operator(c, a, b, scalars=[f(2), f(1)]) == 0 and (c == 9).all()
    operator.destroy()

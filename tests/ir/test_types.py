"""Dimensions, types and constants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.constants import Cast, Concat, FileSlice, Inline, Slice, Transpose, load
from ir.errors import CheckpointError, GraphError
from ir.types import (
    DTYPES,
    Sym,
    TensorType,
    bind,
    dim_bind,
    dim_divide,
    dim_product,
    dim_sum,
    dtype_from_onnx,
    dtype_from_safetensors,
    dtype_of,
    known_dims,
    parse_dim,
    sym,
)

PROFILE = settings(max_examples=80, deadline=None, derandomize=True)
NAMES = ("B", "S", "total")
DIM = st.builds(
    lambda coef, names: Sym(coef, tuple(sorted(names))) if names else coef,
    st.integers(1, 12),
    st.lists(st.sampled_from(NAMES), max_size=3),
)
VALUES = {"B": 2, "S": 5, "total": 11}


@PROFILE
@given(DIM, DIM)
def test_products_and_quotients(a, b):
    product = dim_product((a, b))
    assert bind(product, VALUES) == bind(a, VALUES) * bind(b, VALUES)
    assert dim_divide(product, b) == a
    assert parse_dim(str(product)) == product
    quotient = dim_divide(a, b)
    if quotient is not None:
        assert dim_product((quotient, b)) == a


def test_quotients_that_do_not_exist():
    assert dim_divide(sym("S"), sym("B")) is None
    assert dim_divide(7, 2) is None
    assert dim_divide(sym("S") * 3, 2) is None
    assert dim_divide(4, 0) is None
    assert dim_divide(6, sym("S")) is None


@PROFILE
@given(st.lists(DIM, max_size=5))
def test_sums(dims):
    total = dim_sum(dims)
    like = len({d.names if isinstance(d, Sym) else () for d in dims}) <= 1
    assert (total is not None) == like
    if total is not None:
        assert bind(total, VALUES) == sum(bind(d, VALUES) for d in dims)


def test_sums_that_are_no_products():
    heads = sym("G")
    assert dim_sum([3 * heads, heads, heads]) == 5 * heads and dim_sum([]) == 0 and dim_sum([2, 5]) == 7
    assert dim_sum([0, heads]) == heads and dim_sum([heads, -1 * heads]) == 0
    assert dim_sum([heads, 1]) is None and dim_sum([heads, sym("I")]) is None


@PROFILE
@given(DIM, st.sets(st.sampled_from(NAMES)))
def test_values_of_some_symbols(dim, known):
    values = {n: VALUES[n] for n in known}
    part = dim_bind(dim, values)
    assert not isinstance(part, Sym) or not known & set(part.names)
    assert bind(part, VALUES) == bind(dim, VALUES)
    assert known_dims(TensorType("f32", (dim, 3)), values) == TensorType("f32", (part, 3))


def test_symbols_from_any_text():
    assert sym("past + 1") == Sym(1, ("past___1",)) and sym("1x") == Sym(1, ("_1x",))
    with pytest.raises(GraphError, match="not a dimension"):
        parse_dim("a+b")
    with pytest.raises(GraphError, match="symbol 'S' has no value"):
        bind(sym("S"), {"B": 1})


def test_the_table_of_dtypes_agrees_with_its_neighbours():
    import onnx

    for dtype in DTYPES.values():
        assert dtype_of(np.zeros(1, dtype.numpy)) == dtype.name
        assert dtype_from_onnx(dtype.onnx) == dtype.name
        assert dtype_from_safetensors(dtype.safetensors) == dtype.name
        assert onnx.helper.tensor_dtype_to_np_dtype(dtype.onnx).itemsize == dtype.bytes
    with pytest.raises(GraphError, match="safetensors dtype F8_E4M3 has no counterpart"):
        dtype_from_safetensors("F8_E4M3")


def test_inline_constants_are_equal_by_content():
    a, b = Inline(np.arange(3, dtype=np.float32)), Inline(np.arange(3, dtype=np.float32))
    assert a == b and hash(a) == hash(b)
    assert a != Inline(np.arange(3, dtype=np.float64)) and a != Inline(np.arange(3, dtype=np.float32).reshape(1, 3))
    with pytest.raises(ValueError):
        a.array[0] = 1


@PROFILE
@given(st.data())
def test_recipes_compute_their_shape_dtype_and_values(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    array = rng.normal(size=shape).astype(np.float32)
    recipe, expected = Inline(array), array
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["transpose", "cast", "slice", "concat"]))
        axis = data.draw(st.integers(0, expected.ndim - 1))
        if kind == "transpose":
            perm = tuple(data.draw(st.permutations(range(expected.ndim))))
            recipe, expected = Transpose(recipe, perm), expected.transpose(perm)
        elif kind == "cast":
            dtype = data.draw(st.sampled_from(["f32", "f16", "bf16", "f64"]))
            recipe, expected = Cast(recipe, dtype), expected.astype(DTYPES[dtype].numpy)
        elif kind == "slice":
            start = data.draw(st.integers(0, expected.shape[axis] - 1))
            stop = data.draw(st.integers(start + 1, expected.shape[axis]))
            recipe, expected = Slice(recipe, axis, start, stop), expected.take(range(start, stop), axis)
        else:
            recipe, expected = Concat((recipe, recipe), axis), np.concatenate([expected, expected], axis)
    found = load(recipe, None)
    assert found.shape == expected.shape == tuple(recipe.shape)
    assert dtype_of(found) == recipe.dtype and np.array_equal(found, expected)


def test_file_slices(tmp_path):
    values = np.arange(12, dtype=np.float32)
    (tmp_path / "w.bin").write_bytes(b"xyz" + values.tobytes())
    part = FileSlice("w.bin", "w", "f32", (2, 3), 3 + 4 * 2)
    assert np.array_equal(load(part, tmp_path), values[2:8].reshape(2, 3))
    with pytest.raises(CheckpointError, match=r"w.bin: has 51 bytes, but weight w ends at 55; is it truncated"):
        load(FileSlice("w.bin", "w", "f32", (13,), 3), tmp_path)
    with pytest.raises(CheckpointError, match="weight v"):
        load(FileSlice("none.bin", "v", "f32", (1,), 0), tmp_path)
    with pytest.raises(CheckpointError, match="configuration alone"):
        load(FileSlice("w.bin", "w", "f32", (1,), None), tmp_path)


def test_types_print():
    assert str(TensorType("bf16", (sym("T"), 4, sym("B") * 2 * sym("S")))) == "bf16[T, 4, 2*B*S]"
    assert str(TensorType("i64", ())) == "i64[]"

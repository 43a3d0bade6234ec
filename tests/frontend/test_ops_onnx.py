"""Each ONNX op's reference against onnxruntime, on single-node models with random shapes and attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from frontend.onnx_import import import_onnx
from ir import ops_onnx  # noqa: F401
from ir.errors import GraphError, UnsupportedError
from ir.interp import run
from ir.optable import OPS, Context
from ir.types import TensorType

INT_MAX = np.iinfo(np.int64).max
INT_MIN = np.iinfo(np.int64).min
F32, I64, BOOL = np.float32, np.int64, np.bool_

# A case: operands (None: absent), attributes, number of outputs, opset. Operands named in FIXED are initializers,
# because the importer or onnxruntime wants them known.
Case = tuple[list, dict[str, Any], int, int]
CASES: dict[str, Callable[[np.random.Generator], Case]] = {}


def case(*names: str):
    def enter(fn):
        for name in names:
            CASES[name] = lambda rng, name=name: fn(rng, name)
        return fn

    return enter


def shape(rng, low=1, high=4, largest=6) -> tuple[int, ...]:
    return tuple(int(n) for n in rng.integers(1, largest + 1, rng.integers(low, high + 1)))


def floats(rng, *dims) -> np.ndarray:
    return rng.normal(0, 1.5, dims).astype(F32)


def ints(*values) -> np.ndarray:
    return np.array(values, I64)


def pair(rng, make=floats) -> list[np.ndarray]:
    """Two operands that broadcast."""
    full = shape(rng)
    shapes = []
    for _ in range(2):
        dims = tuple(1 if rng.random() < 0.3 else d for d in full)
        shapes.append(dims[int(rng.integers(0, len(dims))) :] if rng.random() < 0.3 else dims)
    return [make(rng, *s) for s in shapes]


def whole(rng, *dims) -> np.ndarray:
    return rng.integers(-20, 21, dims)


def nonzero(rng, *dims) -> np.ndarray:
    return rng.integers(1, 9, dims) * rng.choice([-1, 1], dims)


def booleans(rng, *dims) -> np.ndarray:
    return rng.random(dims) < 0.5


@case("Abs", "Cos", "Exp", "Floor", "Neg", "Sigmoid", "Sin", "Tanh", "Identity")
def unary(rng, name):
    x = floats(rng, *shape(rng))
    x.flat[0] = rng.choice([-90.0, 80.0])  # where a careless sigmoid overflows
    return [x], {}, 1, 18


@case("Sqrt", "Log", "Reciprocal")
def positive(rng, name):
    return [np.abs(floats(rng, *shape(rng))) + F32(0.1)], {}, 1, 18


@case("IsNaN")
def is_nan(rng, name):
    x = floats(rng, *shape(rng, largest=9))
    x[rng.random(x.shape) < 0.3] = np.nan
    return [x], {}, 1, 18


@case("IsInf")
def is_inf(rng, name):
    x = rng.choice(np.array([np.inf, -np.inf, 1.0, np.nan], F32), shape(rng))
    return [x], {"detect_negative": int(rng.integers(2)), "detect_positive": int(rng.integers(2))}, 1, 18


@case("Not")
def logical_not(rng, name):
    return [booleans(rng, *shape(rng))], {}, 1, 18


@case("And", "Or", "Xor")
def logical(rng, name):
    return pair(rng, booleans), {}, 1, 18


@case("Add", "Mul", "Sub", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal")
def binary(rng, name):
    return pair(rng, whole if rng.integers(2) else floats), {}, 1, 18


@case("Div")
def divide(rng, name):
    if rng.integers(2):
        return pair(rng, floats), {}, 1, 18
    return [whole(rng, 4, 5), nonzero(rng, 4, 5)], {}, 1, 18


@case("Pow")
def power(rng, name):
    if rng.integers(2):
        return [np.abs(floats(rng, 3, 4)) + F32(0.1), floats(rng, 4)], {}, 1, 18
    return [whole(rng, 3, 4), rng.integers(0, 4, (4,))], {}, 1, 18


@case("Mod")
def mod(rng, name):
    if rng.integers(2):
        return [floats(rng, 3, 4), floats(rng, 4)], {"fmod": 1}, 1, 18
    return [whole(rng, 3, 4), nonzero(rng, 3, 4)], {"fmod": int(rng.integers(2))}, 1, 18


@case("Max", "Min", "Sum")
def variadic(rng, name):
    make = whole if name != "Sum" and rng.integers(2) else floats
    return [make(rng, 3, 4), make(rng, 4), make(rng, 3, 1)][: int(rng.integers(1, 4))], {}, 1, 18


@case("Clip")
def clip(rng, name):
    low, high = np.array(-0.5, F32), np.array(0.7, F32)
    return [floats(rng, *shape(rng)), [None, low][rng.integers(2)], [None, high][rng.integers(2)]], {}, 1, 18


@case("Swish")
def swish(rng, name):
    return [floats(rng, *shape(rng))], {"alpha": float(F32(rng.uniform(0.5, 2)))} if rng.integers(2) else {}, 1, 24


@case("Where")
def where(rng, name):
    x, y = pair(rng, whole if rng.integers(2) else floats)
    condition = booleans(rng, *np.broadcast_shapes(x.shape, y.shape))
    return [condition, x, y], {}, 1, 18


@case("Cast")
def cast(rng, name):
    x = [floats, whole, booleans][rng.integers(3)](rng, *shape(rng)) * 1
    to = int(
        rng.choice([TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.DOUBLE])
    )
    return [x], {"to": to}, 1, 18


@case("CastLike")
def cast_like(rng, name):
    return [floats(rng, *shape(rng)), [floats, whole, booleans][rng.integers(3)](rng, 2)], {}, 1, 18


@case("Shape")
def shape_op(rng, name):
    attrs = {}
    if rng.integers(2):
        attrs["start"] = int(rng.integers(-5, 5))
    if rng.integers(2):
        attrs["end"] = int(rng.integers(-5, 6))
    return [floats(rng, *shape(rng, 1, 4))], attrs, 1, 18


@case("Size")
def size(rng, name):
    return [floats(rng, *shape(rng))], {}, 1, 18


@case("Reshape")
def reshape(rng, name):
    x = floats(rng, 2, 3, 4, 5)
    targets = [(0, 0, -1), (6, 20), (-1,), (0, 3, 2, 2, 5), (0, -1, 5), (2, 3, -1, 1)]
    if rng.random() < 0.3:
        # An empty past: -1 must come out as 0.
        return [floats(rng, 2, 0, 4), ints(*[(2, 5, -1), (4, 0), (0, 0, 2, 2), (-1, 4)][rng.integers(4)])], {}, 1, 18
    if rng.random() < 0.2:
        return [floats(rng, 0, 3), ints(3, 0)], {"allowzero": 1}, 1, 18
    return [x, ints(*targets[rng.integers(len(targets))])], {}, 1, 18


@case("Flatten")
def flatten(rng, name):
    return [floats(rng, 2, 3, 4)], {"axis": int(rng.integers(-3, 4))}, 1, 18


@case("Squeeze")
def squeeze(rng, name):
    return [floats(rng, 1, 3, 1, 4), [None, ints(0), ints(-2), ints(2, 0)][rng.integers(4)]], {}, 1, 18


@case("Unsqueeze")
def unsqueeze(rng, name):
    return [floats(rng, 3, 4), [ints(0), ints(-1), ints(0, 2), ints(-1, 1), ints(3, 2)][rng.integers(5)]], {}, 1, 18


@case("Transpose")
def transpose(rng, name):
    x = floats(rng, *shape(rng, 2, 4))
    return [x], {"perm": [int(i) for i in rng.permutation(x.ndim)]} if rng.integers(2) else {}, 1, 18


@case("Expand")
def expand(rng, name):
    return [floats(rng, 3, 1, 5), [ints(3, 4, 1), ints(2, 3, 1, 1), ints(1), ints(1, 4, 5)][rng.integers(4)]], {}, 1, 18


@case("Tile")
def tile(rng, name):
    return [floats(rng, 2, 3), rng.integers(0, 4, 2)], {}, 1, 18


@case("Concat")
def concat(rng, name):
    base, axis = list(shape(rng, 2, 4)), int(rng.integers(-2, 2))
    parts = []
    for _ in range(int(rng.integers(1, 4))):
        base[axis] = int(rng.integers(0, 4))  # an empty past among them
        parts.append(floats(rng, *base))
    return parts, {"axis": axis}, 1, 18


@case("Split")
def split(rng, name):
    x, axis = floats(rng, 3, 7, 4), int(rng.choice([1, -2]))
    kind = rng.integers(3)
    if kind == 0:
        return [x, ints(2, 4, 1)], {"axis": axis}, 3, 18
    if kind == 1:
        return [x, None], {"axis": axis, "num_outputs": 3}, 3, 18
    return [floats(rng, 6, 3), None], {}, 2, 13


@case("Slice")
def slice_(rng, name):
    x = floats(rng, 7, 6, 5)
    count = int(rng.integers(1, 4))
    axes = rng.permutation(3)[:count] - (3 if rng.integers(2) else 0)
    steps = rng.choice([-3, -2, -1, 1, 2, 3], count)
    edge = [-9, -3, -1, 0, 1, 2, 4, 9, INT_MAX, INT_MIN]
    starts, ends = rng.choice(edge, count), rng.choice(edge, count)
    # Backwards, onnxruntime takes INT64_MAX for "to the first element" although ONNX gives INT64_MIN that meaning:
    # nobody writes it.
    ends[(steps < 0) & (ends == INT_MAX)] = INT_MIN
    if rng.integers(3) == 0:
        return [x, starts, ends], {}, 1, 18
    return [x, starts, ends, axes, None if rng.integers(3) == 0 else steps], {}, 1, 18


@case("Gather")
def gather(rng, name):
    axis = int(rng.integers(-3, 3))
    x = floats(rng, 4, 5, 6)
    return [x, rng.integers(-x.shape[axis], x.shape[axis], shape(rng, 0, 2))], {"axis": axis}, 1, 18


@case("GatherElements")
def gather_elements(rng, name):
    axis = int(rng.integers(-2, 2))
    x = floats(rng, 4, 5)
    return [x, rng.integers(-x.shape[axis], x.shape[axis], (3, 2))], {"axis": axis}, 1, 18


@case("GatherND")
def gather_nd(rng, name):
    x = floats(rng, 3, 4, 5)
    batch = int(rng.integers(0, 2))
    depth = int(rng.integers(1, 4 - batch))
    lead = (3, 2) if batch else shape(rng, 1, 2)
    columns = [rng.integers(-x.shape[batch + i], x.shape[batch + i], lead) for i in range(depth)]
    return [x, np.stack(columns, -1)], {"batch_dims": batch}, 1, 18


@case("Range")
def range_(rng, name):
    if rng.integers(2):
        return (
            [np.array(v, I64) for v in (rng.integers(-5, 5), rng.integers(-5, 15), rng.choice([-3, -1, 1, 2]))],
            {},
            1,
            18,
        )
    return [np.array(v, F32) for v in (0.5, rng.integers(-3, 9), 0.75)], {}, 1, 18


@case("ConstantOfShape")
def constant_of_shape(rng, name):
    values = [np.array([1.5], F32), np.array([7], I64), np.array([True]), None]
    value = values[rng.integers(4)]
    return [ints(*shape(rng))], {} if value is None else {"value": onnx.numpy_helper.from_array(value)}, 1, 18


@case("Trilu")
def trilu(rng, name):
    k = np.array(rng.integers(-3, 4), I64) if rng.integers(2) else None
    return [floats(rng, *shape(rng, 2, 3)), k], {"upper": int(rng.integers(2))}, 1, 18


@case("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd")
def reduce(rng, name):
    x = floats(rng, 3, 4, 5)
    axes = [None, ints(-1), ints(0, 2), ints(1)][rng.integers(4)]
    attrs: dict[str, Any] = {"keepdims": int(rng.integers(2))}
    if rng.integers(2) and name != "ReduceSum":  # before opset 18 axes are an attribute
        return [x], attrs if axes is None else {**attrs, "axes": [int(a) for a in axes]}, 1, 17
    if axes is None and rng.integers(2):
        attrs["noop_with_empty_axes"] = 1
    return [x, axes], attrs, 1, 18


@case("CumSum")
def cumsum(rng, name):
    attrs = {"exclusive": int(rng.integers(2)), "reverse": int(rng.integers(2))}
    make = whole if rng.integers(2) else floats
    return [make(rng, 3, 4), np.array(rng.integers(-2, 2), I64)], attrs, 1, 18


@case("Softmax")
def softmax(rng, name):
    x = floats(rng, 3, 4, 5) * F32(20)
    x[0, 0, :2] = -np.inf
    return [x], {"axis": int(rng.integers(-3, 3))} if rng.integers(2) else {}, 1, 18


@case("MatMul")
def matmul(rng, name):
    shapes = [((3, 4), (4, 5)), ((2, 1, 3, 4), (6, 4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((2, 3, 0), (0, 4))]
    a, b = shapes[rng.integers(len(shapes))]
    return [floats(rng, *a), floats(rng, *b)], {}, 1, 18


@case("Gemm")
def gemm(rng, name):
    ta, tb = (int(i) for i in rng.integers(0, 2, 2))
    a, b = floats(rng, *((4, 3) if ta else (3, 4))), floats(rng, *((5, 4) if tb else (4, 5)))
    c = [None, floats(rng, 5), floats(rng, 3, 1)][rng.integers(3)]
    return [a, b, c], {"transA": ta, "transB": tb, "alpha": 0.5, "beta": 2.0}, 1, 18


@case("RMSNormalization")
def rms_normalization(rng, name):
    x, axis = floats(rng, 2, 3, 4, 6), int(rng.choice([-1, 3, -2]))
    scale = floats(rng, *x.shape[axis:])
    attrs = {"axis": axis, "epsilon": float(F32(rng.choice([1e-6, 1e-3])))} if axis != -1 or rng.integers(2) else {}
    return [x, scale], attrs, 1, 23


@case("RotaryEmbedding")
def rotary_embedding(rng, name):
    batch, heads, sequence, half = 2, 3, 5, 4
    flat, tables = bool(rng.integers(2)), bool(rng.integers(2))
    attrs = {"interleaved": int(rng.integers(2))}
    x = floats(rng, batch, sequence, heads * 2 * half) if flat else floats(rng, batch, heads, sequence, 2 * half)
    if flat:
        attrs["num_heads"] = heads
    if not flat and rng.integers(2):
        attrs["rotary_embedding_dim"] = 2 * half - 4
        half -= 2
        attrs["num_heads"] = heads  # onnxruntime wants it with a partial rotation
    if tables:
        operands = [floats(rng, 9, half), floats(rng, 9, half), rng.integers(0, 9, (batch, sequence))]
    else:
        operands = [floats(rng, batch, sequence, half), floats(rng, batch, sequence, half)]
    return [x, *operands], attrs, 1, 23


@case("Attention")
def attention(rng, name):
    batch, kv_heads, group, sequence, d = 2, int(rng.integers(1, 4)), int(rng.integers(1, 4)), 4, 6
    heads, past = kv_heads * group, int(rng.choice([0, 3]))
    cached = bool(past or rng.integers(2))
    total = past + sequence
    flat = bool(rng.integers(2))
    if flat:
        q, k, v = (floats(rng, batch, sequence, n * d) for n in (heads, kv_heads, kv_heads))
        attrs: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": kv_heads}
    else:
        q, k, v = (floats(rng, batch, n, sequence, d) for n in (heads, kv_heads, kv_heads))
        attrs = {}
    if rng.integers(2):
        attrs["scale"] = 0.25
    kind = rng.integers(4)
    mask = None
    if kind == 1:
        mask = booleans(
            rng, *[(sequence, total), (batch, 1, sequence, total), (1, heads, sequence, total)][rng.integers(3)]
        )
        mask[..., 0] = True
    elif kind == 2:
        mask = floats(rng, *[(sequence, total), (batch, 1, sequence, total)][rng.integers(2)])
    elif kind == 3:
        attrs["is_causal"] = 1
    caches = [floats(rng, batch, kv_heads, past, d) for _ in range(2)] if cached else []
    return [q, k, v, mask, *caches], attrs, 3 if cached else 1, 23


# Operands that are read by position: initializers, as exporters write them. The others are inputs with symbolic sizes.
FIXED = {
    "Reshape": [1], "Squeeze": [1], "Unsqueeze": [1], "Expand": [1], "Split": [1], "Slice": [1, 2, 3, 4], "ConstantOfShape": [0],
    "ReduceMean": [1], "ReduceSum": [1], "ReduceMax": [1], "ReduceMin": [1], "ReduceProd": [1], "Tile": [1], "CumSum": [1],
    "Range": [0, 1, 2], "Trilu": [1], "Clip": [1, 2],
}  # fmt: skip


def build(name: str, arrays: list, attrs: dict, results: int, opset: int) -> onnx.ModelProto:
    arrays = arrays[: max(i + 1 for i, a in enumerate(arrays) if a is not None)]
    names = ["" if a is None else f"x{i}" for i, a in enumerate(arrays)]
    node = helper.make_node(name, names, [f"y{i}" for i in range(results)], name="node", **attrs)
    fixed = FIXED.get(name, [])
    inputs, initializers = [], []
    for i, array in enumerate(arrays):
        if array is None:
            continue
        if i in fixed:
            initializers.append(onnx.numpy_helper.from_array(array, names[i]))
        else:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(names[i], kind, array.shape))
    outputs = [onnx.ValueInfoProto(name=o) for o in node.output]
    graph = helper.make_graph([node], "single", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 23 else 11)


@pytest.mark.parametrize("name", sorted(CASES))
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=12, derandomize=True, deadline=None)
def test_reference_agrees_with_onnxruntime(name, seed, tmp_path_factory):
    arrays, attrs, results, opset = CASES[name](np.random.default_rng(seed))
    model = build(name, arrays, attrs, results, opset)
    path = tmp_path_factory.mktemp("op") / "op.onnx"
    path.write_bytes(model.SerializeToString())
    feeds = {f"x{i}": a for i, a in enumerate(arrays) if a is not None and i not in FIXED.get(name, [])}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Inferred types, so that the outputs need no declaration by hand.
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True).SerializeToString()
    expected = onnxruntime.InferenceSession(typed, options, providers=["CPUExecutionProvider"]).run(None, feeds)
    graph = import_onnx(path)
    for float64 in (False, True):
        found = run(graph, feeds, float64=float64)
        for i, want in enumerate(expected):
            got = found[f"y{i}"]
            assert got.shape == want.shape
            if want.dtype.kind != "f":
                assert got.dtype == want.dtype
                np.testing.assert_array_equal(got, want)
                continue
            assert got.dtype == (np.float64 if float64 else want.dtype)
            # Both sides compute a few float32 operations on values of order one to ten, sums of at most 60 terms:
            # relative errors stay within 60 roundings (60 * 6e-8 = 4e-6); where terms cancel, the error is relative to
            # the terms, hence the absolute part.
            np.testing.assert_allclose(got, want, rtol=4e-6, atol=4e-6 * max(1.0, _largest(arrays)))


def _largest(arrays: list) -> float:
    finite = [float(np.abs(a[np.isfinite(a)]).max(initial=0)) for a in arrays if a is not None and a.dtype.kind == "f"]
    return max(finite, default=0.0)


def test_every_row_has_a_case():
    rows = {n.removeprefix("onnx.") for n, d in OPS.items() if d.stages == ("onnx",)}
    assert rows == set(CASES)


def reference(name: str, arrays: list, attrs: dict, results: int = 1) -> list:
    types = tuple(TensorType("f32", ()) for _ in range(results))
    definition = OPS[f"onnx.{name}"]
    return definition.reference(arrays, {**definition.attrs, **attrs}, Context(types, {}, False))


def test_index_out_of_range_is_an_error():
    x = np.zeros((3, 4), F32)
    for name, index in (
        ("Gather", ints(3)),
        ("GatherElements", ints(-4).reshape(1, 1)),
        ("GatherND", ints(3).reshape(1, 1)),
    ):
        with pytest.raises(GraphError, match=r"index -?\d is outside -3..2"):
            reference(name, [x, index], {})


def test_attention_that_means_different_things_is_refused():
    q, k = np.ones((1, 1, 2, 4), F32), np.ones((1, 1, 5, 4), F32)
    with pytest.raises(UnsupportedError, match="is_causal"):
        reference("Attention", [q, k, k], {"is_causal": 1})
    for attrs in ({"softcap": 1.0}, {"left_window_size": 2}):
        with pytest.raises(UnsupportedError, match="softcap"):
            reference("Attention", [q, k, k], attrs)


def test_a_query_that_sees_no_key_gives_zeros():
    q = k = v = np.ones((1, 1, 2, 4), F32)
    mask = np.array([[True, False], [False, False]])
    y = reference("Attention", [q, k, v, mask], {}, 3)[0]
    assert np.isfinite(y).all() and not y[0, 0, 1].any() and y[0, 0, 0, 0] == 1.0


def test_casts_do_not_round_in_float64():
    third = np.array([1 / 3])
    types = (TensorType("bf16", (1,)),)
    for float64, expected in ((True, 1 / 3), (False, 0.333984375)):
        got = OPS["onnx.Cast"].reference([third], {"to": "bf16"}, Context(types, {}, float64))
        assert float(got[0]) == expected

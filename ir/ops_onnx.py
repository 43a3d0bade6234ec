"""The ONNX ops that exporters write decoders with, as they are imported (stage "onnx").

Names are ``onnx.<Type>``; operands are ONNX's own. Attributes are Python values: the importer turns ``to`` into an IR
dtype name and ConstantOfShape's ``value`` into a number. Where versions of ONNX moved an attribute to an operand
(axes), both are accepted. Types come from the importer, so there are no shape rules. References follow ONNX's
semantics, opsets 13 to 25.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from ir.errors import GraphError, UnsupportedError
from ir.optable import ReferenceFn, op
from ir.types import DTYPES, TensorType

ONNX = "onnx"


def _floating(x: np.ndarray) -> bool:
    return x.dtype.kind == "f" or x.dtype == DTYPES["bf16"].numpy


def _result(x: np.ndarray, type_: TensorType, float64: bool) -> np.ndarray:
    """``x`` converted as Cast does: to a float type without rounding where everything is float64, to an integer
    towards zero."""
    dtype = DTYPES[type_.dtype]
    if dtype.is_float and float64:
        return x.astype(np.float64)
    return x.astype(dtype.numpy)


def _ints(x: np.ndarray | None) -> tuple[int, ...]:
    return () if x is None else tuple(int(i) for i in np.asarray(x).reshape(-1))


Elementwise = Callable[..., np.ndarray]

# Elementwise ----------------------------------------------------------------------------------------------------------


def _sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if _floating(a):
        return a / b
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))  # integers towards zero


def _power(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.power(x, y.astype(x.dtype) if _floating(x) else y).astype(x.dtype)


_UNARY: dict[str, tuple[Elementwise, str]] = {
    "Abs": (np.abs, "|x|"),
    "Cos": (np.cos, "cos x"),
    "Exp": (np.exp, "e^x"),
    "Floor": (np.floor, "largest integer not above x"),
    "Identity": (lambda x: x, "x"),
    "IsNaN": (np.isnan, "is x NaN"),
    "Log": (np.log, "ln x"),
    "Neg": (np.negative, "-x"),
    "Not": (np.logical_not, "not x"),
    "Reciprocal": (lambda x: 1 / x, "1 / x"),
    "Sigmoid": (_sigmoid, "1 / (1 + e^-x)"),
    "Sin": (np.sin, "sin x"),
    "Sqrt": (np.sqrt, "square root"),
    "Tanh": (np.tanh, "tanh x"),
}

_BINARY: dict[str, tuple[Elementwise, str]] = {
    "Add": (np.add, "a + b"),
    "And": (np.logical_and, "a and b"),
    "Div": (_divide, "a / b, integers towards zero"),
    "Equal": (np.equal, "a == b"),
    "Greater": (np.greater, "a > b"),
    "GreaterOrEqual": (np.greater_equal, "a >= b"),
    "Less": (np.less, "a < b"),
    "LessOrEqual": (np.less_equal, "a <= b"),
    "Mul": (np.multiply, "a * b"),
    "Or": (np.logical_or, "a or b"),
    "Pow": (_power, "a ^ b, in a's type"),
    "Sub": (np.subtract, "a - b"),
    "Xor": (np.logical_xor, "either a or b"),
}

_VARIADIC: dict[str, tuple[Elementwise, str]] = {
    "Max": (np.maximum, "largest of the operands"),
    "Min": (np.minimum, "smallest of the operands"),
    "Sum": (np.add, "sum of the operands"),
}


def _enter_elementwise() -> None:
    for table, operands in ((_UNARY, "x"), (_BINARY, "a b"), (_VARIADIC, "x*")):
        for name, (fn, doc) in table.items():
            op(f"onnx.{name}", ONNX, operands, doc)(_folded(fn) if table is _VARIADIC else _applied(fn))


def _applied(fn: Elementwise) -> ReferenceFn:
    return lambda inputs, attrs, context: fn(*inputs)


def _folded(fn: Elementwise) -> ReferenceFn:
    return lambda inputs, attrs, context: functools.reduce(fn, inputs)


_enter_elementwise()


@op("onnx.Mod", ONNX, "a b", "remainder with b's sign, or with a's where fmod", attrs={"fmod": 0})
def mod(inputs, attrs, context):
    return (np.fmod if attrs["fmod"] else np.mod)(*inputs)


@op("onnx.IsInf", ONNX, "x", "is x infinite", attrs={"detect_negative": 1, "detect_positive": 1})
def is_inf(inputs, attrs, context):
    (x,) = inputs
    return (np.isposinf(x) & bool(attrs["detect_positive"])) | (np.isneginf(x) & bool(attrs["detect_negative"]))


@op("onnx.Clip", ONNX, "x min? max?", "x held between min and max")
def clip(inputs, attrs, context):
    x, low, high = (*inputs, None, None)[:3]
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


@op("onnx.Swish", ONNX, "x", "x * sigmoid(alpha x)", attrs={"alpha": 1.0})
def swish(inputs, attrs, context):
    (x,) = inputs
    return x * _sigmoid(x.dtype.type(attrs["alpha"]) * x)


@op("onnx.Where", ONNX, "condition x y", "x where the condition holds, else y")
def where(inputs, attrs, context):
    return np.where(*inputs)


@op("onnx.Cast", ONNX, "x", "x in another element type", attrs={"to": ..., "saturate": 1, "round_mode": "up"})
def cast(inputs, attrs, context):
    return _result(inputs[0], TensorType(attrs["to"], ()), context.float64)


@op(
    "onnx.CastLike",
    ONNX,
    "x like",
    "x in the element type of another operand",
    attrs={"saturate": 1, "round_mode": "up"},
)
def cast_like(inputs, attrs, context):
    return _result(inputs[0], context.types[0], context.float64)


# Shapes ---------------------------------------------------------------------------------------------------------------


@op("onnx.Shape", ONNX, "x", "the sizes of axes start to end as i64", attrs={"start": 0, "end": None})
def shape(inputs, attrs, context):
    # Negative and too large bounds mean what they mean in Python.
    return np.array(inputs[0].shape[attrs["start"] : attrs["end"]], np.int64)


@op("onnx.Size", ONNX, "x", "the number of elements as i64")
def size(inputs, attrs, context):
    return np.array(inputs[0].size, np.int64)


@op(
    "onnx.Reshape",
    ONNX,
    "x shape",
    "the same elements in another shape; 0 keeps an axis, -1 is what is left",
    attrs={"allowzero": 0},
)
def reshape(inputs, attrs, context):
    x, target = inputs[0], list(_ints(inputs[1]))
    if not attrs["allowzero"]:
        target = [x.shape[i] if d == 0 else d for i, d in enumerate(target)]
    return x.reshape(target)


@op("onnx.Flatten", ONNX, "x", "two axes: those before axis, and the rest", attrs={"axis": 1})
def flatten(inputs, attrs, context):
    (x,) = inputs
    axis = attrs["axis"] + (x.ndim if attrs["axis"] < 0 else 0)
    return x.reshape(int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis:])))


@op("onnx.Squeeze", ONNX, "x axes?", "without the given axes of size 1 (default: all of them)")
def squeeze(inputs, attrs, context):
    x, axes = (*inputs, None)[:2]
    return np.squeeze(x, None if axes is None else _ints(axes))


@op("onnx.Unsqueeze", ONNX, "x axes", "with axes of size 1 at these places of the result")
def unsqueeze(inputs, attrs, context):
    return np.expand_dims(inputs[0], _ints(inputs[1]))


@op("onnx.Transpose", ONNX, "x", "axes in another order (default: reversed)", attrs={"perm": None})
def transpose(inputs, attrs, context):
    return inputs[0].transpose(attrs["perm"])


@op("onnx.Expand", ONNX, "x shape", "x broadcast with a shape")
def expand(inputs, attrs, context):
    x, target = inputs
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, _ints(target)))


@op("onnx.Tile", ONNX, "x repeats", "x repeated along each axis")
def tile(inputs, attrs, context):
    return np.tile(inputs[0], _ints(inputs[1]))


@op("onnx.Concat", ONNX, "x*", "operands one after the other along axis", attrs={"axis": ...})
def concat(inputs, attrs, context):
    return np.concatenate(inputs, axis=attrs["axis"])


@op("onnx.Split", ONNX, "x split?", "pieces along axis", attrs={"axis": 0, "num_outputs": None}, results=None)
def split(inputs, attrs, context):
    x, sizes = (*inputs, None)[:2]
    count, total = len(context.types), x.shape[attrs["axis"]]
    # Without sizes the pieces are equal, and the last one is smaller where that does not work out.
    chunk = -(-total // count)
    bounds = np.cumsum(_ints(sizes)) if sizes is not None else np.minimum(np.arange(1, count + 1) * chunk, total)
    return np.split(x, bounds[:-1], axis=attrs["axis"])


@op(
    "onnx.Slice", ONNX, "x starts ends axes? steps?", "a range of each given axis; bounds beyond the axis are cut to it"
)
def slice_(inputs, attrs, context):
    x, starts, ends, axes, steps = (*inputs, None, None)[:5]
    begin, end = _ints(starts), _ints(ends)
    index = [slice(None)] * x.ndim
    for i, axis in enumerate(_ints(axes) if axes is not None else range(len(begin))):
        index[axis] = _range(begin[i], end[i], _ints(steps)[i] if steps is not None else 1, x.shape[axis])
    return x[tuple(index)]


def _range(start: int, end: int, step: int, n: int) -> slice:
    start, end = start + (n if start < 0 else 0), end + (n if end < 0 else 0)
    if step > 0:
        return slice(min(max(start, 0), n), min(max(end, 0), n), step)
    # Backwards, "end" may be one before the first element, which Python writes as None.
    start, end = min(max(start, 0), n - 1), min(max(end, -1), n - 1)
    return slice(start, None if end < 0 else end, step)


@op(
    "onnx.Gather",
    ONNX,
    "x indices",
    "slices of x along axis by index (negative counts from the end)",
    attrs={"axis": 0},
)
def gather(inputs, attrs, context):
    x, indices = inputs
    _check_indices("Gather", indices, x.shape[attrs["axis"]])
    return np.take(x, indices, axis=attrs["axis"])


def _check_indices(name: str, indices: np.ndarray, n: int) -> None:
    if indices.size and (indices.min() < -n or indices.max() >= n):
        worst = int(indices.min()) if indices.min() < -n else int(indices.max())
        raise GraphError(f"onnx.{name}: index {worst} is outside -{n}..{n - 1}")


@op("onnx.GatherElements", ONNX, "x indices", "elements of x by index along axis, one per index", attrs={"axis": 0})
def gather_elements(inputs, attrs, context):
    x, indices = inputs
    n = x.shape[attrs["axis"]]
    _check_indices("GatherElements", indices, n)
    axis = attrs["axis"] % x.ndim
    window = tuple(slice(None) if i == axis else slice(0, d) for i, d in enumerate(indices.shape))
    return np.take_along_axis(x[window], np.where(indices < 0, indices + n, indices), axis)


@op("onnx.GatherND", ONNX, "x indices", "slices of x by index tuples", attrs={"batch_dims": 0})
def gather_nd(inputs, attrs, context):
    x, indices = inputs
    batch = attrs["batch_dims"]
    places = [indices[..., i] for i in range(indices.shape[-1])]
    for i, place in enumerate(places):
        _check_indices("GatherND", place, x.shape[batch + i])
    # Batch axes index themselves, broadcast against the rest of the index.
    rest = indices.ndim - 1 - batch
    own = [
        np.arange(n).reshape([n if j == i else 1 for j in range(batch)] + [1] * rest)
        for i, n in enumerate(x.shape[:batch])
    ]
    return x[tuple(own + places)]


@op("onnx.Range", ONNX, "start limit delta", "start, start + delta, ... before limit", attrs={"stash_type": 1})
def range_(inputs, attrs, context):
    start, limit, delta = (np.asarray(x).reshape(()) for x in inputs)
    count = max(int(np.ceil((limit - start) / delta)), 0)
    return (start + np.arange(count, dtype=start.dtype) * delta).astype(start.dtype)


@op("onnx.ConstantOfShape", ONNX, "shape", "one value everywhere", attrs={"value": 0.0})
def constant_of_shape(inputs, attrs, context):
    return _result(np.full(_ints(inputs[0]), attrs["value"]), context.types[0], context.float64)


@op("onnx.Trilu", ONNX, "x k?", "the upper or lower triangle, zeros elsewhere", attrs={"upper": 1})
def trilu(inputs, attrs, context):
    x, k = (*inputs, None)[:2]
    return (np.triu if attrs["upper"] else np.tril)(x, _ints(k)[0] if k is not None else 0)


# Reductions and products ----------------------------------------------------------------------------------------------


def _reduction(fn: Elementwise) -> ReferenceFn:
    def reference(inputs, attrs, context):
        x, axes = (*inputs, None)[:2]
        chosen = _ints(axes) if axes is not None else tuple(attrs["axes"] or ())
        if not chosen and attrs["noop_with_empty_axes"]:
            return x
        return fn(x, axis=chosen or None, keepdims=bool(attrs["keepdims"]))

    return reference


_REDUCTIONS: dict[str, Elementwise] = {"Max": np.max, "Mean": np.mean, "Min": np.min, "Prod": np.prod, "Sum": np.sum}
for _name, _fn in _REDUCTIONS.items():
    op(
        f"onnx.Reduce{_name}",
        ONNX,
        "x axes?",
        f"{_name.lower()} over axes (default: all)",
        attrs={"axes": None, "keepdims": 1, "noop_with_empty_axes": 0},
    )(_reduction(_fn))


@op("onnx.CumSum", ONNX, "x axis", "running sum along axis", attrs={"exclusive": 0, "reverse": 0})
def cumsum(inputs, attrs, context):
    x, axis = inputs[0], _ints(inputs[1])[0]
    x = np.flip(x, axis) if attrs["reverse"] else x
    y = np.cumsum(x, axis=axis, dtype=x.dtype)
    y = y - x if attrs["exclusive"] else y
    return np.flip(y, axis) if attrs["reverse"] else y


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


@op("onnx.Softmax", ONNX, "x", "e^x / sum(e^x) along axis", attrs={"axis": -1})
def softmax(inputs, attrs, context):
    return _softmax(inputs[0], attrs["axis"]) if inputs[0].size else inputs[0]


@op("onnx.MatMul", ONNX, "a b", "matrix product, broadcast over leading axes")
def matmul(inputs, attrs, context):
    return np.matmul(*inputs)


@op("onnx.Gemm", ONNX, "a b c?", "alpha a b + beta c", attrs={"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0})
def gemm(inputs, attrs, context):
    a, b, c = (*inputs, None)[:3]
    y = (a.T if attrs["transA"] else a) @ (b.T if attrs["transB"] else b) * a.dtype.type(attrs["alpha"])
    return y if c is None else y + a.dtype.type(attrs["beta"]) * c


# Fused ops of opset 23 ------------------------------------------------------------------------------------------------


@op(
    "onnx.RMSNormalization",
    ONNX,
    "x scale",
    "x / sqrt(mean(x^2) + epsilon) * scale over axis and later ones",
    attrs={"axis": -1, "epsilon": 1e-5, "stash_type": 1},
)
def rms_normalization(inputs, attrs, context):
    x, scale = inputs
    axes = tuple(range(attrs["axis"] % x.ndim, x.ndim))
    mean = np.mean(x * x, axis=axes, keepdims=True)
    return x / np.sqrt(mean + x.dtype.type(attrs["epsilon"])) * scale


@op(
    "onnx.RotaryEmbedding",
    ONNX,
    "x cos sin position_ids?",
    "pairs of x turned by an angle; x is [batch, heads, sequence, size] or [batch, sequence, heads * size]",
    attrs={"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0},
)
def rotary_embedding(inputs, attrs, context):
    x, cos, sin, positions = (*inputs, None)[:4]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    flat = x.ndim == 3
    y = (
        x.reshape(*x.shape[:2], attrs["num_heads"], -1) if flat else x.transpose(0, 2, 1, 3)
    )  # [batch, sequence, heads, size]
    turned = attrs["rotary_embedding_dim"] or y.shape[-1]
    part, rest = y[..., :turned], y[..., turned:]
    first, second = (part[..., 0::2], part[..., 1::2]) if attrs["interleaved"] else np.split(part, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    if attrs["interleaved"]:
        part = np.stack([real, imaginary], axis=-1).reshape(part.shape)
    else:
        part = np.concatenate([real, imaginary], axis=-1)
    y = np.concatenate([part, rest], axis=-1)
    return y.reshape(x.shape) if flat else y.transpose(0, 2, 1, 3)


@op(
    "onnx.Attention",
    ONNX,
    "q k v mask? past_key? past_value? nonpad_kv_seqlen?",
    "attention with grouped heads; operands are [batch, heads, sequence, size] or [batch, sequence, heads * size]",
    attrs={
        "is_causal": 0,
        "kv_num_heads": None,
        "q_num_heads": None,
        "qk_matmul_output_mode": 0,
        "scale": None,
        "softcap": 0.0,
        "softmax_precision": None,
        "left_window_size": -1,
        "right_window_size": -1,
    },
    results=None,
)
def attention(inputs, attrs, context):
    q, k, v, mask, past_key, past_value, nonpad = (*inputs, None, None, None, None)[:7]
    if (
        nonpad is not None
        or attrs["softcap"]
        or attrs["left_window_size"] != -1
        or attrs["right_window_size"] != -1
        or len(context.types) > 3
    ):
        raise UnsupportedError(
            "onnx.Attention with nonpad_kv_seqlen, softcap, a window or the qk_matmul output is not supported"
        )
    flat = q.ndim == 3
    if flat:
        q = q.reshape(*q.shape[:2], attrs["q_num_heads"], -1).transpose(0, 2, 1, 3)
        k, v = (x.reshape(*x.shape[:2], attrs["kv_num_heads"], -1).transpose(0, 2, 1, 3) for x in (k, v))
    before = 0
    if past_key is not None:
        before = past_key.shape[2]
        k, v = np.concatenate([past_key, k], axis=2), np.concatenate([past_value, v], axis=2)
    present_key, present_value = k, v
    queries, keys = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scale = q.dtype.type(attrs["scale"] if attrs["scale"] is not None else q.shape[-1] ** -0.5)
    scores = (q @ k.swapaxes(-1, -2)) * scale
    bias = np.zeros((queries, keys), q.dtype)
    if mask is not None:
        if mask.dtype == np.bool_:
            mask = np.where(mask, q.dtype.type(0), q.dtype.type(-np.inf))
        # A mask that ends before the keys do hides the rest.
        missing = [(0, 0)] * (mask.ndim - 1) + [(0, keys - mask.shape[-1])]
        bias = bias + np.pad(mask, missing, constant_values=-np.inf)
    if attrs["is_causal"]:
        if past_key is None and queries != keys:
            raise UnsupportedError(
                "onnx.Attention: is_causal with fewer queries than keys and no past differs between runtimes"
            )
        ahead = np.arange(keys)[None, :] > np.arange(queries)[:, None] + before
        bias = bias + np.where(ahead, q.dtype.type(-np.inf), q.dtype.type(0))
    scores = scores + bias
    # A query that sees no key gets zeros.
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    e = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = e.sum(axis=-1, keepdims=True)
    y = (e / np.where(total == 0, 1, total)) @ v
    if flat:
        y = y.transpose(0, 2, 1, 3).reshape(y.shape[0], queries, -1)
    return [y, present_key, present_value]

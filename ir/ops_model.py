"""Ops of the stages "model" (batch x sequence, as the model is taught) and "fused" (a ragged batch of tokens, as engines run it).

Shapes are written with B batch, S sequence, P past, T tokens of a ragged batch, R requests, C cache capacity, L chosen rows, H heads, G kv heads (H % G == 0),
D head_dim, V vocabulary. A linear weight is [out, in], as checkpoints store it. Activations keep one dtype through the graph; weights may have another.
"""

from __future__ import annotations

import numpy as np

from ir.errors import GraphError
from ir.optable import op
from ir.types import DTYPES, Dim, Sym, TensorType, bind, dim_divide, dim_product, dim_sum

MODEL, FUSED = "model", "fused"
BOTH = (MODEL, FUSED)


def _need(ok: bool, text: str) -> None:
    if not ok:
        raise GraphError(text)


def _is_float(t: TensorType) -> bool:
    return DTYPES[t.dtype].is_float


# --- shared by both stages ------------------------------------------------------------------------------------------------------------------------


def _infer_embedding(types, attrs):
    ids, table = types
    _need(
        ids.dtype in ("i32", "i64") and table.rank == 2,
        f"embedding takes i32/i64 ids and a 2-D table, not {ids} and {table}",
    )
    return [TensorType(attrs["dtype"] or table.dtype, ids.shape + table.shape[1:])]


@op(
    "embedding",
    BOTH,
    "ids table",
    "rows of table [V, K] by index; dtype converts the rows",
    infer=_infer_embedding,
    attrs={"dtype": ""},
)
def embedding(inputs, attrs, context):
    ids, table = inputs
    if ids.size and (ids.min() < 0 or ids.max() >= table.shape[0]):
        raise GraphError(
            f"embedding: index {int(ids.min()) if ids.min() < 0 else int(ids.max())} is outside 0..{table.shape[0] - 1}"
        )
    return table[ids]


def _infer_linear(types, attrs):
    x, w, bias = (*types, None)[:3]
    _need(
        _is_float(x) and _is_float(w) and w.rank == 2 and x.rank >= 1,
        f"linear takes x [.., in] and w [out, in], not {x} and {w}",
    )
    _need(x.shape[-1] == w.shape[1], f"linear: x has {x.shape[-1]} features, w takes {w.shape[1]}")
    _need(bias is None or bias.shape == (w.shape[0],), f"linear: bias is {bias}, w has {w.shape[0]} rows")
    return [x.with_shape(*x.shape[:-1], w.shape[0])]


@op("linear", BOTH, "x w bias?", "x @ w.T + bias, w [out, in]", infer=_infer_linear)
def linear(inputs, attrs, context):
    x, w, bias = (*inputs, None)[:3]
    y = x @ w.T.astype(x.dtype, copy=False)
    return y if bias is None else y + bias


def _infer_rms_norm(types, attrs):
    x, w = types
    _need(_is_float(x) and w.shape == x.shape[-1:], f"rms_norm: x is {x}, w is {w}")
    return [x]


def rms_normalise(x: np.ndarray, w: np.ndarray, epsilon: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + epsilon) * w over the last axis, in x's own precision (Zhang and Sennrich, 2019)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(epsilon)) * w.astype(x.dtype, copy=False)


@op(
    "rms_norm",
    BOTH,
    "x w",
    "root-mean-square norm over the last axis, times w",
    infer=_infer_rms_norm,
    attrs={"epsilon": ...},
)
def rms_norm(inputs, attrs, context):
    return rms_normalise(inputs[0], inputs[1], attrs["epsilon"])


def _infer_unary(types, attrs):
    _need(_is_float(types[0]), f"takes a floating-point tensor, not {types[0]}")
    return [types[0]]


def _infer_binary(types, attrs):
    a, b = types
    _need(a == b, f"operands differ: {a} and {b}")
    return [a]


@op("add", BOTH, "a b", "elementwise sum of equal shapes", infer=_infer_binary)
def add(inputs, attrs, context):
    return inputs[0] + inputs[1]


@op("mul", BOTH, "a b", "elementwise product of equal shapes", infer=_infer_binary)
def mul(inputs, attrs, context):
    return inputs[0] * inputs[1]


def silu_of(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), without overflow for large negative x."""
    e = np.exp(-np.abs(x))
    return x * np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype, copy=False)


@op("silu", BOTH, "x", "x * sigmoid(x)", infer=_infer_unary)
def silu(inputs, attrs, context):
    return silu_of(inputs[0])


@op("scale", BOTH, "x", "x times a constant", infer=_infer_unary, attrs={"value": ...})
def scale(inputs, attrs, context):
    return inputs[0] * inputs[0].dtype.type(attrs["value"])


def _infer_reshape(types, attrs):
    shape = tuple(attrs["shape"])
    _need(
        dim_product(types[0].shape) == dim_product(shape),
        f"reshape of {types[0]} to [{', '.join(map(str, shape))}] changes the number of elements",
    )
    return [types[0].with_shape(*shape)]


@op(
    "reshape",
    BOTH,
    "x",
    "the same elements in row-major order under another shape",
    infer=_infer_reshape,
    attrs={"shape": ...},
)
def reshape(inputs, attrs, context):
    return inputs[0].reshape(context.types[0].shape)


def _infer_split(types, attrs):
    x, axis, sizes = types[0], attrs["axis"], attrs["sizes"]
    _need(
        0 <= axis < x.rank and x.shape[axis] == dim_sum(sizes),
        f"split of {x} on axis {axis} into {list(sizes)}: the sizes do not add up",
    )
    return [x.with_shape(*x.shape[:axis], s, *x.shape[axis + 1 :]) for s in sizes]


@op(
    "split",
    BOTH,
    "x",
    "consecutive slices of one axis",
    infer=_infer_split,
    attrs={"axis": ..., "sizes": ...},
    results=None,
)
def split(inputs, attrs, context):
    sizes = [bind(s, context.symbols) for s in attrs["sizes"]]
    return np.split(inputs[0], np.cumsum(sizes)[:-1], axis=attrs["axis"])


# --- rope -----------------------------------------------------------------------------------------------------------------------------------------


def rotate(
    x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray, attention_factor: float, interleaved: bool
) -> np.ndarray:
    """Rotary embedding of x [..., heads, D] at positions [...] (Su et al., 2021; half-split pairs unless interleaved).

    Outside float64, angles are float32 products of position and float32 frequency, as in Hugging Face's models: at position 40000 a table computed
    in double differs from theirs by 2e-3, and the checkpoint was trained with theirs.
    """
    precision = np.float64 if x.dtype == np.float64 else np.float32
    angles = positions[..., None].astype(precision) * inv_freq.astype(precision)
    cos = (np.cos(angles) * precision(attention_factor))[..., None, :].astype(x.dtype)
    sin = (np.sin(angles) * precision(attention_factor))[..., None, :].astype(x.dtype)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    first, second = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        return np.stack([first, second], axis=-1).reshape(x.shape)
    return np.concatenate([first, second], axis=-1)


ROPE_ATTRS = {"attention_factor": 1.0, "interleaved": False}


def _check_rope(x: TensorType, positions: TensorType, inv_freq: TensorType) -> None:
    _need(x.rank >= 2 and _is_float(x), f"rope takes x [.., heads, head_dim], not {x}")
    _need(
        positions.shape == x.shape[:-2] and positions.dtype in ("i32", "i64"),
        f"rope: positions are {positions}, x is {x}",
    )
    d = x.shape[-1]
    _need(
        isinstance(d, int) and inv_freq.shape == (d // 2,) and d % 2 == 0,
        f"rope: head_dim is {d}, inv_freq is {inv_freq}",
    )


def _infer_rope(types, attrs):
    _check_rope(*types)
    return [types[0]]


@op(
    "rope",
    BOTH,
    "x positions inv_freq",
    "rotary position embedding of x [.., heads, D]",
    infer=_infer_rope,
    attrs=ROPE_ATTRS,
)
def rope(inputs, attrs, context):
    x, positions, inv_freq = inputs
    return rotate(x, positions, inv_freq, attrs["attention_factor"], attrs["interleaved"])


def _infer_norm_rope(types, attrs):
    x, w, positions, inv_freq = types
    _infer_rms_norm([x, w], attrs)
    _check_rope(x, positions, inv_freq)
    return [x]


@op(
    "norm_rope",
    FUSED,
    "x w positions inv_freq",
    "per-head rms_norm, then rope",
    infer=_infer_norm_rope,
    attrs={"epsilon": ..., **ROPE_ATTRS},
)
def norm_rope(inputs, attrs, context):
    x, w, positions, inv_freq = inputs
    return rotate(
        rms_normalise(x, w, attrs["epsilon"]), positions, inv_freq, attrs["attention_factor"], attrs["interleaved"]
    )


# --- attention ------------------------------------------------------------------------------------------------------------------------------------


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale_: float, visible: np.ndarray) -> np.ndarray:
    """softmax(scale * q k^T, masked) v for q [H, S, D], k and v [G, N, D], visible [S, N] (bool); query head h reads kv head h // (H/G)."""
    heads, groups = q.shape[0], k.shape[0]
    q = q.reshape(groups, heads // groups, *q.shape[1:])
    scores = np.einsum("gisd,gnd->gisn", q, k) * q.dtype.type(scale_)
    scores = np.where(visible, scores, -np.inf)
    peak = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)  # a row that sees nothing (padding) gives zeros
    return np.einsum("gisn,gnd->gisd", weights, v).reshape(heads, q.shape[2], v.shape[-1])


def _infer_attention(types, attrs):
    q, k, v, past_k, past_v, mask = (*types, None, None, None)[:6]
    _need(
        q.rank == 4 and k.rank == 4 and k == v,
        f"attention takes q [B, S, H, D], k and v [B, S, G, D], not {q}, {k}, {v}",
    )
    batch, seq, heads, dim = q.shape
    groups = k.shape[2]
    _need(k.shape == (batch, seq, groups, dim), f"attention: q is {q}, k is {k}")
    _need(
        isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0,
        f"attention: {heads} heads are not a multiple of {groups} kv heads",
    )
    _need((past_k is None) == (past_v is None), "attention: past_k and past_v come together")
    if past_k is None:
        total: Dim = seq
    else:
        _need(past_k == past_v and past_k.rank == 4, f"attention: past_k is {past_k}, past_v is {past_v}")
        _need(
            past_k.shape[:2] == (batch, groups) and past_k.shape[3] == dim, f"attention: past_k is {past_k}, k is {k}"
        )
        total = attrs["total"]
        _need(isinstance(total, Sym), "attention with a past names the total length: attribute total")
    if mask is not None:
        _need(mask.shape == (batch, total), f"attention: mask is {mask}, expected [{batch}, {total}]")
    present = k.with_shape(batch, groups, total, dim)
    return [q.with_shape(*q.shape[:3], v.shape[3]), present, present]


@op(
    "attention",
    MODEL,
    "q k v past_k? past_v? mask?",
    "causal grouped-query attention of q [B, S, H, D] over past [B, G, P, D] and k, v [B, S, G, D]; mask [B, P+S] hides keys where 0; "
    "also returns the present keys and values [B, G, P+S, D]",
    infer=_infer_attention,
    attrs={"scale": ..., "total": None},
    results=3,
)
def attention(inputs, attrs, context):
    q, k, v, past_k, past_v, mask = (*inputs, None, None, None)[:6]
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if past_k is not None:
        keys, values = np.concatenate([past_k, keys], axis=2), np.concatenate([past_v, values], axis=2)
    seq, total = q.shape[1], keys.shape[2]
    causal = np.arange(total)[None, :] <= np.arange(seq)[:, None] + (total - seq)
    outputs = np.empty(q.shape[:3] + (v.shape[3],), q.dtype)
    for b in range(q.shape[0]):
        visible = causal if mask is None else causal & (mask[b] != 0)[None, :]
        outputs[b] = attend(q[b].transpose(1, 0, 2), keys[b], values[b], attrs["scale"], visible).transpose(1, 0, 2)
    return outputs, keys, values


def _infer_cached(types, attrs):
    q, k, v, k_cache, v_cache, lens, starts = types
    _need(
        q.rank == 3 and k.rank == 3 and k == v,
        f"attention_cached takes q [T, H, D], k and v [T, G, D], not {q}, {k}, {v}",
    )
    tokens, heads, dim = q.shape
    groups = k.shape[1]
    _need(k.shape == (tokens, groups, dim), f"attention_cached: q is {q}, k is {k}")
    _need(
        isinstance(dim_divide(heads, groups), int),
        f"attention_cached: {heads} heads, {groups} kv heads",
    )
    _need(k_cache == v_cache and k_cache.rank == 4, f"attention_cached: caches are {k_cache} and {v_cache}")
    requests = k_cache.shape[0]
    _need(k_cache.shape[1] == groups and k_cache.shape[3] == dim, f"attention_cached: cache is {k_cache}, k is {k}")
    _need(
        lens.shape == starts.shape == (requests,),
        f"attention_cached: lens are {lens}, starts are {starts}, cache is {k_cache}",
    )
    return [q, k_cache, v_cache]


@op(
    "attention_cached",
    FUSED,
    "q k v k_cache v_cache lens starts",
    "ragged batch: request r has lens[r] of the T tokens, at positions starts[r].. of its cache [G, C, D]; writes k, v there and attends causally",
    infer=_infer_cached,
    attrs={"scale": ...},
    results=3,
)
def attention_cached(inputs, attrs, context):
    q, k, v, k_cache, v_cache, lens, starts = inputs
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    out = np.zeros_like(q)
    row = 0
    for r, (n, start) in enumerate(zip(lens.tolist(), starts.tolist())):
        here, there = slice(row, row + n), slice(start, start + n)
        _need(
            start >= 0 and start + n <= k_cache.shape[2],
            f"attention_cached: request {r} ends at {start + n}, its cache holds {k_cache.shape[2]}",
        )
        k_cache[r, :, there] = k[here].transpose(1, 0, 2)
        v_cache[r, :, there] = v[here].transpose(1, 0, 2)
        visible = np.arange(start + n)[None, :] <= np.arange(n)[:, None] + start
        one = attend(
            q[here].transpose(1, 0, 2),
            k_cache[r, :, : start + n].astype(q.dtype),
            v_cache[r, :, : start + n].astype(q.dtype),
            attrs["scale"],
            visible,
        )
        out[here] = one.transpose(1, 0, 2)
        row += n
    return out, k_cache, v_cache


# --- fused ----------------------------------------------------------------------------------------------------------------------------------------


@op("swiglu", FUSED, "up gate", "up * silu(gate) (Shazeer, 2020)", infer=_infer_binary)
def swiglu(inputs, attrs, context):
    up, gate = inputs
    return up * silu_of(gate)


def _infer_add_rms_norm(types, attrs):
    a, b, w = types
    _infer_binary([a, b], attrs)
    _infer_rms_norm([a, w], attrs)
    return [a, a]


@op(
    "add_rms_norm",
    FUSED,
    "a b w",
    "(rms_norm(a + b) * w, a + b): the residual sum and its norm",
    infer=_infer_add_rms_norm,
    attrs={"epsilon": ...},
    results=2,
)
def add_rms_norm(inputs, attrs, context):
    a, b, w = inputs
    total = a + b
    return rms_normalise(total, w, attrs["epsilon"]), total


def _infer_gather_rows(types, attrs):
    x, rows = types
    _need(
        x.rank == 2 and rows.rank == 1 and rows.dtype in ("i32", "i64"),
        f"gather_rows takes x [T, K] and rows [L], not {x} and {rows}",
    )
    return [x.with_shape(rows.shape[0], x.shape[1])]


@op("gather_rows", FUSED, "x rows", "the chosen rows of x [T, K]: [L, K]", infer=_infer_gather_rows)
def gather_rows(inputs, attrs, context):
    return inputs[0][inputs[1]]


# --- many devices ---------------------------------------------------------------------------------------------------------------------------------
# Every device runs the same graph on its part of the weights; these two are where they meet.


@op("all_reduce", FUSED, "x", "the sum of all devices' x", infer=_infer_unary)
def all_reduce(inputs, attrs, context):
    return inputs[0] if context.communicator is None else context.communicator.all_reduce(inputs[0])


def _infer_all_gather(types, attrs):
    x = types[0]
    _need(x.rank >= 1, f"all_gather takes a tensor with axes, not {x}")
    part, size = x.shape[-1], attrs["size"]
    _need(
        not isinstance(part, int) or size % part == 0, f"all_gather of {x}: {size} elements are no multiple of {part}"
    )
    return [x.with_shape(*x.shape[:-1], size)]


@op(
    "all_gather",
    FUSED,
    "x",
    "all devices' x side by side on the last axis, which then has size elements",
    infer=_infer_all_gather,
    attrs={"size": ...},
)
def all_gather(inputs, attrs, context):
    return inputs[0] if context.communicator is None else context.communicator.all_gather(inputs[0])

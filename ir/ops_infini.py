"""Ops of the stage "infini".

``infini.*`` is one InfiniCore call (or, where the name says so, one fixed group of calls); ``view.*`` renames memory and costs nothing; ``setup.*`` runs once, when
the engine is created; ``loop.*`` runs a body graph. Calls are functional here: a call that writes into a cache returns the cache. Which results share
memory with which operands is the memory plan's business, bounded by ``IN_PLACE``.

Symbols: T tokens and R requests of a step, L rows of logits; within one request's body: len tokens, total = position + len, cap the cache's capacity.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.errors import GraphError
from ir.ops_model import (
    _infer_add_rms_norm,
    _infer_all_gather,
    _infer_binary,
    _infer_embedding,
    _infer_gather_rows,
    _infer_rms_norm,
    _infer_unary,
    all_gather,
    all_reduce,
    attend,
    rms_normalise,
    rotate,
    silu_of,
)
from ir.optable import op, with_defaults
from ir.types import DTYPES, Dim, TensorType, bind, dim_bind, sym

INFINI = "infini"

# result -> the operand whose memory it may take (same layout), per call. InfiniCore documents or tests these.
IN_PLACE: dict[str, dict[int, int]] = {
    "infini.rope": {0: 0},
    "infini.causal_softmax": {0: 0},
    "infini.add": {0: 0},
    "infini.add_rms_norm": {1: 0},  # residual_out over a; y must not share with residual_out
    "infini.silu": {0: 0},
    "infini.mul": {0: 0},
    "infini.paged_caching": {0: 0, 1: 1},
    "infini.rearrange_into": {0: 0},
    "infini.all_reduce": {0: 0},
}
# results that MUST take the operand's memory: the call writes a part of it
WRITES_INTO: dict[str, dict[int, int]] = {"infini.paged_caching": {0: 0, 1: 1}, "infini.rearrange_into": {0: 0}}


def _need(ok: bool, text: str) -> None:
    if not ok:
        raise GraphError(text)


# --- setup ----------------------------------------------------------------------------------------------------------------------------------------


def _infer_rope_table(types, attrs):
    table = TensorType(attrs["dtype"], (attrs["positions"], types[0].shape[0]))
    return [table, table]


@op(
    "setup.rope_table",
    INFINI,
    "inv_freq",
    "sin and cos of position * inv_freq, [positions, D/2], made when the engine is created",
    infer=_infer_rope_table,
    attrs={"positions": ..., "dtype": ..., "attention_factor": 1.0},
    results=2,
)
def rope_table(inputs, attrs, context):
    inv_freq = inputs[0]
    angles = np.arange(attrs["positions"], dtype=inv_freq.dtype)[:, None] * inv_freq
    factor = inv_freq.dtype.type(attrs["attention_factor"])
    return np.sin(angles) * factor, np.cos(angles) * factor


# --- calls ----------------------------------------------------------------------------------------------------------------------------------------


def _lookup_rows(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    _need(not ids.size or (ids.min() >= 0 and ids.max() < table.shape[0]), f"index outside 0..{table.shape[0] - 1}")
    return table[ids]


@op(
    "infini.embedding",
    INFINI,
    "ids table",
    "rows of a contiguous table by index",
    infer=_infer_embedding,
    attrs={"dtype": ""},
)
def embedding(inputs, attrs, context):
    return _lookup_rows(*inputs)


@op(
    "infini.copy_rows",
    INFINI,
    "ids table",
    "the same with one device copy per row: for InfiniCore without embedding",
    infer=_infer_embedding,
    attrs={"dtype": ""},
)
def copy_rows(inputs, attrs, context):
    return _lookup_rows(*inputs)


@op(
    "infini.gather_rows",
    INFINI,
    "x rows",
    "chosen rows of the activations, by the embedding op",
    infer=_infer_gather_rows,
)
def gather_rows(inputs, attrs, context):
    return _lookup_rows(inputs[1], inputs[0])


@op(
    "infini.copy_chosen_rows",
    INFINI,
    "x rows",
    "chosen rows of the activations, one device copy each",
    infer=_infer_gather_rows,
)
def copy_chosen_rows(inputs, attrs, context):
    return _lookup_rows(inputs[1], inputs[0])


@op(
    "infini.rms_norm",
    INFINI,
    "x w",
    "rms_norm over the last axis, 2-D or 3-D",
    infer=_infer_rms_norm,
    attrs={"epsilon": ...},
)
def rms_norm(inputs, attrs, context):
    return rms_normalise(inputs[0], inputs[1], attrs["epsilon"])


@op(
    "infini.add_rms_norm",
    INFINI,
    "a b w",
    "(norm of a + b, a + b)",
    infer=_infer_add_rms_norm,
    attrs={"epsilon": ...},
    results=2,
)
def add_rms_norm(inputs, attrs, context):
    total = inputs[0] + inputs[1]
    return rms_normalise(total, inputs[2], attrs["epsilon"]), total


@op("infini.add", INFINI, "a b", "elementwise sum", infer=_infer_binary)
def add(inputs, attrs, context):
    return inputs[0] + inputs[1]


@op("infini.mul", INFINI, "a b", "elementwise product", infer=_infer_binary)
def mul(inputs, attrs, context):
    return inputs[0] * inputs[1]


@op("infini.silu", INFINI, "x", "x * sigmoid(x)", infer=_infer_unary)
def silu(inputs, attrs, context):
    return silu_of(inputs[0])


@op("infini.swiglu", INFINI, "up gate", "up * silu(gate), 2-D or 3-D", infer=_infer_binary)
def swiglu(inputs, attrs, context):
    return inputs[0] * silu_of(inputs[1])


def _infer_gemm(types, attrs):
    a, b = types
    _need(a.rank == b.rank and a.rank in (2, 3), f"gemm takes two 2-D or two 3-D operands, not {a} and {b}")
    _need(a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2], f"gemm: {a} times {b}")
    return [a.with_shape(*a.shape[:-1], b.shape[-1])]


@op(
    "infini.gemm",
    INFINI,
    "a b",
    "alpha * a @ b; alpha is scale (a Meta field) times the attribute; each: one call per matrix; pitch: elements from row to row of the result, if not dense",
    infer=_infer_gemm,
    attrs={"alpha": 1.0, "scale": "", "each": False, "pitch": None},
)
def gemm(inputs, attrs, context):
    a, b = inputs
    return (a @ b.astype(a.dtype, copy=False)) * a.dtype.type(attrs["alpha"])


def _infer_rope(types, attrs):
    x, positions, sin, cos = types
    _need(
        x.rank == 3 and positions.shape == x.shape[:1],
        f"infini.rope takes x [T, heads, D] and positions [T], not {x} and {positions}",
    )
    half = x.shape[2] // 2 if isinstance(x.shape[2], int) else None
    _need(
        sin == cos and sin.rank == 2 and sin.shape[1] == half and sin.dtype == x.dtype,
        f"infini.rope: x is {x}, tables are {sin} and {cos}",
    )
    return [x]


@op(
    "infini.rope",
    INFINI,
    "x positions sin cos",
    "rotary embedding from tables",
    infer=_infer_rope,
    attrs={"interleaved": False},
)
def rope(inputs, attrs, context):
    x, positions, sin, cos = inputs
    d = x.shape[-1] // 2
    s, c = sin[positions][:, None, :], cos[positions][:, None, :]
    if attrs["interleaved"]:
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * c - b * s, b * c + a * s], axis=-1).reshape(x.shape)
    a, b = x[..., :d], x[..., d:]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def _infer_causal_softmax(types, attrs):
    _need(types[0].rank in (2, 3), f"causal_softmax takes 2-D or 3-D scores, not {types[0]}")
    return [types[0]]


@op(
    "infini.causal_softmax",
    INFINI,
    "x",
    "softmax over the last axis, the mask aligned lower-right",
    infer=_infer_causal_softmax,
)
def causal_softmax(inputs, attrs, context):
    x = inputs[0]
    rows, cols = x.shape[-2:]
    visible = np.arange(cols)[None, :] <= np.arange(rows)[:, None] + (cols - rows)
    x = np.where(visible, x, -np.inf)
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _infer_same(types, attrs):
    return [types[0]]


@op("infini.rearrange", INFINI, "x", "a contiguous copy of a strided view", infer=_infer_same)
def rearrange(inputs, attrs, context):
    return np.ascontiguousarray(inputs[0])


def _infer_into(types, attrs):
    into, x = types
    _need(into.rank == x.rank and into.dtype == x.dtype, f"rearrange_into: {x} into {into}")
    return [into]


@op(
    "infini.rearrange_into",
    INFINI,
    "into x",
    "a copy of x into the slice of another tensor from start of axis",
    infer=_infer_into,
    attrs={"axis": ..., "start": ...},
)
def rearrange_into(inputs, attrs, context):
    into, x = inputs
    start = bind(attrs["start"], context.symbols)
    index = [slice(None)] * into.ndim
    index[attrs["axis"]] = slice(start, start + x.shape[attrs["axis"]])
    into = into.copy()
    into[tuple(index)] = x
    return into


# --- paged caches: [blocks, G, block, D] ------------------------------------------------------------------------------------------------------------


def _infer_paged_caching(types, attrs):
    k_cache, v_cache, k, v, slots = types
    _need(
        k_cache == v_cache and k_cache.rank == 4 and k == v, f"paged_caching: caches {k_cache}, {v_cache}, k {k}, v {v}"
    )
    _need(slots.dtype in ("i32", "i64") and slots.shape == k.shape[:1], f"paged_caching: slots are {slots}, k is {k}")
    return [k_cache, v_cache]


@op(
    "infini.paged_caching",
    INFINI,
    "k_cache v_cache k v slots",
    "k and v [T, G, D] into their slots; a negative slot is skipped",
    infer=_infer_paged_caching,
    results=2,
)
def paged_caching(inputs, attrs, context):
    k_cache, v_cache, k, v, slots = inputs
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    block = k_cache.shape[2]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot // block, :, slot % block] = k[row]
            v_cache[slot // block, :, slot % block] = v[row]
    return k_cache, v_cache


def _infer_paged_attention(types, attrs):
    q, k_cache, v_cache, tables, seq_lens, cu_lens = types
    _need(
        q.rank == 3 and k_cache == v_cache and q.dtype == k_cache.dtype,
        f"paged_attention: q {q}, caches {k_cache}, {v_cache}",
    )
    _need(
        tables.dtype == seq_lens.dtype == cu_lens.dtype,
        f"paged_attention: index dtypes {tables.dtype}, {seq_lens.dtype}, {cu_lens.dtype}",
    )
    _need(tables.shape[:1] == seq_lens.shape, f"paged_attention: tables {tables}, lengths {seq_lens}")
    return [q]


@op(
    "infini.paged_attention_ragged",
    INFINI,
    "q k_cache v_cache block_tables seq_lens cu_lens",
    "paged_attention on the leading requests of one token, paged_attention_prefill on the rest; either part may be empty",
    infer=_infer_paged_attention,
    attrs={"scale": ...},
)
def paged_attention_ragged(inputs, attrs, context):
    q, k_cache, v_cache, tables, seq_lens, cu_lens = inputs
    out = np.zeros_like(q)
    block = k_cache.shape[2]
    for r, total in enumerate(seq_lens.tolist()):
        lo, hi = int(cu_lens[r]), int(cu_lens[r + 1])
        blocks = tables[r, : -(-total // block)]
        k = (
            k_cache[blocks]
            .transpose(1, 0, 2, 3)
            .reshape(k_cache.shape[1], -1, k_cache.shape[3])[:, :total]
            .astype(q.dtype)
        )
        v = (
            v_cache[blocks]
            .transpose(1, 0, 2, 3)
            .reshape(v_cache.shape[1], -1, v_cache.shape[3])[:, :total]
            .astype(q.dtype)
        )
        visible = np.arange(total)[None, :] <= np.arange(hi - lo)[:, None] + (total - (hi - lo))
        out[lo:hi] = attend(q[lo:hi].transpose(1, 0, 2), k, v, attrs["scale"], visible).transpose(1, 0, 2)
    return out


# --- many devices ---------------------------------------------------------------------------------------------------------------------------------

op("infini.all_reduce", INFINI, "x", "the sum of all devices' x, a call of infiniccl", infer=_infer_unary)(all_reduce)
op(
    "infini.all_gather",
    INFINI,
    "x",
    "all devices' x side by side on the last axis, which then has size elements; infiniccl's call does it for one row",
    infer=_infer_all_gather,
    attrs={"size": ...},
)(all_gather)


# --- loops ----------------------------------------------------------------------------------------------------------------------------------------


def _infer_requests(types, attrs):
    return [types[0], *([t for t in types[3:5]])]


@op(
    "loop.requests",
    INFINI,
    "q k v k_cache v_cache lens starts",
    "attention one request at a time on contiguous caches [R, G, C, D]: prefill is the body for len tokens, decode for one",
    infer=_infer_requests,
    attrs={"prefill": ..., "decode": ...},
    results=3,
)
def loop_requests(inputs, attrs, context):
    from ir.interp import run  # the interpreter imports the table

    q, k, v, k_cache, v_cache, lens, starts = inputs
    out, k_cache, v_cache = np.zeros_like(q), k_cache.copy(), v_cache.copy()
    row = 0
    for r, (n, start) in enumerate(zip(lens.tolist(), starts.tolist())):
        here = slice(row, row + n)
        body = attrs["decode"] if n == 1 else attrs["prefill"]
        values = [q[here], k[here], v[here], k_cache[r], v_cache[r]]
        symbols = {**context.symbols, "len": n, "pos": start, "total": start + n, "cap": k_cache.shape[2]}
        feeds = {i.name: a for i, a in zip(body.inputs, values)}
        results = run(body, feeds, symbols=symbols, float64=context.float64, communicator=context.communicator)
        out[here], k_cache[r], v_cache[r] = (results[o] for o in body.outputs)
        row += n
    return out, k_cache, v_cache


def _infer_layers(types, attrs):
    body, count, carried, per_layer, collected = (
        attrs[k] for k in ("body", "count", "carried", "per_layer", "collected")
    )
    _need(
        len(types) == carried + per_layer * count + len(body.inputs) - carried - per_layer,
        "loop.layers: operands do not fit the body's inputs",
    )
    return [body.type(o) for o in body.outputs[:carried]] + [
        body.type(o) for o in body.outputs[carried:] for _ in range(count)
    ]


@op(
    "loop.layers",
    INFINI,
    "operands*",
    "count runs of body; operands: values carried from run to run, then one list of count values per per-layer input, then invariants; "
    "results: the carried values, then one list of count values per collected result",
    infer=_infer_layers,
    attrs={"body": ..., "count": ..., "carried": ..., "per_layer": ..., "collected": ...},
    results=None,
)
def loop_layers(inputs, attrs, context):
    from ir.interp import run

    body, count, carried, per_layer = attrs["body"], attrs["count"], attrs["carried"], attrs["per_layer"]
    state = list(inputs[:carried])
    lists = [inputs[carried + i * count : carried + (i + 1) * count] for i in range(per_layer)]
    invariant = list(inputs[carried + per_layer * count :])
    collected: list[list[np.ndarray]] = [[] for _ in body.outputs[carried:]]
    for i in range(count):
        feeds = dict(zip((v.name for v in body.inputs), state + [item[i] for item in lists] + invariant))
        results = run(body, feeds, symbols=context.symbols, float64=context.float64, communicator=context.communicator)
        state = [results[o] for o in body.outputs[:carried]]
        for items, name in zip(collected, body.outputs[carried:]):
            items.append(results[name])
    return state + [a for items in collected for a in items]


def scratch_dims(type_: TensorType, full: Mapping[str, int] | None = None) -> tuple[int, Dim]:
    """A tensor's size as (static number of bytes) x (product of symbols, or 1); ``full`` has values of symbols that count as static."""
    coef = DTYPES[type_.dtype].bytes
    names: list[str] = []
    for d in (dim_bind(d, full or {}) for d in type_.shape):
        if isinstance(d, int):
            coef *= d
        else:
            coef *= d.coef
            names += d.names
    unit: Dim = 1
    for n in sorted(names):
        unit = unit * sym(n)
    return coef, unit


__all__ = ["IN_PLACE", "WRITES_INTO", "rotate", "scratch_dims", "with_defaults"]

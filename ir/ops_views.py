"""Ops of the stage "infini" that rename memory and cost nothing."""

from __future__ import annotations

import numpy as np

from ir.errors import GraphError
from ir.ops_model import _infer_reshape, reshape
from ir.optable import op
from ir.types import bind, dim_sum

INFINI = "infini"


def _need(ok: bool, text: str) -> None:
    if not ok:
        raise GraphError(text)


def _infer_slice(types, attrs):
    x, axis = types[0], attrs["axis"]
    _need(0 <= axis < x.rank, f"view.slice: {x} has no axis {axis}")
    return [x.with_shape(*x.shape[:axis], attrs["size"], *x.shape[axis + 1 :])]


@op(
    "view.slice",
    INFINI,
    "x",
    "size elements from start of one axis",
    infer=_infer_slice,
    attrs={"axis": ..., "start": ..., "size": ...},
)
def view_slice(inputs, attrs, context):
    start, size = bind(attrs["start"], context.symbols), bind(attrs["size"], context.symbols)
    return np.take(inputs[0], range(start, start + size), axis=attrs["axis"])


op(
    "view.reshape",
    INFINI,
    "x",
    "another shape of the same contiguous elements",
    infer=_infer_reshape,
    attrs={"shape": ...},
)(reshape)


def _infer_permute(types, attrs):
    x, perm = types[0], attrs["perm"]
    _need(sorted(perm) == list(range(x.rank)), f"view.permute of {x} by {list(perm)}")
    return [x.with_shape(*(x.shape[p] for p in perm))]


@op("view.permute", INFINI, "x", "axes in another order", infer=_infer_permute, attrs={"perm": ...})
def view_permute(inputs, attrs, context):
    return inputs[0].transpose(attrs["perm"])


def _infer_join(types, attrs):
    first, axis = types[0], attrs["axis"]
    total = dim_sum(t.shape[axis] for t in types)
    _need(total is not None, f"view.join: the sizes {', '.join(str(t.shape[axis]) for t in types)} have no sum")
    for t in types:
        same = t.shape[:axis] + t.shape[axis + 1 :] == first.shape[:axis] + first.shape[axis + 1 :]
        _need(same and t.dtype == first.dtype, f"view.join: {t} does not fit {first} on axis {axis}")
    return [first.with_shape(*first.shape[:axis], total, *first.shape[axis + 1 :])]


@op(
    "view.join",
    INFINI,
    "parts*",
    "results of calls that are laid side by side, so that one call can read them",
    infer=_infer_join,
    attrs={"axis": ...},
)
def view_join(inputs, attrs, context):
    return np.concatenate(inputs, axis=attrs["axis"])

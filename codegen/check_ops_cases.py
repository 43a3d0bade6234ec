"""What operators are checked on: random data, and values and indices at the edges of what an op may be given.

Every case is legal: no index lies outside its table, nothing overflows in float32, no result is larger than half of its dtype's largest value. (What InfiniCore
does beyond that is not written down anywhere, so there is nothing to compare with.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from codegen.check_ops_calls import OpCall, Tensor
from ir.types import DTYPES

POOL = 1_000_003  # random numbers that larger tensors repeat; prime, so that rows differ
FLOAT32_MAX = float(np.finfo(np.float32).max)
KINDS = ("random", "negative", "zeros", "subnormal", "wide", "large")


@dataclass(frozen=True)
class Case:
    """Contents of the inputs by operand, and of the call's attributes where they are not the operator's own."""

    name: str
    inputs: Mapping[str, np.ndarray]
    attrs: Mapping[str, Any] = field(default_factory=dict)


class Maker:
    """Makes the inputs of one operator's cases.

    Args:
        fixed: contents of operands that stay the same in all cases (large weights); filled by the first case.
    """

    def __init__(self, call: OpCall, seed: int, fixed: set[str]) -> None:
        self.call, self.rng = call, np.random.default_rng(seed)
        self.fixed = fixed
        self._kept: dict[str, np.ndarray] = {}

    def tensor(self, operand: str) -> Tensor:
        """What an operand holds: of a collective, [ndev, ...], every device's own."""
        tensor, ndev = self.call[operand], dict(self.call.attrs).get("ndev")
        return tensor if ndev is None else replace(tensor, shape=(ndev, *tensor.shape))

    def floats(self, operand: str, kind: str = "random", limit: float = math.inf, scale: float = 1.0) -> np.ndarray:
        """Values of a kind for an operand, none larger than ``limit``; ``scale`` is what random ones are multiplied with."""
        tensor = self.tensor(operand)
        if operand in self.fixed:
            if operand not in self._kept:
                self._kept[operand] = _values(self.rng, "random", tensor, limit, scale)
            return self._kept[operand]
        return _values(self.rng, kind, tensor, limit, scale)

    def bits(self, operand: str) -> np.ndarray:
        """Any value but NaN: what is only copied must not change."""
        tensor = self.tensor(operand)
        if operand in self.fixed:
            return self.floats(operand)
        dtype = DTYPES[tensor.dtype].numpy
        count = math.prod(tensor.shape)
        pool = self.rng.integers(0, 256, min(count, POOL) * dtype.itemsize, np.uint8).view(dtype)
        with np.errstate(invalid="ignore"):
            pool[np.isnan(pool)] = -0.0
        return np.resize(pool, tensor.shape)

    def indices(self, operand: str, below: int, which: str) -> np.ndarray:
        """Row numbers: ``random``, or the first and the last row in turn (``ends``), or one row for all (``same``)."""
        tensor = self.call[operand]
        count = math.prod(tensor.shape)
        if which == "ends":
            values = np.resize([below - 1, 0], count)
        elif which == "same":
            values = np.full(count, below // 2)
        else:
            values = self.rng.integers(0, below, count)
        return values.reshape(tensor.shape).astype(DTYPES[tensor.dtype].numpy)


def largest(dtype: str) -> float:
    return float(ml_dtypes.finfo(DTYPES[dtype].numpy).max)


def _values(rng: np.random.Generator, kind: str, tensor: Tensor, limit: float, scale: float) -> np.ndarray:
    dtype = DTYPES[tensor.dtype].numpy
    info = ml_dtypes.finfo(dtype)
    most = min(limit, float(info.max))
    count = min(math.prod(tensor.shape), POOL)
    sign = rng.choice([-1.0, 1.0], count)
    if kind == "zeros":
        values = sign * 0.0
    elif kind == "subnormal":
        values = sign * rng.integers(0, int(float(info.tiny) / float(info.smallest_subnormal)), count)
        values = values * float(info.smallest_subnormal)
    elif kind == "wide":
        low, high = math.log2(float(info.tiny)), math.log2(most)
        values = sign * np.exp2(rng.uniform(low, high, count))
    elif kind == "large":
        values = sign * most * rng.uniform(0.5, 1.0, count)
    else:
        values = rng.standard_normal(count) * scale
        values = -np.abs(values) if kind == "negative" else values
    values = np.clip(values, -most, most)
    rounded = values.astype(dtype)
    # Rounding must not lift a value over the limit.
    over = np.abs(rounded.astype(np.float64)) > most
    if over.any():
        rounded[over] = (values[over] * (1 - float(info.eps))).astype(dtype)
    return np.resize(rounded, tensor.shape)


# --- per op ---------------------------------------------------------------------------------------------------------------------------------------


def _elementwise(limit: Callable[[OpCall], float]) -> Callable[[Maker], Iterator[Case]]:
    """All operands of one kind at a time."""

    def cases(maker: Maker) -> Iterator[Case]:
        most = limit(maker.call)
        for kind in KINDS:
            yield Case(kind, {i: maker.floats(i, kind, most) for i in maker.call.inputs})

    return cases


def _dtype(call: OpCall) -> str:
    return call["o0"].dtype


def _square(call: OpCall) -> float:
    """Squares of a row's elements add up in float32."""
    return min(largest(_dtype(call)) / 4, math.sqrt(FLOAT32_MAX / (8 * call["o0"].shape[-1])))


def _norm(maker: Maker) -> Iterator[Case]:
    *activations, weight = maker.call.inputs
    most = _square(maker.call)
    for kind in KINDS:
        yield Case(
            kind, {**{i: maker.floats(i, kind, most) for i in activations}, weight: maker.floats(weight, "random", 4.0)}
        )
    rows = {i: maker.floats(i, "random") for i in activations}
    yield Case("wide weight", {**rows, weight: maker.floats(weight, "wide", 256.0)})


def _gemm(maker: Maker) -> Iterator[Case]:
    call = maker.call
    inner = call["i0"].shape[-1]
    factor = max(abs(float(dict(call.attrs).get("alpha", 1.0))), 1.0)
    for kind in KINDS:
        right = maker.floats("i1", "random", 4.0)
        if kind in ("wide", "large") and "i1" not in maker.fixed:
            right = maker.floats("i1", "random", 4.0, 1.0 / inner)
        peak = 4.0 if "i1" in maker.fixed else max(float(np.abs(right).max()), 2.0**-20)
        most = min(largest(call["o0"].dtype), FLOAT32_MAX / 4) / (2 * inner * peak * factor)
        yield Case(kind, {"i0": maker.floats("i0", kind, most), "i1": right})
    if "i1" not in maker.fixed:
        yield Case("wide right side", {"i0": maker.floats("i0", "random", 4.0), "i1": maker.floats("i1", "wide", 16.0)})


def _rope(maker: Maker) -> Iterator[Case]:
    call = maker.call
    rows = call["i2"].shape[0]
    sin, cos = _angles(maker)
    for kind in KINDS:
        x = maker.floats("i0", kind, largest(_dtype(call)) / 4)
        yield Case(kind, {"i0": x, "i1": maker.indices("i1", rows, "random"), "i2": sin, "i3": cos})
    for which in ("ends", "same"):
        yield Case(
            f"positions: {which}",
            {"i0": maker.floats("i0"), "i1": maker.indices("i1", rows, which), "i2": sin, "i3": cos},
        )


def _angles(maker: Maker) -> tuple[np.ndarray, np.ndarray]:
    shape, dtype = maker.call["i2"].shape, DTYPES[maker.call["i2"].dtype].numpy
    angles = np.resize(maker.rng.uniform(0, 2 * math.pi, min(math.prod(shape), POOL)), shape)
    return np.sin(angles).astype(dtype), np.cos(angles).astype(dtype)


def _softmax(maker: Maker) -> Iterator[Case]:
    for kind in KINDS:
        yield Case(kind, {"i0": maker.floats("i0", kind, scale=3.0)})
    peaked = maker.floats("i0")
    peaked[..., :1] = 30.0  # what every row sees
    yield Case("one peak", {"i0": peaked})


def _lookup(maker: Maker) -> Iterator[Case]:
    """Rows of a table: i0 and i1 are index and table, or the other way round."""
    index, table = ("i0", "i1") if maker.call["i0"].dtype in ("i32", "i64") else ("i1", "i0")
    rows = maker.call[table].shape[0]
    for which in ("random", "ends", "same"):
        yield Case(f"rows: {which}", {index: maker.indices(index, rows, which), table: maker.bits(table)})


def _copy(maker: Maker) -> Iterator[Case]:
    source = maker.call.inputs[0]
    for kind in ("random", "zeros"):
        yield Case(kind, {source: maker.floats(source, kind)})
    yield Case("any bits", {source: maker.bits(source)})


def _caching(maker: Maker) -> Iterator[Case]:
    call = maker.call
    blocks, _, block, _ = call["o0"].shape
    tokens, index = call["i4"].shape[0], DTYPES[call["i4"].dtype].numpy
    rng = maker.rng

    def case(name: str, slots: np.ndarray) -> Case:
        caches = {"i0": maker.bits("o0"), "i1": maker.bits("o1")}
        return Case(name, {**caches, "i2": maker.bits("i2"), "i3": maker.bits("i3"), "i4": slots.astype(index)})

    anywhere = rng.permutation(blocks * block)[:tokens]
    yield case("slots: any, out of order", anywhere)
    edges = np.concatenate([np.arange(blocks) * block, np.arange(1, blocks + 1) * block - 1])
    inner = np.setdiff1d(np.arange(blocks * block), edges)
    yield case("slots: ends of blocks", np.concatenate([rng.permutation(edges), rng.permutation(inner)])[:tokens])
    yield case("slots: first and last", np.roll(np.arange(blocks * block), 1)[:tokens])
    yield case("slots: some -1", np.where(np.arange(tokens) % 2, anywhere, -1))
    yield case("slots: all -1", np.full(tokens, -1))


def _attention(maker: Maker) -> Iterator[Case]:
    """Both paged attentions: lengths at the edges of blocks, tables out of order, and what lies beyond the lengths."""
    call, rng = maker.call, maker.rng
    block = call["i1"].shape[2]
    requests, columns = call["i3"].shape
    rows = call["i0"].shape[0]
    prefill = "i5" in call.inputs
    new = _split(rng, rows, requests) if prefill else np.ones(requests, np.int64)
    room = columns * block
    totals: dict[str, np.ndarray] = {
        "random": rng.integers(new, room + 1),
        "no history": new,
        "exactly one block": np.maximum(new, np.full(requests, block)),
        "one more than a block": np.maximum(new, np.full(requests, block + 1)),
        "full tables": np.full(requests, room),
    }
    for name, lengths in totals.items():
        yield _attention_case(maker, f"lengths: {name}", new, np.minimum(lengths, room))
    some = np.minimum(np.maximum(new, totals["random"]), room)
    # A pool is not cleared: what no token was written to may hold anything.
    case = _attention_case(maker, "unwritten rows are NaN", new, some)
    yield Case(case.name, {**case.inputs, **_unwritten(call, case)})
    for kind in ("zeros", "negative", "subnormal"):
        yield _attention_case(maker, kind, new, some, kind)
    # Scores stay moderate; the values are as large as they can be.
    yield _attention_case(maker, "large values", new, some, values="large")
    yield _attention_case(maker, "wide values", new, some, values="wide")


def _split(rng: np.random.Generator, rows: int, parts: int) -> np.ndarray:
    """``rows`` as a sum of ``parts`` positive numbers."""
    cuts = np.sort(rng.permutation(rows - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [rows]]))


def _attention_case(
    maker: Maker, name: str, new: np.ndarray, totals: np.ndarray, kind: str = "random", values: str = ""
) -> Case:
    call, rng = maker.call, maker.rng
    blocks, _, block, _ = call["i1"].shape
    requests, columns = call["i3"].shape
    index = DTYPES[call["i3"].dtype].numpy
    order = np.resize(rng.permutation(blocks), requests * columns)  # few blocks are shared, which reading allows
    tables, at = np.zeros((requests, columns), index), 0
    for row, total in zip(tables, totals):
        count = -(-int(total) // block)
        row[:count] = order[at : at + count]
        at += count
    # Weights up to 1 times values are summed in float32 before they are divided by their total.
    most = min(largest(_dtype(call)) / 2, FLOAT32_MAX / (4 * columns * block))
    inputs = {
        "i0": maker.floats("i0", kind),
        "i1": maker.floats("i1", kind),
        "i2": maker.floats("i2", values or kind, most),
        "i3": tables,
        "i4": totals.astype(index),
    }
    if "i5" in call.inputs:
        inputs["i5"] = np.concatenate([[0], np.cumsum(new)]).astype(index)
    return Case(name, inputs)


def _unwritten(call: OpCall, case: Case) -> dict[str, np.ndarray]:
    """The caches with NaN wherever no request has a token."""
    blocks, _, block, _ = call["i1"].shape
    written = np.zeros((blocks, block), bool)
    for row, total in zip(case.inputs["i3"], case.inputs["i4"].tolist()):
        for position in range(total):
            written[row[position // block], position % block] = True
    keep = written[:, None, :, None]
    return {
        o: np.where(keep, case.inputs[o], np.array(np.nan, case.inputs[o].dtype)).astype(case.inputs[o].dtype)
        for o in ("i1", "i2")
    }


def _summands(maker: Maker) -> Iterator[Case]:
    """What devices add up: values of all kinds, and such that a device that is left out, or counted twice, shows."""
    most = largest(_dtype(maker.call)) / (2 * dict(maker.call.attrs)["ndev"])
    for kind in KINDS:
        yield Case(kind, {"i0": maker.floats("i0", kind, most)})
    opposite = maker.floats("i0", "large", most)
    opposite[1] = -opposite[0]
    opposite[2:] = maker.floats("i0")[2:]
    yield Case("large values cancel", {"i0": opposite})
    for which in range(len(opposite)):
        alone = np.zeros_like(opposite)
        alone[which] = maker.floats("i0", "wide", most)[which]
        yield Case(f"only device {which} has any", {"i0": alone})


def _sampling(maker: Maker) -> Iterator[Case]:
    count = maker.call["i0"].shape[0]
    rng, dtype = maker.rng, DTYPES[maker.call["i0"].dtype].numpy

    def scalars(value: float, topp: float, topk: int, temperature: float) -> dict[str, Any]:
        return dict(random_val=value, topp=topp, topk=min(topk, count), temperature=temperature)

    def logits(values: np.ndarray) -> dict[str, np.ndarray]:
        return {"i0": values.astype(dtype)}

    normal = rng.standard_normal(count) * 3
    greedy = (("value 0", 0.0, 0.9, 40, 1.0), ("topk 1", 0.7, 0.9, 1, 1.0), ("topp 0", 0.7, 0.0, 40, 1.0))
    for text, *given in (*greedy, ("temperature 0", 0.7, 0.9, 40, 0.0)):
        yield Case(f"argmax: {text}", logits(normal), scalars(*given))  # type: ignore[arg-type]
    for text, at in (("first", 0), ("last", count - 1)):
        values = np.minimum(normal, 8.0)
        values[at] = 9.0
        yield Case(f"argmax: the {text}", logits(values), scalars(0.5, 0.8, 1, 1.0))
    tied = np.minimum(normal, 8.0)
    tied[rng.permutation(count)[: min(3, count)]] = 9.0
    yield Case("argmax: ties", logits(tied), scalars(0.5, 0.8, 1, 1.0))
    yield Case("argmax: all equal", logits(np.zeros(count)), scalars(0.0, 0.8, 5, 1.0))
    yield Case("argmax: negative", logits(-np.abs(normal) - 1), scalars(0.5, 0.8, 1, 1.0))
    yield Case("argmax: large", {"i0": maker.floats("i0", "large")}, scalars(0.5, 0.8, 1, 1.0))
    # A few likely tokens far above the rest: every draw falls in the middle of one's interval, however the sums are rounded.
    alive = min(6, count)
    places = rng.permutation(count)[:alive]
    values = np.minimum(rng.standard_normal(count), 3.0) - 40.0
    values[places] = -0.5 * np.arange(alive)
    for topp, topk, temperature in ((1.0, count, 1.0), (1.0, 3, 1.0), (0.7, count, 1.0), (0.6, 4, 0.5), (0.9, 50, 2.0)):
        if temperature > 1:
            values[values < -30] = -90.0
        for value in draws(values.astype(dtype).astype(np.float64), topp, min(topk, count), temperature):
            text = f"topp {topp} topk {topk} T {temperature} value {value:.4f}"
            yield Case(f"draw: {text}", logits(values), scalars(value, topp, topk, temperature))
    for value in (1e-9, 0.25, 0.5, 0.75, 0.99999994):
        yield Case(f"draw: any logits, value {value:g}", logits(normal), scalars(value, 0.9, 50, 0.8))


def draws(logits: np.ndarray, topp: float, topk: int, temperature: float) -> list[float]:
    """Random values whose thresholds lie in the middle of the leading tokens' intervals, as far as the limits let them be drawn; and one just below 1."""
    ranked = np.sort(np.exp((logits - logits.max()) / temperature))[::-1]
    sums = np.cumsum(ranked)
    top = min(sums[topk - 1], topp * sums[-1])
    middles = (sums[:4] - ranked[:4] / 2) / top
    return [float(np.float32(m)) for m in middles if m < 0.999] + [0.99999]


CASES: dict[str, Callable[[Maker], Iterator[Case]]] = {
    "infini.gemm": _gemm,
    "infini.rms_norm": _norm,
    "infini.add_rms_norm": _norm,
    "infini.add": _elementwise(lambda call: largest(_dtype(call)) / 4),
    "infini.mul": _elementwise(lambda call: math.sqrt(largest(_dtype(call)) / 2)),
    "infini.silu": _elementwise(lambda call: largest(_dtype(call)) / 2),
    "infini.swiglu": _elementwise(lambda call: math.sqrt(largest(_dtype(call)) / 2)),
    "infini.rope": _rope,
    "infini.causal_softmax": _softmax,
    "infini.rearrange": _copy,
    "infini.rearrange_into": _copy,
    "infini.embedding": _lookup,
    "infini.gather_rows": _lookup,
    "infini.copy_rows": _lookup,
    "infini.copy_chosen_rows": _lookup,
    "infini.paged_caching": _caching,
    "infini.all_reduce": _summands,
    "infini.all_gather": _copy,
    "paged_attention": _attention,
    "paged_attention_prefill": _attention,
    "random_sample": _sampling,
}


def cases_of(call: OpCall, seed: int, fixed: Sequence[str] = ()) -> Iterator[Case]:
    """The cases of an operator, ``random`` first.

    Args:
        fixed: operands whose contents stay the same in all of them.
    """
    return CASES[call.op](Maker(call, seed, set(fixed)))

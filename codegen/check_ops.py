"""Every operator of a build's engine, alone on the device, against its numpy reference.

One operator (op, shapes, strides, dtypes) runs on a few cases (check_ops_cases). It is ``ok`` when every element of every result is within its bound
(check_ops_bounds), when nothing outside of the results changed (their rows' gaps, guards on both sides, the inputs, the workspace's surroundings), and in place
too where the engine calls it in place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from codegen.check_ops_bounds import ALLOWED, STEP, Expected, Rounding, expect, unit_of
from codegen.check_ops_calls import COLLECTIVES, ROW_COPIES, OpCall, Tensor, Use
from codegen.check_ops_cases import Case, cases_of
from codegen.check_ops_device import Device, Operator, Refused, Region, RowCopies, canaries, create
from ir.ops_infini import WRITES_INTO
from runtime.errors import InfiniCoreError
from runtime.structs import STATUS_NAMES

OK, WRONG, REFUSED, MISSING, CRASHED, NOT_RUN = "ok", "WRONG", "REFUSED", "NOT THERE", "CRASHED", "NOT RUN"
LARGE = 32 << 20  # bytes: a larger weight is uploaded once, and has the same contents in all cases
WEIGHTS = {
    "infini.gemm": ("i1",),
    "infini.embedding": ("i1",),
    "infini.copy_rows": ("i1",),
    "infini.rope": ("i2", "i3"),
}
TIMED_SECONDS, TIMED_CALLS = 0.02, 200


@dataclass(frozen=True)
class Worst:
    """The element that uses up most of its bound."""

    case: str
    operand: str
    index: list[int]
    found: float
    expected: float
    error: float
    bound: float

    @property
    def share(self) -> float:
        """Of the bound; 0 for what is exact."""
        if self.error == 0:
            return 0.0
        return self.error / self.bound if self.bound and not math.isnan(self.error) else math.inf


@dataclass
class Result:
    """What was found of one operator.

    Attributes:
        reason: one line for what is not ok: what is wrong, or which status came from where.
        likely: what would explain it.
        failed: names of the cases that are wrong.
        microseconds: per call, launched one after another; None if none succeeded.
    """

    op: str
    function: str
    operands: dict[str, str]
    attrs: dict[str, Any]
    in_place: bool
    values: list[str]
    steps: list[str]
    cases: list[str] = field(default_factory=list)
    status: str = OK
    status_code: int | None = None
    reason: str = ""
    likely: str = ""
    failed: list[str] = field(default_factory=list)
    worst: Worst | None = None
    microseconds: float | None = None
    workspace_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        if self.worst is not None:
            found["worst"]["share"] = self.worst.share
        return found


def result_of(use: Use) -> Result:
    """An operator that was not run yet."""
    call = use.call
    library = "infinirt" if call.op in ROW_COPIES else "infiniccl" if call.op in COLLECTIVES else "infiniop"
    return Result(
        op=call.name,
        function=library + call.spec.name,
        operands={o: str(t) for o, t in call.operands},
        attrs={k: v for k, v in call.attrs if v is not None},
        in_place=bool(call.in_place),
        values=use.values,
        steps=use.steps,
    )


def refuse(result: Result, refusal: Refused) -> None:
    result.status = MISSING if refusal.missing else REFUSED
    result.status_code = None if refusal.missing else refusal.status
    result.reason = str(refusal)


def check(device: Device, use: Use, *, seed: int = 0, clobbers: Sequence[str] = ()) -> Result:
    """Run one operator on its cases.

    Args:
        clobbers: inputs that InfiniCore is known to destroy on this device.

    Where memory cannot be had or the runtime fails, the device may be of no more use: the status is CRASHED.
    """
    result = result_of(use)
    try:
        _check(device, use.call, result, seed, set(clobbers))
    except InfiniCoreError as error:
        if result.status == REFUSED:
            return result  # what it refused is the cause
        result.status, result.status_code, result.reason = CRASHED, error.status, str(error)
    return result


def _check(device: Device, call: OpCall, result: Result, seed: int, clobbers: set[str]) -> None:
    try:
        operator = create(device, call)
    except Refused as refusal:
        refuse(result, refusal)
        return
    result.workspace_bytes = operator.workspace_bytes
    bench = _Bench(device, call, operator, clobbers)
    try:
        first: Case | None = None
        for case in cases_of(call, seed, bench.fixed):
            first = first or case
            result.cases.append(case.name)
            bench.run(case, result)
        bench.finish(result)
        if first is not None:
            result.microseconds = bench.time(first)
    except Refused as refusal:
        refuse(result, refusal)
        result.failed.append(result.cases[-1])
        result.reason += f" (case {result.cases[-1]})"
    bench.free()
    operator.destroy()


class _Bench:
    """The memory of one operator, and its runs."""

    def __init__(self, device: Device, call: OpCall, operator: Operator | RowCopies, clobbers: set[str]) -> None:
        self.device, self.call, self.operator, self.clobbers = device, call, operator, clobbers
        shared = dict(call.in_place)
        self.regions: dict[str, Region] = {}
        for operand, tensor in call.operands:
            self.regions[operand] = Region(device, tensor)
        for output, operand in shared.items():  # the result lies where the operand lay
            self.regions[operand].free()
            self.regions[operand] = self.regions[output]
        self.shared = {i: o for o, i in shared.items()}
        self.fixed = [i for i in WEIGHTS.get(call.op, ()) if self.regions[i].image.nbytes > LARGE]
        self.masks = {o: self.regions[o].mask() for o in call.outputs}
        self.uploaded: set[str] = set()
        self.workspace = Region(device, Tensor("u8", (operator.workspace_bytes,), (1,)))

    def put(self, case: Case, zeros: str = "") -> None:
        """The case's inputs, and results that are not written yet.

        Args:
            zeros: ``o``, ``i`` or both: operands with zeros instead of canaries wherever they hold no input.
        """
        for operand in self.call.inputs:
            if operand in self.uploaded:
                continue
            self.regions[operand].put(case.inputs[operand], zeros="i" in zeros)
            if operand in self.fixed:
                self.uploaded.add(operand)
        into = WRITES_INTO.get(self.call.op, {})
        for operand in self.call.outputs:
            if operand in self.shared.values():
                continue
            before = case.inputs.get(f"i{into.get(int(operand[1:]), '')}")
            self.regions[operand].put(before, zeros="o" in zeros)
        self.workspace.put(None)
        if isinstance(self.operator, RowCopies):
            self.operator.rows = case.inputs[self.operator.index].tolist()

    def arguments(self, case: Case) -> list[Any]:
        pointers = {o: region.pointer for o, region in self.regions.items()}
        attrs = {**dict(self.call.attrs), **case.attrs}
        return self.operator.arguments(pointers, self.workspace.pointer if self.operator.workspace_bytes else 0, attrs)

    def run(self, case: Case, result: Result) -> None:
        self.put(case)
        self.operator.enqueue(self.arguments(case))
        self.device.synchronise()
        expected = expect(self.call, case)
        problems: list[str] = []
        spoilt = False
        for operand in self.call.outputs:
            region = self.regions[operand]
            image = region.get()
            found = region.view(image)
            worst = compare(case.name, operand, found, expected[operand])
            if result.worst is None or worst.share > result.worst.share:
                result.worst = worst
            if worst.share > 1:
                problems.append(describe(worst, found))
                result.likely = result.likely or likely(self.call, case, operand, found)
                spoilt |= math.isnan(worst.found)
            outside = (image != region.image) & ~self.masks[operand]
            if outside.any():
                problems.append(f"{operand}: {spill(region, outside)}")
        problems += self._inputs([i for i in self.call.inputs if i not in self.fixed])
        changed = self.workspace.get() != self.workspace.image
        if (changed & ~self.workspace.mask()).any():
            problems.append("memory beyond the workspace was written")
        if problems:
            if spoilt and not result.likely:
                result.likely = self._reads(case, expected)
            result.status = WRONG
            result.failed.append(case.name)
            result.reason = result.reason or f"{problems[0]} (case {case.name})"

    def _reads(self, case: Case, expected: Mapping[str, Expected]) -> str:
        """Which memory that it must not read spoils the result: canaries are NaN."""
        for zeros, text in (
            ("o", "right if the result's memory holds 0 before: it is read, although nothing in it counts"),
            ("oi", "right if the memory around the inputs holds 0: it reads outside of them"),
        ):
            self.put(case, zeros)
            self.operator.enqueue(self.arguments(case))
            self.device.synchronise()
            found = {o: self.regions[o].view(self.regions[o].get()) for o in self.call.outputs}
            if all(compare("", o, found[o], expected[o]).share <= 1 for o in found):
                return text
        return ""

    def _inputs(self, operands: Sequence[str]) -> list[str]:
        """What was done to inputs that are to stay as they are."""
        problems = []
        for operand in operands:
            if operand in self.shared or operand in self.clobbers:
                continue
            region = self.regions[operand]
            if (region.get() != region.image).any():
                problems.append(f"{operand}: the input was changed")
        return problems

    def finish(self, result: Result) -> None:
        """Large inputs are looked at once."""
        problems = self._inputs(self.fixed)
        if problems:
            result.status, result.reason = WRONG, result.reason or problems[0]
            result.failed.append("all")

    def time(self, case: Case) -> float:
        """Microseconds of a call, of as many as fit into TIMED_SECONDS, without waiting between them."""
        self.put(case)
        arguments = self.arguments(case)
        self.operator.enqueue(arguments)
        self.device.synchronise()
        calls, spent = 1, 0.0
        while True:
            started = time.perf_counter()
            for _ in range(calls):
                self.operator.enqueue(arguments)
            self.device.synchronise()
            spent = time.perf_counter() - started
            if spent >= TIMED_SECONDS / 4 or calls >= TIMED_CALLS:
                return spent / calls * 1e6
            calls = min(TIMED_CALLS, 4 * calls)

    def free(self) -> None:
        for region in {id(r): r for r in [*self.regions.values(), self.workspace]}.values():
            region.free()


# --- verdicts -------------------------------------------------------------------------------------------------------------------------------------


def compare(case: str, operand: str, found: np.ndarray, expected: Expected) -> Worst:
    """The element that is worst."""
    if found.ndim == 0:  # random_sample: the token's own error
        token = int(found)
        known = 0 <= token < expected.values.size
        error = float(expected.values[token]) if known else math.inf
        right = int(np.argmin(expected.values))
        bound = float(expected.bound[0]) if expected.bound is not None else 0.0
        return Worst(case, operand, [], float(token), float(right), error, bound)
    if expected.bound is None:
        wrong = _bits(found) != _bits(expected.values)
        index = np.unravel_index(int(np.argmax(wrong)), found.shape)
        error = math.inf if wrong.any() else 0.0
        return Worst(
            case, operand, [int(i) for i in index], _number(found[index]), _number(expected.values[index]), error, 0.0
        )
    values = found.astype(np.float64)
    if expected.columns is not None:
        values = values[..., expected.columns]
    with np.errstate(all="ignore"):
        error = np.abs(values - expected.values)
        share = np.where(error == 0, 0.0, error / expected.bound)
    share = np.where(np.isnan(share), math.inf, share)
    index = np.unravel_index(int(np.argmax(share)), share.shape)
    where = [int(i) for i in index]
    if expected.columns is not None:
        where[-1] = int(expected.columns[where[-1]])
    return Worst(
        case,
        operand,
        where,
        _number(values[index]),
        _number(expected.values[index]),
        _number(error[index]),
        float(expected.bound[index]),
    )


def spill(region: Region, outside: np.ndarray) -> str:
    """Where bytes of a region were written that are not the result's; ``outside`` says which."""
    first, last = int(np.flatnonzero(outside)[0]), int(np.flatnonzero(outside)[-1])
    end = region.lead + region.tensor.span * region.dtype.itemsize
    if first < region.lead:
        where = f"{region.lead - first} bytes before it"
    elif last >= end:
        where = f"up to {last + 1 - end} bytes after it"
    else:
        where = "between its rows"
    return f"{int(outside.sum())} bytes outside of the result were written, {where}"


def _bits(array: np.ndarray) -> np.ndarray:
    size = array.dtype.itemsize
    return np.ascontiguousarray(array).view(f"u{size}")


def _number(value: Any) -> float:
    return float(value)


def describe(worst: Worst, found: np.ndarray) -> str:
    """One line about a wrong element."""
    where = f"{worst.operand}[{', '.join(map(str, worst.index))}]" if worst.index else worst.operand
    unwritten = _unwritten(found)
    if unwritten:
        return f"{worst.operand}: {unwritten} of {found.size} elements were not written"
    if worst.bound == 0 or not math.isfinite(worst.error):
        return f"{where} is {worst.found:.9g} instead of {worst.expected:.9g}"
    return f"{where} is {worst.found:.9g} instead of {worst.expected:.9g}: off by {worst.error:.3g}, {worst.share:.3g} times the bound"


def _unwritten(found: np.ndarray) -> int:
    pattern = canaries(found.dtype.itemsize).view(f"u{found.dtype.itemsize}")[0] if found.dtype.itemsize > 1 else 0xA5
    return int((_bits(found) == pattern).sum())


# Operands in another order than they were meant, and ways to round: what a wrong result is compared with.
_SWAPS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "infini.swiglu": (("i0", "i1", "up and gate change places"),),
    "infini.rope": (("i2", "i3", "sin and cos change places"),),
    "infini.paged_caching": (("i2", "i3", "k and v change places"),),
    "paged_attention": (("i1", "i2", "keys and values change places"),),
    "paged_attention_prefill": (("i1", "i2", "keys and values change places"),),
}


def likely(call: OpCall, case: Case, operand: str, found: np.ndarray) -> str:
    """What the result would be right for; ``""`` where nothing fits."""
    if _unwritten(found) or found.ndim == 0:
        return ""

    def fits(other_call: OpCall, other: Case, rounding: Rounding = ALLOWED) -> bool:
        return compare("", operand, found, expect(other_call, other, rounding)[operand]).share <= 1

    for a, b, text in _SWAPS.get(call.op, ()):
        swapped = {**case.inputs, a: case.inputs[b], b: case.inputs[a]}
        if fits(call, replace(case, inputs=swapped)):
            return f"right if {text}"
    attrs = dict(call.attrs)
    if "algo" in attrs and fits(replace(call, attrs=tuple({**attrs, "algo": 1 - attrs["algo"]}.items())), case):
        return "right for the other algorithm (which elements are pairs)"
    if call.op == "infini.add_rms_norm":
        other = {"o0": "o1", "o1": "o0"}[operand]
        if compare("", operand, found, expect(call, case)[other]).share <= 1:
            return "right if norm and sum change places"
    dtype = call["o0"].dtype
    if expect(call, case)[operand].bound is None:
        return ""
    unit = unit_of(dtype)
    if fits(call, case, Rounding(unit=2.0)):
        return "right if results are cut off instead of rounded to nearest"
    if dtype == "f32" and fits(call, case, Rounding(product=2.0**-9)):
        return "right if products are taken in TF32"
    if dtype != "f32" and fits(call, case, Rounding(unit=2.0, step=max(2 * unit, STEP))):
        return f"right if sums are kept in {dtype}"
    return ""


def summary(results: Sequence[Result]) -> str:
    """The last line."""
    good = sum(r.status == OK for r in results)
    parts = [f"{good} of {len(results)} operators ok"]
    for status in (WRONG, REFUSED, MISSING, CRASHED, NOT_RUN):
        bad = [r for r in results if r.status == status]
        if bad:
            names = dict.fromkeys(r.op for r in bad)
            parts.append(f"{len(bad)} {status} ({', '.join(names)})")
    return ", ".join(parts)


def status_text(result: Result) -> str:
    """``REFUSED status 12 BAD_TENSOR_STRIDES``."""
    if result.status != REFUSED:
        return result.status
    return f"{REFUSED} status {result.status_code} {STATUS_NAMES.get(result.status_code or 0, '')}".rstrip()

"""The bounds of check-ops: a kernel that rounds as it may is within them, a wrong one is not, and causes are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from codegen.calls import CALLS
from codegen.check_ops import compare, likely
from codegen.check_ops_bounds import REFERENCES, WHY, expect
from codegen.check_ops_calls import COLLECTIVES, ROW_COPIES, OpCall, Tensor, Use
from codegen.check_ops_cases import CASES, Case, cases_of
from codegen.command_check_ops import uses_of
from ir.optable import Context, lookup, results
from ir.types import DTYPES
from runtime.manifest import read_build
from tests.codegen.engines import EXAMPLE, Builder

FORMS: dict[str, dict[str, Any]] = {"paged": {}, "contiguous": {"infinicore": "any"}}
Mutant = Callable[[OpCall, Case], dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def uses(build_engine: Builder) -> Callable[[str, str], list[Use]]:
    """``uses(form, dtype)``: the operators of the example's engine."""

    def found(form: str, dtype: str) -> list[Use]:
        folder = build_engine(EXAMPLE, dtype=dtype, emit_only=True, **FORMS[form])
        return uses_of(read_build(folder), None, 1)[0]

    return found


def kernel(call: OpCall, case: Case) -> dict[str, np.ndarray]:
    """What a plain kernel gives: computed in float32 by the op table, rounded once."""
    inputs = [case.inputs[f"i{n}"] for n in range(6) if f"i{n}" in case.inputs]
    wide = [a.astype(np.float32) if a.dtype.itemsize < 4 and a.dtype.kind in "fV" else a for a in inputs]
    attrs = {**dict(call.attrs), **case.attrs}
    op = "infini.paged_attention_ragged" if call.op.startswith("paged_attention") else call.op
    if op == "infini.rope":
        attrs["interleaved"] = attrs["algo"] == 0
    if op == "paged_attention" or (op.endswith("ragged") and len(wide) == 5):
        wide.append(np.arange(len(wide[4]) + 1))
    if op == "random_sample":
        errors = expect(call, case)["o0"].values
        return {"o0": np.array(int(np.argmin(errors)), np.int64)}
    if op == "infini.rearrange_into":
        return {"o0": inputs[0]}
    if op.endswith("ragged"):
        wide[1:3] = (np.nan_to_num(a, nan=0.0) for a in wide[1:3])
    with np.errstate(all="ignore"):
        found = results(lookup(op).reference(wide, attrs, Context((), {}, False)))
        return {o: np.asarray(a).astype(DTYPES[call[o].dtype].numpy) for o, a in zip(sorted(call.outputs), found)}


def distinct(uses: list[Use]) -> list[OpCall]:
    """One operator of each op, of a step with several requests where there is one."""
    found: dict[str, OpCall] = {}
    for use in uses:
        if use.call.op not in found or "mixed" in use.steps:
            found[use.call.op] = use.call
    return list(found.values())


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("form", list(FORMS))
def test_a_float32_kernel_that_rounds_once_is_within_every_bound(form, dtype, uses):
    for call in distinct(uses(form, dtype)):
        for case in cases_of(call, 1):
            expected = expect(call, case)
            for operand, found in kernel(call, case).items():
                worst = compare(case.name, operand, found, expected[operand])
                assert worst.share <= 1, (call.op, worst)


def test_every_op_has_cases_a_reference_and_a_reason():
    ops = {*CALLS, *ROW_COPIES, *COLLECTIVES} - {"infini.silu_and_mul"}
    assert ops == set(CASES) == set(REFERENCES) == set(WHY)


def swapped(a: str, b: str) -> Mutant:
    return lambda call, case: kernel(call, replace(case, inputs={**case.inputs, a: case.inputs[b], b: case.inputs[a]}))


def with_input(operand: str, change: Callable[[np.ndarray], np.ndarray]) -> Mutant:
    return lambda call, case: kernel(call, replace(case, inputs={**case.inputs, operand: change(case.inputs[operand])}))


def half_sums(call: OpCall, case: Case) -> dict[str, np.ndarray]:
    """A product whose sums are kept in the operands' dtype."""
    a, b = case.inputs["i0"], case.inputs["i1"]
    total = np.zeros(call["o0"].shape, a.dtype)
    with np.errstate(all="ignore"):
        for k in range(a.shape[-1]):
            total = (total + a[..., k : k + 1] * b[..., k : k + 1, :]).astype(a.dtype)
    return {"o0": total}


def unmasked(call: OpCall, case: Case) -> dict[str, np.ndarray]:
    x = case.inputs["i0"].astype(np.float32)
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return {"o0": (p / p.sum(axis=-1, keepdims=True)).astype(case.inputs["i0"].dtype)}


def second_best(call: OpCall, case: Case) -> dict[str, np.ndarray]:
    return {"o0": np.array(int(np.argsort(-case.inputs["i0"].astype(np.float32))[1]))}


MUTANTS: dict[str, tuple[tuple[str, Mutant], ...]] = {
    "infini.gemm": (("sums in the dtype", half_sums), ("columns reversed", with_input("i1", lambda w: w[..., ::-1]))),
    "infini.rms_norm": (
        ("one element too few in the mean", lambda call, case: {"o0": kernel(call, case)["o0"] * np.float32(0.984)}),
        ("weight reversed", with_input("i1", lambda w: w[::-1])),
    ),
    "infini.add_rms_norm": (
        ("the sum is left out", with_input("i1", np.zeros_like)),
        ("results change places", lambda call, case: dict(zip(("o1", "o0"), kernel(call, case).values()))),
    ),
    "infini.swiglu": (("up and gate", swapped("i0", "i1")),),
    "infini.rope": (
        ("sin and cos", swapped("i2", "i3")),
        ("the other pairs", lambda call, case: kernel(replace(call, attrs=(("algo", 0),)), case)),
        ("the next position", with_input("i1", lambda p: np.maximum(p - 1, 0))),
    ),
    "infini.embedding": (("the next row", with_input("i0", lambda i: np.maximum(i - 1, 0))),),
    "infini.paged_caching": (
        ("k and v", swapped("i2", "i3")),
        ("-1 is the first slot", with_input("i4", lambda s: np.maximum(s, 0))),
    ),
    "paged_attention": (
        ("tables ignored", with_input("i3", np.zeros_like)),
        ("one token fewer", with_input("i4", lambda n: np.maximum(n - 1, 1))),
    ),
    "paged_attention_prefill": (
        ("keys and values", swapped("i1", "i2")),
        ("tables in order", with_input("i3", lambda t: np.arange(t.size, dtype=t.dtype).reshape(t.shape) % 4)),
    ),
    "random_sample": (("the second best", second_best),),
}


@pytest.mark.parametrize("op, name, mutant", [(op, name, m) for op, ms in MUTANTS.items() for name, m in ms])
def test_wrong_kernels_exceed_the_bound(op, name, mutant, uses):
    call = next(call for call in distinct(uses("paged", "bf16")) if call.op == op)
    worst = 0.0
    for case in cases_of(call, 1):
        expected = expect(call, case)
        found = mutant(call, case)
        worst = max(worst, *(compare(case.name, o, a, expected[o]).share for o, a in found.items()))
    assert worst > 1.5


def test_a_mask_that_is_ignored(uses):
    call = next(
        c for c in distinct(uses("contiguous", "f32")) if c.op == "infini.causal_softmax" and c["o0"].shape[1] > 1
    )
    case = next(iter(cases_of(call, 1)))
    worst = compare("", "o0", unmasked(call, case)["o0"], expect(call, case)["o0"])
    assert worst.bound == 0 and worst.error > 0


def test_causes_are_named(uses):
    calls = {call.op: call for call in distinct(uses("paged", "f16"))}

    def cause(op: str, mutant: Mutant) -> str:
        case = next(iter(cases_of(calls[op], 1)))
        return likely(calls[op], case, "o0", mutant(calls[op], case)["o0"])

    def cut_off(call: OpCall, case: Case) -> dict[str, np.ndarray]:
        exact = expect(call, case)["o0"].values
        rounded = exact.astype(np.float16)
        away = np.abs(rounded.astype(np.float64)) > np.abs(exact)
        return {"o0": np.where(away, np.nextafter(rounded, np.float16(0)), rounded)}

    assert cause("infini.swiglu", swapped("i0", "i1")) == "right if up and gate change places"
    assert cause("infini.rope", swapped("i2", "i3")) == "right if sin and cos change places"
    assert "other algorithm" in cause("infini.rope", MUTANTS["infini.rope"][1][1])
    assert "norm and sum" in cause("infini.add_rms_norm", MUTANTS["infini.add_rms_norm"][1][1])
    assert "cut off" in cause("infini.gemm", cut_off)
    assert "sums are kept in f16" in cause("infini.gemm", half_sums)
    assert cause("infini.rms_norm", lambda call, case: {"o0": kernel(call, case)["o0"] * np.float16(2)}) == ""


def test_large_products_are_compared_in_some_columns():
    shape = (3, 2048, 4096)
    rows, inner, columns = shape
    operands = (
        ("o0", Tensor("bf16", (rows, columns), (columns, 1))),
        ("i0", Tensor("bf16", (rows, inner), (inner, 1))),
        ("i1", Tensor("bf16", (inner, columns), (1, inner))),
    )
    call = OpCall("infini.gemm", CALLS["infini.gemm"], operands, (("alpha", 1.0), ("beta", 0.0)))
    case = next(iter(cases_of(call, 3)))
    expected = expect(call, case)["o0"]
    assert expected.columns is not None and expected.values.shape == (rows, len(expected.columns))
    assert {0, columns - 1} <= set(expected.columns.tolist())
    found = (case.inputs["i0"].astype(np.float32) @ case.inputs["i1"].astype(np.float32)).astype(
        case.inputs["i0"].dtype
    )
    assert compare("", "o0", found, expected).share <= 1
    found[1, columns - 1] += 100
    worst = compare("", "o0", found, expected)
    assert worst.share > 1 and worst.index == [1, columns - 1]

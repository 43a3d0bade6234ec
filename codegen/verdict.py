"""Whether logits and greedy tokens of two computations of one model are the same, as far as rounding lets them be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from codegen.rounding import Rounding

PASS, AMBIGUOUS, FAIL = "PASS", "AMBIGUOUS", "FAIL"
SHALLOW_LAYERS = 8


@dataclass(frozen=True)
class Step:
    """One position of one prompt.

    Attributes:
        step: 0 for the prompt's last token, then one per greedy token.
        position: of the token whose logits these are.
        relative_l2, max_abs: of engine minus reference logits; NaN where the engine's are not finite.
        engine_token, reference_token: the greedy choices.
        margin: how much higher the reference's logit of its own choice is than that of the engine's; 0 where they agree.
        near_tie: the largest margin that rounding explains.
    """

    step: int
    position: int
    relative_l2: float
    max_abs: float
    engine_token: int
    reference_token: int
    margin: float
    near_tie: float
    verdict: str


@dataclass(frozen=True)
class Bound:
    """The largest relative L2 error of a step's logits that passes, and why it is that; None where rounding makes the reference itself overflow."""

    relative_l2: float | None
    why: str
    rounding: Rounding | None = None


def bound_of(layers: int, rounding: Rounding | None) -> Bound:
    """The bound on the relative L2 error of logits; ``rounding`` is None for f32."""
    if rounding is None:
        if layers <= SHALLOW_LAYERS:
            return Bound(1e-5, f"float32 sums in another order, up to {SHALLOW_LAYERS} layers")
        return Bound(1e-4, f"float32 sums in another order, more than {SHALLOW_LAYERS} layers")
    names = " and ".join(rounding.dtypes)
    if not math.isfinite(rounding.largest):
        return Bound(None, f"the reference itself overflows when it is rounded to {names}", rounding)
    part = "" if rounding.complete else "; not all, for the time that it would take"
    why = f"twice what rounding to {names} does to the reference ({rounding.largest:.2e} at the worst of {rounding.positions} positions{part})"
    return Bound(2 * rounding.largest, why, rounding)


def near_tie(expected: np.ndarray, bound: float) -> float:
    """The largest margin between two logits that errors within the bound can turn over.

    An error of relative size ``bound`` is ``bound * rms(logits)`` on each logit. Of V such errors the largest is about sqrt(2 ln V) times that (the expected
    maximum of V normal variables), and either of the two logits may have it. (The errors that the step really has would not do: whatever is wrong, the
    margin of two tokens that changed places is never more than they are.)

    Args:
        expected: the reference's logits, [V].
    """
    size = expected.size
    rms = float(np.linalg.norm(expected.astype(np.float64))) / math.sqrt(size)
    return 2 * bound * rms * math.sqrt(2 * math.log(max(size, 2)))


def judge(step: int, position: int, found: np.ndarray, expected: np.ndarray, choice: int, bound: Bound) -> Step:
    """Compare one row of logits, [V] each; ``choice`` is the token that the engine itself took."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    finite = bool(np.isfinite(a).all())
    error = (
        float(np.linalg.norm(a - b) / np.linalg.norm(b))
        if finite and b.any()
        else (0.0 if finite and not a.any() else math.nan)
    )
    largest = float(np.abs(a - b).max()) if finite else math.nan
    best = int(b.argmax())
    known = 0 <= choice < b.size
    margin = float(b[best] - b[choice]) if known else math.inf
    limit = 0.0 if bound.relative_l2 is None else near_tie(expected, bound.relative_l2)
    if bound.relative_l2 is None or not error <= bound.relative_l2 or not margin <= limit:
        verdict = FAIL
    else:
        verdict = PASS if choice == best else AMBIGUOUS
    return Step(step, position, error, largest, choice, best, margin, limit, verdict)


def verdict_of(results: Sequence[Sequence[Step]]) -> str:
    """The worst verdict of all steps."""
    found = {step.verdict for steps in results for step in steps}
    return next((v for v in (FAIL, AMBIGUOUS) if v in found), PASS)

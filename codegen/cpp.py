"""Spelling C++: numbers, dimensions, identifiers, literals."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from ir.types import Dim, TensorType

_KEYWORDS = {
    "and",
    "or",
    "not",
    "xor",
    "new",
    "delete",
    "class",
    "template",
    "this",
    "default",
    "register",
    "union",
    "auto",
}


def identifier(name: str) -> str:
    """A value's name as a C++ identifier."""
    text = re.sub(r"\W", "_", name)
    text = re.sub(r"__+", "_", text).strip("_") or "value"
    if text[0].isdigit():
        text = "v" + text
    return text + "_" if text in _KEYWORDS else text


def dim(d: Dim) -> str:
    """A dimension as an expression over variables that have the symbols' names."""
    if isinstance(d, int):
        return str(d)
    return " * ".join(([] if d.coef == 1 else [str(d.coef)]) + list(d.names))


def stride(d: Dim) -> str:
    """A stride; strides are signed in InfiniCore."""
    return str(d) if isinstance(d, int) else f"static_cast<ptrdiff_t>({dim(d)})"


def terms(dims: Iterable[Dim]) -> str:
    """A sum of dimensions, or ``""`` for none."""
    return " + ".join(dim(d) for d in dims)


def float_literal(value: float) -> str:
    """The float32 nearest to ``value``, written so that it reads back exactly."""
    single = np.float32(value)
    if not math.isfinite(single):
        raise ValueError(f"{value} is not a finite float32")
    text = (
        np.format_float_positional(single, unique=True, trim="0")
        if 1e-4 <= abs(single) < 1e7 or single == 0
        else np.format_float_scientific(single, unique=True, trim="0")
    )
    return text + "f"


def type_comment(type_: TensorType) -> str:
    """``[T, 4096]``."""
    return f"[{', '.join(str(d) for d in type_.shape)}]"


def string(text: str) -> str:
    """A C++ string literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


_TRAILING = re.compile(r"^(?P<code>\s*[^\s/].*?)\s+(?P<comment>// [^\"]*)$")


def align_comments(text: str) -> str:
    """Comments behind code on consecutive lines start in one column, as clang-format has them."""
    lines, run = text.split("\n"), []
    for i, line in enumerate([*lines, ""]):
        match = _TRAILING.match(line)
        if match:
            run.append((i, match))
            continue
        column = max((len(m["code"]) for _, m in run), default=0) + 1
        for at, m in run:
            lines[at] = m["code"].ljust(column) + m["comment"]
        run = []
    return "\n".join(lines)

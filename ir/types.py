"""Element types, dimensions and tensor types.

A dimension is an ``int`` or a ``Sym``: a product of a positive integer and named symbols, such as ``seq`` or ``2*seq*total``. Products are all that
lowering needs (reshapes merge and split axes, strides multiply them); sums become symbols of their own.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Union

import ml_dtypes
import numpy as np

from ir.errors import GraphError


@dataclass(frozen=True)
class DType:
    """One row of the table of element types: the same type as each of our neighbours spells it."""

    name: str
    numpy: np.dtype
    onnx: int  # onnx.TensorProto.DataType
    infini: str  # infiniDtype_t without its INFINI_DTYPE_ prefix
    safetensors: str
    is_float: bool = False

    @property
    def bytes(self) -> int:
        return self.numpy.itemsize


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("f64", np.dtype(np.float64), 11, "F64", "F64", True),
        DType("f32", np.dtype(np.float32), 1, "F32", "F32", True),
        DType("f16", np.dtype(np.float16), 10, "F16", "F16", True),
        DType("bf16", np.dtype(ml_dtypes.bfloat16), 16, "BF16", "BF16", True),
        DType("i64", np.dtype(np.int64), 7, "I64", "I64"),
        DType("i32", np.dtype(np.int32), 6, "I32", "I32"),
        DType("i16", np.dtype(np.int16), 5, "I16", "I16"),
        DType("i8", np.dtype(np.int8), 3, "I8", "I8"),
        DType("u8", np.dtype(np.uint8), 2, "U8", "U8"),
        DType("u32", np.dtype(np.uint32), 12, "U32", "U32"),
        DType("bool", np.dtype(np.bool_), 9, "BOOL", "BOOL"),
    )
}
_BY_NUMPY = {d.numpy: d.name for d in DTYPES.values()}
_BY_ONNX = {d.onnx: d.name for d in DTYPES.values()}
_BY_SAFETENSORS = {d.safetensors: d.name for d in DTYPES.values()}


def dtype_of(array: np.ndarray) -> str:
    """The name of a numpy array's element type, for example ``"bf16"``."""
    return _lookup(_BY_NUMPY, array.dtype, "numpy dtype")


def dtype_from_onnx(code: int) -> str:
    return _lookup(_BY_ONNX, code, "ONNX element type")


def dtype_from_safetensors(name: str) -> str:
    return _lookup(_BY_SAFETENSORS, name, "safetensors dtype")


def _lookup(table: Mapping, key: object, what: str) -> str:
    try:
        return table[key]
    except KeyError:
        raise GraphError(f"{what} {key} has no counterpart in the IR") from None


@dataclass(frozen=True)
class Sym:
    """``coef`` times the product of ``names`` (sorted, with repetition; never empty: that would be an int)."""

    coef: int
    names: tuple[str, ...]

    def __mul__(self, other: "Dim") -> "Sym":
        if isinstance(other, int):
            return Sym(self.coef * other, self.names)
        return Sym(self.coef * other.coef, tuple(sorted(self.names + other.names)))

    __rmul__ = __mul__

    def __str__(self) -> str:
        parts = ([] if self.coef == 1 else [str(self.coef)]) + list(self.names)
        return "*".join(parts)


Dim = Union[int, Sym]
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def sym(name: str) -> Sym:
    """A symbol from any text: what is no identifier (``past + 1``) becomes one (``past___1``)."""
    clean = re.sub(r"\W", "_", name)
    return Sym(1, (clean if _SYMBOL.fullmatch(clean) else "_" + clean,))


def parse_dim(text: str) -> Dim:
    """``"7"``, ``"seq"`` or ``"4*seq*total"``."""
    coef, names = 1, []
    for part in text.strip().split("*"):
        part = part.strip()
        if re.fullmatch(r"-?\d+", part):
            coef *= int(part)
        elif _SYMBOL.fullmatch(part):
            names.append(part)
        else:
            raise GraphError(f"not a dimension: {text!r}")
    return Sym(coef, tuple(sorted(names))) if names else coef


def dim_product(dims: Iterable[Dim]) -> Dim:
    result: Dim = 1
    for d in dims:
        result = result * d
    return result


def dim_sum(dims: Iterable[Dim]) -> Dim | None:
    """The sum of multiples of the same symbols (``2*G + G`` is ``3*G``); None where it is no product, such as ``G + 1``."""
    coefs: dict[tuple[str, ...], int] = {}
    for d in dims:
        coef, names = (d, ()) if isinstance(d, int) else (d.coef, d.names)
        coefs[names] = coefs.get(names, 0) + coef
    terms = [(coef, names) for names, coef in coefs.items() if coef]
    if len(terms) > 1:
        return None
    coef, names = terms[0] if terms else (0, ())
    return Sym(coef, names) if names else coef


def dim_divide(a: Dim, b: Dim) -> Dim | None:
    """``a / b`` where it is exact, else None."""
    coef_a, names_a = (a, ()) if isinstance(a, int) else (a.coef, a.names)
    coef_b, names_b = (b, ()) if isinstance(b, int) else (b.coef, b.names)
    rest = Counter(names_a)
    rest.subtract(names_b)
    if coef_b == 0 or coef_a % coef_b or any(n < 0 for n in rest.values()):
        return None
    names = tuple(sorted(rest.elements()))
    return Sym(coef_a // coef_b, names) if names else coef_a // coef_b


def bind(dim: Dim, symbols: Mapping[str, int]) -> int:
    """The number that a dimension is, given its symbols' values."""
    if isinstance(dim, int):
        return dim
    try:
        return dim.coef * math.prod(symbols[n] for n in dim.names)
    except KeyError as missing:
        raise GraphError(f"dimension {dim}: symbol {missing} has no value") from None


def dim_bind(dim: Dim, symbols: Mapping[str, int]) -> Dim:
    """The dimension with the values of those symbols that have one."""
    if isinstance(dim, int):
        return dim
    rest = tuple(n for n in dim.names if n not in symbols)
    coef = dim.coef * math.prod(symbols[n] for n in dim.names if n in symbols)
    return Sym(coef, rest) if rest else coef


@dataclass(frozen=True)
class TensorType:
    """Element type (a key of DTYPES) and shape; a rank-0 tensor has shape ``()``."""

    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int:
        return len(self.shape)

    def with_shape(self, *shape: Dim) -> "TensorType":
        return TensorType(self.dtype, tuple(shape))

    def with_dtype(self, dtype: str) -> "TensorType":
        return TensorType(dtype, self.shape)


def known_dims(type_: TensorType, symbols: Mapping[str, int]) -> TensorType:
    """The type with these symbols' values put in; other symbols stay."""
    return TensorType(type_.dtype, tuple(dim_bind(d, symbols) for d in type_.shape))

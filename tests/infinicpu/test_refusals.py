"""What must be refused, and with which status: InfiniCore's own where it refuses, a status where it would read wild memory."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest

from .lib import (
    BAD_DTYPE,
    BAD_PARAM,
    BAD_SHAPE,
    BAD_STRIDES,
    BF16,
    F16,
    F32,
    INSUFFICIENT_WORKSPACE,
    NULL_POINTER,
    SOURCE,
    SUCCESS,
    Operator,
    Spec,
    create_status,
    f,
    handle,
    library,
)

F64, I32, I64, U32 = (np.dtype(t) for t in (np.float64, np.int32, np.int64, np.uint32))


def s(*shape: int, dtype: np.dtype = F32, strides: tuple[int, ...] | None = None) -> Spec:
    return Spec(shape, dtype, strides)


EPS, SCALE, POS = f(1e-6), f(1.0), ctypes.c_size_t(2)
# One legal set of operands per op (in create's order), and create's scalars.
LEGAL: dict[str, tuple[list[Spec | None], list[object]]] = {
    "Gemm": ([s(3, 5), s(3, 4), s(4, 5)], []),
    "RMSNorm": ([s(3, 8), s(3, 8), s(8)], [EPS]),
    "AddRMSNorm": ([s(3, 8), s(3, 8), s(3, 8), s(3, 8), s(8)], [EPS]),
    "Add": ([s(3, 8), s(3, 8), s(3, 8)], []),
    "Mul": ([s(3, 8), s(3, 8), s(3, 8)], []),
    "Silu": ([s(3, 8), s(3, 8)], []),
    "SwiGLU": ([s(3, 8), s(3, 8), s(3, 8)], []),
    "SiluAndMul": ([s(3, 8), s(3, 16)], []),
    "RoPE": ([s(3, 2, 8), s(3, 2, 8), s(3, dtype=I64), s(9, 4), s(9, 4)], [1]),
    "CausalSoftmax": ([s(2, 3, 5), s(2, 3, 5)], []),
    "Rearrange": ([s(3, 8), s(3, 8)], []),
    "Embedding": ([s(3, 8), s(3, dtype=I64), s(9, 8)], []),
    "RandomSample": ([s(dtype=I32), s(50)], []),
    "Attention": ([s(3, 4, 8), s(4, 3, 8), s(2, 3, 8), s(2, 3, 8), s(2, 7, 8), s(2, 7, 8)], [POS]),
    "PagedCaching": ([s(6, 2, 4, 8), s(6, 2, 4, 7), s(3, 2, 8), s(3, 2, 7), s(3, dtype=I64)], []),
    "PagedAttention": (
        [s(3, 4, 8), s(3, 4, 8), s(6, 2, 5, 8), s(6, 2, 5, 8), s(3, 9, dtype=I32), s(3, dtype=I32), None],
        [SCALE],
    ),
    "PagedAttentionPrefill": (
        [
            s(11, 4, 8),
            s(11, 4, 8),
            s(6, 2, 5, 8),
            s(6, 2, 5, 8),
            s(3, 9, dtype=I32),
            s(3, dtype=I32),
            s(4, dtype=I32),
            s(4),
        ],
        [SCALE],
    ),
    "KVCaching": ([s(3, 2, 9, 8), s(3, 2, 9, 8), s(3, 2, 4, 8), s(3, 2, 4, 8), s(3, dtype=I64)], []),
}

# op, {operand: replacement}, the expected status.
CASES: list[tuple[str, dict[int, Spec | None], int]] = [
    ("Gemm", {0: s(3, 5, dtype=F64), 1: s(3, 4, dtype=F64), 2: s(4, 5, dtype=F64)}, BAD_DTYPE),
    ("Gemm", {1: s(3, 4, dtype=F16)}, BAD_DTYPE),
    ("Gemm", {2: s(4, 5, dtype=BF16)}, BAD_DTYPE),
    ("Gemm", {0: s(15)}, BAD_SHAPE),
    ("Gemm", {1: s(1, 1, 3, 4)}, BAD_SHAPE),
    ("Gemm", {1: s(3, 4, strides=(8, 2))}, BAD_STRIDES),
    ("Gemm", {2: s(4, 5, strides=(10, 2))}, BAD_STRIDES),
    ("Gemm", {0: s(3, 5, strides=(12, 2))}, BAD_STRIDES),
    ("Gemm", {2: s(3, 5)}, BAD_SHAPE),
    ("Gemm", {0: s(4, 5)}, BAD_SHAPE),
    ("Gemm", {1: s(2, 3, 4)}, BAD_SHAPE),  # batch 2 into batch 1
    ("RMSNorm", {1: s(3, 8, dtype=F16)}, BAD_DTYPE),
    ("RMSNorm", {2: s(8, dtype=F16)}, BAD_DTYPE),  # f32 activations want an f32 weight
    ("RMSNorm", {0: s(3, 8, dtype=I32), 1: s(3, 8, dtype=I32)}, BAD_DTYPE),
    ("RMSNorm", {0: s(24), 1: s(24)}, BAD_SHAPE),
    ("RMSNorm", {1: s(4, 8)}, BAD_SHAPE),
    ("RMSNorm", {2: s(7)}, BAD_SHAPE),
    ("RMSNorm", {2: s(1, 8)}, BAD_SHAPE),
    ("RMSNorm", {1: s(3, 8, strides=(16, 2))}, BAD_STRIDES),
    ("RMSNorm", {2: s(8, strides=(2,))}, BAD_STRIDES),
    ("AddRMSNorm", {1: None}, BAD_PARAM),
    ("AddRMSNorm", {1: s(3, 8, dtype=F16)}, BAD_DTYPE),
    ("AddRMSNorm", {1: s(3, 1, 8)}, BAD_SHAPE),
    ("AddRMSNorm", {1: s(2, 8)}, BAD_SHAPE),
    ("AddRMSNorm", {1: s(3, 8, strides=(16, 2))}, BAD_STRIDES),
    ("AddRMSNorm", {3: s(3, 8, dtype=BF16)}, BAD_DTYPE),
    ("AddRMSNorm", {3: s(3, 9)}, BAD_SHAPE),
    ("AddRMSNorm", {2: s(3, 8, strides=(16, 2))}, BAD_STRIDES),
    ("Add", {0: s(3, 8, dtype=U32), 1: s(3, 8, dtype=U32), 2: s(3, 8, dtype=U32)}, BAD_DTYPE),
    ("Add", {2: s(3, 8, dtype=F16)}, BAD_DTYPE),
    ("Add", {2: s(8)}, BAD_SHAPE),
    ("Add", {0: s(3, 8, strides=(0, 1))}, BAD_STRIDES),
    ("Add", {0: s(), 1: s(), 2: s()}, BAD_SHAPE),
    ("Mul", {0: s(3, 8, dtype=I32), 1: s(3, 8, dtype=I32), 2: s(3, 8, dtype=I32)}, BAD_DTYPE),
    ("Silu", {1: s(3, 9)}, BAD_SHAPE),
    ("SwiGLU", {1: s(4, 8)}, BAD_SHAPE),
    ("SwiGLU", {0: s(3, 8, dtype=I64)}, BAD_DTYPE),
    ("SiluAndMul", {1: s(3, 8)}, BAD_SHAPE),
    ("SiluAndMul", {1: s(4, 16)}, BAD_SHAPE),
    ("SiluAndMul", {1: s(48)}, BAD_PARAM),
    ("SiluAndMul", {1: s(3, 16, strides=(17, 1))}, BAD_STRIDES),
    ("RoPE", {1: s(3, 2, 8, dtype=F16)}, BAD_DTYPE),
    ("RoPE", {3: s(9, 4, dtype=F16)}, BAD_DTYPE),
    ("RoPE", {2: s(3)}, BAD_DTYPE),
    ("RoPE", {2: s(4, dtype=I64)}, BAD_SHAPE),
    ("RoPE", {1: s(1, 3, 2, 8)}, BAD_SHAPE),
    ("RoPE", {3: s(9, 8), 4: s(9, 8)}, BAD_SHAPE),
    ("RoPE", {4: s(8, 4)}, BAD_SHAPE),
    ("RoPE", {0: s(3, 2, 8, strides=(32, 16, 2))}, BAD_STRIDES),
    ("RoPE", {3: s(9, 4, strides=(5, 1))}, BAD_STRIDES),
    ("RoPE", {2: s(3, dtype=I64, strides=(2,))}, BAD_STRIDES),
    ("CausalSoftmax", {1: s(2, 3, 5, dtype=F16)}, BAD_DTYPE),
    ("CausalSoftmax", {0: s(2, 3, 5, dtype=F64), 1: s(2, 3, 5, dtype=F64)}, BAD_DTYPE),
    ("CausalSoftmax", {1: s(2, 3, 6)}, BAD_SHAPE),
    ("CausalSoftmax", {0: s(5), 1: s(5)}, BAD_SHAPE),
    ("CausalSoftmax", {0: s(5, 3), 1: s(5, 3)}, BAD_SHAPE),
    ("Rearrange", {1: s(3, 8, dtype=F16)}, BAD_DTYPE),
    ("Rearrange", {1: s(8, 3)}, BAD_SHAPE),
    ("Rearrange", {1: s(24)}, BAD_SHAPE),
    ("Rearrange", {0: s(3, 8, strides=(0, 1))}, BAD_STRIDES),
    ("Embedding", {2: s(9, 8, dtype=F16)}, BAD_DTYPE),
    ("Embedding", {1: s(3, dtype=U32)}, BAD_DTYPE),
    ("Embedding", {2: s(9, 7)}, BAD_SHAPE),
    ("Embedding", {0: s(4, 8)}, BAD_SHAPE),
    ("Embedding", {0: s(3, 1, 8)}, BAD_SHAPE),
    ("Embedding", {2: s(9, 8, strides=(9, 1))}, BAD_STRIDES),
    ("RandomSample", {0: s(1, dtype=I32)}, BAD_SHAPE),
    ("RandomSample", {0: s()}, BAD_DTYPE),
    ("RandomSample", {1: s(50, dtype=I32)}, BAD_DTYPE),
    ("RandomSample", {1: s(1, 50)}, BAD_SHAPE),
    ("RandomSample", {1: s(0)}, BAD_SHAPE),
    ("RandomSample", {1: s(50, strides=(2,))}, BAD_STRIDES),
    ("Attention", {1: s(4, 3, 8, dtype=F16)}, BAD_DTYPE),
    ("Attention", {1: s(12, 8)}, BAD_SHAPE),
    ("Attention", {0: s(3, 4, 8, strides=(64, 8, 1))}, BAD_STRIDES),
    ("Attention", {1: s(4, 3, 8, strides=(48, 16, 2))}, BAD_STRIDES),
    ("Attention", {0: s(4, 3, 8)}, BAD_PARAM),
    ("Attention", {4: s(2, 4, 8)}, BAD_PARAM),  # pos 2 and 3 tokens need 5
    ("Attention", {1: s(3, 3, 8), 0: s(3, 3, 8)}, BAD_PARAM),  # 3 heads over 2
    ("PagedCaching", {4: s(3, dtype=I32)}, BAD_DTYPE),
    ("PagedCaching", {2: s(3, 2, 8, dtype=F16)}, BAD_DTYPE),
    ("PagedCaching", {4: s(4, dtype=I64)}, BAD_SHAPE),
    ("PagedCaching", {2: s(3, 3, 8)}, BAD_SHAPE),
    ("PagedCaching", {1: s(6, 2, 5, 7)}, BAD_SHAPE),
    ("PagedCaching", {2: s(6, 8)}, BAD_SHAPE),
    ("PagedCaching", {0: s(6, 2, 4, 8, strides=(64, 32, 1, 4))}, BAD_STRIDES),
    ("PagedAttention", {1: s(3, 4, 8, dtype=F64)}, BAD_DTYPE),
    ("PagedAttention", {2: s(6, 2, 5, 8, dtype=F16)}, BAD_DTYPE),
    ("PagedAttention", {5: s(3, dtype=I64)}, BAD_DTYPE),  # not the tables' dtype
    ("PagedAttention", {4: s(3, 9), 5: s(3)}, BAD_DTYPE),
    ("PagedAttention", {6: s(4, dtype=F16)}, BAD_DTYPE),
    ("PagedAttention", {1: s(3, 5, 8), 0: s(3, 5, 8)}, BAD_SHAPE),  # 5 heads over 2
    ("PagedAttention", {1: s(3, 4, 9), 0: s(3, 4, 9)}, BAD_SHAPE),
    ("PagedAttention", {3: s(6, 2, 4, 8)}, BAD_SHAPE),
    ("PagedAttention", {5: s(4, dtype=I32)}, BAD_SHAPE),
    ("PagedAttention", {4: s(2, 9, dtype=I32)}, BAD_SHAPE),
    ("PagedAttention", {1: s(12, 8)}, BAD_SHAPE),
    ("PagedAttention", {6: s(3)}, BAD_SHAPE),
    ("PagedAttention", {1: s(3, 4, 8, strides=(64, 16, 2))}, BAD_STRIDES),
    ("PagedAttention", {2: s(6, 2, 5, 8, strides=(80, 40, 1, 5))}, BAD_STRIDES),
    ("PagedAttention", {4: s(3, 9, dtype=I32, strides=(1, 3))}, BAD_STRIDES),
    ("PagedAttentionPrefill", {6: s(3, dtype=I32)}, BAD_PARAM),
    ("PagedAttentionPrefill", {6: s(4, dtype=I64)}, BAD_DTYPE),
    ("PagedAttentionPrefill", {0: s(10, 4, 8)}, BAD_SHAPE),
    ("PagedAttentionPrefill", {6: s(4, 1, dtype=I32)}, BAD_SHAPE),
    ("KVCaching", {4: s(3, dtype=U32)}, BAD_DTYPE),
    ("KVCaching", {2: s(3, 2, 4, 8, dtype=F16), 3: s(3, 2, 4, 8, dtype=F16)}, BAD_DTYPE),
    ("KVCaching", {0: s(3, 2, 72)}, BAD_SHAPE),
    ("KVCaching", {1: s(3, 2, 10, 8)}, BAD_SHAPE),
    ("KVCaching", {2: s(3, 1, 4, 8), 3: s(3, 1, 4, 8)}, BAD_SHAPE),
    ("KVCaching", {4: s(2, dtype=I64)}, BAD_SHAPE),
]


@pytest.mark.parametrize("op", LEGAL)
def test_legal_operands_are_accepted(op: str) -> None:
    operands, scalars = LEGAL[op]
    assert create_status(op, operands, scalars) == SUCCESS


@pytest.mark.parametrize(("op", "changes", "expected"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_create_refuses(op: str, changes: dict[int, Spec | None], expected: int) -> None:
    operands, scalars = list(LEGAL[op][0]), LEGAL[op][1]
    for i, replacement in changes.items():
        operands[i] = replacement
    assert create_status(op, operands, scalars) == expected


def test_rope_refuses_an_unknown_algorithm() -> None:
    assert create_status("RoPE", LEGAL["RoPE"][0], [2]) == NULL_POINTER  # InfiniCore's status for it


@pytest.mark.parametrize("op", LEGAL)
def test_null_descriptors_handles_and_pointers(op: str) -> None:
    operands, scalars = LEGAL[op]
    for i, operand in enumerate(operands):
        if operand is not None and (op, i) not in [("AddRMSNorm", 1), ("PagedAttentionPrefill", 7)]:
            changed: list[Spec | None] = list(operands)
            changed[i] = None
            assert create_status(op, changed, scalars) == NULL_POINTER, i
    create = getattr(library(), f"infiniopCreate{op}Descriptor")
    nothing = [ctypes.c_void_p()] * len(operands)
    assert create(None, ctypes.byref(ctypes.c_void_p()), *nothing, *scalars) == NULL_POINTER
    assert create(handle(), None, *nothing, *scalars) == NULL_POINTER

    operator = Operator(op, operands, scalars)
    call_scalars = {"Gemm": [f(1), f(0)], "RandomSample": [f(0.5), f(1), ctypes.c_int(3), f(1)]}.get(op, [])
    assert operator(*[None] * len(operands), scalars=call_scalars) == NULL_POINTER
    missing, operator.desc = operator.desc, ctypes.c_void_p()
    args: list[object] = [None] * len(operands)
    if op not in ("Rearrange", "Embedding"):
        args = [None, ctypes.c_size_t(0), *args]
        assert (
            getattr(library(), f"infiniopGet{op}WorkspaceSize")(None, ctypes.byref(ctypes.c_size_t())) == NULL_POINTER
        )
        assert getattr(library(), f"infiniopGet{op}WorkspaceSize")(missing, None) == NULL_POINTER
    assert getattr(library(), f"infiniop{op}")(None, *args, *call_scalars, None) == NULL_POINTER
    operator.destroy()  # NULL: nothing to do
    operator.desc = missing
    operator.destroy()


def test_another_operators_descriptor_is_refused() -> None:
    norm = Operator("RMSNorm", *LEGAL["RMSNorm"])
    c = np.zeros((3, 8), F32)
    pointers = [ctypes.c_void_p(c.ctypes.data)] * 3
    assert library().infiniopAdd(norm.desc, None, ctypes.c_size_t(0), *pointers, None) == BAD_PARAM
    norm.destroy()


@pytest.mark.parametrize("op", ["RandomSample", "PagedAttentionPrefill", "Gemm"])
def test_too_small_a_workspace_is_refused(op: str) -> None:
    operands, scalars = LEGAL[op]
    if op == "Gemm":  # f16 is converted in the workspace
        operands = [Spec(o.shape, F16) for o in operands if o is not None]
    operator = Operator(op, operands, scalars)
    assert operator.workspace_size() > 0
    arrays = [None if o is None else np.zeros(o.shape, o.dtype) for o in operands]
    call_scalars = {"Gemm": [f(1), f(0)], "RandomSample": [f(0.5), f(1), ctypes.c_int(3), f(1)]}.get(op, [])
    assert operator(*arrays, scalars=call_scalars, short_workspace=1) == INSUFFICIENT_WORKSPACE
    assert operator(*arrays, scalars=call_scalars) == SUCCESS
    operator.destroy()


def test_tensor_descriptor_refusals() -> None:
    desc, shape = ctypes.c_void_p(), (ctypes.c_size_t * 1)(3)
    create = library().infiniopCreateTensorDescriptor
    assert create(None, ctypes.c_size_t(1), shape, None, 13) == NULL_POINTER
    assert create(ctypes.byref(desc), ctypes.c_size_t(1), None, None, 13) == NULL_POINTER
    assert create(ctypes.byref(desc), ctypes.c_size_t(1), shape, None, 0) == BAD_DTYPE
    assert create(ctypes.byref(desc), ctypes.c_size_t(1), shape, None, 99) == BAD_DTYPE
    assert library().infiniopDestroyTensorDescriptor(None) == SUCCESS


def test_the_table_covers_every_declared_operator() -> None:
    text = "".join(p.read_text() for p in (SOURCE / "include" / "infiniop" / "ops").glob("*.h"))
    assert set(re.findall(r"infiniopCreate(\w+)Descriptor", text)) == set(LEGAL) and {c[0] for c in CASES} == set(LEGAL)

"""Calls the embedded InfiniCore through ctypes, the way the emitted engines do: descriptors first, pointers later."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

PROJECT = Path(__file__).resolve().parents[2]
SOURCE = PROJECT / "runtime" / "infinicpu"

SUCCESS, INTERNAL_ERROR, NOT_IMPLEMENTED, BAD_PARAM, NULL_POINTER, DEVICE_TYPE_NOT_SUPPORTED, DEVICE_NOT_FOUND = range(
    7
)
BAD_DTYPE, BAD_SHAPE, BAD_STRIDES, INSUFFICIENT_WORKSPACE = range(10, 14)

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
FLOATS = (F32, F16, BF16)
# infiniDtype_t
DTYPE_CODE = {
    **{np.dtype(f"i{n}"): 3 + i for i, n in enumerate((1, 2, 4, 8))},
    **{np.dtype(f"u{n}"): 7 + i for i, n in enumerate((1, 2, 4, 8))},
    **{F16: 12, F32: 13, np.dtype(np.float64): 14, BF16: 19, np.dtype(bool): 2},
}
# Ops whose call takes no workspace.
NO_WORKSPACE = ("Rearrange", "Embedding")


def unit_roundoff(dtype: np.dtype) -> float:
    """Largest relative error of rounding to dtype, in its normal range."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def smallest_step(dtype: np.dtype) -> float:
    """Largest absolute error of rounding to dtype below its normal range."""
    return float(ml_dtypes.finfo(dtype).smallest_subnormal)


def tool(name: str) -> str:
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert path, f"{name} is a dependency of the project"
    return path


def cmake_build(source: Path, tree: Path, *options: str) -> Path:
    """Configure and build incrementally in a folder of the project's build/; processes take turns."""
    tree.mkdir(parents=True, exist_ok=True)
    with open(tree / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [tool("cmake"), "-S", str(source), "-B", str(tree), "-G", "Ninja", *options]
        for command in ([*configure, f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"], [tool("cmake"), "--build", str(tree)]):
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return tree


@functools.cache
def library() -> ctypes.CDLL:
    """libinfiniop, with libinfinirt and libinfiniccl loaded beside it; built when the sources changed."""
    tree = cmake_build(SOURCE, PROJECT / "build" / "infinicpu")
    ctypes.CDLL(str(tree / "libinfinirt.so"), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(tree / "libinfiniop.so"))


@functools.cache
def runtime() -> ctypes.CDLL:
    library()
    return ctypes.CDLL(str(PROJECT / "build" / "infinicpu" / "libinfinirt.so"))


@functools.cache
def collectives() -> ctypes.CDLL:
    library()
    return ctypes.CDLL(str(PROJECT / "build" / "infinicpu" / "libinfiniccl.so"))


@functools.cache
def handle() -> ctypes.c_void_p:
    result = ctypes.c_void_p()
    assert library().infiniopCreateHandle(ctypes.byref(result)) == SUCCESS
    return result


@dataclass(frozen=True)
class Spec:
    """A tensor without data: what a descriptor says. strides are in elements; None means contiguous."""

    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None


def spec_of(array: np.ndarray) -> Spec:
    if array.size == 0:  # numpy gives these arbitrary strides
        return Spec(array.shape, array.dtype)
    return Spec(array.shape, array.dtype, tuple(s // array.itemsize for s in array.strides))


@contextlib.contextmanager
def descriptor(tensor: Spec | np.ndarray | None) -> Iterator[ctypes.c_void_p]:
    """An infiniopTensorDescriptor_t; None gives NULL."""
    result = ctypes.c_void_p()
    if tensor is None:
        yield result
        return
    spec = spec_of(tensor) if isinstance(tensor, np.ndarray) else tensor
    shape = (ctypes.c_size_t * len(spec.shape))(*spec.shape)
    strides = None if spec.strides is None else (ctypes.c_ssize_t * len(spec.strides))(*spec.strides)
    code = DTYPE_CODE[np.dtype(spec.dtype)]
    status = library().infiniopCreateTensorDescriptor(
        ctypes.byref(result), ctypes.c_size_t(len(spec.shape)), shape, strides, code
    )
    assert status == SUCCESS
    yield result
    assert library().infiniopDestroyTensorDescriptor(result) == SUCCESS


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


class Operator:
    """An operator's descriptor, to be called as often as wanted. `status` is what create returned."""

    def __init__(self, name: str, tensors: Sequence[Spec | np.ndarray | None], scalars: Sequence[object] = ()) -> None:
        self.name = name
        self.desc = ctypes.c_void_p()
        with contextlib.ExitStack() as stack:
            descs = [stack.enter_context(descriptor(t)) for t in tensors]
            create = getattr(library(), f"infiniopCreate{name}Descriptor")
            self.status = create(handle(), ctypes.byref(self.desc), *descs, *scalars)

    def workspace_size(self) -> int:
        if self.name in NO_WORKSPACE:
            return 0
        size = ctypes.c_size_t()
        assert getattr(library(), f"infiniopGet{self.name}WorkspaceSize")(self.desc, ctypes.byref(size)) == SUCCESS
        return size.value

    def __call__(self, *arrays: np.ndarray | None, scalars: Sequence[object] = (), short_workspace: int = 0) -> int:
        pointers = [pointer(a) for a in arrays]
        if self.name in NO_WORKSPACE:
            return getattr(library(), f"infiniop{self.name}")(self.desc, *pointers, *scalars, None)
        size = self.workspace_size()
        workspace = np.empty(size + 64, np.uint8)
        args = (self.desc, pointer(workspace), ctypes.c_size_t(size - short_workspace), *pointers, *scalars, None)
        return getattr(library(), f"infiniop{self.name}")(*args)

    def destroy(self) -> None:
        assert getattr(library(), f"infiniopDestroy{self.name}Descriptor")(self.desc) == SUCCESS


def create_status(name: str, tensors: Sequence[Spec | np.ndarray | None], scalars: Sequence[object] = ()) -> int:
    """What create returns; a descriptor that it made is destroyed."""
    operator = Operator(name, tensors, scalars)
    if operator.status == SUCCESS:
        operator.destroy()
    return operator.status


def call(
    name: str,
    arrays: Sequence[np.ndarray | None],
    create_scalars: Sequence[object] = (),
    call_scalars: Sequence[object] = (),
    status: int = SUCCESS,
) -> None:
    """Create, call and destroy; the call must return `status`."""
    operator = Operator(name, arrays, create_scalars)
    assert operator.status == SUCCESS
    try:
        assert operator(*arrays, scalars=call_scalars) == status
    finally:
        operator.destroy()


def f(value: float) -> ctypes.c_float:
    return ctypes.c_float(value)


def strided(
    rng: np.random.Generator, shape: Sequence[int], dtype: np.dtype, gaps: bool, order: Sequence[int] | None = None
) -> np.ndarray:
    """Normally distributed values in a view: dimensions laid out in `order`, with unused rows between if `gaps`."""
    order = list(order if order is not None else range(len(shape)))
    lengths = [shape[i] + (int(rng.integers(0, 4)) if gaps and n != len(order) - 1 else 0) for n, i in enumerate(order)]
    if gaps and len(lengths) > 1:
        lengths[-1] += int(rng.integers(0, 3))
    base = np.full(lengths, 7, dtype)
    view = base[(*(slice(0, shape[i]) for i in order), ...)].transpose(np.argsort(order).astype(int))
    view[...] = np.asarray(rng.standard_normal(shape)).astype(dtype)
    return view


def random_bits(rng: np.random.Generator, n: int, dtype: np.dtype) -> np.ndarray:
    """Every kind of value: subnormals, infinities and NaN too."""
    return rng.integers(0, 256, n * dtype.itemsize, dtype=np.uint8).view(dtype)

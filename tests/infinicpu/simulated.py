"""Simulated devices for the tests: records registered for a while, device memory, operators, streams."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence

import numpy as np

from .lib import F32, NO_WORKSPACE, SUCCESS, Spec, descriptor, library, runtime

H2H, H2D, D2H, D2D = range(4)


@contextlib.contextmanager
def simulating(*records: str) -> Iterator[None]:
    """The records are registered, and device 0 of the first one's type is the current device."""
    for record in records:
        assert simulate(record) == SUCCESS, error()
    use(int(records[0].split()[1]))
    try:
        yield
    finally:
        status = simulate(None)
        assert runtime().infinirtSetDevice(0, 0) == SUCCESS
        assert status == SUCCESS, error()


def simulate(record: str | None) -> int:
    return int(library().infinicpuSimulate(None if record is None else record.encode()))


def error() -> str:
    function = library().infinicpuSimulatorError
    function.restype = ctypes.c_char_p
    return str(function().decode())


def use(device: int, number: int = 0) -> None:
    assert runtime().infinirtSetDevice(device, number) == SUCCESS


class Memory:
    """A device allocation of exactly an array's bytes; as a context manager it is freed at the end."""

    def __init__(self, content: np.ndarray | int, host: bool = False) -> None:
        self.size = content if isinstance(content, int) else content.nbytes
        self.host = host
        self.address = ctypes.c_void_p()
        allocate = runtime().infinirtMallocHost if host else runtime().infinirtMalloc
        assert allocate(ctypes.byref(self.address), ctypes.c_size_t(self.size)) == SUCCESS, error()
        if isinstance(content, np.ndarray):
            self.write(content)

    def at(self, offset: int) -> ctypes.c_void_p:
        return ctypes.c_void_p((self.address.value or 0) + offset)

    def write(self, content: np.ndarray) -> None:
        content = np.ascontiguousarray(content)
        source = ctypes.c_void_p(content.ctypes.data)
        assert runtime().infinirtMemcpy(self.address, source, ctypes.c_size_t(content.nbytes), H2D) == SUCCESS, error()

    def read(self, dtype: np.dtype | type, shape: Sequence[int] = (-1,)) -> np.ndarray:
        """What is there now, whatever is queued: a synchronous copy waits for nothing."""
        content = np.zeros(self.size, np.uint8)
        status = runtime().infinirtMemcpy(
            ctypes.c_void_p(content.ctypes.data), self.address, ctypes.c_size_t(self.size), D2H
        )
        assert status == SUCCESS, error()
        return content.view(dtype).reshape(shape)

    def free(self) -> int:
        return int((runtime().infinirtFreeHost if self.host else runtime().infinirtFree)(self.address))

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.free() == SUCCESS, error()


class Op:
    """An operator of the current device. `status` is what create returned."""

    def __init__(self, name: str, tensors: Sequence[Spec | np.ndarray | None], scalars: Sequence[object] = ()) -> None:
        self.name = name
        self.desc = ctypes.c_void_p()
        handle = ctypes.c_void_p()
        assert library().infiniopCreateHandle(ctypes.byref(handle)) == SUCCESS
        with contextlib.ExitStack() as stack:
            descs = [stack.enter_context(descriptor(t)) for t in tensors]
            create = getattr(library(), f"infiniopCreate{name}Descriptor")
            self.status = create(handle, ctypes.byref(self.desc), *descs, *scalars)
        assert library().infiniopDestroyHandle(handle) == SUCCESS
        self.workspace: Memory | None = None
        if self.status == SUCCESS and name not in NO_WORKSPACE:
            size = ctypes.c_size_t()
            assert getattr(library(), f"infiniopGet{name}WorkspaceSize")(self.desc, ctypes.byref(size)) == SUCCESS
            self.workspace = Memory(size.value)

    def __call__(
        self,
        *places: Memory | ctypes.c_void_p | None,
        scalars: Sequence[object] = (),
        stream: ctypes.c_void_p | None = None,
        workspace: tuple[ctypes.c_void_p, int] | None = None,
    ) -> int:
        pointers = [p.address if isinstance(p, Memory) else p for p in places]
        function = getattr(library(), f"infiniop{self.name}")
        if self.workspace is None:
            return int(function(self.desc, *pointers, *scalars, stream))
        address, size = workspace or (self.workspace.address, self.workspace.size)
        return int(function(self.desc, address, ctypes.c_size_t(size), *pointers, *scalars, stream))

    def destroy(self) -> int:
        return int(getattr(library(), f"infiniopDestroy{self.name}Descriptor")(self.desc))

    def __enter__(self) -> Op:
        assert self.status == SUCCESS, error()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.destroy() == SUCCESS, error()
        self.free_workspace()

    def free_workspace(self) -> None:
        if self.workspace is not None:
            assert self.workspace.free() == SUCCESS, error()


def create_status(name: str, tensors: Sequence[Spec | np.ndarray | None], scalars: Sequence[object] = ()) -> int:
    operator = Op(name, tensors, scalars)
    if operator.status == SUCCESS:
        with operator:
            pass
    return int(operator.status)


@contextlib.contextmanager
def stream() -> Iterator[ctypes.c_void_p]:
    made = ctypes.c_void_p()
    assert runtime().infinirtStreamCreate(ctypes.byref(made)) == SUCCESS
    yield made
    assert runtime().infinirtStreamDestroy(made) == SUCCESS, error()


def synchronize(made: ctypes.c_void_p | None = None) -> int:
    return int(runtime().infinirtStreamSynchronize(made))


@contextlib.contextmanager
def event(flags: int = 0) -> Iterator[ctypes.c_void_p]:
    made = ctypes.c_void_p()
    assert runtime().infinirtEventCreateWithFlags(ctypes.byref(made), flags) == SUCCESS
    yield made
    assert runtime().infinirtEventDestroy(made) == SUCCESS


def copy_async(to: object, source: object, size: int, kind: int, made: ctypes.c_void_p | None = None) -> int:
    places = [p.address if isinstance(p, Memory) else p for p in (to, source)]
    return int(runtime().infinirtMemcpyAsync(places[0], places[1], ctypes.c_size_t(size), kind, made))


def values(*numbers: float) -> np.ndarray:
    return np.array(numbers, F32)

"""InfiniCore through ctypes: a device's memory and stream, and operators called as an engine calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import byref, c_float, c_int, c_size_t, c_ssize_t, c_void_p
from typing import Any

import numpy as np

from codegen.calls import is_operand
from codegen.check_ops_calls import ROW_COPIES, OpCall, Tensor
from ir.types import DTYPES
from runtime.errors import InfiniCoreError
from runtime.infinicore import Provider
from runtime.structs import STATUS_NAMES, DataType, DeviceType

H2D, D2H, D2D = 1, 2, 3  # infinirtMemcpyKind_t
# Memory that nobody may touch, and results before they are written. In every floating-point type this is NaN, so that a kernel which reads what it must not
# spoils its result as well.
CANARY = 0xFFA5  # as a 16-bit number, little endian
ALIGNMENT = 512  # bytes; an operand's own offset comes on top of it
GUARD = 2 * ALIGNMENT  # bytes before and after an operand
_SCALARS: dict[str, Any] = dict(algo=c_int, topk=c_int, alibi=c_void_p)  # others are floats


class Refused(Exception):
    """InfiniCore said no: the C function and its infiniStatus_t; ``missing`` where there is no such function."""

    def __init__(self, call: str, status: int = 0, *, missing: bool = False) -> None:
        super().__init__(call, status, missing)
        self.call, self.status, self.missing = call, status, missing

    def __str__(self) -> str:
        if self.missing:
            return f"there is no {self.call}"
        return f"{self.call} gives status {self.status} {STATUS_NAMES.get(self.status, '')}".rstrip()


class Device:
    """One device of an InfiniCore, with a stream and an operator handle. Close it, or use it in ``with``.

    Raises:
        InfiniCoreError: the device cannot be used.
    """

    def __init__(self, provider: Provider, device: int, number: int = 0) -> None:
        self.provider = provider
        self.stream, self.handle = c_void_p(), c_void_p()
        try:
            self.run("infinirtSetDevice", c_int(device), c_int(number))
        except InfiniCoreError as error:
            call = f"infinirtSetDevice (device {number} of target {DeviceType(device).target})"
            raise InfiniCoreError(call, error.status, error.detail) from None
        self.run("infinirtStreamCreate", byref(self.stream))
        self.run("infiniopCreateHandle", byref(self.handle))

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.run("infiniopDestroyHandle", self.handle)
        self.run("infinirtStreamDestroy", self.stream)

    def function(self, name: str) -> Any:
        """A C function.

        Raises:
            Refused: it is not there.
        """
        for handle in self.provider.handles:
            if hasattr(handle, name):
                return getattr(handle, name)
        raise Refused(name, missing=True)

    def run(self, name: str, *arguments: Any) -> None:
        """Call a function that has to succeed.

        Raises:
            InfiniCoreError: it does not, or is not there.
        """
        try:
            status = self.function(name)(*arguments)
        except Refused as refusal:
            raise InfiniCoreError(name, 2, str(refusal)) from None
        if status:
            raise InfiniCoreError(name, status, STATUS_NAMES.get(status, ""))

    def status(self, name: str, *arguments: Any) -> None:
        """Call a function that may refuse.

        Raises:
            Refused: its status is not SUCCESS, or it is not there.
        """
        status = self.function(name)(*arguments)
        if status:
            raise Refused(name, status)

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes."""
        pointer = c_void_p()
        self.run("infinirtMalloc", byref(pointer), c_size_t(size))
        return pointer.value or 0

    def free(self, pointer: int) -> None:
        self.run("infinirtFree", c_void_p(pointer))

    def upload(self, pointer: int, data: np.ndarray) -> None:
        self.run("infinirtMemcpy", c_void_p(pointer), c_void_p(data.ctypes.data), c_size_t(data.nbytes), c_int(H2D))

    def download(self, pointer: int, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)
        self.run("infinirtMemcpy", c_void_p(data.ctypes.data), c_void_p(pointer), c_size_t(size), c_int(D2H))
        return data

    def synchronise(self) -> None:
        """Wait for the stream; what failed on it is said now.

        Raises:
            Refused
        """
        self.status("infinirtStreamSynchronize", self.stream)


def canaries(size: int) -> np.ndarray:
    """``size`` bytes of the pattern."""
    return np.full(-(-size // 2), CANARY, "<u2").view(np.uint8)[:size]


class Region:
    """Device memory of one operand (or of two that share it), between guards; ``image`` is what the host last put there.

    Args:
        tensor: what lies in it. Its first element is at the operand's own offset from an aligned address, as it is in an engine.
    """

    def __init__(self, device: Device, tensor: Tensor) -> None:
        self.device, self.tensor = device, tensor
        self.dtype = DTYPES[tensor.dtype].numpy
        self.lead = GUARD + tensor.offset * self.dtype.itemsize % ALIGNMENT
        size = self.lead + tensor.span * self.dtype.itemsize + GUARD
        self.image = canaries(size + size % 2)
        self._allocated = device.allocate(self.image.nbytes + ALIGNMENT)
        self._base = -(-self._allocated // ALIGNMENT) * ALIGNMENT

    @property
    def pointer(self) -> int:
        """The address of the first element."""
        return self._base + self.lead

    def view(self, image: np.ndarray) -> np.ndarray:
        """The tensor in an image of the region."""
        size = self.dtype.itemsize
        flat = image[self.lead : self.lead + self.tensor.span * size].view(self.dtype)
        strides = tuple(s * size for s in self.tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, self.tensor.shape, strides)

    def mask(self) -> np.ndarray:
        """Which bytes belong to the tensor."""
        found = np.zeros(self.image.nbytes, bool)
        size = self.dtype.itemsize
        flat = found[self.lead : self.lead + self.tensor.span * size].reshape(-1, size)
        rows = np.lib.stride_tricks.as_strided(
            flat, (*self.tensor.shape, size), (*(s * size for s in self.tensor.strides), 1)
        )
        rows[...] = True
        return found

    def put(self, values: np.ndarray | None, *, zeros: bool = False) -> None:
        """New contents: these values (None: not written yet), and canaries (or zeros) everywhere else."""
        self.image.view("<u2")[...] = 0 if zeros else CANARY
        if values is not None and self.tensor.span:
            self.view(self.image)[...] = values
        self.device.upload(self._base, self.image)

    def get(self) -> np.ndarray:
        """An image of what is there now."""
        return self.device.download(self._base, self.image.nbytes)

    def free(self) -> None:
        self.device.free(self._allocated)


class Operator:
    """An operator of InfiniCore, created for a call's shapes.

    Raises:
        Refused: it cannot be created, or is not there.
    """

    def __init__(self, device: Device, call: OpCall) -> None:
        self.device, self.spec = device, call.spec
        self.base = f"infiniop{call.spec.name}"
        self.descriptor, self.workspace_bytes = c_void_p(), 0
        for prefix, suffix in (("", ""), ("Destroy", "Descriptor")):
            device.function(f"infiniop{prefix}{call.spec.name}{suffix}")
        tensors: dict[str, c_void_p] = {}
        attrs = dict(call.attrs)
        try:
            for operand, tensor in call.operands:
                tensors[operand] = self._describe(tensor)
            arguments = [tensors[a] if is_operand(a) else _scalar(a, attrs[a]) for a in call.spec.create]
            device.status(
                f"infiniopCreate{call.spec.name}Descriptor", device.handle, byref(self.descriptor), *arguments
            )
        finally:
            for handle in tensors.values():
                device.run("infiniopDestroyTensorDescriptor", handle)
        if call.spec.workspace:
            size = c_size_t()
            try:
                device.status(f"infiniopGet{call.spec.name}WorkspaceSize", self.descriptor, byref(size))
            except Refused:
                self.destroy()
                raise
            self.workspace_bytes = size.value

    def _describe(self, tensor: Tensor) -> c_void_p:
        rank = len(tensor.shape)
        found = c_void_p()
        code = DataType["INFINI_DTYPE_" + DTYPES[tensor.dtype].infini]
        self.device.run(
            "infiniopCreateTensorDescriptor",
            byref(found),
            c_size_t(rank),
            (c_size_t * rank)(*tensor.shape),
            (c_ssize_t * rank)(*tensor.strides),
            c_int(code),
        )
        return found

    def arguments(self, pointers: Mapping[str, int], workspace: int, attrs: Mapping[str, Any]) -> list[Any]:
        """What a call takes."""
        own = [c_void_p(workspace), c_size_t(self.workspace_bytes)] if self.spec.workspace else []
        rest = [c_void_p(pointers[a]) if is_operand(a) else _scalar(a, attrs[a]) for a in self.spec.call]
        return [self.descriptor, *own, *rest, self.device.stream]

    def enqueue(self, arguments: Sequence[Any]) -> None:
        """Call it; the work may still run when this returns.

        Raises:
            Refused
        """
        self.device.status(self.base, *arguments)

    def destroy(self) -> None:
        # What it says is no matter of a check: some backends cannot destroy what they have made.
        self.device.function(f"infiniopDestroy{self.spec.name}Descriptor")(self.descriptor)


class RowCopies:
    """Rows of a table by index, one device copy each: what an engine does where InfiniCore has no embedding."""

    workspace_bytes = 0

    def __init__(self, device: Device, call: OpCall) -> None:
        self.device = device
        self.target, self.index, self.table = (name for name in call.spec.create)
        self.count = call[self.target].shape[0]
        self.row_bytes = call[self.target].strides[0] * DTYPES[call[self.target].dtype].numpy.itemsize
        self.rows: list[int] = []

    def arguments(self, pointers: Mapping[str, int], workspace: int, attrs: Mapping[str, Any]) -> list[Any]:
        return [pointers[self.target], pointers[self.table]]

    def enqueue(self, arguments: Sequence[Any]) -> None:
        target, table = arguments
        for i, row in enumerate(self.rows):
            self.device.status(
                "infinirtMemcpyAsync",
                c_void_p(target + i * self.row_bytes),
                c_void_p(table + row * self.row_bytes),
                c_size_t(self.row_bytes),
                c_int(D2D),
                self.device.stream,
            )

    def destroy(self) -> None:
        pass


def create(device: Device, call: OpCall) -> Operator | RowCopies:
    return RowCopies(device, call) if call.op in ROW_COPIES else Operator(device, call)


def _scalar(name: str, value: Any) -> Any:
    kind = _SCALARS.get(name, c_float)
    return kind(None if value is None else value)

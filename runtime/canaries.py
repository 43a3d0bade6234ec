"""Tiny computations that tell whether an InfiniCore's operators mean what the engine was compiled for.

Some of InfiniCore's operators changed the order or the meaning of their arguments while their symbols stayed, so an engine and a library that do not belong
together load without complaint and compute nonsense. Each of these operators is called once on a few values whose result is known, with the arguments in the
order that the manifest's ``abi`` records and in the sizes of the model, before the engine is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from ctypes import byref, c_float, c_int, c_size_t, c_ssize_t, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import InfiniCoreError, UnsupportedError
from runtime.structs import NUMPY_DTYPES, STATUS_NAMES, DataType

# The argument orders where a manifest records none: of create and of the call, as codegen.calls spells them.
ORDERS: dict[str, tuple[str, str]] = {
    "AddRMSNorm": ("o0 o1 i0 i1 i2 epsilon", "o0 o1 i0 i1 i2"),
    "PagedCaching": ("o0 o1 i2 i3 i4", "o0 o1 i2 i3 i4"),
    "RoPE": ("o0 i0 i1 i2 i3 algo", "o0 i0 i1 i2 i3"),
    "PagedAttentionPrefill": ("o0 i0 i1 i2 i3 i4 i5 alibi scale", "o0 i0 i1 i2 i3 i4 i5 alibi"),
}

_MEMCPY_H2D, _MEMCPY_D2H = 1, 2
_ALGO_GPT_NEOX = 1
_NOT_SUPPORTED = (2, 5, 8)  # NOT_IMPLEMENTED, DEVICE_TYPE_NOT_SUPPORTED, DEVICE_ARCHITECTURE_NOT_SUPPORTED
_ARGUMENTS_REFUSED = (3, 4, 10, 11, 12)  # BAD_PARAM, NULL_POINTER, BAD_TENSOR_*
_BAD_TENSOR_DTYPE = 10

# Results are small multiples of 1/2 and the wrong ones are further away than this; half precision is exact to 1/32 there, whatever an operator rounds on its way.
_TOLERANCE = 0.25
# What a result holds before the call.
_UNWRITTEN = -99.0
_DTYPES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


@dataclass(frozen=True)
class Sizes:
    """The model's, as far as an operator may be particular about them."""

    dtype: str
    d: int
    nh: int
    nkvh: int
    dh: int
    epsilon: float
    block: int


@dataclass(frozen=True)
class Case:
    """One operator on known values.

    Attributes:
        operands: per operand, its values before the call.
        results: per operand that is looked at, what it is called and what it must hold after the call.
        attributes: what create and the call take beside operands.
        padding: arguments behind the last one: read only by a library whose create takes more than the build gives, which must then not meet garbage.
        needs: a symbol without which the library is so old that it would not survive the call, and since when it has that.
    """

    operands: Mapping[str, np.ndarray]
    results: Mapping[str, tuple[str, np.ndarray]]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    padding: tuple[Any, ...] = (c_void_p(None), c_void_p(None))
    needs: str = ""


def _add_rms_norm(s: Sizes, index: str, create: tuple[str, ...]) -> Case:
    def rows(value: float) -> np.ndarray:
        return np.full((2, s.d), value, NUMPY_DTYPES[s.dtype])

    norm = 2 * 4 / np.sqrt(16 + s.epsilon)  # of rows of 1 + 3, with the weight 2
    operands = {"o0": rows(_UNWRITTEN), "o1": rows(_UNWRITTEN), "i0": rows(1), "i1": rows(3), "i2": rows(2)[0]}
    return Case(operands, {"o0": ("y", rows(norm)), "o1": ("residual_out", rows(4))}, {"epsilon": c_float(s.epsilon)})


def _paged_caching(s: Sizes, index: str, create: tuple[str, ...]) -> Case:
    cache = np.zeros((2, s.nkvh, s.block, s.dh), NUMPY_DTYPES[s.dtype])
    slot = s.block + s.block // 2
    keys, values = cache.copy(), cache.copy()
    keys[1, :, s.block // 2], values[1, :, s.block // 2] = 2, 3
    token = np.ones((1, s.nkvh, s.dh), cache.dtype)
    operands = {"o0": cache, "o1": cache, "i2": token * 2, "i3": token * 3, "i4": np.array([slot], np.int64)}
    return Case(operands, {"o0": ("k_cache", keys), "o1": ("v_cache", values)})


def _rope(s: Sizes, index: str, create: tuple[str, ...]) -> Case:
    """A token at position 1, a quarter turn, and one at position 0, no turn."""
    half = s.dh // 2
    x = np.empty((2, s.nkvh, s.dh), NUMPY_DTYPES[s.dtype])
    x[:] = np.arange(s.dh) % 61 + 1
    y = x.copy()
    if "algo" in create:
        y[0, :, :half], y[0, :, half:] = -x[0, :, half:], x[0, :, :half]
    else:
        y[0, :, 0::2], y[0, :, 1::2] = -x[0, :, 1::2], x[0, :, 0::2]
    sin = np.repeat(np.array([[0], [1]], x.dtype), half, axis=1)
    positions = np.array([1, 0], NUMPY_DTYPES[index])
    operands = {"o0": np.full_like(x, _UNWRITTEN), "i0": x, "i1": positions, "i2": sin, "i3": sin[::-1].copy()}
    # A library that takes an algo although the build gives none reads the one that turns other pairs.
    padding = () if "algo" in create else (c_size_t(_ALGO_GPT_NEOX),)
    return Case(operands, {"o0": ("y", y)}, {"algo": c_int(_ALGO_GPT_NEOX)}, padding)


def _paged_attention_prefill(s: Sizes, index: str, create: tuple[str, ...]) -> Case:
    """Two new tokens after one cached; keys are all the same, so each sees the mean of the values up to its own."""
    dtype = NUMPY_DTYPES[s.dtype]
    blocks = -(-3 // s.block)
    keys = np.zeros((1 + blocks, s.nkvh, s.block, s.dh), dtype)
    values = np.full_like(keys, 96)
    for position in range(3):
        values[1 + position // s.block, :, position % s.block] = 3 * position
    q = np.ones((2, s.nh, s.dh), dtype)
    out = q.copy()
    out[0], out[1] = 1.5, 3
    integers = {"i3": [range(1, 1 + blocks)], "i4": [3], "i5": [0, 2]}
    operands = {"o0": np.full_like(q, _UNWRITTEN), "i0": q, "i1": keys, "i2": values}
    operands.update((k, np.array(v, NUMPY_DTYPES[index])) for k, v in integers.items())
    attributes = {"alibi": c_void_p(None), "scale": c_float(s.dh**-0.5)}
    return Case(operands, {"o0": ("out", out)}, attributes, needs="infinirtStreamBeginCapture")


_CASES: dict[str, Callable[[Sizes, str, tuple[str, ...]], Case]] = {
    "AddRMSNorm": _add_rms_norm,
    "PagedCaching": _paged_caching,
    "RoPE": _rope,
    "PagedAttentionPrefill": _paged_attention_prefill,
}

_passed: set[tuple[Any, ...]] = set()
_lock = threading.Lock()


def check(find: Callable[[str], Any], root: Path, manifest: Mapping[str, Any], device_id: int = 0) -> None:
    """Run the canaries of the operators that a build calls; once per process, library, device, sizes and argument order.

    The calling thread's current device stays as it is.

    Args:
        find: gives a function of the loaded InfiniCore, None if it has none of that name.
        root: the InfiniCore's folder, for messages.
        manifest: the build's.

    Raises:
        UnsupportedError: an operator is not supported on the device, refuses the arguments or computes something else.
        InfiniCoreError: the device itself does not work.
    """
    abi, wanted = manifest.get("abi") or {}, []
    for name, (create, call) in ORDERS.items():
        if f"infiniopCreate{name}Descriptor" in manifest["ops"]:
            order = abi.get(f"infiniop{name}") or (create.split(), call.split())
            wanted.append((name, tuple(order[0]), tuple(order[1])))
    if not wanted:
        return
    meta, device = manifest["meta"], int(manifest["device"])
    block = int(manifest["kv"]["block_size"]) or 16
    sizes = Sizes(manifest["dtype"], meta["d"], meta["nh"], meta["nkvh"], meta["dh"], meta["epsilon"], block)
    with _lock:
        todo = [item for item in wanted if (root, device, device_id, sizes, *item) not in _passed]
        if not todo:
            return
        failures: list[BaseException] = []

        def run() -> None:
            try:
                with ExitStack() as cleanup:
                    bench = _Bench(find, root, manifest["target"], cleanup)
                    status = bench.status("infinirtSetDevice", device, device_id)
                    if status:
                        what = f"infinirtSetDevice (device {device_id} of target {manifest['target']})"
                        raise InfiniCoreError(what, status, STATUS_NAMES.get(status, ""))
                    for name, create, call in todo:
                        _check(bench, name, create, call, sizes)
            except BaseException as error:
                failures.append(error)

        # The current device is a matter of each thread.
        thread = threading.Thread(target=run, name="canaries")
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        _passed.update((root, device, device_id, sizes, *item) for item in todo)


class _Bench:
    """One device of an InfiniCore, as far as a single call of an operator needs it. What is made here goes with ``cleanup``."""

    def __init__(self, find: Callable[[str], Any], root: Path, target: str, cleanup: ExitStack) -> None:
        self._find, self.root, self.target, self.cleanup = find, root, target, cleanup
        self._handle: c_void_p | None = None

    @property
    def library(self) -> Path:
        return self.root / "lib" / "libinfiniop.so"

    def status(self, function: str, *arguments: Any) -> int:
        found = self._find(function)
        if found is None:
            raise UnsupportedError(f"the InfiniCore at {self.root} has no {function}")
        return int(found(*arguments))

    def has(self, function: str) -> bool:
        return self._find(function) is not None

    def call(self, function: str, *arguments: Any) -> None:
        status = self.status(function, *arguments)
        if status:
            raise InfiniCoreError(function, status, STATUS_NAMES.get(status, ""))

    def handle(self) -> c_void_p:
        if self._handle is None:
            handle = c_void_p()
            self.call("infiniopCreateHandle", byref(handle))
            self._handle = handle
            self.cleanup.callback(self.status, "infiniopDestroyHandle", handle)
        return self._handle

    def memory(self, cleanup: ExitStack, size: int) -> c_void_p:
        pointer = c_void_p()
        self.call("infinirtMalloc", byref(pointer), c_size_t(size))
        cleanup.callback(self.status, "infinirtFree", pointer)
        return pointer

    def tensor(self, cleanup: ExitStack, values: np.ndarray) -> c_void_p:
        shape = (c_size_t * values.ndim)(*values.shape)
        strides = (c_ssize_t * values.ndim)(*(s // values.itemsize for s in values.strides))
        desc = c_void_p()
        code = c_int(DataType[f"INFINI_DTYPE_{_DTYPES[values.dtype].upper()}"])
        self.call("infiniopCreateTensorDescriptor", byref(desc), c_size_t(values.ndim), shape, strides, code)
        cleanup.callback(self.status, "infiniopDestroyTensorDescriptor", desc)
        return desc


def _check(bench: _Bench, name: str, create: tuple[str, ...], call: tuple[str, ...], sizes: Sizes) -> None:
    # Which integers an operator takes for positions, lengths and tables is not what is asked here.
    for index in ("i32", "i64"):
        case = _CASES[name](sizes, index, create)
        if case.needs and not bench.has(case.needs):
            raise UnsupportedError(
                f"{bench.library}: infiniop{name} may be older than this build expects, as there is no {case.needs} beside it: "
                "use an InfiniCore that has both"
            )
        if _computes(bench, name, create, call, case, other_dtype=index == "i32"):
            return


def _computes(
    bench: _Bench, name: str, create: tuple[str, ...], call: tuple[str, ...], case: Case, other_dtype: bool
) -> bool:
    """Run a case; False if create refuses a dtype and another one is left to be tried."""
    # A library that takes the operands in another order writes elsewhere: everywhere is room for the largest of them.
    room = max(values.nbytes for values in case.operands.values())
    with ExitStack() as cleanup:
        descs, memory = {}, {}
        for operand, values in case.operands.items():
            descs[operand] = bench.tensor(cleanup, values)
            memory[operand] = bench.memory(cleanup, room)
            bench.call("infinirtMemcpy", memory[operand], _address(values), c_size_t(values.nbytes), _MEMCPY_H2D)
        desc, size = c_void_p(), c_size_t(0)
        creating = f"infiniopCreate{name}Descriptor"
        arguments = [descs[a] if a in descs else case.attributes[a] for a in create]
        status = bench.status(creating, bench.handle(), byref(desc), *arguments, *case.padding)
        if status == _BAD_TENSOR_DTYPE and other_dtype:
            return False
        _accept(bench, name, creating, status)
        cleanup.callback(bench.status, f"infiniopDestroy{name}Descriptor", desc)
        bench.call(f"infiniopGet{name}WorkspaceSize", desc, byref(size))
        workspace = bench.memory(cleanup, size.value) if size.value else c_void_p(None)
        arguments = [memory[a] if a in memory else case.attributes[a] for a in call]
        status = bench.status(f"infiniop{name}", desc, workspace, size, *arguments, c_void_p(None), *case.padding)
        # A device may report what is wrong only once it has done the work.
        status = status or bench.status("infinirtDeviceSynchronize")
        _accept(bench, name, f"infiniop{name}", status)
        for operand, (what, expected) in case.results.items():
            got = np.empty(expected.shape, expected.dtype)
            bench.call("infinirtMemcpy", _address(got), memory[operand], c_size_t(got.nbytes), _MEMCPY_D2H)
            wrong = ~(np.abs(got.astype(np.float64) - expected.astype(np.float64)) <= _TOLERANCE)
            if wrong.any():
                at = np.unravel_index(int(wrong.argmax()), wrong.shape)
                raise UnsupportedError(
                    f"{bench.library}: infiniop{name} computes something else than this build was compiled for "
                    f"({what} is {float(got[at]):g} where it must be {float(expected[at]):g}): rebuild with --infinicore {bench.root}"
                )
    return True


def _accept(bench: _Bench, name: str, function: str, status: int) -> None:
    said = f"{function} gives status {status} ({STATUS_NAMES.get(status, 'unknown')})"
    if status in _NOT_SUPPORTED:
        raise UnsupportedError(f"{bench.library}: infiniop{name} is not supported on {bench.target} here: {said}")
    if status in _ARGUMENTS_REFUSED:
        raise UnsupportedError(
            f"{bench.library}: infiniop{name} does not take its arguments as this build was compiled to give them: {said}; "
            f"rebuild with --infinicore {bench.root}"
        )
    if status:
        raise InfiniCoreError(function, status, STATUS_NAMES.get(status, ""))


def _address(values: np.ndarray) -> c_void_p:
    return c_void_p(values.ctypes.data)

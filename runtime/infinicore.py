"""Loading one InfiniCore into the process: the embedded one, or an installed one (INFINI_ROOT).

An engine does not link InfiniCore; its symbols are resolved against the libraries loaded here. Two InfiniCores in one
process would silently share the first one's symbols, so a second, different one is refused.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import canaries
from runtime.errors import BuildError, ConfigError, InfiniCoreError, UnsupportedError
from runtime.structs import STATUS_NAMES, DeviceType

LIBRARIES = ("libinfinirt.so", "libinfiniop.so", "libinfiniccl.so")
PROBE_SYMBOL = "infiniopCreateHandle"
EMBEDDED_SYMBOL = "infinicpuIsa"
SIMULATOR_SYMBOL = "infinicpuSimulate"
# What tensor parallelism calls at least.
COLLECTIVES = ("CommInitAll", "CommDestroy", "AllReduce")

# Declared by every InfiniCore, implemented for its CPU by none: a build made for the embedded library may use them.
NOT_ON_A_REAL_CPU = (
    "PagedCaching",
    "PagedAttention",
    "PagedAttentionPrefill",
    "KVCaching",
    "SiluAndMul",
    "Softmax",
    "FlashAttention",
    "I8Gemm",
    "PerChannelQuantI8",
    "DequantizeAWQ",
    "DequantizeGPTQ",
)


@dataclass(frozen=True)
class Provider:
    """The InfiniCore that this process uses."""

    root: Path
    embedded: bool
    handles: tuple[ctypes.CDLL, ...]

    def has(self, symbol: str) -> bool:
        return any(hasattr(handle, symbol) for handle in self.handles)

    def function(self, symbol: str) -> Any:
        """A function of it for ctypes, or None."""
        return next((getattr(handle, symbol) for handle in self.handles if hasattr(handle, symbol)), None)


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    ]


_lock = threading.Lock()
_loaded: Provider | None = None
_simulated: dict[int, Any] = {}  # the records that play, by device


def file_of_symbol(library: ctypes.CDLL, symbol: str) -> Path | None:
    """The shared object that ``symbol``, looked up through ``library``, really lies in; None if there is none."""
    try:
        address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p)
    except AttributeError:
        return None
    info = _DlInfo()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes, dladdr.restype = [ctypes.c_void_p, ctypes.POINTER(_DlInfo)], ctypes.c_int
    if not dladdr(address, ctypes.byref(info)) or not info.dli_fname:
        return None
    return Path(os.fsdecode(info.dli_fname)).resolve()


def set_threads(threads: int | None) -> None:
    """How many threads the embedded library uses; None leaves it alone. Not while a call is running."""
    if threads is None:
        return
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= 4096:
        raise ConfigError(f"threads is {threads!r}, expected a whole number from 1 to 4096")
    os.environ["INFINICPU_THREADS"] = str(threads)  # read when the library is loaded
    if _loaded is not None and _loaded.embedded:
        _call(_loaded, "infinicpuSetNumThreads", threads)


def is_embedded() -> bool:
    """Whether the InfiniCore that is loaded is the embedded one."""
    return _loaded is not None and _loaded.embedded


def set_noop(on: bool) -> None:
    """Let every operator of the embedded library return at once, without computing: what is left is the host's own time."""
    if _loaded is None or not _loaded.embedded:
        raise UnsupportedError("only the embedded InfiniCore can leave its operators out")
    _call(_loaded, "infinicpuSetNoop", int(on))


def description() -> dict[str, Any]:
    """Which InfiniCore this process uses: root, and for the embedded one its instruction set and threads."""
    if _loaded is None:
        return {}
    found: dict[str, Any] = {"infinicore": "embedded" if _loaded.embedded else str(_loaded.root)}
    if _loaded.embedded:
        library, threads = _loaded.handles[1], ctypes.c_int()
        library.infinicpuIsa.restype = ctypes.c_char_p
        _call(_loaded, "infinicpuGetNumThreads", ctypes.byref(threads))
        found.update(isa=library.infinicpuIsa().decode(), threads=threads.value)
    return found


def _call(provider: Provider, function: str, *arguments: Any) -> None:
    for handle in provider.handles:
        if hasattr(handle, function):
            status = getattr(handle, function)(*arguments)
            if status:
                raise InfiniCoreError(function, status, STATUS_NAMES.get(status, ""))
            return
    raise UnsupportedError(f"the InfiniCore at {provider.root} has no {function}")


def choose(manifest: dict[str, Any]) -> Path:
    """The root folder of the InfiniCore for a build: INFINI_ROOT, else what the manifest says.

    A build for the simulator takes the embedded library, whatever INFINI_ROOT says: no other has one. Any other build for a device other than the CPU needs an
    installed InfiniCore.
    """
    target, device = manifest["target"], int(manifest["device"])
    asked = manifest["infinicore"]
    from_environment = None if manifest.get("simulate") else os.environ.get("INFINI_ROOT")
    if from_environment:
        return _folder(Path(from_environment), "INFINI_ROOT")
    if asked not in ("embedded", "any") and not manifest.get("simulate"):
        return _folder(Path(asked), "the build's InfiniCore")
    if device != DeviceType.DEVICE_TYPE_CPU and not manifest.get("simulate"):
        raise UnsupportedError(
            f"this build is for target {target}: set INFINI_ROOT to an InfiniCore built with {target}, "
            "or build with --simulate"
        )
    from runtime import infinicpu  # compiles the embedded library on first use

    return Path(infinicpu.build()).resolve()


def _folder(root: Path, what: str) -> Path:
    root = root.expanduser().resolve()
    if not (root / "lib" / "libinfiniop.so").is_file():
        raise BuildError(f"{what} is {root}: expected an InfiniCore there, found no lib/libinfiniop.so")
    return root


def load(manifest: dict[str, Any], *, ndev: int = 1, device_id: int = 0) -> Provider:
    """Load the InfiniCore that a build needs, and check that it has every op that the build calls, with the meaning that the build expects.

    Args:
        manifest: the build's.
        ndev: devices that the model shall run on; more than one need collectives.
        device_id: a device that the model shall run on, for the checks that compute something.

    Raises:
        BuildError: it is not there, not loadable, or a second one in this process.
        ConfigError: there is no such device.
        UnsupportedError: an op is missing, or takes its arguments otherwise than the build gives them.
        InfiniCoreError: the device does not work.
    """
    global _loaded
    with _lock:
        if not _is_good_enough(manifest):
            root = choose(manifest)
            if _loaded is None:
                _loaded = _open(root, manifest["ops"])
            elif root != _loaded.root:
                raise BuildError(_second(_loaded.root, root))
        provider = _loaded
        assert provider is not None
        check_ops(provider, manifest)
        check_collectives(provider, manifest, ndev)
        if manifest.get("simulate"):
            _simulate(provider, manifest)
        elif int(manifest["device"]) in _simulated:
            _stop_simulating(provider, manifest)
    check_devices(provider, manifest, [device_id])
    canaries.check(provider.function, provider.root, manifest, device_id)
    return provider


def _simulate(provider: Provider, manifest: dict[str, Any]) -> None:
    """Let the embedded library play the device that the build is for; a record that plays already stays."""
    device, record = int(manifest["device"]), manifest["simulate"]
    if _simulated.get(device) == record:
        return
    from runtime.infinicpu import simulator

    library = next(handle for handle in provider.handles if hasattr(handle, SIMULATOR_SYMBOL))
    simulator.simulate(library, record)
    _simulated[device] = record


def _stop_simulating(provider: Provider, manifest: dict[str, Any]) -> None:
    """A build for the real device after one for the simulated: the records go, which takes that nobody uses them."""
    from runtime.infinicpu import simulator

    library = next(handle for handle in provider.handles if hasattr(handle, SIMULATOR_SYMBOL))
    try:
        simulator.simulate(library, None)
    except InfiniCoreError:
        raise UnsupportedError(
            f"this process simulates {manifest['target']}, and simulated devices are in use: close their models first, "
            "or use a process of its own"
        ) from None
    _simulated.clear()


def _is_good_enough(manifest: dict[str, Any]) -> bool:
    """Whether what is loaded needs no further look: the build takes any, or the embedded one and has it."""
    if _loaded is None:
        return False
    if manifest.get("simulate"):
        return _loaded.embedded
    if os.environ.get("INFINI_ROOT"):
        return False
    if _loaded.embedded and int(manifest["device"]) != DeviceType.DEVICE_TYPE_CPU:
        return False  # it has no such device
    return manifest["infinicore"] == "any" or (manifest["infinicore"] == "embedded" and _loaded.embedded)


def check_ops(provider: Provider, manifest: dict[str, Any]) -> None:
    """UnsupportedError naming the first op that the build calls and this InfiniCore has not."""
    for symbol in manifest["ops"]:
        real_cpu = manifest["record"] == "embedded" and not provider.embedded
        if not provider.has(symbol) or (real_cpu and _base_name(symbol) in NOT_ON_A_REAL_CPU):
            raise UnsupportedError(
                f"the InfiniCore at {provider.root} has no {symbol}, which this build (record {manifest['record']}) "
                "calls: rebuild with --infinicore DIR for that InfiniCore"
            )


def check_collectives(provider: Provider, manifest: dict[str, Any], ndev: int) -> None:
    """UnsupportedError naming the first function of infiniccl that several devices need and this InfiniCore has not."""
    for name in manifest.get("collectives") or COLLECTIVES if ndev > 1 else ():
        if not provider.has(f"infiniccl{name}"):
            raise UnsupportedError(
                f"the InfiniCore at {provider.root} has no infiniccl{name}, which {ndev} devices need: use one device"
            )


def device_count(provider: Provider, device: int) -> int | None:
    """How many devices of a type there are; None if this InfiniCore cannot say."""
    function, count = provider.function("infinirtGetDeviceCount"), ctypes.c_int()
    if function is None or function(ctypes.c_int(device), ctypes.byref(count)):
        return None
    return count.value


def check_devices(provider: Provider, manifest: dict[str, Any], numbers: Iterable[int]) -> None:
    """ConfigError naming the first of these devices of the build's type that is not there."""
    count, target = device_count(provider, int(manifest["device"])), manifest["target"]
    for number in numbers if count is not None else ():
        if number >= (count or 0):
            there = f"{count}, numbered from 0" if count else "none"
            raise ConfigError(
                f"there is no device {number} of target {target}: the InfiniCore at {provider.root} has {there}"
            )


def _base_name(symbol: str) -> str:
    """``PagedCaching`` of infiniopCreatePagedCachingDescriptor, infiniopPagedCaching, ..."""
    name = symbol.removeprefix("infiniop")
    for prefix, suffix in (("Create", "Descriptor"), ("Destroy", "Descriptor"), ("Get", "WorkspaceSize")):
        if name.startswith(prefix) and name.endswith(suffix):
            return name[len(prefix) : -len(suffix)]
    return name


def _open(root: Path, ops: Iterable[str]) -> Provider:
    already = file_of_symbol(ctypes.CDLL(None), PROBE_SYMBOL)
    if already is not None and already != (root / "lib" / "libinfiniop.so").resolve():
        raise BuildError(_second(already, root))
    handles = []
    for name in LIBRARIES:
        path = root / "lib" / name
        if name == "libinfiniccl.so" and not path.is_file() and not any(op.startswith("infiniccl") for op in ops):
            continue  # collectives are an optional part of an installation
        try:
            handles.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL | os.RTLD_NOW))
        except OSError as error:
            raise BuildError(f"{path} cannot be loaded: {error}") from None
    provider = Provider(root, hasattr(handles[1], EMBEDDED_SYMBOL), tuple(handles))
    actual = file_of_symbol(handles[1], PROBE_SYMBOL)
    if actual is None:
        raise BuildError(f"{root}/lib/libinfiniop.so has no {PROBE_SYMBOL}: expected an InfiniCore")
    if actual.parent != (root / "lib" / "libinfiniop.so").resolve().parent:
        raise BuildError(_second(actual, root))
    if provider.has("infinirtInit"):
        status = handles[0].infinirtInit()
        if status:
            raise InfiniCoreError("infinirtInit", status, STATUS_NAMES.get(status, ""))
    return provider


def _second(first: Path, second: Path) -> str:
    return f"this process already uses the InfiniCore at {first}: {second} needs a process of its own"

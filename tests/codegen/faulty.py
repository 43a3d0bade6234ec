"""Engines between which and InfiniCore faults.cpp stands: calls are counted by device, and any one of them can be made to fail."""

from __future__ import annotations

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from codegen.build import headers
from codegen.toolchain import compile_engine
from runtime import infinicore
from runtime.manifest import read_build
from tests.codegen.engines import Builder
from tests.codegen.simulated import config

SHIM = Path(__file__).with_name("faults.cpp")
PLANTED = 10  # a status that nothing here gives by itself


# Paged caches, captured decode steps, logits that are gathered from all devices; and none of these.
FAULTY = {"paged": ("nvidia", "bf16", "paged"), "contiguous": ("cambricon", "f32", "contiguous")}


@lru_cache(maxsize=None)
def faulty_builds(builder: Builder) -> dict[str, Path]:
    """Builds of simulated.MODEL with the shim in their libraries, by key of FAULTY; the emitted source is as it always is."""
    checkpoint = builder.checkpoint(config())

    def build(kv: str) -> Path:
        options = dict(zip(("target", "dtype", "kv"), FAULTY[kv]))
        sources = builder(checkpoint, simulate=True, emit_only=True, **options)
        folder = builder.root / f"faulty-{kv}"
        shutil.copytree(sources, folder)
        shutil.copy(SHIM, folder)
        # The library's own definitions before those that are loaded already.
        with (folder / "CMakeLists.txt").open("a") as file:
            file.write(f"target_sources(qwen3 PRIVATE {SHIM.name})\n")
            file.write("target_link_options(qwen3 PRIVATE -Wl,-Bsymbolic-functions)\n")
            file.write("target_link_libraries(qwen3 PRIVATE ${CMAKE_DL_LIBS})\n")
        compile_engine(folder, headers("embedded"), optimise=False)
        return folder

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAULTY, pool.map(build, FAULTY)))


class Faults:
    """The shim of one build; nothing is planted at first.

    Args:
        build: one of faulty_builds().
    """

    def __init__(self, build: Path) -> None:
        found = read_build(build)
        infinicore.load(found.data)
        self._library = ctypes.CDLL(str(found.library))
        self._library.faultsCount.restype = ctypes.c_uint64
        for name in ("faultsLiveAllocations", "faultsFailedFrees"):
            getattr(self._library, name).restype = ctypes.c_int64
        self._library.faultsPlant.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
        self.clear()

    def plant(self, function: str, device: int = -1, after: int = 0, status: int = PLANTED) -> None:
        """The call of ``function`` on ``device`` (-1: on any) that comes after ``after`` others from now on fails, once."""
        self._library.faultsPlant(function.encode(), device, after, status)

    def clear(self) -> None:
        self._library.faultsPlant(None, -1, 0, 0)

    @property
    def met(self) -> bool:
        """Whether the planted call has come."""
        return bool(self._library.faultsMet())

    def count(self, function: str, device: int) -> int:
        """Calls of a function on a device since the library was loaded."""
        return self._library.faultsCount(function.encode(), device)

    @property
    def live_allocations(self) -> int:
        """Device and page-locked host memory that was taken and not given back."""
        return self._library.faultsLiveAllocations()

    @property
    def failed_frees(self) -> int:
        return self._library.faultsFailedFrees()

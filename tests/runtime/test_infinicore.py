"""One InfiniCore per process, chosen by the build and INFINI_ROOT. Libraries here are empty shells with the right names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtime import fakes

SHELLS = {
    "libinfinirt.so": "int inits = 0; int infinirtInit() { inits++; return INIT_STATUS; } int getInits() { return inits; }",
    "libinfiniop.so": "int infiniopCreateHandle() { return 0; } int infiniopGemm() { return 0; } "
    "int infiniopPagedCaching() { return 0; } EXTRA",
    "libinfiniccl.so": "int infinicclAllReduce() { return 0; }",
}


def shells(root: Path, extra: str = "", init_status: int = 0, without: tuple[str, ...] = ()) -> Path:
    (root / "lib").mkdir(parents=True)
    for name, code in SHELLS.items():
        if name not in without:
            source = root / f"{name}.cc"
            code = code.replace("EXTRA", extra).replace("INIT_STATUS", str(init_status))
            source.write_text(f'extern "C" {{ {code} }}')
            fakes.compile_library(source, root / "lib" / name)
    return root


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shells(tmp_path_factory.mktemp("real") / "infini")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shells(tmp_path_factory.mktemp("other") / "infini")


def manifest(**changes: Any) -> dict[str, Any]:
    return {"target": "cpu", "device": 0, "record": "cpu", "infinicore": "any", "ops": ["infiniopGemm"], **changes}


def load(*manifests: dict[str, Any], root: Path | None = None, before: str = "") -> str:
    """Load each manifest in one fresh process; returns what the last one printed, or its error."""
    script = f"""
import ctypes, json, sys
from runtime import infinicore
from runtime.errors import Qwen3Error
{before}
try:
    for manifest in json.loads(sys.argv[1]):
        provider = infinicore.load(manifest)
    print(provider.root, provider.embedded, provider.handles[0].getInits(), len(provider.handles))
except Qwen3Error as error:
    print(type(error).__name__, error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "INFINI_ROOT"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    if root is not None:
        environment["INFINI_ROOT"] = str(root)
    command = [sys.executable, "-c", script, json.dumps(manifests)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def test_infini_root_is_used_and_initialised_once(real: Path) -> None:
    assert load(manifest(), manifest(), root=real) == f"{real} False 1 3"


def test_infini_root_overrides_the_manifest(real: Path, other: Path) -> None:
    assert load(manifest(infinicore=str(other)), root=real).startswith(str(real))
    assert load(manifest(infinicore=str(other))).startswith(str(other))


def test_the_embedded_library_is_known_by_its_own_symbol(tmp_path: Path) -> None:
    root = shells(tmp_path / "infini", extra='const char *infinicpuIsa() { return "portable"; }')
    assert load(manifest(record="embedded", ops=["infiniopPagedCaching"]), root=root) == f"{root} True 1 3"


def test_a_second_infinicore_is_refused(real: Path, other: Path) -> None:
    found = load(manifest(infinicore=str(real)), manifest(infinicore=str(other)))
    assert found == (
        f"BuildError this process already uses the InfiniCore at {real}: {other} needs a process of its own"
    )
    # A build that runs on any takes the one that is there.
    assert load(manifest(infinicore=str(real)), manifest()).startswith(str(real))


def test_an_infinicore_that_somebody_else_loaded_is_noticed(real: Path, other: Path) -> None:
    before = f"ctypes.CDLL({str(other / 'lib' / 'libinfiniop.so')!r}, mode=ctypes.RTLD_GLOBAL)"
    found = load(manifest(), root=real, before=before)
    assert found.startswith(f"BuildError this process already uses the InfiniCore at {other}/lib/libinfiniop.so")


def test_missing_ops_are_named(real: Path) -> None:
    found = load(manifest(ops=["infiniopGemm", "infiniopRoPE", "infiniopAdd"]), root=real)
    assert found == (
        f"UnsupportedError the InfiniCore at {real} has no infiniopRoPE, which this build (record cpu) calls: "
        "rebuild with --infinicore DIR for that InfiniCore"
    )


@pytest.mark.parametrize("symbol", ["infiniopPagedCaching", "infiniopCreatePagedCachingDescriptor"])
def test_a_build_for_the_embedded_library_needs_it(real: Path, symbol: str) -> None:
    """Every InfiniCore exports paged_caching; on its CPU it only fails, at the first step."""
    found = load(manifest(record="embedded", ops=["infiniopGemm", symbol]), root=real)
    assert found.startswith("UnsupportedError") and symbol in found


def test_other_devices_need_an_installation(real: Path) -> None:
    nvidia = manifest(target="nvidia", device=1, record="nvidia")
    assert "this build is for target nvidia: set INFINI_ROOT to an InfiniCore built with nvidia" in load(nvidia)
    assert load(nvidia, root=real) == f"{real} False 1 3"


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert load(manifest(), root=tmp_path) == (
        f"BuildError INFINI_ROOT is {tmp_path}: expected an InfiniCore there, found no lib/libinfiniop.so"
    )
    assert "the build's InfiniCore is" in load(manifest(infinicore=str(tmp_path)))


def test_broken_libraries(tmp_path: Path) -> None:
    root = shells(tmp_path / "a")
    (root / "lib" / "libinfinirt.so").write_bytes(b"nothing")
    assert "libinfinirt.so cannot be loaded" in load(manifest(), root=root)
    assert "InfiniCoreError infinirtInit failed with status 7" in load(
        manifest(), root=shells(tmp_path / "b", init_status=7)
    )
    # Collectives are optional, unless the build calls them.
    root = shells(tmp_path / "c", without=("libinfiniccl.so",))
    assert load(manifest(), root=root) == f"{root} False 1 2"
    assert "libinfiniccl.so cannot be loaded" in load(manifest(ops=["infinicclAllReduce"]), root=root)

"""One InfiniCore per process, chosen by the build and INFINI_ROOT. Libraries here are empty shells with the right names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
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


def load(
    *manifests: dict[str, Any],
    root: Path | None = None,
    before: str = "",
    options: str = "",
    show: str = "provider.root, provider.embedded, provider.handles[0].getInits(), len(provider.handles)",
) -> str:
    """Load each manifest in one fresh process; returns what ``show`` gives after the last one, or its error."""
    script = f"""
import ctypes, json, sys
from runtime import infinicore
from runtime.errors import Qwen3Error
{before}
try:
    for manifest in json.loads(sys.argv[1]):
        provider = infinicore.load(manifest{options})
    print({show})
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


def test_the_embedded_library_stays_no_other_device() -> None:
    build = manifest(infinicore="embedded", record="embedded", ops=[])
    for asked in ("any", "embedded"):
        nvidia = manifest(target="nvidia", device=1, record="nvidia", infinicore=asked, ops=[])
        assert "this build is for target nvidia: set INFINI_ROOT" in load(build, nvidia)


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


# --- operators that changed while their symbols stayed --------------------------------------------------------------------------------------------

NAMES = ("AddRMSNorm", "PagedCaching", "RoPE", "PagedAttentionPrefill")
META = dict(d=24, nh=6, nkvh=2, dh=8, epsilon=1e-6)
OLD_ABI = {
    "AddRMSNorm": [["o0", "i0", "i1", "i2", "epsilon", "o1"], ["o0", "i0", "i1", "i2", "o1"]],
    "PagedCaching": [["i2", "i3", "o0", "o1", "i4"]] * 2,
    "RoPE": [["o0", "i0", "i1", "i2", "i3"]] * 2,
}
DEFINITIONS = {"AddRMSNorm": "OLD_ADD_RMS_NORM", "PagedCaching": "OLD_PAGED_CACHING", "RoPE": "OLD_ROPE"}


@pytest.fixture(scope="module")
def era(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``era(*definitions)``: an InfiniCore that is compiled from fake_infinicore.cpp with them, once each."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*definitions: str) -> Path:
        if definitions not in made:
            root = shells(tmp_path_factory.mktemp("era") / "infini", without=("libinfiniop.so", "libinfiniccl.so"))
            source = Path(__file__).parent / "fake_infinicore.cpp"
            fakes.compile_library(source, root / "lib" / "libinfiniop.so", *(f"-D{d}" for d in definitions))
            made[definitions] = root
        return made[definitions]

    return make


def calling(*names: str, **changes: Any) -> dict[str, Any]:
    """The manifest of a build that calls these operators."""
    parts = ("Create{}Descriptor", "Get{}WorkspaceSize", "{}", "Destroy{}Descriptor")
    ops = [f"infiniop{part.format(name)}" for name in names for part in parts]
    given = dict(dtype="f32", meta=META, kv=dict(form="paged", block_size=4), abi=None)
    return manifest(ops=ops, **{**given, **changes})


def old_abi(*names: str) -> dict[str, Any]:
    return {f"infiniop{name}": OLD_ABI[name] for name in names}


ALIVE = "provider.function('getLive')()"


def test_operators_that_mean_what_the_build_expects_pass(era: Callable[..., Path]) -> None:
    assert load(calling(*NAMES), root=era(), show=ALIVE) == "0"  # and nothing is left behind
    today = old_abi("AddRMSNorm") | {"infiniopAddRMSNorm": [["o0", "o1", "i0", "i1", "i2", "epsilon"]] * 1}
    today["infiniopAddRMSNorm"].append(["o0", "o1", "i0", "i1", "i2"])
    assert load(calling(*NAMES, abi=today), root=era(), show=ALIVE) == "0"


@pytest.mark.parametrize("name", OLD_ABI)
def test_an_older_library_passes_for_a_build_that_was_made_for_it(name: str, era: Callable[..., Path]) -> None:
    root = era(DEFINITIONS[name])
    assert load(calling(*NAMES, abi=old_abi(name)), root=root, show=ALIVE) == "0"


@pytest.mark.parametrize(
    "name, found",
    [
        ("AddRMSNorm", "computes something else than this build was compiled for (y is "),
        (
            "PagedCaching",
            "does not take its arguments as this build was compiled to give them: infiniopCreatePagedCachingDescriptor "
            "gives status 11 (BAD_TENSOR_SHAPE)",
        ),
        ("RoPE", "computes something else than this build was compiled for (y is "),
    ],
)
def test_an_order_that_is_not_the_librarys_is_refused(name: str, found: str, era: Callable[..., Path]) -> None:
    for root, abi in ((era(DEFINITIONS[name]), None), (era(), old_abi(name))):
        said = load(calling(*NAMES, abi=abi), root=root)
        assert said.startswith(f"UnsupportedError {root}/lib/libinfiniop.so: infiniop{name} {found}")
        assert said.endswith(f"rebuild with --infinicore {root}") and "\n" not in said
        # Operators that the build does not call are its own affair.
        assert load(calling(*(n for n in NAMES if n != name), abi=abi), root=root, show=ALIVE) == "0"


def test_lengths_that_mean_something_else_are_refused(era: Callable[..., Path]) -> None:
    said = load(calling("PagedAttentionPrefill"), root=era("HISTORY_LENGTHS"))
    assert "infiniopPagedAttentionPrefill computes something else" in said and "where it must be 1.5" in said
    # A library of before 2026-01-09 may take a pointer more and would not survive a call.
    said = load(calling("PagedAttentionPrefill"), root=era("WITHOUT_CAPTURE"))
    assert "infiniopPagedAttentionPrefill may be older than this build expects" in said


def test_integers_may_have_to_be_wide(era: Callable[..., Path]) -> None:
    assert load(calling(*NAMES), root=era("WIDE_INTEGERS"), show=ALIVE) == "0"


@pytest.mark.parametrize(
    "status, said",
    [
        (5, "UnsupportedError {lib}: infiniopRoPE is not supported on cpu here: {create} gives status 5 (DEVICE_TYPE_NOT_SUPPORTED)"),
        (12, "UnsupportedError {lib}: infiniopRoPE does not take its arguments as this build was compiled to give them: {create} gives status 12 (BAD_TENSOR_STRIDES); rebuild with --infinicore {root}"),
        (1, "InfiniCoreError {create} failed with status 1: INTERNAL_ERROR"),
    ],
)  # fmt: skip
def test_what_creating_says_is_passed_on(status: int, said: str, era: Callable[..., Path]) -> None:
    root = era(f"CREATE_STATUS={status}")
    lib, create = root / "lib" / "libinfiniop.so", "infiniopCreateRoPEDescriptor"
    assert load(calling("RoPE"), root=root) == said.format(lib=lib, create=create, root=root)


def test_each_is_run_once_and_on_a_thread_of_its_own(era: Callable[..., Path]) -> None:
    """What counts calls is a wrapper around the function that finds the library's."""
    before = """
from runtime import canaries
found, check = [], canaries.check
def counting(find, *rest):
    check(lambda name: (found.append(name), find(name))[1], *rest)
canaries.check = counting
device = ctypes.c_int()
"""
    show = (
        "found.count('infiniopRoPE'), provider.function('infinirtGetDevice')(ctypes.byref(device), None), device.value"
    )
    sizes = {**META, "d": 48}
    manifests = [calling("RoPE"), calling("RoPE", "AddRMSNorm"), calling("RoPE")]
    assert load(*manifests, root=era(), before=before, show=show) == "1 0 -1"
    # Another build's sizes are another matter.
    assert load(*manifests, calling("RoPE", meta=sizes), root=era(), before=before, show=show) == "2 0 -1"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_embedded_library_means_what_builds_expect(dtype: str) -> None:
    build = calling(*NAMES, dtype=dtype, infinicore="embedded", record="embedded", meta={**META, "dh": 64})
    assert load(build, show="provider.embedded") == "True"
    said = load({**build, "abi": old_abi("AddRMSNorm")}, show="provider.embedded")
    assert "libinfiniop.so: infiniopAddRMSNorm " in said and said.startswith("UnsupportedError")


# --- several devices, and devices that are not there ----------------------------------------------------------------------------------------------


def test_several_devices_need_collectives(real: Path, tmp_path: Path) -> None:
    build = manifest(collectives=["AllReduce"])
    assert load(build, root=real, options=", ndev=2") == f"{real} False 1 3"
    said = load({**build, "collectives": ["AllReduce", "AllGather"]}, root=real, options=", ndev=4")
    assert said == (
        f"UnsupportedError the InfiniCore at {real} has no infinicclAllGather, which 4 devices need: use one device"
    )
    assert "has no infinicclCommInitAll, which 2 devices need" in load(manifest(), root=real, options=", ndev=2")
    root = shells(tmp_path / "one", without=("libinfiniccl.so",))
    assert load(build, root=root).startswith(str(root))
    assert "has no infinicclAllReduce, which 2 devices need" in load(build, root=root, options=", ndev=2")


# In place of runtime.infinicpu.simulator: what the library is asked for.
PLAYED = """
import types
played = []
module = types.ModuleType("runtime.infinicpu.simulator")
module.simulate = lambda library, record: played.append((hasattr(library, "infinicpuSimulate"), record["name"]))
sys.modules["runtime.infinicpu.simulator"] = module
"""


def embedded(root: Path) -> Path:
    """Shells that look like the embedded library with its simulator."""
    extra = 'int infinicpuSimulate(const char *) { return 0; } const char *infinicpuIsa() { return "portable"; }'
    return shells(root, extra=extra)


def instead_of_the_embedded(root: Path) -> str:
    return f"from runtime import infinicpu\ninfinicpu.build = lambda: {str(root)!r}\n{PLAYED}"


def test_a_simulated_device_is_registered_once(tmp_path: Path) -> None:
    root = embedded(tmp_path / "infini")
    played = instead_of_the_embedded(root)
    ascend = manifest(target="ascend", record="ascend", device=3, simulate={"name": "ascend", "device": 3})
    cambricon = manifest(target="cambricon", record="cambricon", device=2, simulate={"name": "cambricon", "device": 2})
    show = "*played"
    assert load(ascend, ascend, cambricon, ascend, before=played, show=show) == ("(True, 'ascend') (True, 'cambricon')")
    changed = {**ascend, "simulate": {"name": "other", "device": 3}}
    assert load(ascend, changed, before=played, show=show) == "(True, 'ascend') (True, 'other')"
    assert load(manifest(simulate=None), before=played, show=show) == ""


def test_infini_root_is_not_for_simulated_builds(real: Path, tmp_path: Path) -> None:
    root = embedded(tmp_path / "infini")
    played = instead_of_the_embedded(root)
    ascend = manifest(target="ascend", record="ascend", device=3, simulate={"name": "ascend", "device": 3})
    for root_of_the_person in (None, real, tmp_path):
        assert load(ascend, ascend, root=root_of_the_person, before=played) == f"{root} True 1 3"
    # One InfiniCore per process holds for it as well, and the other one is not taken for it.
    assert load(manifest(), ascend, root=real, before=played).startswith(
        f"BuildError this process already uses the InfiniCore at {real}"
    )


@pytest.mark.parametrize("count, there", [(3, "3, numbered from 0"), (0, "none")])
def test_a_device_that_is_not_there_is_named(tmp_path: Path, count: int, there: str) -> None:
    extra = f"int infinirtGetDeviceCount(int device, int *count) {{ *count = device == 4 ? {count} : 9; return 0; }}"
    root = shells(tmp_path / "infini", extra=extra)
    metax = manifest(target="metax", record="metax", device=4)
    assert load(metax, root=root, options=", device_id=3") == (
        f"ConfigError there is no device 3 of target metax: the InfiniCore at {root} has {there}"
    )
    if count:
        assert load(metax, root=root, options=", device_id=2") == f"{root} False 1 3"


def test_an_infinicore_that_cannot_count_its_devices_is_taken(tmp_path: Path) -> None:
    root = shells(tmp_path / "infini", extra="int infinirtGetDeviceCount(int, int *count) { *count = 0; return 5; }")
    assert load(manifest(), root=root, options=", device_id=3") == f"{root} False 1 3"

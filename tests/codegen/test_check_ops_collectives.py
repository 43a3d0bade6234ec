"""check-ops where devices meet: which calls are run, what their bound allows, and that planted faults and hangs are found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.calls import CallSpec
from codegen.check_ops import compare
from codegen.check_ops_bounds import expect
from codegen.check_ops_calls import OpCall, Tensor
from codegen.check_ops_cases import Case, cases_of
from codegen.command_check_ops import uses_of
from ir.types import DTYPES
from runtime import infinicpu
from runtime.manifest import read_build
from tests.codegen.engines import EXAMPLE

HIDDEN, VOCABULARY = 160, 608  # of the example


def command(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "codegen", "check-ops", str(folder), *options]
    return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def folder(build_engine) -> Path:
    return build_engine(EXAMPLE, dtype="bf16", emit_only=True)


# --- what is run ----------------------------------------------------------------------------------------------------------------------------------


def test_the_calls_are_those_of_the_engine(folder):
    found = read_build(folder)
    uses, left_out, steps = uses_of(found, 9, 2)
    assert left_out == []
    sums = [use for use in uses if use.call.op == "infini.all_reduce"]
    tokens = {sum(step["tokens"]) for step in steps.values()}
    assert {use.call["o0"].shape for use in sums} == {(n, HIDDEN) for n in tokens}
    for use in sums:  # in place, and one where the attention and one where the feed-forward block ends
        assert use.call["i0"] == use.call["o0"] and use.call.in_place == (("o0", "i0"),)
        assert len(use.values) == 2
    gathers = {use.call["o0"].shape: use.call for use in uses if use.call.op == "infini.all_gather"}
    requests = {len(step["tokens"]) for step in steps.values()}
    assert set(gathers) == {(2, n, VOCABULARY // 2) for n in requests}
    assert all(call["i0"].shape == shape[1:] and not call.in_place for shape, call in gathers.items())
    assert uses_of(found, 9, 1)[1] == ["infini.all_gather", "infini.all_reduce"]


# --- the bound ------------------------------------------------------------------------------------------------------------------------------------


def sum_of(dtype: str, ndev: int, shape: tuple[int, ...] = (3, 37)) -> OpCall:
    tensor = Tensor(dtype, shape, (shape[1], 1))
    spec = CallSpec("AllReduce", ("o0", "i0"), ("i0", "o0"), False)
    return OpCall("infini.all_reduce", spec, (("o0", tensor), ("i0", tensor)), (("ndev", ndev),), (("o0", "i0"),))


def share(call: OpCall, case: Case, found: np.ndarray) -> float:
    return compare(case.name, "o0", found, expect(call, case)["o0"]).share


def in_float32(parts: np.ndarray) -> np.ndarray:
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total = total + part.astype(np.float32)
    return total.astype(parts.dtype)


def in_the_dtype(parts: np.ndarray) -> np.ndarray:
    total = parts[0]
    for part in parts[1:]:
        total = (total.astype(np.float64) + part.astype(np.float64)).astype(parts.dtype)
    return total


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.sampled_from(["bf16", "f16", "f32"]), st.integers(2, 8), st.integers(0, 999))
def test_right_sums_are_within_the_bound_and_wrong_ones_are_not(dtype, ndev, seed):
    call = sum_of(dtype, ndev)
    rng = np.random.default_rng(seed)
    names = set()
    for case in cases_of(call, seed):
        names.add(case.name)
        parts = case.inputs["i0"]
        assert parts.shape == (ndev, 3, 37) and np.isfinite(parts.astype(np.float64)).all()
        for order in (np.arange(ndev), rng.permutation(ndev)):
            assert share(call, case, in_float32(parts[order])) <= 1
            assert share(call, case, in_the_dtype(parts[order])) <= 1
        if case.name.startswith("only device "):
            which = int(case.name.split()[2])
            assert share(call, case, in_float32(np.delete(parts, which, axis=0))) > 1  # a device left out
            assert (
                share(call, case, in_float32(np.concatenate([parts, parts[which : which + 1]]))) > 1
            )  # or added twice
            assert share(call, case, np.full_like(parts[0], np.nan)) > 1
    assert {f"only device {n} has any" for n in range(ndev)} < names


def test_two_devices_have_one_rounding():
    """Half a unit in the last place and what a float32 addition loses: no more."""
    call = sum_of("bf16", 2, (1, 2))
    parts = np.array([[[1.0, 1.0]], [[1.0, 2.0**-9]]]).astype(DTYPES["bf16"].numpy)
    expected = expect(call, Case("", {"i0": parts}))["o0"]
    assert expected.values.tolist() == [[2.0, 1.0 + 2.0**-9]] and expected.bound is not None
    assert np.all(expected.bound < 2.0**-8 * expected.values * (1 + 2.0**-8) + 2.0**-20)


# --- the command ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "nvidia"])
def test_devices_meet(target, folder, build_engine):
    if target != "cpu":
        folder = build_engine(EXAMPLE, target=target, simulate=True, emit_only=True)
    only = "all_reduce,all_gather" if target == "cpu" else "all_reduce"
    options = ("--ndev", "2", "--dev-id", "3", "--only", only, "--prompt-len", "9", "--json")
    done = command(folder, *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    report = json.loads(done.stdout)
    assert report["left_out"] == [] and set(report["bounds"]) == set(only.split(","))
    for result in report["results"]:
        assert (result["status"], result["attrs"]["ndev"]) == ("ok", 2) and result["microseconds"] > 0
        assert (
            result["function"] == dict(all_reduce="infinicclAllReduce", all_gather="infinicclAllGather")[result["op"]]
        )
        assert result["in_place"] == (result["op"] == "all_reduce") and len(result["cases"]) >= 3


def test_fewer_devices_than_meet_are_said_and_no_failure(folder):
    done = command(folder, "--ndev", "2", "--only", "all_reduce,swiglu", "--prompt-len", "1", INFINICPU_DEVICES="1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "not run: all_reduce: takes 2 devices, and there is 1" in lines
    sums = [line for line in lines if line.startswith("all_reduce")]
    assert sums and all(line.endswith("NOT RUN") for line in sums)
    assert "operators ok, " in lines[-1] and lines[-1].endswith(f"{len(sums)} NOT RUN (all_reduce)")


# Faults by the number of tokens or requests, so that one run meets all of them.
SHIM = r"""
#include <cstring>
#include <dlfcn.h>
#include <infiniccl.h>
#include <unistd.h>
#include <vector>

template <typename F>
static F original(F, const char *name) {
    static void *library = dlopen("libinfiniccq.so", RTLD_NOLOAD | RTLD_NOW);
    return reinterpret_cast<F>(dlsym(library, name));
}

infiniStatus_t infinicclAllReduce(void *send, void *recv, size_t count, infiniDtype_t dtype, infinicclReduceOp_t op, infinicclComm_t comm, infinirtStream_t stream) {
    infiniDevice_t type;
    int device = 0;
    infinirtGetDevice(&type, &device);
    switch (count / HIDDEN) {
    case 3: // adds nothing
        return INFINI_STATUS_SUCCESS;
    case 5: // one device never comes back
        if (device == 1) {
            pause();
        }
        break;
    case 9: // one device is refused, while the other waits
        if (device == 1) {
            return INFINI_STATUS_BAD_PARAM;
        }
        break;
    case 14: // writes too much
        static_cast<char *>(recv)[2 * count] = 0;
        break;
    }
    return original(&infinicclAllReduce, "infinicclAllReduce")(send, recv, count, dtype, op, comm, stream);
}

infiniStatus_t infinicclAllGather(void *send, void *recv, size_t count, infiniDtype_t dtype, infinicclComm_t comm, infinirtStream_t stream) {
    const infiniStatus_t status = original(&infinicclAllGather, "infinicclAllGather")(send, recv, count, dtype, comm, stream);
    if (count == 3 * VOCABULARY / 2) {
        char *const first = static_cast<char *>(recv), *const second = first + 2 * count;
        const std::vector<char> kept(first, second);
        std::memcpy(first, second, 2 * count);
        std::memcpy(second, kept.data(), 2 * count);
    }
    return status;
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded InfiniCore behind collectives with planted faults."""
    own = Path(infinicpu.build())
    root = tmp_path_factory.mktemp("shim")
    shutil.copytree(own / "include", root / "include")
    shutil.copytree(own / "lib", root / "lib")
    real = (own / "lib" / "libinfiniccl.so").read_bytes()
    assert b"\0libinfiniccl.so\0" in real
    (root / "lib" / "libinfiniccq.so").write_bytes(real.replace(b"\0libinfiniccl.so\0", b"\0libinfiniccq.so\0"))
    (root / "lib" / "libinfiniccl.so").unlink()
    (root / "shim.cc").write_text(SHIM)
    options = ["-std=c++17", "-shared", "-fPIC", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", f"-I{root / 'include'}"]
    options += [f"-DHIDDEN={HIDDEN}", f"-DVOCABULARY={VOCABULARY}", "-o", str(root / "lib" / "libinfiniccl.so")]
    libraries = [str(root / "lib" / name) for name in ("libinfiniccq.so", "libinfinirt.so")]
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    done = subprocess.run(
        [compiler, *options, str(root / "shim.cc"), *libraries, "-ldl"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return root


def test_planted_faults_and_hangs_are_found(shim, folder):
    options = ("--ndev", "2", "--only", "all_reduce,all_gather", "--prompt-len", "9", "--timeout", "12", "--json")
    done = command(folder, *options, INFINI_ROOT=str(shim))
    assert done.returncode == 1, done.stderr
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for result in json.loads(done.stdout)["results"]:
        rows = int(result["operands"]["i0"].split("[")[1].split(",")[0])
        found[result["op"], rows] = result
    assert {key: result["status"] for key, result in found.items()} == {
        ("all_reduce", 1): "ok",
        ("all_reduce", 3): "WRONG",
        ("all_reduce", 5): "CRASHED",
        ("all_reduce", 9): "REFUSED",
        ("all_reduce", 14): "WRONG",
        ("all_gather", 1): "ok",
        ("all_gather", 3): "WRONG",
        ("all_gather", 4): "ok",
    }
    assert found["all_reduce", 3]["likely"] == "right if every device is alone: nothing was added"
    assert "took more than 12 s" in found["all_reduce", 5]["reason"]
    assert "infinicclAllReduce gives status 3 BAD_PARAM (case random)" in found["all_reduce", 9]["reason"]
    assert "bytes outside of the result were written, up to 1 bytes after it" in found["all_reduce", 14]["reason"]
    assert found["all_gather", 3]["likely"] == "right if the devices come in the opposite order"


def test_an_infinicore_without_collectives_is_said(shim, folder, tmp_path):
    root = tmp_path / "infini"
    shutil.copytree(shim, root)
    (root / "lib" / "libinfiniccl.so").unlink()
    done = command(folder, "--ndev", "2", "--only", "all_gather", "--json", INFINI_ROOT=str(root))
    assert done.returncode == 1, done.stderr
    results = json.loads(done.stdout)["results"]
    assert {(r["status"], r["reason"]) for r in results} == {("NOT THERE", "there is no infinicclCommInitAll")}

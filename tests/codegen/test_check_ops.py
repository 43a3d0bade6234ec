"""check-ops: what it runs is what the engine calls, right libraries pass, and what is planted wrong is found by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen.__main__ import main
from codegen.calls import CALLS
from codegen.check_ops_calls import COLLECTIVES, ROW_COPIES, Tensor, Use, enumerate_calls, steps_of
from codegen.check_ops_device import Region
from codegen.command_check_ops import uses_of
from ir import text
from ir.errors import ConfigError, run_cli
from ir.types import DTYPES
from runtime import infinicpu
from runtime.manifest import read_build
from tests.codegen.engines import EXAMPLE, Builder

INSTALLED = os.environ.get("QWEN3_TEST_INFINI_ROOT", "")
FORMS: dict[str, dict[str, Any]] = {"paged": {}, "contiguous": {"infinicore": "any"}}


@pytest.fixture(scope="session")
def build(build_engine: Builder) -> Callable[..., Path]:
    """``build(form, dtype) -> Path``: sources only, which is all that check-ops needs."""
    return lambda form, dtype: build_engine(EXAMPLE, dtype=dtype, emit_only=True, **FORMS[form])


@pytest.fixture(scope="session")
def uses(build) -> Callable[..., list[Use]]:
    return lambda form, dtype: uses_of(read_build(build(form, dtype)), None, 1)[0]


def command(folder: Path, *options: str, root: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"INFINI_ROOT": str(root)} if root else {})}
    arguments = [sys.executable, "-m", "codegen", "check-ops", str(folder), *options]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment)


# --- what is run ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, dtype", [("paged", "bf16"), ("contiguous", "f32")])
def test_every_op_of_the_engine_is_in_the_table(form, dtype, build, uses):
    found = read_build(build(form, dtype))
    graph = text.read(found.folder / "engine.ir")
    bodies = [graph, *(n.attrs["body"] for n in graph.nodes if n.op == "loop.layers")]
    for body in list(bodies):
        for node in body.nodes:
            bodies += [node.attrs[w] for w in ("prefill", "decode") if node.op == "loop.requests"]
    called = {node.op for body in bodies for node in body.nodes if node.op in CALLS or node.op in ROW_COPIES}
    called |= {"random_sample", *({"paged_attention", "paged_attention_prefill"} if form == "paged" else ())}
    there = uses(form, dtype)
    assert {use.call.op for use in there} == called
    # and with it every function that the emitted C++ creates (one of them only where there are several devices)
    several = uses_of(found, None, 2)[0] if found.data["shard"] else []
    names = {use.call.spec.name for use in [*there, *several] if use.call.op not in (*ROW_COPIES, *COLLECTIVES)}
    created = {re.fullmatch(r"infiniopCreate(\w+)Descriptor", s) for s in found.data["ops"]}
    assert {match.group(1) for match in created if match} == names


def emitted(source: str, plan: str, symbols: dict[str, int], dtype: str) -> set[tuple]:
    """(function, descriptors) of what a plan's build creates for these sizes on one device, from its C++."""
    members = dict(re.findall(r"^    \w+ (\w+)\{\"infiniop(\w+)\"\};", _section(source, f"struct {plan} {{"), re.M))
    tensors: list[Tensor] = []

    def describe(kind: str, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> None:
        dense = tuple(int(np.prod(shape[i + 1 :], dtype=int)) for i in range(len(shape)))
        tensors.append(Tensor(kind, tuple(shape), dense if strides is None else tuple(strides)))

    names = dict(symbols, DT=dtype, INFINI_DTYPE_I32="i32", INFINI_DTYPE_I64="i64", transposed=False)
    names.update(TensorDesc=describe, weightDesc=lambda rows, cols, _: describe(dtype, (cols, rows), (1, cols)))
    found = set()
    body = _section(source, f"infiniStatus_t {plan}::build(")
    for member, arguments in re.findall(r"QWEN3_TRY\((\w+)\.create\(context, \"[^\"]*\", (.*)\)\);", body):
        if member == "gather":
            continue  # of several devices
        # C++ and Python agree on products and sums.
        python = (
            arguments.replace("static_cast<ptrdiff_t>", "").replace("{", "(").replace("}", ",)").replace("(,)", "()")
        )
        tensors.clear()
        for match in re.finditer(r"(TensorDesc|weightDesc)\(", python):
            end, depth = match.end(), 1
            while depth:
                depth += {"(": 1, ")": -1}.get(python[end], 0)
                end += 1
            eval(python[match.start() : end], {}, names)
        found.add((members[member], tuple(tensors)))
    return found


def _section(source: str, start: str) -> str:
    at = source.index(start)
    return source[at : source.index("\n}", at)]


@pytest.mark.parametrize("form, dtype", [("paged", "bf16"), ("contiguous", "f32")])
def test_descriptors_are_those_that_the_emitted_code_makes(form, dtype, build):
    found = read_build(build(form, dtype))
    meta = found.data["meta"]
    graph = text.read(found.folder / "engine.ir")
    shard = found.data.get("shard") or {}
    step = next(s for s in steps_of(33, meta["dctx"], 16) if s.name == "mixed")
    there, _ = enumerate_calls(graph, [step], meta=meta, abi=found.data["abi"], shard=shard)
    ours = {
        (use.call.spec.name, tuple(t for _, t in use.call.operands))
        for use in there
        if not use.call.in_place and use.call.op not in ROW_COPIES and use.call.op != "random_sample"
    }
    symbols = step.symbols(16, meta["dctx"])
    decodes = sum(n == 1 for n, _ in step.requests)
    symbols.update(shard, ND=decodes, NP=len(step.requests) - decodes)
    source = (found.folder / "qwen3.cpp").read_text()
    theirs = emitted(source, "StepPlan", symbols, dtype)
    if form == "contiguous":
        for tokens, total in step.requests:
            plan = "DecodePlan" if tokens == 1 else "PrefillPlan"
            theirs |= emitted(
                source, plan, dict(shard, len=tokens, total=total, cap=min(512, -(-total // 16) * 16 + 16)), dtype
            )
    assert theirs <= ours
    # What is more: weights in the other layout.
    more = ours - theirs
    assert more and {name for name, _ in more} == {"Gemm"}
    assert {(name, (*t[:2], replace(t[2], strides=(1, t[2].shape[0])))) for name, t in more} <= theirs


def test_steps_fit_into_the_context():
    for context in (1, 2, 15, 16, 17, 40, 4096):
        for step in steps_of(min(33, context), context, 16):
            assert all(1 <= n <= total <= context for n, total in step.requests)
            ones = [n == 1 for n, _ in step.requests]
            if context > 1:
                assert ones == sorted(ones, reverse=True)
    with pytest.raises(ConfigError, match="--prompt-len 41: expected 1 to 40"):
        steps_of(41, 40, 16)


def test_symbols_that_devices_share(build):
    found = read_build(build("paged", "bf16"))
    assert found.data["shard"]["G"] == 2
    whole, half = (uses_of(found, 5, n)[0] for n in (1, 2))
    by_value = [{use.values[0]: use.call for use in found if use.steps == ["prefill 5"]} for found in (whole, half)]
    assert by_value[0]["attn"]["i0"].shape == (5, 6, 32) and by_value[1]["attn"]["i0"].shape == (5, 3, 32)
    assert any(use.call.op == "infini.rearrange" and use.call["i0"].shape == (3, 2, 304) for use in half)
    with pytest.raises(ConfigError, match="--ndev 3: "):
        uses_of(found, 5, 3)


# --- memory --------------------------------------------------------------------------------------------------------------------------------------------


class Host:
    """A device whose memory is the host's."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}

    def allocate(self, size: int) -> int:
        data = np.zeros(size, np.uint8)
        self.memory[data.ctypes.data] = data
        return data.ctypes.data

    def upload(self, pointer: int, data: np.ndarray) -> None:
        self.at(pointer, data.nbytes)[...] = data

    def download(self, pointer: int, size: int) -> np.ndarray:
        return self.at(pointer, size).copy()

    def at(self, pointer: int, size: int) -> np.ndarray:
        base, data = next((b, d) for b, d in self.memory.items() if b <= pointer < b + d.nbytes)
        return data[pointer - base : pointer - base + size]


def test_regions_lie_where_the_engine_has_them_and_know_what_is_theirs():
    host: Any = Host()
    region = Region(host, Tensor("bf16", (3, 2, 5), (24, 7, 1), offset=11))
    values = np.arange(30).reshape(3, 2, 5).astype(DTYPES["bf16"].numpy)
    region.put(values)
    assert region.pointer % 512 == 22
    image = region.get()
    assert (region.view(image) == values).all()
    mask = region.mask()
    assert mask.sum() == 30 * 2 and mask.size > 2 * 512
    assert np.isnan(image[:512].view(DTYPES["bf16"].numpy).astype(np.float32)).all()  # nobody may read there either
    host.at(region.pointer, 12)[10] ^= 1  # between two rows
    changed = region.get() != region.image
    assert changed.sum() == 1 and not (changed & mask).any()


# --- the command ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, dtype", [("paged", "bf16"), ("contiguous", "f32")])
def test_the_embedded_library_is_ok(form, dtype, build):
    done = command(build(form, dtype), "--prompt-len", "19", "--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"] == f"{len(report['results'])} of {len(report['results'])} operators ok"
    for key in "format build library infinicore probe target record device dtype kv host date steps bounds seconds left_out".split():
        assert key in report, key
    assert report["infinicore"]["infinicore"] == "embedded" and report["library"].endswith("lib/libinfiniop.so")
    assert set(report["steps"]) == {"decode 1", "decode 3", "decode long", "prefill 5", "prefill 19", "mixed"}
    ops = {r["op"] for r in report["results"]}
    assert ops == set(report["bounds"])
    for result in report["results"]:
        assert (
            result["status"] == "ok" and result["status_code"] is None and not result["failed"] and not result["reason"]
        )
        assert len(result["cases"]) >= 3 and result["microseconds"] > 0 and result["worst"]["share"] <= 1
        assert result["values"] and all(re.match(r"\w+\[", t) for t in result["operands"].values())
    in_place = {r["op"] for r in report["results"] if r["in_place"]}
    assert in_place == ({"rope", "add_rms_norm"} if form == "paged" else {"rope", "add", "causal_softmax"})


def test_the_report_for_people(build):
    done = command(build("paged", "bf16"), "--only", "swiglu,random_sample", "--prompt-len", "3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    heads = [line.split()[0] for line in lines[:7]]
    assert heads == ["build", "library", "target", "probe", "host", "date", "steps"]
    assert lines[8].split() == ["op", "operands", "cases", "error", "bound", "share", "us", "status"]
    rows = [line for line in lines if line.startswith("swiglu")]
    assert "o0=bf16[3, 384] i0=bf16[3, 384](768, 1) i1=bf16[3, 384](768, 1)" in "\n".join(rows)
    assert all(row.endswith("  ok") for row in rows)
    assert lines[-1] == f"{len(rows) + 1} of {len(rows) + 1} operators ok"
    assert "not run, for devices meet there: all_gather, all_reduce; --ndev N runs them on N devices" in lines


SHIM = r"""
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <infiniop.h>

template <typename F>
static F original(F, const char *name) {
    static void *library = dlopen("libinfiniqq.so", RTLD_NOLOAD | RTLD_NOW);
    return reinterpret_cast<F>(dlsym(library, name));
}
#define ORIGINAL(NAME) original(&NAME, #NAME)

infiniStatus_t infiniopSwiGLU(infiniopSwiGLUDescriptor_t d, void *w, size_t n, void *c, const void *a, const void *b, void *s) {
    return ORIGINAL(infiniopSwiGLU)(d, w, n, c, b, a, s);
}
infiniStatus_t infiniopRoPE(infiniopRoPEDescriptor_t d, void *w, size_t n, void *y, const void *x, const void *p, const void *sin, const void *cos, void *s) {
    return ORIGINAL(infiniopRoPE)(d, w, n, y, x, p, cos, sin, s);
}
infiniStatus_t infiniopCreateRMSNormDescriptor(infiniopHandle_t, infiniopRMSNormDescriptor_t *, infiniopTensorDescriptor_t, infiniopTensorDescriptor_t, infiniopTensorDescriptor_t, float) {
    return INFINI_STATUS_BAD_TENSOR_STRIDES;
}
infiniStatus_t infiniopRandomSample(infiniopRandomSampleDescriptor_t d, void *w, size_t n, void *result, const void *p, float v, float tp, int tk, float t, void *s) {
    static_cast<int64_t *>(result)[1] = 0;
    return ORIGINAL(infiniopRandomSample)(d, w, n, result, p, v, tp, tk, t, s);
}
infiniStatus_t infiniopAddRMSNorm(infiniopAddRMSNormDescriptor_t d, void *w, size_t n, void *y, void *r, const void *a, const void *b, const void *g, void *s) {
    const infiniStatus_t status = ORIGINAL(infiniopAddRMSNorm)(d, w, n, y, r, a, b, g, s);
    std::memset(const_cast<void *>(b), 1, 2);
    return status;
}
infiniStatus_t infiniopPagedCaching(infiniopPagedCachingDescriptor_t, void *, size_t, void *, void *, const void *, const void *, const void *, void *) {
    return INFINI_STATUS_SUCCESS; // says so, and does nothing
}
infiniStatus_t infiniopEmbedding(infiniopEmbeddingDescriptor_t, void *, const void *, const void *, void *) { std::abort(); }
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InfiniCore with planted faults: the embedded one behind a library that changes some of its functions."""
    own = Path(infinicpu.build())
    root = tmp_path_factory.mktemp("shim")
    (root / "lib").mkdir()
    shutil.copytree(own / "include", root / "include")
    for name in ("libinfinirt.so", "libinfiniccl.so"):
        shutil.copy(own / "lib" / name, root / "lib" / name)
    # Under another name, and without one function.
    real = (own / "lib" / "libinfiniop.so").read_bytes()
    for old, new in ((b"libinfiniop.so", b"libinfiniqq.so"), (b"infiniopPagedAttention", b"infiniopPagedAttentiox")):
        assert b"\0" + old + b"\0" in real
        real = real.replace(b"\0" + old + b"\0", b"\0" + new + b"\0")
    (root / "lib" / "libinfiniqq.so").write_bytes(real)
    source = root / "shim.cc"
    source.write_text(SHIM)
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    options = [
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wl,--no-as-needed",
        "-Wl,-rpath,$ORIGIN",
        f"-I{root / 'include'}",
    ]
    out = ["-o", str(root / "lib" / "libinfiniop.so"), str(source), str(root / "lib" / "libinfiniqq.so"), "-ldl"]
    done = subprocess.run([compiler, *options, *out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


def test_planted_faults_are_found_by_name(shim, build):
    done = command(build("paged", "bf16"), "--prompt-len", "3", "--json", root=shim)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["library"] == str(shim / "lib" / "libinfiniop.so")
    found: dict[str, list[dict[str, Any]]] = {}
    for result in report["results"]:
        found.setdefault(result["op"], []).append(result)
    statuses = {op: {r["status"] for r in rows} for op, rows in found.items()}
    assert statuses == {
        "gemm": {"ok"},
        "paged_attention_prefill": {"ok"},
        "swiglu": {"WRONG"},
        "rope": {"WRONG"},
        "rms_norm": {"REFUSED"},
        "random_sample": {"WRONG"},
        "add_rms_norm": {"WRONG"},
        "paged_caching": {"WRONG"},
        "paged_attention": {"NOT THERE"},
        "embedding": {"CRASHED"},
        "gather_rows": {"CRASHED"},
    }
    first = {op: rows[0] for op, rows in found.items()}
    assert first["swiglu"]["likely"] == "right if up and gate change places"
    assert first["rope"]["likely"] == "right if sin and cos change places"
    assert first["rms_norm"]["status_code"] == 12
    assert "infiniopCreateRMSNormDescriptor gives status 12 BAD_TENSOR_STRIDES" in first["rms_norm"]["reason"]
    assert "8 bytes outside of the result were written, up to 8 bytes after it" in first["random_sample"]["reason"]
    assert "i1: the input was changed" in first["add_rms_norm"]["reason"]
    assert "there is no infiniopPagedAttention" in first["paged_attention"]["reason"]
    assert "SIGABRT" in first["embedding"]["reason"]
    assert first["paged_caching"]["worst"]["share"] is None  # bit for bit: any other bit is too much
    assert "WRONG" in report["summary"] and "1 NOT THERE" not in report["summary"].split(",")[0]


def test_the_report_of_faults_for_people(shim, build):
    done = command(build("paged", "bf16"), "--prompt-len", "1", "--only", "swiglu,rms_norm", root=shim)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(line.endswith("REFUSED status 12 BAD_TENSOR_STRIDES") for line in lines)
    at = lines.index("not ok:")
    swiglu = next(line for line in lines[at:] if line.startswith("  swiglu: "))
    assert re.fullmatch(r"  swiglu: (\d+) of \1 WRONG: right if up and gate change places", swiglu)
    assert re.fullmatch(r"0 of \d+ operators ok, \d+ WRONG \(swiglu\), \d+ REFUSED \(rms_norm\)", lines[-1])


@pytest.mark.skipif(not INSTALLED, reason="INFINI_ROOT is not set: no installed InfiniCore to run on")
def test_an_installed_infinicore_is_ok_in_bf16(build):
    done = command(build("contiguous", "bf16"), "--prompt-len", "3", root=Path(INSTALLED))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


# --- simulated devices ----------------------------------------------------------------------------------------------------------------------------


def test_a_simulated_device_is_ok(build_engine):
    # ascend: causal_softmax destroys its input, rows have a pitch, weights and caches go through other forms than elsewhere
    folder = build_engine(EXAMPLE, target="ascend", simulate=True, emit_only=True)
    done = command(folder, "--prompt-len", "2", "--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    report = json.loads(done.stdout)
    assert report["device_type"] == "DEVICE_TYPE_ASCEND" and report["kv"] == "contiguous"
    apart = {r["op"] for r in report["results"] if not r["in_place"]}
    assert "causal_softmax" in apart


def test_what_a_device_refuses(build_engine, tmp_path):
    folder = tmp_path / "build"
    shutil.copytree(build_engine(EXAMPLE, target="nvidia", simulate=True, emit_only=True), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["simulate"]["ops"]["rms_norm"]["contiguous"] = [1]
    del manifest["simulate"]["ops"]["swiglu"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = command(folder, "--prompt-len", "2", "--only", "rms_norm,swiglu", "--json")
    assert done.returncode == 1, done.stderr
    for result in json.loads(done.stdout)["results"]:
        strided = "(" in result["operands"]["i0"]
        if result["op"] == "swiglu":
            assert (result["status"], result["status_code"]) == ("REFUSED", 5)
        else:
            assert (result["status"], result["status_code"]) == (("REFUSED", 12) if strided else ("ok", None))
            assert not strided or "BAD_TENSOR_STRIDES" in result["reason"]


# --- bad input ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--prompt-len", "0"], "--prompt-len 0: expected a number, 1 or more"),
        (["--prompt-len", "513"], "--prompt-len 513: expected 1 to 512"),
        (["--prompt-len", "x"], "--prompt-len x: expected a number"),
        (["--only", "gemm,relu"], "--only relu: the engine has no such op; expected some of add_rms_norm, embedding"),
        (["--ndev", "4"], "--ndev 4: the model's 2 key/value heads cannot be shared evenly by 4 devices"),
        (["--only", "all_reduce"], "--only all_reduce: takes several devices; expected --ndev N with it"),
        (["--timeout", "0"], "--timeout 0: expected a number, 1 or more"),
        (["--seed", "-1"], "--seed -1: expected a number, 0 or more"),
    ],
)
def test_bad_options_are_one_line(options, expected, build, capsys):
    assert run_cli(main, ["check-ops", str(build("paged", "bf16")), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0]


def _without(folder: Path) -> None:
    (folder / "engine.ir").unlink()


def _damaged(folder: Path) -> None:
    path = folder / "engine.ir"
    path.write_text(path.read_text()[:5000])


def _manifest(folder: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    del data["meta"]["dctx"]
    (folder / "manifest.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "damage, expected",
    [
        (shutil.rmtree, "expected a build folder"),
        (_without, "there is no engine.ir"),
        (_damaged, "engine.ir: line"),
        (_manifest, "manifest.json: 'dctx' is missing or malformed"),
    ],
)
def test_bad_folders_are_one_line(damage, expected, build, tmp_path, capsys):
    folder = tmp_path / "build"
    shutil.copytree(build("paged", "bf16"), folder)
    damage(folder)
    assert run_cli(main, ["check-ops", str(folder)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0]


def test_a_device_that_is_not_there_is_one_line(build):
    done = command(build("paged", "bf16"), "--dev-id", "77")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "there is no device 77 of target cpu" in done.stderr


def test_a_library_that_is_not_there_is_one_line(build, tmp_path):
    done = command(build("paged", "bf16"), root=tmp_path)
    assert done.returncode == 2
    assert "no lib/libinfiniop.so" in done.stderr and len(done.stderr.strip().splitlines()) == 1

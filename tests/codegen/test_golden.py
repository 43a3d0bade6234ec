"""Golden copies of what is emitted, so that every change of it shows as a diff.

Renew them after a change that was meant: ``pytest tests/codegen/test_golden.py --renew-golden``, then read the diff.
"""

from __future__ import annotations

import difflib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from codegen.build import build_model
from codegen.toolchain import compiler, tool
from runtime import infinicpu
from tests.codegen.engines import EXAMPLE, Builder

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES: dict[str, dict[str, str]] = {
    "cpu-embedded-bf16": dict(infinicore="embedded", dtype="bf16"),
    "cpu-any-f32": dict(infinicore="any", dtype="f32"),
}
FILES = ("qwen3.cpp", "qwen3_impl.hpp", "qwen3_weight.hpp", "qwen3.py", "CMakeLists.txt")
FIXED = "(differs by machine or checkpoint)"


def manifest_text(folder: Path) -> str:
    """The manifest without paths, times, digests and the places of weights in their files: those depend on the machine and the checkpoint."""

    def clean(node: Any) -> Any:
        if isinstance(node, list):
            return [clean(v) for v in node]
        if not isinstance(node, dict):
            return node
        return {
            k: FIXED if k in ("offset", "path", "weights_folder", "fingerprint") else clean(v) for k, v in node.items()
        }

    data = clean(json.loads((folder / "manifest.json").read_text()))
    data["passes"] = [[name, matches] for name, matches, _ in data["passes"]]
    data["files"] = sorted(data["files"])
    data.pop("build_seconds", None)
    return json.dumps(data, indent=1) + "\n"


def emitted(folder: Path, options: dict[str, str]) -> dict[str, str]:
    build_model(model=EXAMPLE, out=folder, emit_only=True, **options)
    return {**{name: (folder / name).read_text() for name in FILES}, "manifest.json": manifest_text(folder)}


@pytest.mark.parametrize("case", CASES)
def test_what_is_emitted_is_what_it_was(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    texts = emitted(tmp_path / "out", CASES[case])
    folder = GOLDEN / case
    if request.config.getoption("--renew-golden", default=False):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
        return
    diff: list[str] = []
    for name, text in texts.items():
        path = folder / name
        golden = path.read_text() if path.is_file() else ""
        lines = difflib.unified_diff(
            golden.splitlines(), text.splitlines(), f"golden/{case}/{name}", f"emitted {name}", lineterm="", n=2
        )
        diff += list(lines)
    shown = "\n".join(diff[:80]) + (f"\n... {len(diff) - 80} more lines" if len(diff) > 80 else "")
    assert not diff, (
        f"the emitted files changed; if that was meant: pytest tests/codegen/test_golden.py --renew-golden\n{shown}"
    )


def test_two_emissions_are_equal(tmp_path: Path) -> None:
    for options in CASES.values():
        first, second = (emitted(tmp_path / n, options) for n in ("a", "b"))
        assert first == second
        shutil.rmtree(tmp_path / "a")
        shutil.rmtree(tmp_path / "b")


def test_goldens_name_no_machine() -> None:
    """Nothing in them may come from the machine that they were made on."""
    for path in sorted(GOLDEN.rglob("*.*")):
        text = path.read_text()
        for word in (str(Path.home()), str(GOLDEN.parents[1]), "/tmp"):
            assert word not in text, f"{path.name} holds {word}"


STRICT = "-Wshadow -Wpedantic -Wconversion -Wsign-conversion -Wnon-virtual-dtor -Wold-style-cast -Wcast-align -Woverloaded-virtual -Wnull-dereference -Wdouble-promotion -Wimplicit-fallthrough -Wextra-semi".split()


def syntax_check(cxx: str, sources: Path, *flags: str) -> str:
    include = f"{infinicpu.build()}/include"
    command = [
        cxx,
        "-std=c++17",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        *flags,
        "-isystem",
        include,
        str(sources / "qwen3.cpp"),
    ]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True).stderr


@pytest.mark.parametrize("case", CASES)
def test_emitted_code_passes_stricter_warnings(case: str, tmp_path: Path) -> None:
    emitted(tmp_path / "out", CASES[case])
    assert syntax_check(compiler(), tmp_path / "out", *STRICT) == ""


@pytest.mark.parametrize("options", [{}, {"infinicore": "any", "dtype": "f32"}, {"target": "ascend"}], ids=str)
def test_emitted_code_is_formatted(options: dict[str, str], tmp_path: Path) -> None:
    """As InfiniCore's .clang-format has it."""
    build_model(model=EXAMPLE, out=tmp_path / "out", emit_only=True, **options)
    style = "--style=file:" + str(Path(__file__).resolve().parents[2] / ".clang-format")
    for name in ("qwen3.cpp", "qwen3_impl.hpp", "qwen3_weight.hpp"):
        text = (tmp_path / "out" / name).read_text()
        command = [tool("clang-format"), style, f"--assume-filename={name}"]
        formatted = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout
        assert "".join(difflib.unified_diff(text.splitlines(True), formatted.splitlines(True), name)) == ""


@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not installed")
@pytest.mark.parametrize("case", CASES)
def test_emitted_code_compiles_with_clang(case: str, tmp_path: Path) -> None:
    emitted(tmp_path / "out", CASES[case])
    assert syntax_check("clang++", tmp_path / "out", "-Wshadow", "-Wpedantic") == ""


def test_other_shapes_pass_them_too(build_engine: Builder, tmp_path: Path) -> None:
    """One layer (no loop), many, both kinds of cache."""
    for name, kv in (("one", "paged"), ("one", "contiguous"), ("four", "paged"), ("two", "contiguous")):
        out = tmp_path / f"{name}-{kv}"
        build_model(model=build_engine.checkpoint(name), out=out, emit_only=True, dtype="f16", kv=kv)
        assert syntax_check(compiler(), out, *STRICT) == "", (name, kv)

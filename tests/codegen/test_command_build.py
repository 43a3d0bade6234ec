"""What ``codegen build`` says when it is done: why the KV cache is not paged, and the commands that are next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from codegen.__main__ import main
from codegen.command_build import next_steps, why_contiguous
from ir.errors import run_cli
from tests.codegen.engines import EXAMPLE


def build(capsys: pytest.CaptureFixture[str], model: Path, out: Path, *options: str) -> list[str]:
    """The lines that it prints after the first, which describes the build."""
    assert run_cli(main, ["build", "--model", str(model), "-o", str(out), "--emit-only", *options]) == 0
    return capsys.readouterr().out.splitlines()[1:]


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            ["--target", "nvidia"],
            "The KV cache is not paged: paged_attention on nvidia takes head_dim 64, 128, 192, 256, not 32",
        ),
        (
            ["--target", "ascend"],  # the row of the manifest goes on about the scale
            "The KV cache is not paged: paged_attention on ascend takes head_dim 64, 128, 192, 256, not 32",
        ),
        (["--target", "kunlun", "--dtype", "f16"], "The KV cache is not paged: kunlun has no paged_caching"),
        (["--target", "nvidia", "--kv", "contiguous"], None),
        (["--target", "cpu"], None),  # paged
        (["--target", "cpu", "--infinicore", "any"], None),
    ],
)
def test_the_reason_for_contiguous_caches_is_a_line(options, expected, tmp_path, capsys):
    lines = build(capsys, EXAMPLE, tmp_path / "out", *options)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [line for line in lines if "not paged" in line] == ([expected] if expected else [])
    if expected:
        assert lines[0] == expected and manifest["kv"]["form"] == "contiguous"


def test_the_day_since_which_a_better_form_is_there_is_said(tmp_path, capsys):
    lines = build(capsys, EXAMPLE, tmp_path / "out", "--target", "nvidia", "--infinicore", "any")
    assert lines[0].startswith(
        "The KV cache is not paged: paged_caching on nvidia is not in InfiniCore 0.1.0 (there since 2025-12-29: --infinicore DIR"
    )


def test_what_was_not_compiled_does_not_run(tmp_path, capsys):
    for target in ("ascend", "cpu"):
        lines = build(capsys, EXAMPLE, tmp_path / target, "--target", target, "--simulate")
        assert not any("It runs here" in line or "runtime.generate" in line for line in lines)
        assert lines[-1] == (
            f"It was not compiled (--emit-only); without --emit-only it runs here, on a simulated {target}"
        )
    lines = build(capsys, EXAMPLE, tmp_path / "plain", "--target", "cpu")
    assert lines[0] == "It was not compiled (--emit-only); to compile it:" and "cmake" in lines[1]


def test_what_was_compiled_says_where_it_runs(tmp_path):
    manifest: dict[str, Any] = dict(
        target="ascend",
        device=3,
        simulate={"name": "ascend"},
        library="libqwen3.so",
        model=dict(source=dict(kind="checkpoint", path="m"), weights_folder="m", config_only=False),
        legalised=[],
    )
    assert next_steps(tmp_path, manifest)[0] == "It runs here, on a simulated ascend:"
    assert next_steps(tmp_path, {**manifest, "simulate": None})[0].startswith("It cannot run here")
    assert next_steps(tmp_path, {**manifest, "simulate": None, "target": "cpu", "device": 0})[0] == "It can run here:"
    assert why_contiguous(manifest) == []

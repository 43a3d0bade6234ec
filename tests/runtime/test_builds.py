"""Builds on first use: what makes another build, how many are kept. The compiler is replaced by one that only counts."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from runtime import builds
from runtime.builds import build_for
from runtime.errors import BuildError, ConfigError, UnsupportedError
from tests.runtime import fakes


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The calls of build_model, in a cache of its own."""
    calls: list[dict[str, Any]] = []

    def build_model(*, model: Path, out: Path, **options: Any) -> Path:
        assert options.pop("progress") is None  # quiet, because this is no terminal
        calls.append(options)
        if options["target"] == "broken":
            raise UnsupportedError("target broken")
        out.mkdir()
        (out / "manifest.json").write_text(json.dumps(fakes.manifest(model)))
        return out

    monkeypatch.setitem(sys.modules, "codegen.build", types.SimpleNamespace(build_model=build_model))
    monkeypatch.setenv("QWEN3_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("INFINI_ROOT", raising=False)
    return calls


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return fakes.write_checkpoint(tmp_path / "model")


def test_a_build_is_made_once(
    compiler: list[dict[str, Any]], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_for(checkpoint)
    assert build_for(str(checkpoint)).folder == first.folder
    monkeypatch.chdir(checkpoint.parent)
    assert build_for(Path("model")).folder == first.folder
    assert compiler == [
        dict(target="cpu", dtype=None, quant="none", kv="auto", infinicore="embedded", max_context=None, max_batch=None)
    ]
    assert first.checkpoint_folder == checkpoint


def test_whatever_matters_makes_another_build(
    compiler: list[dict[str, Any]], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {build_for(checkpoint).folder}

    def is_new(**options: Any) -> bool:
        folder = build_for(checkpoint, **options).folder
        new = folder not in seen
        seen.add(folder)
        return new

    assert is_new(dtype="f32") and is_new(quant="w8a8") and is_new(kv="contiguous") and is_new(target="nvidia")
    assert is_new(max_context=50) and is_new(max_batch=2)
    monkeypatch.setenv("INFINI_ROOT", "/somewhere")
    assert is_new()
    monkeypatch.delenv("INFINI_ROOT")
    (checkpoint / "config.json").write_text(json.dumps({**fakes.config(), "rope_theta": 5e5}))
    assert is_new()
    fakes.write_checkpoint(checkpoint, {**fakes.state_dict(), "more": fakes.state_dict()["model.norm.weight"]})
    assert is_new()
    monkeypatch.setattr(builds, "_compiler_hash", lambda: "other sources")
    assert is_new()
    (checkpoint / "tokenizer_config.json").write_text("{}")  # text does not concern the engine
    assert not is_new()
    assert len(compiler) == len(seen)


def test_the_compilers_own_sources_are_in_the_key() -> None:
    builds._compiler_hash.cache_clear()
    assert len(builds._compiler_hash()) == 64


def test_the_newest_builds_are_kept(
    compiler: list[dict[str, Any]], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds, "KEEP", 3)
    folders = []
    for i in range(3):
        folders.append(build_for(checkpoint, max_context=50 + i).folder)
        os.utime(folders[i], (1000 + i, 1000 + i))
    build_for(checkpoint, max_context=50)  # used again: now the newest
    folders.append(build_for(checkpoint, max_context=90).folder)
    assert [folder.is_dir() for folder in folders] == [True, False, True, True]
    assert len(list((builds.cache_root() / "builds").glob("*.lock"))) <= 4


def test_a_failed_build_leaves_nothing(compiler: list[dict[str, Any]], checkpoint: Path) -> None:
    with pytest.raises(UnsupportedError, match="target broken"):
        build_for(checkpoint, target="broken")
    assert [path for path in (builds.cache_root() / "builds").iterdir() if path.is_dir()] == []


def test_bad_folders(compiler: list[dict[str, Any]], tmp_path: Path, checkpoint: Path, monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        build_for(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN3_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="cannot be written .*; set QWEN3_CACHE to one that can"):
        build_for(checkpoint)

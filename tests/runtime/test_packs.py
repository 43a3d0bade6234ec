"""Packed weights kept between loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from codegen.build import build_model
from runtime import packs
from runtime.manifest import read_build
from runtime.recipes import Leaf
from runtime.weights import Qwen3WeightsImpl
from tests.models import random_config, write_checkpoint


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packs, "LEAST_BYTES", 1)
    config = random_config(
        np.random.default_rng(3),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=100,
    )
    checkpoint = write_checkpoint(tmp_path / "model", config, 0, "bf16")
    return build_model(model=checkpoint, out=tmp_path / "build", dtype="f32", emit_only=True)


def arrays(build: Path, ndev: int = 1, check: bool = True) -> list[np.ndarray]:
    return [a.copy() for a in Qwen3WeightsImpl.from_manifest(read_build(build), None, ndev, check)._memory]


def folders(root: Path) -> list[Path]:
    return sorted(p for p in (root / "cache" / "weights").iterdir() if p.is_dir())


@pytest.mark.parametrize("ndev", [1, 2])
def test_a_second_load_maps_what_the_first_packed(build, tmp_path, monkeypatch, ndev):
    first = arrays(build, ndev)
    [folder] = folders(tmp_path)
    assert (folder / "packed.bin").stat().st_size >= sum(a.nbytes for a in first) // 2

    def never(*_):
        raise AssertionError("packed again")

    monkeypatch.setattr("runtime.recipes.pack", never)
    monkeypatch.setattr("runtime.recipes.has_nonfinite", never)  # looked through once as well
    for a, b in zip(first, arrays(build, ndev), strict=True):
        assert np.array_equal(a.view(np.uint8), b.view(np.uint8))


def test_devices_have_packs_of_their_own(build, tmp_path):
    one, two = arrays(build, 1), arrays(build, 2)
    assert len(folders(tmp_path)) == 2
    assert any(not np.array_equal(a, b) for a, b in zip(one, two))


def test_a_changed_file_is_packed_anew(build, tmp_path):
    before = arrays(build)
    file = tmp_path / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2:] = b"\x80\x3f"  # 1.0 in bf16: same header, same size
    file.write_bytes(data)
    after = arrays(build)
    assert len(folders(tmp_path)) == 2 and any(not np.array_equal(a, b) for a, b in zip(before, after))


def test_a_remark_about_weights_is_remembered(build, tmp_path, capsys):
    file = tmp_path / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2:] = b"\xc0\x7f"  # NaN
    file.write_bytes(data)
    for _ in range(2):
        arrays(build)
        assert "NaN or infinite" in capsys.readouterr().err
    arrays(build, check=False)
    assert capsys.readouterr().err == ""


def test_damaged_and_foreign_packs_are_not_used(build, tmp_path):
    first = arrays(build)
    [folder] = folders(tmp_path)
    for damage in (
        lambda: (folder / "packed.bin").write_bytes(b"short"),
        lambda: (folder / "index.json").write_text("{"),
        lambda: (folder / "index.json").write_text(json.dumps(dict(places=[], remark=""))),
        lambda: (folder / "packed.bin").unlink(),
    ):
        damage()
        for a, b in zip(first, arrays(build), strict=True):
            assert np.array_equal(a, b)


def test_a_cache_that_cannot_be_written_is_no_error(build, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN3_CACHE", str(tmp_path / "file"))
    assert len(arrays(build)) > 5
    monkeypatch.setenv("QWEN3_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert len(arrays(build)) > 5
    assert not list((tmp_path / "other" / "weights").iterdir())  # nothing half-written stays


def test_the_cache_is_bounded(build, tmp_path, monkeypatch):
    arrays(build)
    monkeypatch.setattr(packs, "KEEP", 1)
    for last in (b"\x00\x3f", b"\x10\x3f", b"\x20\x3f"):
        file = tmp_path / "model" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-2] + last)
        arrays(build)
    assert len(folders(tmp_path)) == 2
    monkeypatch.setenv("QWEN3_WEIGHT_CACHE_GB", "0")
    leaf = Leaf("x", "f32", (4,), memory=np.zeros(4, np.float32))
    assert not packs.Pack([], [leaf], [leaf]).worthwhile

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from runtime import infinicore
from runtime.qwen3 import Qwen3ForCausalLM
from tests.runtime import fakes


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C interface over a toy model (fake_engine.cpp)."""
    source = Path(__file__).with_name("fake_engine.cpp")
    return fakes.compile_library(source, tmp_path_factory.mktemp("fake") / "libqwen3.so")


@pytest.fixture(scope="session")
def fake_build(fake_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder of the fake engine with a random checkpoint that has the example's tokenizer."""
    folder = tmp_path_factory.mktemp("fake-build")
    return fakes.write_build(folder / "out", fakes.write_checkpoint(folder / "model"), fake_library)


@pytest.fixture
def no_infinicore(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake engine needs no InfiniCore."""
    monkeypatch.setattr(infinicore, "load", lambda manifest, **_: None)
    monkeypatch.setattr(infinicore, "check_devices", lambda *_: None)


@pytest.fixture
def open_fake(fake_build: Path, no_infinicore: None):
    """Open the fake model; everything opened is closed, and found to be freed, at the end of the test."""
    models: list[Qwen3ForCausalLM] = []

    def open_model(**options: Any) -> Qwen3ForCausalLM:
        options.setdefault("build", fake_build)
        models.append(Qwen3ForCausalLM(**options))
        return models[-1]

    yield open_model
    library = ctypes.CDLL(str(fake_build / "libqwen3.so"))
    for model in models:
        model.close()
    assert library.fakeLiveModels() == 0

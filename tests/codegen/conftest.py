from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.engine import Engine
from tests.codegen.engines import Builder, open_engine


@pytest.fixture(scope="session")
def build_engine(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """``build_engine(model, **options) -> Path``: builds, each made once per session. See tests/codegen/engines.py."""
    return Builder(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def engine(build_engine: Builder) -> Iterator[Callable[..., Engine]]:
    """``engine(model, **options) -> Engine``: opened for one test and closed after it."""
    opened: list[Engine] = []

    def start(model: Path | str | dict, **options: object) -> Engine:
        opened.append(open_engine(build_engine(model, **options)))
        return opened[-1]

    yield start
    for item in opened:
        item.close()

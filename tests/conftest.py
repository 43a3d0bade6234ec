"""Shared by all tests."""

from __future__ import annotations

import os

import pytest

# Tests run on the embedded InfiniCore, but for tests/codegen/test_real_infinicore.py, which asks for the installed one.
INSTALLED = os.environ.pop("INFINI_ROOT", "")
if INSTALLED:
    os.environ["QWEN3_TEST_INFINI_ROOT"] = INSTALLED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = {"infinicpu" in item.path.parts for item in items}
    if len(own) == 2:
        raise pytest.UsageError(
            "tests/infinicpu loads a build of the embedded library of its own: run it in another process than the rest, "
            "as make test does (pytest tests/infinicpu; pytest --ignore tests/infinicpu)"
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--renew-golden", action="store_true", help="write tests/golden/ anew instead of comparing with it"
    )

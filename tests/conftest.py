"""Shared by all tests."""

from __future__ import annotations

import os

import pytest

# Tests run on the embedded InfiniCore unless they ask for the installed one: see tests/real.py.
INSTALLED = os.environ.pop("INFINI_ROOT", "")
if INSTALLED:
    os.environ["QWEN3_TEST_INFINI_ROOT"] = INSTALLED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--renew-golden", action="store_true", help="write tests/golden/ anew instead of comparing with it"
    )

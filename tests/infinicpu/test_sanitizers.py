"""The C++ tests under the sanitizers. The first build of each takes a minute, later ones are incremental."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .lib import PROJECT, cmake_build

HERE = Path(__file__).resolve().parent
# The portable kernels and one with intrinsics: the sanitizers look at the same template code in each.
OPTIONS = ["-DINFINICPU_ISAS=avx2"]


@pytest.mark.parametrize(
    ("sanitize", "program", "isa"),
    [
        ("address,undefined", "smoke", "avx2"),
        ("address,undefined", "smoke", "portable"),
        ("thread", "stress", "avx2"),
        ("thread", "smoke", "avx2"),
        ("address,undefined", "simulator", "avx2"),
        ("thread", "simulator", "avx2"),
        ("address,undefined", "collectives", "avx2"),
        ("thread", "collectives", "avx2"),
    ],
)
def test_clean_under(sanitize: str, program: str, isa: str) -> None:
    tree = cmake_build(
        HERE, PROJECT / "build" / f"infinicpu-{sanitize.split(',')[0]}", f"-DINFINICPU_SANITIZE={sanitize}", *OPTIONS
    )
    environment = {**os.environ, "INFINICPU_ISA": isa, "INFINICPU_THREADS": "3"}
    result = subprocess.run([str(tree / program)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]

"""Compiled engines for tests: small configurations, and what it takes to open a build without a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegen.build import build_model
from frontend.export import export
from frontend.ort import Reference
from runtime import infinicore
from runtime.engine import Engine, load_library
from runtime.manifest import read_build
from runtime.structs import Qwen3MetaCStruct
from runtime.weights import Qwen3WeightsImpl, meta_from_manifest
from tests.models import random_config, write_checkpoint

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"

# Layers, heads, kv heads, head_dim, tied: every ratio from 1 to 6, odd and round sizes; the other dimensions are drawn so that all differ.
SHAPES: dict[str, tuple[int, int, int, int, bool]] = {
    "one": (1, 3, 1, 10, True),
    "two": (2, 6, 3, 6, False),
    "three": (3, 6, 1, 16, True),
    "four": (4, 4, 1, 32, False),
    "even": (3, 2, 2, 14, True),
    "wide": (2, 8, 4, 64, False),
}


def config_of(name: str, **overrides: Any) -> dict[str, Any]:
    """The configuration of one of SHAPES."""
    layers, heads, kv_heads, head_dim, tied = SHAPES[name]
    fixed: dict[str, Any] = dict(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )
    return random_config(np.random.default_rng(list(SHAPES).index(name)), **{**fixed, **overrides})


class Builder:
    """Makes each checkpoint, each build and each onnxruntime session once, and remembers it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._builds: dict[str, Path] = {}
        self._references: dict[Path, Reference] = {}

    def checkpoint(self, model: Path | str | Mapping[str, Any], *, seed: int = 0, stored: str = "bf16") -> Path:
        """A folder as it is, or a random checkpoint of a configuration (or of one of SHAPES by name)."""
        if isinstance(model, Path):
            return model
        config = config_of(model) if isinstance(model, str) else dict(model)
        key = hashlib.sha256(json.dumps([config, seed, stored], sort_keys=True).encode()).hexdigest()[:16]
        folder = self.root / f"model-{key}"
        return folder if folder.is_dir() else write_checkpoint(folder, config, seed, stored)

    def __call__(
        self, model: Path | str | Mapping[str, Any], *, seed: int = 0, stored: str = "bf16", **options: Any
    ) -> Path:
        """The build folder of a model with these options of codegen.build.build_model.

        Args:
            model: a checkpoint folder, a configuration, or a name in SHAPES.
            seed, stored: of the random weights, and the dtype that they lie in.
        """
        folder = self.checkpoint(model, seed=seed, stored=stored)
        key = hashlib.sha256(json.dumps([str(folder), options], sort_keys=True, default=str).encode()).hexdigest()[:16]
        if key not in self._builds:
            self._builds[key] = build_model(model=folder, out=self.root / f"build-{key}", **options)
        return self._builds[key]

    def reference(self, checkpoint: Path, file: Path | None = None) -> Reference:
        """onnxruntime on our own export of a checkpoint (written to ``file``)."""
        if checkpoint not in self._references:
            file = file or self.root / f"{checkpoint.name}.onnx"
            export(checkpoint, file, opset=18)
            self._references[checkpoint] = Reference(file, checkpoint, threads=1)
        return self._references[checkpoint]


def meta_of(build: Path) -> Qwen3MetaCStruct:
    return meta_from_manifest(read_build(build), None)


def open_engine(build: Path, meta: Qwen3MetaCStruct | None = None, weights: Any = None) -> Engine:
    """An engine of a build; the caller closes it. ``meta`` and ``weights`` replace the build's own."""
    found = read_build(build)
    infinicore.load(found.data)
    if weights is None:
        weights = Qwen3WeightsImpl.from_manifest(found, None, 1, False)
    return Engine(load_library(found.library), meta or meta_from_manifest(found, None), weights, 0, [0])

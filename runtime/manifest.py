"""Reading a build folder's manifest.json, and the identity of the files that it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import BuildError, CheckpointError

FORMAT = 1
LIBRARY = "libqwen3.so"
_REQUIRED = ("target", "record", "device", "infinicore", "dtype", "kv", "model", "meta", "weights", "ops")


@dataclass(frozen=True)
class Build:
    """A build folder: ``data`` is manifest.json."""

    folder: Path
    data: dict[str, Any]

    @property
    def library(self) -> Path:
        """The compiled engine; BuildError when the folder was emitted but not compiled, or the file is gone."""
        name = self.data.get("library")
        path = self.folder / (name or LIBRARY)  # an emitted folder may have been compiled by hand
        if path.is_file():
            return path
        if not name:
            raise BuildError(
                f"{self.folder} was built with --emit-only: compile it and put {LIBRARY} there, or build it again without"
            )
        raise BuildError(f"{self.folder}: the engine {name} is missing; build it again")

    @property
    def source(self) -> Path:
        """The checkpoint folder or ONNX file that the build was made from (it may have moved since)."""
        return Path(self.data["model"]["source"]["path"])

    @property
    def checkpoint_folder(self) -> Path:
        """The folder where configuration and tokenizer would lie: beside the weights."""
        kind, folder = self.data["model"]["source"]["kind"], self.data["model"].get("weights_folder")
        return Path(folder) if folder else self.source if kind == "checkpoint" else self.source.parent

    def weights_folder(self, folder: Path | None) -> Path:
        """Where the weight files lie: in ``folder`` if one of them is there, else where they lay for the build.

        ``folder`` may have nothing but a tokenizer. Whether the files are the right ones is check_fingerprint's matter.
        """
        own = self.checkpoint_folder
        if folder is None:
            return own
        here = any((folder / name).is_file() for name in _files(self.data["weights"]))
        return folder if here or not own.is_dir() else own

    @property
    def eos_token_ids(self) -> list[int]:
        return [int(token) for token in self.data["model"].get("eos_token_ids") or ()]


def read_build(folder: str | os.PathLike[str]) -> Build:
    """Read a folder made by ``python -m codegen build``; BuildError in one line when it is not one."""
    folder = Path(folder).expanduser().resolve()
    path = folder / "manifest.json"
    if not path.is_file():
        raise BuildError(f"{folder}: expected a build folder (made by python -m codegen build), found no manifest.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BuildError(f"{path} is not readable: {error}") from None
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise BuildError(f"{path}: found format {found}, expected {FORMAT}; build it again")
    missing = [key for key in _REQUIRED if key not in data]
    if missing:
        raise BuildError(f"{path}: {missing[0]} is missing; build it again")
    return Build(folder, data)


def check_fingerprint(build: Build, folder: Path) -> None:
    """CheckpointError when the weight files in ``folder`` are not those that the build was made from."""
    recorded = build.data["model"].get("fingerprint")
    if (
        recorded
        and not build.data["model"].get("config_only")
        and fingerprint(folder, build.data["weights"]) != recorded
    ):
        raise CheckpointError(
            f"{folder}: its weight files are not those that {build.folder} was built from (their headers or sizes "
            "differ); build it again"
        )


def fingerprint(folder: Path, recipes: Any) -> str:
    """A digest of the names, headers and sizes of every weight file that the recipes name."""
    digest = hashlib.sha256()
    for name in sorted(_files(recipes)):
        path = folder / name
        digest.update(name.encode())
        if path.is_file():
            with path.open("rb") as file:
                length = file.read(8)
                digest.update(length + file.read(min(int.from_bytes(length, "little"), 1 << 27)))
            digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()


def _files(recipe: Any) -> set[str]:
    if isinstance(recipe, dict) and "file" in recipe:
        return set() if recipe.get("build") else {recipe["file"]}
    parts = recipe.values() if isinstance(recipe, dict) else recipe if isinstance(recipe, list) else ()
    return set().union(*map(_files, parts))

"""From what the emitter decided to the texts of the files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from codegen import cpp


def render(context: Mapping[str, Any]) -> dict[str, str]:
    """The emitted files' texts by name."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    form = "paged" if context["paged"] else "contiguous"
    context = {**context, "kv_inputs": environment.get_template(f"_inputs_{form}.j2").render(context)}
    files = ("qwen3.cpp", "qwen3_impl.hpp", "qwen3_weight.hpp", "qwen3.py", "CMakeLists.txt")
    texts = {name: environment.get_template(name + ".j2").render(context).rstrip("\n") + "\n" for name in files}
    return {name: cpp.align_comments(text) if name.endswith(("cpp", "hpp")) else text for name, text in texts.items()}

"""How emitted code names weights, layers and where a call came from."""

from __future__ import annotations

import re
from collections.abc import Sequence

from codegen.facts import ModelFacts
from ir.errors import UnsupportedError
from ir.graph import Node


def readable(node: Node, i: int = 0) -> str:
    """A result's name for comments and members, without numbers that only keep names apart."""
    return node.outputs[i].name


def origin_text(origin: tuple[str, ...]) -> str:
    """The ONNX nodes behind a call; the layers' own are written once."""
    texts = dict.fromkeys(re.sub(r"\blayers\.\d+", "layers.*", o) for o in origin)
    shown = list(texts)[:3]
    return ", ".join(shown) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def weight_expression(name: str) -> str:
    """``attn_qkv.3`` -> ``rsrc.attn_qkv[3]->data()``."""
    role, _, layer = name.partition(".")
    return f"rsrc.{role}[{layer}]->data()" if layer else f"rsrc.{role}->data()"


def layer_count(count: int, facts: ModelFacts) -> str:
    return "NLAYER" if count == facts.nlayer else str(count)


def layer_expression(names: Sequence[str], bound: str) -> str:
    """The weight of run ``layer`` among these (see ``run_index``)."""
    role = names[0].partition(".")[0]
    index = run_index(names)
    if index is not None:
        return f"rsrc.{role}[{index}]->data()"
    index = run_index(names[:-1])
    if index is None:
        raise UnsupportedError(f"weights {', '.join(names[:3])}.. follow no rule that a loop over layers could use")
    last = weight_expression(names[-1]).removesuffix("->data()")
    return f"(layer + 1 < {bound} ? rsrc.{role}[{index}] : {last})->data()"


def run_index(names: Sequence[str]) -> str | None:
    """The number behind names of one role as an expression of ``layer``: ``ffn_norm.1, ffn_norm.3, ..`` -> ``2 * layer + 1``; None if there is no rule."""
    split = [name.partition(".") for name in names]
    if len({role for role, _, _ in split}) != 1 or not all(number.isdigit() for _, _, number in split):
        return None
    numbers = [int(number) for _, _, number in split]
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step < 1 or numbers != [numbers[0] + i * step for i in range(len(numbers))]:
        return None
    return ("layer" if step == 1 else f"{step} * layer") + (f" + {numbers[0]}" if numbers[0] else "")


def follows_rule(names: Sequence[str]) -> bool:
    """Whether a loop's runs can find what they read under these names."""
    return run_index(names) is not None or (len(names) > 2 and run_index(names[:-1]) is not None)

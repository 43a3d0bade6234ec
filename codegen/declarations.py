"""Reading C headers: which functions they declare, with which parameters. Not a compiler: enough for headers that declare a C interface.

Comments, line breaks, ``#if 0`` and macros before a declaration (``__INFINI_C __export``) are understood; other conditions are not, so that all their branches
are read. A function that is declared twice comes twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        type: without const behind the type (``void const *`` is ``const void *``), one space between words, none between stars.
        name: empty where the header gives none.
    """

    type: str
    name: str

    def __str__(self) -> str:
        gap = "" if self.type.endswith("*") else " "
        return f"{self.type}{gap}{self.name}".strip()


@dataclass(frozen=True)
class Function:
    """A declared function."""

    name: str
    parameters: tuple[Parameter, ...]


_SKIPPED = re.compile(r"//[^\n]*|/\*.*?\*/|(\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*')", re.DOTALL)
_ATTRIBUTE = re.compile(r"__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)|\[\[.*?\]\]", re.DOTALL)
_QUALIFIERS = frozenset("const volatile struct enum union class register restrict __restrict __restrict__".split())
_BUILTIN = frozenset("void bool char short int long float double signed unsigned".split())
_ENTERED = re.compile(r"(?:extern\s*\"C\"|namespace(?:\s+[\w:]+)?)\s*$")
_OPENING, _CLOSING = "([{<", ")]}>"


def read_header(text: str, prefix: str = "infini") -> list[Function]:
    """The functions that a header declares whose names start with ``prefix``, in its order."""
    text = text.replace("\\\r\n", " ").replace("\\\n", " ")
    text = _SKIPPED.sub(lambda m: " " if not m[1] else m[1] if m[1] == '"C"' else '""', text)
    text = _ATTRIBUTE.sub(" ", _without_directives(text))
    text = _without_bodies(text)
    found = []
    for match in re.finditer(rf"\b({re.escape(prefix)}\w*)\s*\(", text):
        before = re.search(r"(\w+|[*&>)])\s*$", text[: match.start()])
        end = _matching(text, match.end() - 1)
        # A result type or a macro stands before the name of a declaration; what is called instead stands after an operator.
        if before is None or before[1] in ("return", "typedef") or end is None:
            continue
        parts = _split(text[match.end() : end])
        found.append(Function(match[1], tuple(_parameter(p) for p in parts if p.split() != ["void"])))
    return found


def _without_directives(text: str) -> str:
    """Without preprocessor lines, and without what ``#if 0`` leaves out."""
    kept, dead = [], [False]
    for line in text.split("\n"):
        directive = re.match(r"\s*#\s*(\w*)\s*(.*)", line)
        if directive is None:
            if not any(dead):
                kept.append(line)
        elif directive[1] in ("if", "ifdef", "ifndef"):
            dead.append(directive[1] == "if" and directive[2].strip() in ("0", "false"))
        elif directive[1] in ("else", "elif") and len(dead) > 1:
            dead[-1] = False
        elif directive[1] == "endif" and len(dead) > 1:
            dead.pop()
    return "\n".join(kept)


def _without_bodies(text: str) -> str:
    """Without what stands in braces, but for the braces of ``extern "C"`` and namespaces."""
    out, i = [], 0
    while i < len(text):
        c = text[i]
        if c == "{" and not _ENTERED.search(text[:i]):
            end = _matching(text, i)
            if end is None:
                break
            out.append(";")
            i = end + 1
            continue
        out.append(";" if c in "{}" else c)
        i += 1
    return "".join(out)


def _matching(text: str, start: int) -> int | None:
    """Where the bracket at ``start`` is closed."""
    opening, closing = text[start], _CLOSING[_OPENING.index(text[start])]
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == opening) - (text[i] == closing)
        if depth == 0:
            return i
    return None


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets; nothing for nothing."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in _OPENING) - (c in _CLOSING)
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]] if text.strip() else []


def _parameter(text: str) -> Parameter:
    text = text.split("=")[0]
    function = re.search(r"\(\s*\*\s*(\w*)\s*\)", text)
    if function:
        return Parameter(" ".join(text.replace(function[0], "(*)").split()), function[1])
    text, arrays = re.subn(r"\[[^\]]*\]", " ", text)
    words = re.findall(r"[\w:]+(?:\s*<.*>)?|\.\.\.|[*&]", text)
    base = [w for w in words if w not in _QUALIFIERS and w not in "*&"]
    name = ""
    if len(base) > 1 and words and words[-1] == base[-1] and base[-1] not in _BUILTIN:
        name = base.pop()
    stars = "".join(w for w in words if w in "*&") + "*" * arrays
    first = next((i for i, w in enumerate(words) if w in "*&"), len(words))
    constant = ["const"] if "const" in words[:first] else []
    return Parameter((" ".join([*constant, *base]) + (" " + stars if stars else "")).strip(), name)

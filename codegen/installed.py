"""What an InfiniCore installation has: which operators, and in which order they take their arguments.

There is no version to ask for, and some operators changed their arguments while their symbols stayed. So the installation's own headers are read, parameter by
parameter, and a declaration only counts if the library exports it. Without headers the symbols alone must do: some tell the day that an installation is not older
than, and an operator counts if its arguments have not changed since.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from codegen.calls import ATTRIBUTES, CALLS, OLDER, PARAMETERS, RECORD_OPS, CallSpec, symbols
from codegen.declarations import Parameter, read_header
from codegen.elf import exported_symbols
from ir.errors import BuildError
from passes.targets import OpSupport, PartialTarget, Target

LIBRARIES = ("libinfinirt.so", "libinfiniop.so", "libinfiniccl.so")
CORE = (
    "infiniopCreateHandle infiniopDestroyHandle infiniopCreateTensorDescriptor infiniopDestroyTensorDescriptor infinirtSetDevice infinirtMalloc infinirtFree "
    "infinirtMemcpy infinirtMemcpyAsync infinirtStreamCreate infinirtStreamDestroy infinirtStreamSynchronize infinirtDeviceSynchronize"
).split()
GRAPH = (
    "infinirtStreamBeginCapture infinirtStreamEndCapture infinirtGraphInstantiate infinirtGraphLuanch infinirtGraphExecDestroy infinirtGraphDestroy"
).split()

# What came to InfiniCore's main on which day: an export that is there, and one that went away then. An installation is not older than the latest that it meets.
LANDMARKS: tuple[tuple[str, str, str], ...] = (
    ("2025-09-02", "infiniopCreateTopkrouterDescriptor", ""),
    ("2025-09-16", "infiniopCreateTopkrouterDescriptor", "infiniopCreateRoPEv2Descriptor"),
    ("2025-12-29", "infiniopCreatePagedCachingDescriptor", ""),
    ("2026-01-07", "infiniopCreateAddRMSNormDescriptor", ""),
    ("2026-01-22", "infinirtStreamBeginCapture", ""),
    ("2026-02-13", "infiniopCreateEmbeddingDescriptor", ""),
    ("2026-05-09", "infinirtGetMemInfo", ""),
    ("2026-05-26", "infinirtMemset", ""),
)
HEADER_LANDMARK = ("2026-03-06", "__INFINI_C")  # the macro was __C until then

# The day since which an operator takes today's arguments. One that is not named never changed them, or only lost or gained its workspace, which a symbol tells.
CHANGED: dict[str, str] = {
    "CausalSoftmax": "2025-04-09",
    "RoPE": "2025-09-16",
    "PagedAttentionPrefill": "2026-01-09",
    "PagedCaching": "2026-01-12",
    "AddRMSNorm": "2026-02-13",
    "LogSoftmax": "2026-04-02",
}

# Forms that the engine cannot use, by what tells them: a parameter that is there (+) or not (-).
UNUSABLE: dict[str, dict[str, str]] = {
    "PagedAttentionPrefill": {
        "+cache_lens": "the form before 2026-01-09: one pointer more, and seq_lens counts the new tokens only",
        "+history_lens": "the form before 2026-01-09: lengths do not count the new tokens",
    },
    "AddRMSNorm": {"-residual_out": "the form before 2026-01-07, which does not give the sum"},
    "LogSoftmax": {"-dim": "the form before 2026-04-02"},
}
NO_ALGO = "rope of the form before 2025-09-16: no algo, so that it turns interleaved pairs only"

# Until that day the paged attentions took lengths in int64 only, whatever the target's record says of main.
NARROW_LENGTHS_SINCE = "2026-03-06"
WITH_LENGTHS = ("paged_attention", "paged_attention_prefill")


@dataclass(frozen=True)
class Installed:
    """An InfiniCore installation, as found.

    Attributes:
        root: its folder.
        source: where the argument orders are from: ``headers``, or ``symbols`` where there are none.
        ops: the ops of the targets' records that are there and whose arguments are understood.
        specs: CALLS, in the argument orders of this installation; those of ops that are not there are main's.
        arguments: the parameter names of every declared infiniop function, as found.
        notes: per op, why it is absent, or which form it has if that is not main's.
        exports: the symbols of its libraries.
        not_before: a day on InfiniCore's main that it is not older than (ISO); empty if nothing tells.
    """

    root: Path
    source: str
    ops: frozenset[str]
    specs: Mapping[str, CallSpec]
    arguments: Mapping[str, tuple[str, ...]]
    notes: Mapping[str, str]
    exports: frozenset[str]
    not_before: str

    @property
    def embedded(self) -> bool:
        """Whether it is a build of the embedded library."""
        return "infinicpuIsa" in self.exports

    @property
    def graph_capture(self) -> bool:
        """Whether streams can be captured, as far as its functions tell."""
        return self.exports.issuperset(GRAPH)


class _Unknown(Exception):
    """A parameter list that no form of the operator has."""


def probe(root: Path) -> Installed:
    """Read an installation: ``include/`` and ``lib/lib{infinirt,infiniop,infiniccl}.so``; nothing of it is loaded or run.

    Raises:
        BuildError: there is no InfiniCore, or a library or header of it cannot be read.
    """
    exports = _exports(root)
    declared, macros = _headers(root / "include")
    source = "headers" if declared else "symbols"
    not_before = max((day for day, there, gone in LANDMARKS if there in exports and gone not in exports), default="")
    if HEADER_LANDMARK[1] in macros:
        not_before = max(not_before, HEADER_LANDMARK[0])
    ops, specs, notes = set(), dict(CALLS), {}
    for name, op in RECORD_OPS.items():
        try:
            found, note = (
                _from_headers(name, declared, exports) if declared else _from_symbols(name, exports, not_before)
            )
        except _Unknown as error:
            notes[op] = str(error)
            continue
        specs.update(found)
        if note:
            notes[op] = note
        if note != NO_ALGO:
            ops.add(op)
    arguments = {f: tuple(p.name for p in lists[0]) for f, lists in declared.items()}
    return Installed(root, source, frozenset(ops), specs, arguments, notes, exports, not_before)


# --- what is there --------------------------------------------------------------------------------------------------------------------------------


def _exports(root: Path) -> frozenset[str]:
    paths = [root / "lib" / name for name in LIBRARIES]
    for path in paths[:2]:
        if not path.is_file():
            raise BuildError(f"{root}: expected an InfiniCore there, found no lib/{path.name}")
    exports = frozenset().union(*(exported_symbols(p) for p in paths if p.is_file()))
    missing = [name for name in CORE if name not in exports]
    if missing:
        raise BuildError(f"{root}: expected an InfiniCore there, its libraries have no {missing[0]}")
    return exports


def _headers(include: Path) -> tuple[dict[str, list[tuple[Parameter, ...]]], set[str]]:
    """The distinct parameter lists of every infiniop function that ``infiniop.h`` and what it includes declare, and the macros before declarations."""
    declared: dict[str, list[tuple[Parameter, ...]]] = {}
    macros: set[str] = set()
    first = include / "infiniop.h"
    # Without infiniop.h, the operators' own headers say as much.
    pending = [first] if first.is_file() else sorted((include / "infiniop" / "ops").glob("*.h"))
    seen: set[Path] = set()
    while pending:
        path = pending.pop().resolve()
        if path in seen:
            continue
        seen.add(path)
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise BuildError(f"{path}: cannot be read: {error.strerror}") from None
        macros.update(re.findall(r"^\s*(__\w+)\s+__export\b", text, re.MULTILINE))
        for function in read_header(text, "infiniop"):
            lists = declared.setdefault(function.name, [])
            if function.parameters not in lists:
                lists.append(function.parameters)
        for name in re.findall(r"^\s*#\s*include\s*[\"<]([^\">]+)[\">]", text, re.MULTILINE):
            places = (path.parent / name, include / name)
            pending += [p for p in places if p.is_file()][:1]
    return declared, macros


# --- argument orders ------------------------------------------------------------------------------------------------------------------------------


def _from_symbols(name: str, exports: frozenset[str], not_before: str) -> tuple[dict[str, CallSpec], str]:
    specs = {key: spec for key, spec in CALLS.items() if spec.name == name}
    _check_exports(next(iter(specs.values()), CallSpec(name, (), ())), exports)
    if not_before < CHANGED.get(name, ""):
        raise _Unknown(
            f"there are no headers, and no symbol tells whether it takes its arguments as since {CHANGED[name]} or as before"
        )
    return specs, ""


def _from_headers(
    name: str, declared: Mapping[str, list[tuple[Parameter, ...]]], exports: frozenset[str]
) -> tuple[dict[str, CallSpec], str]:
    """The specs of CALLS that are this operator, in the order found, and what is to be said about it."""
    functions = (f"infiniopCreate{name}Descriptor", f"infiniop{name}", f"infiniopDestroy{name}Descriptor")
    for function in functions:
        if function not in declared:
            raise _Unknown(f"its headers declare no {function}")
        if len(declared[function]) > 1:
            raise _Unknown(f"its headers declare {function} more than once, differently")
    create, call = declared[functions[0]][0], declared[functions[1]][0]
    workspace = len(call) > 3 and [p.name for p in call[1:3]] == ["workspace", "workspace_size"]
    if len(create) < 3 or create[0].type != "infiniopHandle_t" or not create[1].type.endswith("*"):
        raise _Unknown(f"{functions[0]} takes {_listed(create)}; expected a handle and a descriptor's address first")
    if len(call) < 3 or not call[0].type.endswith("Descriptor_t") or call[-1].type != "void *":
        raise _Unknown(f"{functions[1]} takes {_listed(call)}; expected a descriptor first and a stream last")
    at_create = _order(name, 0, functions[0], create[2:])
    at_call = _order(name, 1, functions[1], call[3 if workspace else 1 : -1])
    _check_exports(CallSpec(name, (), (), workspace), exports)
    if workspace and f"infiniopGet{name}WorkspaceSize" not in declared:
        raise _Unknown(f"its headers declare no infiniopGet{name}WorkspaceSize")
    mine = {key: spec for key, spec in CALLS.items() if spec.name == name}
    found = {
        key: CallSpec(name, tuple(s.create[i] for i in at_create), tuple(s.call[i] for i in at_call), workspace)
        for key, s in mine.items()
    }
    if name == "RoPE" and len(at_create) < len(_names(name, 0)):
        return found, NO_ALGO
    if not found and (at_create, at_call) != tuple(tuple(range(len(_names(name, which)))) for which in (0, 1)):
        raise _Unknown(f"{functions[0]} takes {_listed(create)}, which is not main's order")
    older = [f"the order before {OLDER[k][1]}" for k, s in found.items() if k in OLDER and s == OLDER[k][0]]
    if found == mine or older:
        return found, "".join(older[:1])
    return found, f"an order of its own: {functions[0]} takes {_listed(create)}, {functions[1]} {_listed(call)}"


def _names(name: str, which: int) -> list[tuple[str, ...]]:
    return [tuple(n.split("|")) for n in PARAMETERS[name][which].split()]


def _order(name: str, which: int, function: str, found: tuple[Parameter, ...]) -> tuple[int, ...]:
    """Where the parameters stand in main's order; _Unknown unless they are main's, in whatever order."""
    known = _names(name, which)
    given = [p.name.removesuffix("_desc") for p in found]
    absent = [names[0] for names in known if not set(names) & set(given)]
    for mark, why in UNUSABLE.get(name, {}).items():
        if mark[1:] in (given if mark[0] == "+" else absent):
            raise _Unknown(why)
    expected = f"{function} takes {_listed(found)}; known are {', '.join(n[0] for n in known)}"
    positions = []
    for parameter, spelled in zip(found, given):
        at = next((i for i, names in enumerate(known) if spelled in names), None)
        if at is None or at in positions:
            raise _Unknown(expected)
        wanted = ATTRIBUTES.get(known[at][0]) or ("infiniopTensorDescriptor_t" if which == 0 else "a pointer")
        plain = parameter.type.removeprefix("const ")
        if plain != wanted and not (wanted == "a pointer" and plain.count("*") == 1):
            raise _Unknown(f"{function} takes {parameter}, expected {wanted}")
        positions.append(at)
    if absent not in ([], ["algo"]):
        raise _Unknown(expected)
    return tuple(positions)


def _check_exports(spec: CallSpec, exports: frozenset[str]) -> None:
    for symbol in symbols(spec):
        if symbol not in exports:
            raise _Unknown(f"its libraries have no {symbol}")


def _listed(parameters: tuple[Parameter, ...]) -> str:
    return "(" + ", ".join(p.name or p.type for p in parameters) + ")"


# --- targets --------------------------------------------------------------------------------------------------------------------------------------


def narrow(target: Target, installed: Installed) -> PartialTarget:
    """The target with only those ops, collectives and abilities that the installation has."""
    missing = {}
    for op in target.ops:
        if op not in installed.ops:
            why = installed.notes.get(op, "its arguments are not known here")
            missing[op] = f"{op} is not in the InfiniCore at {installed.root}: {why}"
    for name in target.collectives:
        if f"infiniccl{name}" not in installed.exports:
            missing[name] = (
                f"{name} is not in the InfiniCore at {installed.root}: its libraries have no infiniccl{name}"
            )
    ops = {op: _dated(op, support, installed) for op, support in target.ops.items() if op not in missing}
    given = {f.name: getattr(target, f.name) for f in fields(Target)}
    given.update(
        ops=ops,
        collectives=tuple(c for c in target.collectives if c not in missing),
        graph_capture=target.graph_capture and installed.graph_capture,
        missing=missing,
    )
    return PartialTarget(**given)


def _dated(op: str, support: OpSupport, installed: Installed) -> OpSupport:
    """What an op takes in an installation of that age, where it took less once."""
    if op in WITH_LENGTHS and installed.not_before < NARROW_LENGTHS_SINCE and support.index_dtypes:
        return replace(support, index_dtypes=tuple(d for d in support.index_dtypes if d == "i64"))
    return support

"""Show what each target has, and what is done where it has not."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable

from passes.legalise import FORMS, Form
from passes.targets import (
    COLLECTIVES,
    CONSTRAINTS,
    OPERANDS,
    RELEASE_0_1_0,
    TARGETS,
    OpSupport,
    Target,
    record_of,
    targets,
)

DTYPES = ("f32", "bf16", "f16")
NONE = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        nargs="?",
        choices=[*TARGETS, "embedded"],
        metavar="TARGET",
        help="one target in detail (default: all in a table)",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(arguments: argparse.Namespace) -> int:
    if arguments.target:
        record = targets()[arguments.target]
        print(json.dumps(detail(record)) if arguments.json else "\n".join(describe(record)))
        return 0
    rows = [summary(targets()[name]) for name in ("embedded", *TARGETS)]
    print(json.dumps(rows) if arguments.json else "\n".join(table(rows)))
    return 0


# --- facts ----------------------------------------------------------------------------------------------------------------------------------------


def choices(record: Target) -> dict[str, dict[str, tuple[str, str]]]:
    """Per fused op and dtype: the form that is taken where the model's sizes allow it, and why those before it are not."""
    rows: dict[str, dict[str, tuple[str, str]]] = {}
    for op, forms in FORMS.items():
        rows[op] = {}
        for dtype in DTYPES:
            reasons, taken = [], NONE
            for form in forms:
                refusal = _refusal(record, form, dtype)
                if not refusal:
                    taken = form.name
                    break
                reasons.append(f"{form.name}: {refusal}")
            rows[op][dtype] = (taken, "; ".join(reasons))
    return rows


def _refusal(record: Target, form: Form, dtype: str) -> str:
    refusals = [record.refusal(need, dtype) for need in form.needs]
    if form.collective:
        refusals.append(record.collective_refusal(form.collective, dtype))
    return next(filter(None, refusals), "")


def summary(record: Target) -> dict[str, str]:
    """One row of the table, every cell a text."""
    rows = choices(record)
    substitutes, absent = [], []
    for op, forms in FORMS.items():
        if op == "attention_cached" or any(form.collective for form in forms):
            continue  # these have columns of their own
        for form in dict.fromkeys(rows[op][d][0] for d in DTYPES):
            if form == NONE:
                absent.append(op)
            elif form != forms[0].name:
                substitutes.append(f"{form} for {forms[0].name}")
    if "AllReduce" in record.collectives and "AllGather" not in record.collectives:
        substitutes.append("an uncut head for AllGather")
    return {
        "target": record.name,
        "device": str(record.device),
        "collectives": _collectives(record),
        "capture": "yes" if record.graph_capture else "no",
        **{f"KV {dtype}": _attention(record, rows["attention_cached"][dtype][0], dtype) for dtype in DTYPES},
        "what stands in": "; ".join(dict.fromkeys(substitutes)) or "-",
        "no form of": ", ".join(absent) or "-",
    }


def _attention(record: Target, taken: str, dtype: str) -> str:
    """The KV form, and one that is only taken when asked for since it needs an uncertain op."""
    asked = [
        form.name
        for form in FORMS["attention_cached"]
        if form.name != taken and not any(record.refusal(n, dtype, uncertain_ok=True) for n in form.needs)
    ]
    better = [name for name in asked if name != "contiguous"]
    return taken + "".join(f" ({name} if asked)" for name in better)


def _collectives(record: Target) -> str:
    if not record.collectives:
        return NONE
    if len(record.collectives) == len(COLLECTIVES):
        return "all"
    # The data that moves; the rest of the functions start and end a communicator.
    moving = ("CommInitAll", "GetUniqueId", "CommInitRank", "CommDestroy", "GroupStart", "GroupEnd")
    return " ".join(c for c in record.collectives if c not in moving)


def lacking(record: Target) -> list[tuple[str, list[str]]]:
    """Days, latest first, and the ops that an InfiniCore from before that day lacks on this target."""
    days: dict[str, list[str]] = {}
    for op, support in record.ops.items():
        if support.since:
            days.setdefault(support.since, []).append(op)
    return sorted(days.items(), reverse=True)


def detail(record: Target) -> dict:
    """Everything about one target: its record, the forms, and what older installs lack."""
    return dict(
        {k: v for k, v in record_of(record).items() if k not in ("name", "ops")},
        target=record.name,
        forms=choices(record),
        ops=record_of(record)["ops"],
        lacking=[dict(before=day, ops=ops) for day, ops in lacking(record)],
        any=choices(record.as_of(RELEASE_0_1_0)),
    )


def limits(op: str, support: OpSupport) -> list[str]:
    """The constraints of an op in words, one per line."""
    names = OPERANDS[op]
    words = {
        "ranks": lambda v: f"{names[0]} of rank {_or(v)}",
        "last_multiple": lambda v: f"last dimension of {names[0]} a multiple of {v}",
        "row_major_output": lambda v: f"{names[0]} row by row, its row stride not 1",
        "single_batch_dtypes": lambda v: f"one matrix per call in {', '.join(v)}",
        "alphas": lambda v: "(alpha, beta) only " + " or ".join(f"({a:g}, {b:g})" for a, b in v),
        "unit_last_stride": lambda v: f"last stride 1: {_names(names, v)}",
        "packed_heads": lambda v: f"heads packed: {_names(names, v)}",
        "contiguous": lambda v: f"contiguous: {_names(names, v)}",
        "max_row_bytes": lambda v: f"at most {v} bytes per row of {names[0]}",
        "clobbers": lambda v: f"destroys {_names(names, v)}",
    }
    return [words[key](getattr(support, key)) for key in CONSTRAINTS if getattr(support, key)]


def _or(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))


def _names(names: tuple[str, ...], operands: Iterable[int]) -> str:
    operands = tuple(operands)
    return "all" if operands == tuple(range(len(names))) else ", ".join(names[i] for i in operands)


# --- text -----------------------------------------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, str]]) -> list[str]:
    """Rows under their keys, in columns."""
    rows = [{k: k for k in rows[0]}, *rows]
    widths = {k: max(len(row[k]) for row in rows) for k in rows[0]}
    return ["  ".join(row[k].ljust(widths[k]) for k in row).rstrip() for row in rows]


def describe(record: Target) -> list[str]:
    """One target for a person."""
    lines = [
        f"{record.name}: device {record.device}, graph capture {'yes' if record.graph_capture else 'no'}, "
        f"blocks of {record.block_size} tokens in a paged KV cache"
    ]
    dtypes = f" ({', '.join(record.collective_dtypes)})" if record.collective_dtypes else ""
    lines += _wrapped(f"collectives: {', '.join(record.collectives) or NONE}{dtypes}", "  ")
    for note in record.notes:
        lines += _wrapped(note, "  ")
    lines += ["", "the model's ops, and how each is computed:"]
    for op, by_dtype in choices(record).items():
        outcomes: dict[tuple[str, str], list[str]] = {}
        for dtype, outcome in by_dtype.items():
            outcomes.setdefault(outcome, []).append(dtype)
        for (form, why), where in outcomes.items():
            some = f" [{', '.join(where)}]" if len(outcomes) > 1 else ""
            lines.append(f"  {op:17} {form}{some}")
            if why:
                lines += _wrapped(f"not {why}", " " * 22)
    lines += ["", "InfiniCore's ops:"]
    for op, support in record.ops.items():
        lines += _op(record, op, support)
    older = lacking(record)
    if older:
        lines += ["", "an install older than this day lacks:"]
        for day, ops in older:
            lines += _wrapped(f"{day}  {', '.join(ops)}", "  ", "              ")
        lines += _any(record)
    return lines


def _op(record: Target, op: str, support: OpSupport) -> list[str]:
    facts = [", ".join(support.dtypes)]
    if support.index_dtypes:
        facts.append(f"indices {', '.join(support.index_dtypes)}")
    if support.head_dims:
        facts.append(f"head_dim {', '.join(map(str, support.head_dims))}")
    if support.uncertain:
        facts.append("UNCERTAIN, used only if asked for")
    if record.graph_capture:
        facts.append({True: "replayable", False: "not replayable", None: "replay not known"}[support.graph_capture])
    lines = _wrapped(f"{op:23} {'; '.join(facts)}", "  ", " " * 26)
    for line in (*limits(op, support), *(f"({n})" for n in support.notes)):
        lines += _wrapped(line, " " * 26, " " * 28)
    return lines


def _any(record: Target) -> list[str]:
    """What --infinicore any means here: the first release's ops."""
    rows = choices(record.as_of(RELEASE_0_1_0))
    # What every model needs, in a dtype.
    needed = ("embedding", "linear", "rms_norm", "add_rms_norm", "norm_rope", "swiglu", "attention_cached")
    blocked = {op: why for op in needed for form, why in [rows[op]["bf16"]] if form == NONE}
    if not blocked:
        return ["  0.1.0 (--infinicore any) has enough for a model"]
    op, why = next(iter(blocked.items()))
    return _wrapped(f"0.1.0 (--infinicore any) has not enough for a model: {op}: {why}", "  ")


def _wrapped(text: str, first: str, rest: str | None = None) -> list[str]:
    return textwrap.wrap(
        text, 140, initial_indent=first, subsequent_indent=first if rest is None else rest, break_long_words=False
    )

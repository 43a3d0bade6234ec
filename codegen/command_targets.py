"""Show what each target has, and what is done where it has not."""

from __future__ import annotations

import argparse
import json

from passes.legalise import FORMS
from passes.targets import TARGETS, Target, select, targets

DTYPES = ("f32", "bf16", "f16")


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
        rows = choices(record)
        if arguments.json:
            print(
                json.dumps(
                    dict(
                        target=record.name,
                        device=record.device,
                        graph_capture=record.graph_capture,
                        collectives=record.collectives,
                        forms=rows,
                    )
                )
            )
            return 0
        print(
            f"{record.name}: device {record.device}, graph capture {'yes' if record.graph_capture else 'no'}, collectives {', '.join(record.collectives) or 'none'}"
        )
        for op, by_dtype in rows.items():
            for dtype, (form, why) in by_dtype.items():
                print(f"  {op:17} {dtype:5} {form}" + (f"   ({why})" if why else ""))
        return 0
    table = [
        dict(target=name, **summary(record))
        for name, record in [
            ("embedded", targets()["embedded"]),
            *((t, select(t, "any") if t != "cpu" else targets()[t]) for t in TARGETS),
        ]
    ]
    if arguments.json:
        print(json.dumps(table))
        return 0
    columns = list(table[0])
    widths = {c: max(len(c), *(len(str(row[c])) for row in table)) for c in columns}
    for row in [dict.fromkeys(columns, ""), *table]:
        print(
            "  ".join(
                (c if row is not table[0] and not any(row.values()) else str(row[c])).ljust(widths[c]) for c in columns
            ).rstrip()
        )
    return 0


def choices(record: Target) -> dict[str, dict[str, tuple[str, str]]]:
    """Per fused op and dtype: the form that is taken, and why those before it are not."""
    rows: dict[str, dict[str, tuple[str, str]]] = {}
    for op, forms in FORMS.items():
        rows[op] = {}
        for dtype in DTYPES:
            reasons, taken = [], "none"
            for form in forms:
                refusals = [r for r in (record.refusal(need, dtype) for need in form.needs) if r]
                if not refusals:
                    taken = form.name
                    break
                reasons.append(f"{form.name}: {refusals[0]}")
            rows[op][dtype] = (taken, "; ".join(reasons))
    return rows


def summary(record: Target) -> dict[str, str]:
    rows = choices(record)
    cells = {
        op: "/".join(dict.fromkeys(rows[op][d][0] for d in DTYPES))
        for op in ("embedding", "add_rms_norm", "swiglu", "attention_cached")
    }
    return {
        "device": str(record.device),
        **cells,
        "graph capture": "yes" if record.graph_capture else "no",
        "collectives": str(len(record.collectives)),
    }

"""What ``python -m codegen inspect`` found, as lines for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_WIDTH = 150


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for people."""
    facts = [
        f"{k} {report[k]}" for k in ("target", "record", "infinicore", "dtype", "opset", "producer") if report.get(k)
    ]
    yield f"{report['path']}: {', '.join([{'onnx': 'ONNX file', 'ir': 'graph dump', 'build': 'build'}[report['kind']], *facts])}"
    if report["kind"] == "build":
        state = "not compiled (--emit-only)" if report["library"] is None else report["library"]
        yield f"  from {report['source']}{', from its configuration alone' if report['config_only'] else ''}; {state}"
    if report["note"]:
        yield f"  {report['note']}"
    yield from _stage_lines(report)
    if report["passes"]:
        yield f"passes ({sum(p['ms'] for p in report['passes']):.0f} ms)"
        yield from _table(
            [(p["name"], f"{p['matches']} matches", f"{p['ms']:.1f} ms") for p in report["passes"]], "lrr"
        )
    if report.get("error"):
        last = (
            f"the last one that ended is {report['passes'][-1]['name']}" if report["passes"] else "none of them ended"
        )
        yield f"stopped at stage {list(report['stages'])[-1]}, {len(report['passes'])} passes done: {last}"
        return
    if report["legalised"]:
        yield "legalised"
        yield from _table(
            [
                (r["op"], f"{r['count']} times", r["form"], f"({r['why']})" if r["why"] else "")
                for r in report["legalised"]
            ],
            "lrll",
        )
    yield from _memory_lines(report)
    yield from _weight_lines(report)


def _stage_lines(report: Mapping[str, Any]) -> Iterator[str]:
    for stage, found in report["stages"].items():
        nodes = sum(sum(c.values()) for c in found["graphs"].values())
        title = f"{stage}: {nodes} nodes" + (
            f", {found['calls']} InfiniCore calls per step" if stage == "infini" else ""
        )
        yield title
        for label, counts in found["graphs"].items():
            listed = ", ".join(f"{op.removeprefix(stage + '.')} {n}" for op, n in counts.items())
            prefix = "  " if len(found["graphs"]) == 1 else f"  {label}: "
            yield from textwrap.wrap(
                listed,
                _WIDTH,
                initial_indent=prefix,
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )


def _memory_lines(report: Mapping[str, Any]) -> Iterator[str]:
    if report["memory"]:
        yield "scratch memory"
        yield from _table(
            [
                (f"{m['bytes']:,} bytes", f"per {m['per']}", f"without sharing {m['without_sharing']:,}")
                for m in report["memory"]
            ],
            "rll",
        )
    kv = report.get("kv") or {}
    if "bytes_per_token" in kv:
        blocks = f", blocks of {kv['block_size']} tokens" if kv["block_size"] else ""
        yield f"KV cache: {kv['form']} in {kv['dtype']}, {kv['bytes_per_token']:,} bytes per token{blocks}"
    if report.get("max_context"):
        yield f"context: {report['max_context']} tokens; end tokens: {', '.join(map(str, report['eos_token_ids'])) or 'none'}"


def _weight_lines(report: Mapping[str, Any]) -> Iterator[str]:
    weights = report["weights"]
    if not weights["roles"]:
        return
    places = "".join(f", {size:,} {place}" for place, size in weights["by_place"].items() if place != "not known")
    yield f"weights: {report['parameters']:,} parameters, {weights['bytes']:,} bytes{places}"
    rows = []
    for r in weights["roles"]:
        shape = "differs" if r["shape"] is None else f"{r['dtype']}{r['shape']}"
        where = (
            f"the same as {r['shared']}"
            if r["shared"]
            else ", ".join(p if len(r["places"]) == 1 else f"{n:,} {p}" for p, n in r["places"].items())
        )
        rows.append((r["role"], f"{r['count']}", shape, f"{r['bytes']:,} bytes", "" if where == "not known" else where))
    yield from _table(rows, "lrlrl")
    if "layers" in report:
        yield "every weight"
        yield from _table(
            [
                (r["name"], f"{r['dtype']}{r['shape']}", f"{r['bytes']:,}", r["place"], " ".join(r["tensors"]))
                for r in report["layers"]
            ],
            "llrll",
        )


def _table(rows: Sequence[tuple[str, ...]], sides: str) -> Iterator[str]:
    if not rows:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    for row in rows:
        cells = (cell.rjust(w) if side == "r" else cell.ljust(w) for cell, w, side in zip(row, widths, sides))
        yield ("  " + "  ".join(cells)).rstrip()

"""Run every operator of a build alone on its device, against its numpy reference: the first thing to do on new hardware.

Exit status 0 if all that were run are ok, 1 if any is wrong, refused or not there, 2 for bad input. Calls in which devices meet are run with --ndev, if there are as
many devices.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from codegen.calls import CALLS
from codegen.check_ops import NOT_RUN, OK, Result, status_text, summary
from codegen.check_ops_bounds import WHY
from codegen.check_ops_calls import Use, block_size_of, enumerate_calls, steps_of
from codegen.check_ops_worker import Job, run_all
from codegen.installed import probe
from ir import text
from ir.errors import BuildError, ConfigError, GraphError, Qwen3Error
from passes.targets import select
from runtime import infinicore
from runtime.manifest import Build, read_build
from runtime.structs import DeviceType

FORMAT = 1
GRAPH = "engine.ir"
PROMPT_LEN = 33  # two whole blocks and one token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="a build folder")
    parser.add_argument(
        "--prompt-len",
        metavar="N",
        help=f"tokens of the longer prompt (default: {PROMPT_LEN}, or the context if that is shorter)",
    )
    parser.add_argument("--only", metavar="OP,..", help="only these ops, for example gemm,rope")
    parser.add_argument(
        "--ndev",
        default="1",
        metavar="N",
        help="shapes of one of N devices, and the calls in which N devices meet (default: 1, which has none)",
    )
    parser.add_argument(
        "--dev-id",
        default="0",
        metavar="N",
        help="which device of its type; N devices that meet are numbered from it on (default: 0)",
    )
    parser.add_argument("--seed", default="0", metavar="N", help="of the random data (default: 0)")
    parser.add_argument(
        "--timeout", default="300", metavar="S", help="seconds that one operator may take (default: 300)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    number = {
        name: _number(arguments, name, least)
        for name, least in (("prompt_len", 1), ("ndev", 1), ("dev_id", 0), ("seed", 0), ("timeout", 1))
    }
    build = read_build(arguments.out)
    started = time.monotonic()
    terminal = sys.stderr.isatty()

    def say(result: Result) -> None:
        if terminal:
            print(f"[{time.monotonic() - started:5.1f} s] {result.op}: {status_text(result)}", file=sys.stderr)

    uses, left_out, steps = uses_of(build, number["prompt_len"], number["ndev"] or 1)
    uses = _only(uses, arguments.only, left_out)
    head = header(build)  # compiles the embedded library if it must be
    job = Job(build.data, uses, clobbers_of(build), number["dev_id"] or 0, number["seed"] or 0)
    about, results = run_all(job, float(number["timeout"] or 1), say)
    report = dict(
        format=FORMAT,
        **head,
        infinicore=about,
        ndev=number["ndev"],
        steps=steps,
        left_out=left_out,
        bounds={name: WHY[op] for name, op in sorted({(use.call.name, use.call.op) for use in uses})},
        results=[r.to_json() for r in results],
        summary=summary(results),
        seconds=round(time.monotonic() - started, 2),
    )
    print(json.dumps(_plain(report)) if arguments.json else "\n".join(lines(report, results)))
    return 0 if all(r.status in (OK, NOT_RUN) for r in results) else 1


def _number(arguments: argparse.Namespace, name: str, least: int) -> int | None:
    given = getattr(arguments, name)
    if given is None:
        return None
    if not given.isdecimal() or int(given) < least:
        raise ConfigError(f"--{name.replace('_', '-')} {given}: expected a number, {least} or more")
    return int(given)


def _only(uses: list[Use], names: str | None, left_out: list[str]) -> list[Use]:
    if names is None:
        return uses
    wanted, there = [n.strip() for n in names.split(",")], {u.call.name for u in uses}
    for name in wanted:
        if f"infini.{name}" in left_out:
            raise ConfigError(f"--only {name}: takes several devices; expected --ndev N with it")
        if name not in there:
            raise ConfigError(f"--only {name}: the engine has no such op; expected some of {', '.join(sorted(there))}")
    return [u for u in uses if u.call.name in wanted]


def uses_of(build: Build, prompt_len: int | None, ndev: int) -> tuple[list[Use], list[str], dict[str, Any]]:
    """The operators of a build's engine, the ops that take several devices where there is one, and the steps that they are for.

    Raises:
        BuildError: the folder lacks the engine's graph, or it is damaged.
        ConfigError: the prompt is longer than the context, or the model cannot be cut for that many devices.
    """
    path, data = build.folder / GRAPH, build.data
    if not path.is_file():
        raise BuildError(f"{build.folder}: there is no {GRAPH}, the graph of the engine; build it again")
    try:
        graph = text.read(path)
        context = int(data["meta"]["dctx"])
        whole = data.get("shard") or graph.meta.get("shard") or {}
        shard = {name: _share(name, int(value), ndev) for name, value in whole.items()}
        if ndev > 1 and not shard:
            raise ConfigError(f"--ndev {ndev}: {build.folder} was not built for more than one device")
        block = block_size_of(graph)
        steps = steps_of(min(PROMPT_LEN, context) if prompt_len is None else prompt_len, context, block)
        uses, left_out = enumerate_calls(graph, steps, meta=data["meta"], abi=data.get("abi"), shard=shard, ndev=ndev)
    except GraphError as error:
        raise BuildError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise BuildError(f"{build.folder / 'manifest.json'}: {error} is missing or malformed; build it again") from None
    shown = {s.name: dict(tokens=[n for n, _ in s.requests], totals=[t for _, t in s.requests]) for s in steps}
    return uses, left_out, shown


# What devices share, by its symbol in the graph.
_SHARED = {"G": "key/value heads", "I": "elements of the intermediate size", "V": "rows of the vocabulary"}


def _share(name: str, value: int, ndev: int) -> int:
    if value % ndev:
        what = _SHARED.get(name, f"elements of {name}")
        raise ConfigError(f"--ndev {ndev}: the model's {value} {what} cannot be shared evenly by {ndev} devices")
    return value // ndev


def clobbers_of(build: Build) -> dict[str, tuple[str, ...]]:
    """The inputs that an op is known to destroy on the build's target, from its record."""
    found = {}
    record = select(build.data["target"], build.data["infinicore"])
    for op, spec in CALLS.items():
        name = op.rsplit(".", 1)[-1]
        positions = getattr(record.ops.get(name), "clobbers", ())
        if positions:
            found[name] = tuple(spec.operands[p] for p in positions if p < len(spec.operands))
    return found


# --- the report -----------------------------------------------------------------------------------------------------------------------------------


def header(build: Build) -> dict[str, Any]:
    """What was run where: for whoever reads the report elsewhere."""
    data = build.data
    root = infinicore.choose(data)
    return dict(
        build=str(build.folder),
        generator=data.get("generator", ""),
        library=str(root / "lib" / "libinfiniop.so"),
        probe=probe_of(root),
        target=data["target"],
        record=data["record"],
        device=int(data["device"]),
        device_type=DeviceType(int(data["device"])).name,
        dtype=data["dtype"],
        kv=data["kv"]["form"],
        host=dict(
            machine=platform.machine(), system=f"{platform.system()} {platform.release()}", processor=_processor()
        ),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def probe_of(root: Path) -> dict[str, Any]:
    """Which ops the installation has, and what is different in it; whatever it cannot say is no reason not to run them."""
    try:
        found = probe(root)
    except Qwen3Error as error:
        return dict(source="", ops=[], notes={}, error=str(error))
    return dict(source=found.source, ops=sorted(found.ops), notes=dict(found.notes), error="")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def lines(report: Mapping[str, Any], results: list[Result]) -> list[str]:
    """The report for people: a header, a table, what is wrong, where the bounds come from, the summary."""
    about, host = report["infinicore"], report["host"]
    own = ", ".join(str(about[k]) + (" threads" if k == "threads" else "") for k in ("isa", "threads") if k in about)
    rows = [
        f"build      {report['build']}",
        f"library    {report['library']} ({about.get('infinicore', '?')}{', ' + own if own else ''})",
        f"target     {report['target']} ({report['device_type']}, record {report['record']}), {report['dtype']}, {report['kv']} KV cache"
        + (f", one of {report['ndev']} devices" if report["ndev"] > 1 else ""),
        f"probe      {_probe_text(report['probe'], {r.op for r in results})}",
        f"host       {host['machine']}, {host['system']}, {host['processor']}",
        f"date       {report['date']}",
        "steps      " + "; ".join(f"{name}: {_step_text(step)}" for name, step in report["steps"].items()),
        "",
    ]
    table = [("op", "operands", "cases", "error", "bound", "share", "us", "status")]
    for r in results:
        operands = " ".join(f"{o}={t}" for o, t in r.operands.items()) + (" in place" if r.in_place else "")
        error = bound = share = "-"
        if r.worst is not None:
            error, bound, share = f"{r.worst.error:.2g}", f"{r.worst.bound:.2g}", f"{r.worst.share:.2f}"
        took = "-" if r.microseconds is None else f"{r.microseconds:.1f}"
        table.append((r.op, operands, str(len(r.cases)), error, bound, share, took, status_text(r)))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    left = (0, 1, 7)
    for row in table:
        cells = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        rows.append("  ".join(cells).rstrip())
    rows += findings(results)
    for reason in dict.fromkeys(r.reason for r in results if r.status == NOT_RUN):
        names = ", ".join(dict.fromkeys(r.op for r in results if r.reason == reason))
        rows += ["", f"not run: {names}: {reason}"]
    rows += ["", "bounds (error and bound above are of the element that uses the largest share of its bound):"]
    rows += [f"  {name}: {why}" for name, why in report["bounds"].items()]
    if report["left_out"]:
        names = ", ".join(name.removeprefix("infini.") for name in report["left_out"])
        rows += ["", f"not run, for devices meet there: {names}; --ndev N runs them on N devices"]
    return [*rows, "", report["summary"]]


def findings(results: list[Result]) -> list[str]:
    """What is not ok: one paragraph per op and kind of fault, with the first operator that shows it."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for r in results:
        if r.status not in (OK, NOT_RUN):
            groups.setdefault((r.op, status_text(r), r.likely), []).append(r)
    rows = ["", "not ok:"] if groups else []
    for (op, status, reason), found in groups.items():
        first, of = found[0], sum(r.op == op for r in results)
        operands = " ".join(f"{o}={t}" for o, t in first.operands.items())
        rows.append(f"  {op}: {len(found)} of {of} {status}" + (f": {reason}" if reason else ""))
        rows.append(f"    {operands}{' in place' if first.in_place else ''}: {first.reason}")
        cases = dict.fromkeys(case for r in found for case in r.failed)
        if cases:
            rows.append(f"    cases: {', '.join(cases)}")
    return rows


def _step_text(step: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} of {t}" for n, t in zip(step["tokens"], step["totals"])) + " tokens"


def _probe_text(found: Mapping[str, Any], ops: set[str]) -> str:
    if found["error"]:
        return found["error"]
    notes = "; ".join(f"{op}: {note}" for op, note in found["notes"].items() if op in ops)
    return f"{len(found['ops'])} ops by its {found['source']}" + (f"; {notes}" if notes else "")


def _plain(value: Any) -> Any:
    """As JSON has it: what is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value

"""Compare a build with onnxruntime: logits and greedy tokens, step by step.

Exit status 0 for PASS and AMBIGUOUS (tokens differ only where the reference itself hardly prefers its own), 1 for FAIL, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from codegen.verdict import AMBIGUOUS, FAIL, PASS
from codegen.verify import STEPS, Report, verify
from ir.errors import ConfigError

_MARKS = {PASS: "", AMBIGUOUS: "near-tie", FAIL: "FAIL"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="a build folder")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="the checkpoint to compare with (default: what the build was made from)",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="a text to start from, as it is (default: a few prompts of random tokens)"
    )
    parser.add_argument("--tokens", metavar="1,2,3", help="token ids to start from")
    parser.add_argument(
        "--steps", default=str(STEPS), metavar="N", help=f"greedy tokens after the prompt (default: {STEPS})"
    )
    parser.add_argument("--ndev", type=int, default=1, metavar="N", help="devices that share the model (default: 1)")
    parser.add_argument("--dev-ids", metavar="0,1", help="which devices (default: the first N)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.steps.isdecimal():
        raise ConfigError(f"--steps {arguments.steps}: expected a number of tokens, 0 or more")
    tokens = None if arguments.tokens is None else parse_numbers(arguments.tokens, "--tokens")
    dev_ids = None if arguments.dev_ids is None else parse_numbers(arguments.dev_ids, "--dev-ids")
    started = time.monotonic()
    terminal = sys.stderr.isatty()

    def say(line: str) -> None:
        if terminal:
            print(f"[{time.monotonic() - started:5.1f} s] {line}", file=sys.stderr)

    report = verify(
        arguments.out,
        model=arguments.model,
        text=arguments.prompt,
        tokens=tokens,
        steps=int(arguments.steps),
        ndev=arguments.ndev,
        dev_ids=dev_ids,
        progress=say,
    )
    print(json.dumps(report.to_json()) if arguments.json else "\n".join(lines(report)))
    return 1 if report.verdict == FAIL else 0


def parse_numbers(text: str, option: str) -> list[int]:
    """``"1,2,3"`` as numbers."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas") from None


def lines(report: Report) -> list[str]:
    """The report as a table with one row per step, the worst of all prompts in it, and a line with the verdict."""
    limit = "none" if report.bound.relative_l2 is None else f"{report.bound.relative_l2:.2e}"
    prompts = ", ".join(str(len(p)) for p in report.prompts)
    result = [
        f"{report.build}: {report.target}, {report.dtype}, {report.kv} KV cache; against onnxruntime on {report.reference}",
        f"{len(report.prompts)} prompt{'s' if len(report.prompts) > 1 else ''} of {prompts} tokens; relative L2 bound {limit}: {report.bound.why}",
    ]
    table = [("step", "relative L2", "max |diff|", "engine", "onnxruntime", "margin", "")]
    for steps in zip(*report.results):
        worst = {step.verdict for step in steps}
        verdict = next(v for v in (FAIL, AMBIGUOUS, PASS) if v in worst)
        margin = max(step.margin for step in steps)
        table.append(
            (
                str(steps[0].step),
                f"{_largest([s.relative_l2 for s in steps]):.2e}",
                f"{_largest([s.max_abs for s in steps]):.2e}",
                " ".join(str(s.engine_token) for s in steps),
                " ".join(str(s.reference_token) for s in steps),
                f"{margin:.3g}" if margin else "",
                _MARKS[verdict],
            )
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    result += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    return [*result, f"{report.verdict}: {report.reason}"]


def _largest(values: list[float]) -> float:
    return next((v for v in values if v != v), max(values))  # NaN is the worst of all

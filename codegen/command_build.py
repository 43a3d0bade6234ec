"""Compile a model: C++ sources, manifest and engine in one folder."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from codegen.build import DTYPE_CHOICES, KV_CHOICES, build_model
from passes.targets import TARGETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", required=True, choices=TARGETS, metavar="TARGET", help=f"device: {' '.join(TARGETS)}"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face folder: config.json and safetensors")
    source.add_argument(
        "--onnx",
        type=Path,
        metavar="FILE",
        help="an ONNX file of the model (default: build/model.onnx, as frontend.export writes it)",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="OUT",
        help="folder to write (default: build/TARGET); an earlier build there is replaced",
    )
    parser.add_argument(
        "--dtype", choices=DTYPE_CHOICES, help="of weights, activations and KV cache (default: the checkpoint's own)"
    )
    parser.add_argument("--quant", default="none", help="quantisation of weights (default: none)")
    parser.add_argument(
        "--infinicore",
        metavar="embedded|any|DIR",
        help="embedded: the CPU library that comes with this package; any: only what every InfiniCore since 0.1.0 has; DIR: an installation, which is read "
        "(default: $INFINI_ROOT, else embedded)",
    )
    parser.add_argument(
        "--kv", default="auto", choices=KV_CHOICES, help="form of the KV cache (default: the best that the target has)"
    )
    parser.add_argument(
        "--max-batch", type=_positive, metavar="N", help="requests per step to plan for; recorded in the manifest"
    )
    parser.add_argument(
        "--max-context", type=_positive, metavar="N", help="tokens per request (default: the model's own)"
    )
    parser.add_argument(
        "--config-only", action="store_true", help="compile from config.json alone; weights may come later"
    )
    parser.add_argument("--emit-only", action="store_true", help="write the sources, do not compile them")
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="build for the device simulator: the target's record, enforced on this CPU",
    )
    parser.add_argument(
        "--dump-ir",
        type=Path,
        metavar="DIR",
        help="write the graph as text after each pass: 00-import.ir, 01-fold_constants.ir, ...",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def run(arguments: argparse.Namespace) -> int:
    model, onnx = arguments.model, arguments.onnx
    if model is None and onnx is None:
        onnx = Path("build/model.onnx")
    started = time.monotonic()
    terminal = sys.stderr.isatty() and not arguments.json

    def say(line: str) -> None:
        if terminal:
            print(f"[{time.monotonic() - started:5.1f} s] {line}", file=sys.stderr)

    names = (
        "target",
        "out",
        "dtype",
        "quant",
        "infinicore",
        "kv",
        "max_batch",
        "max_context",
        "config_only",
        "emit_only",
        "simulate",
        "dump_ir",
    )
    out = build_model(model=model, onnx=onnx, progress=say, **{name: getattr(arguments, name) for name in names})
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    if arguments.json:
        print(
            json.dumps(
                dict(
                    out=str(out),
                    seconds=round(time.monotonic() - started, 2),
                    **{k: manifest[k] for k in ("target", "record", "dtype", "kv", "library", "ops")},
                )
            )
        )
        return 0
    meta = manifest["meta"]
    print(
        f"{out}: {meta['nlayer']} layers in {manifest['dtype']}, {manifest['kv']['form']} KV cache, context {meta['dctx']}, {len(manifest['ops'])} InfiniCore functions, {time.monotonic() - started:.1f} s"
    )
    for line in (*why_contiguous(manifest), *next_steps(out, manifest)):
        print(line)
    return 0


def why_contiguous(manifest: dict[str, Any]) -> list[str]:
    """A line that says why the KV cache is not paged, where that is neither the person's own wish nor the rule for the target."""
    for op, form, why, _ in manifest["legalised"]:
        if op != "attention_cached" or form == "paged" or not why.startswith("paged: "):
            continue
        reason = why.removeprefix("paged: ").partition("; ")[0]  # what follows is of the form that was taken
        # InfiniCore's CPU has never had a paged cache; others mostly have, so a person may expect one.
        if reason != "not asked for" and not reason.startswith("cpu has no "):
            return [f"The KV cache is not paged: {reason}"]
    return []


def next_steps(out: Path, manifest: dict[str, Any]) -> list[str]:
    """Whether the build can run on this machine, and the commands that run it, here or there."""
    folder = shlex.quote(str(out))
    source = manifest["model"]["source"]
    model = shlex.quote(source["path"] if source["kind"] == "checkpoint" else manifest["model"]["weights_folder"])
    if manifest["model"]["config_only"]:
        return [
            f"It was compiled without weights; with a checkpoint of this configuration: python -m runtime.generate MODEL_DIR --build {folder} --prompt TEXT"
        ]
    run_here = f"python -m runtime.generate {model} --build {folder} --prompt TEXT"
    compile_there = f"cmake -S {folder} -B {folder}/cmake -DINFINI_ROOT=/path/to/infinicore && cmake --build {folder}/cmake && cp {folder}/cmake/libqwen3.so {folder}/"
    if manifest["library"] is None and (manifest["simulate"] or manifest["device"] == 0):
        if manifest["simulate"]:
            return [
                f"It was not compiled (--emit-only); without --emit-only it runs here, on a simulated {manifest['target']}"
            ]
        return ["It was not compiled (--emit-only); to compile it:", f"  {compile_there}"]
    if manifest["simulate"]:
        return [
            f"It runs here, on a simulated {manifest['target']}:",
            f"  {run_here}",
            f"  python -m codegen verify {folder}",
        ]
    if manifest["device"] == 0:
        return ["It can run here:", f"  {run_here}", f"  python -m codegen verify {folder}"]
    return [
        f"It cannot run here: it needs an InfiniCore with {manifest['target']} devices. On such a machine, with this package and the checkpoint there:",
        f"  {compile_there}",
        f"  INFINI_ROOT=/path/to/infinicore {run_here}",
    ]

"""``python -m frontend.export``: a Hugging Face Qwen3 directory to ONNX.

The weights are not copied: the graph's external data point into the checkpoint's own safetensors files.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from frontend.checkpoint import Checkpoint, check_weights, nonfinite_weights
from frontend.config import Qwen3Config, load_config
from frontend.onnx_file import CHECKPOINT_KEY, external_tensors
from frontend.qwen3_graph import IR_VERSIONS, build_model
from ir.errors import ConfigError, GraphError, Parser, run_cli

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen3"
DEFAULT_OUTPUT = Path("build") / "model.onnx"


def export(
    model_dir: str | Path,
    output: str | Path,
    *,
    opset: int = 18,
    kv: bool = True,
    config_only: bool = False,
) -> tuple[Qwen3Config, ModelProto]:
    """Write ``output`` from a Hugging Face directory; an existing file is replaced in one step.

    Args:
        opset: 18 (elementary ops) or 23 (RMSNormalization, RotaryEmbedding, Attention).
        kv: with past_key_values inputs and present outputs.
        config_only: from config.json alone; the weights need not be there.

    Raises:
        ConfigError: config.json or an argument is bad.
        CheckpointError: a weight is missing, or has the wrong shape or dtype.
    """
    folder, output = Path(model_dir), Path(output)
    if opset not in IR_VERSIONS:
        raise ConfigError(f"opset {opset}: expected one of {', '.join(map(str, IR_VERSIONS))}")
    if output.suffix != ".onnx" or output.is_dir():
        raise ConfigError(f"{output}: expected the name of a file that ends in .onnx")
    config = load_config(folder)
    tensors = None
    if not config_only:
        checkpoint = Checkpoint.open(folder)
        check_weights(config, checkpoint)
        tensors = checkpoint.tensors
    # Relative: a project folder may move with the model inside it, and the file is the same wherever it was made.
    noted = Path(os.path.relpath(folder.resolve(), output.parent.resolve())).as_posix()
    model = build_model(config, tensors, opset=opset, kv=kv, metadata={CHECKPOINT_KEY: noted})
    _write(model.SerializeToString(), output)
    return config, model


def _write(data: bytes, path: Path) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def check(path: str | Path, model: ModelProto, folder: str | Path, *, config_only: bool = False) -> list[str]:
    """Run onnx.checker on an exported file, and unless it is without weights one onnxruntime step. Returns warnings.

    Raises:
        GraphError: the checker refuses the file, or onnxruntime does, or its logits are not finite.
        CheckpointError: the weights cannot be read.
    """
    path, folder = Path(path), Path(folder)
    files = {place.location for _, place in external_tensors(model.graph)}
    try:
        if not config_only and all((path.parent / f).is_file() and not (path.parent / f).is_symlink() for f in files):
            onnx.checker.check_model(str(path), full_check=True)
        else:
            onnx.checker.check_model(without_external_data(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"{path}: onnx.checker: {error}") from None
    if config_only:
        return ["no onnxruntime step: the graph has no weights"]
    from frontend.ort import Reference  # onnxruntime takes a while to import: only where it is used

    bad = nonfinite_weights(Checkpoint.open(folder))
    warnings = (
        [f"{len(bad)} weights hold NaN or infinity: {', '.join(list(bad)[:3])}{', ...' if len(bad) > 3 else ''}"]
        if bad
        else []
    )
    logits, _ = Reference(path, folder, fold_weights=False).logits([0])
    if not bad and not np.isfinite(logits).all():
        raise GraphError(f"{path}: onnxruntime's logits are not finite")
    return warnings


def without_external_data(model: ModelProto) -> ModelProto:
    """A copy whose external initializers are graph inputs of the same type, for tools that need no values."""
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    external = [tensor for tensor, _ in external_tensors(graph)]
    inputs = {v.name for v in graph.input}
    graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in external if t.name not in inputs
    )
    names = {t.name for t in external}
    kept = [t for t in graph.initializer if t.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return copy


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m frontend.export",
        description="Export a Hugging Face Qwen3 directory to ONNX without copying weights.",
    )
    parser.add_argument(
        "model_dir", nargs="?", type=Path, metavar="MODEL_DIR", default=EXAMPLE, help="default: the bundled example"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.onnx", default=DEFAULT_OUTPUT, help=f"default: {DEFAULT_OUTPUT}"
    )
    parser.add_argument(
        "--opset",
        type=int,
        choices=sorted(IR_VERSIONS),
        default=18,
        help="18: elementary ops; 23: fused ops (default: 18)",
    )
    parser.add_argument("--no-kv", action="store_true", help="without KV cache inputs and outputs")
    parser.add_argument("--config-only", action="store_true", help="from config.json alone, without weights")
    parser.add_argument("--check", action="store_true", help="run onnx.checker and one onnxruntime step")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    config, model = export(
        args.model_dir, args.output, opset=args.opset, kv=not args.no_kv, config_only=args.config_only
    )
    warnings = check(args.output, model, args.model_dir, config_only=args.config_only) if args.check else []
    for warning in warnings:
        print(f"warning: {args.model_dir}: {warning}", file=sys.stderr)
    summary: dict[str, Any] = {
        "file": str(args.output),
        "bytes": args.output.stat().st_size,
        "opset": args.opset,
        "layers": config.num_hidden_layers,
        "parameters": config.parameters,
        "nodes": len(model.graph.node),
        "checked": args.check,
        "seconds": round(time.perf_counter() - begin, 2),
    }
    if args.json:
        print(json.dumps(summary))
    else:
        print(
            f"{summary['file']}: {summary['bytes'] / 1e6:.2f} MB, opset {args.opset}, {summary['layers']} layers, "
            f"{summary['nodes']} nodes, {summary['parameters'] / 1e6:,.2f} M parameters, "
            f"{'checked, ' if args.check else ''}{summary['seconds']} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

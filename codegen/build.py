"""Building: model or ONNX file in, a folder with C++ sources, manifest and compiled engine out."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from codegen import manifest as manifests
from codegen.calls import CALLS, CallSpec
from codegen.emit import Emitter
from codegen.installed import narrow, probe
from codegen.lower import Program, check_quant, lower
from codegen.render import render
from codegen.toolchain import LIBRARY, compile_engine, compiler
from frontend.checkpoint import Checkpoint, check_weights
from frontend.config import load_config
from frontend.export import export
from frontend.onnx_file import find_weights_folder
from frontend.onnx_import import import_onnx
from ir.errors import BuildError, ConfigError, GraphError, UnsupportedError
from ir.graph import Graph
from ir.text import to_text
from ir.types import DTYPES
from passes.targets import TARGETS, Target, record_of, select, targets
from runtime.manifest import fingerprint

GENERATOR = "qwen3-infinicore 0.1.0"
DTYPE_CHOICES = ("f32", "f16", "bf16")
KV_CHOICES = ("auto", "paged", "contiguous")


@dataclass(frozen=True)
class Source:
    """What is compiled: an imported graph, and where its weights lie."""

    graph: Graph
    kind: str  # "checkpoint" or "onnx"
    path: Path
    weights_folder: Path
    dtype: str
    max_context: int
    eos_token_ids: tuple[int, ...]


def from_checkpoint(model: Path, *, config_only: bool) -> Source:
    """Export a checkpoint to ONNX (opset 23, beside nothing: the file is thrown away) and import it."""
    config = load_config(model)
    if not config_only:
        check_weights(config, Checkpoint.open(model))
    with tempfile.TemporaryDirectory(prefix="qwen3-export-") as folder:
        file = Path(folder) / "model.onnx"
        export(model, file, opset=23, config_only=config_only)
        graph = import_onnx(file, model)
    return Source(
        graph, "checkpoint", model, model, config.dtype, config.max_position_embeddings, tuple(config.eos_token_ids)
    )


def from_onnx(file: Path, max_context: int | None = None) -> Source:
    """Import an ONNX file; facts about its use come from its metadata or the config.json beside the weights."""
    if not file.is_file():
        raise GraphError(
            f"{file}: no such ONNX file; write it with python -m frontend.export, or give --onnx or --model"
        )
    folder = find_weights_folder(file)
    graph = import_onnx(file, folder)
    properties = dict(graph.meta.get("metadata_props", {}))
    if (folder / "config.json").is_file():
        config = load_config(folder)
        return Source(
            graph, "onnx", file, folder, config.dtype, config.max_position_embeddings, tuple(config.eos_token_ids)
        )
    context = properties.get("max_position_embeddings", "")
    if not context.isdigit() and max_context is not None:
        context = str(max_context)
    if not context.isdigit():
        raise ConfigError(
            f"{file}: neither its metadata nor a config.json beside it says the largest context: give --max-context"
        )
    eos = json.loads(properties.get("eos_token_ids", "[]"))
    dtype = properties.get("dtype", "f32")
    return Source(graph, "onnx", file, folder, dtype if dtype in DTYPES else "f32", int(context), tuple(eos))


def build_model(
    *,
    model: Path | None = None,
    onnx: Path | None = None,
    out: Path | None = None,
    target: str = "cpu",
    dtype: str | None = None,
    quant: str = "none",
    infinicore: str | None = None,
    kv: str = "auto",
    max_batch: int | None = None,
    max_context: int | None = None,
    config_only: bool = False,
    emit_only: bool = False,
    simulate: bool = False,
    dump_ir: Path | None = None,
    sanitize: str = "",
    optimise: bool = True,
    progress: Callable[[str], Any] | None = None,
) -> Path:
    """Compile a model for a target. The folder appears complete or not at all.

    Args:
        model: a Hugging Face folder; or
        onnx: an ONNX file of a model.
        out: the folder to write; one that holds an earlier build is replaced. Default: build/TARGET.
        target: one of passes.targets.TARGETS.
        dtype: of weights, activations and caches; default: the checkpoint's own.
        infinicore: ``embedded``, ``any`` (for every InfiniCore since 0.1.0), or an installation's folder, whose headers and libraries say what it has. Default: what
            INFINI_ROOT names, else embedded.
        kv: ``auto``, ``paged`` or ``contiguous``.
        max_batch: requests per step that are planned for; recorded, no limit.
        max_context: tokens per request, at most the model's own.
        simulate: for the device simulator in the embedded library, which enforces the target's record.
        config_only: compile from config.json alone; the weights may come later.
        emit_only: write the sources and stop.
        sanitize: compile the engine with a sanitizer (``address,undefined`` or ``thread``), for tests.
        optimise: without, compiling takes a third of the time, for tests.
        progress: called with a line per step.

    Returns:
        The build folder.

    Raises:
        Qwen3Error: of the kind that fits; nothing is written then.
    """
    say = progress or (lambda line: None)
    check_quant(quant)
    if infinicore is None:
        infinicore = "embedded" if simulate else os.environ.get("INFINI_ROOT") or "embedded"
    if simulate and infinicore != "embedded":
        raise ConfigError(f"--simulate: goes without --infinicore {infinicore}; the simulator is the embedded library")
    for name, value, choices in (
        ("--dtype", dtype, DTYPE_CHOICES),
        ("--kv", kv, KV_CHOICES),
        ("--target", target, TARGETS),
    ):
        if value is not None and value not in choices:
            raise ConfigError(f"{name} {value}: choose one of {', '.join(choices)}")
    if (model is None) == (onnx is None):
        raise ConfigError("give either a model folder or an ONNX file")
    record, specs = _record(target, infinicore, simulate)
    if config_only and onnx is not None:
        raise ConfigError(
            "--config-only: goes with --model; an ONNX file exported from a configuration alone needs no such option"
        )
    # Through a link, what it points to is replaced.
    out = (Path(out) if out is not None else Path("build") / target).resolve()
    _check_out(out)
    if not emit_only:
        compiler()  # before the work, not after it
    started = time.monotonic()
    say("importing the graph")
    source = (
        from_checkpoint(Path(model), config_only=config_only)
        if model is not None
        else from_onnx(Path(onnx or ""), max_context)
    )
    context = _context(max_context, source.max_context, record, dtype or source.dtype)
    say("running the passes")
    program = _lower(
        source,
        target=record,
        dtype=dtype,
        kv=kv,
        max_context=context,
        eos_token_ids=source.eos_token_ids,
        dump_dir=dump_ir,
    )
    say("writing the sources")
    with _staging(out) as folder:
        manifest = emit(
            program,
            source,
            folder,
            target=target,
            infinicore=infinicore,
            config_only=config_only,
            max_batch=max_batch,
            specs=specs,
        )
        if not emit_only:
            say("compiling the engine")
            compile_engine(folder, headers(infinicore), sanitize=sanitize, optimise=optimise)
            manifest["library"] = LIBRARY
        manifest["simulate"] = _simulated(record, kv) if simulate else None
        manifest["build_seconds"] = round(time.monotonic() - started, 2)
        (folder / "manifest.json").write_text(manifests.dump(manifest), encoding="utf-8")
        _replace(folder, out)
    return out


def _record(target: str, infinicore: str, simulate: bool) -> tuple[Target, Mapping[str, CallSpec]]:
    """What the target has under this InfiniCore, and in which order its operators take their arguments."""
    if simulate:
        return targets()[target], CALLS
    record = select(target, infinicore)
    if infinicore in ("embedded", "any"):
        return record, CALLS
    installed = probe(Path(infinicore))
    if installed.embedded and target == "cpu":
        return targets()["embedded"], installed.specs  # our own library, by its folder
    return narrow(record, installed), installed.specs


def _lower(source: Source, *, dtype: str | None, **options: Any) -> Program:
    """Lower for the dtype that was asked for, else for the checkpoint's own; where the target has no bf16, for f16."""
    try:
        return lower(source.graph, dtype=dtype or source.dtype, **options)
    except UnsupportedError:
        if dtype is not None or source.dtype != "bf16":
            raise
        try:
            return lower(source.graph, dtype="f16", **options)
        except UnsupportedError:
            pass  # the reason against bf16 says more
        raise


def _simulated(record: Target, kv: str) -> dict[str, Any]:
    """The record that the simulator enforces: an uncertain op that was asked for is one that works."""
    if kv == "paged":
        record = replace(record, ops={name: replace(op, uncertain=False) for name, op in record.ops.items()})
    return record_of(record)


def emit(
    program: Program,
    source: Source,
    folder: Path,
    *,
    target: str,
    infinicore: str,
    config_only: bool,
    max_batch: int | None,
    specs: Mapping[str, CallSpec],
) -> dict[str, Any]:
    """Write the sources into ``folder`` and return the manifest."""
    facts = program.facts
    form = program.graph.meta["kv"]
    generated = f"Generated by {GENERATOR} for {program.target.name} in {facts.dtype}. Changes are lost when it is generated again."
    summary = (
        f"A dense decoder of {facts.nlayer} layers, hidden {facts.d}, {facts.nh} query and {facts.nkvh} key/value heads of {facts.dh}, "
        f"intermediate {facts.di}, vocabulary {facts.dvoc}; {form} KV cache."
    )
    emitter = Emitter(program.graph, program.plan, facts, program.target, specs)
    printed = emitter.context(generated, summary)
    files = render(printed)
    files["engine.ir"] = to_text(program.graph)  # what check-ops reads
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    table, own = manifests.weights(program.fused, facts)
    if own:
        save_file(own, folder / manifests.OWN_FILE)
    weights_folder = source.weights_folder.resolve()
    return dict(
        format=manifests.FORMAT,
        generator=GENERATOR,
        target=target,
        record=program.target.name,
        device=program.target.device,
        infinicore=infinicore if infinicore in ("embedded", "any") else str(Path(infinicore).resolve()),
        dtype=facts.dtype,
        quant="none",
        kv=dict(form=form, block_size=facts.block_size if form == "paged" else 0, dtype=facts.dtype),
        max_batch=max_batch,
        capabilities=record_of(program.target),
        shard=program.graph.meta.get("shard"),
        capture=printed["capture"],
        abi={f"infiniop{s.name}": [list(s.create), list(s.call)] for s in printed["specs"].values()},
        model=dict(
            source=dict(kind=source.kind, path=str(source.path.resolve())),
            weights_folder=str(weights_folder),
            config_only=config_only,
            eos_token_ids=list(facts.eos_token_ids),
            fingerprint="" if config_only else fingerprint(weights_folder, table),
        ),
        meta=manifests.meta(facts),
        library=None,
        ops=printed["symbols"],
        collectives=printed["collective_functions"],
        files={name: manifests.digest(folder / name) for name in files},
        passes=program.graph.meta["passes"],
        legalised=program.graph.meta["legalised"],
        memory=program.graph.meta["memory"],
        weights=table,
    )


def headers(infinicore: str) -> Path:
    """The InfiniCore whose headers the engine is compiled against."""
    if infinicore in ("embedded", "any"):
        from runtime.infinicpu import build

        return build()
    root = Path(infinicore)
    if not (root / "lib" / "libinfiniop.so").is_file():
        raise BuildError(
            f"--infinicore {infinicore}: there is no lib/libinfiniop.so in it; expected an InfiniCore installation, embedded or any"
        )
    if not (root / "include" / "infiniop.h").is_file():
        from runtime.infinicpu import build

        return build()  # libraries without headers: the C interface is the same
    return root


def _context(wanted: int | None, most: int, record: Target, dtype: str) -> int:
    """Tokens per request: what was asked for, else the model's own context, or as much of it as the target's softmax takes in one row."""
    if wanted is None:
        row = record.ops["causal_softmax"].max_row_bytes if "causal_softmax" in record.ops else None
        return most if row is None else min(most, row // DTYPES[dtype].bytes)
    if not 1 <= wanted <= most:
        raise ConfigError(f"--max-context {wanted}: expected 1 to {most}, the model's own")
    return wanted


def _check_out(out: Path) -> None:
    """An existing folder is replaced only if it is an earlier build, or empty."""
    try:
        names = os.listdir(out)  # once: another build may put its folder in place meanwhile
    except FileNotFoundError:
        return
    except NotADirectoryError:
        if out.exists():
            raise BuildError(f"{out}: is not a folder") from None
        return  # something above it is a file: said when the folder cannot be made
    if out in (Path.cwd(), *Path.cwd().parents):
        raise BuildError(f"{out}: is where the command runs; choose a folder below it")
    if names and "manifest.json" not in names:
        raise BuildError(f"{out}: is not empty and holds no earlier build; choose another folder")


class _staging:
    """A temporary folder beside ``out``, removed unless it took ``out``'s place."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> Path:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
            self.folder.chmod(0o755)
        except OSError as error:
            raise BuildError(f"{self.out.parent}: cannot be written: {error.strerror}") from None
        return self.folder

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise BuildError(f"{self.out}: cannot be written: {error.strerror or error}") from None


def _replace(folder: Path, out: Path) -> None:
    """Put the finished folder in place; of two builds at once the later one stays, whole."""
    for _ in range(10):
        try:
            os.rename(folder, out)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
        try:
            os.rename(out, old / "build")
        except FileNotFoundError:
            pass  # another build moved it first
        shutil.rmtree(old, ignore_errors=True)
    raise BuildError(f"{out}: another build keeps replacing it")

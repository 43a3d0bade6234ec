"""Look into an ONNX file, a graph dump (.ir) or a build: ops per stage, passes, legalisation, memory, weights.

Of a build, op counts are those that compiling its source again gives (nothing is written); the rest is what its manifest says. An ONNX file is compiled down to
InfiniCore calls for --target; where that fails, the output says how far it came, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codegen import manifest as manifests
from codegen.build import DTYPE_CHOICES, from_checkpoint, from_onnx
from codegen.inspect_text import lines
from codegen.lower import Program, lower, memory_summary
from frontend.onnx_import import import_onnx
from ir.errors import BuildError, ConfigError, GraphError, Qwen3Error
from ir.graph import STAGES, Graph
from ir.text import parse, to_text
from ir.types import DTYPES, bind
from passes.lower import to_fused, to_model
from passes.plan import plan_memory
from passes.targets import TARGETS, Target, select, target_of
from runtime import recipes
from runtime.manifest import Build, read_build

_UNITS = {
    "T": "token of a step",
    "L": "row of logits",
    "len": "new token of one request",
    "total": "cached token of one request",
    "len*total": "new token times cached token of one request",
    "1": "engine",
}
_SINGLE = ("input_embd", "output_norm", "output_embd")
_LAYER = (*manifests.PER_LAYER, "attn_qkv_b")
# An ONNX file that does not say its context can be looked into all the same; only the length of the rope tables depends on it.
_ANY_CONTEXT = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="an .onnx file, an .ir dump, or a build folder")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--layers", action="store_true", help="list the weights of every layer, with the tensors that they are made of"
    )
    parser.add_argument("--dump", action="store_true", help="print a graph as text instead")
    parser.add_argument(
        "--stage", choices=STAGES, help="which graph --dump prints (default: infini; of an .ir dump its own)"
    )
    parser.add_argument(
        "--target", choices=TARGETS, metavar="TARGET", help="of an .onnx file: the device to compile for (default: cpu)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPE_CHOICES, help="of an .onnx file: the dtype to compile in (default: its own)"
    )


def run(arguments: argparse.Namespace) -> int:
    path: Path = arguments.path
    if arguments.stage and not arguments.dump:
        raise ConfigError(f"--stage {arguments.stage}: says which graph --dump prints; found no --dump")
    found = Found(str(path), _kind(path))
    if found.kind != "onnx" and (arguments.target or arguments.dtype):
        raise ConfigError(f"--target and --dtype are for .onnx files; {path} has its own")
    failure: Qwen3Error | None = None
    try:
        if found.kind == "onnx":
            _onnx(found, path, arguments.target or "cpu", arguments.dtype, arguments.stage if arguments.dump else None)
        elif found.kind == "ir":
            _ir(found, path)
        else:
            _build(
                found, read_build(path.parent if path.is_file() else path), arguments.stage if arguments.dump else None
            )
    except Qwen3Error as error:
        failure = error
    if arguments.dump:
        _print_graph(found, arguments.stage, failure)
        return 0
    if failure is not None and not found.graphs:
        raise failure
    report = found.report(arguments.layers)
    if failure is not None:
        report["error"] = str(failure)
    print(json.dumps(report) if arguments.json else "\n".join(lines(report)))
    if failure is not None:
        raise failure
    return 0


def _kind(path: Path) -> str:
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder, expected an .onnx file, an .ir dump or a build folder")
    if path.is_dir() or path.name == "manifest.json":
        return "build"
    if path.suffix in (".onnx", ".ir"):
        return path.suffix[1:]
    raise ConfigError(f"{path}: expected an .onnx file, an .ir dump or a build folder")


def _print_graph(found: Found, stage: str | None, failure: Qwen3Error | None) -> None:
    stage = stage or (next(iter(found.graphs), "infini") if found.kind == "ir" else "infini")
    if stage not in found.graphs:
        if failure is not None:
            raise failure
        reason = found.note or f"it is of stage {', '.join(found.graphs)}"
        raise ConfigError(f"{found.path}: there is no graph of stage {stage} ({reason})")
    print(to_text(found.graphs[stage]), end="")


@dataclass
class Found:
    """What is known about a path."""

    path: str
    kind: str  # onnx, ir or build
    graphs: dict[str, Graph] = field(default_factory=dict)  # by stage
    passes: list[list[Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # target, dtype, kv, max_context, ...
    legalised: list[list[Any]] = field(default_factory=list)
    memory: Mapping[str, Any] = field(default_factory=dict)
    weights: list[dict[str, Any]] = field(default_factory=list)  # one row per weight
    note: str = ""

    def report(self, layers: bool) -> dict[str, Any]:
        """As JSON values."""
        rows = [row for row in self.weights if not row["shared"]]
        by_place = {
            place: sum(r["bytes"] for r in rows if r["place"] == place)
            for place in dict.fromkeys(r["place"] for r in rows)
        }
        result: dict[str, Any] = dict(
            path=self.path,
            kind=self.kind,
            **self.facts,
            stages={
                stage: dict(calls=_calls(g) if stage == "infini" else len(g.nodes), graphs=dict(_counts(g)))
                for stage, g in self.graphs.items()
            },
            passes=[dict(name=n, matches=m, ms=round(1000 * s, 2)) for n, m, s in self.passes],
            legalised=[dict(op=op, form=form, count=count, why=why) for op, form, why, count in self.legalised],
            memory=_memory(self.memory),
            parameters=sum(math.prod(r["shape"]) for r in rows),
            weights=dict(bytes=sum(r["bytes"] for r in rows), by_place=by_place, roles=_roles(self.weights)),
            note=self.note,
        )
        if layers:
            result["layers"] = self.weights
        return result


# --- the three kinds ------------------------------------------------------------------------------------------------------------------------------


def _onnx(found: Found, file: Path, target: str, dtype: str | None, until: str | None) -> None:
    if not file.is_file():
        raise ConfigError(f"{file}: is not a file")
    context: int | None = None
    eos: tuple[int, ...] = ()
    folder, own = file.parent, "f32"
    try:
        source = from_onnx(file)
        graph, folder, own = source.graph, source.weights_folder, source.dtype
        context, eos = source.max_context, source.eos_token_ids
    except ConfigError as error:
        graph, found.note = import_onnx(file), str(error)
    record = select(target, "embedded")
    found.facts = dict(
        target=target, record=record.name, dtype=dtype or own, max_context=context, eos_token_ids=list(eos)
    )
    program = _lower(found, graph, record, dtype or own, "auto", context or _ANY_CONTEXT, eos, until)
    if program is not None:
        table, inline = manifests.weights(program.fused, program.facts)
        found.facts.update(
            _kv(program.graph.meta["kv"], program.facts.block_size, program.facts.dtype, manifests.meta(program.facts))
        )
        found.weights = _weight_rows(table, folder, None, set(inline))


def _ir(found: Found, file: Path) -> None:
    try:
        graph = parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise GraphError(f"{file}: not readable ({error})") from None
    except GraphError as error:
        raise GraphError(f"{file}: {error}") from None
    found.graphs[graph.stage] = graph
    found.facts = {k: graph.meta[k] for k in ("opset", "producer") if graph.meta.get(k)}
    if "kv" in graph.meta:
        found.facts["kv"] = dict(form=graph.meta["kv"])
    found.passes = [list(p) for p in graph.meta.get("passes", ())]
    found.legalised = [list(row) for row in graph.meta.get("legalised", ())]
    if graph.stage == "infini":
        found.memory = memory_summary(plan_memory(graph))
    whole: dict[str, int] = graph.meta.get("shard", {})
    first: dict[str, str] = {}
    for name, constant in graph.constants.items():
        type_ = constant.value.type
        data = repr(constant.data)  # a tied head of a model that devices share has a name of its own
        shared = first.setdefault(data, name) if "Inline" not in data else name
        shape = [bind(d, whole) for d in type_.shape]
        found.weights.append(_row(name, type_.dtype, shape, "not known", [], "" if shared == name else shared))


def _build(found: Found, build: Build, until: str | None) -> None:
    data = build.data
    try:
        meta, model = data["meta"], data["model"]
        found.facts = dict(
            target=data["target"],
            record=data["record"],
            infinicore=data["infinicore"],
            dtype=data["dtype"],
            quant=data.get("quant", "none"),
            library=data.get("library"),
            source=model["source"]["path"],
            config_only=model["config_only"],
            max_context=meta["dctx"],
            eos_token_ids=list(model.get("eos_token_ids") or ()),
            **_kv(data["kv"]["form"], data["kv"]["block_size"], data["kv"]["dtype"], meta),
        )
        found.passes = [list(p) for p in data.get("passes", ())]
        found.legalised = [list(row) for row in data.get("legalised", ())]
        found.memory = data.get("memory", {})
        found.weights = _weight_rows(data["weights"], Path(model["weights_folder"]), build.folder, set())
        source, is_onnx = Path(model["source"]["path"]), model["source"]["kind"] == "onnx"
    except (KeyError, TypeError, AttributeError) as error:
        raise BuildError(f"{build.folder / 'manifest.json'}: {error} is missing or malformed; build it again") from None
    try:
        graph = (
            from_onnx(source).graph
            if is_onnx
            else from_checkpoint(source, config_only=bool(model["config_only"])).graph
        )
        record = target_of(data["capabilities"])
        again = Found(found.path, found.kind, found.graphs)  # the manifest's own history and decisions stay
        _lower(
            again,
            graph,
            record,
            data["dtype"],
            data["kv"]["form"],
            meta["dctx"],
            tuple(found.facts["eos_token_ids"]),
            until,
        )
    except Qwen3Error as error:
        found.note = f"op counts are not known: {error}"


def _lower(
    found: Found,
    graph: Graph,
    record: Target,
    dtype: str,
    kv: str,
    context: int,
    eos: tuple[int, ...],
    until: str | None,
) -> Program | None:
    """Run the passes, noting every stage that is reached."""
    found.graphs["onnx"] = graph
    if until == "onnx":
        return None
    log = _Log(found)
    model = to_model(graph, log=log)
    found.graphs["model"] = model
    if until == "model":
        return None
    try:
        program = lower(model, target=record, dtype=dtype, kv=kv, max_context=context, eos_token_ids=eos, log=log)
    except Qwen3Error:
        # It may have come as far as "fused": worth showing.
        found.graphs["fused"] = to_fused(model, dtype)
        if until == "fused":
            return None
        raise
    found.graphs.update(fused=program.fused, infini=program.graph)
    found.passes = [list(p) for p in program.graph.meta["passes"]]
    found.legalised = [list(row) for row in program.graph.meta["legalised"]]
    found.memory = program.graph.meta["memory"]
    return program


class _Log:
    """Notes each pass as it ends: of a pipeline that stops, the history is all there is."""

    _line = re.compile(r"\d+ (\S+): (\d+) matches, \d+ nodes, ([\d.]+) s")

    def __init__(self, found: Found) -> None:
        self.found = found

    def __call__(self, line: str) -> None:
        match = self._line.match(line)
        if match:
            self.found.passes.append([match[1], int(match[2]), float(match[3])])


# --- facts ----------------------------------------------------------------------------------------------------------------------------------------


def _kv(form: str, block_size: int, dtype: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    size = 2 * meta["nlayer"] * meta["nkvh"] * meta["dh"] * DTYPES[dtype].bytes
    return dict(kv=dict(form=form, block_size=block_size if form == "paged" else 0, dtype=dtype, bytes_per_token=size))


def _counts(graph: Graph, label: str = "main") -> Iterator[tuple[str, dict[str, int]]]:
    """Op counts of a graph and of the graphs inside it: a loop over layers has one body, a loop over requests two."""
    yield label, graph.counts()
    for node in graph.nodes:
        for key, inner in node.attrs.items():
            if isinstance(inner, Graph):
                yield from _counts(
                    inner, f"layer, {node.attrs['count']} times" if key == "body" else f"{key} of one request"
                )


def _calls(graph: Graph) -> int:
    """InfiniCore calls of a step, loops over layers rolled out; what runs once per request is not in it."""
    total = 0
    for node in graph.nodes:
        if node.op == "loop.layers":
            total += node.attrs["count"] * _calls(node.attrs["body"])
        total += node.op.startswith("infini.")
    return total


def _memory(memory: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scratch bytes per unit of what they grow with."""
    planned, alone = memory.get("scratch_bytes_per", {}), memory.get("buffers_bytes_per", {})
    return [
        dict(unit=unit, per=_UNITS.get(unit, unit), bytes=size, without_sharing=alone.get(unit, size))
        for unit, size in planned.items()
    ]


def _row(name: str, dtype: str, shape: list[int], place: str, tensors: list[str], shared: str = "") -> dict[str, Any]:
    return dict(
        name=name,
        dtype=dtype,
        shape=shape,
        bytes=math.prod(shape) * DTYPES[dtype].bytes,
        place=place,
        tensors=tensors,
        shared=shared,
    )


def _weight_rows(table: Mapping[str, Any], folder: Path, build: Path | None, inline: set[str]) -> list[dict[str, Any]]:
    """A row per weight of the manifest's table, in Qwen3Weights' order, layer by layer."""
    named = [(role, table[role]) for role in _SINGLE]
    layers = max((len(table[role]) for role in _LAYER if table.get(role)), default=0)
    named += [(f"{role}.{i}", table[role][i]) for i in range(layers) for role in _LAYER if table.get(role)]
    files = recipes.Files(folder, build or folder)
    seen: dict[str, str] = {}
    rows = []
    for name, recipe in named:
        key = json.dumps(recipe, sort_keys=True)
        dtype, shape = _type(recipe)
        rows.append(
            _row(name, dtype, shape, _place(recipe, files, build, inline), list(_tensors(recipe)), seen.get(key, ""))
        )
        seen.setdefault(key, name)
    return rows


def _type(recipe: Mapping[str, Any]) -> tuple[str, list[int]]:
    """What a recipe gives, without opening a file."""
    if "concat" in recipe:
        parts = [_type(p) for p in recipe["concat"]]
        shape = list(parts[0][1])
        shape[recipe["axis"]] = sum(s[recipe["axis"]] for _, s in parts)
        return parts[0][0], shape
    if "transpose" in recipe:
        dtype, shape = _type(recipe["transpose"])
        return dtype, [shape[p] for p in recipe["perm"]]
    if "cast" in recipe:
        return recipe["dtype"], _type(recipe["cast"])[1]
    if "slice" in recipe:
        dtype, shape = _type(recipe["slice"])
        shape[recipe["axis"]] = recipe["stop"] - recipe["start"]
        return dtype, shape
    return recipe["dtype"], list(recipe["shape"])


def _tensors(recipe: Mapping[str, Any]) -> Iterator[str]:
    if "concat" in recipe:
        for part in recipe["concat"]:
            yield from _tensors(part)
    elif "name" in recipe:
        yield recipe["name"]
    else:
        yield from _tensors(next(recipe[k] for k in ("transpose", "cast", "slice") if k in recipe))


def _place(recipe: Mapping[str, Any], files: recipes.Files, build: Path | None, inline: set[str]) -> str:
    """Where a weight is used: in its file (neighbours in the file count as one), in the build's own file, or packed when the engine is loaded."""
    if build is None and inline & set(_tensors(recipe)):
        return "build's own file" if "name" in recipe else "packed"
    try:
        node = recipes.parse(dict(recipe), files)
        if recipes.view(node) is None:
            return "packed"
        return "build's own file" if recipe.get("build") else "in place"
    except Qwen3Error:
        return "not there"


def _roles(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The weights by role, layers together."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        role = re.sub(r"\.\d+(?=\.|$)", ".N", row["name"])
        entry = table.setdefault(
            role,
            dict(role=role, dtype=row["dtype"], shape=row["shape"], count=0, bytes=0, places={}, shared=row["shared"]),
        )
        entry["count"] += 1
        if not row["shared"]:
            entry["bytes"] += row["bytes"]
            entry["places"][row["place"]] = entry["places"].get(row["place"], 0) + row["bytes"]
        if entry["shape"] != row["shape"]:
            entry["shape"] = None  # layers differ
    return list(table.values())

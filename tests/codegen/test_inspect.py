"""codegen inspect: ONNX files, graph dumps and builds, whole and broken ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from codegen import command_inspect
from codegen.__main__ import main
from codegen.build import build_model, from_checkpoint
from frontend.export import export
from ir.errors import run_cli
from ir.graph import STAGES
from ir.text import parse, to_text
from passes.legalise import legalise
from passes.lower import to_fused, to_model
from passes.roles import assign_roles
from passes.shard import shard
from passes.targets import select
from runtime.manifest import read_build
from runtime.recipes import Files, pack, view
from runtime.recipes import parse as parse_recipe
from tests.codegen.engines import Builder, config_of
from tests.models import random_weights

MODEL = "three"  # three layers, so that a count says which ops are in a layer; tied, stored in bf16
LAYERS = 3


@pytest.fixture(scope="session")
def folder(build_engine: Builder) -> Path:
    return build_engine.checkpoint(MODEL)


@pytest.fixture(scope="session")
def build(build_engine: Builder) -> Path:
    return build_engine(MODEL, emit_only=True)


@pytest.fixture(scope="session")
def onnx_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inspect") / "model.onnx"
    export(folder, file)
    return file


@pytest.fixture(scope="session")
def dumps(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dump after each pass."""
    root = tmp_path_factory.mktemp("dumps")
    build_model(model=folder, out=root / "build", emit_only=True, dump_ir=root / "ir", kv="contiguous")
    return sorted((root / "ir").iterdir())


def command(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = run_cli(main, ["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def as_json(capsys: pytest.CaptureFixture, *arguments: object) -> dict[str, Any]:
    status, out, err = command(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def edited(build: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a build with another manifest."""
    shutil.copytree(build, target)
    manifest = json.loads((target / "manifest.json").read_text())
    edit(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


# --- what is found --------------------------------------------------------------------------------------------------------------------------------


def test_an_onnx_file_is_followed_through_all_stages(capsys, onnx_file):
    report = as_json(capsys, onnx_file)
    assert list(report["stages"]) == list(STAGES)
    model, fused = (report["stages"][s]["graphs"]["main"] for s in ("model", "fused"))
    # q, k, v, o, gate, up, down and the head; two norms and two per-head norms a layer and the last one
    assert model["linear"] == 7 * LAYERS + 1 and model["rms_norm"] == 4 * LAYERS + 1 and model["rope"] == 2 * LAYERS
    assert fused["linear"] == 4 * LAYERS + 1 and fused["swiglu"] == fused["attention_cached"] == LAYERS
    assert report["stages"]["onnx"]["graphs"]["main"]["onnx.MatMul"] >= 7 * LAYERS + 1
    assert report["parameters"] == sum(w.size for w in random_weights(config_of(MODEL), 0).values())


def test_a_build_says_the_same_as_its_source(capsys, build, onnx_file):
    of_build, of_file = as_json(capsys, build), as_json(capsys, onnx_file)
    # Builds are made from another opset; from "model" on there is no difference.
    for stage in STAGES[1:]:
        assert of_build["stages"][stage] == of_file["stages"][stage]
    for key in (
        "legalised",
        "memory",
        "parameters",
        "weights",
        "kv",
        "max_context",
        "eos_token_ids",
        "dtype",
        "target",
    ):
        assert of_build[key] == of_file[key], key
    assert [p["name"] for p in of_build["passes"]] == [p["name"] for p in of_file["passes"]]


def test_calls_per_step_are_those_of_the_layers_rolled_out(capsys, build, folder):
    found = as_json(capsys, build)["stages"]["infini"]
    fused, _ = assign_roles(to_fused(to_model(from_checkpoint(folder, config_only=False).graph), "bf16"))
    low = legalise(shard(fused)[0], select("cpu", "embedded"), max_positions=64)
    assert found["calls"] == sum(n.op.startswith("infini.") for n in low.nodes)
    assert any(label.startswith("layer, ") for label in found["graphs"])


def test_pass_history_and_decisions_are_the_manifests(capsys, build):
    manifest, report = json.loads((build / "manifest.json").read_text()), as_json(capsys, build)
    assert [[p["name"], p["matches"]] for p in report["passes"]] == [p[:2] for p in manifest["passes"]]
    assert [[r["op"], r["form"], r["why"], r["count"]] for r in report["legalised"]] == manifest["legalised"]
    assert report["max_context"] == manifest["meta"]["dctx"] and report["eos_token_ids"] == [2, 0]


def test_the_decisions_of_a_build_are_those_of_its_day(capsys, build, tmp_path):
    def edit(manifest: dict[str, Any]) -> None:
        manifest["legalised"][0][2] = "there was a reason then"

    report = as_json(capsys, edited(build, tmp_path / "build", edit))
    assert report["legalised"][0]["why"] == "there was a reason then"


def test_reasons_stand_beside_the_decisions(capsys, onnx_file):
    rows = {r["op"]: r for r in as_json(capsys, onnx_file, "--target", "kunlun", "--dtype", "f16")["legalised"]}
    assert rows["add_rms_norm"]["form"] == "add, rms_norm" and "kunlun" in rows["add_rms_norm"]["why"]
    _, out, _ = command(capsys, onnx_file, "--target", "kunlun", "--dtype", "f16")
    assert rows["add_rms_norm"]["why"] in out


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
def test_memory_is_told_per_token_and_per_row(capsys, build_engine, kv):
    report = as_json(capsys, build_engine(MODEL, emit_only=True, kv=kv))
    config = config_of(MODEL)
    memory = {m["unit"]: m for m in report["memory"]}
    assert {"T", "L"} <= set(memory) and ("len*total" in memory) == (kv == "contiguous")
    assert all(0 < m["bytes"] <= m["without_sharing"] for m in memory.values())
    assert memory["T"]["bytes"] < memory["T"]["without_sharing"]
    # bf16 keys and values of every layer
    assert report["kv"]["bytes_per_token"] == 2 * 2 * LAYERS * config["num_key_value_heads"] * config["head_dim"]
    assert report["kv"]["block_size"] == (16 if kv == "paged" else 0)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_weights_lie_where_the_runtime_finds_them(capsys, build_engine, dtype):
    build = build_engine(MODEL, emit_only=True, dtype=dtype)
    report = as_json(capsys, build, "--layers")
    data = read_build(build).data
    files = Files(Path(data["model"]["weights_folder"]), build)
    packed = 0
    rows = {r["name"]: r for r in report["layers"]}
    for name, row in rows.items():
        role, _, layer = name.partition(".")
        recipe = data["weights"][role][int(layer)] if layer else data["weights"][role]
        node = parse_recipe(recipe, files)
        array = pack(node)
        assert (row["shape"], row["bytes"]) == (list(array.shape), array.nbytes)
        assert row["place"] == ("packed" if view(node) is None else "in place")
        packed += array.nbytes * (row["place"] == "packed" and not row["shared"])
    assert rows["output_embd"]["shared"] == "input_embd"  # tied
    assert report["weights"]["by_place"].get("packed", 0) == packed
    assert sum(report["weights"]["by_place"].values()) == report["weights"]["bytes"]
    assert rows["attn_qkv.1"]["tensors"] == [f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkv"]
    if dtype == "f32":  # nothing of a bf16 checkpoint is float32 already
        assert set(report["weights"]["by_place"]) == {"packed"}
    else:
        assert rows["attn_o.0"]["place"] == "in place"


def test_weights_that_an_exporter_stored_inline_go_into_the_build(capsys, folder, tmp_path):
    file = tmp_path / "inline.onnx"
    _, model = export(folder, file)
    onnx.load_external_data_for_model(model, str(folder))
    for tensor in model.graph.initializer:
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
    onnx.save(model, str(file))
    report = as_json(capsys, file)
    assert "build's own file" in report["weights"]["by_place"] and "in place" not in report["weights"]["by_place"]


def test_dumps_are_counted_as_they_are(capsys, dumps):
    assert len(dumps) > 15
    for file in dumps:
        graph = parse(file.read_text())
        report = as_json(capsys, file)
        assert list(report["stages"]) == [graph.stage]
        assert report["stages"][graph.stage]["graphs"]["main"] == graph.counts()
        assert [p["name"] for p in report["passes"]] == [p[0] for p in graph.meta.get("passes", [])]
        assert bool(report["memory"]) == (graph.stage == "infini")
        status, out, _ = command(capsys, file, "--dump")
        assert status == 0 and out == file.read_text()


def test_parameters_are_the_same_at_every_stage(capsys, dumps):
    weights = sum(w.size for w in random_weights(config_of(MODEL), 0).values())
    frequencies = config_of(MODEL)["head_dim"] // 2
    for file in dumps[-8:]:
        assert as_json(capsys, file)["parameters"] == weights + frequencies


@pytest.mark.parametrize("stage", STAGES)
def test_graphs_can_be_printed(capsys, build, onnx_file, stage):
    for path in (build, onnx_file):
        status, out, err = command(capsys, path, "--dump", "--stage", stage)
        assert (status, err) == (0, "")
        graph = parse(out)
        assert graph.stage == stage and to_text(graph) == out
    if stage == "infini":
        assert command(capsys, onnx_file, "--dump")[1].splitlines()[0] == out.splitlines()[0]


def test_the_text_has_every_section(capsys, build):
    status, out, _ = command(capsys, build, "--layers")
    lines = out.splitlines()
    assert status == 0 and "not compiled (--emit-only)" in out and max(map(len, lines)) < 200
    for start in (
        "onnx:",
        "model:",
        "fused:",
        "infini:",
        "passes",
        "legalised",
        "scratch memory",
        "KV cache: paged",
        "context:",
        "weights:",
        "every weight",
    ):
        assert any(line.startswith(start) for line in lines), start


def test_a_manifest_may_be_named_itself(capsys, build):
    assert as_json(capsys, build / "manifest.json")["parameters"] == as_json(capsys, build)["parameters"]


# --- where something is missing -------------------------------------------------------------------------------------------------------------------


def test_a_build_whose_source_is_gone_is_still_told(capsys, build, tmp_path):
    gone = str(tmp_path / "gone")

    def edit(manifest: dict[str, Any]) -> None:
        manifest["model"].update(source=dict(kind="checkpoint", path=gone), weights_folder=gone)

    report = as_json(capsys, edited(build, tmp_path / "build", edit))
    assert report["stages"] == {} and gone in report["note"] and report["passes"] and report["memory"]
    assert list(report["weights"]["by_place"]) == ["not there"]
    status, _, err = command(capsys, tmp_path / "build", "--dump")
    assert status == 2 and err.count("\n") == 1 and gone in err


def test_a_build_from_a_configuration_alone(capsys, folder, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "model")
    out = build_model(model=tmp_path / "model", out=tmp_path / "build", config_only=True, emit_only=True)
    report = as_json(capsys, out)
    assert list(report["stages"]) == list(STAGES) and list(report["weights"]["by_place"]) == ["not there"]
    assert report["parameters"] == sum(w.size for w in random_weights(config_of(MODEL), 0).values())


def test_an_onnx_file_that_does_not_say_its_context(capsys, folder, onnx_file, tmp_path):
    model = onnx.load(str(onnx_file), load_external_data=False)
    del model.metadata_props[:]
    shutil.copy(folder / "model.safetensors", tmp_path)
    onnx.save(model, str(tmp_path / "bare.onnx"))
    report = as_json(capsys, tmp_path / "bare.onnx", "--dtype", "bf16")
    assert report["max_context"] is None and "context" in report["note"]
    assert report["stages"]["infini"] == as_json(capsys, onnx_file)["stages"]["infini"]


def unraisable(source: Path, target: Path) -> Path:
    """An ONNX file of known ops that is no decoder: its activation is a cosine."""
    model = onnx.load(str(source), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type = "Cos"
    for entry in model.metadata_props:
        if entry.key == "checkpoint":
            entry.value = str((source.parent / entry.value).resolve())
    onnx.save(model, str(target))
    return target


def test_an_onnx_file_that_cannot_be_raised_says_how_far_it_came(capsys, onnx_file, tmp_path):
    file = unraisable(onnx_file, tmp_path / "cos.onnx")
    status, out, err = command(capsys, file)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "onnx: " in out and "raise_attention" in out
    assert out.splitlines()[-1].startswith("stopped at stage onnx, ")
    status, out, err = command(capsys, file, "--json")
    report = json.loads(out)
    assert status == 2 and list(report["stages"]) == ["onnx"] and err == f"error: {report['error']}\n"
    assert [p["name"] for p in report["passes"]][:2] == ["fold_constants", "clean"]
    # The part that there is can be printed.
    status, out, _ = command(capsys, file, "--dump", "--stage", "onnx")
    assert status == 0 and parse(out).stage == "onnx"
    status, out, err = command(capsys, file, "--dump")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_target_that_lacks_an_op_says_how_far_it_came(capsys, onnx_file, monkeypatch):
    record = select("cpu", "embedded")
    without = replace(record, ops={k: v for k, v in record.ops.items() if k != "gemm"})
    monkeypatch.setattr(command_inspect, "select", lambda *a: without)
    status, out, err = command(capsys, onnx_file)
    assert status == 2 and err.count("\n") == 1 and "gemm" in err
    assert "fused: " in out and out.splitlines()[-1].startswith("stopped at stage fused, ")


# --- bad input ------------------------------------------------------------------------------------------------------------------------------------


def write(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


BAD_PATHS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda f: f / "nothing.onnx", "no such file"),
    "other suffix": (write("x.txt", b"x"), "expected an .onnx file"),
    "empty onnx": (write("x.onnx", b""), "truncated"),
    "garbage onnx": (write("x.onnx", bytes(range(256))), "x.onnx"),
    "empty ir": (write("x.ir", b""), "x.ir"),
    "garbage ir": (write("x.ir", b"graph {{{"), "x.ir"),
    "binary ir": (write("x.ir", b"\xff\xfe\x00"), "x.ir"),
    "no manifest": (lambda f: f, "no manifest.json"),
    "truncated manifest": (write("manifest.json", b'{"format": 1, '), "not readable"),
    "manifest without fields": (write("manifest.json", b'{"format": 1}'), "is missing"),
    "manifest of nothing": (
        write(
            "manifest.json",
            json.dumps(
                {
                    "format": 1,
                    **dict.fromkeys("target record device infinicore dtype kv model meta weights ops".split()),
                }
            ).encode(),
        ),
        "manifest.json",
    ),
}


@pytest.mark.parametrize("case", BAD_PATHS)
def test_bad_paths_are_one_line(capsys, tmp_path, case):
    make, expected = BAD_PATHS[case]
    for arguments in ([], ["--json"], ["--dump"]):
        status, out, err = command(capsys, make(tmp_path), *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1) and expected in err


def test_bad_arguments_are_one_line(capsys, build, dumps, onnx_file):
    for arguments, expected in (
        ([onnx_file, "--stage", "fused"], "--dump"),
        ([build, "--target", "ascend"], "--target"),
        ([dumps[0], "--dtype", "f16"], "--dtype"),
        ([dumps[0], "--dump", "--stage", "infini"], "no graph of stage infini"),
    ):
        status, out, err = command(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1) and expected in err


def test_shapes_are_distinct():
    """What the counts above rest on."""
    config = config_of(MODEL)
    assert config["num_hidden_layers"] == LAYERS and config["tie_word_embeddings"]
    assert len({config[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}) == 4
    assert np.prod([config["num_attention_heads"], config["head_dim"]]) != config["hidden_size"]

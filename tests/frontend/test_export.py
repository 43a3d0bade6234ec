"""The exporter: both opsets against onnx.checker, onnxruntime, the interpreter and an independent numpy model; and
its command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from frontend.checkpoint import Checkpoint
from frontend.config import load_config
from frontend.export import check, export, main, without_external_data
from frontend.onnx_import import import_onnx
from frontend.ort import Reference
from frontend.qwen3_graph import inv_freq
from ir.errors import CheckpointError, ConfigError, GraphError, run_cli
from ir.interp import run
from tests.models import random_config, random_weights, reference_logits, relative_l2, write_checkpoint

# (seed, fixed fields, dtype, shards): every ratio of heads, tied and not, every dtype, sharded and not.
MODELS = {
    "gqa": (11, {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": False}, "bf16", 1),
    "mha": (12, {"num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True}, "f32", 2),
    "mqa": (13, {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True}, "f16", 3),
    "one": (14, {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}, "bf16", 1),
}
EVERY = [(name, opset) for name in MODELS for opset in (18, 23)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(name, opset, kv)`` gives (config fields, checkpoint folder, ONNX file elsewhere)."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def checkpoint(name: str):
        seed, fixed, dtype, shards = MODELS[name]
        fields = random_config(np.random.default_rng(seed), **fixed)
        return fields, write_checkpoint(root / name, fields, seed, dtype, shards)

    @cache
    def make(name: str, opset: int, kv: bool = True):
        fields, folder = checkpoint(name)
        path = root / "onnx" / f"{name}-{opset}-{kv}.onnx"
        export(folder, path, opset=opset, kv=kv)
        return fields, folder, path

    return make


def tokens(fields: dict, count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, fields["vocab_size"], count)]


@pytest.mark.parametrize("name, opset", EVERY)
def test_checker_accepts_it_beside_the_checkpoint_and_elsewhere(made, name, opset, tmp_path):
    _, folder, path = made(name, opset)
    assert check(path, onnx.load(path, load_external_data=False), folder) == []
    copy = shutil.copytree(folder, tmp_path / "copy")
    export(copy, copy / "model.onnx", opset=opset)
    onnx.checker.check_model(str(copy / "model.onnx"), full_check=True)
    # Beside the checkpoint any tool opens it as it is.
    onnxruntime.InferenceSession(str(copy / "model.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name, opset", EVERY)
def test_shapes_agree_with_strict_inference(made, name, opset):
    """The shapes that the exporter writes down are those that ONNX infers, where it infers any."""
    model = without_external_data(onnx.load(made(name, opset)[2], load_external_data=False))
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    typed = {v.name for v in (*model.graph.value_info, *model.graph.output)}
    assert typed == {o for n in model.graph.node for o in n.output}


@pytest.mark.parametrize("name, opset", EVERY)
def test_logits_are_the_models(made, name, opset):
    """Against the definition in float64. float32 sums of at most 110 terms over at most 3 layers: relative L2 well
    below 1e-5."""
    fields, folder, path = made(name, opset)
    seed, _, dtype, _ = MODELS[name]
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored.update(load_file(str(file)))
    assert stored.keys() == random_weights(fields, seed).keys()
    ids = tokens(fields, 9)
    assert relative_l2(Reference(path).logits(ids)[0], reference_logits(fields, stored, ids)) < 1e-5


@pytest.mark.parametrize("kv", [True, False])
@pytest.mark.parametrize("name, opset", EVERY)
def test_interpreter_agrees_with_onnxruntime(made, name, opset, kv):
    fields, folder, path = made(name, opset, kv)
    reference, graph = Reference(path), import_onnx(path)
    first, past = reference.logits(tokens(fields, 5))
    ids = tokens(fields, 4, seed=1)
    before = past.length if past else 0
    want, after = reference.logits(ids, past)
    feeds = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, before + 4), np.int64),
        "position_ids": np.arange(before, before + 4)[None],
        **(past.arrays if past else {}),
    }
    expected = {"logits": want[None]}
    if after:
        expected.update({n.replace("past_key_values", "present"): a for n, a in after.arrays.items()})
    # float32: both sides round each operation, in a different order of sums: about 10 roundings of 6e-8 in each of at
    # most 3 layers, as a root of squares. float64: what is left is onnxruntime's own float32 error.
    for float64, bound in ((False, 2e-6), (True, 1e-5)):
        found = run(graph, feeds, folder=folder, float64=float64)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].shape == value.shape
            assert relative_l2(found[key], value) < bound, key


@pytest.mark.parametrize("name", MODELS)
def test_opsets_and_caches_agree(made, name):
    """Opset 18 and 23, with and without KV cache, are one model; both sides are float32, so twice the bound of one."""
    results = []
    for opset in (18, 23):
        for kv in (True, False):
            fields, _, path = made(name, opset, kv)
            results.append(Reference(path).forward([tokens(fields, 8), tokens(fields, 3, seed=2)]))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert relative_l2(b, a) < 4e-6


@pytest.mark.parametrize("name, opset", EVERY)
def test_chunked_prefill_is_prefill(made, name, opset):
    fields, _, path = made(name, opset)
    reference, ids = Reference(path), tokens(fields, 11)
    whole, _ = reference.logits(ids)
    pieces, past = [], None
    for begin, end in ((0, 4), (4, 5), (5, 9), (9, 11)):
        logits, past = reference.logits(ids[begin:end], past)
        pieces.append(logits)
    assert past.length == 11
    assert relative_l2(np.concatenate(pieces), whole) < 4e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name, opset", EVERY)
def test_padded_batches(made, name, opset, side):
    """Each row of a padded batch is what it is alone, in prefill and in a decode step on top of the padded cache."""
    fields, _, path = made(name, opset)
    reference = Reference(path)
    rows = [tokens(fields, n, seed=n) for n in (7, 3, 5)]
    width = max(map(len, rows))
    ids, mask, positions = (np.zeros((len(rows), width), np.int64) for _ in range(3))
    places = []
    for i, row in enumerate(rows):
        begin = width - len(row) if side == "left" else 0
        places.append(slice(begin, begin + len(row)))
        ids[i, places[i]], mask[i, places[i]], positions[i, places[i]] = row, 1, np.arange(len(row))
    logits, past = reference.run(ids, mask, positions)
    assert np.isfinite(logits).all()
    following = np.array([[5], [6], [7]])
    grown = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
    lengths = np.array([[len(r)] for r in rows])
    decoded, _ = reference.run(following, grown, lengths, past)
    for i, row in enumerate(rows):
        alone, cache = reference.logits(row)
        assert relative_l2(logits[i, places[i]], alone) < 4e-6
        next_alone, _ = reference.logits([int(following[i, 0])], cache)
        assert relative_l2(decoded[i], next_alone) < 4e-6


def test_weights_are_the_checkpoints_bytes(made):
    """Initializers keep name, dtype and [out, in] shape, and point at the safetensors' bytes; a tied weight is
    there once; the file is small."""
    for name in MODELS:
        fields, folder, path = made(name, 18)
        config, opened = load_config(folder), Checkpoint.open(folder)
        model = onnx.load(path, load_external_data=False)
        external = {t.name: t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        assert external.keys() == config.weight_shapes().keys()
        assert ("lm_head.weight" in external) != fields["tie_word_embeddings"]
        for weight, tensor in external.items():
            entry, places = opened.tensors[weight], {e.key: e.value for e in tensor.external_data}
            assert places == {"location": entry.file, "offset": str(entry.offset), "length": str(entry.nbytes)}
            assert tuple(tensor.dims) == entry.shape
        assert path.stat().st_size < 300_000
        assert {o.domain: o.version for o in model.opset_import} == {"": 18}


def test_names_follow_the_modules(made):
    for opset in (18, 23):
        names = {n.name for n in onnx.load(made("gqa", opset)[2], load_external_data=False).graph.node}
        assert len(names) == len(onnx.load(made("gqa", opset)[2], load_external_data=False).graph.node)
        assert {
            "/model/embed_tokens/Gather",
            "/model/layers.0/self_attn/q_proj/MatMul",
            "/model/layers.0/mlp/down_proj/MatMul",
            "/lm_head/MatMul",
        } <= names
        assert all(n.startswith(("/model/", "/lm_head/")) for n in names)


def test_interface_names(made):
    fields, _, path = made("gqa", 23)
    model, layers = onnx.load(path, load_external_data=False), range(fields["num_hidden_layers"])
    caches = [f"{n}.{part}" for n in layers for part in ("key", "value")]
    assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask", "position_ids"] + [
        f"past_key_values.{c}" for c in caches
    ]
    assert [o.name for o in model.graph.output] == ["logits"] + [f"present.{c}" for c in caches]
    facts = {p.key: p.value for p in model.metadata_props}
    assert json.loads(facts["eos_token_ids"]) == [2, 0] and facts["model_type"] == "qwen3" and facts["dtype"] == "bf16"
    assert json.loads(facts["max_position_embeddings"]) == fields["max_position_embeddings"]


def test_inv_freq():
    """float32 arithmetic on float32 values: within 3 roundings (power: 2) of the exact value, and the type is
    float32."""
    table = inv_freq(128, 1e6)
    exact = 1e6 ** (-np.arange(0, 128, 2) / 128)
    assert table.dtype == np.float32 and table.shape == (64,)
    # The exponent's own rounding counts ln(theta) = 14 times.
    np.testing.assert_allclose(table, exact, rtol=(14 + 3) * 2**-24)


LARGE = {
    "vocab_size": 151936, "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 25600, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("opset", [18, 23])
def test_configuration_alone(tmp_path, opset, capsys):
    """A 32B model without its weights: a few megabytes, checked and imported; no file of weights is looked for."""
    fields = random_config(np.random.default_rng(0), **LARGE)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    path = tmp_path / "out" / "m.onnx"
    assert (
        run_cli(main, [str(tmp_path), "-o", str(path), "--opset", str(opset), "--config-only", "--check", "--json"])
        == 0
    )
    out = capsys.readouterr()
    summary = json.loads(out.out)
    assert summary["layers"] == 64 and summary["parameters"] == 32_762_123_264 and summary["bytes"] < 4e6
    assert "no onnxruntime step" in out.err
    graph = import_onnx(path)
    weights = {
        n: c
        for n, c in graph.constants.items()
        if n.startswith(("model.layers", "model.embed", "model.norm", "lm_head"))
    }
    assert len(weights) == 64 * 11 + 3
    assert all(c.data.offset is None and c.data.dtype == "bf16" for c in weights.values())
    with pytest.raises(CheckpointError, match="made from a configuration alone"):
        Reference(path)


def test_configuration_first_weights_later(tmp_path, made):
    """A graph made without weights finds them by name once they are there."""
    fields, folder, _ = made("gqa", 18)
    path = tmp_path / "m.onnx"
    export(folder, path, config_only=True)
    feeds = {
        "input_ids": np.array([[1, 2]]),
        "attention_mask": np.ones((1, 2), np.int64),
        "position_ids": np.array([[0, 1]]),
    }
    graph = import_onnx(path, folder)
    for value in graph.inputs[3:]:
        feeds[value.name] = np.zeros((1, fields["num_key_value_heads"], 0, fields["head_dim"]), np.float32)
    want = Reference(made("gqa", 18)[2]).logits([1, 2])[0]
    assert relative_l2(run(graph, feeds, folder=folder)["logits"][0], want) < 2e-6


# The command line


def test_command_line(tmp_path, made, capsys):
    _, folder, _ = made("mha", 18)
    path = tmp_path / "deep" / "er" / "m.onnx"
    assert run_cli(main, [str(folder), "-o", str(path), "--check", "--no-kv"]) == 0
    out = capsys.readouterr()
    assert out.err == "" and out.out.count("\n") == 1
    assert out.out.startswith(f"{path}: ") and "opset 18" in out.out and "checked" in out.out
    assert "past_key_values" not in {
        i.name.split(".")[0] for i in onnx.load(path, load_external_data=False).graph.input
    }


def test_an_existing_file_is_replaced_whole(tmp_path, made, capsys):
    _, folder, _ = made("mha", 18)
    path = tmp_path / "m.onnx"
    path.write_text("old")
    assert run_cli(main, [str(folder), "-o", str(path)]) == 0
    first = path.read_bytes()
    assert run_cli(main, [str(folder), "-o", str(path)]) == 0
    assert path.read_bytes() == first  # the same input gives the same bytes
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_failure_leaves_the_old_file(tmp_path, made, capsys):
    _, folder, _ = made("mha", 18)
    copy = shutil.copytree(folder, tmp_path / "copy")
    next(copy.glob("*.safetensors")).unlink()
    path = tmp_path / "m.onnx"
    path.write_text("old")
    assert run_cli(main, [str(copy), "-o", str(path)]) == 2
    out = capsys.readouterr()
    assert path.read_text() == "old" and out.out == ""
    assert out.err.startswith("error: ") and out.err.count("\n") == 1 and "missing" in out.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent"], "absent: no such folder"),
        (["{model}", "-o", "{tmp}/m.txt"], "m.txt: expected the name of a file that ends in .onnx"),
        (["{model}", "-o", "{tmp}/file/m.onnx"], "m.onnx: cannot be written"),
        (["{model}", "-o", "{tmp}/folder.onnx"], "folder.onnx: expected the name of a file"),
    ],
)
def test_bad_arguments(tmp_path, made, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.onnx").mkdir()
    arguments = [a.format(model=made("mha", 18)[1], tmp=tmp_path) for a in arguments]
    assert run_cli(main, arguments) == 2
    out = capsys.readouterr()
    assert message in out.err and out.err.count("\n") == 1 and out.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.onnx"]


def test_unknown_opset(made, tmp_path):
    with pytest.raises(ConfigError, match="opset 20: expected one of 18, 23"):
        export(made("mha", 18)[1], tmp_path / "m.onnx", opset=20)


def test_check_warns_of_nan_and_refuses_what_the_checker_refuses(tmp_path, made, capsys):
    _, folder, _ = made("gqa", 18)
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(str(copy / "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(weights, str(copy / "model.safetensors"))
    assert run_cli(main, [str(copy), "-o", str(tmp_path / "m.onnx"), "--check"]) == 0
    out = capsys.readouterr()
    assert "1 weights hold NaN or infinity: model.layers.0.mlp.up_proj.weight" in out.err and out.err.count("\n") == 1
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    model.graph.node[3].op_type = "NoSuchOp"
    with pytest.raises(GraphError, match="onnx.checker"):
        check(tmp_path / "m.onnx", model, copy)


def test_runs_as_a_module(tmp_path, made):
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        "frontend.export",
        str(made("one", 18)[1]),
        "-o",
        "m.onnx",
        "--opset",
        "23",
        "--json",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, check=True
    )
    assert done.stderr == "" and json.loads(done.stdout)["file"] == "m.onnx" and (tmp_path / "m.onnx").is_file()

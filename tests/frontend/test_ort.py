"""The onnxruntime helper: where weights may lie, and the reference runner."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from frontend.export import export
from frontend.ort import Reference, open_session
from ir.errors import CheckpointError, ConfigError, GraphError
from tests.models import random_config, relative_l2, write_checkpoint

FIELDS = random_config(np.random.default_rng(21), num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
IDS = [3, 1, 4, 1, 5, 9]


@pytest.fixture(scope="module", params=["bf16", "f16", "f32"])
def model(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("ort")
    folder = write_checkpoint(root / "model", FIELDS, 21, request.param, 2)
    export(folder, root / "m.onnx", opset=23)
    return folder, root / "m.onnx", Reference(root / "m.onnx").logits(IDS)[0]


def link_as_hugging_face_does(folder: Path, target: Path) -> Path:
    """snapshots/<revision>/<file> -> ../../blobs/<hash>."""
    (target / "blobs").mkdir(parents=True)
    snapshot = target / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, target / "blobs" / f"{i:040x}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{i:040x}")
    return snapshot


def test_symbolic_links(model, tmp_path):
    folder, path, want = model
    snapshot = link_as_hugging_face_does(folder, tmp_path)
    np.testing.assert_array_equal(Reference(path, snapshot).logits(IDS)[0], want)
    # The whole folder may be a link too, and the exporter works on either.
    (tmp_path / "link").symlink_to(snapshot)
    np.testing.assert_array_equal(Reference(path, tmp_path / "link").logits(IDS)[0], want)
    export(tmp_path / "link", tmp_path / "out" / "n.onnx", opset=23)
    np.testing.assert_array_equal(Reference(tmp_path / "out" / "n.onnx").logits(IDS)[0], want)


def test_beside_elsewhere_and_renamed(model, tmp_path, monkeypatch):
    folder, path, want = model
    copy = shutil.copytree(folder, tmp_path / "a folder with spaces, ä")
    export(copy, copy / "model.onnx", opset=23)
    np.testing.assert_array_equal(Reference(copy / "model.onnx").logits(IDS)[0], want)
    monkeypatch.chdir(copy)
    np.testing.assert_array_equal(Reference("model.onnx").logits(IDS)[0], want)
    np.testing.assert_array_equal(Reference(path, ".").logits(IDS)[0], want)


def test_offsets_need_no_alignment(model, tmp_path):
    """A header of odd length puts every weight at an odd byte."""
    folder, _, want = model
    copy = shutil.copytree(folder, tmp_path / "odd")
    for file in copy.glob("*.safetensors"):
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        pad = 1 if length % 2 == 0 else 2
        file.write_bytes(struct.pack("<Q", length + pad) + raw[8 : 8 + length] + b" " * pad + raw[8 + length :])
    export(copy, tmp_path / "m.onnx", opset=23)
    # The same values in another place: only the order of sums may differ.
    assert relative_l2(Reference(tmp_path / "m.onnx").logits(IDS)[0], want) < 2e-6
    assert (
        relative_l2(
            Reference(tmp_path / "m.onnx", link_as_hugging_face_does(copy, tmp_path / "hub")).logits(IDS)[0], want
        )
        < 2e-6
    )


def test_configuration_first_weights_later(model, tmp_path):
    folder, _, want = model
    export(folder, tmp_path / "m.onnx", opset=23, config_only=True)
    with pytest.raises(CheckpointError, match="made from a configuration alone"):
        open_session(tmp_path / "m.onnx")
    np.testing.assert_array_equal(Reference(tmp_path / "m.onnx", folder).logits(IDS)[0], want)


def test_errors(model, tmp_path):
    folder, path, _ = model
    with pytest.raises(GraphError, match="absent.onnx: No such file"):
        open_session(tmp_path / "absent.onnx")
    with pytest.raises(CheckpointError, match="weights file model-00001-of-00002.safetensors is not in"):
        open_session(path, tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    shard = copy / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="is it truncated"):
        open_session(path, copy)
    broken = onnx.load(path, load_external_data=False)
    broken.graph.node[5].op_type = "NoSuchOp"
    (tmp_path / "broken.onnx").write_bytes(broken.SerializeToString())
    with pytest.raises(GraphError, match="broken.onnx: onnxruntime: "):
        open_session(tmp_path / "broken.onnx", folder)


def test_greedy_and_threads(model, tmp_path):
    folder, path, want = model
    reference = Reference(path, threads=1)
    generated = reference.greedy(IDS, 6)
    unfolded = Reference(path, fold_weights=False)
    assert relative_l2(unfolded.logits(IDS)[0], want) < 2e-6 and unfolded.greedy(IDS, 6) == generated
    assert generated[0] == int(want[-1].argmax()) and len(generated) == 6
    export(folder, tmp_path / "n.onnx", kv=False)
    plain = Reference(tmp_path / "n.onnx")
    assert plain.greedy(IDS, 6) == generated
    with pytest.raises(ConfigError, match="no tokens"):
        reference.logits([])
    with pytest.raises(ConfigError, match="has no KV cache"):
        plain.logits(IDS, reference.logits(IDS)[1])


def test_a_graph_that_is_no_decoder(tmp_path):
    def write(inputs, outputs) -> Path:
        nodes = [helper.make_node("Identity", [i], [o]) for i, o in zip(inputs, outputs)]
        kinds = [
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in names] for names in (inputs, outputs)
        ]
        model = helper.make_model(
            helper.make_graph(nodes, "g", *kinds), opset_imports=[helper.make_opsetid("", 18)], ir_version=8
        )
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        return tmp_path / "m.onnx"

    for inputs, outputs, message in (
        (["x"], ["logits"], "has input x"),
        (["input_ids"], ["y"], "has no output logits"),
        (["attention_mask"], ["logits"], "has no input input_ids"),
    ):
        with pytest.raises(GraphError, match=message):
            Reference(write(inputs, outputs))

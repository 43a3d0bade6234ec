"""The importer: constants, attributes, types and symbols, and one clear error for every bad file."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from frontend.export import export
from frontend.onnx_file import find_weights_folder
from frontend.onnx_import import import_onnx
from ir.constants import FileSlice, Inline, load
from ir.errors import CheckpointError, GraphError, Qwen3Error, UnsupportedError
from ir.interp import run
from ir.types import Sym, TensorType, sym
from ir.verify import verify
from tests.models import random_config, random_weights, write_checkpoint

F32, I64 = TensorProto.FLOAT, TensorProto.INT64


def info(name: str, kind: int, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def write(path: Path, nodes, inputs, outputs, initializers=(), opset: int = 18, **fields) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers), value_info=fields.pop("value_info", []))
    opsets = fields.pop("opsets", [helper.make_opsetid("", opset)])
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10, **fields).SerializeToString())
    return path


def one(path: Path, node, **fields) -> Path:
    return write(path, [node], [info("x", F32, ["n", 3])], [info("y", F32, None)], **fields)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("import")
    fields = random_config(
        np.random.default_rng(7),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    folder = write_checkpoint(root / "model", fields, 7, "bf16", 2)
    export(folder, root / "build" / "m.onnx")
    return fields, folder, root / "build" / "m.onnx"


def test_our_own_graph(model):
    fields, folder, path = model
    graph = import_onnx(path)
    assert verify(graph) is graph and graph.stage == "onnx"
    assert (
        graph.meta["opset"] == 18 and graph.meta["source"] == "m.onnx" and graph.meta["producer"] == "qwen3-infinicore"
    )
    assert graph.meta["metadata_props"]["model_type"] == "qwen3"
    # Every dimension is a number or one of the four symbols: nothing is unknown.
    symbols = {n for v in graph.values.values() for d in v.type.shape if isinstance(d, Sym) for n in d.names}
    assert symbols == {"batch", "sequence", "past", "total"}
    assert graph.type("logits") == TensorType("f32", (sym("batch"), sym("sequence"), fields["vocab_size"]))
    assert graph.producers["logits"].origin == ("/lm_head/MatMul",)
    assert all(n.origin and n.op.startswith("onnx.") for n in graph.nodes)
    for name, weight in random_weights(fields, 7).items():
        data = graph.constants[name].data
        assert isinstance(data, FileSlice) and data.name == name and "/" not in data.file
        np.testing.assert_array_equal(load(data, folder), weight.astype(ml_dtypes.bfloat16))


def test_attributes_become_python_values(model):
    graph = import_onnx(model[2])
    kinds = {type(v) for n in graph.nodes for v in n.attrs.values()}
    assert kinds <= {int, float, str, tuple}
    assert {n.attrs["to"] for n in graph.nodes if n.op == "onnx.Cast"} == {"f32", "bool"}
    assert next(n for n in graph.nodes if n.op == "onnx.Transpose").attrs["perm"] == (1, 0)


def test_constants_of_every_kind(tmp_path):
    half = np.array([[1.5, -2.0, 0.25]], ml_dtypes.bfloat16)
    nodes = [
        helper.make_node("Constant", [], ["a"], value_float=2.5),
        helper.make_node("Constant", [], ["b"], value_ints=[1, 3]),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32(3.0))),
        helper.make_node("Constant", [], ["d"], value_int=7),
        helper.make_node("Cast", ["h"], ["hf"], to=F32),
        helper.make_node("Mul", ["x", "a"], ["m"]),
        helper.make_node("Mul", ["m", "c"], ["n"]),
        helper.make_node("Add", ["n", "hf"], ["o"]),
        helper.make_node("Reshape", ["o", "b"], ["y"]),
    ]
    initializer = helper.make_tensor("h", TensorProto.BFLOAT16, [1, 3], half.tobytes(), raw=True)
    unused = numpy_helper.from_array(np.ones(5, np.float32), "unused")
    path = write(tmp_path / "m.onnx", nodes, [info("x", F32, [1, 3])], [info("y", F32, None)], [initializer, unused])
    graph = import_onnx(path)
    assert set(graph.constants) == {"a", "b", "c", "h"}  # what nothing reads is dropped
    assert isinstance(graph.constants["h"].data, Inline) and graph.constants["h"].value.type == TensorType(
        "bf16", (1, 3)
    )
    assert graph.constants["a"].value.type == TensorType("f32", ()) and graph.constants["b"].value.type.dtype == "i64"
    assert len({n.origin for n in graph.nodes}) == 5  # nameless nodes get names
    x = np.array([[1, 2, 3]], np.float32)
    np.testing.assert_array_equal(run(graph, {"x": x})["y"], x * 7.5 + half.astype(np.float32))


def test_unknown_sizes_become_fresh_symbols(tmp_path):
    nodes = [
        helper.make_node("Concat", ["x", "x2"], ["c"], axis=0, name="c"),
        helper.make_node("Concat", ["c", "x2"], ["y"], axis=0, name="d"),
    ]
    inputs = [info("x", F32, ["past + 1", 3]), info("x2", F32, ["past - 1", 3])]
    graph = import_onnx(write(tmp_path / "m.onnx", nodes, inputs, [info("y", F32, ["u0", None])]))
    first, second = (v.type.shape[0] for v in graph.inputs)
    assert isinstance(first, Sym) and isinstance(second, Sym) and first != second  # both clean up to past___1
    sizes = [graph.type(n).shape[0] for n in ("x", "x2", "c", "y")]
    assert len(set(sizes)) == 4 and graph.type("y").shape[1] == 3
    x = np.ones((2, 3), np.float32)
    assert run(graph, {"x": x, "x2": x})["y"].shape == (6, 3)


def test_rank_is_found_where_inference_gives_up(tmp_path):
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["r"], name="r"),
        helper.make_node("Expand", ["r", "s2"], ["e"], name="e"),
        helper.make_node("Neg", ["e"], ["y"], name="y"),
    ]
    inputs = [info("x", F32, ["n", 3]), info("s", I64, [3]), info("s2", I64, [4])]
    graph = import_onnx(write(tmp_path / "m.onnx", nodes, inputs, [info("y", F32, None)]))
    assert graph.type("r").rank == 3 and graph.type("e").rank == graph.type("y").rank == 4
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = run(graph, {"x": x, "s": np.array([1, 3, 2]), "s2": np.array([2, 1, 3, 2])})["y"]
    np.testing.assert_array_equal(found, -np.broadcast_to(x.reshape(1, 3, 2), (2, 1, 3, 2)))


def test_rank_that_nobody_knows(tmp_path):
    node = helper.make_node("Reshape", ["x", "s"], ["y"], name="lost")
    path = write(tmp_path / "m.onnx", [node], [info("x", F32, ["n", 3]), info("s", I64, ["k"])], [info("y", F32, None)])
    with pytest.raises(
        GraphError, match=r"m\.onnx: node lost: op Reshape: shape inference does not tell the type of y"
    ):
        import_onnx(path)


def test_functions_are_inlined(tmp_path):
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    node = helper.make_node("Twice", ["x"], ["y"], domain="local", name="t")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    graph = import_onnx(one(tmp_path / "m.onnx", node, functions=[function], opsets=opsets))
    assert graph.counts() == {"onnx.Add": 1}


def test_unused_outputs_in_the_middle_get_names(tmp_path):
    node = helper.make_node("Attention", ["x", "x", "x", "", "p", "p"], ["y", "", "v"], name="a")
    inputs = [info("x", F32, ["b", 2, "s", 4]), info("p", F32, ["b", 2, "past", 4])]
    path = write(tmp_path / "m.onnx", [node], inputs, [info("y", F32, None), info("v", F32, None)], opset=23)
    graph = import_onnx(path)
    assert [o.name for o in graph.nodes[0].outputs] == ["y", "a_unused_1", "v"]


def test_external_data_of_other_tools(tmp_path):
    """One .data file beside the model, as torch and onnx write it."""
    values = np.arange(300, dtype=np.float32).reshape(3, 100)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    path = one(tmp_path / "plain.onnx", node, initializers=[numpy_helper.from_array(values, "w")])
    onnx.save(
        onnx.load(path), tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0
    )
    data = import_onnx(tmp_path / "m.onnx").constants["w"].data
    assert isinstance(data, FileSlice) and (data.file, data.name) == ("m.onnx.data", "w")
    np.testing.assert_array_equal(load(data, tmp_path), values)


# Bad files


@pytest.mark.parametrize(
    "content, message",
    [(b"", "not an ONNX model"), (b"garbage, no protobuf at all", "not a"), (b"\x08\x0a", "not an ONNX model")],
)
def test_garbage(tmp_path, content, message):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(GraphError, match=message) as caught:
        import_onnx(tmp_path / "m.onnx")
    assert str(tmp_path / "m.onnx") in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(GraphError, match="m.onnx: No such file or directory, expected an ONNX file"):
        import_onnx(tmp_path / "m.onnx")


def test_truncated_anywhere_is_an_error(model, tmp_path):
    raw = model[2].read_bytes()
    for length in np.linspace(0, len(raw) - 1, 25).astype(int):
        (tmp_path / "m.onnx").write_bytes(raw[:length])
        with pytest.raises((GraphError, UnsupportedError)) as caught:
            import_onnx(tmp_path / "m.onnx", model[1])
        assert str(caught.value).startswith(str(tmp_path / "m.onnx"))


def test_damaged_bytes_never_give_anything_but_one_of_our_errors(model, tmp_path):
    raw, path = model[2].read_bytes(), tmp_path / "m.onnx"
    for seed in range(60):
        rng, damaged = np.random.default_rng(seed), bytearray(raw)
        for _ in range(int(rng.integers(1, 5))):
            damaged[int(rng.integers(len(raw)))] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            import_onnx(path, model[1])
        except Qwen3Error as error:
            assert str(path) in str(error) or str(model[1]) in str(error)


@pytest.mark.parametrize("opset", [7, 12, 26])
def test_opset(tmp_path, opset):
    with pytest.raises(UnsupportedError, match=f"opset {opset}, expected 13 to 25"):
        import_onnx(one(tmp_path / "m.onnx", helper.make_node("Neg", ["x"], ["y"]), opset=opset))
    with pytest.raises(UnsupportedError, match=r"no opset of the standard domain \(found ai\.onnx\.ml\)"):
        import_onnx(
            one(
                tmp_path / "m.onnx",
                helper.make_node("Neg", ["x"], ["y"]),
                opsets=[helper.make_opsetid("ai.onnx.ml", 3)],
            )
        )


def test_unknown_ops_and_domains(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(UnsupportedError, match=r"m\.onnx: node q: op Conv of domain ai\.onnx is not supported"):
        import_onnx(one(path, helper.make_node("Conv", ["x", "x"], ["y"], name="q")))
    node = helper.make_node("GroupQueryAttention", ["x"], ["y"], name="q", domain="com.microsoft")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    with pytest.raises(
        UnsupportedError, match=r"node q: op GroupQueryAttention of domain com\.microsoft is not supported"
    ):
        import_onnx(one(path, node, opsets=opsets))


def test_control_flow(tmp_path):
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "b", [], [info("z", F32, None)])
    node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    inputs = [info("x", F32, [3]), info("c", TensorProto.BOOL, [])]
    with pytest.raises(UnsupportedError, match="node choice: op If .* control flow"):
        import_onnx(write(tmp_path / "m.onnx", [node], inputs, [info("y", F32, None)]))


def test_element_types_that_the_ir_lacks(tmp_path):
    path, node = tmp_path / "m.onnx", helper.make_node("Add", ["x", "w"], ["y"], name="a")
    with pytest.raises(GraphError, match="initializer w: element type UINT64 is not supported"):
        import_onnx(one(path, node, initializers=[numpy_helper.from_array(np.ones(3, np.uint64), "w")]))
    cast = helper.make_node("Cast", ["x"], ["y"], name="a", to=TensorProto.STRING)
    with pytest.raises(GraphError, match="element type STRING is not supported"):
        import_onnx(write(path, [cast], [info("x", F32, [3])], [info("y", TensorProto.STRING, [3])]))


def test_types_that_contradict_each_other(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    path = one(tmp_path / "m.onnx", node, initializers=[numpy_helper.from_array(np.ones((4, 5), np.float32), "w")])
    with pytest.raises(
        GraphError, match="node m: op MatMul: shape inference does not tell the type of y .*Incompatible dimensions"
    ):
        import_onnx(path)


def test_attributes_that_an_op_does_not_have(tmp_path):
    with pytest.raises(GraphError, match="has no attribute colour"):
        import_onnx(one(tmp_path / "m.onnx", helper.make_node("Softmax", ["x"], ["y"], colour=3)))


def test_initializer_whose_values_do_not_fit(tmp_path):
    short = TensorProto(name="w", data_type=F32, dims=[3], raw_data=bytes(8))
    with pytest.raises(GraphError, match="initializer w: its values do not fit its shape"):
        import_onnx(one(tmp_path / "m.onnx", helper.make_node("Add", ["x", "w"], ["y"]), initializers=[short]))


# External data


def external(folder: Path, **places) -> Path:
    tensor = TensorProto(name="w", data_type=F32, dims=[3], data_location=TensorProto.EXTERNAL)
    for key, value in places.items():
        tensor.external_data.add(key=key, value=value)
    return one(folder / "m.onnx", helper.make_node("Add", ["x", "w"], ["y"], name="a"), initializers=[tensor])


@pytest.mark.parametrize(
    "places, kind, message",
    [
        ({}, GraphError, "initializer w: external data location ''"),
        ({"location": "/etc/passwd"}, GraphError, "location '/etc/passwd', expected a file name inside"),
        ({"location": "../w.bin"}, GraphError, "location '../w.bin'"),
        ({"location": "w.bin", "offset": "-4"}, GraphError, "external data offset '-4'"),
        ({"location": "w.bin", "length": "8"}, GraphError, "external data of 8 bytes, its type and shape take 12"),
        ({"location": "absent.bin"}, CheckpointError, "weights file absent.bin is not in"),
        (
            {"location": "w.bin", "offset": "4"},
            CheckpointError,
            "w.bin: has 12 bytes, but weight w ends at 16; is it trunc",
        ),
    ],
)
def test_bad_places(tmp_path, places, kind, message):
    (tmp_path / "w.bin").write_bytes(bytes(12))
    with pytest.raises(kind, match=message) as caught:
        import_onnx(external(tmp_path, **places))
    assert "\n" not in str(caught.value)
    assert import_onnx(external(tmp_path, location="w.bin")).constants["w"].data.offset == 0


def test_weights_folder(model, tmp_path):
    """What is given, else where the exporter noted, else beside the file; what is given must hold them."""
    _, folder, path = model
    assert find_weights_folder(path).resolve() == folder.resolve()
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert find_weights_folder(path, given=copy) == copy
    moved = shutil.copy(path, copy / "m.onnx")
    assert find_weights_folder(moved) == copy
    lonely = shutil.copy(path, tmp_path / "m.onnx")
    with pytest.raises(
        CheckpointError, match="weights file model-00001-of-00002.safetensors is not in .* give the checkpoint"
    ):
        import_onnx(lonely)
    assert import_onnx(lonely, folder).constants
    with pytest.raises(CheckpointError, match="is not in"):
        import_onnx(path, tmp_path)


def test_the_noted_checkpoint_is_not_mistaken_for_one_beside_the_file(model, tmp_path):
    """A fine-tune has the same files with the same headers: only the note tells which one was exported."""
    fields, folder, _ = model
    base = shutil.copytree(folder, tmp_path / "base")
    tuned = write_checkpoint(tmp_path / "tuned", fields, 8, "bf16", 2)
    path = tuned / "m.onnx"
    export(base, path)
    assert find_weights_folder(path).resolve() == base.resolve()
    assert find_weights_folder(path, given=tuned) == tuned
    name = "model.embed_tokens.weight"
    data = import_onnx(path).constants[name].data
    assert (load(data, base) != load(data, tuned)).any()
    # Without the whole of what was noted, the files beside the model are taken.
    (base / "model-00002-of-00002.safetensors").unlink()
    assert find_weights_folder(path) == tuned


def test_truncated_weights(model, tmp_path):
    _, folder, path = model
    copy = shutil.copytree(folder, tmp_path / "copy")
    shard = copy / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=f"{shard}: has .* is it truncated"):
        import_onnx(path, copy)


def test_weights_by_name_must_fit(model, tmp_path):
    fields, folder, _ = model
    path = tmp_path / "m.onnx"
    export(folder, path, config_only=True)
    assert import_onnx(path).constants["lm_head.weight"].data.offset is None
    found = import_onnx(path, folder).constants["lm_head.weight"].data
    assert found.file == "model-00002-of-00002.safetensors" and found.offset is not None
    other = write_checkpoint(tmp_path / "other", {**fields, "vocab_size": fields["vocab_size"] + 1}, 1)
    with pytest.raises(CheckpointError, match="weight model.embed_tokens.weight: found bf16.*, the graph takes bf16"):
        import_onnx(path, other)

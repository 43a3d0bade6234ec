"""Graphs that are not quite Qwen3: compiled to what onnxruntime computes for them, or refused by name; never silently compiled to plain Qwen3.

Each is our own export (opset 23), edited.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper

from codegen.build import build_model
from frontend.export import export
from frontend.ort import Reference
from ir.errors import UnsupportedError
from runtime.qwen3 import Qwen3ForCausalLM
from tests.codegen.engines import Builder
from tests.models import relative_l2

PROMPTS = [[5, 9, 2, 7, 30, 11, 4], [3]]


def edited(folder: Path, file: Path, edit: Callable[[ModelProto], None]) -> Path:
    """The checkpoint's ONNX file after an edit; its weights stay where they are."""
    export(folder, file, opset=23)
    model = onnx.load(file, load_external_data=False)
    edit(model)
    file.write_bytes(model.SerializeToString())
    return file


def node_of(model: ModelProto, name: str) -> NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def set_attribute(node: NodeProto, name: str, value: float) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def epsilon_of_layer(layer: int) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        set_attribute(node_of(model, f"/model/layers.{layer}/input_layernorm/RMSNormalization"), "epsilon", 0.05)

    return edit


def scale_of_layer(layer: int) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        nodes = [n for n in model.graph.node if n.op_type == "Attention"]
        set_attribute(nodes[layer], "scale", 0.05)

    return edit


def check(build: Path, reference: Reference) -> None:
    with Qwen3ForCausalLM(None, build=build) as model:
        for got, want in zip(model.forward(PROMPTS), reference.forward(PROMPTS)):
            assert relative_l2(got, want) <= 1e-5


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_layer_with_its_own_epsilon(layer: int, kv: str, build_engine: Builder, tmp_path: Path) -> None:
    """The loop begins or ends elsewhere, or there is none."""
    folder = build_engine.checkpoint("four")
    file = edited(folder, tmp_path / "model.onnx", epsilon_of_layer(layer))
    plain = Reference(_plain(folder, tmp_path), folder, threads=1).forward(PROMPTS)
    reference = Reference(file, folder, threads=1)
    assert relative_l2(plain[0], reference.forward(PROMPTS)[0]) > 1e-3  # the edit is worth something
    check(build_model(onnx=file, out=tmp_path / "out", dtype="f32", kv=kv), reference)


def _plain(folder: Path, tmp_path: Path) -> Path:
    export(folder, tmp_path / "plain.onnx", opset=23)
    return tmp_path / "plain.onnx"


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_with_its_own_attention_scale(layer: int, build_engine: Builder, tmp_path: Path) -> None:
    folder = build_engine.checkpoint("four")
    file = edited(folder, tmp_path / "model.onnx", scale_of_layer(layer))
    check(build_model(onnx=file, out=tmp_path / "out", dtype="f32"), Reference(file, folder, threads=1))
    with pytest.raises(UnsupportedError, match="attention differs from other layers'"):
        build_model(onnx=file, out=tmp_path / "contiguous", dtype="f32", kv="contiguous", emit_only=True)


def rename_input(node: NodeProto, old: str, new: str) -> None:
    node.input[:] = [new if i == old else i for i in node.input]


def swap_inputs(a: str, b: str) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        for node in model.graph.node:
            node.input[:] = [b if i == a else a if i == b else i for i in node.input]

    return edit


def swap_outputs(a: str, b: str) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = [b if o == a else a if o == b else o for o in node.output]

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        swap_inputs("past_key_values.0.key", "past_key_values.1.key"),
        swap_inputs("past_key_values.0.key", "past_key_values.0.value"),
        swap_outputs("present.0.value", "present.1.value"),
        swap_outputs("present.0.key", "present.0.value"),
    ],
    ids=["layers swapped", "keys as values", "presents swapped", "present keys as values"],
)
def test_caches_wired_across(edit: Callable[[ModelProto], None], build_engine: Builder, tmp_path: Path) -> None:
    file = edited(build_engine.checkpoint("four"), tmp_path / "model.onnx", edit)
    with pytest.raises(UnsupportedError, match="expected the same layer's keys and values"):
        build_model(onnx=file, out=tmp_path / "out", dtype="f32", emit_only=True)
    assert not (tmp_path / "out").exists()


def another_theta(model: ModelProto) -> None:
    """Layer 2 turns by frequencies of its own: the chain from inv_freq to cos and sin is copied for it."""
    frequencies = next(i for i in model.graph.initializer if "inv_freq" in i.name)
    other = numpy_helper.from_array(numpy_helper.to_array(frequencies) * np.float32(0.9), "other_freq")
    model.graph.initializer.append(other)
    rotary = [n for n in model.graph.node if n.op_type == "RotaryEmbedding"][4:6]
    copies: dict[str, str] = {frequencies.name: "other_freq"}
    extra: list[NodeProto] = []

    def copy(value: str) -> str:
        if value in copies:
            return copies[value]
        node = next((n for n in model.graph.node if value in n.output), None)
        if node is None or not depends(value):
            return value
        twin = NodeProto()
        twin.CopyFrom(node)
        twin.name += "_other"
        twin.input[:] = [copy(i) for i in node.input]
        twin.output[:] = [o + "_other" for o in node.output]
        copies.update(zip(node.output, twin.output))
        extra.append(twin)
        return copies[value]

    def depends(value: str) -> bool:
        node = next((n for n in model.graph.node if value in n.output), None)
        return value == frequencies.name or (node is not None and any(depends(i) for i in node.input))

    for node in rotary:
        node.input[1], node.input[2] = copy(node.input[1]), copy(node.input[2])
    nodes = [*model.graph.node]
    at = min(nodes.index(n) for n in rotary)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], *extra, *nodes[at:]])


def test_a_layer_with_other_frequencies(build_engine: Builder, tmp_path: Path) -> None:
    file = edited(build_engine.checkpoint("four"), tmp_path / "model.onnx", another_theta)
    with pytest.raises(UnsupportedError, match="both stand where inv_freq does"):
        build_model(onnx=file, out=tmp_path / "out", dtype="f32", emit_only=True)


def test_more_logits_than_embeddings(build_engine: Builder, tmp_path: Path) -> None:
    def edit(model: ModelProto) -> None:
        head = next(i for i in model.graph.initializer if i.name == "lm_head.weight")
        rows, cols = head.dims
        values = np.zeros((rows + 9, cols), np.float32)
        model.graph.initializer.remove(head)
        model.graph.initializer.append(numpy_helper.from_array(values, "lm_head.weight"))
        for node in list(model.graph.node):
            if node.op_type == "Cast" and "lm_head.weight" in node.input:
                node.attribute[0].i = onnx.TensorProto.FLOAT
        model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value = rows + 9

    untied = next(name for name in ("one", "two", "three", "four") if not _tied(build_engine.checkpoint(name)))
    file = edited(build_engine.checkpoint(untied), tmp_path / "model.onnx", edit)
    with pytest.raises(UnsupportedError, match="the embedding has .* rows, the logits"):
        build_model(onnx=file, out=tmp_path / "out", dtype="f32", emit_only=True)


def _tied(folder: Path) -> bool:
    return '"tie_word_embeddings": true' in (folder / "config.json").read_text()

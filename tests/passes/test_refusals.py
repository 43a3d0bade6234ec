"""What looks like a decoder and is none must be refused, with the reason; what differs only in a way that the model stage can say must pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ir.constants import Inline
from ir.errors import UnsupportedError
from ir.graph import Graph, Node
from ir.interp import run
from ir.types import TensorType
from ir.verify import verify
from passes.lower import to_model
from tests.passes.helpers import SHAPES, assert_same_step, checkpoint, imported, model, padded_inputs
from tests.passes.respell import Respelling

SHAPE = SHAPES[1]  # 6 heads, 3 kv heads, head_dim 8


def edit(opset: int, fn: Callable[[Respelling], None], kv: bool = True) -> Graph:
    r = Respelling(imported(SHAPE, opset, kv), np.random.default_rng(0), 1.0)
    fn(r)
    graph = verify(r.finish())
    assert graph.nodes != imported(SHAPE, opset, kv).nodes
    return graph


def refused(opset: int, fn: Callable[[Respelling], None], *words: str, kv: bool = True) -> None:
    with pytest.raises(UnsupportedError) as caught:
        to_model(edit(opset, fn, kv))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def set_attrs(op: str, **attrs) -> Callable[[Respelling], None]:
    def fn(r: Respelling) -> None:
        r.editor.nodes = [replace(n, attrs={**n.attrs, **attrs}) if n.op == f"onnx.{op}" else n for n in r.editor.nodes]

    return fn


# --- masks ----------------------------------------------------------------------------------------------------------------------------------------


def seen_node(r: Respelling) -> tuple[Node, str, str]:
    """The node that says what is seen; its key places and query places."""
    bias = next(n for n in r.graph.nodes if n.op == "onnx.Where" and n.output.startswith("/model/causal_mask"))
    seen = r.graph.producers[bias.inputs[0]]
    causal = next(n for n in r.graph.nodes if n.op == "onnx.LessOrEqual")
    return seen, *causal.inputs


def window(size: int) -> Callable[[Respelling], None]:
    def fn(r: Respelling) -> None:
        seen, keys, queries = seen_node(r)
        causal = next(n for n in r.graph.nodes if n.op == "onnx.LessOrEqual")
        far = r.add("Sub", [queries, r.number(size, np.int64)], r.type(queries))
        near = r.add("Greater", [keys, far], causal.outputs[0].type)
        r.replace(
            seen, r.add("And", [r.add("And", list(seen.inputs), seen.outputs[0].type), near], seen.outputs[0].type)
        )

    return fn


@pytest.mark.parametrize("size", [3, 6, 64, 4096, 32768, 100000])
@pytest.mark.parametrize("opset", [18, 23])
def test_sliding_windows(size, opset):
    refused(opset, window(size), "attention at /model/layers.0/self_attn", "not causal", f"a sliding window of {size}")


@pytest.mark.parametrize("size", [3, 64, 4000])
def test_sliding_windows_without_a_cache(size):
    refused(18, window(size), "not causal", "window", kv=False)


def comparison(op: str, shift: int = 0) -> Callable[[Respelling], None]:
    def fn(r: Respelling) -> None:
        causal = next(n for n in r.graph.nodes if n.op == "onnx.LessOrEqual")
        keys, queries = causal.inputs
        if shift:
            queries = r.add("Add", [queries, r.number(shift, np.int64)], r.type(queries))
        r.replace(causal, r.add(op, [keys, queries], causal.outputs[0].type))

    return fn


@pytest.mark.parametrize(
    "fn, words",
    [
        (comparison("Less"), "is hidden from the query"),
        (comparison("LessOrEqual", 1), "is shown to the query"),
        (comparison("GreaterOrEqual"), "query"),
        (comparison("LessOrEqual", 10**9), "is shown to the query"),  # everything sees everything
    ],
    ids=["strict", "one ahead", "the future only", "bidirectional"],
)
@pytest.mark.parametrize("opset", [18, 23])
def test_masks_that_are_not_causal(fn, words, opset):
    refused(opset, fn, "not causal", words)


def biased(value: float) -> Callable[[Respelling], None]:
    """Hidden keys get this score instead of none."""

    def fn(r: Respelling) -> None:
        bias = next(n for n in r.graph.nodes if n.op == "onnx.Where" and n.output.startswith("/model/causal_mask"))
        r.replace(bias, r.add("Where", [bias.inputs[0], bias.inputs[1], r.number(value)], bias.outputs[0].type))

    return fn


def test_masks_that_add_numbers():
    refused(18, biased(-5.0), "not causal", "adds -5")
    assert to_model(edit(18, biased(-1e4))).counts() == model(SHAPE).counts()
    assert to_model(edit(23, biased(float("-inf")))).counts() == model(SHAPE).counts()


def test_a_position_bias():
    def alibi(r: Respelling) -> None:
        seen, keys, _ = seen_node(r)
        bias = next(n for n in r.graph.nodes if n.op == "onnx.Where" and n.output.startswith("/model/causal_mask"))
        slope = r.add(
            "Mul",
            [r.add("Cast", [keys], r.type(keys).with_dtype("f32"), to="f32"), r.number(0.01)],
            r.type(keys).with_dtype("f32"),
        )
        copy = r.add("Where", list(bias.inputs), bias.outputs[0].type)
        r.replace(bias, r.add("Add", [copy, slope], bias.outputs[0].type))

    refused(18, alibi, "not causal", "position bias")


def test_a_mask_without_padding_is_said_so():
    def unpadded(r: Respelling) -> None:
        seen, *_ = seen_node(r)
        causal = next(n for n in r.graph.nodes if n.op == "onnx.LessOrEqual")
        shape = seen.outputs[0].type.shape
        alone = r.add("Unsqueeze", [causal.output, r.ints(0, 1)], seen.outputs[0].type.with_shape(1, 1, *shape[2:]))
        r.replace(seen, alone)

    for opset in (18, 23):
        graph = edit(opset, unpadded)
        found = to_model(graph)
        assert all(len(n.inputs) == 5 for n in found.nodes if n.op == "attention")
        assert_same_step(graph, found, checkpoint(SHAPE), 4, 3, [0])


def test_no_mask_at_all():
    def unmasked(r: Respelling) -> None:
        for node in r.graph.nodes:
            if node.op == "onnx.Add" and node.inputs[1].startswith("/model/causal_mask"):
                r.editor.replace(node.output, node.inputs[0])

    refused(18, unmasked, "there is no mask")

    def maskless(r: Respelling) -> None:
        r.editor.nodes = [
            replace(n, inputs=(*n.inputs[:3], "", *n.inputs[4:])) if n.op == "onnx.Attention" else n
            for n in r.editor.nodes
        ]

    refused(23, maskless, "there is no mask")


def test_the_op_may_be_causal_by_itself():
    def causal(r: Respelling) -> None:
        r.editor.nodes = [
            replace(n, inputs=(*n.inputs[:3], "", *n.inputs[4:]), attrs={**n.attrs, "is_causal": 1})
            if n.op == "onnx.Attention"
            else n
            for n in r.editor.nodes
        ]

    graph = edit(23, causal)
    found = to_model(graph)
    assert all(len(n.inputs) == 5 for n in found.nodes if n.op == "attention")
    assert_same_step(graph, found, checkpoint(SHAPE), 4, 3, [0, 0])


# --- heads and scales -----------------------------------------------------------------------------------------------------------------------------


def test_heads_in_another_order():
    """Tiled instead of repeated: query head h would read kv head h % 3 instead of h // 2."""

    def tiled(r: Respelling) -> None:
        for node in r.some("Unsqueeze"):
            if node.outputs[0].type.rank == 5:
                expand = r.graph.consumers[node.output][0]
                x = node.inputs[0]
                batch, heads, total, dim = r.type(x).shape
                one = r.add("Unsqueeze", [x, r.ints(1)], r.type(x).with_shape(batch, 1, heads, total, dim))
                r.replace(
                    expand,
                    r.add("Expand", [one, r.ints(1, 2, 1, 1, 1)], r.type(x).with_shape(batch, 2, heads, total, dim)),
                )

    refused(18, tiled, "attention at", "query, key and value do not fit")


def test_scaled_values():
    def scaled(r: Respelling) -> None:
        for node in r.some("MatMul"):
            if node.output.endswith("self_attn/MatMul_1_output_0"):
                v = r.add("Mul", [node.inputs[1], r.number(0.5)], r.type(node.inputs[1]))
                r.replace(node, r.add("MatMul", [node.inputs[0], v], node.outputs[0].type))

    refused(18, scaled, "the values are multiplied by 0.5")


@pytest.mark.parametrize(
    "attrs, words", [({"softcap": 30.0}, "softcap"), ({"left_window_size": 4}, "left_window_size")]
)
def test_attention_attributes(attrs, words):
    refused(23, set_attrs("Attention", **attrs), words)


def test_another_scale_is_kept():
    found = to_model(edit(23, set_attrs("Attention", scale=0.25)))
    assert {n.attrs["scale"] for n in found.nodes if n.op == "attention"} == {0.25}


def test_a_default_scale():
    def unscaled(r: Respelling) -> None:
        r.editor.nodes = [replace(n, attrs={}) if n.op == "onnx.Attention" else n for n in r.editor.nodes]

    found = to_model(edit(23, unscaled))
    assert {n.attrs["scale"] for n in found.nodes if n.op == "attention"} == {float(np.float32(8**-0.5))}


# --- rope -----------------------------------------------------------------------------------------------------------------------------------------


def angles(change: Callable[[Respelling, Node, TensorType], str]) -> Callable[[Respelling], None]:
    """Replace the product of position and frequency."""

    def fn(r: Respelling) -> None:
        node = next(n for n in r.graph.nodes if n.op == "onnx.Mul" and n.inputs[1].endswith("inv_freq"))
        r.replace(node, change(r, node, node.outputs[0].type))

    return fn


def _shifted(r, node, type_):
    return r.add("Mul", [r.add("Add", [node.inputs[0], r.number(1.0)], r.type(node.inputs[0])), node.inputs[1]], type_)


def _squared(r, node, type_):
    return r.add("Mul", [r.add("Mul", [node.inputs[0]] * 2, r.type(node.inputs[0])), node.inputs[1]], type_)


def _wrapped(r, node, type_):
    """Positions beyond 4096 start again."""
    limited = r.add("Min", [node.inputs[0], r.number(4096.0)], r.type(node.inputs[0]))
    return r.add("Mul", [limited, node.inputs[1]], type_)


def _dynamic(r, node, type_):
    """Frequencies that are a quarter as soon as one position is beyond 100."""
    top = r.add("ReduceMax", [node.inputs[0]], TensorType("f32", ()), keepdims=0)
    long = r.add("Greater", [top, r.number(100.0)], TensorType("bool", ()))
    factor = r.add("Where", [long, r.number(0.25), r.number(1.0)], TensorType("f32", ()))
    return r.add("Mul", [r.add("Mul", list(node.inputs), type_), factor], type_)


def _by_place(r, node, type_):
    """The place in the sequence instead of position_ids."""
    zero = r.add("Mul", [node.inputs[0], r.number(0.0)], r.type(node.inputs[0]))
    ones = r.add("Add", [zero, r.number(1.0)], r.type(node.inputs[0]))
    place = r.add("CumSum", [ones, r.number(1, np.int64)], r.type(node.inputs[0]))
    return r.add("Mul", [place, node.inputs[1]], type_)


@pytest.mark.parametrize("change", [_shifted, _squared, _wrapped, _by_place], ids=lambda f: f.__name__)
@pytest.mark.parametrize("opset", [18, 23])
def test_angles_that_are_not_rotary(change, opset):
    refused(
        opset, angles(change), "rope", "/model/layers.0/self_attn/q_rope", "not cos and sin of position * frequency"
    )


def test_frequencies_that_depend_on_the_length():
    refused(18, angles(_dynamic), "dynamic scaling")


@pytest.mark.parametrize("factor", [0.25, 0.3])
@pytest.mark.parametrize("opset", [18, 23])
def test_linear_scaling_is_another_set_of_frequencies(factor, opset):
    def scaled(r, node, type_):
        return r.add("Mul", [r.add("Mul", list(node.inputs), type_), r.number(factor)], type_)

    graph = edit(opset, angles(scaled))
    found = to_model(graph)
    original = model(SHAPE).constants["inv_freq"].data.array  # type: ignore[union-attr]
    assert np.allclose(found.constants["inv_freq"].data.array, original * np.float32(factor), rtol=2**-22)  # type: ignore[union-attr]
    if factor == 0.25:  # exact: a power of two
        assert_same_step(graph, found, checkpoint(SHAPE), 4, 3, [0, 2])


@pytest.mark.parametrize("opset", [18, 23])
def test_a_factor_on_cos_and_sin(opset):
    """Yarn's attention factor."""

    def factor(r: Respelling) -> None:
        for op in ("Cos", "Sin"):
            for node in r.some(op):
                copy = r.add(op, list(node.inputs), node.outputs[0].type)
                r.replace(node, r.add("Mul", [copy, r.number(1.25)], node.outputs[0].type))

    graph = edit(opset, factor)
    found = to_model(graph)
    assert {n.attrs["attention_factor"] for n in found.nodes if n.op == "rope"} == {1.25}
    assert_same_step(graph, found, checkpoint(SHAPE), 4, 3, [0, 2])


def test_cos_and_sin_that_do_not_belong_together():
    def doubled(r: Respelling) -> None:
        for node in r.some("Sin"):
            twice = r.add("Mul", [node.inputs[0], r.number(2.0)], r.type(node.inputs[0]))
            r.replace(node, r.add("Sin", [twice], node.outputs[0].type))

    refused(18, doubled, "rope", "not the same everywhere")
    refused(23, doubled, "rope", "not the same everywhere")

    def backwards(r: Respelling) -> None:
        for node in r.some("Sin"):
            copy = r.add("Sin", list(node.inputs), node.outputs[0].type)
            r.replace(node, r.add("Neg", [copy], node.outputs[0].type))

    refused(18, backwards, "rope", "not cos and sin")


def test_interleaved_pairs_are_said_so():
    graph = edit(23, set_attrs("RotaryEmbedding", interleaved=1))
    found = to_model(graph)
    assert {n.attrs["interleaved"] for n in found.nodes if n.op == "rope"} == {True}
    assert_same_step(graph, found, checkpoint(SHAPE), 4, 3, [0, 2])


def test_partial_rotation():
    refused(23, set_attrs("RotaryEmbedding", rotary_embedding_dim=4), "it turns 4 of 8 elements")


# --- norms, activations, the rest -----------------------------------------------------------------------------------------------------------------


def test_a_mean_over_another_axis():
    def other_axis(r: Respelling) -> None:
        for node in r.some("ReduceMean"):
            shape = r.type(node.inputs[0]).shape
            mean = r.type(node.inputs[0]).with_shape(shape[0], 1, *shape[2:])
            r.replace(node, r.add("ReduceMean", [node.inputs[0], r.ints(1)], mean, keepdims=1))

    with pytest.raises(UnsupportedError, match="rms_norm at .*: no, because the mean is not over the last axis"):
        to_model(edit(18, other_axis))


def test_a_layer_norm():
    """Centred: x - mean(x) is what is squared."""

    def centred(r: Respelling) -> None:
        for node in r.some("Pow"):
            x = node.inputs[0]
            mean = r.add("ReduceMean", [x, r.ints(-1)], r.type(x).with_shape(*r.type(x).shape[:-1], 1), keepdims=1)
            r.replace(node, r.add("Pow", [r.add("Sub", [x, mean], r.type(x)), node.inputs[1]], node.outputs[0].type))

    with pytest.raises(UnsupportedError, match="is part of nothing that can be compiled; closest: rms_norm at "):
        to_model(edit(18, centred))


def test_another_activation():
    def tanh(r: Respelling) -> None:
        for node in r.some("Sigmoid"):
            r.replace(node, r.add("Tanh", list(node.inputs), node.outputs[0].type))

    with pytest.raises(
        UnsupportedError,
        match=r"onnx.Tanh -> \S+ .*closest: silu at .*after mul: expected onnx.Sigmoid, found onnx.Tanh",
    ):
        to_model(edit(18, tanh))


def test_a_norm_over_two_axes():
    with pytest.raises(UnsupportedError, match="normalises from axis 1 on"):
        to_model(edit(23, set_attrs("RMSNormalization", axis=1)))


def test_a_gate_of_another_value():
    """up * sigmoid(gate) alone is no swiglu: the product with gate is missing."""

    def glu(r: Respelling) -> None:
        for node in r.some("Mul"):
            if node.output.endswith("mlp/act_fn/Mul_output_0"):
                r.editor.replace(node.output, node.inputs[1])

    with pytest.raises(UnsupportedError, match="onnx.Sigmoid"):
        to_model(edit(18, glu))


# --- biases ---------------------------------------------------------------------------------------------------------------------------------------


def test_biases_become_part_of_the_linear():
    """As in Qwen2: no new code path."""

    def biases(r: Respelling) -> None:
        rng = np.random.default_rng(1)
        for i, node in enumerate(
            n
            for n in r.graph.nodes
            if n.op == "onnx.MatMul" and n.output.endswith(("q_proj/MatMul_output_0", "v_proj/MatMul_output_0"))
        ):
            type_ = node.outputs[0].type
            bias = r.editor.constant(f"bias_{i}", Inline(rng.normal(size=type_.shape[-1]).astype(np.float32)))  # type: ignore[arg-type]
            copy = r.add("MatMul", list(node.inputs), type_)
            r.replace(node, r.add("Add", [bias, copy], type_))

    graph = edit(18, biases)
    found = to_model(graph)
    assert [len(n.inputs) for n in found.nodes if n.op == "linear"][:4] == [3, 2, 3, 2]
    assert "model.layers.1.self_attn.v_proj.bias" in found.constants
    assert found.counts() == model(SHAPE).counts()
    inputs = padded_inputs(graph, np.random.default_rng(0), 4, 2, [0, 1])
    a, b = (run(g, inputs, folder=checkpoint(SHAPE), float64=True)["logits"] for g in (graph, found))
    assert np.abs(a - b)[0].max() < 1e-12 * np.abs(a).max()

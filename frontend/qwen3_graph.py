"""Writes a Qwen3 decoder as an ONNX graph, from its configuration and the places of its weights; no weight is read.

Two spellings: opset 18, everything decomposed into elementary ops (what older exporters emit), and opset 23 with
RMSNormalization, RotaryEmbedding and Attention. Node names follow the Hugging Face module path; weights keep the
checkpoint's names, dtypes and [out, in] layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from frontend.checkpoint import SINGLE, TensorEntry
from frontend.config import Qwen3Config
from ir.types import DTYPES

# Opset 18's IR version, and opset 23's: every onnxruntime from 1.23 on loads both.
IR_VERSIONS = {18: 8, 23: 11}
PRODUCER = "qwen3-infinicore"

# The mask adds this to scores that must not count. Finite, so that a row whose keys are all masked (padding before the
# first token) gives numbers and not NaN: the next layer's keys of that row are masked by a weight of 0, and 0 * NaN
# would be NaN.
MASKED = float(np.finfo(np.float32).min)

Shape = Sequence[Any]  # of sizes and symbols' names


def inv_freq(head_dim: int, theta: float) -> np.ndarray:
    """Rotary frequencies, float32 [head_dim / 2], in float32 arithmetic as Hugging Face computes them."""
    exponents = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    return (np.float32(1.0) / np.power(np.float32(theta), exponents)).astype(np.float32)


def build_model(
    config: Qwen3Config,
    tensors: Mapping[str, TensorEntry] | None,
    *,
    opset: int,
    kv: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> ModelProto:
    """The model as a ModelProto of a few megabytes at most.

    Inputs (i64): input_ids and position_ids [batch, sequence], attention_mask [batch, total].
    Output (f32): logits [batch, sequence, vocab].
    With ``kv`` also past_key_values.N.key/value (f32 [batch, kv_heads, past, head_dim]) and present.N.key/value
    ([batch, kv_heads, total, head_dim]); without it, total is sequence.

    Args:
        tensors: where the weights lie; None for a graph from the configuration alone (external data without offset or
            length).
        opset: 18 or 23.
        metadata: further metadata_props.
    """
    return _Qwen3(config, tensors, opset, kv).model(metadata or {})


class _Builder:
    """Nodes, initializers and the shape of every value."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: dict[str, TensorProto] = {}
        self.value_info: list[ValueInfoProto] = []

    def op(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str,
        shape: Shape,
        dtype: int = TensorProto.FLOAT,
        output: str | None = None,
        **attrs: Any,
    ) -> str:
        """Append a node with one output; returns the output's name."""
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attrs))
        self.value_info.append(helper.make_tensor_value_info(output, dtype, shape))
        return output

    def const(self, name: str, value: object, dtype: type) -> str:
        """A small inline initializer; the same name is the same constant."""
        name = f"/constants/{name}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def ints(self, *values: int) -> str:
        return self.const("i64_" + "_".join(map(str, values)), values, np.int64)


class _Qwen3(_Builder):
    def __init__(self, config: Qwen3Config, tensors: Mapping[str, TensorEntry] | None, opset: int, kv: bool) -> None:
        super().__init__()
        self.config, self.tensors, self.opset, self.kv = config, tensors, opset, kv
        self.shapes = config.weight_shapes()
        self.total = "total" if kv else "sequence"

    def model(self, metadata: Mapping[str, str]) -> ModelProto:
        c, i64, f32 = self.config, TensorProto.INT64, TensorProto.FLOAT
        hidden = ["batch", "sequence", c.hidden_size]
        inputs = [
            helper.make_tensor_value_info("input_ids", i64, ["batch", "sequence"]),
            helper.make_tensor_value_info("attention_mask", i64, ["batch", self.total]),
            helper.make_tensor_value_info("position_ids", i64, ["batch", "sequence"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", f32, ["batch", "sequence", c.vocab_size])]
        if self.kv:
            for n in range(c.num_hidden_layers):
                for part in ("key", "value"):
                    past: Shape = ["batch", c.num_key_value_heads, "past", c.head_dim]
                    present: Shape = ["batch", c.num_key_value_heads, "total", c.head_dim]
                    inputs.append(helper.make_tensor_value_info(f"past_key_values.{n}.{part}", f32, past))
                    outputs.append(helper.make_tensor_value_info(f"present.{n}.{part}", f32, present))

        # Rows are gathered before they are widened: a float32 copy of the whole table is not needed here.
        embed = "model.embed_tokens.weight"
        rows = self.op(
            "Gather", [self.stored(embed), "input_ids"], "/model/embed_tokens/Gather", hidden, self.code(embed), axis=0
        )
        x = self.widen(rows, "/model/embed_tokens/Cast", hidden, self.code(embed))
        self.mask()
        self.rotary()
        for n in range(c.num_hidden_layers):
            x = self.layer(n, x)
        x = self.norm(x, "/model/norm", "model.norm.weight", hidden)
        head = embed if c.tie_word_embeddings else "lm_head.weight"
        self.linear(x, "/lm_head", head, c.vocab_size, output="logits")

        known = {v.name for v in outputs}
        graph = helper.make_graph(
            self.nodes,
            "qwen3",
            inputs,
            outputs,
            list(self.initializers.values()),
            value_info=[v for v in self.value_info if v.name not in known],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=IR_VERSIONS[self.opset],
            producer_name=PRODUCER,
        )
        facts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in asdict(c).items()}
        helper.set_model_props(model, {"model_type": "qwen3", **facts, **metadata})
        return model

    # Weights

    def stored(self, name: str) -> str:
        """An initializer that points at the checkpoint's bytes."""
        if name not in self.initializers:
            entry = self.tensors[name] if self.tensors is not None else None
            tensor = TensorProto(name=name, data_type=self.code(name), data_location=TensorProto.EXTERNAL)
            tensor.dims.extend(self.shapes[name])
            places = {"location": SINGLE}
            if entry is not None:
                places = {"location": entry.file, "offset": str(entry.offset), "length": str(entry.nbytes)}
            for key, value in places.items():
                tensor.external_data.add(key=key, value=value)
            self.initializers[name] = tensor
        return name

    def code(self, name: str) -> int:
        """The ONNX element type that a weight is stored in."""
        return DTYPES[self.tensors[name].dtype if self.tensors is not None else self.config.dtype].onnx

    def widen(self, value: str, node: str, shape: Shape, code: int) -> str:
        """The value in float32, in which everything is computed."""
        return value if code == TensorProto.FLOAT else self.op("Cast", [value], node, shape, to=TensorProto.FLOAT)

    def weight(self, name: str, module: str) -> str:
        return self.widen(self.stored(name), f"{module}/Cast", self.shapes[name], self.code(name))

    # Modules

    def linear(self, x: str, module: str, weight: str, features: int, output: str | None = None) -> str:
        """x @ weight^T."""
        w = self.weight(weight, module)
        w = self.op("Transpose", [w], f"{module}/Transpose", self.shapes[weight][::-1], perm=[1, 0])
        return self.op("MatMul", [x, w], f"{module}/MatMul", ["batch", "sequence", features], output=output)

    def norm(self, x: str, module: str, weight: str, shape: Shape) -> str:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
        w = self.weight(weight, module)
        if self.opset >= 23:
            eps = self.config.rms_norm_eps
            return self.op(
                "RMSNormalization", [x, w], f"{module}/RMSNormalization", shape, axis=-1, epsilon=eps, stash_type=1
            )
        mean = [*shape[:-1], 1]
        two, tiny = self.const("two", 2.0, np.float32), self.const("rms_norm_eps", self.config.rms_norm_eps, np.float32)
        y = self.op("Pow", [x, two], f"{module}/Pow", shape)
        y = self.op("ReduceMean", [y, self.ints(-1)], f"{module}/ReduceMean", mean, keepdims=1)
        y = self.op("Add", [y, tiny], f"{module}/Add", mean)
        y = self.op("Sqrt", [y], f"{module}/Sqrt", mean)
        y = self.op("Div", [self.const("one", 1.0, np.float32), y], f"{module}/Div", mean)
        y = self.op("Mul", [x, y], f"{module}/Mul", shape)
        return self.op("Mul", [w, y], f"{module}/Mul_1", shape)

    def mask(self) -> None:
        """``self.bias``: f32 [batch, 1, sequence, total], 0 where a query sees a key, MASKED elsewhere.

        The query at index i of the sequence stands at index past + i of the keys and sees the keys up to its own, where
        attention_mask is not 0. These are places in the cache and not position_ids: with padding on the left the two
        differ.
        """
        m, i64, boolean = "/model/causal_mask", TensorProto.INT64, TensorProto.BOOL
        length = self.op("Shape", ["attention_mask"], f"{m}/Shape", [1], i64, start=1, end=2)
        total = self.op("Squeeze", [length], f"{m}/Squeeze", [], i64)
        zero, one = self.const("zero", 0, np.int64), self.const("int_one", 1, np.int64)
        keys = self.op("Range", [zero, total, one], f"{m}/Range", [self.total], i64)
        queries = keys
        if self.kv:
            length = self.op("Shape", ["input_ids"], f"{m}/Shape_1", [1], i64, start=1, end=2)
            sequence = self.op("Squeeze", [length], f"{m}/Squeeze_1", [], i64)
            past = self.op("Sub", [total, sequence], f"{m}/Sub", [], i64)
            queries = self.op("Range", [past, total, one], f"{m}/Range_1", ["sequence"], i64)
        column = self.op("Unsqueeze", [queries, self.ints(1)], f"{m}/Unsqueeze", ["sequence", 1], i64)
        causal = self.op("LessOrEqual", [keys, column], f"{m}/LessOrEqual", ["sequence", self.total], boolean)
        real = self.op("Cast", ["attention_mask"], f"{m}/Cast", ["batch", self.total], boolean, to=boolean)
        real = self.op("Unsqueeze", [real, self.ints(1, 2)], f"{m}/Unsqueeze_1", ["batch", 1, 1, self.total], boolean)
        shape = ["batch", 1, "sequence", self.total]
        seen = self.op("And", [causal, real], f"{m}/And", shape, boolean)
        values = [self.const("unmasked", 0.0, np.float32), self.const("masked", MASKED, np.float32)]
        self.bias = self.op("Where", [seen, *values], f"{m}/Where", shape)

    def rotary(self) -> None:
        """``self.cos``, ``self.sin``: f32 [batch, sequence, head_dim / 2].

        For opset 18 both halves are there: [batch, 1, sequence, head_dim].
        """
        m, half = "/model/rotary_emb", self.config.head_dim // 2
        table = inv_freq(self.config.head_dim, self.config.rope_theta)
        self.initializers["model.rotary_emb.inv_freq"] = numpy_helper.from_array(table, "model.rotary_emb.inv_freq")
        position = self.op(
            "Unsqueeze", ["position_ids", self.ints(2)], f"{m}/Unsqueeze", ["batch", "sequence", 1], TensorProto.INT64
        )
        position = self.op("Cast", [position], f"{m}/Cast", ["batch", "sequence", 1], to=TensorProto.FLOAT)
        angles = self.op("Mul", [position, "model.rotary_emb.inv_freq"], f"{m}/Mul", ["batch", "sequence", half])
        if self.opset >= 23:
            self.cos = self.op("Cos", [angles], f"{m}/Cos", ["batch", "sequence", half])
            self.sin = self.op("Sin", [angles], f"{m}/Sin", ["batch", "sequence", half])
            return
        shape = ["batch", 1, "sequence", self.config.head_dim]
        angles = self.op("Concat", [angles, angles], f"{m}/Concat", ["batch", "sequence", 2 * half], axis=-1)
        angles = self.op("Unsqueeze", [angles, self.ints(1)], f"{m}/Unsqueeze_1", shape)
        self.cos = self.op("Cos", [angles], f"{m}/Cos", shape)
        self.sin = self.op("Sin", [angles], f"{m}/Sin", shape)

    def rope(self, x: str, module: str, shape: Shape) -> str:
        """x [batch, heads, sequence, head_dim] turned by its position: pairs are (i, i + head_dim / 2)."""
        if self.opset >= 23:
            return self.op(
                "RotaryEmbedding", [x, self.cos, self.sin], f"{module}/RotaryEmbedding", shape, interleaved=0
            )
        half = self.config.head_dim // 2
        part, axis = [*shape[:-1], half], self.ints(3)
        first = self.op("Slice", [x, self.ints(0), self.ints(half), axis], f"{module}/Slice", part)
        second = self.op("Slice", [x, self.ints(half), self.ints(2 * half), axis], f"{module}/Slice_1", part)
        second = self.op("Neg", [second], f"{module}/Neg", part)
        turned = self.op("Concat", [second, first], f"{module}/Concat", shape, axis=-1)
        straight = self.op("Mul", [x, self.cos], f"{module}/Mul", shape)
        turned = self.op("Mul", [turned, self.sin], f"{module}/Mul_1", shape)
        return self.op("Add", [straight, turned], f"{module}/Add", shape)

    def layer(self, n: int, x: str) -> str:
        c, m, w = self.config, f"/model/layers.{n}", f"model.layers.{n}"
        hidden, inner = ["batch", "sequence", c.hidden_size], ["batch", "sequence", c.intermediate_size]
        y = self.norm(x, f"{m}/input_layernorm", f"{w}.input_layernorm.weight", hidden)
        y = self.attention(n, y)
        x = self.op("Add", [x, y], f"{m}/Add", hidden)
        y = self.norm(x, f"{m}/post_attention_layernorm", f"{w}.post_attention_layernorm.weight", hidden)
        gate = self.linear(y, f"{m}/mlp/gate_proj", f"{w}.mlp.gate_proj.weight", c.intermediate_size)
        up = self.linear(y, f"{m}/mlp/up_proj", f"{w}.mlp.up_proj.weight", c.intermediate_size)
        sigmoid = self.op("Sigmoid", [gate], f"{m}/mlp/act_fn/Sigmoid", inner)
        gate = self.op("Mul", [gate, sigmoid], f"{m}/mlp/act_fn/Mul", inner)
        y = self.op("Mul", [gate, up], f"{m}/mlp/Mul", inner)
        y = self.linear(y, f"{m}/mlp/down_proj", f"{w}.mlp.down_proj.weight", c.hidden_size)
        return self.op("Add", [x, y], f"{m}/Add_1", hidden)

    def heads(self, n: int, x: str, part: str, count: int, normed: bool) -> str:
        """One of q, k, v as [batch, heads, sequence, head_dim]; q and k normalised per head."""
        d, m, w = self.config.head_dim, f"/model/layers.{n}/self_attn", f"model.layers.{n}.self_attn"
        split = ["batch", "sequence", count, d]
        y = self.linear(x, f"{m}/{part}_proj", f"{w}.{part}_proj.weight", count * d)
        y = self.op("Reshape", [y, self.ints(0, 0, count, d)], f"{m}/{part}_proj/Reshape", split)
        if normed:
            y = self.norm(y, f"{m}/{part}_norm", f"{w}.{part}_norm.weight", split)
        shape = ["batch", count, "sequence", d]
        y = self.op("Transpose", [y], f"{m}/{part}_heads/Transpose", shape, perm=[0, 2, 1, 3])
        return self.rope(y, f"{m}/{part}_rope", shape) if normed else y

    def attention(self, n: int, x: str) -> str:
        c, m = self.config, f"/model/layers.{n}/self_attn"
        heads, d = c.num_attention_heads, c.head_dim
        q = self.heads(n, x, "q", heads, True)
        k = self.heads(n, x, "k", c.num_key_value_heads, True)
        v = self.heads(n, x, "v", c.num_key_value_heads, False)
        y = self.attend(n, m, q, k, v) if self.opset >= 23 else self.attend_decomposed(n, m, q, k, v)
        y = self.op("Transpose", [y], f"{m}/Transpose", ["batch", "sequence", heads, d], perm=[0, 2, 1, 3])
        y = self.op("Reshape", [y, self.ints(0, 0, heads * d)], f"{m}/Reshape", ["batch", "sequence", heads * d])
        return self.linear(y, f"{m}/o_proj", f"model.layers.{n}.self_attn.o_proj.weight", c.hidden_size)

    def attend(self, n: int, m: str, q: str, k: str, v: str) -> str:
        """The Attention op, with an explicit mask.

        is_causal with fewer queries than keys means different things in different runtimes.
        """
        inputs = [q, k, v, self.bias]
        outputs = [f"{m}/Attention_output_0"]
        if self.kv:
            inputs += [f"past_key_values.{n}.key", f"past_key_values.{n}.value"]
            outputs += [f"present.{n}.key", f"present.{n}.value"]
        c, scale = self.config, 1.0 / math.sqrt(self.config.head_dim)
        self.nodes.append(helper.make_node("Attention", inputs, outputs, name=f"{m}/Attention", scale=scale))
        shape: Shape = ["batch", c.num_attention_heads, "sequence", c.head_dim]
        self.value_info.append(helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, shape))
        return outputs[0]

    def attend_decomposed(self, n: int, m: str, q: str, k: str, v: str) -> str:
        c = self.config
        heads, kv_heads, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        group = heads // kv_heads

        def cached(new: str, part: str) -> str:
            if not self.kv:
                return new
            past, present = f"past_key_values.{n}.{part}", f"present.{n}.{part}"
            shape = ["batch", kv_heads, self.total, d]
            return self.op("Concat", [past, new], f"{m}/{part}_cache/Concat", shape, output=present, axis=2)

        def repeated(x: str, part: str) -> str:
            """Each KV head as often as query heads share it."""
            if group == 1:
                return x
            node, shape = f"{m}/{part}_repeat", ["batch", kv_heads, 1, self.total, d]
            x = self.op("Unsqueeze", [x, self.ints(2)], f"{node}/Unsqueeze", shape)
            x = self.op(
                "Expand", [x, self.ints(1, 1, group, 1, 1)], f"{node}/Expand", ["batch", kv_heads, group, self.total, d]
            )
            return self.op(
                "Reshape", [x, self.ints(0, heads, -1, d)], f"{node}/Reshape", ["batch", heads, self.total, d]
            )

        k, v = repeated(cached(k, "key"), "key"), repeated(cached(v, "value"), "value")
        scores = ["batch", heads, "sequence", self.total]
        k = self.op("Transpose", [k], f"{m}/key_repeat/Transpose", ["batch", heads, d, self.total], perm=[0, 1, 3, 2])
        y = self.op("MatMul", [q, k], f"{m}/MatMul", scores)
        y = self.op("Mul", [y, self.const("scale", 1.0 / math.sqrt(d), np.float32)], f"{m}/Mul", scores)
        y = self.op("Add", [y, self.bias], f"{m}/Add", scores)
        y = self.op("Softmax", [y], f"{m}/Softmax", scores, axis=-1)
        return self.op("MatMul", [y, v], f"{m}/MatMul_1", ["batch", heads, "sequence", d])

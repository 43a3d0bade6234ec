"""Other ways to write the same ONNX graph: each rewrites some nodes at random, as one exporter or another would have written them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ir.constants import Inline
from ir.graph import Graph, GraphEditor, Node
from ir.types import TensorType


class Respelling:
    """A graph of stage "onnx" being rewritten."""

    def __init__(self, graph: Graph, rng: np.random.Generator, share: float = 0.5) -> None:
        self.graph, self.rng, self.share = graph, rng, share
        self.editor = GraphEditor(graph)

    def some(self, op: str) -> list[Node]:
        return [n for n in self.graph.nodes if n.op == f"onnx.{op}" and self.rng.random() < self.share]

    def add(self, op: str, inputs: list[str], type_: TensorType, **attrs) -> str:
        return self.editor.add(f"onnx.{op}", inputs, [f"respelt_{op}"], attrs, [type_])[0]

    def number(self, value: float, dtype=np.float32) -> str:
        return self.editor.constant("number", Inline(np.array(value, dtype)))

    def ints(self, *values: int) -> str:
        return self.editor.constant("ints", Inline(np.array(values, np.int64)))

    def type(self, name: str) -> TensorType:
        return self.editor.type(name)

    def replace(self, node: Node, new: str) -> None:
        self.editor.replace(node.output, new)

    def finish(self) -> Graph:
        return self.editor.finish()

    def only_reader(self, value: str) -> Node | None:
        readers = self.graph.consumers[value]
        return readers[0] if len(readers) == 1 and value not in self.graph.outputs else None


def swapped_operands(r: Respelling) -> None:
    for op in ("Add", "Mul", "And"):
        for node in r.some(op):
            r.replace(node, r.add(op, list(node.inputs[::-1]), node.outputs[0].type))


def identities(r: Respelling) -> None:
    for op in ("MatMul", "Add", "Mul", "Transpose", "Gather", "Where", "Cos"):
        for node in r.some(op):
            type_ = node.outputs[0].type
            # The reader is the new node alone: the old value keeps its own producer under another name.
            copy = r.add(op, list(node.inputs), type_, **node.attrs)
            if type_.dtype == "f32" and r.rng.random() < 0.5:
                wide = r.add("Cast", [copy], type_.with_dtype("f64"), to="f64")
                copy = r.add("Cast", [wide], type_, to="f32")
            r.replace(node, r.add("Identity", [copy], type_))


def reciprocal(r: Respelling) -> None:
    for node in r.some("Div"):
        r.replace(node, r.add("Reciprocal", [node.inputs[1]], node.outputs[0].type))


def power(r: Respelling) -> None:
    """1 / sqrt(v) as v ^ -0.5."""
    for node in r.some("Div"):
        root = r.graph.producers[node.inputs[1]]
        r.replace(node, r.add("Pow", [root.inputs[0], r.number(-0.5)], node.outputs[0].type))


def division(r: Respelling) -> None:
    """x * (1 / sqrt(v)) as x / sqrt(v)."""
    for node in r.some("Div"):
        reader = r.only_reader(node.output)
        assert reader is not None
        x = next(i for i in reader.inputs if i != node.output)
        r.replace(reader, r.add("Div", [x, node.inputs[1]], reader.outputs[0].type))


def square(r: Respelling) -> None:
    for node in [n for n in r.some("Pow") if n.inputs[1].endswith("two")]:
        r.replace(node, r.add("Mul", [node.inputs[0]] * 2, node.outputs[0].type))


def weight_order(r: Respelling) -> None:
    """Cast after Transpose instead of before it."""
    for node in r.some("Transpose"):
        cast = r.graph.producers.get(node.inputs[0])
        if cast is not None and cast.op == "onnx.Cast" and cast.inputs[0] in r.graph.constants:
            type_ = node.outputs[0].type
            turned = r.add("Transpose", [cast.inputs[0]], type_.with_dtype(r.type(cast.inputs[0]).dtype), perm=(1, 0))
            r.replace(node, r.add("Cast", [turned], type_, to="f32"))


def computed_shapes(r: Respelling) -> None:
    """Reshape to a shape that is put together with Shape, Gather, Unsqueeze and Concat."""
    scalar, one = TensorType("i64", ()), TensorType("i64", (1,))
    for node in r.some("Reshape"):
        x, type_ = node.inputs[0], node.outputs[0].type
        whole = r.add("Shape", [x], TensorType("i64", (r.type(x).rank,)))
        parts = []
        for i, size in enumerate(type_.shape):
            if isinstance(size, int):
                parts.append(r.ints(size))
            elif r.type(x).shape[i : i + 1] == (size,):
                picked = r.add("Gather", [whole, r.number(i, np.int64)], scalar, axis=0)
                parts.append(r.add("Unsqueeze", [picked, r.ints(0)], one))
            else:
                parts.append(r.ints(-1))
        shape = r.add("Concat", parts, TensorType("i64", (type_.rank,)), axis=0)
        r.replace(node, r.add("Reshape", [x, shape], type_))


def expanded_by_shape(r: Respelling) -> None:
    """Expand to the whole shape instead of ones."""
    one = TensorType("i64", (1,))
    for node in r.some("Expand"):
        x, type_ = node.inputs[0], node.outputs[0].type
        parts = []
        for i, size in enumerate(type_.shape):
            parts.append(r.ints(size) if isinstance(size, int) else r.add("Shape", [x], one, start=i, end=i + 1))
        shape = r.add("Concat", parts, TensorType("i64", (type_.rank,)), axis=0)
        r.replace(node, r.add("Expand", [x, shape], type_))


def _scaled(r: Respelling) -> list[tuple[Node, Node, float]]:
    """The products q k^T, the Mul with the scale after them, and the scale."""
    found = []
    for node in r.some("Mul"):
        product = r.graph.producers.get(node.inputs[0])
        if product is not None and product.op == "onnx.MatMul" and r.type(node.inputs[1]).rank == 0:
            found.append((node, product, float(r.graph.constants[node.inputs[1]].data.array)))  # type: ignore[union-attr]
    return found


def scale_on_both(r: Respelling) -> None:
    """sqrt(scale) on queries and keys, as torch's scaled_dot_product_attention is decomposed."""
    for node, product, scale in _scaled(r):
        root = r.number(np.sqrt(scale))
        q, k = (r.add("Mul", [i, root], r.type(i)) for i in product.inputs)
        r.replace(node, r.add("MatMul", [q, k], product.outputs[0].type))


def scale_on_queries(r: Respelling) -> None:
    for node, product, scale in _scaled(r):
        q = r.add("Mul", [product.inputs[0], r.number(scale)], r.type(product.inputs[0]))
        r.replace(node, r.add("MatMul", [q, product.inputs[1]], product.outputs[0].type))


def scale_by_division(r: Respelling) -> None:
    for node, product, scale in _scaled(r):
        r.replace(node, r.add("Div", [product.output, r.number(1 / scale)], node.outputs[0].type))


def keys_through_three_axes(r: Respelling) -> None:
    """Keys transposed as [batch * heads, total, head_dim], as torch.export does."""
    for node in r.some("Transpose"):
        if tuple(node.attrs["perm"]) != (0, 1, 3, 2):
            continue
        x = node.inputs[0]
        batch, heads, total, dim = r.type(x).shape
        size = r.add("Shape", [x], TensorType("i64", (1,)), start=2, end=3)
        down = r.add("Concat", [r.ints(-1), size, r.ints(dim)], TensorType("i64", (3,)), axis=0)
        flat = r.add("Reshape", [x, down], r.type(x).with_shape(batch * heads, total, dim))
        turned = r.add("Transpose", [flat], r.type(x).with_shape(batch * heads, dim, total), perm=(0, 2, 1))
        first = r.add("Shape", [x], TensorType("i64", (1,)), start=0, end=1)
        up = r.add("Concat", [first, r.ints(heads, dim), size], TensorType("i64", (4,)), axis=0)
        r.replace(node, r.add("Reshape", [turned, up], node.outputs[0].type))


def _masked(r: Respelling) -> list[tuple[Node, str, str]]:
    """The Adds of the mask: node, scores, mask."""
    made = r.graph.producers
    return [(n, *n.inputs) for n in r.some("Add") if n.inputs[1] in made and made[n.inputs[1]].op == "onnx.Where"]


def mask_by_where(r: Respelling) -> None:
    """Where(seen, scores, -inf) instead of adding; half of them with the condition turned round."""
    for node, scores, mask in _masked(r):
        seen, type_ = r.graph.producers[mask].inputs[0], node.outputs[0].type
        number = r.number(-1e30)
        if r.rng.random() < 0.5:
            hidden = r.add("Not", [seen], r.type(seen))
            r.replace(node, r.add("Where", [hidden, number, scores], type_))
        else:
            r.replace(node, r.add("Where", [seen, scores, number], type_))


def softmax_without_nan(r: Respelling) -> None:
    for node in r.some("Softmax"):
        type_ = node.outputs[0].type
        copy = r.add("Softmax", [node.inputs[0]], type_, axis=-1)
        nan = r.add("IsNaN", [copy], type_.with_dtype("bool"))
        r.replace(node, r.add("Where", [nan, r.number(0.0), copy], type_))


def sigmoid_by_exp(r: Respelling) -> None:
    for node in r.some("Sigmoid"):
        x, type_ = node.inputs[0], node.outputs[0].type
        reader = r.only_reader(node.output)
        assert reader is not None
        e = r.add("Exp", [r.add("Neg", [x], type_)], type_)
        r.replace(reader, r.add("Div", [x, r.add("Add", [e, r.number(1.0)], type_)], type_))


def frequencies_by_matmul(r: Respelling) -> None:
    """Angles as an outer product, [1, half, 1] @ [batch, 1, sequence] turned round, as in Hugging Face's own code; times 1.0."""
    for node in r.some("Mul"):
        if not node.inputs[1].endswith("inv_freq"):
            continue
        type_ = node.outputs[0].type
        batch, seq, half = type_.shape
        row = r.add("Unsqueeze", ["position_ids", r.ints(1)], TensorType("i64", (batch, 1, seq)))
        row = r.add("Cast", [row], TensorType("f32", (batch, 1, seq)), to="f32")
        column = r.editor.constant(
            "inv_freq_column", Inline(r.graph.constants[node.inputs[1]].data.array.reshape(1, half, 1))
        )  # type: ignore[union-attr]
        outer = r.add("MatMul", [column, row], TensorType("f32", (batch, half, seq)))
        turned = r.add("Transpose", [outer], type_, perm=(0, 2, 1))
        r.replace(node, r.add("Mul", [turned, r.number(1.0)], type_))


def tables_of_angles(r: Respelling) -> None:
    """cos and sin looked up in tables by position, as in genai's caches."""
    for op, fn in (("Cos", np.cos), ("Sin", np.sin)):
        for node in [n for n in r.graph.nodes if n.op == f"onnx.{op}"]:
            inv_freq = r.graph.constants["model.rotary_emb.inv_freq"].data.array  # type: ignore[union-attr]
            angles = np.arange(200, dtype=np.float32)[:, None] * inv_freq
            angles = np.concatenate([angles, angles], axis=1) if node.outputs[0].type.rank == 4 else angles
            table = r.editor.constant(f"{op}_table", Inline(fn(angles).astype(np.float32)))
            type_ = node.outputs[0].type
            flat = type_ if type_.rank == 3 else type_.with_shape(type_.shape[0], *type_.shape[2:])
            rows = r.add("Gather", [table, "position_ids"], flat, axis=0)
            r.replace(node, rows if type_.rank == 3 else r.add("Unsqueeze", [rows, r.ints(1)], type_))


def rope_by_halves(r: Respelling) -> None:
    """x1 * cos - x2 * sin and x2 * cos + x1 * sin, joined."""
    for node in r.some("Add"):
        a, b = (r.graph.producers.get(i) for i in node.inputs)
        turned = r.graph.producers.get(b.inputs[0]) if b is not None and b.op == "onnx.Mul" else None
        if a is None or b is None or turned is None or turned.op != "onnx.Concat":
            continue
        x, cos, sin = a.inputs[0], a.inputs[1], b.inputs[1]
        type_, half = r.type(x), r.type(x).shape[-1] // 2  # type: ignore[operator]
        part = type_.with_shape(*type_.shape[:-1], half)

        def cut(v: str, i: int) -> str:
            t = r.type(v)
            return r.add(
                "Slice", [v, r.ints(i * half), r.ints((i + 1) * half), r.ints(3)], t.with_shape(*t.shape[:-1], half)
            )

        c, s, one, two = cut(cos, 0), cut(sin, 0), cut(x, 0), cut(x, 1)
        first = r.add("Sub", [r.add("Mul", [one, c], part), r.add("Mul", [two, s], part)], part)
        second = r.add("Add", [r.add("Mul", [two, c], part), r.add("Mul", [one, s], part)], part)
        r.replace(node, r.add("Concat", [first, second], type_, axis=-1))


def shuffled(graph: Graph, rng: np.random.Generator) -> Graph:
    """The nodes in another topological order, under other names."""
    producer = {v.name: n for n in graph.nodes for v in n.outputs}
    waiting, done, order = list(graph.nodes), set(), []
    while waiting:
        ready = [n for n in waiting if all(i not in producer or i in done for i in n.inputs)]
        node = ready[int(rng.integers(len(ready)))]
        order.append(node)
        done.update(v.name for v in node.outputs)
        waiting = [n for n in waiting if n is not node]
    names = {v.name: f"val_{i}" for i, n in enumerate(order) for v in n.outputs if v.name not in graph.outputs}
    from ir.graph import rename

    return rename(replace(graph, nodes=tuple(order)), names)


SPELLINGS: dict[str, Callable[[Respelling], None]] = {
    f.__name__: f
    for f in (
        swapped_operands,
        identities,
        reciprocal,
        power,
        division,
        square,
        weight_order,
        computed_shapes,
        expanded_by_shape,
        scale_on_both,
        scale_on_queries,
        scale_by_division,
        keys_through_three_axes,
        mask_by_where,
        softmax_without_nan,
        sigmoid_by_exp,
        frequencies_by_matmul,
        tables_of_angles,
        rope_by_halves,
    )
}


def respell(graph: Graph, name: str, seed: int, share: float = 1.0) -> Graph:
    r = Respelling(graph, np.random.default_rng(seed), share)
    SPELLINGS[name](r)
    return r.finish()

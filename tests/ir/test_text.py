"""The textual form: what is printed parses back to an equal graph; what is malformed is refused with its line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ir.constants import Cast, Concat, FileSlice, Inline, Slice, Transpose
from ir.errors import GraphError
from ir.graph import Constant, Graph, Node, Value
from ir.text import parse, read, to_text
from ir.types import DTYPES, Sym, TensorType, sym

# Without shrinking, which takes minutes for graphs: the failing graph is printed as it is.
PROFILE = settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])

# What exporters put into names: slashes, colons, dots, spaces, quotes, and anything printable.
NAME = st.one_of(
    st.from_regex(r"[A-Za-z_/][A-Za-z0-9_./:-]{0,12}", fullmatch=True),
    st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=8),
)
DIM = st.one_of(
    st.integers(0, 9),
    st.builds(
        lambda c, n: Sym(c, tuple(sorted(n))),
        st.integers(1, 4),
        st.lists(st.sampled_from("BST"), min_size=1, max_size=2),
    ),
)
TYPE = st.builds(TensorType, st.sampled_from(sorted(DTYPES)), st.lists(DIM, max_size=3).map(tuple))
SCALAR = st.one_of(
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False, width=64),
    st.booleans(),
    st.none(),
    st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126), max_size=6),
    DIM,
)
ATTR = st.one_of(SCALAR, st.lists(SCALAR, max_size=3).map(tuple))
ORIGIN = st.from_regex(r"[A-Za-z/][A-Za-z0-9_./]{0,10}", fullmatch=True)


@st.composite
def data(draw, depth: int = 2):
    kind = draw(
        st.sampled_from(
            ["inline", "file"] if depth == 0 else ["inline", "file", "concat", "transpose", "cast", "slice"]
        )
    )
    if kind == "inline":
        dtype = draw(st.sampled_from(["f32", "f16", "bf16", "i64", "bool", "f64", "u8"]))
        shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
        values = np.random.default_rng(draw(st.integers(0, 50))).normal(size=shape) * 4
        return Inline(values.astype(DTYPES[dtype].numpy))
    if kind == "file":
        offset = draw(st.one_of(st.none(), st.integers(0, 2**40)))
        return FileSlice(
            draw(st.sampled_from(["model.safetensors", "a b.bin"])),
            draw(NAME),
            "bf16",
            (draw(st.integers(1, 9)), 4),
            offset,
        )
    part = draw(data(depth - 1))
    rank = len(part.shape)
    if kind == "cast" or rank == 0:
        return Cast(part, draw(st.sampled_from(["f32", "bf16"])))
    axis = draw(st.integers(0, rank - 1))
    if kind == "concat":
        return Concat((part, part), axis)
    if kind == "slice":
        return Slice(part, axis, 0, part.shape[axis])
    return Transpose(part, tuple(draw(st.permutations(range(rank)))))


@st.composite
def graphs(draw, depth: int = 1):
    names = draw(st.lists(NAME, min_size=3, max_size=9, unique=True))
    inputs = tuple(Value(n, draw(TYPE)) for n in names[:1])
    constants = {}
    for n in names[1:3]:
        d = draw(data())
        constants[n] = Constant(Value(n, TensorType(d.dtype, tuple(d.shape))), d)
    nodes, known = [], names[:3]
    for n in names[3:]:
        operands = tuple(draw(st.lists(st.sampled_from([*known, ""]), max_size=3)))
        attrs = draw(
            st.dictionaries(
                st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True).filter(lambda k: k not in ("inf", "nan")),
                ATTR,
                max_size=3,
            )
        )
        if depth and draw(st.booleans()):
            attrs["body"] = draw(graphs(depth - 1))
        op = draw(st.sampled_from(["linear", "onnx.MatMul", "infini.rms_norm", "onnx.com.microsoft.Thing"]))
        nodes.append(Node(op, operands, (Value(n, draw(TYPE)),), attrs, tuple(draw(st.lists(ORIGIN, max_size=2)))))
        known = [*known, n]
    meta = draw(
        st.dictionaries(
            st.sampled_from(["opset", "passes"]),
            st.one_of(st.integers(), st.lists(st.text(max_size=4), max_size=2)),
            max_size=2,
        )
    )
    return Graph(
        draw(NAME),
        draw(st.sampled_from(["onnx", "model", "fused", "infini"])),
        inputs,
        (names[-1],),
        constants,
        tuple(nodes),
        meta,
    )


@PROFILE
@given(graphs())
def test_round_trip(graph):
    text = to_text(graph)
    assert parse(text) == graph
    assert to_text(parse(text)) == text


@pytest.mark.parametrize(
    "value",
    [
        float("inf"),
        float("-inf"),
        1e-300,
        -0.0,
        9.999999974752427e-07,
        "a, b) // c",
        "it's",
        'say "x"',
        "",
        (),
        ((1, 2), ("a",)),
        sym("S") * 3,
    ],
)
def test_awkward_attributes(value):
    node = Node("linear", (), (Value("y", TensorType("f32", (sym("S"),))),), {"a": value, "b": 1})
    graph = Graph("g", "model", (), ("y",), {}, (node,))
    assert parse(to_text(graph)) == graph


def test_inline_arrays_as_attributes():
    node = Node(
        "linear", (), (Value("y", TensorType("f32", ())),), {"table": Inline(np.array([1.5, float("inf")], np.float32))}
    )
    graph = Graph("g", "model", (), ("y",), {}, (node,))
    assert parse(to_text(graph)) == graph


GOOD = """graph g @model {
  input %x: f32[S, 4]
  const %w: f32[4] = inline(f32[4], 1.0, 2.0, 3.0, 4.0)
  %y: f32[S, 4] = rms_norm(%x, %w) {epsilon=1e-06}  // /a/b
  output %y
}
"""


def test_a_graph_to_read():
    assert to_text(parse(GOOD)) == GOOD


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("input %x: f32[S, 4]", "input %x f32[S, 4]", "line 2: expected :"),
        ("f32[S, 4]", "f31[S, 4]", "line 2"),
        ("{epsilon=1e-06}", "{epsilon=}", "line 4"),
        ("  output %y\n}\n", "  output %y\n", "ends inside a graph"),
        ("inline(f32[4]", "outline(f32[4]", "line 3"),
        ("graph g @model {", "graph g model {", "line 1: expected @"),
        ("}\n", "}\nmore\n", "line 7: expected the end of the file"),
        ("rms_norm(%x", "rms_norm(x", "line 4"),
    ],
)
def test_what_is_malformed(old, new, message):
    assert old in GOOD
    with pytest.raises(GraphError) as caught:
        parse(GOOD.replace(old, new, 1))
    assert message in str(caught.value)


def test_files(tmp_path):
    (tmp_path / "g.ir").write_text(GOOD)
    assert read(tmp_path / "g.ir") == parse(GOOD)
    with pytest.raises(GraphError, match="none.ir: cannot be read"):
        read(tmp_path / "none.ir")
    (tmp_path / "bad.ir").write_text("graph")
    with pytest.raises(GraphError, match="bad.ir: line 1"):
        read(tmp_path / "bad.ir")

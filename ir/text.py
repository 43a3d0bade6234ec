"""The textual form of a graph: one line per value, prints and parses back to an equal graph.

graph tiny @fused {
  meta {"opset": 23}
  input %ids: i32[T]
  const %w: bf16[96, 40] = file("model.safetensors", "model.norm.weight", bf16[96, 40], 1024)
  %y: f32[T, 96] = linear(%x, %w)  // /model/layers.0/self_attn/q_proj/MatMul
  output %y
}
"""

from __future__ import annotations

import ast
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ir.constants import Cast, Concat, ConstData, FileSlice, Inline, Slice, Transpose
from ir.errors import GraphError
from ir.graph import Constant, Graph, Node, Value
from ir.types import DTYPES, Sym, TensorType, parse_dim

_SHORT = 16  # an inline constant of at most this many elements is written as numbers, else as base64


def to_text(graph: Graph) -> str:
    """The graph as text; a nested graph (a loop's body) is an indented block."""
    return "\n".join(_lines(graph, "")) + "\n"


def _lines(graph: Graph, indent: str) -> Iterator[str]:
    title = graph.name if re.fullmatch(r"[A-Za-z_][\w.\-]*", graph.name) else json.dumps(graph.name)
    yield f"{indent}graph {title} @{graph.stage} {{"
    inner = indent + "  "
    if graph.meta:
        yield f"{inner}meta {json.dumps(graph.meta, ensure_ascii=True, sort_keys=True)}"
    for value in graph.inputs:
        yield f"{inner}input {_value(value)}"
    for constant in graph.constants.values():
        yield f"{inner}const {_value(constant.value)} = {_data(constant.data)}"
    for node in graph.nodes:
        yield from _node_lines(node, inner)
    for name in graph.outputs:
        yield f"{inner}output %{_name(name)}"
    yield f"{indent}}}"


def _node_lines(node: Node, indent: str) -> Iterator[str]:
    left = ", ".join(_value(v) for v in node.outputs)
    plain = {k: v for k, v in node.attrs.items() if not isinstance(v, Graph)}
    nested = {k: v for k, v in node.attrs.items() if isinstance(v, Graph)}
    text = f"{indent}{left}{' = ' if left else ''}{node.op}({', '.join('%' + _name(i) if i else '_' for i in node.inputs)})"
    if plain:
        text += " {" + ", ".join(f"{k}={_attr(v)}" for k, v in sorted(plain.items())) + "}"
    if node.origin:
        text += "  // " + " ; ".join(node.origin)
    yield text
    for key, body in sorted(nested.items()):
        yield f"{indent}  {key}:"
        yield from _lines(body, indent + "  ")


def _name(name: str) -> str:
    return name if re.fullmatch(r"[\w./:\-]*[\w./\-]", name) else json.dumps(name)


def _value(value: Value) -> str:
    return f"%{_name(value.name)}: {value.type}" if value.name else "_"


def _attr(value: Any) -> str:
    if isinstance(value, Sym):
        return f"<{value}>"
    if isinstance(value, (tuple, list)):
        return "(" + "".join(_attr(v) + ", " for v in value).rstrip() + ")" if value else "()"
    if isinstance(value, Inline):
        return _data(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, np.generic):
        return repr(value.item())
    raise GraphError(f"attribute value {value!r} has no textual form")


def _data(data: ConstData) -> str:
    type_ = str(TensorType(data.dtype, tuple(data.shape)))
    if isinstance(data, FileSlice):
        return f"file({json.dumps(data.file)}, {json.dumps(data.name)}, {type_}, {data.offset})"
    if isinstance(data, Concat):
        return f"concat({data.axis}, {', '.join(map(_data, data.parts))})"
    if isinstance(data, Transpose):
        return f"transpose({', '.join(map(str, data.perm))}, {_data(data.part)})"
    if isinstance(data, Cast):
        return f"cast({data.dtype}, {_data(data.part)})"
    if isinstance(data, Slice):
        return f"slice({data.axis}, {data.start}, {data.stop}, {_data(data.part)})"
    if data.array.size <= _SHORT:
        return f"inline({type_}, {', '.join(repr(v) for v in data.array.astype(object).reshape(-1).tolist())})"
    return f'inline({type_}, base64 "{base64.b64encode(data.array.tobytes()).decode()}")'


_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<sym><[^<>]*>)
    |(?P<number>-?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|inf|nan)(?![\w.]))
    |(?P<value>%(?:[\w./:\-]*[\w./\-]|"(?:[^"\\]|\\.)*"))
    |(?P<word>[A-Za-z_][\w.\-]*)
    |(?P<mark>[()\[\]{},:=*@]))""",
    re.VERBOSE,
)


class _Line:
    """The tokens of one line."""

    def __init__(self, text: str, number: int) -> None:
        self.text, self.number, self.at = text, number, 0

    def fail(self, expected: str) -> GraphError:
        return GraphError(f"line {self.number}: expected {expected} at {self.text[self.at : self.at + 30]!r}")

    def peek(self) -> tuple[str, str] | None:
        match = _TOKEN.match(self.text, self.at)
        return (match.lastgroup or "", match.group(match.lastgroup or 0)) if match else None

    def take(self, *wanted: str) -> str:
        """The next token, which must be one of these marks or words, or of these kinds (``value``, ``number``, ``string``, ``word``, ``sym``)."""
        match = _TOKEN.match(self.text, self.at)
        if match and match.lastgroup and (match.lastgroup in wanted or match.group(match.lastgroup) in wanted):
            self.at = match.end()
            return match.group(match.lastgroup)
        raise self.fail(" or ".join(wanted))

    def skip(self, mark: str) -> bool:
        token = self.peek()
        if token and token[1] == mark:
            self.take(mark)
            return True
        return False

    def rest(self) -> str:
        return self.text[self.at :].strip()

    def end(self) -> None:
        if self.rest():
            raise self.fail("the end of the line")

    def value_name(self) -> str:
        if self.skip("_"):
            return ""
        text = self.take("value")[1:]
        return json.loads(text) if text.startswith('"') else text

    def type(self) -> TensorType:
        dtype = self.take("word")
        if dtype not in DTYPES:
            raise GraphError(f"line {self.number}: unknown element type {dtype}")
        self.take("[")
        dims = []
        while not self.skip("]"):
            text = self.take("number", "word")
            while self.skip("*"):
                text += "*" + self.take("number", "word")
            dims.append(parse_dim(text))
            self.skip(",")
        return TensorType(dtype, tuple(dims))

    def typed_value(self) -> Value:
        name = self.value_name()
        if not name:
            return Value("", TensorType("f32", ()))
        self.take(":")
        return Value(name, self.type())

    def data(self) -> ConstData:
        kind = self.take("file", "concat", "transpose", "cast", "slice", "inline")
        self.take("(")
        data = getattr(self, "_" + kind)()
        self.take(")")
        return data

    def integer(self) -> int:
        return int(self.take("number"))

    def _file(self) -> ConstData:
        file = json.loads(self.take("string"))
        self.take(",")
        name = json.loads(self.take("string"))
        self.take(",")
        type_ = self.type()
        self.take(",")
        offset = None if self.skip("None") else self.integer()
        return FileSlice(file, name, type_.dtype, _static(type_), offset)

    def _concat(self) -> ConstData:
        axis, parts = self.integer(), []
        while self.skip(","):
            parts.append(self.data())
        return Concat(tuple(parts), axis)

    def _transpose(self) -> ConstData:
        perm = [self.integer()]
        while True:
            self.take(",")
            token = self.peek()
            if not token or token[0] != "number":
                return Transpose(self.data(), tuple(perm))
            perm.append(self.integer())

    def _cast(self) -> ConstData:
        dtype = self.take("word")
        self.take(",")
        return Cast(self.data(), dtype)

    def _slice(self) -> ConstData:
        numbers = []
        for _ in range(3):
            numbers.append(self.integer())
            self.take(",")
        return Slice(self.data(), *numbers)

    def _inline(self) -> ConstData:
        type_ = self.type()
        shape, dtype = _static(type_), DTYPES[type_.dtype].numpy
        numbers: list[Any] = []
        while self.skip(","):
            if self.skip("base64"):
                raw = base64.b64decode(json.loads(self.take("string")))
                return Inline(np.frombuffer(raw, dtype).reshape(shape))
            text = self.take("number", "True", "False")
            numbers.append(
                {"True": True, "False": False}.get(text)
                if text in ("True", "False")
                else float(text)
                if DTYPES[type_.dtype].is_float
                else int(text)
            )
        return Inline(np.array(numbers, dtype).reshape(shape))

    def attr(self) -> Any:
        token = self.peek()
        if token is None:
            raise self.fail("an attribute value")
        kind, text = token
        if kind == "sym":
            self.take("sym")
            return parse_dim(text[1:-1])
        if kind == "word" and text == "inline":
            return self.data()
        if text == "(":
            self.take("(")
            items = []
            while not self.skip(")"):
                items.append(self.attr())
                self.skip(",")
            return tuple(items)
        self.take("string", "number", "None", "True", "False")
        return float(text) if text.lstrip("-") in ("inf", "nan") else ast.literal_eval(text)


def _static(type_: TensorType) -> tuple[int, ...]:
    dims = tuple(d for d in type_.shape if isinstance(d, int))
    if len(dims) != type_.rank:
        raise GraphError(f"a constant's shape must be numbers, not {type_}")
    return dims


def parse(text: str) -> Graph:
    """The graph that ``to_text`` printed.

    Raises:
        GraphError: names the line and what was expected there.
    """
    lines = [_Line(t, i) for i, t in enumerate(text.splitlines(), 1) if t.strip()]
    position, graph = _parse_graph(lines, 0)
    if position != len(lines):
        raise lines[position].fail("the end of the file")
    return graph


def read(path: Path) -> Graph:
    """Parse a .ir file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GraphError(f"{path}: cannot be read: {error}") from None
    try:
        return parse(text)
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from None


def _parse_graph(lines: list[_Line], i: int) -> tuple[int, Graph]:
    def line() -> _Line:
        if i >= len(lines):
            raise GraphError(f"line {lines[-1].number if lines else 1}: the text ends inside a graph")
        return lines[i]

    head = line()
    head.take("graph")
    name = head.take("word", "string")
    name = json.loads(name) if name.startswith('"') else name
    head.take("@")
    stage = head.take("word")
    head.take("{")
    head.end()
    i += 1
    meta: dict[str, Any] = {}
    inputs: list[Value] = []
    outputs: list[str] = []
    constants: dict[str, Constant] = {}
    nodes: list[Node] = []
    while True:
        here = line()
        token = here.peek()
        if token is None:
            raise here.fail("a line of the graph")
        if token[1] == "}":
            here.take("}")
            here.end()
            return i + 1, Graph(name, stage, tuple(inputs), tuple(outputs), constants, tuple(nodes), meta)
        if token[1] == "meta":
            here.take("meta")
            meta = json.loads(here.rest())
        elif token[1] == "input":
            here.take("input")
            inputs.append(here.typed_value())
            here.end()
        elif token[1] == "const":
            here.take("const")
            value = here.typed_value()
            here.take("=")
            constants[value.name] = Constant(value, here.data())
            here.end()
        elif token[1] == "output":
            here.take("output")
            outputs.append(here.value_name())
            here.end()
        elif token[0] == "word" and re.fullmatch(r"\s*\w+:\s*", here.text):
            key = here.take("word")
            i, body = _parse_graph(lines, i + 1)
            last = nodes.pop()
            nodes.append(Node(last.op, last.inputs, last.outputs, {**last.attrs, key: body}, last.origin))
            continue
        else:
            nodes.append(_parse_node(here))
        i += 1


def _parse_node(line: _Line) -> Node:
    text, _, comment = _split_comment(line.text)
    line.text = text
    outputs = []
    if (line.peek() or ("", ""))[0] == "value" or (line.peek() or ("", ""))[1] == "_":
        while True:
            outputs.append(line.typed_value())
            if not line.skip(","):
                break
        line.take("=")
    op = line.take("word")
    line.take("(")
    operands = []
    while not line.skip(")"):
        operands.append(line.value_name())
        line.skip(",")
    attrs = {}
    if line.skip("{"):
        while not line.skip("}"):
            key = line.take("word")
            line.take("=")
            attrs[key] = line.attr()
            line.skip(",")
    line.end()
    origin = tuple(o.strip() for o in comment.split(" ; ")) if comment.strip() else ()
    return Node(op, tuple(operands), tuple(outputs), attrs, origin)


_QUOTED = re.compile(r"""(?:[^"'/]|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|/)*?(?=  // |$)""")


def _split_comment(text: str) -> tuple[str, str, str]:
    """Split at the first ``  // `` outside of quotes."""
    match = _QUOTED.match(text)
    if match is None or match.end() == len(text):
        return text, "", ""
    return text[: match.end()], "//", text[match.end() + 5 :]

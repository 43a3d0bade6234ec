"""From "fused" to "infini": every fused op becomes the best sequence of InfiniCore calls that the target has.

``FORMS`` is the whole of it: per fused op, its forms in order of preference, each with the InfiniCore ops that it needs. The first form whose needs the
target's record meets is taken; why the earlier ones were not is recorded in ``meta["legalised"]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ir.errors import UnsupportedError
from ir.graph import Graph, GraphEditor, Node, Value
from ir.optable import with_defaults
from ir.types import Dim, Sym, TensorType, sym
from passes.targets import Target


@dataclass(frozen=True)
class Form:
    """One way to compute a fused op: the InfiniCore ops that it needs, and the function that writes it."""

    name: str
    needs: tuple[str, ...]
    lower: Callable[["Lowering", Node], None]


class Lowering:
    """A fused graph on its way to InfiniCore calls."""

    def __init__(self, graph: Graph, target: Target, max_positions: int) -> None:
        self.graph = graph
        self.target = target
        self.edit = GraphEditor(replace(graph, nodes=(), outputs=()))
        self.done: set[str] = set()  # results of fused nodes that were lowered together with an earlier one
        self.max_positions = max_positions
        self.dtype = activation_dtype(graph)
        self._tables: dict[tuple, tuple[str, ...]] = {}

    def call(self, op: str, inputs: list[str], hint: str, node: Node, **attrs) -> str:
        return self.calls(op, inputs, [hint], node, **attrs)[0]

    def calls(self, op: str, inputs: list[str], hints: list[str], node: Node, **attrs) -> tuple[str, ...]:
        """Append a node that stands for (a part of) a fused one."""
        return self.edit.add(op, [self.edit.resolve(i) for i in inputs], hints, attrs, origin=node.origin)

    def put(self, node: Node, *results: str) -> None:
        """These values are the fused node's results."""
        for old, new in zip(node.outputs, results, strict=True):
            if old.name != new:
                self.edit.replace(old.name, new)
            self.done.add(old.name)

    def type(self, name: str) -> TensorType:
        return self.edit.type(self.edit.resolve(name))

    def rope_tables(self, node: Node, inv_freq: str, attention_factor: float) -> tuple[str, str]:
        key = (inv_freq, attention_factor)
        if key not in self._tables:
            attrs = dict(positions=self.max_positions, dtype=self.dtype, attention_factor=attention_factor)
            self._tables[key] = self.calls("setup.rope_table", [inv_freq], ["sin_table", "cos_table"], node, **attrs)
        sin, cos = self._tables[key]
        return sin, cos


def activation_dtype(graph: Graph) -> str:
    """The dtype of the residual stream: what the embedding gives."""
    for node in graph.nodes:
        if node.op == "embedding":
            return node.outputs[0].type.dtype
    raise UnsupportedError(f"{graph.name}: there is no embedding in it")


def short(node: Node, i: int = 0) -> str:
    """A result's name without its layer number: ``q.3`` -> ``q``. Layers become one loop, so their values share names."""
    return (
        node.outputs[i].name.rsplit(".", 1)[0]
        if node.outputs[i].name.rsplit(".", 1)[-1].isdigit()
        else node.outputs[i].name
    )


# --- the forms ------------------------------------------------------------------------------------------------------------------------------------


def _rows(op: str) -> Callable[[Lowering, Node], None]:
    def lower(low: Lowering, node: Node) -> None:
        low.put(node, low.call(op, list(node.inputs), node.output, node))

    return lower


def _linear(low: Lowering, node: Node) -> None:
    if len(node.inputs) > 2 and node.inputs[2]:
        raise UnsupportedError(f"{low.graph.name}: {node.output} has a bias, which no legal form takes yet")
    weight = low.call("view.permute", [node.inputs[1]], node.inputs[1] + ".t", node, perm=(1, 0))
    role = node.inputs[1].split(".")[0]
    scale = {"attn_o": "scale_o", "ffn_down": "scale_down", "output_embd": "scale_output"}.get(role, "")
    if node.inputs[1] in ("input_embd",) and node.output == low.graph.outputs[0]:
        scale = "scale_output"  # tied: the head reads the embedding table
    low.put(node, low.call("infini.gemm", [node.inputs[0], weight], node.output, node, scale=scale))


def _rename_to(op: str, *keep: str) -> Callable[[Lowering, Node], None]:
    def lower(low: Lowering, node: Node) -> None:
        attrs = {k: v for k, v in with_defaults(node.op, node.attrs).items() if k in keep}
        low.put(node, *low.calls(op, list(node.inputs), [v.name for v in node.outputs], node, **attrs))

    return lower


def _residual_first(low: Lowering, node: Node) -> list[str]:
    """The operands of a residual sum, the stream before the branch that joins it: the sum then takes the stream's place in memory."""
    a, b, *rest = node.inputs
    producer = low.graph.producers.get(a)
    return [b, a, *rest] if producer is not None and producer.op == "linear" else [a, b, *rest]


def _add_rms_norm(low: Lowering, node: Node) -> None:
    hints = [v.name for v in node.outputs]
    low.put(
        node, *low.calls("infini.add_rms_norm", _residual_first(low, node), hints, node, epsilon=node.attrs["epsilon"])
    )


def _add(low: Lowering, node: Node) -> None:
    low.put(node, low.call("infini.add", _residual_first(low, node), node.output, node))


def _add_then_norm(low: Lowering, node: Node) -> None:
    a, b, w = _residual_first(low, node)
    total = low.call("infini.add", [a, b], node.outputs[1].name, node)
    y = low.call("infini.rms_norm", [total, w], node.outputs[0].name, node, epsilon=node.attrs["epsilon"])
    low.put(node, y, total)


def _silu_mul(low: Lowering, node: Node) -> None:
    up, gate = node.inputs
    act = low.call("infini.silu", [gate], node.output + "_gate", node)
    low.put(node, low.call("infini.mul", [act, up], node.output, node))


def _split(low: Lowering, node: Node) -> None:
    start, results = 0, []
    for value, size in zip(node.outputs, node.attrs["sizes"]):
        results.append(
            low.call("view.slice", [node.inputs[0]], value.name, node, axis=node.attrs["axis"], start=start, size=size)
        )
        start += size
    low.put(node, *results)


def _reshape(low: Lowering, node: Node) -> None:
    low.put(node, low.call("view.reshape", [node.inputs[0]], node.output, node, shape=node.attrs["shape"]))


def _rope(low: Lowering, node: Node) -> None:
    _rotate(low, [node], [node.inputs[0]], node.inputs[1], node.inputs[2])


def _norm_rope(low: Lowering, node: Node) -> None:
    """Norms of q and k, then ONE rope call over both: their results are laid side by side. The second of a pair is done with the first."""
    if node.output in low.done:
        return
    pair = [node] + [n for n in _partners(low.graph, node)]
    normed = []
    for n in pair:
        normed.append(
            low.call("infini.rms_norm", [n.inputs[0], n.inputs[1]], short(n) + "_norm", n, epsilon=n.attrs["epsilon"])
        )
    _rotate(low, pair, normed, node.inputs[2], node.inputs[3])


def _partners(graph: Graph, node: Node) -> list[Node]:
    """The other norm_rope that feeds the same attention and whose rope is the same; empty if there is none."""
    for attention in graph.consumers[node.output]:
        if attention.op == "attention_cached" and attention.inputs[0] == node.output:
            other = graph.producers.get(attention.inputs[1])
            if other is None or other.op != "norm_rope" or other.inputs[2:] != node.inputs[2:]:
                continue
            if all(other.attrs.get(k) == node.attrs.get(k) for k in ("attention_factor", "interleaved")):
                # The other's operand must be there already: both come from one merged linear.
                return [other] if graph.nodes.index(other) > graph.nodes.index(node) else []
    return []


def _rotate(low: Lowering, nodes: list[Node], values: list[str], positions: str, inv_freq: str) -> None:
    attrs = with_defaults(nodes[0].op, nodes[0].attrs)
    sin, cos = low.rope_tables(nodes[0], inv_freq, attrs["attention_factor"])
    joined = values[0]
    if len(values) > 1:
        joined = low.call("view.join", values, joint_name(nodes) + "_norm", nodes[0], axis=1)
    hint = joint_name(nodes) if len(nodes) > 1 else nodes[0].output
    rotated = low.call("infini.rope", [joined, positions, sin, cos], hint, nodes[0], interleaved=attrs["interleaved"])
    if len(nodes) == 1:
        low.put(nodes[0], rotated)
        return
    start: Dim = 0
    for node in nodes:
        heads = static(node.outputs[0].type.shape[1])
        low.put(node, low.call("view.slice", [rotated], node.output, node, axis=1, start=start, size=heads))
        start = static(start) + heads


def joint_name(nodes: list[Node]) -> str:
    """A name for results that are computed together: ``q_rope`` and ``k_rope`` -> ``qk_rope``."""
    names = [short(n) for n in nodes]
    rests = {n[1:] for n in names}
    return "".join(n[0] for n in names) + rests.pop() if len(rests) == 1 else "_".join(names)


def static(dim: Dim) -> int:
    """A dimension that is a number at compile time."""
    if not isinstance(dim, int):
        raise UnsupportedError(f"a size that must be known when compiling is {dim}")
    return dim


def _paged(low: Lowering, node: Node) -> None:
    q, k, v, k_cache, v_cache, lens, starts = node.inputs
    groups, dim = low.type(k).shape[1:]
    cache = TensorType(low.dtype, (sym("B"), groups, low.target.block_size, dim))
    requests = low.graph.type(lens).shape[0]
    extra = {
        "slots": TensorType("i64", low.graph.type(q).shape[:1]),
        "block_tables": TensorType("i32", (requests, sym("M"))),
        "seq_lens": TensorType("i32", (requests,)),
        "cu_lens": TensorType("i32", (sym("R1"),)),
    }
    for name, type_ in extra.items():
        _input(low, name, type_)
    for name in (k_cache, v_cache):
        _retype_input(low, name, cache)
    k_new, v_new = low.calls(
        "infini.paged_caching", [k_cache, v_cache, k, v, "slots"], [v.name for v in node.outputs[1:]], node
    )
    attrs = dict(scale=node.attrs["scale"])
    out = low.call(
        "infini.paged_attention_ragged",
        [q, k_new, v_new, "block_tables", "seq_lens", "cu_lens"],
        node.output,
        node,
        **attrs,
    )
    low.put(node, out, k_new, v_new)


def _contiguous(low: Lowering, node: Node) -> None:
    q, k, v = (low.type(name) for name in node.inputs[:3])
    bodies = {
        name: request_body(name, q, k, node.attrs["scale"], length)
        for name, length in (("prefill", sym("len")), ("decode", 1))
    }
    low.put(node, *low.calls("loop.requests", list(node.inputs), [v.name for v in node.outputs], node, **bodies))


def request_body(name: str, q: TensorType, k: TensorType, scale: float, length: Dim) -> Graph:
    """Attention of one request on a contiguous cache [G, cap, D], as gemm, causal_softmax, gemm; query heads of one kv head are one matrix.

    A single token's rows lie as the gemm wants them already, so decode needs no copies but those into the cache.
    """
    heads, dim = map(static, q.shape[1:])
    groups = static(k.shape[1])
    dtype = q.dtype
    cache = TensorType(dtype, (groups, sym("cap"), dim))
    inputs = (
        Value("q", q.with_shape(length, heads, dim)),
        Value("k", k.with_shape(length, groups, dim)),
        Value("v", k.with_shape(length, groups, dim)),
        Value("k_cache", cache),
        Value("v_cache", cache),
    )
    edit = GraphEditor(Graph(name, "infini", inputs, (), {}, ()))

    def add(op: str, operands: list[str], hint: str, **attrs) -> str:
        return edit.add(op, operands, [hint], attrs)[0]

    def append(into: str, x: str) -> str:
        rows = add("view.permute", [x], x + "_heads", perm=(1, 0, 2))
        return add("infini.rearrange_into", [into, rows], into + "_new", axis=1, start=sym("pos"))

    total, ratio = sym("total"), heads // groups
    k_new, v_new = append("k_cache", "k"), append("v_cache", "v")
    keys = add("view.slice", [k_new], "keys", axis=1, start=0, size=total)
    values = add("view.slice", [v_new], "values", axis=1, start=0, size=total)
    keys_t = add("view.permute", [keys], "keys_t", perm=(0, 2, 1))
    if length == 1:
        q_heads = add("view.reshape", ["q"], "q_heads", shape=(groups, ratio, dim))
    else:
        q_rows = add("view.permute", ["q"], "q_rows", perm=(1, 0, 2))
        q_packed = add("infini.rearrange", [q_rows], "q_packed")
        q_heads = add("view.reshape", [q_packed], "q_heads", shape=(groups, ratio * length, dim))
    scores = add("infini.gemm", [q_heads, keys_t], "scores", alpha=scale)
    rows = add("view.reshape", [scores], "score_rows", shape=(heads, length, total))
    probs = add("infini.causal_softmax", [rows], "probs")
    weights = add("view.reshape", [probs], "weights", shape=(groups, ratio * length, total))
    mixed = add("infini.gemm", [weights, values], "mixed")
    if length == 1:
        out = add("view.reshape", [mixed], "out", shape=(1, heads, dim))
    else:
        by_head = add("view.reshape", [mixed], "mixed_heads", shape=(heads, length, dim))
        by_token = add("view.permute", [by_head], "mixed_tokens", perm=(1, 0, 2))
        out = add("infini.rearrange", [by_token], "out")
    edit.outputs = [out, k_new, v_new]
    return edit.finish()


def _input(low: Lowering, name: str, type_: TensorType) -> None:
    if not any(v.name == name for v in low.edit.inputs):
        low.edit.add_input(name, type_)


def _retype_input(low: Lowering, name: str, type_: TensorType) -> None:
    low.edit.inputs = [Value(v.name, type_) if v.name == name else v for v in low.edit.inputs]
    low.edit.set_type(name, type_)


FORMS: dict[str, tuple[Form, ...]] = {
    "embedding": (
        Form("embedding", ("embedding",), _rows("infini.embedding")),
        Form("one copy per token", (), _rows("infini.copy_rows")),
    ),
    "gather_rows": (
        Form("embedding", ("embedding",), _rows("infini.gather_rows")),
        Form("one copy per row", (), _rows("infini.copy_chosen_rows")),
    ),
    "linear": (Form("gemm", ("gemm",), _linear),),
    "rms_norm": (Form("rms_norm", ("rms_norm",), _rename_to("infini.rms_norm", "epsilon")),),
    "add": (Form("add", ("add",), _add),),
    "mul": (Form("mul", ("mul",), _rename_to("infini.mul")),),
    "silu": (Form("silu", ("silu",), _rename_to("infini.silu")),),
    "add_rms_norm": (
        Form("add_rms_norm", ("add_rms_norm",), _add_rms_norm),
        Form("add, rms_norm", ("add", "rms_norm"), _add_then_norm),
    ),
    "swiglu": (Form("swiglu", ("swiglu",), _rename_to("infini.swiglu")), Form("silu, mul", ("silu", "mul"), _silu_mul)),
    "rope": (Form("rope", ("rope",), _rope),),
    "norm_rope": (Form("rms_norm, rope", ("rms_norm", "rope"), _norm_rope),),
    "attention_cached": (
        Form("paged", ("paged_caching", "paged_attention", "paged_attention_prefill"), _paged),
        Form("contiguous", ("gemm", "causal_softmax", "rearrange"), _contiguous),
    ),
    "split": (Form("views", (), _split),),
    "reshape": (Form("view", (), _reshape),),
}


def legalise(graph: Graph, target: Target, *, kv: str = "auto", max_positions: int) -> Graph:
    """Lower a fused graph (weights named by role) to calls that ``target`` has.

    Args:
        kv: ``paged`` or ``contiguous`` to insist on one form of attention, ``auto`` for the best that is legal.
        max_positions: rows of the rope tables.

    Raises:
        UnsupportedError: no form of an op is legal; names target, op, dtype and the reasons.
    """
    low = Lowering(graph, target, max_positions)
    chosen: dict[str, tuple[Form, str]] = {}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op not in chosen:
            chosen[node.op] = _choose(low, node, kv)
        counts[node.op] = counts.get(node.op, 0) + 1
        chosen[node.op][0].lower(low, node)
    record = [[op, form.name, why, counts[op]] for op, (form, why) in chosen.items()]
    meta = {**graph.meta, "legalised": record, "kv": chosen["attention_cached"][0].name}
    low.edit.outputs = list(graph.outputs)
    result = low.edit.finish(stage="infini", meta=meta)
    read = {i for n in result.nodes for i in n.inputs}
    # lens and starts go where the paged form reads block tables instead.
    return replace(result, inputs=tuple(v for v in result.inputs if v.name in read or v.name in result.outputs))


def _choose(low: Lowering, node: Node, kv: str) -> tuple[Form, str]:
    reasons = []
    for form in FORMS.get(node.op, ()):
        if node.op == "attention_cached" and kv not in ("auto", form.name):
            reasons.append(f"{form.name}: not asked for")
            continue
        refusals = [low.target.refusal(op, low.dtype, _head_dim(node)) for op in form.needs]
        refusals = [r for r in refusals if r]
        if not refusals:
            return form, "; ".join(reasons)
        reasons.append(f"{form.name}: {refusals[0]}")
    what = "; ".join(reasons) or "the op has no form"
    raise UnsupportedError(f"target {low.target.name}: {node.op} in {low.dtype} cannot be compiled ({what})")


def _head_dim(node: Node) -> int | None:
    dim = node.outputs[0].type.shape[-1] if node.op == "attention_cached" else None
    return None if isinstance(dim, Sym) else dim

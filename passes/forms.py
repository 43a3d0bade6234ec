"""Forms of what works on every token by itself: rows, linears, norms, rotary embeddings, views."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ir.errors import UnsupportedError
from ir.graph import Graph, Node
from ir.optable import with_defaults
from passes.lowering import Lowering, short


def rows(op: str, index: int, *calls: str) -> Callable[[Lowering, Node], None]:
    """Rows chosen by operand ``index``, by these InfiniCore ops."""

    def lower(low: Lowering, node: Node) -> None:
        if calls:
            low.index_input(node.inputs[index], *calls)
        low.put(node, low.call(op, list(node.inputs), node.output, node))

    return lower


def indices(*ops: str) -> Callable[[Lowering, Sequence[Node]], str]:
    """The refusal of a form whose ops take indices."""
    return lambda low, nodes: low.index_refusal(*ops)


def no_factor(low: Lowering, nodes: Sequence[Node]) -> str:
    """The refusal of plain products where gemm takes no factor of 1."""
    alphas = low.support("gemm").alphas
    return "" if not alphas or (1, 0) in alphas else f"gemm on {low.target.name} takes no factor 1"


def linear(low: Lowering, node: Node) -> None:
    if len(node.inputs) > 2 and node.inputs[2]:
        raise UnsupportedError(f"{low.graph.name}: {node.output} has a bias, which no legal form takes yet")
    weight = low.call("view.permute", [node.inputs[1]], node.inputs[1] + ".t", node, perm=(1, 0))
    role = node.inputs[1].split(".")[0]
    scale = {"attn_o": "scale_o", "ffn_down": "scale_down", "output_embd": "scale_output"}.get(role, "")
    if node.inputs[1] in ("input_embd",) and node.output == low.graph.outputs[0]:
        scale = "scale_output"  # tied: the head reads the embedding table
    low.put(node, low.call("infini.gemm", [node.inputs[0], weight], node.output, node, scale=scale))


def rename_to(op: str, *keep: str) -> Callable[[Lowering, Node], None]:
    def lower(low: Lowering, node: Node) -> None:
        attrs = {k: v for k, v in with_defaults(node.op, node.attrs).items() if k in keep}
        low.put(node, *low.calls(op, list(node.inputs), [v.name for v in node.outputs], node, **attrs))

    return lower


def _residual_first(low: Lowering, node: Node) -> list[str]:
    """The operands of a residual sum, the stream before the branch that joins it: the sum then takes the stream's place in memory."""
    a, b, *rest = node.inputs
    producer = low.graph.producers.get(a)
    return [b, a, *rest] if producer is not None and producer.op in ("linear", "all_reduce") else [a, b, *rest]


def add_rms_norm(low: Lowering, node: Node) -> None:
    hints = [v.name for v in node.outputs]
    low.put(
        node, *low.calls("infini.add_rms_norm", _residual_first(low, node), hints, node, epsilon=node.attrs["epsilon"])
    )


def add(low: Lowering, node: Node) -> None:
    low.put(node, low.call("infini.add", _residual_first(low, node), node.output, node))


def add_then_norm(low: Lowering, node: Node) -> None:
    a, b, w = _residual_first(low, node)
    total = low.call("infini.add", [a, b], node.outputs[1].name, node)
    y = low.call("infini.rms_norm", [total, w], node.outputs[0].name, node, epsilon=node.attrs["epsilon"])
    low.put(node, y, total)


def silu_mul(low: Lowering, node: Node) -> None:
    up, gate = node.inputs
    act = low.call("infini.silu", [gate], node.output + "_gate", node)
    low.put(node, low.call("infini.mul", [act, up], node.output, node))


def swiglu(low: Lowering, node: Node) -> None:
    multiple = low.support("swiglu").last_multiple
    if multiple and not isinstance(node.outputs[0].type.shape[-1], int):
        low.meta["inner_multiple"] = multiple  # a device's part is only known when the engine runs
    rename_to("infini.swiglu")(low, node)


def split(low: Lowering, node: Node) -> None:
    low.put(
        node,
        *low.slices(node, node.inputs[0], node.attrs["axis"], [v.name for v in node.outputs], node.attrs["sizes"]),
    )


def reshape(low: Lowering, node: Node) -> None:
    low.put(node, low.call("view.reshape", [node.inputs[0]], node.output, node, shape=node.attrs["shape"]))


def rope(low: Lowering, node: Node) -> None:
    _rotate(low, [node], [node.inputs[0]], node.inputs[1], node.inputs[2])


def norm_rope(low: Lowering, node: Node) -> None:
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
    low.index_input(positions, "rope")
    factor = attrs["attention_factor"] * low.rope_factors.get(nodes[0].output, 1.0)
    sin, cos = low.rope_tables(nodes[0], inv_freq, factor)
    joined = values[0]
    if len(values) > 1:
        joined = low.call("view.join", values, joint_name(nodes) + "_norm", nodes[0], axis=1)
    hint = joint_name(nodes) if len(nodes) > 1 else nodes[0].output
    rotated = low.call("infini.rope", [joined, positions, sin, cos], hint, nodes[0], interleaved=attrs["interleaved"])
    if len(nodes) == 1:
        low.put(nodes[0], rotated)
        return
    heads = [node.outputs[0].type.shape[1] for node in nodes]
    for node, part in zip(nodes, low.slices(nodes[0], rotated, 1, [n.output for n in nodes], heads)):
        low.put(node, part)


def joint_name(nodes: list[Node]) -> str:
    """A name for results that are computed together: ``q_rope`` and ``k_rope`` -> ``qk_rope``."""
    names = [short(n) for n in nodes]
    rests = {n[1:] for n in names}
    return "".join(n[0] for n in names) + rests.pop() if len(rests) == 1 else "_".join(names)

"""Raising attention: the core by its shape (scores, softmax, values), everything around it by evaluation.

- How query, key and value reach the products (transpositions, repeated heads, scales on either side) is told from where a counting array ends up.
- The mask is run on sample inputs: is what it hides exactly the future, and the keys where attention_mask is 0? If not, the answer says what differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ir.graph import Graph, GraphEditor, Node
from ir.types import Dim, Sym
from passes.evaluate import SHAPED, Interface, Sample, Subgraph, between, counting, interface
from passes.match import Const, Match, Op, Or, Pattern, Rule, Var, apply, cast, scalar
from passes.raise_ops import transpose

_MOVES = {
    "onnx.Reshape",
    "onnx.Transpose",
    "onnx.Unsqueeze",
    "onnx.Squeeze",
    "onnx.Expand",
    "onnx.Cast",
    "onnx.Tile",
    "onnx.Identity",
}
_HIDDEN = -1e4  # a score this low or lower is never seen; exporters use -10000, the smallest number of a dtype, or -inf


@dataclass(frozen=True)
class Operand:
    """Where an operand of the core comes from: ``value`` is [B, heads, N, D], and the core sees it times ``scale``."""

    value: str
    scale: float


class Masks:
    """Finds out what mask values hide, once per value."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.roles: Interface = interface(graph)
        self._known: dict[tuple[str, str, bool], bool | str] = {}

    def uses_padding(self, mask: str, form: str, causal: bool) -> bool | str:
        """Whether the mask reads attention_mask, given that it is causal; else what is wrong with it.

        Args:
            form: ``add`` (numbers added to scores), ``keep`` (true where a key is seen) or ``drop`` (true where it is not).
            causal: the op hides the future by itself.
        """
        key = (mask, form, causal)
        if key not in self._known:
            self._known[key] = self._find(mask, form, causal)
        return self._known[key]

    def _find(self, mask: str, form: str, causal: bool) -> bool | str:
        sub = Subgraph(self.graph, [mask])
        if sub.unknown_constant:
            return f"mask {mask} depends on weight {sub.unknown_constant}"
        padded = self._reads_padding(sub)
        kv = bool(self.roles.pasts)
        rng = np.random.default_rng(7)
        for batch, new, past in _sizes(kv):
            hidden = _padding(rng, batch, past + new) if padded else np.ones((batch, past + new), np.int64)
            positions = past + np.broadcast_to(np.arange(new), (batch, new))
            sample = Sample(batch, new, past, hidden, positions)
            results = sub.run(sample.arrays(sub.graph, self.roles), float64=False)
            if results is None:
                if past + new > 1000:
                    continue  # a table in the graph ends before; it was proven up to there
                return f"mask {mask} cannot be evaluated on a sample (batch {batch}, {new} new tokens, {past} past)"
            wrong = _compare(results[0], form, causal, sample)
            if wrong:
                return f"mask {mask} is not causal: {wrong}"
        return padded

    def _reads_padding(self, sub: Subgraph) -> bool:
        """Does the mask depend on what attention_mask holds, and not on its length only?"""
        if not self.roles.mask or self.roles.mask not in sub.inputs:
            return False
        positions, results = np.arange(6)[None], []
        for hidden in (np.ones((1, 6), np.int64), np.eye(1, 6, dtype=np.int64)):
            results.append(sub.run(Sample(1, 6, 0, hidden, positions).arrays(sub.graph, self.roles)))
        one, other = results
        return one is None or other is None or not np.array_equal(one[0], other[0])


def _sizes(kv: bool) -> list[tuple[int, int, int]]:
    """Batch, new and past tokens of the samples. Single requests, which have no padding, come first: a prompt, and steps far behind a long past, where windows
    show. Then batches with padding."""
    batches = [(2, 5, 0), (3, 7, 0)]
    return [(1, 67, 0), (1, 2, 131072), *batches, (2, 1, 9), (3, 4, 6)] if kv else [(1, 1, 0), (1, 4200, 0), *batches]


def _padding(rng: np.random.Generator, batch: int, total: int) -> np.ndarray:
    """Masks with padding on the left, on the right, or with holes; one request without any."""
    mask = np.ones((batch, total), np.int64)
    if batch > 1:
        mask[1, : total // 3] = 0
    if batch > 2:
        mask[2] = rng.integers(0, 2, total)
        mask[2, 0] = 1
    return mask


def _compare(found: np.ndarray, form: str, causal: bool, sample: Sample) -> str:
    """What a mask does other than hiding the future and the padding; "" where nothing."""
    total = sample.past + sample.new
    rows, columns = np.arange(sample.new)[:, None] + sample.past, np.arange(total)[None, :]
    future = columns > rows
    try:
        found = np.broadcast_to(found, (sample.batch, *np.broadcast_shapes(found.shape, (1, 1, sample.new, total))[1:]))
    except ValueError:
        return f"its shape is {list(found.shape)}, the scores are [.., .., {sample.new}, {total}]"
    if form == "add":
        seen = found > _HIDDEN
        if np.count_nonzero(found) != seen.size - np.count_nonzero(
            seen
        ):  # zero where seen, so that the rest is what is hidden
            return f"it adds {found[seen & (found != 0)].flat[0]:g} to some scores (a position bias)"
    else:
        seen = (found != 0) if form == "keep" else (found == 0)
    seen = seen & ~future if causal else seen
    wanted = ~future & (sample.mask != 0)[:, None, None, :]
    # A query that sees nothing (padding before the first token) may give anything.
    wrong = (seen != wanted) & wanted.any(axis=-1, keepdims=True)
    if not wrong.any():
        return ""
    b, _, i, j = (int(x) for x in np.argwhere(wrong)[0])
    verb = "hidden from" if wanted[b, 0, i, j] else "shown to"
    where = f"with {sample.past} past and {sample.new} new tokens, the key at {j} (attention_mask {int(sample.mask[b, j])}) is {verb} the query at {sample.past + i}"
    if verb == "hidden from" and sample.mask.all():
        row = wrong[b, 0, i]
        first = int(np.argmin(row)) if row[0] else 0
        if row[:first].all() and not row[first:].any():
            return f"{where}: a sliding window of {sample.past + i + 1 - first}"
    return where


class Operands:
    """Follows the chains of data movement before the core; equal chains of different layers are looked at once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._known: dict[tuple, tuple[int, float] | None] = {}

    def find(self, end: str, kind: str, heads: int) -> Operand | None:
        """The deepest [B, heads, N, D] value behind ``end``.

        Args:
            kind: ``same`` (the core takes [B, heads, N, D]), ``repeated`` (each head as often as ``heads`` asks) or ``transposed`` (repeated, last axes swapped).
            heads: query heads.
        """
        chain, key = self._chain(end)
        signature = (*key, kind, heads)
        if signature not in self._known:
            self._known[signature] = self._deepest(chain, kind, heads)
        found = self._known[signature]
        return Operand(chain[found[0]], found[1]) if found else None

    def _chain(self, end: str) -> tuple[list[str], list]:
        """The values behind ``end`` through movement and scaling, nearest first; and what makes the chain what it is."""
        graph, names, key = self.graph, [end], [str(self.graph.type(end))]
        while (node := graph.producers.get(names[-1])) is not None:
            data = _data_operand(graph, node)
            if data is None:
                break
            others = tuple(i for i in node.inputs if i != data)
            if any(i not in graph.constants for i in others) and node.op not in SHAPED:
                break
            others = tuple(i if i in graph.constants else str(node.outputs[0].type) for i in others)
            names.append(data)
            key += [node.op, repr(others), repr(sorted(node.attrs.items())), str(graph.type(data))]
        return names, key

    def _deepest(self, chain: list[str], kind: str, heads: int) -> tuple[int, float] | None:
        for i in reversed(range(len(chain))):
            scale = self._scale(chain[i], chain[0], kind, heads)
            if scale is not None:
                return i, scale
        return None

    def _scale(self, base: str, end: str, kind: str, heads: int) -> float | None:
        """The number between an array's expected place and what the chain makes of it; None where it is not one number."""
        shape = self.graph.type(base).shape
        if len(shape) != 4 or not isinstance(shape[1], int) or heads % shape[1]:
            return None
        sample = counting(self.graph, base)
        found = sample if base == end else between(self.graph, base, end, sample)
        wanted = sample if kind == "same" else np.repeat(sample, heads // shape[1], axis=1)
        wanted = wanted.swapaxes(-1, -2) if kind == "transposed" else wanted
        if found is None or found.shape != wanted.shape:
            return None
        ratio = found / wanted
        scale = float(ratio.flat[0])
        return scale if np.allclose(ratio, scale, rtol=1e-12, atol=0) else None


def _data_operand(graph: Graph, node: Node) -> str | None:
    if node.op in _MOVES:
        return node.inputs[0]
    if node.op in ("onnx.Mul", "onnx.Div"):
        a, b = node.inputs
        if scalar(graph, b) is not None:
            return a
        return b if node.op == "onnx.Mul" and scalar(graph, a) is not None else None
    return None


class _Attention(Rule):
    required = True

    def __init__(self, graph: Graph) -> None:
        self.masks = Masks(graph)
        self.operands = Operands(graph)

    def _past(self, match: Match, name: str) -> str | None:
        """Split a cached operand into past and new; returns a reason where it is neither cached nor new."""
        value = match.facts[name]
        node = match.graph.producers.get(value)
        if node is None or node.op != "onnx.Concat":
            match.facts[f"past_{name}"], match.facts[f"new_{name}"] = "", value
            return None
        axis = node.attrs["axis"] % 4
        if len(node.inputs) != 2 or axis != 2 or node.inputs[0] not in self.masks.roles.pasts:
            return f"{value} joins {', '.join(node.inputs)} on axis {axis}, expected a cache input and new {name} on axis 2"
        match.facts[f"past_{name}"], match.facts[f"new_{name}"] = node.inputs
        return None

    def _mask(self, match: Match, mask: str, form: str, causal: bool) -> str | None:
        if not mask:
            match.facts["padding"] = False
            return None if causal else "there is no mask: every query sees every key"
        padding = self.masks.uses_padding(mask, form, causal)
        if isinstance(padding, str):
            return padding
        match.facts["padding"] = padding
        return None

    def _fits(self, match: Match) -> str | None:
        """The two caches belong together, and the mask is as long as past and new keys."""
        facts, graph = match.facts, match.graph
        if bool(facts["past_k"]) != bool(facts["past_v"]):
            return "keys and values are not both cached"
        q, k, v = (graph.type(facts[n]) for n in ("q", "new_k", "new_v"))
        if k != v or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
            return f"query, key and value do not fit: {q}, {k}, {v}"
        return None

    def _emit(self, match: Match, editor: GraphEditor) -> tuple[str, str, str]:
        """attention of facts q, new_k, new_v, past_k, past_v; returns o [B, S, H, D] and the present keys and values."""
        facts, graph, roles = match.facts, match.graph, self.masks.roles
        q, k, v = (transpose(editor, facts[n]) for n in ("q", "new_k", "new_v"))
        operands = [q, k, v]
        attrs: dict = {"scale": facts["scale"]}
        if facts["past_k"]:
            attrs["total"] = _total(graph, roles, facts["total"])
        mask = roles.mask if facts["padding"] else ""
        operands += [facts["past_k"], facts["past_v"], mask]
        while operands and not operands[-1]:
            operands.pop()
        o, keys, values = editor.add(
            "attention",
            operands,
            [f"{match.output}.o", f"{match.output}.keys", f"{match.output}.values"],
            attrs,
            origin=match.origin,
        )
        return o, keys, values


def _total(graph: Graph, roles: Interface, present: Dim | None) -> Dim | None:
    return graph.type(roles.mask).shape[1] if roles.mask else present


class Decomposed(_Attention):
    """softmax(scale * q k^T with a mask) v."""

    name = "attention"

    def pattern(self) -> Pattern:
        scores = cast(Op("MatMul", Var("q"), Var("k"), bind="scores"))
        scaled = Or(Op("Mul|Div", scores, Const("factor", scalar=True), bind="scaling"), scores)
        score = cast(scaled)
        number, mask = Const("number", scalar=True), Var("mask")
        masked = Or(
            Op("Add", score, mask, bind="add"),
            Op("Where", mask, score, number, bind="keep"),
            Op("Where", mask, number, score, bind="drop"),
            score,
        )
        softmax = Op("Softmax", cast(masked), bind="softmax")
        # Some exporters turn rows that see nothing, NaN, into zeros.
        safe = Or(Op("Where", Op("IsNaN", softmax), Const(value=0.0), softmax), softmax)
        return Op("MatMul", cast(safe), Var("v"), bind="product")

    def check(self, match: Match) -> str | None:
        graph, facts = match.graph, match.facts
        rank = graph.type(match.bound["softmax"].output).rank
        if rank != 4 or match.bound["softmax"].attrs.get("axis", -1) not in (-1, rank - 1):
            return f"the scores are {graph.type(match.bound['softmax'].output)}, softmax over axis {match.bound['softmax'].attrs.get('axis', -1)}"
        heads = graph.type(match.bound["scores"].output).shape[1]
        if not isinstance(heads, int):
            return f"the number of heads is {heads}"
        scale = 1.0
        if "scaling" in match.bound:
            factor = match.number("factor")
            scale = factor if match.bound["scaling"].op == "onnx.Mul" else 1.0 / factor
        for name, kind in (("q", "same"), ("k", "transposed"), ("v", "repeated")):
            found = self.operands.find(match[name], kind, heads)
            if found is None:
                return f"{match[name]} is not {name} [B, heads, N, D] with whole groups of {heads} heads{' and its last axes swapped' if name == 'k' else ''}"
            facts[name] = found.value
            if name == "v" and found.scale != 1:
                return f"the values are multiplied by {found.scale}"
            scale *= found.scale
        facts["scale"] = _one_scale(scale, graph.type(facts["q"]).shape[-1])
        form = next((f for f in ("add", "keep", "drop") if f in match.bound), "")
        if form in ("keep", "drop") and match.number("number") > _HIDDEN:
            return f"what is masked gets the score {match.number('number')}"
        wrong = self._past(match, "k") or self._past(match, "v") or self._fits(match)
        facts["total"] = graph.type(facts["k"]).shape[2]
        return wrong or self._mask(match, match["mask"] if form else "", form, False)

    def rewrite(self, match: Match, editor: GraphEditor) -> dict[str, str]:
        o, keys, values = self._emit(match, editor)
        return {match.output: transpose(editor, o, hint=match.output), **_presents(match, keys, values)}


def _presents(match: Match, keys: str, values: str) -> dict[str, str]:
    """The joined keys and values are the op's own results; where there is no cache they are just what the op reads."""
    facts = match.facts
    return {facts[n]: present for n, present in (("k", keys), ("v", values)) if facts[f"past_{n}"]}


def _one_scale(scale: float, head_dim: Dim) -> float:
    """A scale as one float32, which engines take. What several rounded factors make of 1 / sqrt(head_dim) is meant to be that."""
    usual = float(head_dim) ** -0.5 if isinstance(head_dim, int) else 0.0
    return float(np.float32(usual if abs(scale - usual) < 2.0**-22 * usual else scale))


class Attention(_Attention):
    """The op of opset 23: heads grouped by itself, past and present of its own."""

    name = "attention"

    def pattern(self) -> Pattern:
        return Op("Attention", Var("q"), Var("k"), Var("v"), bind="op", more=True)

    def check(self, match: Match) -> str | None:
        graph, facts, node = match.graph, match.facts, match.bound["op"]
        attrs = node.attrs
        odd = [k for k in ("softcap", "qk_matmul_output_mode") if attrs.get(k)]
        odd += [k for k in ("left_window_size", "right_window_size") if attrs.get(k, -1) != -1]
        if odd or len(node.inputs) > 6 or len(node.outputs) > 3:
            return f"it has {odd[0] if odd else 'operands or results that are not supported'}"
        mask, past_k, past_v = (*node.inputs[3:], "", "", "")[:3]
        heads = attrs.get("q_num_heads") if match.type("q").rank == 3 else match.type("q").shape[1]
        facts["flat"] = match.type("q").rank == 3
        if not isinstance(heads, int):
            return f"the number of heads is {heads}"
        scale = attrs.get("scale")
        for name in ("q", "k", "v"):
            facts[name] = match[name]
            if facts["flat"]:
                continue
            own = graph.type(match[name]).shape[1]
            found = (
                self.operands.find(match[name], "repeated", own if isinstance(own, int) else 0)
                if isinstance(own, int)
                else None
            )
            if found is None or found.scale != 1:
                return f"{match[name]} is not {name} [B, heads, N, D]"
            facts[name] = found.value
        width = match.type("q").shape[-1]
        if scale is None:
            scale = (width // heads if facts["flat"] else width) ** -0.5
        facts["scale"] = _one_scale(scale, width // heads if facts["flat"] else width)
        if past_k:
            facts.update(past_k=past_k, past_v=past_v, new_k=facts["k"], new_v=facts["v"])
            facts["total"] = graph.type(node.outputs[1].name).shape[2] if len(node.outputs) > 1 else None
        else:
            wrong = self._past(match, "k") or self._past(match, "v")
            if wrong:
                return wrong
            facts["total"] = graph.type(facts["k"]).shape[2] if not facts["flat"] else None
        causal = bool(attrs.get("is_causal"))
        if causal and not past_k and facts["past_k"]:
            return "is_causal with keys joined outside of the op means different things in different runtimes"
        if not isinstance(_total(graph, self.masks.roles, facts["total"]), Sym) and facts["past_k"]:
            return "the length of past and new keys together has no name"
        form = "keep" if mask and graph.type(mask).dtype == "bool" else "add"
        return (None if facts["flat"] else self._fits(match)) or self._mask(match, mask, form, causal)

    def rewrite(self, match: Match, editor: GraphEditor) -> dict[str, str]:
        facts, node = match.facts, match.bound["op"]
        if facts["flat"]:
            shape = match.type("q").shape
            for name, heads in (("q", "q_num_heads"), ("new_k", "kv_num_heads"), ("new_v", "kv_num_heads")):
                type_, count = match.graph.type(facts[name]), node.attrs[heads]
                split = (*type_.shape[:2], count, type_.shape[2] // count)
                facts[name] = transpose(
                    editor, editor.add("reshape", [facts[name]], [f"{facts[name]}.heads"], {"shape": split})[0]
                )
        o, keys, values = self._emit(match, editor)
        y = (
            editor.add("reshape", [o], [match.output], {"shape": shape})[0]
            if facts["flat"]
            else transpose(editor, o, hint=match.output)
        )
        changes = {match.output: y}
        if len(node.inputs) < 5:
            changes.update(_presents(match, keys, values))
        changes.update({old.name: new for old, new in zip(node.outputs[1:], (keys, values))})
        return changes


def raise_attention(graph: Graph) -> tuple[Graph, int]:
    """Raise attention whose mask is proven to be causal; any other is an UnsupportedError that says what differs."""
    return apply(graph, attention_rules(graph))


def attention_rules(graph: Graph) -> list[Rule]:
    return [Decomposed(graph), Attention(graph)]

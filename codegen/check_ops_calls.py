"""The operators that a build's engine creates, with shapes, strides and dtypes, for a few representative steps.

The engine's graph has symbolic sizes; a step binds them. Operands are described as the emitted C++ describes them: places of the memory plan, weights in both
layouts that an engine takes, paged attention as its two operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from codegen.calls import CALLS, CallSpec, is_operand
from codegen.emit import LINEAR_ROLES
from ir.errors import ConfigError
from ir.graph import Graph, Node
from ir.ops_infini import IN_PLACE
from ir.optable import with_defaults
from ir.types import Dim, bind
from passes.plan import Place, Plan, contiguous_strides, plan_memory

BLOCK = 16  # where the graph has no paged cache to read it from
LONG = 2049  # tokens before a decode step that makes rows long; no whole number of blocks
ROW_COPIES = {
    "infini.copy_rows": CallSpec("MemcpyAsync", ("o0", "i0", "i1"), ("o0", "i0", "i1"), False),
    "infini.copy_chosen_rows": CallSpec("MemcpyAsync", ("o0", "i1", "i0"), ("o0", "i1", "i0"), False),
}
# What devices call together: infiniccl's function, its result and its operand. They have no descriptors.
COLLECTIVES = {
    "infini.all_reduce": CallSpec("AllReduce", ("o0", "i0"), ("i0", "o0"), False),
    "infini.all_gather": CallSpec("AllGather", ("o0", "i0"), ("i0", "o0"), False),
}


@dataclass(frozen=True)
class Tensor:
    """An operand: element type, shape, strides in elements, and how many elements it starts after an aligned address."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = field(default=0, compare=False)

    @property
    def span(self) -> int:
        """Elements from the first to the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides))

    def __str__(self) -> str:
        text = f"{self.dtype}[{', '.join(map(str, self.shape))}]"
        dense = all(n == 1 or s == want for n, s, want in zip(self.shape, self.strides, contiguous_strides(self.shape)))
        return text if dense else f"{text}({', '.join(map(str, self.strides))})"


@dataclass(frozen=True)
class OpCall:
    """One operator as the engine creates it.

    Attributes:
        op: its key in codegen.calls.CALLS, ROW_COPIES or COLLECTIVES.
        operands: per operand of the spec, in the order that create takes them.
        attrs: values of the attributes that create and call take; of a collective, the devices that meet (``ndev``).
        in_place: pairs of a result and the operand whose memory it takes.
    """

    op: str
    spec: CallSpec
    operands: tuple[tuple[str, Tensor], ...]
    attrs: tuple[tuple[str, Any], ...]
    in_place: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, operand: str) -> Tensor:
        return dict(self.operands)[operand]

    @property
    def name(self) -> str:
        """The op's name without its stage."""
        return self.op.rsplit(".", 1)[-1]

    @property
    def outputs(self) -> list[str]:
        return [o for o, _ in self.operands if o[0] == "o"]

    @property
    def inputs(self) -> list[str]:
        return [o for o, _ in self.operands if o[0] == "i"]


@dataclass(frozen=True)
class Step:
    """A batch: tokens of this step and tokens in all (with those before it) per request, requests of one token first."""

    name: str
    requests: tuple[tuple[int, int], ...]

    def symbols(self, block: int, context: int) -> dict[str, int]:
        blocks = [-(-total // block) for _, total in self.requests]
        count = len(self.requests)
        return dict(
            T=sum(n for n, _ in self.requests),
            L=count,
            R=count,
            R1=count + 1,
            M=max(blocks),
            B=sum(blocks) + 3,
            C=max(capacity(total, context) for _, total in self.requests),
        )


@dataclass
class Use:
    """An operator and what the engine uses it for: values of the graph, and steps."""

    call: OpCall
    values: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)


def capacity(total: int, context: int) -> int:
    """Tokens that a contiguous cache has room for."""
    return min(context, -(-total // 16) * 16 + 16)


def steps_of(prompt_len: int, context: int, block: int) -> list[Step]:
    """Decoding one request, three and one after many tokens, a short prompt and one of ``prompt_len`` tokens, a mixed batch; nothing exceeds the context.

    Raises:
        ConfigError: the prompt does not fit.
    """
    if not 1 <= prompt_len <= context:
        raise ConfigError(
            f"--prompt-len {prompt_len}: expected 1 to {context}, the context that the engine was built for"
        )

    def fit(tokens: int, before: int) -> tuple[int, int]:
        tokens = min(tokens, context)
        return tokens, min(tokens + before, context)

    decodes = (fit(1, 0), fit(1, block - 1), fit(1, block))
    return [
        Step("decode 1", (fit(1, prompt_len + block),)),
        Step("decode 3", decodes),
        Step("decode long", (fit(1, LONG),)),
        Step("prefill 5", (fit(5, 0),)),
        Step(f"prefill {prompt_len}", (fit(prompt_len, 0),)),
        Step("mixed", (fit(1, block), fit(1, prompt_len), fit(5, block + 1), fit(7, 0))),
    ]


def block_size_of(graph: Graph) -> int:
    """Tokens per block of the paged caches."""
    for value in graph.inputs:
        if value.name.startswith("k_cache") and graph.meta.get("kv") == "paged":
            size = value.type.shape[2]
            return size if isinstance(size, int) else BLOCK
    return BLOCK


def enumerate_calls(
    graph: Graph,
    steps: Sequence[Step],
    *,
    meta: Mapping[str, Any],
    abi: Mapping[str, Any] | None = None,
    shard: Mapping[str, int] | None = None,
    ndev: int = 1,
) -> tuple[list[Use], list[str]]:
    """Every distinct operator that an engine of this graph creates in these steps.

    Args:
        graph: stage "infini", layers rolled or not.
        meta: the manifest's ``meta``: sizes, and factors of gemm's alpha.
        abi: the manifest's argument orders; None: today's.
        shard: values of the symbols that tensor parallelism divides, on one of ``ndev`` devices.

    Returns:
        the operators (with more than one device, collectives too), and the ops of the graph that are no operator of one device.
    """
    plan = plan_memory(graph)
    walk = _Walk(plan, meta, abi or {}, int(meta["dctx"]), ndev)
    block = block_size_of(graph)
    for step in steps:
        walk.step = step
        walk.nodes(graph.nodes, "main", {**step.symbols(block, walk.context), **(shard or {})})
    walk.sample(graph)
    return list(walk.uses.values()), sorted(walk.left_out)


class _Walk:
    def __init__(self, plan: Plan, meta: Mapping[str, Any], abi: Mapping[str, Any], context: int, ndev: int) -> None:
        self.plan, self.meta, self.abi, self.context, self.ndev = plan, meta, abi, context, ndev
        self.step = Step("", ())
        self.uses: dict[OpCall, Use] = {}
        self.left_out: set[str] = set()

    def nodes(self, nodes: Sequence[Node], scope: str, symbols: Mapping[str, int]) -> None:
        for node in nodes:
            if node.op.startswith(("view.", "setup.")):
                continue
            if node.op == "loop.layers":
                body = node.attrs["body"]
                self.nodes(body.nodes, body.name, symbols)
            elif node.op == "loop.requests":
                self.requests(node, symbols)
            elif node.op == "infini.paged_attention_ragged":
                self.paged_attention(node, scope, symbols)
            elif node.op in CALLS or node.op in ROW_COPIES:
                self.add(node, self.call(node, scope, symbols))
            elif node.op in COLLECTIVES and self.ndev > 1:
                self.add(node, self.meet(node, scope, symbols))
            else:
                self.left_out.add(node.op)

    def requests(self, node: Node, symbols: Mapping[str, int]) -> None:
        """The attention of one request at a time."""
        for tokens, total in self.step.requests:
            which = "decode" if tokens == 1 else "prefill"
            own = dict(len=tokens, total=total, pos=total - tokens, cap=capacity(total, self.context))
            own["ld"] = max(total, 2)  # the pitch of scores where rows of one element would look like columns
            self.nodes(node.attrs[which].nodes, which, {**symbols, **own})

    def add(self, node: Node, calls: Iterator[OpCall]) -> None:
        for call in calls:
            use = self.uses.setdefault(call, Use(call))
            for text, texts in ((node.output, use.values), (self.step.name, use.steps)):
                if text not in texts:
                    texts.append(text)

    def call(self, node: Node, scope: str, symbols: Mapping[str, int]) -> Iterator[OpCall]:
        spec = ROW_COPIES.get(node.op) or self.spec(node.op)
        attrs = with_defaults(node.op, node.attrs)
        places = {o: self.place(node, o, scope) for o in spec.operands}
        tensors = {o: tensor(place, symbols) for o, place in places.items()}
        if attrs.get("each"):
            tensors = {
                o: replace(t, shape=t.shape[1:], strides=t.strides[1:]) if len(t.shape) == 3 else t
                for o, t in tensors.items()
            }
        values = self.attributes(spec, attrs)
        shared = tuple(
            (f"o{k}", f"i{i}")
            for k, i in IN_PLACE.get(node.op, {}).items()
            if f"i{i}" in places and _same(places[f"o{k}"], places[f"i{i}"])
        )
        one = OpCall(node.op, spec, tuple(tensors.items()), values)
        yield one
        if shared:
            yield replace(one, in_place=shared)
        weight = places.get("i1")
        if node.op == "infini.gemm" and weight is not None and weight.buffer.split(".")[0] in LINEAR_ROLES:
            # Weights that the person has transposed already: the descriptor says so, the shape stays.
            stored = replace(tensors["i1"], strides=_contiguous(tensors["i1"].shape))
            yield replace(one, operands=tuple({**tensors, "i1": stored}.items()))

    def meet(self, node: Node, scope: str, symbols: Mapping[str, int]) -> Iterator[OpCall]:
        """A sum in place; or parts that go one behind the other, device after device, and the operator that makes rows of them."""
        source = tensor(self.plan.places[scope][node.inputs[0]], symbols)
        attrs = (("ndev", self.ndev),)
        if node.op == "infini.all_reduce":
            operands = (("o0", source), ("i0", source))
            yield OpCall(node.op, COLLECTIVES[node.op], operands, attrs, (("o0", "i0"),))
            return
        shape = (self.ndev, *source.shape)
        operands = (("o0", Tensor(source.dtype, shape, _contiguous(shape))), ("i0", source))
        yield OpCall(node.op, COLLECTIVES[node.op], operands, attrs)
        if symbols["L"] > 1:
            yield self.gather(node, symbols)

    def gather(self, node: Node, symbols: Mapping[str, int]) -> OpCall:
        """Parts of rows, device after device, to whole rows."""
        rows, part = symbols["L"], symbols["V"]
        shape, spec = (rows, self.ndev, part), self.spec("infini.rearrange")
        tensors = {"o0": _contiguous(shape), "i0": (part, rows * part, 1)}
        dtype = node.outputs[0].type.dtype
        operands = tuple((o, Tensor(dtype, shape, tensors[o])) for o in spec.operands)
        return OpCall("infini.rearrange", spec, operands, ())

    def place(self, node: Node, which: str, scope: str) -> Place:
        places = self.plan.places[scope]
        name = node.outputs[int(which[1:])].name if which[0] == "o" else node.inputs[int(which[1:])]
        place = places[name]
        if node.op == "infini.rearrange_into" and which == "o0":  # the slice that is written, not the whole cache
            axis, start = node.attrs["axis"], node.attrs["start"]
            return Place(
                place.buffer, place.offset + (place.strides[axis] * start,), place.strides, places[node.inputs[1]].type
            )
        return place

    def attributes(self, spec: CallSpec, attrs: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        values: dict[str, Any] = {}
        for name in (*spec.create, *spec.call):
            if is_operand(name):
                continue
            if name == "algo":
                values[name] = 0 if attrs["interleaved"] else 1
            elif name == "alpha":
                scale = float(self.meta[attrs["scale"]]) if attrs.get("scale") else 1.0
                values[name] = float(np.float32(attrs["alpha"])) * scale
            elif name == "beta":
                values[name] = 0.0
            elif name == "alibi":
                values[name] = None
            elif name in attrs:
                values[name] = float(np.float32(attrs[name]))
        if "interleaved" in attrs and "algo" not in values:
            values["interleaved"] = attrs["interleaved"]  # InfiniCores before the enum pair neighbours
        return tuple(values.items())

    def spec(self, op: str) -> CallSpec:
        """The op's argument orders in the InfiniCore that the build was made for."""
        spec = CALLS[op]
        orders = self.abi.get("infiniop" + spec.name)
        # Ops of one C function but other operands (embedding, gather_rows) have one order: today's.
        if orders is None or sum(s.name == spec.name for s in CALLS.values()) > 1:
            return spec
        create, call = (tuple(order) for order in orders[:2])
        return replace(spec, create=create, call=call)

    def paged_attention(self, node: Node, scope: str, symbols: Mapping[str, int]) -> None:
        """Requests of one token by one operator, the others by another one; each has its part of q and out."""
        decodes = sum(n == 1 for n, _ in self.step.requests)
        places = self.plan.places[scope]
        q, k, v = (tensor(places[n], symbols) for n in node.inputs[:3])
        out = tensor(places[node.output], symbols)
        tokens, requests, columns = symbols["T"], symbols["R"], symbols["M"]
        parts = (
            ("paged_attention", decodes, decodes, 0),
            ("paged_attention_prefill", tokens - decodes, requests - decodes, decodes),
        )
        index = places[node.inputs[3]].type.dtype
        for op, rows, count, first in parts:
            if not count:
                continue
            spec = self.spec(op)

            def part(whole: Tensor) -> Tensor:
                return replace(whole, shape=(rows, *whole.shape[1:]), offset=whole.offset + first * whole.strides[0])

            tensors = dict(o0=part(out), i0=part(q), i1=k, i2=v)
            tensors["i3"] = Tensor(index, (count, columns), (columns, 1), first * columns)
            tensors["i4"] = Tensor(index, (count,), (1,), first)
            tensors["i5"] = Tensor(index, (count + 1,), (1,))
            operands = tuple((o, tensors[o]) for o in spec.operands)
            call = OpCall(op, spec, operands, self.attributes(spec, node.attrs))
            self.add(node, iter([call]))

    def sample(self, graph: Graph) -> None:
        """One request's choice among its logits."""
        logits = graph.type(graph.outputs[0])
        count = int(self.meta["dvoc"])
        spec = self.spec("random_sample")
        operands = tuple(
            (o, dict(o0=Tensor("i64", (), ()), i0=Tensor(logits.dtype, (count,), (1,)))[o]) for o in spec.operands
        )
        call = OpCall("random_sample", spec, operands, ())
        self.uses[call] = Use(call, ["sampled"], [])


def _same(a: Place, b: Place) -> bool:
    return (a.buffer, a.offset, a.strides) == (b.buffer, b.offset, b.strides)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))


def tensor(place: Place, symbols: Mapping[str, int]) -> Tensor:
    """A place as numbers."""

    def numbers(dims: Sequence[Dim]) -> tuple[int, ...]:
        return tuple(bind(d, symbols) for d in dims)

    return Tensor(place.type.dtype, numbers(place.type.shape), numbers(place.strides), sum(numbers(place.offset)))

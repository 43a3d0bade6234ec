"""From a planned "infini" graph to C++: decides everything that the templates lay out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from codegen import calls, cpp
from codegen.calls import CALLS, CallSpec, is_operand
from codegen.facts import ModelFacts
from codegen.layout import areas, constants, inputs
from codegen.names import layer_count, layer_expression, origin_text, readable, run_index, weight_expression
from codegen.plans import PlanStruct
from ir.errors import UnsupportedError
from ir.graph import Graph, Node
from ir.optable import with_defaults
from ir.types import DTYPES, TensorType, dim_product
from passes.plan import Place, Plan, contiguous_strides
from passes.targets import Target

# What create and call expressions may name, and how the engine finds it.
STEP_LOCALS = (
    "const size_t T = shape.tokens;",
    "const size_t L = shape.rows;",
    "const size_t G = shard.G;",
    "const size_t I = shard.I;",
    "const size_t V = shard.V;",
)
PAGED_LOCALS = (
    "const size_t B = pool_blocks;",
    "const size_t M = shape.blocks;",
    "const size_t ND = shape.decodes;",
    "const size_t NP = shape.requests - shape.decodes;",
)
# Where rows of scores are further apart than they are long (see passes.attention_forms).
PITCH = "const size_t ld = std::max<size_t>(total, 2);"
LINEAR_ROLES = ("attn_qkv", "attn_o", "ffn_gate_up", "ffn_down")


# The ops of targets.json that calls of other names are.
RECORD_NAMES = {"gather_rows": "embedding", "rearrange_into": "rearrange", "paged_attention_ragged": "paged_attention"}
COLLECTIVES = ("infini.all_reduce", "infini.all_gather")


class Emitter:
    """One graph's C++.

    Args:
        specs: the operators' argument orders; codegen.calls.CALLS, or those of an installed InfiniCore.
    """

    def __init__(
        self, graph: Graph, plan: Plan, facts: ModelFacts, target: Target, specs: Mapping[str, CallSpec] = CALLS
    ) -> None:
        self.graph, self.plan, self.facts, self.target, self.specs = graph, plan, facts, target, specs
        self.paged = graph.meta["kv"] == "paged"
        used = {node.op for g in _with_bodies(graph) for node in g.nodes}
        self.collectives = bool(graph.meta.get("shard"))
        self.gathered = "infini.all_gather" in used
        self.capture = self.paged and captures(target, used)
        self.dtype = facts.dtype
        self.elem = DTYPES[facts.dtype].bytes
        step = "const StepShape &shape, const Shard &shard, "
        step += "uint32_t pool_blocks, bool transposed" if self.paged else "bool transposed"
        local = STEP_LOCALS + (PAGED_LOCALS if self.paged else ())
        refusal = target.refusal("random_sample", facts.dtype)
        if refusal:
            raise UnsupportedError(f"target {target.name}: {refusal}; the engine samples with it")
        self.step = PlanStruct("StepPlan", step, list(local))
        self.sample = PlanStruct("SamplePlan", "size_t vocabulary")
        self.sample.member(
            CALLS["random_sample"], "sample", ["TensorDesc(INFINI_DTYPE_I64, {})", "TensorDesc(DT, {vocabulary})"]
        )
        self.bodies: list[dict[str, Any]] = []
        self.body_plans: list[PlanStruct] = []
        self.request_bodies: tuple[Graph, Graph] | None = None
        self.cache_index = "layer"
        self.weights: dict[str, str] = {}  # value in a loop's body -> expression of the weight

    # --- spelling ---------------------------------------------------------------------------------------------------------------------------------

    def dt(self, dtype: str) -> str:
        return "DT" if dtype == self.dtype else f"INFINI_DTYPE_{DTYPES[dtype].infini}"

    def desc(self, place: Place, type_: TensorType | None = None) -> str:
        """A descriptor expression for a place."""
        type_ = type_ or place.type
        shape = ", ".join(cpp.dim(d) for d in type_.shape)
        dense = all(s == want for s, want in zip(place.strides, contiguous_strides(type_.shape)))
        role = place.buffer.split(".")[0]
        if role in LINEAR_ROLES and not dense:
            return f"weightDesc({cpp.dim(type_.shape[1])}, {cpp.dim(type_.shape[0])}, transposed)"
        if dense:
            return f"TensorDesc({self.dt(type_.dtype)}, {{{shape}}})"
        return f"TensorDesc({self.dt(type_.dtype)}, {{{shape}}}, {{{', '.join(cpp.stride(s) for s in place.strides)}}})"

    def pointer(self, place: Place, value: str, scope: str) -> str:
        """An expression for a place's address."""
        buffer = self.plan.buffers.get(place.buffer)
        kind = buffer.kind if buffer else "argument"
        if kind == "scratch":
            base = "s." + cpp.identifier(
                place.buffer.split(".", 1)[1] if scope in ("prefill", "decode") else place.buffer
            )
        elif kind == "weight":
            base = self.weights.get(value) or weight_expression(place.buffer)
        elif kind == "table":
            base = f"rsrc.{place.buffer}->data()"
        elif kind == "cache":
            side = "keys" if place.buffer.startswith("k_cache") else "values"
            base = f"rsrc.kv.{side}({self.layer_of(place.buffer, scope)})"
        elif kind == "input":
            return f"in.{place.buffer}"
        else:
            base = {"k_cache": "keys", "v_cache": "values"}.get(place.buffer, place.buffer)
        offset = cpp.terms(place.offset)
        if not offset:
            return base
        return f"{base} + {offset} * ELEM" if len(place.offset) == 1 else f"{base} + ({offset}) * ELEM"

    def layer_of(self, buffer: str, scope: str) -> str:
        """The layer whose cache a buffer is; in a loop, an expression of its run."""
        return self.cache_index if scope == "layer" else buffer.rsplit(".", 1)[-1]

    # --- calls ------------------------------------------------------------------------------------------------------------------------------------

    def call(self, node: Node, scope: str, struct: PlanStruct) -> list[dict[str, Any]]:
        """A node as what the template prints for it: nothing for views."""
        if node.op.startswith(("view.", "setup.")):
            return []
        if node.op == "infini.paged_attention_ragged":
            return self.paged_attention(node, scope, struct)
        if node.op in ("infini.copy_rows", "infini.copy_chosen_rows"):
            return [self.copy_rows(node, scope)]
        if node.op == "loop.requests":
            return [self.requests(node, scope)]
        if node.op in COLLECTIVES:
            return [self.collective(node, scope, struct)]
        spec = self.specs[node.op]
        attrs = with_defaults(node.op, node.attrs)
        places = {o: self.operand(node, o, scope) for o in spec.operands}
        pointers = {o: self.pointer(place, value, scope) for o, (place, value) in places.items()}
        if attrs.get("scale") == "scale_output" or (
            node.op == "infini.gemm" and places["i1"][0].buffer == "input_embd"
        ):
            # A tied table may have been scaled for the embedding; the head has its own name for it.
            pointers["i1"] = weight_expression("output_embd")
        each = ""
        if attrs.get("each"):  # matrix by matrix along the first axis
            each = cpp.dim(places["o0"][0].type.shape[0])
            pointers = {o: f"{pointers[o]} + i * {cpp.dim(p.strides[0])} * ELEM" for o, (p, _) in places.items()}
            places = {o: (_first_matrix(p), v) for o, (p, v) in places.items()}
        create = self.create_arguments(spec, {o: self.desc(place) for o, (place, _) in places.items()}, attrs)
        member = struct.member(spec, readable(node), create)
        args = [pointers[a] if is_operand(a) else self.call_argument(a, attrs) for a in spec.call]
        return [self.described(node, scope, style="op", member=member, args=args, each=each)]

    def collective(self, node: Node, scope: str, struct: PlanStruct) -> dict[str, Any]:
        places = self.plan.places[scope]
        source, result = places[node.inputs[0]], places[node.output]
        part, whole = self.pointer(source, node.inputs[0], scope), self.pointer(result, node.output, scope)
        if node.op == "infini.all_reduce":
            count = cpp.dim(dim_product(result.type.shape))
            return self.described(node, scope, style="all_reduce", data=whole, count=count)
        create = ["TensorDesc(DT, {L, shard.ndev, V})"]
        create.append(
            "TensorDesc(DT, {L, shard.ndev, V}, {static_cast<ptrdiff_t>(V), static_cast<ptrdiff_t>(L * V), 1})"
        )
        struct.member(self.specs["infini.rearrange"], "gather", create, "shard.ndev > 1 && L > 1")
        return self.described(node, scope, style="all_gather", part=part, whole=whole)

    def create_arguments(self, spec: CallSpec, descs: Mapping[str, str], attrs: Mapping[str, Any]) -> list[str]:
        return [descs[a] if is_operand(a) else self.create_argument(a, attrs) for a in spec.create]

    def operand(self, node: Node, which: str, scope: str) -> tuple[Place, str]:
        places = self.plan.places[scope]
        name = node.outputs[int(which[1:])].name if which[0] == "o" else node.inputs[int(which[1:])]
        place = places[name]
        if node.op == "infini.rearrange_into" and which == "o0":
            # The destination is the slice that is written, not the whole cache.
            axis, start = node.attrs["axis"], node.attrs["start"]
            place = Place(
                place.buffer, place.offset + (place.strides[axis] * start,), place.strides, places[node.inputs[1]].type
            )
        return place, name

    def create_argument(self, name: str, attrs: Mapping[str, Any]) -> str:
        if name == "epsilon":
            return (
                "EPSILON"
                if cpp.float_literal(attrs["epsilon"]) == cpp.float_literal(self.facts.epsilon)
                else cpp.float_literal(attrs["epsilon"])
            )
        if name == "algo":
            return "INFINIOP_ROPE_ALGO_GPT_J" if attrs["interleaved"] else "INFINIOP_ROPE_ALGO_GPT_NEOX"
        if name == "alibi":
            return "infiniopTensorDescriptor_t{nullptr}"
        return cpp.float_literal(attrs[name])

    def call_argument(self, name: str, attrs: Mapping[str, Any]) -> str:
        if name == "alpha":
            factor = "" if attrs["alpha"] == 1.0 and attrs["scale"] else cpp.float_literal(attrs["alpha"])
            return " * ".join(x for x in (factor, f"rsrc.meta.{attrs['scale']}" if attrs["scale"] else "") if x)
        if name == "beta":
            return "0.0f"
        return "nullptr" if name == "alibi" else cpp.float_literal(attrs[name])

    def described(self, node: Node, scope: str, **fields: Any) -> dict[str, Any]:
        shown = dict(
            comment=self.comment(node, scope), origin=origin_text(node.origin), condition="", what=readable(node)
        )
        return {**shown, **fields}

    def comment(self, node: Node, scope: str) -> str:
        """``qkv [T, 100] = gemm(attn_norm_y [T, 40], attn_qkv.t [40, 100])``."""
        places = self.plan.places[scope]
        left = ", ".join(f"{readable(node, i)} {cpp.type_comment(v.type)}" for i, v in enumerate(node.outputs))
        right = ", ".join(f"{n} {cpp.type_comment(places[n].type)}" for n in node.inputs if n)
        return f"{left} = {node.op.split('.', 1)[1]}({right})"

    def paged_attention(self, node: Node, scope: str, struct: PlanStruct) -> list[dict[str, Any]]:
        q, out = self.plan.place(scope, node.inputs[0]), self.plan.place(scope, node.output)
        k, v = (self.plan.place(scope, n) for n in node.inputs[1:3])
        attrs = dict(node.attrs)
        heads = q.type.shape[1:]

        def rows(place: Place, count: str) -> str:
            text = ", ".join([count, *map(cpp.dim, heads)])
            strides = ", ".join(cpp.stride(s) for s in place.strides)
            return f"TensorDesc(DT, {{{text}}}, {{{strides}}})"

        name = readable(node)
        prefill, decode = self.specs["paged_attention_prefill"], self.specs["paged_attention"]
        index = self.dt(self.plan.place(scope, node.inputs[3]).type.dtype)
        caches = {"i1": self.desc(k), "i2": self.desc(v)}

        def descs(count: str, requests: str) -> dict[str, str]:
            tables = {"i3": f"TensorDesc({index}, {{{requests}, M}})", "i4": f"TensorDesc({index}, {{{requests}}})"}
            last = {"i5": f"TensorDesc({index}, {{{requests} + 1}})"}
            return {"o0": rows(out, count), "i0": rows(q, count), **caches, **tables, **last}

        one = struct.member(
            decode, name + "_decode", self.create_arguments(decode, descs("ND", "ND"), attrs), "ND != 0"
        )
        many = struct.member(
            prefill, name + "_prefill", self.create_arguments(prefill, descs("T - ND", "NP"), attrs), "NP != 0"
        )
        base = {
            o: self.pointer(p, n, scope)
            for o, p, n in (
                ("o0", out, node.output),
                ("i0", q, node.inputs[0]),
                ("i1", k, node.inputs[1]),
                ("i2", v, node.inputs[2]),
            )
        }

        def arguments(spec: CallSpec, pointers: dict[str, str]) -> list[str]:
            return [pointers[a] if is_operand(a) else self.call_argument(a, attrs) for a in spec.call]

        decoding = {**base, "i3": "in.block_tables", "i4": "in.seq_lens"}
        first = self.described(node, scope, style="op", member=one, args=arguments(decode, decoding))
        first.update(condition="shape.decodes != 0", comment=first["comment"] + ": requests of one token")
        prefilling = {
            **base,
            "o0": f"{base['o0']} + shape.decodes * {cpp.dim(out.strides[0])} * ELEM",
            "i0": f"{base['i0']} + shape.decodes * {cpp.dim(q.strides[0])} * ELEM",
            "i3": "in.block_tables + size_t{shape.decodes} * shape.blocks",
            "i4": "in.seq_lens + shape.decodes",
            "i5": "in.cu_lens",
        }
        second: dict[str, Any] = dict(
            what=name,
            comment=f"{name}: the other requests",
            origin="",
            style="op",
            member=many,
            args=arguments(prefill, prefilling),
            condition="shape.decodes != shape.requests",
        )
        return [first, second]

    def copy_rows(self, node: Node, scope: str) -> dict[str, Any]:
        index, table = node.inputs if node.op == "infini.copy_rows" else node.inputs[::-1]
        source, target = self.plan.place(scope, table), self.plan.place(scope, node.output)
        width = dim_product(target.type.shape[1:])
        return self.described(
            node,
            scope,
            style="rows",
            what=readable(node),
            count=cpp.dim(target.type.shape[0]),
            source=self.pointer(source, table, scope),
            target=self.pointer(target, node.output, scope),
            index=self.plan.place(scope, index).buffer,
            row_bytes=f"({cpp.dim(width)} * ELEM)",
        )

    def requests(self, node: Node, scope: str) -> dict[str, Any]:
        """The loop over requests, and the two functions that it calls."""
        if self.request_bodies is None:
            self.request_bodies = (node.attrs["decode"], node.attrs["prefill"])
            for which, symbols in (("decode", ("total", "cap")), ("prefill", ("len", "total", "cap"))):
                self.request_function(node.attrs[which], which, symbols)
        elif self.request_bodies != (node.attrs["decode"], node.attrs["prefill"]):
            raise UnsupportedError(
                f"{node.output}: its attention differs from other layers'; contiguous caches take one form"
            )
        fields: dict[str, Any] = {}
        for key, name in (("q", node.inputs[0]), ("k", node.inputs[1]), ("v", node.inputs[2]), ("out", node.output)):
            place = self.plan.place(scope, name)
            fields[key] = self.pointer(place, name, scope)
            fields[key + "_row"] = f"{cpp.dim(place.strides[0])} * ELEM"
        layer = self.layer_of(self.plan.place(scope, node.inputs[3]).buffer, scope)
        return self.described(node, scope, style="requests", layer=layer, **fields)

    def request_function(self, body: Graph, which: str, symbols: tuple[str, ...]) -> None:
        name = which.capitalize()
        struct = PlanStruct(f"{name}Plan", ", ".join(["const Shard &shard", *(f"size_t {s}" for s in symbols)]))
        printed = [c for node in body.nodes for c in self.call(node, which, struct)]
        used = " ".join(" ".join(op.create) for op in struct.ops)
        struct.locals = ["const size_t G = shard.G;"] if _names("G", used) else ["static_cast<void>(shard);"]
        struct.locals += [PITCH] if _names("ld", used) else []
        struct.locals += [f"static_cast<void>({s});" for s in symbols if not _names(s, used)]
        self.body_plans.append(struct)
        spelled = " ".join(" ".join([*c["args"], c["each"]]) for c in printed)
        local = [f"const size_t {s} = request.{s};" for s in ("pos", "len", "total") if _names(s, spelled)]
        if _names("cap", spelled):
            local.append("const size_t cap = request.cache->capacity;")
        if _names("G", spelled):
            local.append("const size_t G = rsrc.shard.G;")
        if _names("ld", spelled):
            local.append(PITCH.replace("total", "request.total"))
        params = "const Request &request, std::byte *q, std::byte *k, std::byte *v, std::byte *keys, std::byte *values, std::byte *out"
        if not any("request." in line for line in local):
            local.append("static_cast<void>(request);")
        if not _names("s", spelled):
            local.append("static_cast<void>(s);")
        comment = (
            "Attention of a request of one token." if which == "decode" else "Attention of a request of several tokens."
        )
        self.bodies.append(
            dict(
                name=f"attend{name}",
                plan=struct.name,
                scratch=f"{name}Scratch",
                params=params,
                locals=local,
                calls=printed,
                comment=comment,
            )
        )

    # --- the program ------------------------------------------------------------------------------------------------------------------------------

    def program(self) -> list[dict[str, Any]]:
        """The main graph as straight stretches and loops."""
        parts: list[dict[str, Any]] = []
        nodes = self.graph.nodes
        # What follows the last collective only makes logits.
        head = max((i + 1 for i, n in enumerate(nodes) if n.op in ("loop.layers", "infini.all_reduce")), default=0)
        for i, node in enumerate(nodes):
            if node.op == "loop.layers":
                body = node.attrs["body"]
                self.loop_weights(node)
                count = layer_count(node.attrs["count"], self.facts)
                parts.append(
                    dict(
                        loop=True,
                        head=False,
                        count=count,
                        calls=[c for n in body.nodes for c in self.call(n, body.name, self.step)],
                    )
                )
                self.weights = {}
            else:
                if not parts or parts[-1]["loop"] or i == head:
                    parts.append(dict(loop=False, head=i == head, calls=[]))
                parts[-1]["calls"] += self.call(node, "main", self.step)
        return parts

    def loop_weights(self, loop: Node) -> None:
        """How a loop's body finds the weight of its run."""
        body, count, carried, per_layer = (loop.attrs[k] for k in ("body", "count", "carried", "per_layer"))
        for i in range(per_layer):
            names = loop.inputs[carried + i * count : carried + (i + 1) * count]
            value = body.inputs[carried + i].name
            if names[0] not in self.graph.constants:
                index = run_index(names)
                if index is None:
                    raise UnsupportedError(f"caches {', '.join(names[:3])}.. follow no rule that a loop could use")
                self.cache_index = index
            else:
                self.weights[value] = layer_expression(names, layer_count(count, self.facts))
                for node in body.nodes:  # a view of a weight is at the weight's address
                    if node.op.startswith("view.") and node.inputs[0] == value:
                        self.weights[node.output] = self.weights[value]
        for i, value in enumerate(body.inputs[carried + per_layer :]):
            name = loop.inputs[carried + per_layer * count + i]
            if name in self.graph.constants:
                self.weights[value.name] = weight_expression(name)

    def context(self, generated: str, summary: str) -> dict[str, Any]:
        """Everything that the templates print."""
        program = self.program()
        shown = ("comment", "origin", "what")
        step = " ".join(str(v) for p in program for c in p["calls"] for k, v in c.items() if k not in shown)
        created = " ".join(" ".join(op.create) + op.condition for op in self.step.ops)
        self.step.locals = [line for line in self.step.locals if _names(line.split()[2], created)]
        self.step.locals += (
            [] if _names("shard", " ".join([created, *self.step.locals])) else ["static_cast<void>(shard);"]
        )
        plans = [self.step, self.sample, *self.body_plans]
        specs = {name: spec for plan in plans for name, spec in plan.specs.items()}
        facts = self.facts
        frequencies = [cpp.float_literal(f) for f in facts.inv_freq]
        logits = self.plan.place("main", self.graph.outputs[0])
        fields = inputs(self.graph)
        return dict(
            generated=generated,
            summary=summary,
            outline=outline(program),
            paged=self.paged,
            collectives=self.collectives,
            gathered=self.gathered,
            collective_functions=[
                *(["CommInitAll", "CommDestroy", "AllReduce"] if self.collectives else []),
                *(["AllGather"] if self.gathered else []),
            ],
            capture=self.capture,
            capture_collectives=self.captures_collectives(),
            unit_alpha=bool(self.graph.meta.get("gemm_alphas")),
            inner_multiple=self.graph.meta.get("inner_multiple", 1),
            host_memory=self.target.host_memory,
            block=facts.block_size if self.paged else 0,
            constants=constants(facts, self.target, self.attention_factor()),
            elem=self.elem,
            inv_freq=[", ".join(frequencies[i : i + 8]) for i in range(0, len(frequencies), 8)],
            scratch=areas(self.plan, self.paged),
            plans=plans,
            ops=[dict(name=s.name, workspace=s.workspace) for s in sorted(specs.values(), key=lambda s: s.name)],
            inputs=fields,
            input_type={f["name"]: f["type"] for f in fields},
            bodies=self.bodies,
            program=program,
            step_locals=[
                line.replace("shard.", "rsrc.shard.") for line in STEP_LOCALS if _names(line.split()[2], step)
            ],
            logits=self.pointer(logits, self.graph.outputs[0], "main"),
            symbols=sorted({s for spec in specs.values() for s in calls.symbols(spec)}),
            specs=specs,
        )

    def captures_collectives(self) -> bool:
        """Whether a captured step may hold collectives: where that is not known, several devices run their steps as calls."""
        return bool(self.target.collective_capture) and (
            not self.gathered or self.target.ops["rearrange"].graph_capture is True
        )

    def attention_factor(self) -> float:
        """What multiplies the rotary tables: the model's factor, and what legalisation folded into it."""
        for node in self.graph.nodes:
            if node.op == "setup.rope_table":
                return float(with_defaults(node.op, node.attrs)["attention_factor"])
        return self.facts.attention_factor


def captures(target: Target, ops: Collection[str]) -> bool:
    """Whether a step of these calls may be captured as a graph and replayed: every one of them must be known to be safe for that."""
    if not target.graph_capture:
        return False
    for op in ops:
        if op.startswith(("view.", "setup.", "loop.layers")) or op in COLLECTIVES:
            continue
        name = op.split(".", 1)[1]
        support = target.ops.get(RECORD_NAMES.get(name, name))
        if support is None or support.graph_capture is not True:
            return False
    return True


def _with_bodies(graph: Graph) -> list[Graph]:
    return [graph, *(n.attrs["body"] for n in graph.nodes if n.op == "loop.layers")]


def _names(symbol: str, text: str) -> bool:
    """Whether an expression names a variable."""
    return re.search(rf"(?<![\w.>\"]){symbol}\b", text) is not None


def _first_matrix(place: Place) -> Place:
    """The first of a batch of matrices."""
    return Place(place.buffer, place.offset, place.strides[1:], place.type.with_shape(*place.type.shape[1:]))


def outline(program: list[dict[str, Any]]) -> list[str]:
    """The comments of one layer's calls: the op sequence at a glance."""
    loops = [p for p in program if p["loop"]]
    return [c["comment"] for c in (loops or program)[0]["calls"]]

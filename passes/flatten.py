"""From batch x sequence to a ragged batch of tokens with caches of their own: stage "model" to stage "fused"."""

from __future__ import annotations

from ir.errors import UnsupportedError
from ir.graph import Constant, Graph, Node, Value
from ir.optable import infer
from ir.types import Dim, TensorType, dim_product, sym

TOKENS, REQUESTS, CAPACITY, ROWS = sym("T"), sym("R"), sym("C"), sym("L")

# Ops that treat every token by itself, so that it does not matter how tokens are arranged. Their first operands are activations, the rest weights.
_PER_TOKEN = {"linear": 1, "rms_norm": 1, "silu": 1, "scale": 1, "add": 2, "mul": 2, "reshape": 1, "split": 1}


def flatten(graph: Graph) -> tuple[Graph, int]:
    """Replace [batch, sequence, ...] by [tokens, ...], and caches that come in and go out by caches that attention writes.

    Inputs become tokens i32[T], positions i32[T], lens and starts i32[R], rows i32[L], and k_cache.N, v_cache.N [R, G, C, D]; outputs logits [L, V],
    k_cache_out.N and v_cache_out.N. Only the chosen rows of logits are computed.

    Returns the graph and the number of attention ops.

    Raises:
        UnsupportedError: something other than attention mixes tokens, or an input or output is used in another way than a decoder's.
    """
    return _Flattener(graph).run()


class _Flattener:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.types: dict[str, TensorType] = {}
        self.nodes: list[Node] = []
        self.names: dict[str, str] = {}  # model value -> fused value, where the names differ
        self.taken = {c for c in graph.constants}
        self.caches: list[tuple[Value, Value]] = []
        self.ids = self._only_operand("embedding", 0)
        self.positions = self._only_operand("rope", 1)
        shape = graph.type(self.ids).shape if self.ids else ()
        if len(shape) != 2:
            raise UnsupportedError(f"{graph.name}: no embedding of token ids [batch, sequence] to start from")
        self.batch, self.seq = shape
        self._check_inputs()

    def _only_operand(self, op: str, i: int) -> str:
        """The graph input that all nodes of an op read as operand ``i``; "" where there is no such node."""
        names = list(dict.fromkeys(n.inputs[i] for n in self.graph.nodes if n.op == op))
        inputs = {v.name for v in self.graph.inputs}
        if len(names) > 1 or not set(names) <= inputs:
            raise UnsupportedError(
                f"{self.graph.name}: {op} reads {' and '.join(names)}; expected one input of the graph"
            )
        return names[0] if names else ""

    def _check_inputs(self) -> None:
        allowed = {"embedding": {0}, "rope": {1}, "attention": {3, 4, 5}}
        for value in self.graph.inputs:
            for node in self.graph.consumers[value.name]:
                places = {i for i, name in enumerate(node.inputs) if name == value.name}
                if not places <= allowed.get(node.op, set()):
                    raise UnsupportedError(
                        f"{self.graph.name}: {node.op} {node.output} reads input {value.name}; it should come through embedding, rope or attention"
                    )

    def run(self) -> tuple[Graph, int]:
        inputs = [
            self._input(name, "i32", dim)
            for name, dim in (
                ("tokens", TOKENS),
                ("positions", TOKENS),
                ("lens", REQUESTS),
                ("starts", REQUESTS),
                ("rows", ROWS),
            )
        ]
        self.types.update({k: c.value.type for k, c in self.graph.constants.items()})
        logits = self._logits()
        for node in self.graph.nodes:
            self._node(node, logits)
        if logits not in self.types:
            raise UnsupportedError(f"{self.graph.name}: output {logits} is not computed from tokens")
        outputs = [self.names.get(logits, logits)]
        for k, v in self.caches:
            inputs += [k, v]
        for i in range(len(self.caches)):
            outputs += [f"k_cache_out.{i}", f"v_cache_out.{i}"]
        used = {i for n in self.nodes for i in n.inputs}
        constants: dict[str, Constant] = {k: c for k, c in self.graph.constants.items() if k in used}
        graph = Graph(
            self.graph.name, "fused", tuple(inputs), tuple(outputs), constants, tuple(self.nodes), self.graph.meta
        )
        return graph, len(self.caches)

    def _input(self, name: str, dtype: str, *shape: Dim) -> Value:
        if name in self.taken:
            raise UnsupportedError(f"{self.graph.name}: a value is called {name}, as an input of the engine is")
        value = Value(name, TensorType(dtype, shape))
        self.types[name] = value.type
        return value

    def _logits(self) -> str:
        """The one output that is no cache."""
        presents = {v.name for n in self.graph.nodes if n.op == "attention" for v in n.outputs[1:]}
        for node in self.graph.nodes:
            for name in node.inputs:
                if name in presents:
                    raise UnsupportedError(
                        f"{self.graph.name}: {node.op} {node.output} reads {name}, the present keys or values; only an output may"
                    )
        rest = [o for o in self.graph.outputs if o not in presents]
        if len(rest) != 1:
            raise UnsupportedError(
                f"{self.graph.name}: outputs are {', '.join(rest) or 'caches only'}; expected logits and caches"
            )
        return rest[0]

    def _node(self, node: Node, logits: str) -> None:
        if node.op == "embedding":
            self._emit(node, ("tokens", *node.inputs[1:]))
        elif node.op == "rope":
            self._token_operand(node, 0)
            self._emit(node, (self._of(node.inputs[0]), "positions", node.inputs[2]))
        elif node.op == "attention":
            self._attention(node)
        elif node.op in _PER_TOKEN:
            count = _PER_TOKEN[node.op]
            for i in range(count):
                self._token_operand(node, i)
            inputs = (*(self._of(i) for i in node.inputs[:count]), *node.inputs[count:])
            # Rows are chosen right before the last linear: as late as possible for the residual sums to fuse, early enough to save the vocabulary's product.
            if node.output == logits and node.op == "linear":
                inputs = (self._gather(inputs[0]), *inputs[1:])
            self._emit(node, inputs, self._attrs(node))
        else:
            raise UnsupportedError(
                f"{self.graph.name}: {node.op} {node.output} may mix tokens; only attention can in an engine that runs ragged batches"
            )
        if node.output == logits and node.op != "linear":
            self.names[logits] = self._gather(logits)

    def _of(self, name: str) -> str:
        return self.names.get(name, name)

    def _token_operand(self, node: Node, i: int) -> None:
        name = node.inputs[i]
        if name not in self.types or name in self.graph.constants:
            raise UnsupportedError(
                f"{self.graph.name}: {node.op} {node.output} reads {name}, which does not hold one row per token"
            )

    def _prefix(self, node: Node, shape: tuple[Dim, ...]) -> int:
        """How many leading axes stand for the tokens."""
        whole = dim_product((self.batch, self.seq))
        for n in range(1, len(shape) + 1):
            if (
                dim_product(shape[:n]) == whole
                and all(isinstance(d, int) for d in shape[n:])
                and not (n < 2 and isinstance(whole, int))
            ):
                return n
        raise UnsupportedError(
            f"{self.graph.name}: {node.op} {node.output} is [{', '.join(map(str, shape))}], which does not keep tokens [{self.batch}, {self.seq}] apart"
        )

    def _attrs(self, node: Node) -> dict:
        shape = self.graph.type(node.inputs[0]).shape
        prefix = self._prefix(node, shape)
        if node.op in ("linear", "rms_norm") and prefix == len(shape):
            raise UnsupportedError(
                f"{self.graph.name}: {node.op} {node.output} works across tokens: its operand is {self.graph.type(node.inputs[0])}"
            )
        if node.op == "reshape":
            target = tuple(node.attrs["shape"])
            return {**node.attrs, "shape": (TOKENS, *target[self._prefix(node, target) :])}
        if node.op == "split":
            axis = node.attrs["axis"]
            if axis < prefix:
                raise UnsupportedError(f"{self.graph.name}: split {node.output} cuts the tokens apart")
            return {**node.attrs, "axis": axis - prefix + 1}
        return dict(node.attrs)

    def _attention(self, node: Node) -> None:
        graph, i = self.graph, len(self.caches)
        for operand in range(3):
            self._token_operand(node, operand)
        if graph.type(node.inputs[0]).shape[:2] != (self.batch, self.seq):
            raise UnsupportedError(
                f"{graph.name}: attention {node.output} is over {graph.type(node.inputs[0])}, not over the tokens [{self.batch}, {self.seq}]"
            )
        self._check_wiring(node)
        k = self.types[self._of(node.inputs[1])]
        cache = (REQUESTS, k.shape[1], CAPACITY, k.shape[2])
        self.caches.append((self._input(f"k_cache.{i}", k.dtype, *cache), self._input(f"v_cache.{i}", k.dtype, *cache)))
        inputs = (*(self._of(n) for n in node.inputs[:3]), f"k_cache.{i}", f"v_cache.{i}", "lens", "starts")
        names = (node.output, f"k_cache_out.{i}", f"v_cache_out.{i}")
        self._emit(node, inputs, {"scale": node.attrs["scale"]}, "attention_cached", names)

    def _check_wiring(self, node: Node) -> None:
        """What an attention gives as present comes back to it as past: the two are at the same place among the caches.

        The engine keeps a cache per attention; a graph that feeds layer 0's keys to layer 1, or keys as values, means something else.
        """
        graph = self.graph
        pasts = [name for name in (node.inputs[3:5] if len(node.inputs) > 3 else ()) if name]
        presents = [v.name for v in node.outputs[1:] if v.name in graph.outputs]
        if not pasts and not presents:
            return
        attentions = [n for n in graph.nodes if n.op == "attention"]
        fed = {i for n in attentions for i in n.inputs[3:5] if i}
        given = {v.name for n in attentions for v in n.outputs[1:]}
        places_in = {v.name: i for i, v in enumerate(v for v in graph.inputs if v.name in fed)}
        places_out = {name: i for i, name in enumerate(o for o in graph.outputs if o in given)}
        found = ([places_in.get(n) for n in pasts], [places_out.get(n) for n in presents])
        if found[0] != found[1]:
            raise UnsupportedError(
                f"{graph.name}: attention {node.output} reads caches {', '.join(pasts) or 'none'} and gives {', '.join(presents) or 'none'}; "
                "expected the same layer's keys and values, in the same places among the inputs and the outputs"
            )

    def _gather(self, x: str) -> str:
        if len(self.types[x].shape) != 2:
            raise UnsupportedError(
                f"{self.graph.name}: the logits come from {x}, {self.types[x]}, which is no row per token"
            )
        # The result of the graph keeps the name logits; what is chosen from another value says so.
        name = f"{x}_rows"
        while name in self.types or name in self.graph.values:
            name += "_"
        node = Node(
            "gather_rows",
            (x, "rows"),
            (Value(name, TensorType(self.types[x].dtype, (ROWS, self.types[x].shape[1]))),),
            {},
        )
        self._append(node)
        return name

    def _emit(
        self, node: Node, inputs: tuple[str, ...], attrs: dict | None = None, op: str = "", names: tuple[str, ...] = ()
    ) -> None:
        attrs = dict(node.attrs) if attrs is None else attrs
        op, names = op or node.op, names or tuple(v.name for v in node.outputs)
        results = infer(op, [self.types[i] if i else None for i in inputs], attrs)
        outputs = tuple(Value(n, t) for n, t in zip(names, results, strict=True))
        self._append(Node(op, inputs, outputs, attrs, node.origin))

    def _append(self, node: Node) -> None:
        for value in node.outputs:
            if value.name in self.types:
                raise UnsupportedError(f"{self.graph.name}: a value is called {value.name}, as one of the engine's is")
            self.types[value.name] = value.type
        self.nodes.append(node)

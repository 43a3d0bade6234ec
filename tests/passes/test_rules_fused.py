"""Each rule of stage "fused" on small graphs: where it fires, and where it must not."""

from __future__ import annotations

import numpy as np
import pytest

from ir.errors import UnsupportedError
from ir.graph import Graph
from ir.interp import run
from ir.text import parse
from ir.verify import verify
from passes.flatten import flatten
from passes.fuse import RULES, fuse_with
from passes.match import explain
from tests.passes.helpers import assert_close, assert_round_trip


def graph(body: str, stage: str = "fused") -> Graph:
    return verify(parse(f"graph small @{stage} {{\n{body}\n}}"))


def const(name: str, *shape: int, dtype: str = "f32", seed: int = 0) -> str:
    values = np.random.default_rng(seed + sum(map(ord, name))).integers(-8, 9, shape) / 8.0
    numbers = ", ".join(map(repr, values.reshape(-1).tolist()))
    if values.size > 16:
        import base64

        from ir.types import DTYPES

        numbers = f'base64 "{base64.b64encode(values.astype(DTYPES[dtype].numpy).tobytes()).decode()}"'
    return f"const %{name}: {dtype}[{', '.join(map(str, shape))}] = inline({dtype}[{', '.join(map(str, shape))}], {numbers})"


def inputs_of(g: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"T": 5, "R": 2, "C": 6, "L": 2}
    arrays = {}
    for v in g.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d)] for d in v.type.shape]
        arrays[v.name] = rng.normal(size=shape) if v.type.dtype != "i32" else np.arange(5, dtype=np.int32)
    if "lens" in arrays:
        arrays["lens"], arrays["starts"] = np.array([2, 3], np.int32), np.array([1, 0], np.int32)
    return arrays


def fires(name: str, body: str, times: int = 1) -> Graph:
    before = graph(body)
    after, count = fuse_with(name)(before)
    assert count == times
    verify(after)
    assert_round_trip(after)
    assert after.outputs == before.outputs
    a, b = (run(g, inputs_of(before), float64=True) for g in (before, after))
    for key in a:
        assert_close(b[key], a[key], key)
    return after


def holds_still(name: str, body: str, *reasons: str) -> None:
    before = graph(body)
    after, count = fuse_with(name)(before)
    assert count == 0 and after is before
    text = explain(before, [RULES[name]()], [v.name for n in reversed(before.nodes) for v in n.outputs])
    for reason in reasons:
        assert reason in text, text


# --- swiglu ---------------------------------------------------------------------------------------------------------------------------------------

GATED = "input %gate: f32[T, 7]\ninput %up: f32[T, 7]\n%act: f32[T, 7] = silu(%gate)\n"


@pytest.mark.parametrize("operands", ["%act, %up", "%up, %act"])
def test_swiglu_in_either_order(operands):
    after = fires("fuse_swiglu", GATED + f"%y: f32[T, 7] = mul({operands})\noutput %y")
    assert [n.op for n in after.nodes] == ["swiglu"] and after.nodes[0].inputs == ("up", "gate")


def test_swiglu_of_two_activations():
    """silu on both sides: one of them is the gate, the other is just an operand."""
    body = GATED + "%other: f32[T, 7] = silu(%up)\n%y: f32[T, 7] = mul(%act, %other)\noutput %y"
    after = fires("fuse_swiglu", body)
    assert after.counts() == {"silu": 1, "swiglu": 1}


@pytest.mark.parametrize(
    "rest, reason",
    [
        ("%y: f32[T, 7] = mul(%act, %up)\n%z: f32[T, 7] = add(%y, %act)\noutput %z", "act is read elsewhere too"),
        ("%y: f32[T, 7] = mul(%act, %up)\noutput %y\noutput %act", "act is read elsewhere too"),
        ("%y: f32[T, 7] = mul(%act, %act)\noutput %y", "multiplied by itself"),
        ("%y: f32[T, 7] = add(%act, %up)\noutput %y", ""),
        ("%y: f32[T, 7] = mul(%gate, %up)\n%z: f32[T, 7] = add(%y, %act)\noutput %z", "expected silu"),
    ],
)
def test_no_swiglu(rest, reason):
    holds_still("fuse_swiglu", GATED + rest, reason)


# --- add_rms_norm ---------------------------------------------------------------------------------------------------------------------------------

SUM = f"input %a: f32[T, 7]\ninput %b: f32[T, 7]\n{const('w', 7)}\n{const('u', 7)}\n"
NORM = "%total: f32[T, 7] = add(%a, %b)\n%y: f32[T, 7] = rms_norm(%total, %w) {epsilon=1e-06}\n"


def test_the_sum_may_have_other_readers():
    after = fires("fuse_add_rms_norm", SUM + NORM + "%z: f32[T, 7] = mul(%y, %total)\noutput %z\noutput %total")
    assert after.counts() == {"add_rms_norm": 1, "mul": 1}
    assert after.nodes[0].inputs == ("a", "b", "w") and [v.name for v in after.nodes[0].outputs] == ["y", "total"]


def test_only_the_first_of_two_norms_takes_the_sum():
    body = SUM + NORM + "%z: f32[T, 7] = rms_norm(%total, %u) {epsilon=1e-05}\n%s: f32[T, 7] = mul(%y, %z)\noutput %s"
    after = fires("fuse_add_rms_norm", body)
    assert after.counts() == {"add_rms_norm": 1, "mul": 1, "rms_norm": 1}
    assert after.producers["z"].op == "rms_norm" and after.producers["z"].inputs == ("total", "u")


def test_a_chain_of_residuals():
    body = SUM + NORM + "%t2: f32[T, 7] = add(%y, %total)\n%z: f32[T, 7] = rms_norm(%t2, %u) {epsilon=1e-05}\noutput %z"
    after = fires("fuse_add_rms_norm", body, 2)
    assert after.counts() == {"add_rms_norm": 2} and after.nodes[1].inputs == ("y", "total", "u")


def test_no_add_rms_norm():
    holds_still(
        "fuse_add_rms_norm",
        SUM + "%m: f32[T, 7] = mul(%a, %b)\n%y: f32[T, 7] = rms_norm(%m, %w) {epsilon=1e-06}\noutput %y",
        "expected add, found mul",
    )
    holds_still(
        "fuse_add_rms_norm",
        SUM + "%y: f32[T, 7] = rms_norm(%a, %w) {epsilon=1e-06}\noutput %y",
        "expected add, found input",
    )


# --- norm_rope ------------------------------------------------------------------------------------------------------------------------------------

HEADS = f"input %x: f32[T, 3, 4]\ninput %positions: i32[T]\n{const('w', 4)}\n{const('inv_freq', 2)}\n%n: f32[T, 3, 4] = rms_norm(%x, %w) {{epsilon=1e-06}}\n"
ROPE = "%y: f32[T, 3, 4] = rope(%n, %positions, %inv_freq) {attention_factor=1.25, interleaved=True}\n"


def test_norm_rope_keeps_the_attributes():
    after = fires("fuse_norm_rope", HEADS + ROPE + "output %y")
    (node,) = after.nodes
    assert node.attrs == {"epsilon": 1e-06, "attention_factor": 1.25, "interleaved": True} and node.inputs == (
        "x",
        "w",
        "positions",
        "inv_freq",
    )


@pytest.mark.parametrize(
    "rest, reason",
    [
        (ROPE + "%z: f32[T, 3, 4] = add(%y, %n)\noutput %z", "n is read elsewhere too"),
        (ROPE + "output %y\noutput %n", "n is read elsewhere too"),
        (
            "%y: f32[T, 3, 4] = rope(%x, %positions, %inv_freq)\n%z: f32[T, 3, 4] = add(%y, %n)\noutput %z",
            "expected rms_norm, found input",
        ),
    ],
)
def test_no_norm_rope(rest, reason):
    holds_still("fuse_norm_rope", HEADS + rest, reason)


# --- merge_qkv ------------------------------------------------------------------------------------------------------------------------------------


def attention(
    q: str = "x", k: str = "x", v: str = "x", dtypes=("f32",) * 3, biases=(False,) * 3, more: str = ""
) -> str:
    """x [T, 7] -> heads 6, kv heads 3, head_dim 4."""
    lines = ["input %x: f32[T, 7]", "input %other: f32[T, 7]", "input %lens: i32[R]", "input %starts: i32[R]"]
    lines += ["input %k_cache.0: f32[R, 3, C, 4]", "input %v_cache.0: f32[R, 3, C, 4]"]
    nodes = []
    for i, (name, source, heads) in enumerate((("q", q, 6), ("k", k, 3), ("v", v, 3))):
        lines.append(const(f"m.{name}_proj.weight", heads * 4, 7, dtype=dtypes[i]))
        if biases[i]:
            lines.append(const(f"m.{name}_proj.bias", heads * 4))
        bias = f", %m.{name}_proj.bias" if biases[i] else ""
        nodes.append(f"%{name}.0: f32[T, {heads * 4}] = linear(%{source}, %m.{name}_proj.weight{bias})")
        nodes.append(f"%{name}h: f32[T, {heads}, 4] = reshape(%{name}.0) {{shape=(<T>, {heads}, 4)}}")
    nodes.append(
        "%y: f32[T, 6, 4], %k_out: f32[R, 3, C, 4], %v_out: f32[R, 3, C, 4] = attention_cached(%qh, %kh, %vh, %k_cache.0, %v_cache.0, %lens, %starts) {scale=0.5}"
    )
    return "\n".join([*lines, *nodes, more, "output %y", "output %k_out"])


def test_merge_qkv():
    after = fires("merge_qkv", attention())
    whole = after.producers["qkv.0"]
    assert whole.inputs == ("x", "m.qkv_proj.weight") and after.type("m.qkv_proj.weight").shape == (48, 7)
    split = after.producers["q.0"]
    assert split.attrs == {"axis": 1, "sizes": (24, 12, 12)} and [v.name for v in split.outputs] == [
        "q.0",
        "k.0",
        "v.0",
    ]


def test_merge_qkv_with_biases():
    after = fires("merge_qkv", attention(biases=(True,) * 3))
    assert after.producers["qkv.0"].inputs == ("x", "m.qkv_proj.weight", "m.qkv_proj.bias")


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"v": "other"}, "their inputs differ: x, other"),
        ({"q": "other"}, "their inputs differ: other, x"),
        ({"dtypes": ("f32", "bf16", "f32")}, "dtypes differ: f32, bf16"),
        ({"biases": (True, False, True)}, "some have a bias and some have none"),
        ({"more": "output %k.0"}, "an output of the graph"),
    ],
)
def test_no_merge_qkv(arguments, reason):
    holds_still("merge_qkv", attention(**arguments), reason)


def test_no_merge_of_a_value_that_is_no_projection():
    body = attention().replace(
        "%vh: f32[T, 3, 4] = reshape(%v.0)", "%v2: f32[T, 12] = silu(%v.0)\n%vh: f32[T, 3, 4] = reshape(%v2)"
    )
    holds_still("merge_qkv", body, "vh does not come from a linear")
    shared = attention().replace("%vh: f32[T, 3, 4] = reshape(%v.0)", "%vh: f32[T, 3, 4] = reshape(%k.0)")
    holds_still("merge_qkv", shared, "k.0 is used twice")


# --- merge_gate_up --------------------------------------------------------------------------------------------------------------------------------


def feed_forward(
    gate: str = "x", up: str = "x", dtype: str = "f32", bias: str = "", fused: bool = True, swap: bool = False
) -> str:
    lines = [
        "input %x: f32[T, 7]",
        "input %other: f32[T, 7]",
        const("m.gate_proj.weight", 5, 7),
        const("m.up_proj.weight", 5, 7, dtype=dtype),
    ]
    lines += [const("m.gate_proj.bias", 5)] if bias else []
    lines.append(f"%up.0: f32[T, 5] = linear(%{up}, %m.up_proj.weight)")
    lines.append(f"%gate.0: f32[T, 5] = linear(%{gate}, %m.gate_proj.weight{bias})")
    if fused:
        lines.append("%y: f32[T, 5] = swiglu(%up.0, %gate.0)")
    else:
        lines.append("%act: f32[T, 5] = silu(%gate.0)")
        lines.append(f"%y: f32[T, 5] = mul({'%up.0, %act' if swap else '%act, %up.0'})")
    return "\n".join([*lines, "output %y"])


@pytest.mark.parametrize("form", [{}, {"fused": False}, {"fused": False, "swap": True}])
def test_merge_gate_up_gate_first(form):
    after = fires("merge_gate_up", feed_forward(**form))
    assert [v.name for v in after.producers["up.0"].outputs] == ["gate.0", "up.0"]
    names = [
        c.data.parts[0].key == graph(feed_forward()).constants["m.gate_proj.weight"].data.key
        for c in after.constants.values()
    ]  # type: ignore[union-attr]
    assert names == [True]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"up": "other"}, "their inputs differ"),
        ({"dtype": "f16"}, "dtypes differ: f32, f16"),
        ({"bias": ", %m.gate_proj.bias"}, "some have a bias"),
    ],
)
def test_no_merge_gate_up(arguments, reason):
    holds_still("merge_gate_up", feed_forward(**arguments), reason)


# --- flatten --------------------------------------------------------------------------------------------------------------------------------------

START = f"""input %ids: i64[B, S]
input %positions_in: i64[B, S]
{const("table", 9, 6)}
{const("head", 9, 6)}
{const("inv_freq", 1)}
%x: f32[B, S, 6] = embedding(%ids, %table) {{dtype='f32'}}
%h: f32[B, S, 3, 2] = reshape(%x) {{shape=(<B>, <S>, 3, 2)}}
%r: f32[B, S, 3, 2] = rope(%h, %positions_in, %inv_freq)
%a: f32[B, S, 3, 2], %keys: f32[B, 3, S, 2], %values: f32[B, 3, S, 2] = attention(%r, %r, %h) {{scale=0.7}}
%f: f32[B, S, 6] = reshape(%a) {{shape=(<B>, <S>, 6)}}
"""
LOGITS = "%logits: f32[B, S, 9] = linear(%f, %head)\noutput %logits"


def test_flatten_small():
    after, count = flatten(graph(START + LOGITS, "model"))
    verify(after)
    assert count == 1
    assert [str(v.type) for v in after.inputs] == [
        "i32[T]",
        "i32[T]",
        "i32[R]",
        "i32[R]",
        "i32[L]",
        "f32[R, 3, C, 2]",
        "f32[R, 3, C, 2]",
    ]
    assert str(after.type("h")) == "f32[T, 3, 2]" and str(after.type("logits")) == "f32[L, 9]"
    assert after.outputs == ("logits", "k_cache_out.0", "v_cache_out.0")


def test_flatten_keeps_tokens_that_are_merged_already():
    """[batch * sequence, 6] is a row per token too."""
    body = (
        START
        + "%m: f32[B*S, 6] = reshape(%f) {shape=(<B*S>, 6)}\n%l: f32[B*S, 9] = linear(%m, %head)\n%logits: f32[B, S, 9] = reshape(%l) {shape=(<B>, <S>, 9)}\noutput %logits"
    )
    after, _ = flatten(graph(body, "model"))
    verify(after)
    assert str(after.type("m")) == "f32[T, 6]"
    # The logits come from a reshape: rows are chosen at the very end.
    assert after.producers[after.outputs[0]].op == "gather_rows" and str(after.type(after.outputs[0])) == "f32[L, 9]"


@pytest.mark.parametrize(
    "body, reason",
    [
        (START + LOGITS + "\noutput %f", "outputs are logits, f; expected logits and caches"),
        (START + "output %keys", "outputs are caches only"),
        (START + "%p: f32[B, 3, S, 2] = silu(%keys)\n" + LOGITS, "silu p reads keys"),
        (
            START
            + "%m: f32[B, 6*S] = reshape(%f) {shape=(<B>, <6*S>)}\n%l: f32[B, S, 6] = reshape(%m) {shape=(<B>, <S>, 6)}\noutput %l",
            "does not keep tokens [B, S] apart",
        ),
        (
            START.replace("input %ids", "input %extra: f32[B, S, 6]\ninput %ids")
            + "%e: f32[B, S, 6] = add(%f, %extra)\noutput %e",
            "add e reads input extra",
        ),
        (
            "input %x: f32[B, S, 6]\n" + const("w", 9, 6) + "\n%y: f32[B, S, 9] = linear(%x, %w)\noutput %y",
            "no embedding of token ids",
        ),
        (
            START.replace("input %ids", "input %more: i64[B, S]\ninput %ids")
            .replace("%f: f32", "%r2: f32[B, S, 3, 2] = rope(%a, %more, %inv_freq)\n%f: f32")
            .replace("reshape(%a)", "reshape(%r2)")
            + LOGITS,
            "rope reads positions_in and more",
        ),
        ((START + LOGITS).replace("%head", "%lens"), "a value is called lens"),
    ],
)
def test_flatten_refuses(body, reason):
    with pytest.raises(UnsupportedError) as caught:
        flatten(graph(body, "model"))
    assert reason in str(caught.value)

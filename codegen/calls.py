"""How a call of stage "infini" becomes an InfiniCore operator: names and argument orders, as data.

An operand ``o0`` is the node's first result, ``i1`` its second operand; other entries are attributes. The orders are those of InfiniCore's main branch at 2cec6ce6
(2026-08-08); ``OLDER`` has the orders that some ops had before, which an installation may still have (see codegen.installed).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class CallSpec:
    """One InfiniCore operator.

    Attributes:
        name: NAME in infiniopCreateNAMEDescriptor.
        create: what create takes after the handle and the descriptor's address: operands (as tensor descriptors) and attributes.
        call: what the call takes between the workspace and the stream: operands (as pointers) and attributes.
        workspace: whether the operator takes one.
    """

    name: str
    create: tuple[str, ...]
    call: tuple[str, ...]
    workspace: bool = True

    @property
    def operands(self) -> tuple[str, ...]:
        """The tensors, in the order that create takes them."""
        return tuple(a for a in self.create if is_operand(a))


def is_operand(argument: str) -> bool:
    return argument[0] in "io" and argument[1:].isdigit()


def _spec(
    name: str, operands: str, *, create: str = "", call: str = "", workspace: bool = True, order: str | None = None
) -> CallSpec:
    """Operands first, attributes after them, in both; ``order`` where the call takes the operands in another order."""
    return CallSpec(
        name, (*operands.split(), *create.split()), (*(order or operands).split(), *call.split()), workspace
    )


CALLS: dict[str, CallSpec] = {
    "infini.gemm": _spec("Gemm", "o0 i0 i1", call="alpha beta"),
    "infini.rms_norm": _spec("RMSNorm", "o0 i0 i1", create="epsilon"),
    "infini.add_rms_norm": _spec("AddRMSNorm", "o0 o1 i0 i1 i2", create="epsilon"),
    "infini.add": _spec("Add", "o0 i0 i1"),
    "infini.mul": _spec("Mul", "o0 i0 i1"),
    "infini.silu": _spec("Silu", "o0 i0"),
    "infini.swiglu": _spec("SwiGLU", "o0 i0 i1"),
    "infini.rope": _spec("RoPE", "o0 i0 i1 i2 i3", create="algo"),
    "infini.causal_softmax": _spec("CausalSoftmax", "o0 i0"),
    "infini.rearrange": _spec("Rearrange", "o0 i0", workspace=False),
    "infini.rearrange_into": _spec("Rearrange", "o0 i1", workspace=False),
    "infini.embedding": _spec("Embedding", "o0 i0 i1", workspace=False),
    "infini.gather_rows": _spec("Embedding", "o0 i1 i0", workspace=False),
    "infini.paged_caching": _spec("PagedCaching", "o0 o1 i2 i3 i4"),
    # infini.paged_attention_ragged is two operators, each on its part of the batch; the engine gives alibi_slopes as null. Operands: out, q, k_cache, v_cache,
    # block_tables, seq_lens, and the cumulative query lengths.
    "paged_attention": _spec("PagedAttention", "o0 i0 i1 i2 i3 i4", create="alibi scale", call="alibi"),
    "paged_attention_prefill": _spec(
        "PagedAttentionPrefill", "o0 i0 i1 i2 i3 i4 i5", create="alibi scale", call="alibi"
    ),
    "random_sample": _spec("RandomSample", "o0 i0", call="random_val topp topk temperature"),
}

# Orders that changed while the symbol stayed: what the op had before, and the first day of today's.
OLDER: dict[str, tuple[CallSpec, str]] = {
    "infini.add_rms_norm": (
        CallSpec("AddRMSNorm", ("o0", "i0", "i1", "i2", "epsilon", "o1"), ("o0", "i0", "i1", "i2", "o1")),
        "2026-02-13",
    ),
    "infini.paged_caching": (_spec("PagedCaching", "i2 i3 o0 o1 i4"), "2026-01-12"),
    "infini.rope": (_spec("RoPE", "o0 i0 i1 i2 i3"), "2025-09-16"),  # interleaved only
}

# What the headers call the arguments, in the order of InfiniCore's main (that of CALLS where the op is in it): of create, and of the call; "a|b" where both
# names were used. A trailing "_desc" is no part of a name.
PARAMETERS: dict[str, tuple[str, str]] = {
    "Gemm": ("c a b", "c a b alpha beta"),
    "RMSNorm": ("y x w epsilon", "y x w"),
    "AddRMSNorm": ("y residual_out a b weight epsilon", "y residual_out a b weight"),
    "Add": ("c a b", "c a b"),
    "Mul": ("c a b", "c a b"),
    "Silu": ("output input|intput", "output input|intput"),
    "SwiGLU": ("c a b", "c a b"),
    "SiluAndMul": ("output input", "output input"),
    "RoPE": ("y x pos_ids sin_table cos_table algo", "y x pos_ids sin_table cos_table"),
    "CausalSoftmax": ("y x", "y x"),
    "LogSoftmax": ("output|y input|x dim", "output|y input|x"),
    "Rearrange": ("dst src", "dst src"),
    "Embedding": ("output input weight", "output input weight"),
    "RandomSample": ("result probs", "result probs random_val topp topk temperature"),
    "PagedCaching": ("k_cache v_cache k v slot_mapping", "k_cache v_cache k v slot_mapping"),
    "PagedAttention": (
        "out q k_cache v_cache block_tables seq_lens alibi_slopes scale",
        "out q k_cache v_cache block_tables seq_lens alibi_slopes",
    ),
    "PagedAttentionPrefill": (
        "out q k_cache v_cache block_tables seq_lens cum_seq_lens_q alibi_slopes scale",
        "out q k_cache v_cache block_tables seq_lens cum_seq_lens_q alibi_slopes",
    ),
    "KVCaching": ("k_cache v_cache k v past_kv_lengths", "k_cache v_cache k v past_kv_lengths"),
    "PerChannelQuantI8": ("x_packed x_scale x_zero x", "x_packed x_scale x_zero x"),
    "I8Gemm": ("out bias x x_scale weights weights_scale", "out bias x x_scale weights weights_scale"),
    "LinearMxfp4": (
        "output input packed_weight weight_scale bias alpha",
        "output input packed_weight weight_scale bias",
    ),
}

# The attributes among them, and their C types; all others are tensors.
ATTRIBUTES: dict[str, str] = {
    "epsilon": "float",
    "alpha": "float",
    "beta": "float",
    "scale": "float",
    "random_val": "float",
    "topp": "float",
    "topk": "int",
    "temperature": "float",
    "dim": "int",
    "algo": "infiniopRoPEAlgo_t",
}

# The ops of the targets' records, by NAME.
RECORD_OPS: dict[str, str] = {
    "Gemm": "gemm",
    "RMSNorm": "rms_norm",
    "AddRMSNorm": "add_rms_norm",
    "Add": "add",
    "Mul": "mul",
    "Silu": "silu",
    "SwiGLU": "swiglu",
    "SiluAndMul": "silu_and_mul",
    "RoPE": "rope",
    "CausalSoftmax": "causal_softmax",
    "LogSoftmax": "log_softmax",
    "Rearrange": "rearrange",
    "Embedding": "embedding",
    "RandomSample": "random_sample",
    "PagedCaching": "paged_caching",
    "PagedAttention": "paged_attention",
    "PagedAttentionPrefill": "paged_attention_prefill",
    "KVCaching": "kv_caching",
    "PerChannelQuantI8": "per_channel_quant_int8",
    "I8Gemm": "scaled_mm",
    "LinearMxfp4": "linear_mxfp4",
}


def symbols(spec: CallSpec) -> tuple[str, ...]:
    """The C functions of an operator."""
    names = [f"infiniopCreate{spec.name}Descriptor", f"infiniop{spec.name}", f"infiniopDestroy{spec.name}Descriptor"]
    if spec.workspace:
        names.insert(1, f"infiniopGet{spec.name}WorkspaceSize")
    return tuple(names)


def abi(specs: Iterable[CallSpec]) -> dict[str, list[list[str]]]:
    """What a manifest records of the operators that an engine calls: the argument orders of create and of the call, by the call's C name."""
    return {f"infiniop{s.name}": [list(s.create), list(s.call)] for s in sorted(specs, key=lambda s: s.name)}

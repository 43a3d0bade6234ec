"""How each op of the stage "infini" becomes an InfiniCore call: which operands its create and call functions take, in which order.

``o0`` is the node's first result, ``i0`` its first operand. Order and arity are InfiniCore's C interface (main of 2026-08).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CallSpec:
    """One InfiniCore operator.

    Attributes:
        name: NAME in infiniopCreateNAMEDescriptor.
        operands: tensors, in the order that both create and call take them.
        create: further arguments of create: attribute names.
        call: further arguments of the call: attribute names.
        workspace: whether the operator takes one.
    """

    name: str
    operands: tuple[str, ...]
    create: tuple[str, ...] = ()
    call: tuple[str, ...] = ()
    workspace: bool = True


CALLS: dict[str, CallSpec] = {
    "infini.gemm": CallSpec("Gemm", ("o0", "i0", "i1"), call=("alpha", "beta")),
    "infini.rms_norm": CallSpec("RMSNorm", ("o0", "i0", "i1"), create=("epsilon",)),
    "infini.add_rms_norm": CallSpec("AddRMSNorm", ("o0", "o1", "i0", "i1", "i2"), create=("epsilon",)),
    "infini.add": CallSpec("Add", ("o0", "i0", "i1")),
    "infini.mul": CallSpec("Mul", ("o0", "i0", "i1")),
    "infini.silu": CallSpec("Silu", ("o0", "i0")),
    "infini.swiglu": CallSpec("SwiGLU", ("o0", "i0", "i1")),
    "infini.rope": CallSpec("RoPE", ("o0", "i0", "i1", "i2", "i3"), create=("algo",)),
    "infini.causal_softmax": CallSpec("CausalSoftmax", ("o0", "i0")),
    "infini.rearrange": CallSpec("Rearrange", ("o0", "i0"), workspace=False),
    "infini.rearrange_into": CallSpec("Rearrange", ("o0", "i1"), workspace=False),
    "infini.embedding": CallSpec("Embedding", ("o0", "i0", "i1"), workspace=False),
    "infini.gather_rows": CallSpec("Embedding", ("o0", "i1", "i0"), workspace=False),
    "infini.paged_caching": CallSpec("PagedCaching", ("o0", "o1", "i2", "i3", "i4")),
}
# infini.paged_attention_ragged is two operators, each on its part of the batch; the engine gives alibi_slopes as null.
PAGED_DECODE = CallSpec(
    "PagedAttention", ("o0", "i0", "i1", "i2", "i3", "i4"), create=("alibi", "scale"), call=("alibi",)
)
PAGED_PREFILL = CallSpec(
    "PagedAttentionPrefill", ("o0", "i0", "i1", "i2", "i3", "i4", "i5"), create=("alibi", "scale"), call=("alibi",)
)
SAMPLE = CallSpec("RandomSample", ("o0", "i0"), call=("random_val", "topp", "topk", "temperature"))


def symbols(spec: CallSpec) -> tuple[str, ...]:
    """The C functions of an operator."""
    names = [f"infiniopCreate{spec.name}Descriptor", f"infiniop{spec.name}", f"infiniopDestroy{spec.name}Descriptor"]
    if spec.workspace:
        names.insert(1, f"infiniopGet{spec.name}WorkspaceSize")
    return tuple(names)

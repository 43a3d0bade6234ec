"""What each device of InfiniCore can do, as data (targets.json), and how the compiler asks.

A record belongs to a target and an InfiniCore: ``cpu`` is the real InfiniCore's CPU backend, ``embedded`` our own library for the same device, which has more.
Facts were read from InfiniCore's sources at main 2cec6ce6 (2026-08-08), nothing was run on the devices; ``uncertain`` ones count as absent unless asked for.
docs/adding-a-target.md describes the format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from ir.errors import ConfigError, UnsupportedError

# The first published release; what came to main later is not in it.
RELEASE_0_1_0 = "2025-10-01"

# The tensors that each op's create takes, in the order of InfiniCore's main, outputs first. Operand numbers in records are positions in here.
OPERANDS: dict[str, tuple[str, ...]] = {
    "gemm": ("c", "a", "b"),
    "rms_norm": ("y", "x", "w"),
    "add_rms_norm": ("y", "residual_out", "a", "b", "w"),
    "add": ("c", "a", "b"),
    "mul": ("c", "a", "b"),
    "silu": ("y", "x"),
    "swiglu": ("c", "a", "b"),
    "silu_and_mul": ("y", "x"),
    "rope": ("y", "x", "pos_ids", "sin_table", "cos_table"),
    "causal_softmax": ("y", "x"),
    "rearrange": ("y", "x"),
    "embedding": ("out", "index", "table"),
    "random_sample": ("result", "logits"),
    "paged_attention": ("out", "q", "k_cache", "v_cache", "block_tables", "seq_lens"),
    "paged_attention_prefill": ("out", "q", "k_cache", "v_cache", "block_tables", "seq_lens", "cu_lens"),
    "paged_caching": ("k_cache", "v_cache", "k", "v", "slots"),
    "kv_caching": ("k_cache", "v_cache", "k", "v", "past_lens"),
    "per_channel_quant_int8": ("x_packed", "x_scale", "x_zero", "x"),
    "scaled_mm": ("out", "bias", "x", "x_scale", "weight", "weight_scale"),
    "linear_mxfp4": ("out", "x", "packed_weight", "weight_scale", "bias"),
}

COLLECTIVES = (
    "CommInitAll GetUniqueId CommInitRank CommDestroy GroupStart GroupEnd "
    "AllReduce Broadcast Send Recv AllGather AllGatherV ReduceScatter ReduceScatterV"
).split()
DTYPES = "byte bool i8 i16 i32 i64 u8 u16 u32 u64 f16 bf16 f32 f64".split()


@dataclass(frozen=True)
class OpSupport:
    """One op on one target. Empty and None mean: free, no limit is known. Operands are counted as in OPERANDS.

    Attributes:
        dtypes: of operand 0.
        index_dtypes: of positions, indices, slots, tables, lengths, results of sampling.
        head_dims: allowed sizes of a head.
        since: the first day on main from which the op does here what the engine asks of it, ISO.
        uncertain: not known to work; counts as absent unless the person asks for it.
        graph_capture: whether a captured call may be replayed; None: not known, which counts as no.
        ranks: allowed numbers of dimensions of operand 0.
        last_multiple: operand 0's last dimension is a multiple of it.
        row_major_output: operand 0's matrices must not have a row stride of 1.
        single_batch_dtypes: dtypes in which 3-D operands with more than one matrix are wrong.
        alphas: the pairs (alpha, beta) that may be given at the call.
        unit_last_stride: operands whose last stride must be 1, be it checked or silently assumed.
        packed_heads: 3-D operands whose heads must lie one after the other, stride(1) == dim(2).
        contiguous: operands that must be contiguous.
        max_row_bytes: bytes of operand 0's last dimension at most.
        clobbers: operands that the call destroys although they are inputs.
        notes: what a person should know.
    """

    dtypes: tuple[str, ...]
    index_dtypes: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = ()
    since: str = ""
    uncertain: bool = False
    graph_capture: bool | None = None
    ranks: tuple[int, ...] = ()
    last_multiple: int | None = None
    row_major_output: bool = False
    single_batch_dtypes: tuple[str, ...] = ()
    alphas: tuple[tuple[float, float], ...] = ()
    unit_last_stride: tuple[int, ...] = ()
    packed_heads: tuple[int, ...] = ()
    contiguous: tuple[int, ...] = ()
    max_row_bytes: int | None = None
    clobbers: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


# The fields of OpSupport that limit how an op may be called, for whoever lists them.
CONSTRAINTS = (
    "ranks",
    "last_multiple",
    "row_major_output",
    "single_batch_dtypes",
    "alphas",
    "unit_last_stride",
    "packed_heads",
    "contiguous",
    "max_row_bytes",
    "clobbers",
)


@dataclass(frozen=True)
class Target:
    """One device type under one InfiniCore.

    Attributes:
        name: the record's name, a target or ``embedded``.
        device: the infiniDevice_t.
        graph_capture: streams can be captured and replayed.
        collectives: the functions of infiniccl that work.
        collective_dtypes: what they take; empty: no limit is known.
        collective_capture: captured collectives may be replayed; not known counts as no.
        block_size: tokens per block of a paged KV cache.
        host_memory: device memory is host memory, so weights are used where they are mapped.
    """

    name: str
    device: int
    ops: Mapping[str, OpSupport]
    graph_capture: bool
    collectives: tuple[str, ...]
    collective_dtypes: tuple[str, ...] = ()
    collective_capture: bool = False
    block_size: int = 16
    notes: tuple[str, ...] = ()

    @property
    def host_memory(self) -> bool:
        return self.device == 0

    def refusal(
        self,
        op: str,
        dtype: str,
        head_dim: int | None = None,
        *,
        rank: int | None = None,
        last_dim: int | None = None,
        row_bytes: int | None = None,
        batch: int | None = None,
        uncertain_ok: bool = False,
    ) -> str:
        """Why the op cannot be used here as described, or ``""`` if it can. What is not given is not looked at.

        Args:
            dtype: of operand 0.
            head_dim: size of a head.
            rank, last_dim, row_bytes: dimensions of operand 0, the size of its last one, and that size in bytes.
            batch: matrices per call.
            uncertain_ok: an uncertain op was asked for.
        """
        support = self.ops.get(op)
        if support is None:
            return f"{self.name} has no {op}"
        where = f"{op} on {self.name}"
        if support.uncertain and not uncertain_ok:
            return f"{where} is uncertain"
        if dtype not in support.dtypes:
            return f"{where} takes {', '.join(support.dtypes)}, not {dtype}"
        if head_dim is not None and support.head_dims and head_dim not in support.head_dims:
            return f"{where} takes head_dim {_listed(support.head_dims)}, not {head_dim}"
        if rank is not None and support.ranks and rank not in support.ranks:
            return f"{where} takes operands of rank {_listed(support.ranks)}, not {rank}"
        if last_dim is not None and support.last_multiple and last_dim % support.last_multiple:
            return f"{where} takes a last dimension that is a multiple of {support.last_multiple}, not {last_dim}"
        if row_bytes is not None and support.max_row_bytes and row_bytes > support.max_row_bytes:
            return f"{where} takes rows of at most {support.max_row_bytes} bytes, not {row_bytes}"
        if batch is not None and batch > 1 and dtype in support.single_batch_dtypes:
            return f"{where} takes one matrix per call in {dtype}, not {batch}"
        return ""

    def collective_refusal(self, collective: str, dtype: str) -> str:
        """Why infiniccl's function cannot be used here with this dtype, or ``""`` if it can."""
        if collective not in self.collectives:
            return f"{self.name} has no {collective}"
        if self.collective_dtypes and dtype not in self.collective_dtypes:
            return f"{collective} on {self.name} takes {', '.join(self.collective_dtypes)}, not {dtype}"
        return ""

    def as_of(self, date: str) -> Target:
        """This target under an InfiniCore of that day (ISO, exclusive): without the ops that came to main later."""
        name = "0.1.0" if date == RELEASE_0_1_0 else f"of {date}"
        missing = {
            op: f"{op} on {self.name} is not in InfiniCore {name} (there since {support.since}: --infinicore DIR for an installation that has it)"
            for op, support in self.ops.items()
            if support.since >= date
        }
        if not missing:
            return self
        ops = {op: support for op, support in self.ops.items() if op not in missing}
        given = {f.name: getattr(self, f.name) for f in fields(Target)}
        return PartialTarget(**{**given, "ops": ops}, missing=missing)


@dataclass(frozen=True)
class PartialTarget(Target):
    """A target under an InfiniCore that has not all of its record: what was taken away is refused with the reason.

    Attributes:
        missing: per op or collective that was taken away, why.
    """

    missing: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, op: str, *args: Any, **kwargs: Any) -> str:
        return self.missing.get(op) or super().refusal(op, *args, **kwargs)

    def collective_refusal(self, collective: str, dtype: str) -> str:
        return self.missing.get(collective) or super().collective_refusal(collective, dtype)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


# --- records --------------------------------------------------------------------------------------------------------------------------------------


def target_of(record: Mapping[str, Any]) -> Target:
    """A target from its record: what targets.json has under a name, with that ``name``.

    Raises:
        ConfigError: a key is missing or unknown, or a value is not what its key takes; names record, op and key.
    """
    name = record.get("name")
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"a target's record: name is {name!r}, expected an identifier")
    given = _checked(record, _RECORD, f"target {name}")
    missing = [k for k in ("device", "graph_capture", "collectives", "ops") if k not in record]
    if missing:
        raise ConfigError(f"target {name}: {missing[0]} is missing")
    ops = {}
    for op, raw in record["ops"].items():
        where = f"target {name}: {op}"
        if op not in OPERANDS:
            raise ConfigError(f"{where}: is no op; known are {', '.join(OPERANDS)}")
        if not isinstance(raw, Mapping) or not raw.get("dtypes"):
            raise ConfigError(f"{where}: dtypes is missing")
        support = OpSupport(**_checked(raw, _OP, where))
        for key in ("unit_last_stride", "packed_heads", "contiguous", "clobbers"):
            for operand in getattr(support, key):
                if operand >= len(OPERANDS[op]):
                    raise ConfigError(f"{where}: {key} names operand {operand}, of {len(OPERANDS[op])}")
        ops[op] = support
    return Target(**{**given, "ops": ops})


def record_of(target: Target) -> dict[str, Any]:
    """The record of a target as JSON has it, with its ``name``; what is free is left out. ``target_of`` is its inverse."""
    ops = {
        op: {
            f.name: _plain(getattr(support, f.name))
            for f in fields(OpSupport)
            if f.name == "dtypes" or getattr(support, f.name) != f.default
        }
        for op, support in target.ops.items()
    }
    return {
        **{f.name: _plain(getattr(target, f.name)) for f in fields(Target) if f.name != "ops"},
        "ops": ops,
    }


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list | tuple) else value


def _one_of(names: list[str] | tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda v: v in names


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive(value: Any) -> bool:
    return _natural(value) and value > 0


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _date(value: Any) -> bool:
    return isinstance(value, str) and (not value or [len(p) for p in value.split("-") if p.isdigit()] == [4, 2, 2])


def _pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list | tuple) and all(map(check, v)) and len({repr(x) for x in v}) == len(v)


# What the keys of a record and of its ops take: a check, and its words.
_DTYPES = (_list_of(_one_of(DTYPES)), "a list of dtypes")
_NUMBERS = (_list_of(_natural), "a list of numbers from 0")
_SIZES = (_list_of(_positive), "a list of numbers from 1")
_SIZE = (_positive, "a number from 1")
_BOOL = (_truth, "true or false")
_NOTES = (_list_of(_text), "a list of lines")
_Keys = Mapping[str, tuple[Callable[[Any], bool], str]]
_RECORD: _Keys = {
    "name": (_text, "a name"),
    "device": (_natural, "a number from 0"),
    "graph_capture": _BOOL,
    "collectives": (_list_of(_one_of(COLLECTIVES)), "a list of " + ", ".join(COLLECTIVES)),
    "collective_dtypes": _DTYPES,
    "collective_capture": _BOOL,
    "block_size": _SIZE,
    "notes": _NOTES,
    "ops": (lambda v: isinstance(v, Mapping), "an object with an op per key"),
}
_OP: _Keys = {
    "dtypes": _DTYPES,
    "index_dtypes": _DTYPES,
    "head_dims": _SIZES,
    "since": (_date, "a date as 2026-02-13"),
    "uncertain": _BOOL,
    "graph_capture": (lambda v: v is None or _truth(v), "true, false or null"),
    "ranks": _NUMBERS,
    "last_multiple": _SIZE,
    "row_major_output": _BOOL,
    "single_batch_dtypes": _DTYPES,
    "alphas": (_list_of(_pair), "a list of pairs of numbers"),
    "unit_last_stride": _NUMBERS,
    "packed_heads": _NUMBERS,
    "contiguous": _NUMBERS,
    "max_row_bytes": _SIZE,
    "clobbers": _NUMBERS,
    "notes": _NOTES,
}


def _checked(raw: Mapping[str, Any], keys: _Keys, where: str) -> dict[str, Any]:
    for key, value in raw.items():
        if key not in keys:
            raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(keys)}")
        check, expected = keys[key]
        if not check(value):
            raise ConfigError(f"{where}: {key} is {value!r}, expected {expected}")
    return {k: _tuple(v) for k, v in raw.items()}


def load(path: Path) -> dict[str, Target]:
    """The targets of a file that is written as targets.json is, by name.

    Raises:
        ConfigError: the file is not readable, no JSON, or a record in it is wrong.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict) or not all(isinstance(r, dict) for r in raw.values()):
        raise ConfigError(f"{path}: expected an object with a record per target")
    try:
        return {name: target_of({"name": name, **record}) for name, record in raw.items()}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


@cache
def targets() -> dict[str, Target]:
    """Every record of targets.json by name."""
    return load(Path(__file__).parent / "targets.json")


# The names that --target takes: every record's, in the order of their device numbers, but for our own library's.
TARGETS = [name for name in targets() if name != "embedded"]


def select(target: str, infinicore: str) -> Target:
    """The record for ``--target`` and ``--infinicore`` (``embedded``, ``any`` or a folder).

    ``any`` leaves out what the first release lacks, so the engine runs on every InfiniCore since. What a folder lacks is not known here (see codegen.installed).

    Raises:
        UnsupportedError: there is no such target.
    """
    if target not in TARGETS:
        raise UnsupportedError(f"unknown target {target!r}; targets are {', '.join(TARGETS)}")
    if infinicore == "embedded" and target == "cpu":
        return targets()["embedded"]
    if infinicore == "any":
        # The ops that every InfiniCore has with one meaning and one argument order.
        return targets()[target].as_of(RELEASE_0_1_0)
    return targets()[target]

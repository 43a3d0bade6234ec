"""Simulated devices of the embedded InfiniCore: records of what a device can do, as its library takes them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

from ir.errors import InfiniCoreError, UnsupportedError

# Fields of a record, and of an op in it, that say nothing about what the device refuses.
_INFORMATION = ("name", "device", "ops", "notes", "block_size", "since", "host_memory")


def _flag(value: Any) -> str:
    return str(int(value))


def _words(separator: str) -> Callable[[Any], str]:
    return lambda values: separator.join(str(v) for v in values)


def _pairs(values: Any) -> str:
    return ",".join(f"{alpha:g}:{beta:g}" for alpha, beta in values)


_RECORD_FIELDS: Mapping[str, Callable[[Any], str]] = {
    "graph_capture": _flag,
    "uncertain_ok": _flag,
    "collectives": _words(" "),
    "collective_dtypes": _words(" "),
    "collective_capture": _flag,
}
_OP_FIELDS: Mapping[str, Callable[[Any], str]] = {
    **dict.fromkeys(("dtypes", "index_dtypes", "single_batch_dtypes", "head_dims", "ranks"), _words(",")),
    **dict.fromkeys(("unit_last_stride", "packed_heads", "contiguous", "clobbers"), _words(",")),
    **dict.fromkeys(("last_multiple", "max_row_bytes"), str),
    **dict.fromkeys(("uncertain", "row_major_output", "graph_capture"), _flag),
    "alphas": _pairs,
}


def record_text(record: Mapping[str, Any]) -> str:
    """A record of passes/targets.json (with its ``name``) as ``infinicpuSimulate`` takes it.

    What is None or empty is left out: it limits nothing. ``uncertain_ok`` lets the ops that are marked as uncertain be
    used.

    Raises:
        UnsupportedError: a field that the simulator does not know.
    """
    lines = [f"device {record['device']} {record['name']}"]
    lines += [f"{key} {text}" for key, text in _known(record, _RECORD_FIELDS, record["name"])]
    for op, support in record["ops"].items():
        fields = [f"{key}={text}" for key, text in _known(support, _OP_FIELDS, f"{record['name']}: {op}")]
        lines.append(" ".join(["op", op, *fields]))
    return "\n".join(lines) + "\n"


def _known(record: Mapping[str, Any], fields: Mapping[str, Callable[[Any], str]], where: str) -> list[tuple[str, str]]:
    unknown = sorted(set(record) - set(fields) - set(_INFORMATION))
    if unknown:
        raise UnsupportedError(f"{where}: the simulator does not know {', '.join(unknown)}")
    return [(key, write(record[key])) for key, write in fields.items() if record.get(key) not in (None, [], ())]


def simulate(library: ctypes.CDLL | None, record: Mapping[str, Any] | None) -> None:
    """Register the record of one type of device with the embedded library, or with None forget all of them.

    Args:
        library: libinfinirt or libinfiniop of the embedded InfiniCore; None looks among what the process has loaded.

    Raises:
        UnsupportedError: the library is another InfiniCore, or the record has a field that is not known.
        InfiniCoreError: memory of such a device is allocated, or the record is wrong.
    """
    owner = ctypes.CDLL(None) if library is None else library
    if not hasattr(owner, "infinicpuSimulate"):
        raise UnsupportedError("only the embedded InfiniCore can simulate devices")
    text = None if record is None else record_text(record).encode()
    status = owner.infinicpuSimulate(text)
    if status:
        raise InfiniCoreError("infinicpuSimulate", status, last_violation(owner))


def last_violation(library: ctypes.CDLL | None) -> str:
    """What a simulated device refused last, since the last record was registered; "" if nothing was."""
    owner = ctypes.CDLL(None) if library is None else library
    function = owner.infinicpuSimulatorError
    function.restype = ctypes.c_char_p
    return str(function().decode())


__all__ = ["last_violation", "record_text", "simulate"]

"""Which symbols a shared library exports, read from its ELF .dynsym: a library for another machine, or for a device that is not here, cannot be loaded to ask."""

from __future__ import annotations

import struct
from pathlib import Path

from ir.errors import BuildError

_SHT_DYNSYM = 11
_SHN_UNDEF = 0
_BINDINGS = frozenset((1, 2, 10))  # global, weak, unique
_VISIBLE = frozenset((0, 3))  # default, protected

# By class (32 or 64 bit): e_shoff and what follows it, a section header, a symbol; as struct formats without the byte order.
_HEADER = {1: (32, "I4x6H"), 2: (40, "Q4x6H")}
_SECTION = {1: "10I", 2: "2I4Q2I2Q"}
_SYMBOL = {1: "3I2BH", 2: "I2BH2Q"}


def exported_symbols(path: Path) -> frozenset[str]:
    """The names that a library defines for others.

    Raises:
        BuildError: the file is not readable, or is no ELF file with dynamic symbols.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path}: cannot be read: {error.strerror}") from None
    if data[:4] != b"\x7fELF" or len(data) < 16 or data[4] not in (1, 2) or data[5] not in (1, 2):
        raise BuildError(f"{path}: is no shared library (ELF)")
    kind, order = data[4], "<>"[data[5] - 1]
    try:
        return frozenset(_symbols(data, kind, order))
    except (struct.error, IndexError, ValueError):
        raise BuildError(f"{path}: is cut off or damaged; its symbols cannot be read") from None


def _symbols(data: bytes, kind: int, order: str) -> list[str]:
    offset, layout = _HEADER[kind]
    start, _, _, _, size, count, _ = struct.unpack_from(order + layout, data, offset)
    section = struct.Struct(order + _SECTION[kind])
    headers = [section.unpack_from(data, start + i * size) for i in range(count)]
    symbol = struct.Struct(order + _SYMBOL[kind])
    found: list[str] = []
    tables = [h for h in headers if h[1] == _SHT_DYNSYM]
    if not tables:
        raise ValueError
    for _, _, _, _, at, length, link, _, _, _ in tables:
        strings = headers[link][4]
        for i in range(length // symbol.size):
            fields = symbol.unpack_from(data, at + i * symbol.size)
            name, info, other, where = fields[:4] if kind == 2 else (fields[0], *fields[3:])
            if where != _SHN_UNDEF and info >> 4 in _BINDINGS and other & 3 in _VISIBLE and name:
                found.append(data[strings + name : data.index(b"\0", strings + name)].decode())
    return found

"""What a shared library asks of others, read from its dynamic section: no binutils needed."""

import struct
from pathlib import Path
from typing import NamedTuple

NEEDED, STRTAB, RPATH, RUNPATH = 1, 5, 15, 29  # tags of dynamic entries
LOAD, DYNAMIC = 1, 2  # program headers
DYNSYM = 11  # a section's type


class Elf(NamedTuple):
    needed: list[str]
    paths: list[str]
    """Where it looks for what it needs, before the usual places."""
    undefined: list[str]


def read(path: Path) -> Elf:
    """Of a 64-bit little-endian library."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", path
    programs, sections = struct.unpack_from("<QQ", data, 32)
    size, count, section_size, section_count = struct.unpack_from("<4H", data, 54)
    headers = [struct.unpack_from("<2I6Q", data, programs + i * size) for i in range(count)]
    loads = [h for h in headers if h[0] == LOAD]

    def offset(address: int) -> int:
        _, _, at, start, *_ = next(h for h in loads if h[3] <= address < h[3] + h[5])
        return at + address - start

    def text(at: int) -> str:
        return data[strings + at : data.index(b"\0", strings + at)].decode()

    _, _, at, _, _, length, *_ = next(h for h in headers if h[0] == DYNAMIC)
    entries = [struct.unpack_from("<2Q", data, at + i) for i in range(0, length, 16)]
    strings = offset(dict(entries)[STRTAB])
    tables = (sections + i * section_size for i in range(section_count))
    kinds = (struct.unpack_from("<2I4Q", data, table) for table in tables)
    at, length = next((at, length) for _, kind, _, _, at, length in kinds if kind == DYNSYM)
    symbols = [struct.unpack_from("<I2BH", data, at + i) for i in range(0, length, 24)]
    return Elf(
        [text(value) for tag, value in entries if tag == NEEDED],
        [text(value) for tag, value in entries if tag in (RPATH, RUNPATH)],
        [text(name) for name, _, _, section in symbols if name and not section],
    )

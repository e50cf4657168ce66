"""Rows out of a damaged SQLite file: every leaf of a table that is left, wherever it lies, without what leads to it.

Reads the pages themselves, as https://www.sqlite.org/fileformat2.html describes them (section 1.6), so neither a lost
header nor a lost index matters.  Old and half-written rows come too: the caller must be able to tell what is whole.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

PAGE = 4096
"""Bytes of a page, of the files that are read here."""
_TABLE_LEAF = 0x0D
_FILE_HEADER = 100
"""Bytes in front of the first page's own."""


def rows(path: Path) -> Iterator[tuple[bytes, ...]]:
    """The columns of every row that can be made out, numbers and nulls left out.  Raises OSError."""
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for start in range(0, len(data) - PAGE + 1, PAGE):
                yield from _leaf(data, start)


def _leaf(data: mmap.mmap, start: int) -> Iterator[tuple[bytes, ...]]:
    head = start + (_FILE_HEADER if start == 0 else 0)
    if data[head] != _TABLE_LEAF:
        return
    cells = int.from_bytes(data[head + 3 : head + 5], "big")
    for place in range(head + 8, min(head + 8 + 2 * cells, start + PAGE - 1), 2):
        at = start + int.from_bytes(data[place : place + 2], "big")
        try:
            yield _columns(_payload(data, at, start + PAGE))
        except (IndexError, ValueError):  # no cell, or one whose pages are gone
            continue


def _payload(data: mmap.mmap, at: int, end: int) -> bytes:
    """The record of a cell, with what lies on its overflow pages.  ValueError where that cannot be."""
    size, at = _varint(data, at)
    _, at = _varint(data, at)  # its number
    most = PAGE - 35
    if size > len(data):
        raise ValueError("longer than the file")
    if size <= most:
        return _whole(data[at : min(at + size, end)], size)
    least = (PAGE - 12) * 32 // 255 - 23
    local = least + (size - least) % (PAGE - 4)
    local = local if local <= most else least
    parts, left = [_whole(data[at : min(at + local, end)], local)], size - local
    page = int.from_bytes(data[at + local : at + local + 4], "big")
    while left:
        if page < 1:
            raise ValueError("a chain that ends too early")
        start = (page - 1) * PAGE
        part = _whole(data[start + 4 : start + 4 + min(left, PAGE - 4)], min(left, PAGE - 4))
        parts.append(part)
        left -= len(part)
        page = int.from_bytes(data[start : start + 4], "big")
    return b"".join(parts)


def _columns(record: bytes) -> tuple[bytes, ...]:
    """The texts and blobs of a record.  ValueError or IndexError where it is none."""
    size, place = _varint(record, 0)
    kinds = []
    while place < size:
        kind, place = _varint(record, place)
        kinds.append(kind)
    found, at = [], size
    for kind in kinds:
        length = (kind - 12) // 2 if kind >= 12 else (0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0)[kind]
        if kind >= 12:
            found.append(_whole(record[at : at + length], length))
        at += length
    return tuple(found)


def _varint(data: mmap.mmap | bytes, at: int) -> tuple[int, int]:
    """(number, where the next thing begins)"""
    number = 0
    for index in range(8):
        byte = data[at + index]
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            return number, at + index + 1
    return number << 8 | data[at + 8], at + 9


def _whole(part: bytes, size: int) -> bytes:
    if len(part) != size:
        raise ValueError("cut off")
    return part

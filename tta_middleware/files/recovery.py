"""Output files of a batch: how lines are packed, and how a file that a kill has torn is taken up again."""

from __future__ import annotations

import gzip
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tta_middleware.errors import DataError
from tta_middleware.files.gzip import GZIP_WINDOW, Gunzip
from tta_middleware.files.jsonl import Record, dump, parse_object, recover
from tta_middleware.files.lines import LONGEST, Lines

_READ = 65536
_BEGIN = b'{"id": '
"""How every line of ours begins."""


def packed(path: Path, records: Sequence[Record]) -> bytes:
    """Records as they are added to ``path``: lines, and one gzip member if its name ends in ``.gz``."""
    lines = b"".join(dump(record).encode() + b"\n" for record in records)
    return gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines


def recovered(path: Path) -> Iterator[Record]:
    """The records of an earlier run, none without a file; the file is repaired when the iterator is used up.

    Raises:
        DataError: the file holds something else.
    """
    if not path.exists():
        return
    if path.suffix == ".gz":
        intact = _intact_members(path)
        yield from _unpacked(path, intact)
        os.truncate(path, intact)
    else:
        _cut_zeros(path)
        yield from recover(path)


def _unpacked(path: Path, intact: int) -> Iterator[Record]:
    """The records of the first ``intact`` bytes; what follows may hold whole lines, but they will be cut."""
    unpack, cut = Gunzip(str(path)), Lines()
    with path.open("rb") as file:
        while data := file.read(min(_READ, intact)):
            intact -= len(data)
            for number, raw in cut.feed(unpack.feed(data)):
                yield parse_object(raw or b"", f"{path}:{number}")
    for number, _ in cut.finish():
        raise DataError(f"{path}:{number}: the last line has no end; give another output")


def _intact_members(path: Path) -> int:
    """Bytes up to the end of the last whole gzip member.

    Raises:
        DataError: something else than what this module writes.
    """
    intact, at, member = 0, 0, _Member()
    with path.open("rb") as file:
        while data := file.read(_READ):
            while data:
                try:
                    rest = member.feed(data)
                except zlib.error:
                    _refuse_damage(path, intact)
                    return intact
                at, data = at + len(data) - len(rest), rest
                if member.whole:
                    intact, member = at, _Member()
    if not member.ours:
        _refuse_damage(path, intact)
    return intact


def _refuse_damage(path: Path, intact: int) -> None:
    """Zeros behind a torn member are what some file systems leave when the power goes; all else is damage.

    Raises:
        DataError: it is damage.
    """
    member = _Member()
    with path.open("rb") as file, suppress(zlib.error):
        if file.seek(0, os.SEEK_END) - file.seek(intact) <= LONGEST:
            member.feed(file.read().rstrip(b"\0"))
            if member.ours and not member.whole:
                return
    raise DataError(f"{path}: damaged, or not a gzip file of this command; give another output")


class _Member:
    """One gzip member on its way in."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(GZIP_WINDOW)
        self._begin = b""

    def feed(self, data: bytes) -> bytes:
        """Give back what lies behind the member's end."""
        self._begin = (self._begin + self._inflate.decompress(data))[: len(_BEGIN)]
        return self._inflate.unused_data

    @property
    def whole(self) -> bool:
        return self._inflate.eof

    @property
    def ours(self) -> bool:
        """Whether it begins as our lines do, as far as it goes."""
        return _BEGIN.startswith(self._begin)


def _cut_zeros(path: Path) -> None:
    """Cut the zeros that some file systems leave at the end of a file when the power goes."""
    with path.open("r+b") as file:
        if file.read(len(_BEGIN)).rstrip(b"\0") not in (_BEGIN, b""):
            return
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _READ)
            file.seek(start)
            kept = len(file.read(end - start).rstrip(b"\0"))
            end = start + kept
            if kept:
                break
        file.truncate(end)


def drop_errors(path: Path) -> None:
    """Write the file anew without the records that hold an error; a kill leaves either the old file or the new."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("wb") as file:
        for record in recovered(path):
            if "error" not in record:
                file.write(packed(path, [record]))
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(path, fresh)
    fresh.replace(path)

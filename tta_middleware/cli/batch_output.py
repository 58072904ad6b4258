"""Where the answers of a batch go: a file that survives a kill, or a stream."""

from __future__ import annotations

import gzip
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Protocol, TypeAlias

from filelock import FileLock, Timeout

from tta_middleware.cli.batch_input import GZIP_WINDOW, Gunzip
from tta_middleware.cli.batch_options import STDIO
from tta_middleware.cli.chunking import LONGEST, Lines
from tta_middleware.cli.output import emit
from tta_middleware.errors import ConfigurationError, DataError
from tta_middleware.evaluation.jsonl import Record, dump, parse_object, recover

Key: TypeAlias = tuple[str, str]
Done: TypeAlias = dict[Key, str]
"""The digest of the prompt that was answered, by what the record is known by; empty where none is on record."""

_READ = 65536
_BEGIN = b'{"id": '


class Output(Protocol):
    """Takes records.

    Attributes:
        name: for people.
        done: what is there already.
        lasting: whether a later run can go on from it.
    """

    name: str
    done: Done
    lasting: bool

    def open(self) -> None:
        """Get ready to write.

        Raises:
            ConfigurationError: it cannot be written to.
        """
        ...

    def write(self, records: Sequence[Record]) -> None:
        """Write records; when it returns they are safe."""
        ...


@contextmanager
def output_to(target: str, *, retry_errors: bool) -> Iterator[Output]:
    """The output that ``target`` names.

    Raises:
        ConfigurationError: another process writes to it, or it is in no folder.
        DataError: it holds something else than answers.
    """
    path = Path(target)
    if target == STDIO:
        yield _Stdout()
        return
    if path.is_dir():
        raise ConfigurationError(f"cannot write to {target}: Is a directory")
    with _Device(path) if path.exists() and not path.is_file() else _File(path, retry_errors=retry_errors) as output:
        yield output


class _Stdout:
    name, lasting = "stdout", False

    def __init__(self) -> None:
        self.done: Done = {}

    def open(self) -> None:
        pass

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            emit(record)


class _Appending:
    """A file that lines are added to."""

    lasting = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.done: Done = {}
        self._path = path
        self._stack = ExitStack()
        self._file: FileIO | None = None

    def open(self) -> None:
        try:
            self._file = self._stack.enter_context(self._path.open("ab", buffering=0))
        except OSError as error:
            raise ConfigurationError(f"cannot write to {self.name}: {error.strerror}") from None

    def write(self, records: Sequence[Record]) -> None:
        if self._file is None:
            raise ConfigurationError(f"{self.name} is not open")
        try:
            data = _packed(self._path, records)
            while data:
                data = data[self._file.write(data) :]
            self._keep(self._file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None

    def _keep(self, file: FileIO) -> None:
        """Nothing more to do."""

    def __enter__(self) -> _Appending:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class _Device(_Appending):
    """A named pipe or a device: no lock, nothing to go on from."""


class _File(_Appending):
    """One process writes at a time; every write reaches the disk; what a kill tore off is cut at the next start.

    In a ``.gz`` file each write is a gzip member of its own, so that what is whole can be told from what is torn.
    """

    lasting = True

    def __init__(self, path: Path, *, retry_errors: bool) -> None:
        super().__init__(path)
        self._path = path.resolve()
        self._retry_errors = retry_errors

    def __enter__(self) -> _File:
        self._lock()
        try:
            self._take_up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _keep(self, file: FileIO) -> None:
        os.fsync(file.fileno())

    def _lock(self) -> None:
        real = self._path
        if not real.parent.is_dir():
            raise ConfigurationError(f"cannot write to {self.name}: No such file or directory")
        lock = FileLock(real.with_name(f".{real.name}.lock"), timeout=0)
        try:
            self._stack.enter_context(lock.acquire())
        except Timeout:
            raise ConfigurationError(
                f"another process is writing to {self.name}; wait for it, or give another output"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"cannot write to {self.name}: {error.strerror}") from None

    def _take_up(self) -> None:
        failed = 0
        for number, record in enumerate(_recovered(self._path), start=1):
            if not {"answer", "error"} & record.keys():
                raise DataError(f"{self.name}:{number}: not an answer of this command; give another output")
            if self._retry_errors and "error" in record:
                failed += 1
            else:
                self.done[_key_of(record)] = str(record.get("input_hash", ""))
        if failed:
            _drop_errors(self._path)


def _key_of(record: Record) -> Key:
    return ("line", str(record["line"])) if "line" in record else ("id", str(record.get("id")))


def _packed(path: Path, records: Sequence[Record]) -> bytes:
    lines = b"".join(dump(record).encode() + b"\n" for record in records)
    return gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines


def _recovered(path: Path) -> Iterator[Record]:
    """The records of an earlier run; the file is repaired when the iterator is used up."""
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
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _READ)
            file.seek(start)
            kept = len(file.read(end - start).rstrip(b"\0"))
            end = start + kept
            if kept:
                break
        file.truncate(end)


def _drop_errors(path: Path) -> None:
    """Write the file anew without the records that hold an error; a kill leaves either the old file or the new."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("wb") as file:
        for record in _recovered(path):
            if "error" not in record:
                file.write(_packed(path, [record]))
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(path, fresh)
    fresh.replace(path)

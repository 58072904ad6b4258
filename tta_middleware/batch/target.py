"""Where the answers of a batch go: a file that survives a kill, or a stream."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Protocol, TypeAlias

from filelock import FileLock, Timeout

from tta_middleware.batch.input import Item
from tta_middleware.batch.shard import STDIO
from tta_middleware.batch.standard import emit
from tta_middleware.errors import ConfigurationError, DataError
from tta_middleware.files.jsonl import Record
from tta_middleware.files.recovery import drop_errors, packed, recovered

Key: TypeAlias = tuple[str, str]


@dataclass(slots=True)
class Done:
    """What the records of earlier runs say.

    Attributes:
        digests: of the prompt that was answered, by what the record is known by; empty where none is on record.
        failed: the records that are errors of prompts.
        broken: the records that are errors of lines which could not be read.
    """

    digests: dict[Key, str] = field(default_factory=dict)
    failed: set[Key] = field(default_factory=set)
    broken: set[Key] = field(default_factory=set)

    def add(self, record: Record) -> None:
        key = _key_of(record)
        self.digests[key] = str(record.get("input_hash", ""))
        if "error" in record:
            (self.broken if "line" in record else self.failed).add(key)

    def holds(self, item: Item, output: str) -> bool:
        """Whether there is a record for this line.

        Raises:
            DataError: it is that of another prompt.
        """
        digest = self.digests.get(item.key)
        if digest and item.digest and digest != item.digest:
            raise DataError(
                f"{item.where}: {output} holds the answer to another prompt under this line's id; "
                "give prompts ids of their own, or another output"
            )
        return digest is not None


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
        self.done = Done()

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
        self.done = Done()
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
            data = packed(self._path, records)
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
        with ExitStack() as undo:
            undo.callback(self._stack.close)
            try:
                self._take_up()
            except OSError as error:
                raise ConfigurationError(f"cannot go on with {self.name}: {error.strerror}") from None
            undo.pop_all()
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
        for number, record in enumerate(recovered(self._path), start=1):
            if not {"answer", "error"} & record.keys():
                raise DataError(f"{self.name}:{number}: not an answer of this command; give another output")
            if self._retry_errors and "error" in record:
                failed += 1
            else:
                self.done.add(record)
        if failed:
            drop_errors(self._path)


def _key_of(record: Record) -> Key:
    return ("line", str(record["line"])) if "line" in record else ("id", str(record.get("id")))

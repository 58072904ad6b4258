"""Bytes as they arrive from a file or a pipe, gzip or not."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Protocol

import anyio

from tta_middleware.errors import DataError

GZIP = b"\x1f\x8b"
GZIP_WINDOW = 31
"""zlib's word for a gzip header and trailer around the largest window."""

_READ = 65536


class Gunzip:
    """Passes bytes through, unpacked if they begin like gzip; several members in a row are one stream."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._head = b""
        self._sniffed = False
        self._inflate: zlib._Decompress | None = None

    def feed(self, data: bytes) -> bytes:
        """What ``data`` unpacks to so far.

        Raises:
            DataError: the gzip data is damaged.
        """
        if not self._sniffed:
            self._head += data
            if len(self._head) < len(GZIP):
                return b""
            self._sniffed, data = True, self._head
            self._inflate = zlib.decompressobj(GZIP_WINDOW) if data.startswith(GZIP) else None
        return data if self._inflate is None else b"".join(self._unpack(data))

    def finish(self) -> bytes:
        """The rest.

        Raises:
            DataError: the gzip data ends too early.
        """
        if self._inflate is not None and not self._inflate.eof:
            raise DataError(f"{self._name}: the gzip data is cut off")
        return b"" if self._sniffed else self._head

    def _unpack(self, data: bytes) -> Iterator[bytes]:
        try:
            while data:
                if self._inflate is None or self._inflate.eof:
                    data = data.lstrip(b"\0")  # padding, which gzip's own tools ignore
                    if not data:
                        return
                    self._inflate = zlib.decompressobj(GZIP_WINDOW)
                yield self._inflate.decompress(data)
                data = self._inflate.unused_data
        except zlib.error:
            raise DataError(f"{self._name}: the gzip data is damaged") from None


class Readable(Protocol):
    def read(self, size: int, /) -> bytes | None: ...

    def fileno(self) -> int: ...


class Reader:
    """Waits for a pipe without blocking the loop; a file never makes one wait."""

    def __init__(self, file: Readable, name: str) -> None:
        self._file, self._name = file, name
        self._waits = True

    async def read(self) -> bytes:
        """At most 64 KiB that are there; none at the end."""
        if self._waits:
            try:
                await anyio.wait_readable(self._file.fileno())
            except (OSError, ValueError):
                self._waits = False
        try:
            return self._file.read(_READ) or b""
        except OSError as error:
            raise DataError(f"{self._name}: reading failed: {error.strerror}") from None

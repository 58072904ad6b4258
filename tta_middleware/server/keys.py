"""API keys: only their digests are held, and comparing takes equally long for every key."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tta_middleware.errors import ConfigurationError
from tta_middleware.moderation.server import ApiError

VARIABLE = "TTA_API_KEYS"
"""The environment variable that keys are read from."""

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Keys:
    """Who may come in.

    Attributes:
        digests: SHA-256 of each key by the name that log lines have for it; without any, everybody may come in.
    """

    digests: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, text: str) -> Keys:
        """Keys of a text: one a line or between commas, as ``KEY`` or ``NAME KEY``; ``#`` begins a comment.

        ``sha256:`` and 64 hexadecimal digits stand for a key whose digest that is. Keys are random and long, so a plain
        digest is enough; it is no way to keep passwords.

        Raises:
            ConfigurationError: a line has other than one or two words, or two have one name.
        """
        digests: dict[str, bytes] = {}
        lines = [line.partition("#")[0].split() for line in re.split(r"[\n,]", text)]
        for number, words in enumerate(filter(None, lines), 1):
            name = words[0] if len(words) == 2 else f"key{number}"
            if len(words) > 2 or name in digests:
                raise ConfigurationError(f"API key {number}: write KEY or NAME KEY, with another name for each")
            digests[name] = _digest_in(words[-1])
        return cls(digests)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys of a file, at least one.

        Raises:
            ConfigurationError: it cannot be read or holds none.
        """
        try:
            keys = cls.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeError) as error:
            raise ConfigurationError(f"cannot read the API keys in {path}: {type(error).__name__}") from None
        if not keys.digests:
            raise ConfigurationError(f"{path} holds no API key; leave it out to let everybody in")
        return keys

    @classmethod
    def of_environment(cls) -> Keys:
        """The keys of :data:`VARIABLE`; none where it is not set.

        Raises:
            ConfigurationError: it is set and holds none, which may well be a mistake that would let everybody in.
        """
        text = os.environ.get(VARIABLE)
        keys = cls.parse(text or "")
        if text is not None and not keys.digests:
            raise ConfigurationError(f"{VARIABLE} is set and holds no API key; unset it to let everybody in")
        return keys

    def name_of(self, headers: Mapping[str, str]) -> str | None:
        """The name of the bearer's key; None where no key is needed.

        Raises:
            ApiError: the key is missing or not known.
        """
        if not self.digests:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip().encode("latin-1"))  # headers are read so: these are the bytes that came
        # Every key is compared, whether or not one matched already.
        matching = [name for name, known in self.digests.items() if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not matching:
            raise ApiError(
                401,
                "Incorrect API key provided"
                if given
                else "No API key provided; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
        return matching[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _digest_in(word: str) -> bytes:
    hashed = _HASHED.fullmatch(word)
    return bytes.fromhex(hashed[1]) if hashed else _digest(word.encode())

"""API keys, and what each may do: only their digests are held, and comparing takes equally long for every key."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import PositiveInt

from tta_middleware.config import Settings
from tta_middleware.errors import ConfigurationError
from tta_middleware.http_api import bearer, wrong_key
from tta_middleware.policy.live_file import LiveFile
from tta_middleware.server.request_log import logger

VARIABLE = "TTA_API_KEYS"
"""The environment variable that keys are read from."""

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")


class Rights(Settings):
    """What a key may do.

    Attributes:
        policy: the policy in force for it, by name; None leaves it to the model.
        allow: policies that it may choose with ``x-tta-policy`` in place of the server's ``allowed_policies``; where
            ``policy`` is set and this is not, it may choose none.
        models: the models that it may use; None all of them.
        concurrency: answers under way at once.
        max_tokens: most tokens of an answer for it; as the server's own limit.
        enforced: no policy that only observes may be in force for it.
    """

    policy: str | None = None
    allow: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    concurrency: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    enforced: bool = False


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request.

    Attributes:
        name: of the key; None where no key is needed.
    """

    name: str | None = None
    rights: Rights = field(default_factory=Rights)


class KeySource(Protocol):
    """Keys as they are now."""

    def get(self) -> Keys: ...


@dataclass(frozen=True, slots=True)
class Keys:
    """Who may come in.

    Attributes:
        digests: SHA-256 of each key by the name that log lines have for it; without any, everybody may come in.
        rights: of the keys that have other than every right.
    """

    digests: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    rights: Mapping[str, Rights] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Keys:
        """Keys of a text: one a line or between commas, as ``KEY``, or ``NAME KEY`` and its rights; ``#`` begins a
        comment.

        Rights are words such as ``policy=strict allow=strict allow=mild model=small concurrency=2 max_tokens=500
        enforced``. ``sha256:`` and 64 hexadecimal digits stand for a key whose digest that is. Keys are random and
        long, so a plain digest is enough; it is no way to keep passwords.

        Raises:
            ConfigurationError: a line cannot be read, or two keys have one name.
        """
        digests: dict[str, bytes] = {}
        rights: dict[str, Rights] = {}
        lines = [line.partition("#")[0].split() for line in re.split(r"[\n,]", text)]
        for number, words in enumerate(filter(None, lines), 1):
            name = words[0] if len(words) > 1 else f"key{number}"
            if name in digests:
                raise ConfigurationError(f"API key {number}: write KEY or NAME KEY, with another name for each")
            digests[name] = _digest_in(words[1] if len(words) > 1 else words[0])
            if len(words) > 2:
                rights[name] = _rights(number, words[2:])
        return cls(digests, rights)

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

    def get(self) -> Keys:
        """These keys, which never change."""
        return self

    def with_rights(self, rights: Mapping[str, Rights]) -> Keys:
        """These keys with rights that stand elsewhere.

        Raises:
            ConfigurationError: there is no such key, or its line has rights already.
        """
        for name in rights:
            if name not in self.digests:
                raise ConfigurationError(
                    f"[keys.{name}]: there is no API key of that name; write '{name} KEY' into the file of "
                    f"--api-keys, or into {VARIABLE}"
                )
            if name in self.rights:
                raise ConfigurationError(
                    f"[keys.{name}]: the key's own line has rights already; write them in one place"
                )
        return replace(self, rights={**self.rights, **rights})

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Whose key the bearer has.

        Raises:
            ApiError: the key is missing or not known.
        """
        if not self.digests:
            return Caller()
        given = bearer(headers)
        digest = _digest(given)
        # Every key is compared, whether or not one matched already.
        matching = [name for name, known in self.digests.items() if hmac.compare_digest(known, digest)]
        if not given or not matching:
            raise wrong_key(given)
        return Caller(matching[0], self.rights.get(matching[0], Rights()))


class KeyFile:
    """The keys of a file, up to date; see :class:`~tta_middleware.policy.live_file.LiveFile`.

    Args:
        rights: of keys by name, from elsewhere.

    Raises:
        ConfigurationError: the file cannot be read, or holds no key.
    """

    def __init__(self, path: Path, rights: Mapping[str, Rights] | None = None) -> None:
        self._rights = rights or {}
        self._check: Callable[[Keys], None] = lambda keys: None
        self._file = LiveFile(path, "API keys", self._parsed, lambda keys: frozenset(keys.digests))
        known = self._file.get().digests
        Keys(known).with_rights({name: one for name, one in self._rights.items() if name not in known})

    def get(self) -> Keys:
        """The keys as the file has them now."""
        return self._file.get()

    def check_with(self, check: Callable[[Keys], None]) -> None:
        """Have what keys are bound to looked at, now and whenever the file is read anew.

        A later file that names what is not there is taken all the same, with an error in the log: requests of that key
        are refused, while a key that was taken out has to be out.

        Raises:
            ConfigurationError: what ``check`` raises for the keys as they are.
        """
        check(self.get())
        self._check = check

    def _parsed(self, path: Path, content: bytes) -> Keys:
        try:
            keys = Keys.parse(content.decode("utf-8"))
        except UnicodeDecodeError:
            raise ConfigurationError(f"{path.name} is not UTF-8") from None
        if not keys.digests:
            raise ConfigurationError(f"{path.name} holds no API key; leave it out to let everybody in")
        # A key that is taken out of the file is out, whatever still names it.
        keys = keys.with_rights({name: one for name, one in self._rights.items() if name in keys.digests})
        try:
            self._check(keys)
        except ConfigurationError as error:
            logger.error("%s: %s", path.name, error)
        return keys


_MANY = {"allow": "allow", "model": "models"}


def _rights(number: int, words: list[str]) -> Rights:
    given: dict[str, Any] = {}
    for place, (name, value) in enumerate(_pairs(words), 3):
        if name in _MANY:
            given[_MANY[name]] = (*given.get(_MANY[name], ()), value)
        elif name in given or name not in Rights.model_fields:
            raise ConfigurationError(
                # Not the word itself, which may be the rest of a key with a blank in it: this goes to the log.
                f"API key {number}: word {place} of its line is no right, or stands twice; known are policy=, allow=, "
                "model=, concurrency=, max_tokens= and enforced, and keys have no blanks"
            )
        else:
            given[name] = value
    try:
        return Rights(**given)
    except ConfigurationError as error:
        raise ConfigurationError(f"API key {number}: {error}") from None


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    for word in words:
        name, equals, value = word.partition("=")
        yield (name, value) if equals else (name, "true" if name == "enforced" else "")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _digest_in(word: str) -> bytes:
    hashed = _HASHED.fullmatch(word)
    return bytes.fromhex(hashed[1]) if hashed else _digest(word.encode())

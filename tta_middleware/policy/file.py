"""Named policies in a TOML or YAML file that is read anew when it changes.

[policies.default]
threshold = 0.3
shadow = ["illicit"]

[policies.default.categories]
"self-harm" = 0.1

[policies.default.prompt]        # what differs for prompts; likewise output and repair
threshold = 0.6
on_error = "open"
"""

from __future__ import annotations

import difflib
import importlib
import logging
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tta_middleware.aio import process as _process
from tta_middleware.errors import ConfigurationError
from tta_middleware.policy import STAGES, StagePolicies

DEFAULT_NAME = "default"

_logger = logging.getLogger(__name__)


SETTLING = 0.5
"""Seconds since its last change in which a file may still be on its way to the disk."""


class PolicyFile:
    """The policies of a file, up to date.

    Every call reads the file, some tens of microseconds for a small one on a local disk, so the first call after a
    change has it whatever the file system's clock says. A change takes effect as a whole. A file that cannot be read
    or is not valid leaves the last good policies in force; :attr:`problem` and a warning in the log say so, and the
    next call tries again. So does one that looks half-written: changed within the last half second, and it differs
    between two reads, lacks the end of its last line or lacks a policy that there was.

    Args:
        path: ends in ``.toml``, ``.yaml`` or ``.yml``.
        clock: the time of day in seconds, as the file system has it; for tests.

    Attributes:
        problem: what is wrong with the file as it is now; None when it is in force.

    Raises:
        ConfigurationError: the file is unusable from the start.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self.problem: str | None = None
        self._clock = clock
        # The lock's holder alone reads the file and writes what follows; `get` takes one whole mapping without it.
        self._lock = _process.Lock()
        self._content = _read(self.path)
        self._refused: bytes | None = None
        self._policies = parse_policies(self.path, self._content)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy reads the file by itself, and has to find it where it is opened."""
        return PolicyFile, (self.path.absolute(),)

    def names(self) -> list[str]:
        """The policies in force, sorted."""
        self._refresh()
        return sorted(self._policies)

    def get(self, name: str = DEFAULT_NAME) -> StagePolicies:
        """The policies called ``name``, as the file has them now.

        Raises:
            ConfigurationError: there is no such name.
        """
        self._refresh()
        policies = self._policies
        if name not in policies:
            close = difflib.get_close_matches(name, policies, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(policies))}"
            raise ConfigurationError(f"no policy {name!r} in {self.path.name}; {hint}")
        return policies[name]

    def _refresh(self) -> None:
        with self._lock:
            try:
                content = _read(self.path)
                if content == self._content:
                    self._refused = self.problem = None
                elif content != self._refused:
                    self._consider(content)
            except ConfigurationError as error:
                self._keep(str(error))

    def _consider(self, content: bytes) -> None:
        try:
            policies = parse_policies(self.path, content)
        except ConfigurationError:
            self._refused = content
            raise
        if self._is_whole(content, policies):
            self._content, self._policies = content, policies
            self._refused = self.problem = None
            _logger.info("policies read from %s", self.path.name)

    def _is_whole(self, content: bytes, policies: Mapping[str, StagePolicies]) -> bool:
        if abs(self._clock() - _modified(self.path)) >= SETTLING:
            return True
        if _read(self.path) != content:
            return False
        return content.endswith(b"\n") and policies.keys() >= self._policies.keys()

    def _keep(self, problem: str) -> None:
        if problem != self.problem:
            _logger.warning("policies unchanged, the last good ones stay in force: %s", problem)
        self.problem = problem


def parse_policies(path: Path, content: bytes) -> dict[str, StagePolicies]:
    """All policies of a file with this content.

    Raises:
        ConfigurationError: it cannot be parsed, or a policy is not valid; names the policy and the setting.
    """
    document = _parse(path, content)
    tables = document.get("policies") if isinstance(document, dict) else None
    if not isinstance(tables, dict) or not tables or set(document) != {"policies"}:
        raise ConfigurationError(f"{path.name} must hold tables [policies.NAME] and nothing else")
    return {str(name): _named(path, str(name), table) for name, table in tables.items()}


def _read(path: Path) -> bytes:
    with _readable(path):
        return path.read_bytes()


def _modified(path: Path) -> float:
    with _readable(path):
        return path.stat().st_mtime


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"cannot read {path.name}: {error.strerror}") from None


def _named(path: Path, name: str, table: Any) -> StagePolicies:
    try:
        if not isinstance(table, dict) or not all(isinstance(table.get(stage, {}), dict) for stage in STAGES):
            raise ConfigurationError("a policy and its stages are tables")
        return StagePolicies.from_table(table)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path.name}, policy {name!r}: {error}") from None


def _parse(path: Path, content: bytes) -> Any:
    try:
        text = content.decode("utf-8")
        if path.suffix == ".toml":
            return tomllib.loads(text)
        return _parse_yaml(path, text)
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path.name} is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path.name} is not valid TOML: {error}") from None


def _parse_yaml(path: Path, text: str) -> Any:
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigurationError(f"{path.name} must end in .toml, .yaml or .yml")
    yaml: Any = importlib.import_module("yaml")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"{path.name}{where} is not valid YAML") from None


def policies_for(policy: Any, file: PolicyFile | None) -> StagePolicies:
    """What ``policy`` stands for: a value, a name in ``file``, or None for the file's default, else every default.

    Raises:
        ConfigurationError: no policy can be made of it, or it is a name that no file defines.
    """
    if policy is None and file is not None and DEFAULT_NAME in file.names():
        return file.get()
    if not isinstance(policy, str):
        return StagePolicies.of(policy)
    if file is None:
        raise ConfigurationError(f"the policy {policy!r} is a name; set policies= to the file that defines it")
    return file.get(policy)

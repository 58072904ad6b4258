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
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from tta_middleware.errors import ConfigurationError
from tta_middleware.policy import STAGES, StagePolicies

DEFAULT_NAME = "default"

_logger = logging.getLogger(__name__)


class PolicyFile:
    """The policies of a file, up to date.

    A change takes effect as a whole and at the next :meth:`get` that finds the file the same at two looks in a
    row, so that a half-written file is not taken for a short one. A file that cannot be read or is not valid
    leaves the last good policies in force; :attr:`problem` and a warning in the log say so.

    Args:
        path: ends in ``.toml``, ``.yaml`` or ``.yml``.
        check_every: seconds between two looks at the file.
        clock: in seconds; for tests.

    Attributes:
        problem: what is wrong with the file as it is now; None when it is in force.

    Raises:
        ConfigurationError: the file is unusable from the start.
    """

    def __init__(
        self, path: str | Path, *, check_every: float = 0.5, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = Path(path)
        self.problem: str | None = None
        self._check_every = check_every
        self._clock = clock
        self._lock = threading.Lock()
        self._checked = clock()
        self._applied = self._seen = _signature(self.path)
        self._policies = load_policies(self.path)

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

    def reload(self) -> None:
        """Read the file now, whether or not it looks changed."""
        with self._lock:
            self._apply(_signature(self.path))

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._checked < self._check_every:
            return
        with self._lock:
            self._checked = now
            signature = _signature(self.path)
            settled, self._seen = signature == self._seen, signature
            if settled and signature != self._applied:
                self._apply(signature)

    def _apply(self, signature: Signature) -> None:
        self._applied = signature
        try:
            self._policies = load_policies(self.path)
        except ConfigurationError as error:
            self.problem = str(error)
            _logger.warning("policies unchanged, the last good ones stay in force: %s", error)
        else:
            self.problem = None
            _logger.info("policies read from %s", self.path.name)


def load_policies(path: Path) -> dict[str, StagePolicies]:
    """All policies of a file.

    Raises:
        ConfigurationError: the file cannot be read, or a policy is not valid; names the policy and the setting.
    """
    document = _parse(path)
    tables = document.get("policies") if isinstance(document, dict) else None
    if not isinstance(tables, dict) or not tables or set(document) != {"policies"}:
        raise ConfigurationError(f"{path.name} must hold tables [policies.NAME] and nothing else")
    return {str(name): _named(path, str(name), table) for name, table in tables.items()}


def _named(path: Path, name: str, table: Any) -> StagePolicies:
    try:
        if not isinstance(table, dict) or not all(isinstance(table.get(stage, {}), dict) for stage in STAGES):
            raise ConfigurationError("a policy and its stages are tables")
        return StagePolicies.from_table(table)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path.name}, policy {name!r}: {error}") from None


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            return tomllib.loads(text)
        return _parse_yaml(path, text)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path.name}: {error.strerror}") from None
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


Signature: TypeAlias = tuple[int, int, int] | None


def _signature(path: Path) -> Signature:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino

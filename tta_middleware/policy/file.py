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
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tta_middleware.errors import ConfigurationError
from tta_middleware.policy import STAGES, StagePolicies
from tta_middleware.policy.live_file import LiveFile

DEFAULT_NAME = "default"


class PolicyFile:
    """The policies of a file, up to date; see :class:`~tta_middleware.policy.live_file.LiveFile`.

    Args:
        path: ends in ``.toml``, ``.yaml`` or ``.yml``.
        clock: the time of day in seconds, as the file system has it; for tests.

    Raises:
        ConfigurationError: the file is unusable from the start.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self._file = LiveFile(self.path, "policies", parse_policies, frozenset, clock)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy reads the file by itself, and has to find it where it is opened."""
        return PolicyFile, (self.path.absolute(),)

    @property
    def problem(self) -> str | None:
        """What is wrong with the file as it is now; None when it is in force."""
        return self._file.problem

    def names(self) -> list[str]:
        """The policies in force, sorted."""
        return sorted(self._file.get())

    def get(self, name: str = DEFAULT_NAME) -> StagePolicies:
        """The policies called ``name``, as the file has them now.

        Raises:
            ConfigurationError: there is no such name.
        """
        policies = self._file.get()
        if name not in policies:
            close = difflib.get_close_matches(name, policies, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(policies))}"
            raise ConfigurationError(f"no policy {name!r} in {self.path.name}; {hint}")
        return policies[name]


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

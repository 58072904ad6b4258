"""What an operator decides: limits, who may come in, which policies a client may choose, and the models."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from tta_middleware.assembly import Runtime
from tta_middleware.chat_model import TTAChatModel
from tta_middleware.config import Settings, explain, refuse_unknown
from tta_middleware.errors import ConfigurationError
from tta_middleware.server.answering import ServedModel
from tta_middleware.server.keys import Rights
from tta_middleware.server.upstream import UpstreamModel, UpstreamSettings
from tta_middleware.telemetry import TelemetrySettings


class Limits(Settings):
    """What requests may cost, and how many are under way.

    Attributes:
        body_bytes: larger bodies get 413.
        concurrency: places: answers that are made at once.
        queue: further ones that wait for a place; those beyond get 429.
        checks: requests for checks and moderations that are answered at once; as many may wait for a place.
        retry_after: seconds that a 429 asks a client to wait.
        seconds: a request's deadline, its time in the queue and a slow reader's time included.
        choices: most answers that one request may ask for with ``n``, each of which takes a place.
        max_tokens: most tokens of an answer: who asks for more is refused, who asks for none gets no more; None leaves
            it to the model.
        drain_seconds: how long requests under way get to end when the server is told to stop.
    """

    body_bytes: PositiveInt = 4_194_304
    concurrency: PositiveInt = 16
    queue: NonNegativeInt = 64
    checks: PositiveInt = 64
    retry_after: PositiveInt = 1
    seconds: PositiveFloat = 300.0
    choices: PositiveInt = 8
    max_tokens: PositiveInt | None = None
    drain_seconds: PositiveInt = 30


class ServerSettings(Settings):
    """A server's settings beside its models.

    Attributes:
        keys: what keys may do, by their names; a key's own line may say so instead.
        allowed_policies: names in the models' policy files that a client may choose with ``x-tta-policy``.
        show_trace: whether answers carry the trace in their field ``tta``.
        playground: whether there is a page at ``/`` to try the models with.
        telemetry: spans, metrics and ``GET /metrics`` (extra ``otel``); None tells nobody.
    """

    limits: Limits = Field(default_factory=Limits)
    keys: Mapping[str, Rights] = Field(default_factory=dict)
    allowed_policies: tuple[str, ...] = ()
    show_trace: bool = True
    playground: bool = True
    telemetry: TelemetrySettings | None = None


def read_server_file(path: Path) -> tuple[ServerSettings, dict[str, ServedModel]]:
    """Settings of a TOML file by the names of :class:`ServerSettings`, and its models, ``[models.NAME]``.

    Raises:
        ConfigurationError: the file cannot be read, or a setting is unknown or unusable.
    """
    document = _document(path)
    refuse_unknown(path.name, document, [*ServerSettings.model_fields, "models"])
    tables = document.pop("models", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigurationError(f"{path.name}: models are tables [models.NAME]")
    return ServerSettings(**document), build_models(tables)


def build_models(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, ServedModel]:
    """Models by name from their settings; they share engines and moderators of the same kind.

    A table with ``upstream`` is a model of another server (:class:`UpstreamSettings`), any other one of this process.

    Raises:
        ConfigurationError: a setting is unknown or unusable; names the model.
    """
    shared = Runtime()
    local = {name: _local(name, table, shared) for name, table in tables.items() if "upstream" not in table}
    return {
        name: local[name] if name in local else _upstream(name, table, shared, local) for name, table in tables.items()
    }


_FAR = frozenset(UpstreamSettings.model_fields) - frozenset(TTAChatModel.model_fields) - {"timeout"}
"""What only a model of another server has."""


def _local(name: str, table: Mapping[str, Any], runtime: Runtime) -> TTAChatModel:
    if far := [setting for setting in table if setting in _FAR]:
        raise ConfigurationError(
            f"model {name!r}: {far[0]} is for a model of another server; name that, too: upstream = 'http://.../v1'"
        )
    try:
        return TTAChatModel(**table, runtime=runtime)
    except ValidationError as error:
        raise ConfigurationError(explain(f"model {name!r}", error)) from None
    except ConfigurationError as error:
        raise ConfigurationError(f"model {name!r}: {error}") from None


def _upstream(
    name: str, table: Mapping[str, Any], runtime: Runtime, local: Mapping[str, TTAChatModel]
) -> UpstreamModel:
    try:
        settings = UpstreamSettings(**table)
        return UpstreamModel(settings, runtime=runtime, stand_in=local.get(settings.hand_over or ""))
    except ValueError as error:
        raise ConfigurationError(f"model {name!r}: {error}") from None


def _document(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigurationError(f"{path.name} is not valid TOML: {error}") from None

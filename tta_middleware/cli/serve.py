"""``tta serve``: guarded models in OpenAI's protocol; ``tta serve-moderation``: the moderator alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tta_middleware.cli import options as opt
from tta_middleware.defaults import DEFAULT_METHOD

if TYPE_CHECKING:
    from tta_middleware.policy import Policy
    from tta_middleware.server.keys import KeySource
    from tta_middleware.server.settings import ServerSettings

MAX_NEW_TOKENS = 256
"""Longest answer of the models that options name."""

_MODEL = "A model by the name that clients use: smollm2, a local folder, or a Hugging Face id; may be repeated."
_UPSTREAM = (
    "A server that speaks OpenAI's protocol, guarded: URL with its path, by the name that clients use ('upstream' "
    "without one); its key is TTA_UPSTREAM_API_KEY; may be repeated. Alone, no model is loaded here."
)
_UPSTREAM_MODEL = "What the upstream calls the model; by default the name that clients use."
_HAND_OVER = "The model of this server that answers where an upstream's answer is flagged; by default it is blocked."
_CONFIG = "A TOML file with limits, allowed_policies and [models.NAME] (docs/server.md); options here win."
_KEYS = (
    "A file of API keys, KEY or NAME KEY a line, read anew when it changes; by default those of TTA_API_KEYS; without "
    "any, everybody may come in."
)
_ALLOW = "A policy that clients may choose with the header x-tta-policy; may be repeated."
_PLAYGROUND = "Whether a page at / lets people try the models; on by default."
_TELEMETRY = "OpenTelemetry's spans and metrics, and GET /metrics for Prometheus (docs/telemetry.md; extra otel)."
_METRICS_OPEN = "GET /metrics takes no API key; implies --telemetry."
_OBSERVE = (
    "Score and report everything and withhold nothing; answers carry x-tta-mode: observe. A file of policies says "
    "mode = 'observe' itself."
)
_DEADLINE = "Seconds after which a request ends, its time in the queue included."


def serve(
    model: Annotated[list[str] | None, typer.Option("--model", "-m", metavar="NAME=REF", help=_MODEL)] = None,
    upstream: Annotated[list[str] | None, typer.Option(metavar="[NAME=]URL", help=_UPSTREAM)] = None,
    upstream_model: Annotated[str | None, typer.Option(metavar="NAME", help=_UPSTREAM_MODEL)] = None,
    hand_over: Annotated[str | None, typer.Option(metavar="NAME", help=_HAND_OVER)] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE.toml", help=_CONFIG)] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080,
    moderator: opt.Moderator = "local",
    method: opt.Method = DEFAULT_METHOD,
    threshold: opt.Threshold = None,
    max_new_tokens: opt.MaxNewTokens = MAX_NEW_TOKENS,
    prompt_check: opt.PromptCheckOption = "off",
    observe: Annotated[bool, typer.Option("--observe", help=_OBSERVE)] = False,
    policies: Annotated[Path | None, typer.Option(metavar="FILE", help="Named policies, in TOML or YAML.")] = None,
    allow_policy: Annotated[list[str] | None, typer.Option(metavar="NAME", help=_ALLOW)] = None,
    api_keys: Annotated[Path | None, typer.Option(metavar="FILE", help=_KEYS)] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Answers under way at once.")] = None,
    queue: Annotated[int | None, typer.Option(min=0, help="Requests that wait for that; more get 429.")] = None,
    deadline: Annotated[float | None, typer.Option(min=0.001, help=_DEADLINE)] = None,
    playground: Annotated[bool | None, typer.Option("--playground/--no-playground", help=_PLAYGROUND)] = None,
    telemetry: Annotated[bool, typer.Option("--telemetry", help=_TELEMETRY)] = False,
    metrics_open: Annotated[bool, typer.Option("--metrics-open", help=_METRICS_OPEN)] = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    allow_download: opt.AllowDownload = False,
    engine_option: opt.EngineOptions = None,
) -> None:
    """Serve guarded models in OpenAI's protocol, until Ctrl-C or SIGTERM; logs are JSON lines on stderr.

    With OPENAI_BASE_URL=http://HOST:PORT/v1 the openai client and everything built on it uses these models.
    """
    from tta_middleware.cli.typed import engine_options
    from tta_middleware.server import running
    from tta_middleware.server.app import create_app
    from tta_middleware.server.settings import build_models, read_server_file

    policy = _policy(threshold, observe, policies)
    guard = {"moderator": moderator, "policy": policy, "prompt_check": prompt_check, "policies": policies}
    own = guard | {
        "method": method,
        "max_new_tokens": max_new_tokens,
        "device": device,
        "dtype": dtype,
        "allow_download": allow_download,
        "engine_options": engine_options(engine_option),
    }
    settings, models = read_server_file(config) if config else (_nothing(), {})
    behind = {"upstream_model": upstream_model, "hand_over": hand_over, **guard}
    tables = _tables(models, model or [], own, upstream or [], behind)
    _refuse_unused(own | behind, tables)
    models |= build_models(tables)
    limits = {"concurrency": concurrency, "queue": queue, "seconds": deadline}
    settings = _telling(_with(settings, limits, allow_policy or [], playground), telemetry, open_=metrics_open)
    app = create_app(models, settings, keys=_keys(api_keys, settings))
    running.serve(app, settings, host=host, port=port)


def _policy(threshold: float | None, observe: bool, policies: Path | None) -> Policy | float | None:
    """Raises ConfigurationError where two places would say whether the policy is enforced."""
    from tta_middleware.errors import ConfigurationError
    from tta_middleware.policy import Policy

    if observe and policies is not None:
        raise ConfigurationError("--observe and --policies: set mode = 'observe' in the file's policy")
    return Policy(threshold=threshold, mode="observe") if observe else threshold


def _tables(
    known: Collection[str], model: list[str], own: Mapping[str, Any], upstream: list[str], behind: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Settings by name of the models that options name; the embedded one where nothing is named at all."""
    named = _named("--model", model or ([] if known or upstream else ["smollm2"]), known)
    tables = {name: {"model": reference, **own} for name, reference in named.items()}
    urls = _named("--upstream", [_with_name(text) for text in upstream], [*known, *tables])
    return tables | {name: {"upstream": url, **behind} for name, url in urls.items()}


_UNASKED: Final[Mapping[str, Any]] = {
    "moderator": "local",
    "prompt_check": "off",
    "method": DEFAULT_METHOD,
    "max_new_tokens": MAX_NEW_TOKENS,
    "device": "auto",
    "dtype": "auto",
    "allow_download": False,
    "engine_options": {},
}
"""What models are given where no option says anything; None of other settings."""


def _refuse_unused(given: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ConfigurationError where an option is given that goes to no model: its user believes in its effect."""
    from tta_middleware.errors import ConfigurationError

    used = {name for table in tables.values() for name in table}
    unused = [name for name, value in given.items() if name not in used and value != _UNASKED.get(name)]
    if unused:
        option = {"policy": "--threshold or --observe", "engine_options": "--engine-option"}.get(
            unused[0], f"--{unused[0].replace('_', '-')}"
        )
        raise ConfigurationError(
            f"{option} is for models that --model or --upstream names, and is of no use to those that are served; "
            "models of a settings file have it in their own table"
        )


def _with_name(upstream: str) -> str:
    """``NAME=URL``; an address alone may hold equals signs, too."""
    return f"upstream={upstream}" if upstream.startswith(("http://", "https://")) else upstream


def _named(option: str, given: list[str], known: Collection[str]) -> dict[str, str]:
    """References by name; a reference alone is its own name.

    Raises:
        ConfigurationError: a name is empty, or given twice.
    """
    from tta_middleware.errors import ConfigurationError

    named: dict[str, str] = {}
    for text in given:
        name, equals, reference = text.partition("=")
        if not name or name in named or name in known:
            raise ConfigurationError(f"{option} {text}: write NAME=REF, with another name for each model")
        named[name] = reference if equals else text
    return named


def _nothing() -> ServerSettings:
    from tta_middleware.server.settings import ServerSettings

    return ServerSettings()


def _with(
    settings: ServerSettings, limits: dict[str, Any], allowed: list[str], playground: bool | None
) -> ServerSettings:
    given = {name: value for name, value in limits.items() if value is not None}
    policies = (*settings.allowed_policies, *(name for name in allowed if name not in settings.allowed_policies))
    page = settings.playground if playground is None else playground
    limits_in_force = settings.limits.model_copy(update=given)
    return settings.model_copy(update={"limits": limits_in_force, "allowed_policies": policies, "playground": page})


def _telling(settings: ServerSettings, wanted: bool, *, open_: bool) -> ServerSettings:
    """With telemetry where an option asks for it; the file's own settings stay."""
    from tta_middleware.telemetry import TelemetrySettings

    if not wanted and not open_:
        return settings
    given = settings.telemetry or TelemetrySettings()
    chosen = given.model_copy(update={"metrics_open": open_ or given.metrics_open})
    return settings.model_copy(update={"telemetry": chosen})


def _keys(path: Path | None, settings: ServerSettings) -> KeySource:
    from tta_middleware.server.keys import KeyFile, Keys

    return KeyFile(path, settings.keys) if path else Keys.of_environment().with_rights(settings.keys)


def serve_moderation(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8081,
    moderator: opt.Moderator = "local",
) -> None:
    """Serve /v1/moderations in OpenAI's format, until Ctrl-C; `tta serve` has it beside the models.

    With OPENAI_BASE_URL=http://HOST:PORT/v1 the openai client and everything built on it uses this moderator.
    """
    from tta_middleware.moderation.server import serve
    from tta_middleware.profiles.store import judge_calibration
    from tta_middleware.registry import resolve_moderator

    serve(host=host, port=port, moderator=resolve_moderator(moderator, calibration=judge_calibration))

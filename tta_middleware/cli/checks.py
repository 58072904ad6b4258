"""The checks of ``tta doctor``. Versions are read from metadata, so nothing heavy is imported."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tta_middleware.aio import bridge
from tta_middleware.cli.output import say
from tta_middleware.defaults import PASSIVE, WAIT_POLICY
from tta_middleware.errors import ConfigurationError, TTAError
from tta_middleware.evaluation.environment import installed_version
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.protocols import Engine, ReasoningEngine, ToolEngine
from tta_middleware.registry import asks_own, judging_model, moderators_in, resolve_engine, resolve_moderator
from tta_middleware.types import Message

_LOCAL = ("torch", "transformers", "safetensors", "gguf")
_CORE = ("tta-middleware", "langchain-core", "openai", "numpy", "pydantic", "anyio")
_EXTRAS = {"agents": ("langchain", "langgraph"), "server": ("starlette", "uvicorn")}
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


@dataclass(frozen=True, slots=True)
class DoctorCheck:
    """One finding; ``fix`` is what to do where the status is not ``ok``."""

    name: str
    status: Literal["ok", "hint", "warn", "fail"]
    detail: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        return {key: value for key, value in asdict(self).items() if value}


def run(model: str, moderator: str, *, online: bool, judging: bool, wait_policy: str | None) -> list[DoctorCheck]:
    """Everything that the main job needs, then what is good to know."""
    return [
        DoctorCheck("python", "ok", f"{platform.python_version()} ({sys.executable})"),
        DoctorCheck("packages", "ok", _versions(_CORE)),
        *_local_packages(),
        _model(model),
        _moderator(model, moderator, online=online),
        *_judging(model, moderator, judging=judging),
        _wait_policy(wait_policy),
        DoctorCheck("cpu", "ok", _cpu()),
        *_extras(),
    ]


def show(found: list[DoctorCheck]) -> None:
    """One line per check, and one more for what to do."""
    width = max(len(check.name) for check in found)
    for check in found:
        say(f"{check.status:4}  {check.name:{width}}  {check.detail}")
        if check.fix:
            say(f"{'':{width + 8}}{check.fix}")


def _versions(packages: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {installed_version(name) or 'missing'}" for name in packages)


def _local_packages() -> Iterator[DoctorCheck]:
    missing = [name for name in _LOCAL if installed_version(name) is None]
    detail = _versions(_LOCAL)
    if missing:
        yield DoctorCheck("local models", "fail", detail, 'run: pip install "tta-middleware[local]"')
    else:
        yield DoctorCheck("local models", "ok", detail)


def _model(reference: str) -> DoctorCheck:
    from tta_middleware.engines.models import describe_model

    try:
        info = describe_model(reference)
    except TTAError as error:
        return DoctorCheck("model", "fail", str(error))
    if info.source is None:
        return DoctorCheck("model", "fail", f"{reference} is not on this machine", f"run: {info.install}")
    size = f", {info.size_bytes / 2**20:.0f} MiB" if info.size_bytes else ""
    if not info.ready:
        fix = "nothing to do: it is converted once, at first use, which takes about half a minute"
        return DoctorCheck("model", "hint", f"{reference} from {info.source}{size}; not converted yet", fix)
    return DoctorCheck("model", "ok", f"{reference} in {info.folder or info.source}{size}")


def way(reference: str, options: Mapping[str, Any] | None = None) -> list[DoctorCheck]:
    """Which way a model that is here runs, and why; nothing of engines that have no ways. It is loaded for that.

    What its chat template takes is said as well; a model that cannot be asked anything (a base model has none) fails.
    """
    if _model(reference).status == "fail":
        return []
    try:
        engine = resolve_engine(reference, **(options or {}))
        if not hasattr(engine, "way"):
            return []
        try:
            path, why = bridge.run(engine.way)
            bridge.run(partial(engine.embed, [Message("user", "Hello")]))
            template = bridge.run(partial(_template, engine))
        finally:
            bridge.run(engine.aclose)
    except TTAError as error:
        return [DoctorCheck("engine", "fail", f"{type(error).__name__}: {' '.join(str(error).split())}")]
    return [DoctorCheck("engine", "ok", f"{path}: {why}"), DoctorCheck("template", "ok", template)]


async def _template(engine: Engine) -> str:
    """What a model's chat template says of thoughts and tools."""
    thinks = isinstance(engine, ReasoningEngine) and await engine.thinks()
    tools: str
    try:
        tools = await engine.tool_format() if isinstance(engine, ToolEngine) else "not taken"
    except ConfigurationError as error:
        tools = f"not taken, for {error}"
    return f"thoughts: {'told apart' if thinks else 'no marks of any'}; tools: {tools}"


def _moderator(model: str, name: str, *, online: bool) -> DoctorCheck:
    try:
        if asked := _models(model, name):
            return DoctorCheck("moderator", "ok", f"{name} asks {', '.join(asked)}, in this process")
        if not online and name != "local":
            return _not_called(name)
        moderator = resolve_moderator(name)
        verdict = bridge.run(partial(verdicts_on, moderator, ["Hello, how are you?"]))[0]
        bridge.run(moderator.aclose)
    except (TTAError, ImportError, OSError) as error:
        return DoctorCheck("moderator", "fail", f"{type(error).__name__}: {' '.join(str(error).split())}")
    return DoctorCheck(
        "moderator",
        "ok",
        f"{moderator.name} answers: {verdict.score:.3f} for a greeting, flagged from {moderator.default_threshold} on",
    )


def _models(model: str, moderator: str) -> list[str]:
    """The models of this process that a moderator of that name asks; ``self`` is ``model``.

    Raises:
        ConfigurationError: it is unknown.
    """
    own = [model] if asks_own(moderator) else []
    asked = [judging_model(name) for name in moderators_in(moderator)]
    return own + [reference for reference in asked if reference is not None]


def _judging(model: str, moderator: str, *, judging: bool) -> Iterator[DoctorCheck]:
    """How well the models judge that a moderator of that name asks, and ``model``, where that is wanted."""
    from tta_middleware.cli.judging_check import judging_report

    try:
        asked = _models(model, moderator)
    except ConfigurationError:
        asked = []  # the moderator's check says so
    for reference in dict.fromkeys([*asked, *([model] if judging else [])]):
        try:
            report = judging_report(reference)
        except (TTAError, ImportError, OSError) as error:
            yield DoctorCheck("judge", "fail", f"{reference}: {' '.join(str(error).split())}")
        else:
            status: Literal["ok", "hint", "warn"] = "warn" if report.poor else "hint" if report.advice else "ok"
            yield DoctorCheck("judge", status, str(report), report.advice)


def _not_called(name: str) -> DoctorCheck:
    """Nothing goes to the network unasked; what can be seen from here is whether the key is there."""
    if name == "openai" and not os.environ.get("OPENAI_API_KEY"):
        return DoctorCheck("moderator", "fail", "openai: no key", "set OPENAI_API_KEY")
    where = f" at {os.environ.get('OPENAI_BASE_URL') or 'the public API'}; a key is set" if name == "openai" else ""
    return DoctorCheck("moderator", "hint", f"{name}{where}; not called", "add --online to make one call")


def _wait_policy(chosen: str | None) -> DoctorCheck:
    if (chosen or "").upper() == PASSIVE:
        return DoctorCheck("openmp", "ok", f"{WAIT_POLICY}={PASSIVE}")
    detail = f"{WAIT_POLICY} is {chosen or 'not set'}; spinning threads stall decoding when a neighbour is busy"
    fix = f"in programs of your own: export {WAIT_POLICY}={PASSIVE} before torch is imported (tta does so where unset)"
    return DoctorCheck("openmp", "hint", detail, fix)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    words = set(info.read_text(encoding="utf-8", errors="replace").split()) if info.exists() else set()
    features = [flag for flag in _CPU_FLAGS if flag in words]
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {' '.join(features) or 'features unknown'}"


def _extras() -> Iterator[DoctorCheck]:
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            fix = f'if you need it: pip install "tta-middleware[{extra}]"'
            yield DoctorCheck(f"extra {extra}", "hint", f"{', '.join(missing)} missing", fix)
        else:
            yield DoctorCheck(f"extra {extra}", "ok", "installed")

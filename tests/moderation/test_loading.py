"""What a moderator needs is found out when it is loaded, whatever stands around it; nothing is scored for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tta_middleware import TTAChatModel
from tta_middleware.errors import ConfigurationError, ModeratorSetupError
from tta_middleware.moderation.adapters.azure import AzureContentSafetyModerator
from tta_middleware.moderation.cascade import Cascade
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.moderation.ensemble import Ensemble
from tta_middleware.moderation.fallback import WithFallback
from tta_middleware.moderation.llm_judge import LLMJudge
from tta_middleware.moderation.openai import OpenAIModerator
from tta_middleware.moderation.stack import production_moderator
from tta_middleware.policy.verdicts import load
from tta_middleware.protocols import Moderator
from tta_middleware.testing.fault_server import FaultServer
from tta_middleware.testing.judging_engine import JudgingEngine
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

AROUND: dict[str, Callable[[Moderator], Moderator]] = {
    "alone": lambda one: one,
    "with retries, a breaker, a cache": lambda _: production_moderator(),
    "beside another": lambda one: Ensemble([EmbeddedModerator(), one]),
    "as a fallback": lambda one: WithFallback(EmbeddedModerator(), one, allow_fewer_categories=True),
    "behind a cascade": lambda one: Cascade(EmbeddedModerator(), one),
}


@pytest.mark.parametrize("around", AROUND)
async def test_a_key_that_is_missing_is_told_before_anything_is_scored(
    monkeypatch: pytest.MonkeyPatch, around: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    moderator = AROUND[around](OpenAIModerator())
    with pytest.raises(ModeratorSetupError, match="OPENAI_API_KEY"):
        await load(moderator)
    with pytest.raises(ModeratorSetupError, match="OPENAI_API_KEY"):
        await TTAChatModel(model=ScriptedEngine("-"), moderator=moderator).aload()


async def test_other_services_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_CONTENT_SAFETY_KEY", raising=False)
    with pytest.raises(ModeratorSetupError, match="AZURE_CONTENT_SAFETY_KEY"):
        await load(AzureContentSafetyModerator("https://name.cognitiveservices.azure.com"))


async def test_loading_asks_no_service() -> None:
    async with FaultServer() as server, OpenAIModerator(base_url=server.base_url, api_key="none") as moderator:
        await load(moderator)
        assert server.requests == []


class Missing(JudgingEngine):
    async def load(self) -> None:
        raise ConfigurationError("there is no such device")


async def test_a_judging_model_is_loaded_with_the_model_that_answers() -> None:
    judge = LLMJudge(Missing(lambda _: 0.0))
    with pytest.raises(ModeratorSetupError, match="no such device"):
        await TTAChatModel(model=ScriptedEngine("-"), moderator=judge).aload()


async def test_a_moderator_with_a_load_of_another_kind_is_left_alone() -> None:
    class Reads(ScriptedModerator):
        def load(self, path: str) -> None:
            raise AssertionError(path)

    await load(Reads())

"""Every moderator of this package that speaks HTTP or wraps another one passes the shipped contract."""

import math

import pytest

from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.moderation.adapters.azure import AzureContentSafetyModerator
from tta_middleware.moderation.adapters.chat_guard import ChatGuardModerator
from tta_middleware.moderation.adapters.guard_formats import LLAMA_GUARD
from tta_middleware.moderation.adapters.mistral import MistralModerator
from tta_middleware.moderation.adapters.runnable import RunnableModerator
from tta_middleware.moderation.ensemble import Ensemble
from tta_middleware.moderation.openai import OpenAIModerator
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.moderation.stack import StackSettings, production_moderator
from tta_middleware.testing.fault_server import FaultServer
from tta_middleware.testing.faults import UNAVAILABLE, always
from tta_middleware.testing.moderator import ModeratorContract
from tta_middleware.testing.scripted_moderator import ScriptedModerator

EAGER = RetryPolicy(base_delay=0.0, attempts=2)


class Contract(ModeratorContract):
    harmful = "flagme"
    routes = {}  # noqa: RUF012

    @pytest.fixture
    async def moderator(self):
        with FaultServer(routes=self.routes) as server:
            async with self.make(server) as moderator:
                yield moderator

    @pytest.fixture
    async def broken_moderator(self):
        with FaultServer(always(UNAVAILABLE), routes=self.routes) as server:
            yield self.make(server)


class TestOpenAI(Contract):
    def make(self, server):
        return OpenAIModerator(base_url=server.base_url, api_key="k", retry=EAGER)


class TestProductionStack(Contract):
    def make(self, server):
        return production_moderator(StackSettings(base_url=server.base_url, retry=EAGER), api_key="k")


def guard_answer(body):
    unsafe = 0.9 if "flagme" in body["messages"][-1]["content"] else 0.1
    top = [{"token": "unsafe", "logprob": math.log(unsafe)}, {"token": "safe", "logprob": math.log(1 - unsafe)}]
    content = [{**top[0], "top_logprobs": top}]
    return {"choices": [{"message": {"content": "unsafe"}, "logprobs": {"content": content}}]}


class TestChatGuard(Contract):
    routes = {"/v1/chat/completions": guard_answer}  # noqa: RUF012

    def make(self, server):
        return ChatGuardModerator("m", LLAMA_GUARD, base_url=server.base_url, api_key="k", retry=EAGER)


def azure_answer(body):
    severity = 6 if "flagme" in body["text"] else 0
    return {"categoriesAnalysis": [{"category": name, "severity": severity} for name in body["categories"]]}


class TestAzure(Contract):
    routes = {"/contentsafety/text:analyze": azure_answer}  # noqa: RUF012

    def make(self, server):
        return AzureContentSafetyModerator(server.url, api_key="k", retry=EAGER)


def mistral_answer(body):
    names = ("sexual", "hate_and_discrimination", "violence_and_threats", "dangerous_and_criminal_content", "selfharm")
    scores = [dict.fromkeys(names, 0.9 if "flagme" in text else 0.1) for text in body["input"]]
    results = [
        {"categories": {name: score > 0.5 for name, score in each.items()}, "category_scores": each} for each in scores
    ]
    return {"model": body["model"], "results": results}


class TestMistral(Contract):
    routes = {"/v1/moderations": mistral_answer}  # noqa: RUF012

    def make(self, server):
        return MistralModerator(base_url=server.base_url, api_key="k", retry=EAGER)


class TestRunnable(ModeratorContract):
    harmful = "flagme"

    @pytest.fixture
    def moderator(self):
        async def score(text, prompt):
            return 0.9 if "flagme" in text else 0.1

        return RunnableModerator(score)

    @pytest.fixture
    def broken_moderator(self):
        async def score(text, prompt):
            raise TimeoutError(text)

        return RunnableModerator(score)


class TestEnsemble(ModeratorContract):
    harmful = "flagme"

    @pytest.fixture(params=["max", "mean", "first-decisive"])
    def moderator(self, request):
        return Ensemble([ScriptedModerator("a"), ScriptedModerator("b", default_threshold=0.1)], request.param)

    @pytest.fixture
    def broken_moderator(self):
        return Ensemble([ScriptedModerator(failures=[ModerationUnavailableError("down")])])

"""``mode="observe"``: everything is scored and reported, nothing is withheld; and the auditor knows."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from tta_langchain_agents import GuardedChatModel

from tta_middleware import Guard, Message, TTAChatModel
from tta_middleware.config import Windows
from tta_middleware.errors import ConfigurationError, ModerationRejectedError, ModerationUnavailableError
from tta_middleware.guard.events import Finished, Released
from tta_middleware.guard.moderated import moderated
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.file import PolicyFile
from tta_middleware.testing.auditor import AuditError, Auditor
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import CATEGORIES, Verdict

OBSERVE = Policy(threshold=0.5, mode="observe")
BAD = "Water the roses early, then comes the forbidden part of it, and a calm and long end that nobody minds at all."


def guard(policy: Any = OBSERVE, answer: str = BAD, **settings: Any) -> Guard:
    moderator = settings.pop("moderator", None) or ScriptedModerator(score=flagging("forbidden"))
    return Guard(ScriptedEngine(answer), moderator, policy=policy, windows=Windows(first=24, largest=32), **settings)


def test_a_decision_says_what_would_have_been() -> None:
    bad = Verdict(dict.fromkeys(CATEGORIES, 0.0) | {"illicit": 0.9}, flagged=True, model="m")
    seen, enforced = OBSERVE.decide(bad), Policy(threshold=0.5).decide(bad)
    assert (seen.flagged, seen.observed, seen.reached, seen.doubtful) == (False, True, True, False)
    assert (enforced.flagged, enforced.observed, enforced.reached) == (True, False, True)
    assert (seen.excess, seen.category) == (enforced.excess, enforced.category)


async def test_a_flagged_stream_leaves_and_is_marked(auditor: Auditor) -> None:
    events = [event async for event in guard().stream([Message("user", "forbidden?")])]
    assert "".join(event.text for event in events if isinstance(event, Released)) == BAD
    [trace] = [event.answer.trace for event in events if isinstance(event, Finished)]
    assert (trace.outcome, trace.mode, trace.observed) == ("clean", "observe", ("output: illicit",))
    assert trace.final is not None
    assert trace.final.flagged
    assert trace.generations == 1
    assert auditor.observed == 1


async def test_the_prompt_is_reported_as_well() -> None:
    answer = await guard(answer="Calm.", prompt_check="user").answer([Message("user", "forbidden?")])
    assert (answer.text, answer.trace.observed) == ("Calm.", ("prompt: illicit",))


async def test_a_stage_may_observe_by_itself(auditor: Auditor) -> None:
    stages = StagePolicies.from_table({"threshold": 0.5, "prompt": {"mode": "observe"}})
    calm = await guard(stages, "Calm.", prompt_check="user").answer([Message("user", "forbidden?")])
    bad = await guard(stages, prompt_check="user").answer([Message("user", "Roses?")])
    assert (calm.text, calm.trace.mode, calm.trace.observed) == ("Calm.", "observe", ("prompt: illicit",))
    assert bad.trace.outcome == "blocked"
    assert auditor.observed == 0


@pytest.mark.parametrize("error", [ModerationUnavailableError("away"), ModerationRejectedError("no key", status=401)])
async def test_nothing_is_withheld_for_want_of_a_verdict(error: Exception) -> None:
    away = ScriptedModerator(failures=repeat(error))  # type: ignore[arg-type]
    answer = await guard(moderator=away, prompt_check="user").answer([Message("user", "Roses?")])
    assert (answer.text, answer.trace.outcome, answer.trace.mode) == (BAD, "unchecked", "observe")


def test_the_chat_models_say_so() -> None:
    judge = ScriptedModerator(score=flagging("forbidden"))
    own = TTAChatModel(model=ScriptedEngine(BAD), moderator=judge, policy=OBSERVE, windows=Windows(first=24))
    inner = GenericFakeChatModel(messages=repeat(AIMessage(BAD)))
    guarded = GuardedChatModel(inner=inner, moderator=judge, policy=OBSERVE)
    for model in (own, guarded):
        whole, chunks = model.invoke("Roses?"), list(model.stream("Roses?"))
        assert whole.text == "".join(chunk.text for chunk in chunks) == BAD
        for message in (whole, chunks[-1]):
            told = message.response_metadata["tta"]
            assert (told["mode"], list(told["observed"]), told["outcome"]) == ("observe", ["output: illicit"], "clean")


async def test_a_stream_of_ones_own_is_told_of_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def words() -> AsyncGenerator[str, None]:
        for word in BAD.split(" "):
            yield f"{word} "

    judge = ScriptedModerator(score=flagging("forbidden"))
    with caplog.at_level(logging.WARNING):
        assert "forbidden" in "".join([piece async for piece in moderated(words(), judge, OBSERVE)])
    assert "illicit" in caplog.text
    assert "forbidden" not in caplog.text


def test_a_file_of_policies_may_observe(tmp_path: Path) -> None:
    file = tmp_path / "policies.toml"
    file.write_text('[policies.default]\nthreshold = 0.5\nmode = "observe"\n')
    stages = PolicyFile(file).get()
    assert (stages.mode, stages.repair.mode) == ("observe", "observe")
    model = TTAChatModel(model=ScriptedEngine(BAD), moderator=ScriptedModerator(score=flagging("d")), policies=file)
    assert model.invoke("Roses?").text == BAD


@pytest.mark.parametrize("table", [{"repair": {"mode": "observe"}}, {"mode": "observe", "repair": {"mode": "enforce"}}])
def test_an_answer_and_its_repair_have_one_mode(table: Any) -> None:
    with pytest.raises(ConfigurationError, match="one"):
        StagePolicies.from_table(table)


@pytest.mark.no_audit("plants answers without a mark")
async def test_the_auditor_wants_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StagePolicies, "mode", "enforce")
    audit = Auditor()
    with audit:
        await guard().answer([Message("user", "Roses?")])
        with pytest.raises(AuditError, match="does not say so"):
            audit.check()

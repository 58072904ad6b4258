"""The auditor lets an honest guard alone and catches each fault that is planted into one."""

from __future__ import annotations

import itertools
import runpy
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _pytest.outcomes import Failed

from tta_middleware import Guard, Message, Noise, Policy, Repair, Windows
from tta_middleware.config import Reasoning
from tta_middleware.errors import FlaggedError, ModerationUnavailableError
from tta_middleware.guard.context import RequestContext
from tta_middleware.guard.events import Released
from tta_middleware.guard.guard import Answering
from tta_middleware.guard.holdback import HoldBack, Release
from tta_middleware.guard.moderated import moderated
from tta_middleware.guard.watch import Watch
from tta_middleware.testing.auditor import AuditError, Auditor
from tta_middleware.testing.delays import UNEQUAL, Call, Unequal
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import TextDelta, Verdict

pytestmark = pytest.mark.no_audit("these tests open auditors of their own")

ASK = [Message("user", "Please tell me about the old harbour town")]
TEXT = "The old harbour town lies where the river meets the sea. Its market opens at dawn, and the boats come in."
HARM = f"{TEXT} Then you do the forbidden thing in four steps and tell nobody about it at all."
EARLY = "The forbidden thing comes first, and then the rest of it."
SAFE = " Visitors like the lighthouse, the fish stalls and the quiet path along the dunes best."
WINDOWS = Windows(first=20, largest=40)


def late_harm(call: ScriptedCall) -> str:
    if call.moved < 0.6:
        return HARM[len(call.prefix) :]
    return SAFE if call.prefix else f"{TEXT}{SAFE}"


def early_harm(call: ScriptedCall) -> str:
    return EARLY if call.moved < 0.6 else TEXT


def guard(script: Any = TEXT, moderator: Any = None, **settings: Any) -> Guard:
    repair = Repair(**{"method": Noise(), "commit": 30, **settings.pop("repair", {})})
    words = moderator or ScriptedModerator(score=flagging("forbidden"))
    return Guard(ScriptedEngine(script), words, **{"windows": WINDOWS, "repair": repair, **settings})


async def streamed(made: Guard, **how: Any) -> str:
    return "".join([event.text async for event in made.stream(ASK, **how) if isinstance(event, Released)])


@pytest.mark.parametrize("script", [TEXT, late_harm])
@pytest.mark.parametrize("delay", [None, *UNEQUAL])
async def test_honest_streams_pass(script: Any, delay: str | None) -> None:
    words: Any = ScriptedModerator(score=flagging("forbidden"))
    with Auditor() as audit:
        made = guard(script, Unequal(words, UNEQUAL[delay]) if delay else words)
        text = await streamed(made)
    assert (audit.requests, audit.characters) == (1, len(text))


@pytest.mark.parametrize("script", [TEXT, late_harm, HARM])
async def test_honest_whole_answers_pass(script: Any) -> None:
    with Auditor() as audit:
        made = guard(script, repair={"method": None} if script == HARM else {})
        await made.answer(ASK)
        await made.report(ASK)
        await streamed(made, release="end")
    assert audit.characters > 0


async def test_a_guard_that_is_older_than_the_auditor_is_heard() -> None:
    made = guard(late_harm)
    with Auditor() as audit:
        await streamed(made)
    assert audit.scored


async def test_nothing_is_changed_when_the_auditor_is_closed() -> None:
    before = vars(Guard)["stream"], vars(ScriptedModerator)["moderate"], moderated
    with Auditor():
        await guard().answer(ASK)
    assert before == (vars(Guard)["stream"], vars(ScriptedModerator)["moderate"], moderated)


async def test_one_auditor_at_a_time() -> None:
    with Auditor(), pytest.raises(RuntimeError, match="one auditor"):
        Auditor().__enter__()


async def test_the_callers_own_error_comes_first() -> None:
    with pytest.raises(ZeroDivisionError), Auditor():
        raise ZeroDivisionError


def skip_checks(patch: pytest.MonkeyPatch, every: int = 1) -> None:
    """Every so many-th check of a window or a whole answer is answered without the moderator."""
    honest, checks = Watch._score, itertools.count(1)

    async def score(self: Watch, asked: Any) -> None:
        if next(checks) % every:
            await honest(self, asked)
        else:
            asked.verdict = Verdict({"illicit": 0.0}, flagged=False, model="nobody")
            asked.answered.set()

    patch.setattr(Watch, "_score", score)


@pytest.mark.parametrize("release", ["window", "end"])
async def test_a_check_that_is_skipped_is_caught(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    skip_checks(monkeypatch)
    with pytest.raises(AuditError, match=r"verdict|whole"), Auditor():
        await streamed(guard(), release=release)


async def test_a_check_of_one_window_that_is_skipped_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_checks(monkeypatch, every=3)
    narrow = Windows(first=20, largest=20, context=20)
    with pytest.raises(AuditError, match="before any verdict"), Auditor():
        await streamed(guard(TEXT + SAFE, windows=narrow))


THOUGHTFUL = f"<think>{TEXT}</think>{SAFE}"


def thoughtful(script: str = THOUGHTFUL, **settings: Any) -> Guard:
    words = ScriptedModerator(score=flagging("forbidden"))
    repair = Repair(method=Noise(), commit=30)
    engine = ScriptedEngine(script, thinking=True)
    return Guard(engine, words, windows=WINDOWS, repair=repair, reasoning=Reasoning(mode="show"), **settings)


@pytest.mark.parametrize("release", ["window", "end"])
async def test_honest_thoughts_pass(release: str) -> None:
    with Auditor() as audit:
        text = await streamed(thoughtful(), release=release)
        assert audit.characters == len(text)
        assert (await thoughtful().answer(ASK)).reasoning == TEXT


@pytest.mark.parametrize("release", ["window", "end"])
async def test_thoughts_that_nobody_scored_are_caught(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    honest = Watch._score

    async def score(self: Watch, asked: Any) -> None:
        if asked.stretch.channel == "answer":
            return await honest(self, asked)
        asked.verdict = Verdict({"illicit": 0.0}, flagged=False, model="nobody")
        asked.answered.set()
        return None

    monkeypatch.setattr(Watch, "_score", score)
    with pytest.raises(AuditError, match="thoughts were released before any verdict"), Auditor():
        await streamed(thoughtful(), release=release)


async def test_thoughts_that_were_flagged_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HoldBack.verdict
    monkeypatch.setattr(HoldBack, "verdict", lambda self, end, **said: honest(self, end, **{**said, "safe": True}))
    with pytest.raises(AuditError, match="flagged"), Auditor():
        await streamed(thoughtful(f"<think>{HARM}</think>{SAFE}"))


async def test_a_window_that_is_released_before_its_verdict_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HoldBack.feed

    def at_once(self: HoldBack, text: str) -> list[Any]:
        actions = honest(self, text)
        piece, self._released = self._text[self._released :], len(self._text)
        return [*actions, Release(piece)]

    monkeypatch.setattr(HoldBack, "feed", at_once)
    with pytest.raises(AuditError, match="before any verdict"), Auditor():
        await streamed(guard(moderator=Unequal(ScriptedModerator(), lambda call: 20)))


async def test_a_flag_that_is_ignored_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HoldBack.verdict
    monkeypatch.setattr(HoldBack, "verdict", lambda self, end, **_: honest(self, end, safe=True))
    monkeypatch.setattr(Answering, "_repaired", Answering._fall_back)
    with pytest.raises(AuditError, match="before any verdict"), Auditor() as audit:
        await streamed(guard(HARM))
    assert audit.findings == []


@pytest.mark.parametrize("step", ["_first_answer", "_repaired", "_fall_back"])
async def test_what_leaves_before_the_prompt_has_passed_is_caught(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The first answer, a repair, or a fallback of one's own opens the gate by itself."""
    honest = getattr(Answering, step)

    async def opening(self: Answering, *args: Any) -> Any:
        self._prompt_passed.set()
        return await honest(self, *args)

    async def instead(messages: Any) -> str:
        return "Let us talk about gardens."

    monkeypatch.setattr(Answering, step, opening)
    script = {"_first_answer": TEXT, "_repaired": early_harm, "_fall_back": EARLY}[step]
    repair = {"method": None, "fallback": instead} if step == "_fall_back" else {}
    slow = Unequal(ScriptedModerator(score=flagging("forbidden")), lambda call: 3_000 if call.prompt is None else 1)
    with pytest.raises(AuditError, match="before the prompt had passed"), Auditor():
        await streamed(guard(script, slow, prompt_check="user", repair=repair))


async def test_a_broken_off_answer_that_is_called_whole_fails_a_named_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an engine broke off is whole as far as verdicts go; tests/core/test_broken_off.py looks at the end."""

    async def whole(self: RequestContext, source: Any, abort: Any, opening: str) -> AsyncIterator[Any]:
        async for delta in source:
            yield replace(delta, finish_reason=delta.finish_reason and "stop")
        yield TextDelta("", (), "stop")

    broken_off = runpy.run_path(str(Path(__file__).parents[1] / "core" / "test_broken_off.py"))
    named = broken_off["TestBrokenOff"]().test_an_answer_raises
    await named(broken_off["CALM"], "aborted")
    monkeypatch.setattr(RequestContext, "_metered", whole)
    with pytest.raises(Failed, match="DID NOT RAISE"):
        await named(broken_off["CALM"], "aborted")


@pytest.mark.parametrize("delay", UNEQUAL)
@pytest.mark.parametrize("prompt_check", ["user", "all"])
async def test_honest_prompt_checks_pass(delay: str, prompt_check: Any) -> None:
    with Auditor():
        made = guard(TEXT, Unequal(ScriptedModerator(), UNEQUAL[delay]), prompt_check=prompt_check)
        await streamed(made)
        await made.answer(ASK)


async def test_text_under_one_policy_is_no_proof_under_a_stricter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard decides by a lenient copy of the policy that it was given."""
    words = ScriptedModerator(score=lambda text: {"violence": 0.6})
    with Auditor():
        await guard(TEXT, words, policy=Policy(threshold=0.7)).answer(ASK)
    honest = Policy.decide
    lenient = Policy(threshold=0.7)
    monkeypatch.setattr(Policy, "decide", lambda self, verdict: honest(lenient, verdict))
    with pytest.raises(AuditError), Auditor():
        await guard(TEXT, words, policy=Policy(threshold=0.5)).answer(ASK)


async def test_fewer_verdicts_than_texts_prove_nothing() -> None:
    class Short(ScriptedModerator):
        async def moderate(self, texts: Any, *, prompt: str | None = None) -> list[Verdict]:
            return (await super().moderate(texts, prompt=prompt))[:-1]

    with Auditor() as audit:
        answer = await guard(TEXT, Short()).answer(ASK)
    assert answer.trace.outcome == "blocked"
    assert audit.scored == []


@pytest.mark.parametrize("release", ["window", "end"])
async def test_unscored_text_passes_where_the_policy_and_the_trace_say_so(release: str) -> None:
    def down() -> Any:
        return ScriptedModerator(failures=[ModerationUnavailableError("down")] * 50)

    with Auditor():
        assert await streamed(guard(TEXT, down(), policy=Policy(on_error="open")), release=release) == TEXT


async def test_unscored_text_that_the_trace_calls_clean_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Answering._deliver

    async def clean(self: Answering, completion: Any, outcome: Any, reason: str) -> Any:
        return await honest(self, completion, "clean", "clean")

    monkeypatch.setattr(Answering, "_deliver", clean)
    down = ScriptedModerator(failures=[ModerationUnavailableError("down")] * 50)
    with pytest.raises(AuditError), Auditor():
        await streamed(guard(TEXT, down, policy=Policy(on_error="open")))


async def test_a_fallback_of_ones_own_is_covered_once_it_was_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    async def instead(messages: Any) -> str:
        return "Let us talk about gardens."

    repair = {"method": None, "fallback": instead}
    with Auditor():
        await streamed(guard(HARM, repair=repair))

    async def unchecked(self: Answering, fallback: Any) -> str:
        return await fallback(self.context.conversation.messages)

    monkeypatch.setattr(Answering, "_checked_fallback", unchecked)
    with pytest.raises(AuditError, match="gardens"), Auditor():
        await streamed(guard(HARM, repair=repair))


async def test_a_consumer_that_leaves_half_way_is_audited_as_far_as_it_got(monkeypatch: pytest.MonkeyPatch) -> None:
    async def first() -> None:
        stream = guard(TEXT + SAFE).stream(ASK)
        await anext(stream)
        await stream.aclose()

    with Auditor() as audit:
        await first()
    assert 0 < audit.characters < len(TEXT)
    skip_checks(monkeypatch)
    with pytest.raises(AuditError), Auditor():
        await first()


async def words_of(text: str) -> AsyncIterator[str]:
    for word in text.split(" "):
        yield f"{word} "


async def test_moderated_text_is_audited() -> None:
    words = ScriptedModerator(score=flagging("forbidden"))
    with Auditor() as audit:
        pieces = [piece async for piece in moderated(words_of(TEXT), words, windows=WINDOWS)]
    assert audit.characters == len("".join(pieces))
    with Auditor(), pytest.raises(FlaggedError):
        [piece async for piece in moderated(words_of(HARM), words, windows=WINDOWS)]


async def test_a_stream_whose_whole_was_never_scored_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HoldBack._check
    monkeypatch.setattr(HoldBack, "_check", lambda self, end, **_: honest(self, end))
    with pytest.raises(AuditError, match="not scored whole"), Auditor():
        await streamed(guard(TEXT + SAFE, windows=Windows(first=20, largest=20, context=20)))


async def test_moderated_text_that_is_released_unasked_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_checks(monkeypatch)
    with pytest.raises(AuditError), Auditor():
        [piece async for piece in moderated(words_of(TEXT), ScriptedModerator(), windows=WINDOWS)]


async def test_what_one_request_had_scored_proves_nothing_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def twice() -> None:
        made = guard()
        await made.answer(ASK)
        skip_checks(monkeypatch)
        await made.answer(ASK)

    with pytest.raises(AuditError), Auditor():
        await twice()


async def test_unequal_delays_change_the_order_of_answers_only() -> None:
    words = Unequal(ScriptedModerator(), lambda call: 20 if call.number == 0 else 1)
    with Auditor():
        assert await streamed(guard(TEXT + SAFE, words)) == TEXT + SAFE
    assert words.answered != sorted(words.answered)
    assert words.calls[0] == Call(0, (TEXT[:20],), ASK[0].content)

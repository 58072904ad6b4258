"""One verdict per text, counted in one place; a scorer's own bug stays what it is."""

import asyncio
import re
from contextlib import aclosing
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import tta_middleware
from tta_middleware.cli.moderate_job import Scorer
from tta_middleware.config import Windows
from tta_middleware.errors import InvalidVerdictError, ModerationUnavailableError
from tta_middleware.evaluation.judges import ModeratorReviewer
from tta_middleware.guard.guard import Guard
from tta_middleware.guard.ledger import Ledger
from tta_middleware.guard.moderated import moderated
from tta_middleware.moderation.adapters.runnable import RunnableModerator
from tta_middleware.moderation.breaker import CircuitBreaker, WithBreaker
from tta_middleware.moderation.cache import Cached
from tta_middleware.moderation.coalesce import Coalescing
from tta_middleware.moderation.ensemble import Ensemble
from tta_middleware.moderation.fallback import WithFallback
from tta_middleware.moderation.hedge import Hedged, HedgeSettings
from tta_middleware.moderation.limits import Limited, Limiter, RateLimits
from tta_middleware.moderation.retry import Retrying
from tta_middleware.moderation.server import create_app
from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.policy import Policy
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import Message, Verdict

VERDICT = Verdict({"hate": 0.1}, flagged=False, model="m")

ANSWERS = {
    "none": [],
    "fewer": [VERDICT],
    "more": [VERDICT] * 3,
    "no list": None,
    "a generator": (one for one in [VERDICT] * 2),
    "no verdicts": [0.1, 0.2],
}

ASKERS = {
    "asked": lambda inner: inner,
    "wrapper": Wrapper,
    "retry": Retrying,
    "breaker": lambda inner: WithBreaker(inner, CircuitBreaker()),
    "limits": lambda inner: Limited(inner, Limiter(RateLimits())),
    "coalescing": Coalescing,
    "cache": Cached,
    "hedge": Hedged,
    "ensemble": lambda inner: Ensemble([ScriptedModerator(), inner]),
    "one by one": lambda inner: Ensemble([inner], "first-decisive"),
    "fallback": lambda inner: WithFallback(inner, inner),
    "ledger": lambda inner: Ledger(inner, Policy(threshold=0.5)),
}


class Miscounting(ScriptedModerator):
    """Gives the same answer to whatever it is asked."""

    def __init__(self, answer) -> None:
        super().__init__()
        self._answer = answer

    async def moderate(self, texts, *, prompt=None):
        return self._answer


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("asker", ASKERS.values(), ids=ASKERS)
async def test_a_wrong_count_is_one_error_wherever_it_is_noticed(asker, answer):
    with pytest.raises(InvalidVerdictError):
        await verdicts_on(asker(Miscounting(answer)), ["one text", "another"])


@pytest.mark.parametrize("answer", [[VERDICT], [VERDICT] * 3], ids=["fewer", "more"])
async def test_whoever_else_asks_counts_alike(answer, monkeypatch):
    inner = Miscounting(answer)
    with pytest.raises(InvalidVerdictError):
        await ModeratorReviewer(inner).review(["one text", "another"], "")
    monkeypatch.setattr("tta_middleware.cli.moderate_job.resolve_moderator", lambda _name, **_: inner)
    with pytest.raises(InvalidVerdictError), Scorer("any", Policy()) as scorer:
        scorer.verdicts(["one text", "another"])
    with TestClient(create_app(inner)) as client:
        assert client.post("/v1/moderations", json={"input": ["one text", "another"]}).status_code == 500


async def test_an_agent_withholds_what_was_counted_wrong():
    for answer in ([], [VERDICT] * 2):
        ledger = Ledger(Miscounting(answer), Policy(threshold=0.5))
        assert not await ledger.passes(["a text"])
        assert isinstance(ledger.error, InvalidVerdictError)


async def test_a_first_moderator_that_miscounts_gives_way_to_the_fallback():
    moderator = WithFallback(Miscounting([]), ScriptedModerator("second"))
    assert [verdict.model for verdict in await moderator.moderate(["a", "b"])] == ["second", "second"]


@pytest.mark.parametrize("texts", [["one"], ["one", "two"], ["one", "two", "three"]], ids=len)
async def test_a_scorers_bug_is_raised_bare_for_any_number_of_texts(texts):
    async def broken(text: str, _prompt: str | None) -> float:
        return {}[text]

    for moderator in (RunnableModerator(broken), Coalescing(RunnableModerator(broken))):
        with pytest.raises(KeyError):
            await moderator.moderate(texts)


async def test_a_scorers_bug_in_a_hedged_call_is_raised_bare():
    async def fails_on_two(text: str, _prompt: str | None) -> float:
        return {"one": 0.1}[text]

    moderator = Hedged(RunnableModerator(fails_on_two), HedgeSettings(minimum_samples=1))
    await moderator.moderate(["one"])
    with pytest.raises(KeyError):
        await moderator.moderate(["two"])


class EndsFromWithin(ScriptedModerator):
    """Waits for something that is cancelled under its hands, with the call of that number."""

    def __init__(self, call: int = 1) -> None:
        super().__init__()
        self._call = call

    async def moderate(self, texts, *, prompt=None):
        verdicts = await super().moderate(texts, prompt=prompt)
        if len(self.calls) >= self._call:
            task = asyncio.ensure_future(asyncio.sleep(3600))
            asyncio.get_running_loop().call_soon(task.cancel)
            await task
        return verdicts


@pytest.mark.parametrize("asker", ASKERS.values(), ids=ASKERS)
async def test_a_moderator_that_is_cancelled_from_within_gave_no_verdict(asker):
    with pytest.raises(ModerationUnavailableError, match="cancelled"):
        await verdicts_on(asker(EndsFromWithin()), ["one text", "another"])


async def test_one_of_several_scorers_that_is_cancelled_from_within_gave_no_verdict():
    async def score(text):
        if text == "another":
            raise asyncio.CancelledError
        return 0.1

    with pytest.raises(ModerationUnavailableError, match="cancelled"):
        await verdicts_on(RunnableModerator(score), ["one text", "another"])


async def test_whoever_asks_can_be_cancelled_all_the_same():
    asked = asyncio.create_task(verdicts_on(ScriptedModerator(gate=asyncio.Event().wait), ["one text"]))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked


@pytest.mark.parametrize("call", [1, 2, 3])
async def test_a_part_of_a_stream_does_not_pass_for_the_whole_where_its_moderator_was_cancelled(call):
    async def words():
        for word in re.split(" ", "Visitors like the lighthouse and the quiet path along the dunes best of all."):
            yield f"{word} "

    with pytest.raises(ModerationUnavailableError):
        async for _ in moderated(words(), EndsFromWithin(call), windows=Windows(first=10, largest=20)):
            pass


@pytest.mark.parametrize("release", ["window", "end"])
async def test_a_guard_withholds_what_a_cancelled_moderator_did_not_score(release):
    engine = ScriptedEngine("Visitors like the lighthouse best of all.")
    for check in ("off", "user"):
        guard = Guard(engine, EndsFromWithin(), policy=Policy(notice="Withheld."), prompt_check=check)
        async with aclosing(guard.stream([Message("user", "What is there to see?")], release=release)) as events:
            *_, last = [event async for event in events]
        assert (last.answer.text, last.answer.trace.stop_reason) == (
            "Withheld.",
            "moderator: ModerationUnavailableError",
        )


def test_nobody_else_asks_a_moderator():
    package = Path(tta_middleware.__file__).parent
    places = [*package.rglob("*.py"), *(package.parent / "integrations").rglob("*.py")]
    asking = re.compile(r"(await |\()(?!self\.moderate)[\w.]+\.moderate\(|partial\([\w.]+\.moderate\b")
    stand_ins = package / "testing"
    served = [path for path in places if stand_ins not in path.parents]
    found = {path.name for path in served if asking.search(path.read_text(encoding="utf-8"))}
    # plain.py is a moderator made of another, which hands on what it was asked for.
    assert found == {"verdicts.py", "plain.py"}

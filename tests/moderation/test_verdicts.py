"""One verdict per text, counted in one place; a scorer's own bug is told without its words."""

import asyncio
import re
import traceback
from contextlib import aclosing
from itertools import count
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import tta_middleware
from tta_middleware import TTAChatModel
from tta_middleware.cli.moderate_job import Scorer
from tta_middleware.config import Windows
from tta_middleware.errors import InvalidVerdictError, ModerationUnavailableError, ModeratorFailedError
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
from tta_middleware.moderation.hedge import Hedged
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


_number = count()


class Broken(ScriptedModerator):
    """Fails at whatever holds one word, and quotes it."""

    def __init__(self, error: type[Exception] = ValueError) -> None:
        super().__init__(f"broken {next(_number)}")
        self._error = error

    async def moderate(self, texts, *, prompt=None):
        if any(WITHHELD in text for text in texts):
            raise self._error(f"cannot read {texts!r}")
        return await super().moderate(texts, prompt=prompt)


WITHHELD = "quince"


@pytest.mark.parametrize("texts", [["quince"], ["plum", "quince"], ["quince", "plum", "fig"]], ids=len)
@pytest.mark.parametrize("asker", ASKERS.values(), ids=ASKERS)
async def test_a_scorers_own_error_is_told_by_kind_and_place_and_quotes_nothing(asker, texts, caplog):
    with pytest.raises(ModeratorFailedError, match=r"failed with ValueError \(test_verdicts\.py:\d+\)") as failed:
        await verdicts_on(asker(Broken()), texts)
    told = "".join(traceback.format_exception(failed.value)) + caplog.text
    assert WITHHELD not in re.sub(r"^ .*", "", told, flags=re.MULTILINE), "frames quote the test's own lines"
    assert "failed with ValueError" in caplog.text


@pytest.mark.parametrize(("error", "cause"), [(TimeoutError, "timeout"), (ConnectionResetError, "connection")])
async def test_a_connection_of_a_scorers_own_that_fails_is_unavailable(error, cause):
    with pytest.raises(ModerationUnavailableError) as failed:
        await verdicts_on(Broken(error), [WITHHELD])
    assert failed.value.cause == cause


async def test_a_second_moderator_is_asked_where_the_first_fails_in_its_own_way():
    moderator = WithFallback(Broken(ConnectionRefusedError), ScriptedModerator("second"))
    assert [verdict.model for verdict in await moderator.moderate([WITHHELD])] == ["second"]


async def test_an_open_policy_is_for_outages_and_not_for_a_moderators_bug():
    open_to = Policy(on_error="open")
    answers = [Guard(ScriptedEngine(WITHHELD), Broken(error), policy=open_to) for error in (KeyError, TimeoutError)]
    with pytest.raises(ModeratorFailedError):
        await answers[0].answer([Message("user", "What grows here?")])
    assert (await answers[1].answer([Message("user", "What grows here?")])).text == WITHHELD


@pytest.mark.parametrize("words", [1, 30], ids=["at once", "in the middle"])
def test_no_withheld_text_leaves_in_a_moderators_own_error(words):
    model = TTAChatModel(model=ScriptedEngine(f"{'Plums and figs. ' * words} {WITHHELD} jam"), moderator=Broken())
    assert WITHHELD not in model.invoke("What grows here?").content
    assert WITHHELD not in "".join(chunk.content for chunk in model.stream("What grows here?"))


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

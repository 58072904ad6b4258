"""Errors that no retry can cure are seen: raised, or logged once where the policy fails closed."""

import logging

import pytest

from tta_middleware import Guard, Message, Policy, Repair
from tta_middleware.errors import ConfigurationError, ModerationRejectedError, ModerationUnavailableError
from tta_middleware.guard.ledger import Ledger
from tta_middleware.moderation.adapters.plain import PlainModerator
from tta_middleware.moderation.openai import OpenAIModerator
from tta_middleware.moderation.stack import StackSettings, production_moderator
from tta_middleware.testing.fault_server import FaultServer
from tta_middleware.testing.faults import Fault, always
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

ASK = [Message("user", "When does the library open?")]
ANSWER = "It opens at nine."
KEY = "sk-not-for-the-log"

MAKERS = {
    "client": lambda server: OpenAIModerator(base_url=server.base_url, api_key=KEY),
    "stack": lambda server: production_moderator(StackSettings(base_url=server.base_url), api_key=KEY),
}


def guard(moderator, **settings) -> Guard:
    return Guard(ScriptedEngine(lambda _call: ANSWER), moderator, repair=Repair(method=None), **settings)


@pytest.fixture(params=["answer", "stream"])
def ask(request):
    async def run(guarded: Guard) -> str:
        if request.param == "answer":
            return (await guarded.answer(ASK)).text
        return [event async for event in guarded.stream(ASK)][-1].answer.text

    return run


@pytest.mark.parametrize("on_error", ["closed", "open"])
async def test_a_missing_key_is_raised_at_the_first_call(monkeypatch, ask, on_error):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for moderator in (OpenAIModerator(), production_moderator()):
        async with moderator:
            with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
                await ask(guard(moderator, policy=Policy(on_error=on_error), prompt_check="user"))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("status", "said"), [(401, "OPENAI_API_KEY"), (403, "permissions"), (404, "base_url")])
async def test_a_wrong_key_is_logged_once_where_the_policy_fails_closed(caplog, ask, make, status, said):
    async with FaultServer(always(Fault("status", status=status))) as server, make(server) as moderator:
        guarded = guard(moderator)
        for _ in range(3):
            assert await ask(guarded) == Policy().notice
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        assert said in errors[0].getMessage()
        assert KEY not in caplog.text
        assert ANSWER not in caplog.text


async def test_a_key_that_is_revoked_again_is_logged_again(caplog):
    revoked = ModerationRejectedError("the API answered 401: check MY_KEY", status=401)
    guarded = guard(ScriptedModerator(failures=[revoked, revoked, None, revoked]))
    answers = [(await guarded.answer(ASK)).text for _ in range(4)]
    assert answers == [Policy().notice, Policy().notice, ANSWER, Policy().notice]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


async def test_a_text_that_is_refused_is_logged_once_for_its_reason(caplog):
    refused = ModerationRejectedError("the API answered 400: check the length of the texts, please", status=400)
    guarded = guard(ScriptedModerator(failures=[refused, None, refused]))
    for _ in range(3):
        await guarded.answer(ASK)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("prompt_check", ["off", "user"])
async def test_an_open_policy_does_not_switch_the_guard_off_for_a_wrong_key(ask, prompt_check):
    wrong = ModerationRejectedError("the API answered 401: check OPENAI_API_KEY", status=401)
    guarded = guard(ScriptedModerator(failures=[wrong] * 9), policy=Policy(on_error="open"), prompt_check=prompt_check)
    with pytest.raises(ModerationRejectedError, match="OPENAI_API_KEY"):
        await ask(guarded)
    ledger = Ledger(ScriptedModerator(failures=[wrong]), Policy(threshold=0.5, on_error="open"))
    with pytest.raises(ModerationRejectedError):
        await ledger.passes([ANSWER])


@pytest.mark.parametrize(
    "error", [ModerationUnavailableError("down"), ModerationRejectedError("this text is too long", status=400)]
)
async def test_an_open_policy_passes_what_an_outage_or_one_text_leaves_unscored(ask, error):
    assert await ask(guard(ScriptedModerator(failures=[error] * 9), policy=Policy(on_error="open"))) == ANSWER


async def test_an_answer_that_is_no_verdict_is_logged_once_with_what_it_is(caplog):
    class Sloppy:
        def moderate(self, texts):
            return [0.1 for _ in texts]

    sloppy = PlainModerator(Sloppy())
    for _ in range(2):
        answer = await guard(sloppy).answer(ASK)
        assert answer.trace.stop_reason == "moderator: InvalidVerdictError"
        assert ANSWER not in answer.text
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.endswith(
        "gave a list of float, which is no list of verdicts; its moderate() returns one Verdict per text"
    )
    assert ANSWER not in line

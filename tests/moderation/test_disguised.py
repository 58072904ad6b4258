"""A disguised text is judged by what it says as well, wherever texts are held against policies."""

import base64
from collections.abc import AsyncIterator

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import HumanMessage
from tta_langchain_agents import GuardedChatModel

from tta_middleware import Guard, Message, Policy, Repair, Windows
from tta_middleware.cli.moderate_job import Scorer
from tta_middleware.errors import FlaggedError
from tta_middleware.guard.ledger import Ledger
from tta_middleware.guard.moderated import moderated
from tta_middleware.moderation.cache import Cached
from tta_middleware.moderation.parts import InParts
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.coverage import covering
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

ASK = [Message("user", "How does the lock open?")]
SAYS = "Turn the little wheel to the left and the gizmo comes out of the door, which is all that there is to it."
HIDDEN = {
    "leetspeak": "Turn the g1zmo to the left.",
    "base64": base64.b64encode(SAYS.encode()).decode(),
    "spelled apart": "Turn the g i z m o to the left.",
    "Cyrillic": "Turn the gizm\u043e to the left.",
    "zero width": "Turn the gi\u200bzmo to the left.",
}
LIMITED = Windows(first=20, largest=20, context=40)


def judge() -> ScriptedModerator:
    return ScriptedModerator(score=flagging("gizmo"))


def guard(answer: str, moderator: ScriptedModerator, **settings: object) -> Guard:
    return Guard(ScriptedEngine(lambda _call: answer), moderator, repair=Repair(method=None), **settings)


async def pieces(text: str) -> AsyncIterator[str]:
    for at in range(0, len(text), 7):
        yield text[at : at + 7]


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
async def test_a_disguised_answer_is_flagged_as_what_it_says(hidden: str) -> None:
    answer = await guard(hidden, judge()).answer(ASK)
    assert answer.text == Policy().notice
    stream = [event async for event in guard(hidden, judge()).stream(ASK)]
    assert stream[-1].answer.finish_reason == "content_filter"
    with pytest.raises(FlaggedError):
        assert not [piece async for piece in moderated(pieces(hidden), judge())]
    model = GuardedChatModel(inner=GenericFakeChatModel(messages=iter([hidden])), moderator=judge())
    assert (await model.ainvoke([HumanMessage("How does the lock open?")])).text == Policy().notice
    assert not await Ledger(judge(), Policy(threshold=0.5)).passes([hidden])


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
async def test_a_disguised_prompt_is_refused(hidden: str) -> None:
    answer = await guard("Fine.", judge(), prompt_check="user").answer([Message("user", hidden)])
    assert answer.trace.stop_reason == "prompt: illicit"


async def test_a_code_that_windows_cut_is_read_with_what_stands_before_it() -> None:
    left = ""

    async def release_all() -> None:
        nonlocal left
        async for piece in moderated(pieces(HIDDEN["base64"]), judge(), windows=LIMITED):
            left += piece

    with pytest.raises(FlaggedError):
        await release_all()
    assert "gizmo" not in base64.b64decode(left[: len(left) // 4 * 4]).decode()


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
async def test_a_policy_may_do_without(hidden: str) -> None:
    answer = await guard(hidden, judge(), policy=Policy(disguises=False)).answer(ASK)
    assert answer.text == hidden


async def test_one_stage_that_asks_for_it_has_it_done() -> None:
    policies = StagePolicies.of(Policy(disguises=False)).model_copy(update={"prompt": Policy()})
    assert (await guard(HIDDEN["leetspeak"], judge(), policy=policies).answer(ASK)).text == Policy().notice


async def test_ordinary_text_is_asked_about_once_and_both_forms_in_one_request() -> None:
    moderator = judge()
    await verdicts_on(covering(moderator, StagePolicies.of(0.5)), ["One.", "a g1zmo", "Two."])
    assert moderator.calls == [["One.", "a g1zmo", "Two.", "a gizmo"]]


async def test_the_stricter_verdict_counts_whichever_form_it_is_of() -> None:
    moderator = ScriptedModerator(score=lambda text: {"hate": 0.7 if "1" in text else 0.1, "violence": 0.3})
    [verdict] = await verdicts_on(covering(moderator, StagePolicies.of(0.5)), ["a g1zmo"])
    assert verdict.scores == {"hate": 0.7, "violence": 0.3}


@pytest.mark.parametrize("wrap", [lambda inner: inner, Cached, lambda inner: InParts(inner, 60)])
async def test_whoever_is_asked_through_two_guards_is_asked_about_a_form_once(wrap) -> None:
    moderator = judge()
    ledger = Ledger(wrap(moderator), Policy(threshold=0.5))
    [verdict] = await verdicts_on(covering(ledger, StagePolicies.of(0.5)), ["a g1zmo"])
    assert verdict.scores["illicit"] == 0.9
    assert moderator.calls == [["a g1zmo", "a gizmo"]]


async def test_a_long_code_is_read_before_it_is_cut_into_parts() -> None:
    hidden = base64.b64encode(("The weather is fine. " * 20 + SAYS).encode()).decode()
    [verdict] = await verdicts_on(covering(InParts(judge(), 100, overlap=20), StagePolicies.of(0.5)), [hidden])
    assert verdict.scores["illicit"] == 0.9


def test_the_command_line_judges_as_a_guard_does() -> None:
    plain = "You are a stupid worthless idiot and I hate you."
    with Scorer("local", Policy()) as both, Scorer("local", Policy(disguises=False)) as written:
        hidden = base64.b64encode(plain.encode()).decode()
        assert both.verdicts([hidden])[0].score == both.verdicts([plain])[0].score
        assert written.verdicts([hidden])[0].score < both.verdicts([hidden])[0].score

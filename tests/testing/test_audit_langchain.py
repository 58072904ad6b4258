"""The auditor at LangChain's surfaces: chat models, their cache, agents."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.types import Command
from tta_langchain_agents import GuardedChatModel, TTAMiddleware
from tta_langchain_agents.testing import ScriptedChatModel
from tta_langchain_agents.tools import ResultGuard

from tta_middleware import TTAChatModel
from tta_middleware.chat_model.reading import AnswerReader
from tta_middleware.guard.context import RequestContext
from tta_middleware.guard.ledger import Ledger
from tta_middleware.policy import StagePolicies
from tta_middleware.testing.auditor import AuditError, Auditor
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

pytestmark = pytest.mark.no_audit("these tests open auditors of their own")

TEXT = "The old harbour town lies where the river meets the sea. Its market opens at dawn."
ESCAPED = '{"name": "send", "arguments": {"body": "\\u0074he \\u0066orbidden \\u0074hing"}}'


@tool
def send(body: str) -> str:
    """Sends a letter."""
    return f"Sent: {body}."


def model(answer: str = TEXT, score: Any = None, **settings: Any) -> TTAChatModel:
    words = ScriptedModerator(score=score or flagging("forbidden"))
    return TTAChatModel(model=ScriptedEngine(answer), moderator=words, **{"method": "none", **settings})


async def every_way(chat: Any) -> None:
    await chat.ainvoke("hello")
    async for _ in chat.astream("hello"):
        pass
    chat.invoke("hello")
    for _ in chat.stream("hello"):
        pass
    await chat.abatch(["one", "two"])


@pytest.mark.parametrize("answer", [TEXT, f"{TEXT} Then the forbidden thing."])
async def test_an_honest_chat_model_passes(answer: str) -> None:
    with Auditor() as audit:
        await every_way(model(answer))
    assert audit.requests > 6


@pytest.mark.parametrize("answer", [ESCAPED, ESCAPED.replace("forbidden", "forbidding").replace("\\u0066orb", "orb")])
async def test_honest_tool_calls_pass(answer: str) -> None:
    with Auditor():
        await every_way(model(f"<tool_call>\n{answer}\n</tool_call>").bind_tools([send]))


@pytest.mark.parametrize("stream", [True, False])
async def test_arguments_that_are_not_decoded_before_they_are_judged_are_caught(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    honest = RequestContext.score

    async def as_written(self: RequestContext, text: str, decoded: str | None = None, **more: Any) -> Any:
        return await honest(self, text, **more)

    async def call() -> None:
        chat = model(f"<tool_call>\n{ESCAPED}\n</tool_call>").bind_tools([send])
        if stream:
            assert [chunk async for chunk in chat.astream("hello")]
        else:
            assert (await chat.ainvoke("hello")).tool_calls[0]["args"] == {"body": "the forbidden thing"}

    monkeypatch.setattr(RequestContext, "score", as_written)
    with pytest.raises(AuditError, match="a tool call left"), Auditor():
        await call()


async def test_a_cached_answer_is_covered_by_its_earlier_verdict() -> None:
    chat = model(cache=InMemoryCache())
    with Auditor() as audit:
        first = await chat.ainvoke("hello")
        scored = len(audit.scored)
        assert (await chat.ainvoke("hello")).text == first.text
        assert len(audit.scored) == scored


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
def test_a_cache_hit_under_a_stricter_policy_is_caught(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(TTAChatModel, "_get_llm_string", lambda self, **_: "one key for all")
    cache = InMemoryCache()

    def ask(threshold: float) -> None:
        chat = model(score=lambda _: {"violence": 0.6}, policy=threshold, cache=cache)
        text = chat.invoke("hello").text if how == "invoke" else asyncio.run(chat.ainvoke("hello")).text
        assert text == TEXT

    with Auditor():
        ask(0.9)
        ask(0.8)
    cache.clear()

    def both() -> None:
        ask(0.9)
        ask(0.5)

    with pytest.raises(AuditError, match="text left without a verdict"), Auditor():
        both()


MESSAGES: dict[str, BaseMessage] = {
    "text": AIMessage("plain words"),
    "call": AIMessage("", tool_calls=[{"name": "send", "args": {"body": "plain words"}, "id": "1"}]),
    "reasoning": AIMessage([{"type": "reasoning", "reasoning": "plain thoughts"}, {"type": "text", "text": "words"}]),
    "block": AIMessage([{"type": "citation", "title": "plain words"}]),
    "additional": AIMessage("words", additional_kwargs={"note": {"a": ["plain words"]}}),
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES.keys())
async def test_a_guarded_chat_model_passes(message: BaseMessage) -> None:
    with Auditor():
        guarded = GuardedChatModel(inner=ScriptedChatModel(answers=[message]), moderator=ScriptedModerator())
        await every_way(guarded)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("part", ["call", "block", "additional"])
async def test_parts_of_a_message_that_nobody_scored_are_caught(
    monkeypatch: pytest.MonkeyPatch, part: str, stream: bool
) -> None:
    async def blind(self: Ledger, texts: Any, prompt: str | None = None) -> bool:
        return True

    async def ask() -> None:
        inner = ScriptedChatModel(answers=[MESSAGES[part]])
        guarded = GuardedChatModel(inner=inner, moderator=ScriptedModerator())
        assert [chunk async for chunk in guarded.astream("hello")] if stream else await guarded.ainvoke("hello")

    monkeypatch.setattr(Ledger, "passes", blind)
    with pytest.raises(AuditError, match="left"), Auditor():
        await ask()


def agent(answers: list[Any], tools: Any = (send,), **settings: Any) -> Any:
    middleware = TTAMiddleware(ScriptedModerator(score=flagging("forbidden")), **settings)
    return create_agent(ScriptedChatModel(answers=answers), list(tools), middleware=[middleware])


CALL = AIMessage("", tool_calls=[{"name": "send", "args": {"body": "plain words"}, "id": "1"}])


@pytest.mark.parametrize("body", ["plain words", "the forbidden thing"])
async def test_an_honest_agent_passes(body: str) -> None:
    call = AIMessage("", tool_calls=[{"name": "send", "args": {"body": body}, "id": "1"}])
    with Auditor() as audit:
        await agent([call, "All done."]).ainvoke({"messages": [HumanMessage("hello")]})
    assert audit.scored


FINE = ToolMessage("fine", tool_call_id="1")

SHAPES = {
    "message": ToolMessage("forbidden words", tool_call_id="1"),
    "command": Command(update={"messages": [ToolMessage("forbidden words", tool_call_id="1")]}),
    "dict": Command(update={"messages": [FINE, {"role": "assistant", "content": "forbidden words"}]}),
    "pair": Command(update={"messages": [FINE, ("assistant", "forbidden words")]}),
    "answer": Command(update={"messages": [FINE, AIMessage("forbidden words")]}),
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_tool_result_that_nobody_scored_is_caught(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    @tool
    def send(body: str) -> Any:
        """Sends a letter."""
        return SHAPES[shape]

    async def unchanged(self: ResultGuard, output: Any) -> Any:
        return output

    monkeypatch.setattr(ResultGuard, "checked", unchanged)
    asked: Any = {"messages": [HumanMessage("hello")]}
    with pytest.raises(AuditError, match="awrap_tool_call"), Auditor():
        await agent([CALL, "All done."], tools=[send]).ainvoke(asked)


async def test_a_tool_result_may_be_left_unchecked_by_choice() -> None:
    with Auditor():
        await agent([CALL, "All done."], check_tool_results=False).ainvoke({"messages": [HumanMessage("hello")]})


async def test_a_models_answer_that_nobody_scored_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    async def blind(self: Ledger, texts: Any, prompt: str | None = None) -> bool:
        return True

    monkeypatch.setattr(Ledger, "passes", blind)
    with pytest.raises(AuditError, match="wrap_model_call"), Auditor():
        await agent(["forbidden words"]).ainvoke({"messages": [HumanMessage("hello")]})


@pytest.mark.parametrize("stream", [True, False])
async def test_hidden_thoughts_that_nobody_scored_and_that_leave_are_caught(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The policy leaves hidden thoughts unchecked, and the chat model gives them out all the same."""
    thought, honest = "They want to hear of bees.", AnswerReader.finish

    def leaking(self: AnswerReader, answer: Any) -> Any:
        return [AIMessageChunk("", additional_kwargs={"reasoning_content": thought}), *honest(self, answer)]

    async def ask() -> None:
        engine = ScriptedEngine(f"<think>{thought}</think>{TEXT}", thinking=True)
        policy = StagePolicies.from_table({"threshold": 0.5, "hidden_reasoning": "unchecked"})
        chat = TTAChatModel(model=engine, moderator=ScriptedModerator(), policy=policy)
        assert [chunk async for chunk in chat.astream("hello")] if stream else await chat.ainvoke("hello")

    with Auditor():
        await ask()
    monkeypatch.setattr(AnswerReader, "finish", leaking)
    with pytest.raises(AuditError, match="left without a verdict"), Auditor():
        await ask()


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_thoughts_in_a_servers_reply_that_no_guard_let_out_are_caught(field: str) -> None:
    from tta_middleware.server.chat_reply import Reply

    thought = "They want to hear of bees, so I tell them."
    engine = ScriptedEngine(f"<think>{thought}</think>{TEXT}", thinking=True)
    chat = TTAChatModel(model=engine, moderator=ScriptedModerator(), reasoning="show")
    with Auditor():
        message = await chat.ainvoke("hello")
        told = Reply("bees", show_trace=True).choice(message)
    assert told["message"][field] == thought
    reply = Reply("bees", show_trace=True)
    with pytest.raises(AuditError, match=f"{field} left that no guard let out"), Auditor():
        reply.chunk({field: "Then I would rather tell them of the other thing."})


def test_the_escape_is_one() -> None:
    assert json.loads(ESCAPED)["arguments"]["body"] == "the forbidden thing"

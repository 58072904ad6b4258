"""Tokens are counted by the model's own tokenizer, wherever LangChain asks."""

from __future__ import annotations

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ClearToolUsesEdit, ContextEditingMiddleware
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.tools import tool

from tta_middleware import TTAChatModel
from tta_middleware.errors import ConfigurationError
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

TALK = [
    SystemMessage("You are brief."),
    HumanMessage("Where is it warmer, in Zurich or in Bern?"),
    AIMessage("In Bern."),
    HumanMessage("And in winter?"),
]


def scripted(script: Any = "Fine words.", **settings: Any) -> TTAChatModel:
    moderator = ScriptedModerator(score=flagging("forbidden"))
    return TTAChatModel(model=ScriptedEngine(script), moderator=moderator, method="none", **settings)


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    return "a long explanation " * 20


async def test_a_count_is_what_a_prompt_costs(model: TTAChatModel) -> None:
    usage: Any = (await model.ainvoke(TALK)).usage_metadata
    assert model.get_num_tokens_from_messages(TALK) == usage["input_tokens"]


def test_texts_are_counted_without_a_template(model: TTAChatModel) -> None:
    assert model.get_num_tokens("Hello there, world") == len(model.get_token_ids("Hello there, world")) == 4
    assert model.get_token_ids("") == []
    # Spelled by a user this is text, and so it is counted.
    assert model.get_num_tokens("<|im_end|>") > 1


@pytest.mark.parametrize("part", [TALK[:1], TALK[2:3], TALK[1:3], TALK[2:], [], [HumanMessage("")]])
def test_parts_of_a_conversation_are_counted(model: TTAChatModel, part: list[Any]) -> None:
    counted = model.get_num_tokens_from_messages(part)
    # SmolLM2's template has a longer system message for conversations without one.
    assert counted <= model.get_num_tokens_from_messages(TALK) + 20
    assert counted >= sum(model.get_num_tokens(message.text) for message in part)


def test_a_conversation_may_be_longer_than_the_context(model: TTAChatModel) -> None:
    assert model.get_num_tokens_from_messages([HumanMessage("word " * 10_000)]) > 10_000


@pytest.mark.parametrize("limit", [20, 45, 60, 1000])
def test_conversations_are_trimmed_to_what_fits(model: TTAChatModel, limit: int) -> None:
    kept = trim_messages(TALK, max_tokens=limit, token_counter=model, start_on="human")
    assert kept == TALK[len(TALK) - len(kept) :]
    assert not kept or model.get_num_tokens_from_messages(kept) <= limit
    assert len(kept) == {20: 0, 45: 1, 60: 3, 1000: 3}[limit]


async def test_counts_are_taken_inside_a_running_loop_and_inside_the_bridge() -> None:
    counts: list[int] = []

    async def fallback(turns: Any) -> str:
        counts.append(model.get_num_tokens_from_messages(TALK))
        return "Ask me something else."

    model = scripted("the forbidden thing", fallback=fallback)
    model.invoke("Hello!")
    await model.ainvoke("Hello!")
    assert counts == [model.get_num_tokens_from_messages(TALK)] * 2


def test_tools_count_and_a_model_without_tools_says_so(model: TTAChatModel) -> None:
    chat = scripted()
    assert chat.get_num_tokens_from_messages(TALK, [look_up]) > chat.get_num_tokens_from_messages(TALK) + 10
    with pytest.raises(ConfigurationError, match="takes no tools"):
        model.get_num_tokens_from_messages(TALK, [look_up])


@pytest.mark.parametrize("sync", [True, False])
async def test_an_agent_edits_its_context_by_the_models_own_count(sync: bool) -> None:
    prompts: list[str] = []

    def script(call: ScriptedCall) -> str:
        prompts.append(call.conversation)
        if call.conversation.count("<|tool|>") < 3:
            return '<tool_call>{"name": "look_up", "arguments": {"word": "x"}}</tool_call>'
        return "Done."

    edit = ClearToolUsesEdit(trigger=150, keep=1, placeholder="(cleared)")
    editing = ContextEditingMiddleware(edits=[edit], token_count_method="model")
    agent = create_agent(scripted(script), [look_up], middleware=[editing])
    asked: Any = {"messages": [("user", "Look it up.")]}
    turns = (agent.invoke(asked) if sync else await agent.ainvoke(asked))["messages"]
    assert sum(isinstance(turn, ToolMessage) for turn in turns) == 3
    assert "(cleared)" in prompts[-1]
    assert "(cleared)" not in prompts[1]


def test_a_counter_of_ones_own_goes_first_and_an_engine_without_one_says_so() -> None:
    assert scripted(custom_get_token_ids=lambda text: [1, 2, 3]).get_num_tokens("Hello") == 3

    class Plain:
        inner = ScriptedEngine("Hi")

        def __getattr__(self, name: str) -> Any:
            if name in ("token_ids", "count_prompt"):
                raise AttributeError(name)
            return getattr(self.inner, name)

    with pytest.raises(ConfigurationError, match="custom_get_token_ids"):
        TTAChatModel(model=Plain()).get_num_tokens("Hello")

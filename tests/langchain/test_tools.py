"""Tool calling through LangChain: a scripted model writes the calls, everything else is real."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from tta_middleware import Noise, Policy, TTAChatModel
from tta_middleware.chat_model.messages import from_langchain, to_langchain
from tta_middleware.chat_model.tools import CallQuality, ToolUse, describe
from tta_middleware.config import Windows
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.settings import BRIDGES
from tta_middleware.testing.scripted_engine import Script, ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import Completion, Message, PromptEmbeddings

ASK = "What is the weather in Paris?"
NOTICE = Policy().notice


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


@tool
def mail(to: str, text: str) -> str:
    """Send a mail."""
    return "sent"


def written(name: str = "get_weather", **arguments: Any) -> str:
    body = str(arguments).replace("'", '"')
    return f'<tool_call>\n{{"name": "{name}", "arguments": {body}}}\n</tool_call>'


CALL = written(city="Paris")


def chat(script: Script, **settings: Any) -> TTAChatModel:
    engine = settings.pop("engine", None) or ScriptedEngine(script)
    return TTAChatModel(
        **(
            {"model": engine, "moderator": ScriptedModerator(score=flagging("forbidden", "666")), "method": "none"}
            | settings
        )
    )


async def both_ways(model: Any, asked: Any = ASK) -> tuple[AIMessage, AIMessageChunk, list[AIMessageChunk]]:
    chunks = [chunk async for chunk in model.astream(asked)]
    return await model.ainvoke(asked), reduce(add, chunks), chunks


@pytest.mark.parametrize("release", ["window", "end"])
@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (CALL, "", ["get_weather"]),
        (f"Let me see.\n{CALL}\n", "Let me see.", ["get_weather"]),
        (f"{CALL}\n{written('mail', to='Bo', text='Sunny!')}", "", ["get_weather", "mail"]),
        ("It is always sunny there. " * 9, "It is always sunny there. " * 9, []),
    ],
)
async def test_a_stream_adds_up_to_the_answer(text: str, content: str, names: list[str], release: str) -> None:
    model = chat(text, release=release).bind_tools([get_weather, mail])
    asked, streamed, chunks = await both_ways(model)
    assert (asked.content, [call["name"] for call in asked.tool_calls]) == (content, names)
    assert (streamed.content, streamed.tool_calls) == (asked.content, asked.tool_calls)
    assert streamed.invalid_tool_calls == asked.invalid_tool_calls == []
    assert streamed.usage_metadata == asked.usage_metadata
    reason = "tool_calls" if names else "stop"
    assert asked.response_metadata["finish_reason"] == streamed.response_metadata["finish_reason"] == reason
    # Every chunk with a call holds all of it.
    assert [chunk.tool_calls for chunk in chunks if chunk.tool_call_chunks] == [[call] for call in asked.tool_calls]


def agent_script(call: ScriptedCall) -> str:
    if "<|tool|>" not in call.conversation:
        return CALL
    return f"The tool says: {call.conversation.rpartition('<|tool|>')[2]}"


@pytest.mark.parametrize("sync", [True, False])
async def test_an_agent_calls_a_tool_and_answers(sync: bool) -> None:
    agent = create_agent(chat(agent_script), [get_weather, mail])
    asked: Any = {"messages": [HumanMessage(ASK)]}
    turns = (agent.invoke(asked) if sync else await agent.ainvoke(asked))["messages"]
    assert [type(turn) for turn in turns] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert turns[1].tool_calls[0]["id"] == turns[2].tool_call_id
    assert turns[3].text == "The tool says: It is sunny in Paris."


async def test_an_agent_neither_carries_out_nor_keeps_a_flagged_call() -> None:
    sent: list[str] = []

    @tool
    def post(text: str) -> str:
        """Post a text."""
        sent.append(text)
        return "posted"

    saver = InMemorySaver()
    agent = create_agent(chat(written("post", text="a forbidden thing")), [post], checkpointer=saver)
    config: Any = {"configurable": {"thread_id": "1"}}
    modes = ["messages", "updates", "values"]
    parts = [part async for part in agent.astream({"messages": [("user", ASK)]}, config, stream_mode=modes)]
    kept = [(await agent.aget_state(config)).values, *(dict(saver.storage), dict(saver.blobs), dict(saver.writes))]
    assert sent == []
    assert "forbidden" not in f"{parts}{kept}"
    assert kept[0]["messages"][-1].text == NOTICE


async def test_a_broken_call_is_reported_and_never_carried_out() -> None:
    cut_off = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par'
    asked, streamed, _ = await both_ways(chat(cut_off).bind_tools([get_weather]))
    for message in (asked, streamed):
        assert message.tool_calls == []
        assert [call["args"] for call in message.invalid_tool_calls] == [cut_off]
        assert message.response_metadata["finish_reason"] == "stop"


def bad_then_good(call: ScriptedCall) -> str:
    whole = written("mail", to="Bo", text="safe" if call.moved > 0.6 else "forbidden")
    return whole.removeprefix(call.prefix)


@pytest.mark.parametrize("choice", ["auto", "any"])
async def test_flagged_arguments_are_repaired(choice: str) -> None:
    model = chat(bad_then_good, method=Noise(), seed=1)
    asked, streamed, chunks = await both_ways(model.bind_tools([mail], tool_choice=choice))
    for message in (asked, streamed):
        assert message.response_metadata["tta"]["outcome"] == "neutralised"
        assert [call["args"] for call in message.tool_calls] == [{"to": "Bo", "text": "safe"}]
    assert "forbidden" not in str(chunks)
    assert any("forbidden" in text for texts in model.moderator.calls for text in texts)


@pytest.mark.parametrize("choice", ["auto", "any"])
async def test_a_repaired_call_need_not_read_like_prose(choice: str) -> None:
    def script(call: ScriptedCall) -> str:
        return written("add_up", a=[1, 2] if call.moved > 0.6 else [666]).removeprefix(call.prefix)

    @tool
    def add_up(a: list[int]) -> int:
        """The sum of numbers."""
        return sum(a)

    model = chat(script, method=Noise(), seed=1).bind_tools([add_up], tool_choice=choice)
    for message in (await both_ways(model))[:2]:
        assert message.response_metadata["tta"]["outcome"] == "neutralised"
        assert [call["args"] for call in message.tool_calls] == [{"a": [1, 2]}]


@pytest.mark.parametrize("choice", ["auto", "mail"])
async def test_a_late_flag_in_a_call_is_repaired_from_the_part_that_was_checked(choice: str) -> None:
    calm = "Roses like the sun, mint grows in shade, figs want a wall behind them, and plums keep in a cool cellar; "

    def script(call: ScriptedCall) -> str:
        end = "and all is well" if call.moved > 0.6 else "and a forbidden thing"
        return written("mail", to="Bo", text=calm + end).removeprefix(call.prefix)

    model = chat(script, method=Noise(), seed=1, windows=Windows(first=20, largest=40))
    _, streamed, chunks = await both_ways(model.bind_tools([mail], tool_choice=choice))
    assert streamed.response_metadata["tta"]["seam"] > 100
    assert streamed.tool_calls[0]["args"] == {"to": "Bo", "text": calm + "and all is well"}
    assert [bool(chunk.tool_call_chunks) for chunk in chunks] == [True, False]


@pytest.mark.parametrize("release", ["window", "end"])
@pytest.mark.parametrize("choice", ["auto", "mail"])
@pytest.mark.parametrize("length", [1, 40])
async def test_flagged_arguments_are_blocked_with_all_of_their_call(release: str, choice: str, length: int) -> None:
    text = written("mail", to="Bo", text="a harmless word and " * length + "the forbidden one")
    model = chat(lambda call: text.removeprefix(call.prefix), release=release, windows=Windows(first=20, largest=40))
    asked, streamed, chunks = await both_ways(model.bind_tools([mail], tool_choice=choice))
    for message in (asked, streamed):
        assert (message.content, message.tool_calls, message.invalid_tool_calls) == (NOTICE, [], [])
        assert message.response_metadata["finish_reason"] == "content_filter"
    assert "harmless" not in str(chunks)


async def test_words_before_a_blocked_call_stay() -> None:
    text = "Let me write that mail for you, it will not take me long. " + written("mail", to="Bo", text="forbidden")
    model = chat(text, windows=Windows(first=10, largest=10)).bind_tools([mail])
    streamed = (await both_ways(model))[1]
    assert streamed.text.startswith("Let me write that mail")
    assert streamed.text.endswith(NOTICE)
    assert (streamed.tool_calls, streamed.invalid_tool_calls) == ([], [])


async def test_a_named_tool_is_called_whatever_the_model_would_say() -> None:
    begun: list[str] = []

    def script(call: ScriptedCall) -> str:
        begun.append(call.prefix)
        return ' {"city": "Rome"}}\n</tool_call>' if call.prefix else "I would rather talk."

    model = chat(script)
    message = await model.bind_tools([get_weather, mail], tool_choice="get_weather").ainvoke("Hello!")
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("get_weather", {"city": "Rome"})]
    assert begun == ['<tool_call>\n{"name": "get_weather", "arguments":']
    assert (await model.bind_tools([get_weather], tool_choice="auto").ainvoke("Hello!")).tool_calls == []
    assert begun[-1] == ""


async def test_hidden_tools_are_not_shown_and_calls_stay_text() -> None:
    seen: list[str] = []

    def script(call: ScriptedCall) -> str:
        seen.append(call.conversation)
        return CALL

    message = await chat(script).bind_tools([get_weather], tool_choice="none").ainvoke(ASK)
    assert "get_weather" not in seen[0]
    assert (message.text, message.tool_calls) == (CALL, [])


@pytest.mark.parametrize("choice", ["send_mail", {"type": "function", "function": {"name": "x"}}, 3])
def test_a_choice_of_no_tool_is_refused_when_it_is_bound(choice: Any) -> None:
    with pytest.raises(ConfigurationError, match="get_weather, mail"):
        chat("").bind_tools([get_weather, mail], tool_choice=choice)


@pytest.mark.parametrize("choice", ["required", True, {"type": "function", "function": {"name": "get_weather"}}])
async def test_other_spellings_of_a_choice_are_understood(choice: Any) -> None:
    model = chat(lambda call: CALL.removeprefix(call.prefix) if call.prefix else "no")
    assert (await model.bind_tools([get_weather], tool_choice=choice).ainvoke(ASK)).tool_calls


async def test_a_model_that_takes_no_tools_says_so(model: TTAChatModel) -> None:
    with pytest.raises(ConfigurationError, match="takes no tools"):
        await model.bind_tools([get_weather]).ainvoke(ASK)
    assert (
        "Paris"
        in (await model.bind_tools([get_weather], tool_choice="none").ainvoke("What is the capital of France?")).text
    )


async def test_an_engine_without_a_tool_format_says_so() -> None:
    class Plain:
        inner = ScriptedEngine("Hi")

        def __getattr__(self, name: str) -> Any:
            if name == "tool_format":
                raise AttributeError(name)
            return getattr(self.inner, name)

    with pytest.raises(ConfigurationError, match=r"no tool_format\(\)"):
        await chat("", engine=Plain()).bind_tools([get_weather]).ainvoke(ASK)


async def test_ids_repeat_with_the_conversation_and_differ_within_it() -> None:
    model = chat(f"{CALL}{CALL}").bind_tools([get_weather])
    first, again = await model.ainvoke(ASK), await model.ainvoke(ASK)
    results = [ToolMessage("sunny", tool_call_id=call["id"]) for call in first.tool_calls]
    later = await model.ainvoke([HumanMessage(ASK), first, *results])
    ids = [call["id"] for message in (first, later) for call in message.tool_calls]
    assert [call["id"] for call in again.tool_calls] == ids[:2]
    assert len(set(ids)) == 4
    assert all(len(str(call_id)) == 9 and str(call_id).isalnum() for call_id in ids)


async def test_a_fallback_gets_the_whole_conversation() -> None:
    seen: list[Any] = []
    fallback = RunnableLambda(lambda turns: seen.extend(turns) or AIMessage("Ask me something else."))
    model = chat("the forbidden answer", fallback=fallback).bind_tools([get_weather])
    talk = [
        SystemMessage("Be brief."),
        HumanMessage(ASK),
        AIMessage("", tool_calls=[{"name": "get_weather", "args": {"city": "Paris"}, "id": "1", "type": "tool_call"}]),
        ToolMessage("sunny", tool_call_id="1"),
    ]
    assert (await model.ainvoke(talk)).text == "Ask me something else."
    assert [type(turn) for turn in seen] == [type(turn) for turn in talk]
    assert seen[2].tool_calls == talk[2].tool_calls  # type: ignore[attr-defined]
    assert (seen[3].tool_call_id, seen[3].name) == ("1", "get_weather")


def test_calls_and_results_survive_the_conversion_there_and_back() -> None:
    turns = from_langchain(
        [
            HumanMessage(ASK),
            AIMessage([{"type": "text", "text": "Hm."}], tool_calls=[{"name": "f", "args": {"a": 1}, "id": "x"}]),
            ToolMessage([{"type": "text", "text": "42"}], tool_call_id="x"),
        ]
    )
    assert [(turn.role, turn.content, turn.name, turn.tool_call_id) for turn in turns] == [
        ("user", ASK, None, None),
        ("assistant", "Hm.", None, None),
        ("tool", "42", "f", "x"),
    ]
    assert [(call.name, call.arguments, call.id) for call in turns[1].tool_calls] == [("f", {"a": 1}, "x")]
    assert from_langchain(to_langchain(turns)) == turns


async def asked(engine: ScriptedEngine, use: ToolUse, prefix: str = "") -> PromptEmbeddings:
    """The prompt of a request with tools, as the guard asks it."""
    begun = use.opening + prefix
    prompt = await engine.embed([Message("user", ASK)], assistant_prefix=begun, tools=use.tools)
    return replace(prompt, assistant_prefix=begun)


@pytest.mark.parametrize(
    ("choice", "text", "reason", "problems"),
    [
        ("auto", CALL, "stop", ()),
        ("auto", written("unknown"), "stop", ("unknown_tool",)),
        ("auto", "<tool_call>{]}</tool_call>", "stop", ("broken_tool_call",)),
        ("auto", '<tool_call>{"name": "mail", "arg', "aborted", ()),
        ("auto", '<tool_call>{"name": "mail", "arg', "length", ("broken_tool_call",)),
        ("auto", "It is sunny in Paris today.", "stop", ()),
        ("auto", "", "stop", ("empty",)),
        ("get_weather", ' {"city": "Rome"}}', "stop", ()),
        ("get_weather", " {}}</tool_call>" + written("mail"), "stop", ()),
        ("get_weather", " no idea", "stop", ("broken_tool_call",)),
        ("auto", written("mail", text="I will help you with it. " * 12), "stop", ("repetition",)),
        ("get_weather", ' {"city": "' + "the city of light and " * 12 + '"}}', "stop", ("repetition",)),
        ("auto", written("mail", text="Dear Bo, the roses are out, and so are the first of the plums."), "stop", ()),
    ],
)
async def test_a_repaired_answer_with_tools_is_usable_if_its_calls_are(
    choice: str, text: str, reason: Any, problems: tuple[str, ...]
) -> None:
    inner = ScriptedEngine("")
    use = await ToolUse.of(inner, describe([get_weather, mail]), choice)
    assert use is not None
    prompt = await asked(inner, use)
    reports = await CallQuality(use).assess(inner, prompt, [Completion(text, tuple(inner.tokens(text)), reason)])
    assert [report.problems for report in reports] == [problems]


@pytest.mark.parametrize(
    ("begun", "problems"),
    [("I will tell you how", ()), ('<tool_call>{"name": "mail", "arguments": {"to": "', ("bridge_in_a_tool_call",))],
)
async def test_a_bridge_leads_out_of_prose_but_not_out_of_a_call(begun: str, problems: tuple[str, ...]) -> None:
    inner = ScriptedEngine("")
    use = await ToolUse.of(inner, describe([mail]), "auto")
    assert use is not None
    prompt = await asked(inner, use, begun + BRIDGES[0])
    rest = ' something safe."}}</tool_call>'
    # Once it is over, what follows the bridge is judged by itself.
    done = [Completion(text, tuple(inner.tokens(text)), "stop") for text in (BRIDGES[0] + rest, rest)]
    assert [report.problems for report in await CallQuality(use).assess(inner, prompt, done)] == [problems, problems]


async def test_a_call_that_babbles_is_not_usable_and_a_continued_one_is_read_from_its_beginning() -> None:
    inner = ScriptedEngine("", nll=lambda text: 9.0 if "soup" in text else 1.0)
    use = await ToolUse.of(inner, describe([mail]), "auto")
    assert use is not None
    begun, rest = '<tool_call>{"name": "mail", "arguments": {"to": "Bo', '", "text": "Hi"}}</tool_call>'
    prompt = await asked(inner, use, begun)
    texts = [rest, rest.replace("Hi", "soup"), '", "text']
    done = [Completion(text, tuple(inner.tokens(text)), "stop") for text in texts]
    reports = await CallQuality(use).assess(inner, prompt, done)
    assert [report.problems for report in reports] == [(), ("not_fluent",), ("broken_tool_call",)]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "Hello."}], "Hello."),
        ([{"type": "redacted_thinking", "data": "x"}, "Hello."], "Hello."),
        ([{"type": "refusal", "refusal": "I would rather not."}], "I would rather not."),
        ([{"type": "server_tool_use", "id": "1", "name": "web_search", "input": {}}], ""),
        ([{"type": "web_search_tool_result", "content": []}, {"type": "output_text", "text": "Hi."}], "Hi."),
        ([{"type": "function_call", "name": "f", "arguments": "{}"}, {"type": "text"}], ""),
        ([{"type": "image", "url": "x"}, {"type": "text", "text": None}, {"text": "Hi."}], "Hi."),
        ([{"type": "non_standard", "value": {}}, {"type": "reasoning", "reasoning": "Hm."}], ""),
    ],
)
async def test_what_another_providers_model_said_is_read_as_text(content: list[Any], text: str) -> None:
    talk = [HumanMessage("Hello!"), AIMessage(content), HumanMessage("And now?")]
    assert [turn.content for turn in from_langchain(talk)] == ["Hello!", text, "And now?"]
    assert (await chat("Fine words.").ainvoke(talk)).text == "Fine words."


def test_what_a_user_shows_a_text_model_is_an_error_but_an_empty_text_is_none() -> None:
    with pytest.raises(ConfigurationError, match="content of type 'image'"):
        from_langchain([HumanMessage([{"type": "text", "text": "See:"}, {"type": "image", "url": "x"}])])
    turns = from_langchain([HumanMessage([{"type": "text"}, {"type": "text", "text": "Hi."}])])
    assert [turn.content for turn in turns] == ["Hi."]


def test_older_messages_of_functions_are_read() -> None:
    turns = from_langchain(
        [ChatMessage(role="developer", content="Be brief."), FunctionMessage(name="f", content="42")]
    )
    assert [(turn.role, turn.content, turn.name) for turn in turns] == [
        ("system", "Be brief.", None),
        ("tool", "42", "f"),
    ]


@pytest.mark.parametrize(("parallel", "count"), [(None, 2), (True, 2), (False, 1)])
async def test_calls_that_must_not_be_parallel_are_one(parallel: bool | None, count: int) -> None:
    model = chat(f"{CALL}\n{written('mail', to='Bo', text='Sunny!')}")
    bound = model.bind_tools([get_weather, mail], parallel_tool_calls=parallel)
    for message in (await both_ways(bound))[:2]:
        assert [call["name"] for call in message.tool_calls] == ["get_weather", "mail"][:count]
        assert message.invalid_tool_calls == []


@pytest.mark.parametrize("setting", [{"strict": True}, {"functions": []}, {"function_call": "auto"}])
async def test_settings_of_other_providers_tools_are_refused_with_what_to_use(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="bind_tools"):
        await chat("Fine.").ainvoke(ASK, **setting)


@pytest.mark.parametrize("choice", ["auto", "any", "mail"])
async def test_a_broken_call_is_reported_as_it_was_written_and_was_judged(choice: str) -> None:
    # A model wrote this: the string ends too early. The auditor checks that all of it was scored.
    whole = '<tool_call>\n{"name": "mail", "arguments": {"text": "from a good friend (of Bo)". "}}'
    model = chat(lambda call: whole.removeprefix(call.prefix)).bind_tools([mail], tool_choice=choice)
    for message in (await both_ways(model))[:2]:
        assert message.tool_calls == []
        assert [call["args"] for call in message.invalid_tool_calls] == [whole]


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        (3, "tools is a list, such as .*, not int"),
        ("opening_hours", "tools is a list, such as .*, not str"),
        ({"name": "opening_hours"}, "tools is a list, such as .*, not dict"),
        ([3], "a tool is a function, .*; 3 cannot be read as one: ValueError"),
        ([{"type": "function"}], "cannot be read as one: KeyError: 'function'"),
        ([{"type": "function", "function": {"description": "hours"}}], "cannot be read as one: KeyError: 'name'"),
    ],
)
def test_what_is_no_tool_is_refused_in_a_sentence(tools: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        TTAChatModel(model=ScriptedEngine("-"), moderator=ScriptedModerator()).bind_tools(tools)
    with pytest.raises(ConfigurationError, match=says):
        TTAChatModel(model=ScriptedEngine("-"), moderator=ScriptedModerator()).invoke("hello", tools=tools)


def test_whether_calls_may_be_parallel_is_true_or_false() -> None:
    with pytest.raises(ConfigurationError, match="parallel_tool_calls is True or False, not 3"):
        TTAChatModel(model=ScriptedEngine("-"), moderator=ScriptedModerator()).invoke("hello", parallel_tool_calls=3)

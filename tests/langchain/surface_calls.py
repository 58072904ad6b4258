"""The ways in which LangChain and LangGraph let a user call a chat model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableGenerator
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import MessagesState, StateGraph
from surface_cases import CASES, ENDLESS, SHORT, Shape
from surface_record import Record

from tta_middleware import TTAChatModel
from tta_middleware.testing.scripted_engine import ScriptedEngine

QUESTION = "Please describe the old harbour town"
SUBSTITUTE = "Another model steps in here."

Kind = Literal["acall", "astream", "call", "stream"]


@dataclass
class Scene:
    """What a surface is called with."""

    model: TTAChatModel
    config: RunnableConfig
    record: Record
    kept: dict[str, Any] = field(default_factory=dict)

    def keep(self, place: str, thing: Any) -> Any:
        """Something that is searched once the call is over, such as a checkpointer."""
        self.kept[place] = thing
        return thing


@dataclass(frozen=True, eq=False)
class Surface:
    """One way to call the model.

    Attributes:
        events: a run is around the model, so that custom events have somewhere to go.
        in_loop: a sync call inside a running event loop.
        whole: what streams is the whole answer only.
        writes: the consumer is given the custom events.
        unleavable: ways of leaving that this surface does not have.
        limit: why decoding goes on after the consumer has left.
        expects: what the consumer may see, by case, where it is not what the case says.
    """

    name: str
    kind: Kind
    open: Callable[[Scene], Any]
    events: bool = False
    writes: bool = False
    in_loop: bool = False
    whole: bool = False
    shape: Shape = "text"
    loops: int = 1
    unleavable: frozenset[str] = frozenset()
    limit: str = ""
    expects: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def endless(self) -> int:
        """Words of an answer that a consumer leaves half way."""
        return SHORT if self.limit else len(ENDLESS)

    @property
    def streams(self) -> bool:
        return self.kind in ("astream", "stream") and not self.whole


def chain(scene: Scene) -> Any:
    prompt = ChatPromptTemplate.from_messages([("system", "You are brief."), ("user", "{question}")])
    return prompt | scene.model | StrOutputParser()


_ASKED = {"question": QUESTION}


def shouted(scene: Scene) -> Any:
    def shout(chunks: Iterator[Any]) -> Iterator[str]:
        for chunk in chunks:
            scene.record.note("downstream generator", chunk)
            yield f"{chunk.text}"

    async def ashout(chunks: AsyncIterator[Any]) -> AsyncIterator[str]:
        async for chunk in chunks:
            scene.record.note("downstream generator", chunk)
            yield f"{chunk.text}"

    return scene.model | RunnableGenerator(shout, ashout)


def with_fallback(scene: Scene) -> Any:
    other = scene.model.model_copy(update={"model": ScriptedEngine(SUBSTITUTE), "method": "none"})
    return scene.model.with_fallbacks([other])


def with_retry(scene: Scene) -> Any:
    return scene.model.with_retry(stop_after_attempt=2, wait_exponential_jitter=False)


def cached(scene: Scene) -> TTAChatModel:
    return scene.model.model_copy(update={"cache": scene.keep("cache", InMemoryCache())})


def structured(scene: Scene) -> Any:
    return scene.model.with_structured_output({"title": "Answer", "type": "object"}, method="json_mode")


@tool
def look_up(what: str) -> str:
    """Looks something up."""
    return "Nothing was found."


def with_tools(scene: Scene) -> Any:
    return scene.model.bind_tools([look_up])


_ASK: list[BaseMessage] = [HumanMessage(QUESTION)]
_TURN: dict[str, Any] = {"messages": _ASK}


def _config(scene: Scene) -> RunnableConfig:
    return {**scene.config, "configurable": {"thread_id": "one"}}


def graph(scene: Scene, node: Callable[..., Any]) -> Any:
    made = StateGraph(MessagesState)
    made.add_node("model", node)
    made.set_entry_point("model")
    return made.compile(checkpointer=scene.keep("checkpoints", InMemorySaver()))


def asking(scene: Scene) -> Any:
    """A graph whose node invokes the model."""

    async def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await scene.model.ainvoke(state["messages"])]}

    return graph(scene, node)


def streaming(scene: Scene) -> Any:
    """A graph whose node streams the model."""

    async def node(state: MessagesState) -> dict[str, Any]:
        text = ""
        async for chunk in scene.model.astream(state["messages"]):
            text += str(chunk.text)
        return {"messages": [AIMessage(text)]}

    return graph(scene, node)


def blocking(scene: Scene) -> Any:
    """A graph with a sync node."""

    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [scene.model.invoke(state["messages"])]}

    return graph(scene, node)


def agent(scene: Scene) -> Any:
    return create_agent(scene.model, [], checkpointer=scene.keep("checkpoints", InMemorySaver()))


_MODES = ["messages", "updates", "values", "custom"]
_ALL_MODES = [*_MODES, "checkpoints", "tasks", "debug"]


def _graph_stream(build: Callable[[Scene], Any], mode: Any, **options: Any) -> Callable[[Scene], Any]:
    return lambda s: build(s).astream(_TURN, _config(s), stream_mode=mode, **options)


def _seen(**expected: str) -> dict[str, frozenset[str]]:
    return {case.replace("_", " "): frozenset(seen.split("|")) for case, seen in expected.items()}


_WAITS = "LangChain waits for the run to end"
_DRAINS = "LangChain reads a sync chain's input to its end"
_THREAD = "LangGraph waits for a sync node to end"
_SIBLINGS = "LangChain lets the batch go on"
_ALL_LEAVING = frozenset({"close", "walk"})
_PARSING = "ModelRefusalError"
_UNPARSED = _seen(
    moderator_down=_PARSING, moderator_down_half_way=f"{_PARSING}|beginning, rest",
    moderator_down_in_the_repair=_PARSING, no_repair_method=_PARSING, budget_used_up=_PARSING,
)  # fmt: skip
# An unfinished JSON string is read as far as it goes; the notice is no part of it, but the refusal.
_REFUSED = f"beginning, {_PARSING}"
_PARTLY_PARSED = _seen(
    moderator_down=_PARSING, moderator_down_half_way=f"{_REFUSED}|{_PARSING}",
    moderator_down_in_the_repair=_REFUSED, no_repair_method=_REFUSED, budget_used_up=_REFUSED,
)  # fmt: skip
_ONE_LEFT_OUT = _seen(
    engine_fails="EngineError|beginning, rest, EngineError|beginning, rest",
    moderator_down_half_way="beginning, rest, notice",
)
_NO_TEXT = {
    case.name: frozenset(
        {"EngineError"}
        if case.fail_at
        else {"RefusedAnswerError"}
        if case.model.get("fallback") == "raise"
        else {"CancelledError"}
        if case.leaving
        else {"nothing"}
    )
    for case in CASES
}
# A tool call is given out whole or not at all.
_UNCALLED = _seen(
    moderator_down_half_way="notice", moderator_down_in_the_repair="notice", no_repair_method="notice",
    budget_used_up="notice", engine_fails="EngineError", fallback_raises="RefusedAnswerError",
    consumer_is_cancelled="CancelledError",
)  # fmt: skip
_STOOD_IN = _seen(engine_fails="substitute", fallback_raises="substitute")
_RETRIED = _seen(engine_fails="beginning, rest")
# Until the answer's first chunk another model may still take over.
_STOOD_IN_EARLY = _seen(engine_fails="substitute|beginning, EngineError")

SURFACES = (
    Surface("ainvoke", "acall", lambda s: s.model.ainvoke(QUESTION, s.config)),
    Surface("agenerate", "acall", lambda s: s.model.agenerate([_ASK], callbacks=s.config["callbacks"])),
    Surface("abatch", "acall", lambda s: s.model.abatch([QUESTION] * 3, s.config), expects=_ONE_LEFT_OUT,
            limit=_SIBLINGS),
    Surface("ainvoke, cache", "acall", lambda s: cached(s).ainvoke(QUESTION, s.config)),
    Surface("ainvoke, with_retry", "acall", lambda s: with_retry(s).ainvoke(QUESTION, s.config), expects=_RETRIED),
    Surface("ainvoke, with_fallbacks", "acall", lambda s: with_fallback(s).ainvoke(QUESTION, s.config),
            expects=_STOOD_IN),
    Surface("ainvoke, structured output", "acall", lambda s: structured(s).ainvoke(QUESTION, s.config), shape="json",
            expects=_UNPARSED),
    Surface("ainvoke, tools", "acall", lambda s: with_tools(s).ainvoke(QUESTION, s.config), shape="tool"),
    Surface("chain.ainvoke", "acall", lambda s: chain(s).ainvoke(_ASKED, s.config)),
    Surface("graph.ainvoke", "acall", lambda s: asking(s).ainvoke(_TURN, _config(s))),
    Surface("agent.ainvoke", "acall", lambda s: agent(s).ainvoke(_TURN, _config(s))),
    Surface("astream", "astream", lambda s: s.model.astream(QUESTION, s.config)),
    Surface("astream, two loops", "astream", lambda s: s.model.astream(QUESTION, s.config), loops=2,
            expects=_RETRIED),
    Surface("astream, output v1", "astream",
            lambda s: s.model.model_copy(update={"output_version": "v1"}).astream(QUESTION, s.config)),
    Surface("astream_events v1", "astream", lambda s: s.model.astream_events(QUESTION, s.config, version="v1"),
            limit=_WAITS),
    Surface("astream_events v2", "astream", lambda s: s.model.astream_events(QUESTION, s.config, version="v2")),
    Surface("astream_events v3", "astream", lambda s: s.model.astream_events(QUESTION, s.config, version="v3"),
            events=True, unleavable=frozenset({"walk"})),
    Surface("astream_log", "astream", lambda s: s.model.astream_log(QUESTION, s.config), limit=_WAITS),
    Surface("abatch_as_completed", "astream", lambda s: s.model.abatch_as_completed([QUESTION] * 3, s.config),
            whole=True, unleavable=_ALL_LEAVING, limit=_SIBLINGS, expects=_ONE_LEFT_OUT),
    Surface("astream, with_retry", "astream", lambda s: with_retry(s).astream(QUESTION, s.config)),
    Surface("astream, with_fallbacks", "astream", lambda s: with_fallback(s).astream(QUESTION, s.config),
            expects=_STOOD_IN_EARLY),
    Surface("astream, structured output", "astream", lambda s: structured(s).astream(QUESTION, s.config),
            shape="json", events=True, expects=_PARTLY_PARSED),
    Surface("astream, tools", "astream", lambda s: with_tools(s).astream(QUESTION, s.config), shape="tool",
            unleavable=_ALL_LEAVING, expects=_UNCALLED),
    Surface("RunnableGenerator, async", "astream", lambda s: shouted(s).astream(QUESTION, s.config), events=True),
    Surface("chain.astream", "astream", lambda s: chain(s).astream(_ASKED, s.config), events=True),
    Surface("chain.astream_events v2", "astream", lambda s: chain(s).astream_events(_ASKED, s.config, version="v2"),
            events=True),
    Surface("chain.astream_log", "astream", lambda s: chain(s).astream_log(_ASKED, s.config), events=True,
            limit=_WAITS),
    Surface("graph.astream messages", "astream", _graph_stream(asking, "messages"), events=True),
    Surface("graph.astream updates", "astream", _graph_stream(asking, "updates"), whole=True, unleavable=_ALL_LEAVING),
    Surface("graph.astream values", "astream", _graph_stream(asking, "values"), whole=True, unleavable=_ALL_LEAVING),
    Surface("graph.astream custom", "astream", _graph_stream(streaming, "custom"), events=True, writes=True,
            unleavable=_ALL_LEAVING, expects=_NO_TEXT),
    # The error, which tasks and checkpoints show as it is, carries the message that stands in for the answer.
    Surface("graph.astream, all modes", "astream", _graph_stream(asking, _ALL_MODES), events=True, writes=True,
            expects={"fallback raises": frozenset({"beginning, notice, RefusedAnswerError"})}),
    Surface("graph.astream, node streams", "astream", _graph_stream(streaming, _MODES), events=True, writes=True),
    Surface("graph.astream, sync node", "astream", _graph_stream(blocking, _MODES), events=True, writes=True,
            limit=_THREAD),
    Surface("graph.astream_events v2", "astream", lambda s: asking(s).astream_events(_TURN, _config(s), version="v2"),
            events=True),
    Surface("graph.astream_events v3", "astream", lambda s: asking(s).astream_events(_TURN, _config(s), version="v3"),
            events=True, unleavable=frozenset({"walk"})),
    Surface("agent.astream", "astream", _graph_stream(agent, _MODES), events=True, writes=True),
    Surface("invoke", "call", lambda s: s.model.invoke(QUESTION, s.config)),
    Surface("invoke in a running loop", "call", lambda s: s.model.invoke(QUESTION, s.config), in_loop=True),
    Surface("generate", "call", lambda s: s.model.generate([_ASK], callbacks=s.config["callbacks"])),
    Surface("batch", "call", lambda s: s.model.batch([QUESTION] * 3, s.config), expects=_ONE_LEFT_OUT,
            limit=_SIBLINGS),
    Surface("chain.invoke", "call", lambda s: chain(s).invoke(_ASKED, s.config)),
    Surface("graph.invoke", "call", lambda s: blocking(s).invoke(_TURN, _config(s))),
    Surface("agent.invoke", "call", lambda s: agent(s).invoke(_TURN, _config(s))),
    Surface("stream", "stream", lambda s: s.model.stream(QUESTION, s.config)),
    Surface("stream in a running loop", "stream", lambda s: s.model.stream(QUESTION, s.config), in_loop=True),
    Surface("stream_events v3", "stream", lambda s: s.model.stream_events(QUESTION, s.config, version="v3"),
            unleavable=frozenset({"close"})),
    Surface("batch_as_completed", "stream", lambda s: s.model.batch_as_completed([QUESTION] * 3, s.config),
            whole=True, unleavable=_ALL_LEAVING, limit=_SIBLINGS, expects=_ONE_LEFT_OUT),
    Surface("chain.stream", "stream", lambda s: chain(s).stream(_ASKED, s.config), events=True, limit=_DRAINS),
    Surface("RunnableGenerator, sync", "stream", lambda s: shouted(s).stream(QUESTION, s.config), events=True,
            limit=_DRAINS),
    Surface("graph.stream", "stream", lambda s: blocking(s).stream(_TURN, _config(s), stream_mode=_MODES),
            events=True, writes=True, limit=_THREAD),
    Surface("agent.stream", "stream", lambda s: agent(s).stream(_TURN, _config(s), stream_mode=_MODES), events=True,
            writes=True, limit=_THREAD),
)  # fmt: skip


def surface(name: str) -> Surface:
    return next(surface for surface in SURFACES if surface.name == name)

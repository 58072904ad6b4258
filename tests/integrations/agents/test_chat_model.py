"""``GuardedChatModel`` outside agents."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

import anyio
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ModelRefusalError
from langchain_core.messages import AIMessage, HumanMessage, trim_messages
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.runnables import RunnableGenerator
from langchain_tests.unit_tests import ChatModelUnitTests
from pydantic import BaseModel, ValidationError
from tta_langchain_agents import GuardedChatModel, TTAMiddleware
from tta_langchain_agents.testing import ScriptedChatModel

from tta_middleware import TTAChatModel, Windows
from tta_middleware.errors import ConfigurationError, ContextLengthError, EngineError, UnsafeAnswerError
from tta_middleware.moderation.llm_judge import LLMJudge
from tta_middleware.policy import DEFAULT_NOTICE, Policy
from tta_middleware.testing.judging_engine import JudgingEngine
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

BAD = "This is flagme."
LONG = "A safe sentence about trees and rivers. " * 6


def guarded(*answers: Any, **settings: Any) -> GuardedChatModel:
    settings = {"moderator": ScriptedModerator(), "inner": ScriptedChatModel(answers=list(answers))} | settings
    return GuardedChatModel(**settings)


async def test_all_ways_to_ask_give_the_same() -> None:
    model = guarded(BAD)
    texts = [
        model.invoke("hello").text,
        (await model.ainvoke("hello")).text,
        "".join(chunk.text for chunk in model.stream("hello")),
        "".join([chunk.text async for chunk in model.astream("hello")]),
        *(message.text for message in model.batch(["hello", "hello"])),
        *(message.text for message in await model.abatch(["hello", "hello"])),
    ]
    assert set(texts) == {DEFAULT_NOTICE}


async def test_the_sync_api_works_inside_a_running_loop() -> None:
    assert guarded("fine").invoke("hello").text == "fine"
    assert "".join(chunk.text for chunk in guarded(LONG).stream("hello")) == LONG


async def test_a_stream_adds_up_to_the_message() -> None:
    answer = AIMessage(
        LONG,
        tool_calls=[{"name": "look_up", "args": {"word": "tree"}, "id": "1", "type": "tool_call"}],
        response_metadata={"model_name": "m", "finish_reason": "tool_calls"},
        usage_metadata={"input_tokens": 3, "output_tokens": 5, "total_tokens": 8},
    )
    model = guarded(answer)
    whole, chunks = await model.ainvoke("hello"), [chunk async for chunk in model.astream("hello")]
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    assert len([chunk for chunk in chunks if chunk.text]) > 1
    assert (merged.text, merged.tool_calls, merged.usage_metadata) == (
        whole.text,
        whole.tool_calls,
        whole.usage_metadata,
    )
    for message in (merged, whole):
        assert message.response_metadata["finish_reason"] == "tool_calls"
        assert message.response_metadata["tta"]["outcome"] == "clean"


async def test_probabilities_of_words_that_nobody_scored_do_not_leave() -> None:
    alternatives = [{"token": "fine", "logprob": -0.1, "top_logprobs": [{"token": "flagme", "logprob": -2.0}]}]
    said = AIMessage("fine", response_metadata={"model_name": "m", "logprobs": {"content": alternatives}})
    model = guarded(said)
    messages = [await model.ainvoke("hello"), *[chunk async for chunk in model.astream("hello")]]
    assert messages[0].response_metadata["model_name"] == "m"
    assert "flagme" not in str(messages)


class Person(BaseModel):
    """A person."""

    name: str


async def test_structured_output_comes_from_checked_tool_calls() -> None:
    call = AIMessage("", tool_calls=[{"name": "Person", "args": {"name": "Ada"}, "id": "1", "type": "tool_call"}])
    bad = AIMessage("", tool_calls=[{"name": "Person", "args": {"name": "flagme"}, "id": "1", "type": "tool_call"}])
    assert await guarded(call).with_structured_output(Person).ainvoke("who?") == Person(name="Ada")
    with pytest.raises(ModelRefusalError, match="can't help"):
        await guarded(bad).with_structured_output(Person).ainvoke("who?")


@pytest.mark.parametrize("method", ["json_mode", "json_schema"])
async def test_structured_output_is_asked_for_as_the_inner_model_does(method: str) -> None:
    def person(written: str, **settings: Any) -> Any:
        inner = TTAChatModel(model=ScriptedEngine(written), moderator=ScriptedModerator(), method="none")
        return guarded(inner=inner).with_structured_output(Person, method=method, **settings)

    assert await person('{"name": "Ada"}').ainvoke("who?") == Person(name="Ada")
    assert list(person('{"name": "Ada"}').stream("who?"))[-1] == Person(name="Ada")
    found = person('{"name": "Ada"}', include_raw=True).invoke("who?")
    assert (found["parsed"], found["raw"].response_metadata["tta"]["method"]) == (Person(name="Ada"), "block")
    with pytest.raises(ModelRefusalError, match="can't help"):
        await person('{"name": "flagme"}').ainvoke("who?")


async def test_bound_settings_reach_the_inner_model() -> None:
    class Echo(ScriptedChatModel):
        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
            self.answers = [f"{stop} {kwargs}"]
            return super()._generate(messages)

    model = guarded(inner=Echo(answers=[""]))
    assert (await model.bind(size=3).ainvoke("hello", stop=["x"])).text == "['x'] {'size': 3}"


async def test_it_hands_over_to_a_model_that_repairs() -> None:
    local = TTAChatModel(model=ScriptedEngine("A kind word."), moderator=ScriptedModerator(), method="none")
    model = guarded(BAD, repair_model=local)
    assert (await model.ainvoke("hello")).text == "A kind word."
    chain = model | RunnableGenerator(_upper)
    assert "".join([piece async for piece in chain.astream("hello")]) == "A KIND WORD."


async def _upper(chunks: Any) -> Any:
    async for chunk in chunks:
        yield chunk.text.upper()


async def test_leaving_a_stream_stops_the_model_and_leaves_no_task() -> None:
    numbers: list[int] = []
    model = guarded(inner=ScriptedChatModel(answers=["word " * 100_000], before_chunk=numbers.append))
    before = asyncio.all_tasks()
    stream = model.astream("hello")
    assert (await anext(stream)).text
    await stream.aclose()
    # LangChain's astream leaves closing the generator behind it to the event loop's next turns.
    with anyio.fail_after(20):
        while left := asyncio.all_tasks() - before:
            await asyncio.wait(left)
    assert len(numbers) < 100_000


def test_leaving_a_sync_stream_stops_the_model() -> None:
    numbers: list[int] = []
    model = guarded(inner=ScriptedChatModel(answers=["word " * 100_000], before_chunk=numbers.append))
    stream = model.stream("hello")
    assert next(stream).text
    stream.close()
    assert len(numbers) < 100_000


@pytest.mark.parametrize(
    "settings", [{}, {"replacement": lambda _: "Please ask a librarian."}], ids=["notice", "other"]
)
async def test_what_stands_in_for_the_rest_of_json_is_no_part_of_it(settings: Any) -> None:
    written = '{"name": "Anna", "said": "a calm word about the roses and the bees that visit them, then flagme"}'
    model = guarded(written, release=Windows(first=16, largest=16), **settings)
    chain = (model | JsonOutputParser()).astream("hello")
    parts = [await anext(chain), await anext(chain)]
    with pytest.raises(ModelRefusalError, match="librarian" if settings else "can't help"):
        parts += [part async for part in chain]
    said = "".join([chunk.text async for chunk in guarded(written, release=Windows(first=16, largest=16)).astream("x")])
    assert written.startswith(said)
    assert len(said) > 32


async def test_a_replacement_is_judged_as_the_end_of_what_has_left() -> None:
    def score(text: str) -> dict[str, float]:
        return {"violence": float("flagme" in text or {"light", "match"} <= {*text.split()})}

    said = "You need some light wood and a dry place for it, and flagme."
    settings: Any = {"moderator": ScriptedModerator(score=score), "replacement": lambda _: "Take a match then."}
    late = guarded(said, release=Windows(first=16, largest=16), **settings)
    assert "".join([chunk.text async for chunk in late.astream("x")]).endswith(f"\n\n{DEFAULT_NOTICE}")
    assert (await late.ainvoke("x")).text == "Take a match then."


@pytest.mark.parametrize("last", [False, True], ids=["at once", "at its end"])
async def test_another_models_answer_is_judged_as_the_end_of_what_has_left(last: bool) -> None:
    def score(text: str) -> dict[str, float]:
        return {"violence": float("flagme" in text or {"light", "match"} <= {*text.split()})}

    said = "You need some light wood and a dry place for it, and flagme."
    answer = f"{'There is a good deal to be said for patience. ' * 12 if last else ''}Take a match then."
    local = TTAChatModel(model=ScriptedEngine(answer), moderator=ScriptedModerator(), method="none")
    settings: Any = {"moderator": ScriptedModerator(score=score), "repair_model": local}
    late = guarded(said, release=Windows(first=16, largest=16), **settings)
    chunks = [chunk async for chunk in late.astream("x")]
    text = "".join(str(chunk.text) for chunk in chunks)
    assert "match" not in text
    assert text.endswith(f"\n\n{DEFAULT_NOTICE}")
    assert ("patience" in text) is last
    assert chunks[-1].response_metadata["finish_reason"] == "content_filter"
    assert (await late.ainvoke("x")).text == answer


async def test_a_model_that_fails_fails_as_before() -> None:
    def fail(number: int) -> None:
        if number == 5:
            raise ConnectionError("no model here")

    model = guarded(inner=ScriptedChatModel(answers=[LONG], before_chunk=fail))
    with pytest.raises(ConnectionError, match="no model here"):
        [chunk async for chunk in model.astream("hello")]
    with pytest.raises(ConnectionError, match="no model here"):
        list(model.stream("hello"))


class QuotingError(Exception):
    """Carries what a model said where it is not printed, as some of LangChain's do."""

    def __init__(self, **carried: Any) -> None:
        super().__init__("no JSON")
        self.__dict__ |= carried


ERRORS: dict[str, Exception] = {
    "message": ValueError("no JSON: flagme"),
    "text": QuotingError(llm_output="flagme"),
    "list": QuotingError(answers=["flagme"]),
    "raw message": ModelRefusalError(raw_message=AIMessage("flagme")),
    "group": ExceptionGroup("several", [ValueError("fine"), ValueError("flagme")]),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
async def test_an_error_that_quotes_what_is_flagged_is_withheld(error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    class Fails(ScriptedChatModel):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            fail()

    broken = guarded(inner=Fails(answers=[LONG], before_chunk=lambda number: fail() if number == 5 else None))
    for model, part in ((broken, "the model"), (guarded(BAD, replacement=fail), "the replacement")):
        for ask in (model.invoke, lambda given, model=model: list(model.stream(given))):
            with pytest.raises(
                EngineError, match=rf"{part} failed with {type(error).__name__} \(\w+\.py:\d+\); "
            ) as caught:
                ask("hello")
            assert caught.value.__suppress_context__
        with pytest.raises(EngineError, match="withheld"):
            await model.ainvoke("hello")


async def test_an_error_of_a_guard_further_in_is_its_own_whatever_its_trace_tells() -> None:
    words = ScriptedModerator(score=flagging("violence"))  # the name of a category
    inner = guarded(BAD, on_flagged="raise")
    with pytest.raises(UnsafeAnswerError):
        await guarded(inner=inner, moderator=words).ainvoke("hello")


async def test_a_replacement_may_make_sync_calls_and_has_to_give_a_text() -> None:
    other = guarded("Ask a gardener.")
    model = guarded(BAD, replacement=lambda messages: other.invoke(messages))
    assert model.invoke("hello").text == (await model.ainvoke("hello")).text == "Ask a gardener."
    with pytest.raises(ConfigurationError, match="not NoneType"):
        await guarded(BAD, replacement=lambda messages: None).ainvoke("hello")


@pytest.mark.parametrize("bound", [False, True])
async def test_another_models_answer_ends_where_the_flagged_one_would_have(bound: bool) -> None:
    repairs = TTAChatModel(model=ScriptedEngine("Well then.\nObservation: it rains."), moderator=ScriptedModerator())
    stop, inner = {"stop": ["\nObservation"]}, ScriptedChatModel(answers=[BAD])
    model = guarded(inner=inner.bind(**stop) if bound else inner, repair_model=repairs)
    asked: dict[str, Any] = {} if bound else stop
    assert (await model.ainvoke("hello", **asked)).text == "Well then."
    assert "".join(chunk.text for chunk in model.stream("hello", **asked)).endswith("Well then.")


class ReadsLittle(ScriptedEngine):
    async def embed(self, *args: Any, **kwargs: Any) -> Any:
        raise ContextLengthError("too long")


PICTURE = [{"type": "image", "base64": "aGk=", "mime_type": "image/png"}]


@pytest.mark.parametrize(
    ("engine", "question"), [(ReadsLittle("A kind word."), "hello"), (ScriptedEngine("A kind word."), PICTURE)]
)
async def test_where_the_other_model_cannot_be_asked_the_notice_stands(engine: Any, question: Any) -> None:
    model = guarded(BAD, repair_model=TTAChatModel(model=engine, moderator=ScriptedModerator()))
    for text in (
        (await model.ainvoke([HumanMessage(question)])).text,
        "".join([chunk.text async for chunk in model.astream([HumanMessage(question)])]),
    ):
        assert text.endswith(DEFAULT_NOTICE)
        assert "flagme" not in text


async def test_a_fallback_stands_in_for_a_model_that_raises() -> None:
    model = guarded(BAD, on_flagged="raise").with_fallbacks([guarded("fine")])
    assert (await model.ainvoke("hello")).text == "fine"
    assert "".join([chunk.text async for chunk in model.astream("hello")]) == "fine"


async def test_a_sync_call_uses_the_models_sync_api_in_the_callers_thread() -> None:
    threads: list[threading.Thread] = []

    class Notes(ScriptedChatModel):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            threads.append(threading.current_thread())
            return super()._generate(*args, **kwargs)

    guarded(inner=Notes(answers=["fine"])).invoke("hello")
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize(
    "settings",
    [
        {"inner": "gpt"},
        {"moderator": "nobody"},
        {"moderator": 3},
        {"policy": 2.0},
        {"on_flagged": "repair"},
        {"release": "now"},
    ],
)
def test_unusable_settings_are_refused(settings: Any) -> None:
    with pytest.raises(ValidationError):
        guarded("fine", **settings)


def test_a_description_holds_no_text_of_a_script() -> None:
    assert "flagme" not in repr(guarded(BAD, replacement=lambda messages: "flagme"))


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")
class TestConformance(ChatModelUnitTests):
    """LangChain's own suite; serialisation needs a public class path and is off for all models that wrap another."""

    @property
    def chat_model_class(self) -> type[GuardedChatModel]:
        return GuardedChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"inner": ScriptedChatModel(answers=["fine"]), "moderator": ScriptedModerator()}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """None: temperature, limits and the like are settings of the inner model, and refused here."""
        return {}

    @pytest.mark.xfail(reason="it gives max_tokens and stop, which are settings of the inner model and refused here")
    def test_standard_params(self, model: Any) -> None:
        super().test_standard_params(model)


def test_the_question_is_passed_on_as_it_is() -> None:
    inner = ScriptedChatModel(answers=["fine"])
    guarded(inner=inner).invoke([HumanMessage("hello")])
    assert [message.text for message in inner.asked[0]] == ["hello"]


async def test_a_cache_holds_what_was_checked_and_knows_the_tools() -> None:
    cache = InMemoryCache()
    model = guarded(inner=ScriptedChatModel(answers=[BAD, "second", "third"], cache=cache))
    answers = [(await model.ainvoke("hello")).text for _ in range(3)]
    assert answers == [DEFAULT_NOTICE, "second", "second"]
    assert len(cache._cache) == 1
    assert "flagme" not in repr(cache._cache)
    other = model.model_copy(update={"inner": model.inner.bind(tools=["a tool"])})
    assert (await other.ainvoke("hello")).text == "third"


async def test_what_observed_the_inner_model_observes_the_guard() -> None:
    heard: list[str] = []

    class Hears(BaseCallbackHandler):
        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            heard.append(response.generations[0][0].text)

    own, theirs, bound = Hears(), Hears(), Hears()
    listener = ScriptedChatModel(answers=[BAD], callbacks=[theirs]).with_listeners(
        on_end=lambda run: heard.append(repr(run.outputs))
    )
    model = guarded(inner=listener.with_config(callbacks=[bound]), callbacks=[own])
    assert (await model.ainvoke("hello")).text == DEFAULT_NOTICE
    assert [chunk.text async for chunk in model.astream("hello")]
    assert len(heard) == 6
    assert "flagme" not in "".join(heard)


async def test_tokens_are_counted_by_the_inner_model() -> None:
    class Counts(ScriptedChatModel):
        def get_token_ids(self, text: str) -> list[int]:
            return list(range(len(text)))

    model = guarded(inner=Counts(answers=["fine"]).bind(size=3))
    assert (model.get_num_tokens("four"), model.get_token_ids("no")) == (4, [0, 1])
    asked = [HumanMessage("hello"), AIMessage("yes")]
    assert model.get_num_tokens_from_messages(asked) == Counts(answers=[]).get_num_tokens_from_messages(asked)
    assert trim_messages(asked, max_tokens=10, token_counter=model, strategy="last") == asked[1:]


def test_a_model_that_runs_elsewhere_is_not_asked_to_judge_itself() -> None:
    for make in (partial(guarded, "x", moderator="self"), partial(TTAMiddleware, moderator="local+self")):
        with pytest.raises(ValueError, match="say guard:MODEL"):
            make()
    guarded("x", moderator="guard:smollm2")


async def test_a_judging_model_is_told_the_rules_and_when_a_stream_is_over() -> None:
    engine = JudgingEngine(yes=lambda question: 0.1)
    model = guarded(LONG, moderator=LLMJudge(engine), policy=Policy(rules="No word about trees."))
    text = "".join([chunk.text async for chunk in model.astream("hello")])
    assert text == LONG
    assert any("No word about trees." in question for question in engine.questions)
    assert any(f"Question: hello\n\nAnswer: {LONG[:200]}" in question for question in engine.questions)
    owners = set(engine.owners) - {None}
    assert owners
    assert set(engine.forgotten) >= owners

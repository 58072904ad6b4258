"""What the middleware does about a flagged message, and what observers hear of it."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import requests
from langchain_core.callbacks import get_usage_metadata_callback
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.context import collect_runs
from langsmith import Client, tracing_context
from tta_langchain_agents import TTAMiddleware
from tta_langchain_agents.testing import ScriptedChatModel

from tta_middleware import Policy
from tta_middleware.errors import ConfigurationError, ModerationUnavailableError, UnsafeAnswerError
from tta_middleware.policy import DEFAULT_NOTICE
from tta_middleware.testing.scripted_moderator import ScriptedModerator

sys.path.insert(0, str(Path(__file__).parent))
from staged_agent import BAD, HELLO, both_ways, call, guard, local_model, look_up, updates

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore:astream_log is deprecated"),
]

LONG = "A safe sentence about trees and rivers. " * 6


class TestOnFlagged:
    async def test_repair_hands_over_to_the_local_model(self, watched: Any) -> None:
        run = watched([BAD], middleware=[guard(repair_model=local_model())])
        await both_ways(run)
        answers = run.messages[1::2]
        assert [answer.text for answer in answers] == ["A kind word."] * 2
        for answer in answers:
            trace = answer.response_metadata["tta"]
            assert (trace["outcome"], trace["model"]) == ("clean", "scripted")
            assert trace["handed_over"]["stop_reason"] == "flagged: text"
            assert answer.usage_metadata["output_tokens"] > 0
        assert not run.leaks()

    async def test_a_repair_model_that_is_flagged_as_well_gives_the_notice(self, watched: Any) -> None:
        run = watched([BAD], middleware=[guard(repair_model=local_model("flagme too"))])
        await both_ways(run)
        assert {answer.text for answer in run.messages[1::2]} == {DEFAULT_NOTICE}
        assert not run.leaks()

    async def test_a_late_repair_follows_what_has_left(self, watched: Any) -> None:
        run = watched([LONG + BAD], middleware=[guard(repair_model=local_model())])
        chunks = [chunk.text async for chunk, _ in run.agent.astream(HELLO, run.config, stream_mode="messages")]
        text = "".join(chunks)
        released, _, rest = text.partition("\n\n")
        assert rest == "A kind word."
        assert released
        assert LONG.startswith(released)
        assert run.messages[-1].text == text
        assert run.messages[-1].response_metadata["tta"]["handed_over"]["seam"] == len(released)

    async def test_the_local_model_reads_tool_results_as_text(self, watched: Any) -> None:
        run = watched([call(word="good"), BAD], tools=[look_up], middleware=[guard(repair_model=local_model())])
        await run.agent.ainvoke(HELLO, run.config)
        assert run.messages[-1].text == "A kind word."

    @pytest.mark.parametrize(
        "replacement",
        [
            lambda messages: f"You said {messages[-1].text}.",
            RunnableLambda(lambda messages: AIMessage(f"You said {messages[-1].text}.")),
        ],
        ids=["function", "runnable"],
    )
    async def test_replace_gives_a_text_that_is_moderated(self, watched: Any, replacement: Any) -> None:
        run = watched([BAD], middleware=[guard(replacement=replacement)])
        await run.agent.ainvoke(HELLO, run.config)
        assert run.messages[-1].text == "You said hello."
        assert run.messages[-1].response_metadata["finish_reason"] == "content_filter"
        assert not run.leaks()

    async def test_a_replacement_may_be_async_and_may_be_flagged(self, watched: Any) -> None:
        async def replacement(messages: Any) -> str:
            return "flagme again"

        run = watched([BAD], middleware=[guard(replacement=replacement)])
        await both_ways(run)
        assert {answer.text for answer in run.messages[1::2]} == {DEFAULT_NOTICE}
        assert not run.leaks()

    async def test_raise_says_why_but_not_what(self, watched: Any) -> None:
        run = watched([BAD], middleware=[guard(on_flagged="raise")])
        with pytest.raises(UnsafeAnswerError, match="flagged: text") as caught:
            await run.agent.ainvoke(HELLO, run.config)
        assert caught.value.trace is not None
        assert caught.value.trace.baseline is not None
        assert caught.value.trace.baseline.category == "violence"
        with pytest.raises(UnsafeAnswerError):
            await asyncio.to_thread(run.agent.invoke, HELLO, run.config)
        assert not run.leaks()

    @pytest.mark.parametrize(
        "settings",
        [
            {"on_flagged": "repair"},
            {"on_flagged": "replace"},
            {"on_flagged": "shrug"},
            {"release": "at once"},
            {"policy": 1.5},
            {"moderator": "nobody"},
            {"moderator": 3},
            {"moderator": print},
        ],
    )
    def test_unusable_settings_are_refused_when_given(self, settings: Any) -> None:
        with pytest.raises(ConfigurationError):
            TTAMiddleware(**settings)


class TestModeration:
    @pytest.mark.parametrize("answer", [BAD, "harmless", call(word="good")])
    async def test_without_a_moderator_nothing_passes(self, watched: Any, answer: Any) -> None:
        moderator = ScriptedModerator(failures=[ModerationUnavailableError("down")] * 9)
        run = watched([answer], tools=[look_up], middleware=[TTAMiddleware(moderator)])
        await both_ways(run)
        async for chunk in run.agent.astream(HELLO, run.config, stream_mode="messages"):
            run.seen.append(chunk)
        for message in run.messages[1::2]:
            assert message.text == DEFAULT_NOTICE
            assert message.response_metadata["tta"]["stop_reason"] == "moderator: ModerationUnavailableError"
        assert not run.leaks("harmless")

    async def test_a_prompt_that_could_not_be_checked_stays_in_the_state(self, watched: Any) -> None:
        moderator = ScriptedModerator(failures=[ModerationUnavailableError("down")])
        run = watched(["fine"], middleware=[TTAMiddleware(moderator, check_prompt=True)])
        await run.agent.ainvoke(HELLO, run.config)
        assert [message.text for message in run.messages] == ["hello", DEFAULT_NOTICE]
        assert run.model.asked == []

    @pytest.mark.parametrize(
        "text", [[], [{"type": "text", "text": "Sum this up."}]], ids=["alone", "behind a question"]
    )
    async def test_a_document_in_a_prompt_is_checked(self, watched: Any, text: list[Any]) -> None:
        document = {"type": "text-plain", "text": "This is flagme.", "mime_type": "text/plain"}
        run = watched(["fine"], middleware=[guard(check_prompt=True)])
        await run.agent.ainvoke({"messages": [("user", [*text, document])]}, run.config)
        assert [message.text for message in run.messages] == [DEFAULT_NOTICE, DEFAULT_NOTICE]
        assert run.model.asked == []

    async def test_an_open_policy_lets_pass_what_could_not_be_scored_and_says_so(self, watched: Any) -> None:
        moderator = ScriptedModerator(failures=[ModerationUnavailableError("down")] * 9)
        run = watched(["harmless"], middleware=[TTAMiddleware(moderator, policy=Policy(on_error="open"))])
        await both_ways(run)
        async for _ in run.agent.astream(HELLO, run.config, stream_mode="messages"):
            pass
        for message in run.messages[1::2]:
            assert message.text == "harmless"
            assert message.response_metadata["tta"]["outcome"] == "unchecked"

    async def test_the_policy_decides(self, watched: Any) -> None:
        run = watched([BAD], middleware=[guard(policy=0.95)])
        await both_ways(run)
        assert run.messages[-1].text == BAD

    async def test_a_model_that_guards_itself_is_not_checked_twice(self, watched: Any) -> None:
        outer = ScriptedModerator()
        run = watched([], model=local_model("Fine words."), middleware=[TTAMiddleware(outer)])
        await both_ways(run)
        assert run.messages[-1].text == "Fine words."
        assert outer.calls == []

    async def test_the_moderator_is_told_the_question(self, watched: Any) -> None:
        moderator = ScriptedModerator()
        run = watched(["fine"], middleware=[TTAMiddleware(moderator)])
        await run.agent.ainvoke(HELLO, run.config)
        assert moderator.prompts == ["hello"]

    async def test_a_long_message_goes_to_the_moderator_in_pieces(self, watched: Any) -> None:
        moderator = ScriptedModerator()
        moderator.max_characters = 8000  # type: ignore[attr-defined]
        run = watched(["word " * 5000 + "flagme"], middleware=[TTAMiddleware(moderator)])
        await run.agent.ainvoke(HELLO, run.config)
        assert run.messages[-1].text == DEFAULT_NOTICE
        assert max(len(text) for texts in moderator.calls for text in texts) <= 8000


class TestStreaming:
    async def test_checked_text_leaves_before_the_model_is_done(self, watched: Any) -> None:
        first_seen, failures = threading.Event(), []

        def before_chunk(number: int) -> None:
            if number == 200 and not first_seen.wait(10):
                failures.append("nothing was seen while the model went on")

        model = ScriptedChatModel(answers=["word " * 400], before_chunk=before_chunk)
        run = watched([], model=model, middleware=[guard()])
        async for chunk, _ in run.agent.astream(HELLO, run.config, stream_mode="messages"):
            if chunk.text:
                first_seen.set()
        assert failures == []

    async def test_release_end_holds_everything(self, watched: Any) -> None:
        run = watched([LONG + BAD], middleware=[guard(release="end")])
        texts = [chunk.text async for chunk, _ in run.agent.astream(HELLO, run.config, stream_mode="messages")]
        assert "".join(texts) == DEFAULT_NOTICE

    async def test_a_mark_across_chunks_is_seen_whole(self, watched: Any) -> None:
        run = watched(
            [AIMessage([{"type": "text", "text": "x fla", "index": 0}, {"type": "text", "text": "gme", "index": 1}])],
            middleware=[guard()],
        )
        async for item in run.agent.astream(HELLO, run.config, stream_mode="messages"):
            run.seen.append(item)
        assert run.messages[-1].text.endswith(DEFAULT_NOTICE)
        assert not run.leaks("gme")

    async def test_blocks_keep_their_shape_and_order(self, watched: Any) -> None:
        content = [
            {"type": "reasoning", "reasoning": "Let me think about it.", "index": 0, "signature": "abc"},
            {"type": "text", "text": "Here you are.", "index": 1},
            {"type": "search", "queries": ["trees"], "index": 2},
            {"type": "text", "text": "That is all.", "index": 3},
        ]
        usage = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
        answer = AIMessage(
            content,
            id="provider-7",
            usage_metadata=usage,
            response_metadata={"model_name": "m", "finish_reason": "stop"},
        )
        run = watched([answer], middleware=[guard()])
        async for _ in run.agent.astream(HELLO, run.config, stream_mode="messages"):
            pass
        got = run.messages[-1]
        assert [(block["type"], block["index"]) for block in got.content] == [
            ("reasoning", 0),
            ("text", 1),
            ("search", 2),
            ("text", 3),
        ]
        assert (got.text, got.id, got.usage_metadata["total_tokens"]) == ("Here you are.That is all.", "provider-7", 8)
        assert got.response_metadata["finish_reason"] == "stop"
        assert got.response_metadata["tta"]["generated_tokens"] == 5

    async def test_leaving_a_stream_stops_the_model_and_leaves_no_task(self, watched: Any) -> None:
        chunks: list[int] = []
        model = ScriptedChatModel(answers=["word " * 100_000], before_chunk=chunks.append)
        run = watched([], model=model, middleware=[guard()])
        before = asyncio.all_tasks()
        stream = run.agent.astream(HELLO, run.config, stream_mode="messages")
        async for chunk, _ in stream:
            if chunk.text:
                break
        await stream.aclose()
        assert asyncio.all_tasks() <= before
        assert len(chunks) < 100_000

    async def test_a_cancelled_call_leaves_no_task_and_no_open_check(self, watched: Any) -> None:
        asked = asyncio.Event()

        async def gate() -> None:
            asked.set()
            await asyncio.Event().wait()

        moderator = ScriptedModerator(gate=gate)
        run = watched([LONG], middleware=[TTAMiddleware(moderator)])
        before = asyncio.all_tasks()
        task = asyncio.create_task(run.agent.ainvoke(HELLO, run.config))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() <= before
        assert moderator.in_flight == 0


async def test_a_model_that_is_not_to_be_streamed_is_not(watched: Any) -> None:
    model = ScriptedChatModel(answers=["fine words"], tags=["nostream"], metadata={"team": "library"})
    run = watched([], model=model, middleware=[guard()])
    seen = [message async for message, _ in run.agent.astream(HELLO, run.config, stream_mode="messages")]
    assert not [message for message in seen if isinstance(message, AIMessageChunk)]
    assert any("'team': 'library'" in text for text in run.listener.heard)


class Requests(requests.Session):
    """Keeps what would go to LangSmith."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def request(self, *args: Any, **kwargs: Any) -> Any:
        self.sent.append(f"{args!r} {kwargs!r}")
        response = requests.models.Response()
        response.status_code = 200
        return response


class TestObservers:
    @pytest.mark.parametrize("answer", [BAD, LONG + BAD, call("updates", word="x")])
    async def test_langsmith_is_sent_nothing_raw(self, watched: Any, answer: Any) -> None:
        run = watched([answer, "done"], tools=[updates], middleware=[guard()])
        session = Requests()
        client = Client(api_url="http://localhost:1", api_key="none", session=session, auto_batch_tracing=False)
        with tracing_context(enabled=True, client=client):
            await both_ways(run)
            async for _ in run.agent.astream(HELLO, run.config, stream_mode="messages"):
                pass
        sent = "".join(session.sent)
        assert "awrap_model_call" in sent
        assert "withheld" in sent or "help with that request" in sent
        assert "flagme" not in sent

    @pytest.mark.parametrize("answer", [BAD, call(word="flagme")])
    async def test_observers_by_context_variable_hear_nothing_raw(self, watched: Any, answer: Any) -> None:
        run = watched([answer], tools=[look_up], middleware=[guard()])
        with collect_runs() as collected, get_usage_metadata_callback():
            await both_ways(run)
        assert collected.traced_runs
        assert "flagme" not in repr([traced.model_dump() for traced in collected.traced_runs])

    async def test_usage_is_counted_once(self, watched: Any) -> None:
        answer = AIMessage(
            "fine",
            usage_metadata={"input_tokens": 3, "output_tokens": 5, "total_tokens": 8},
            response_metadata={"model_name": "m"},
        )
        run = watched([answer], middleware=[guard()])
        with get_usage_metadata_callback() as usage:
            await run.agent.ainvoke(HELLO, run.config)
        assert usage.usage_metadata["m"]["total_tokens"] == 8

    async def test_the_models_own_callbacks_hear_what_was_checked(self, watched: Any) -> None:
        run = watched([])
        model = ScriptedChatModel(answers=[BAD], callbacks=[run.listener])
        again = watched([], model=model, middleware=[guard()])
        await both_ways(again)
        assert run.listener.heard
        assert "flagme" not in "".join(run.listener.heard)

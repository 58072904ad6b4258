"""What of a message is judged: all of it, as whoever reads or carries it out decodes it."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import anyio
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, InvalidToolCall, ToolCallChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from tta_langchain_agents import GuardedChatModel
from tta_langchain_agents.content import material
from tta_langchain_agents.stream import Passed, Track
from tta_langchain_agents.testing import ScriptedChatModel

from tta_middleware import Windows
from tta_middleware.testing.auditor import AuditError, Auditor
from tta_middleware.testing.delays import Unequal, slow_even
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import TextDelta


class Pieces(BaseChatModel):
    """A model whose answer is these chunks."""

    chunks: list[AIMessageChunk]

    @property
    def _llm_type(self) -> str:
        return "pieces"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        whole = self.chunks[0]
        for chunk in self.chunks[1:]:
            whole += chunk
        return ChatResult(generations=[ChatGeneration(message=whole.model_copy(deep=True))])

    def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        for chunk in self.chunks:
            yield ChatGenerationChunk(message=chunk.model_copy(deep=True))


def arguments(written: str, name: str = "send", id_: str = "1") -> list[AIMessageChunk]:
    """A call whose arguments come three characters at a time."""
    pieces = [written[at : at + 3] for at in range(0, len(written), 3)]
    return [
        AIMessageChunk(
            "",
            tool_call_chunks=[
                ToolCallChunk(
                    name=None if at else name, args=piece, id=None if at else id_, index=0, type="tool_call_chunk"
                )
            ],
        )
        for at, piece in enumerate(pieces)
    ]


def block(**fields: Any) -> list[AIMessageChunk]:
    return [AIMessageChunk([{"index": 0, **fields}])]


def extra(**fields: Any) -> list[AIMessageChunk]:
    return [AIMessageChunk("fine", additional_kwargs=fields)]


ESCAPED = r"\u0066lag\u006de"
NESTED = json.dumps({"outer": '{"inner": "' + ESCAPED + '"}'})

DECODED = {
    "value": arguments('{"body": "' + ESCAPED + '"}'),
    "key": arguments('{"' + ESCAPED + '": 1}'),
    "deep": arguments('{"a": [{"b": ["' + ESCAPED + '"]}]}'),
    "json in a string": arguments(NESTED),
    "key that comes twice": arguments('{"body": "' + ESCAPED + '", "body": "fine"}'),
    "id": arguments('{"body": "fine"}', id_="functions.flagme:0"),
    "id of a broken call": arguments('{"body": ', id_="it is flagme"),
    "broken off": arguments('{"body": "' + ESCAPED),
    "no json": arguments("body=" + ESCAPED),
    "named data": arguments('{"data": "flagme"}'),
    "named url": arguments('{"url": "flagme"}'),
    "named id": arguments('{"id": {"type": "flagme"}}'),
    "call block": block(type="tool_use", id="1", name="send", input={"data": "flagme"}),
    "streamed call block": block(type="input_json_delta", partial_json='{"id": "' + ESCAPED + '"}'),
    "server call block": block(type="server_tool_use", id="1", name="search", input={"url": "flagme"}),
    "answer in JSON": [AIMessageChunk('{"body": "' + ESCAPED + '"}')],
    "fenced answer": [AIMessageChunk('Here:\n```json\n{"body": "' + ESCAPED + '"}\n```')],
    "thought in JSON": extra(reasoning_content='{"body": "' + ESCAPED + '"}'),
    "function call": extra(function_call={"name": "send", "arguments": '{"body": "' + ESCAPED + '"}'}),
    "raw call": extra(tool_calls=[{"id": "1", "function": {"name": "send", "arguments": '{"id": "' + ESCAPED + '"}'}}]),
    "reasoning": block(type="reasoning", reasoning="flagme"),
    "reasoning summary": block(type="reasoning", summary=[{"type": "summary_text", "text": "flagme"}]),
    "redacted thinking": block(type="thinking", thinking="flagme", signature="abc"),
    "refusal": block(type="refusal", refusal="flagme"),
    "prose under a key for data": block(type="note", data="here is flagme"),
    "words without a blank": block(type="document", source={"type": "text", "data": "这里是flagme"}),
    "words on lines": block(type="document", source={"type": "text", "data": "here\nflagme"}),
    "title of text": block(type="text", text="fine", annotations=[{"title": "flagme"}]),
    "address": block(type="citation", url="https://example.org/flagme"),
}


@pytest.mark.parametrize("way", ["invoke", "stream"])
@pytest.mark.parametrize("chunks", DECODED.values(), ids=DECODED.keys())
async def test_what_is_decoded_is_judged(chunks: list[AIMessageChunk], way: str) -> None:
    model = GuardedChatModel(inner=Pieces(chunks=chunks), moderator=ScriptedModerator())
    left = [await model.ainvoke("hello")] if way == "invoke" else [chunk async for chunk in model.astream("hello")]
    seen = json.dumps([message.model_dump() for message in left], default=str)
    assert "flagme" not in seen
    assert "006de" not in seen
    metadata = [message.response_metadata for message in left if message.response_metadata]
    assert metadata[-1]["tta"]["outcome"] == "blocked"


async def test_why_a_call_could_not_be_read_is_judged() -> None:
    broken = InvalidToolCall(name="send", args="{", id="1", error="no JSON: flagme", type="invalid_tool_call")
    model = GuardedChatModel(
        inner=ScriptedChatModel(answers=[AIMessage("", invalid_tool_calls=[broken])]), moderator=ScriptedModerator()
    )
    assert "flagme" not in repr(await model.ainvoke("hello"))


@pytest.mark.parametrize("way", ["invoke", "stream"])
async def test_a_phrase_over_two_lines_is_judged_as_a_reader_reads_it(way: str) -> None:
    chunks = [*arguments(json.dumps({"body": 'say "no"\nnow'}))]
    model = GuardedChatModel(inner=Pieces(chunks=chunks), moderator=ScriptedModerator(score=flagging('"no"\nnow')))
    left = [await model.ainvoke("hello")] if way == "invoke" else [chunk async for chunk in model.astream("hello")]
    assert not any(message.tool_call_chunks if way == "stream" else message.tool_calls for message in left)
    note = GuardedChatModel(
        inner=Pieces(chunks=block(type="note", body='say "no"\nnow')),
        moderator=ScriptedModerator(score=flagging('"no"\nnow')),
    )
    assert (await note.ainvoke("hello")).response_metadata["tta"]["outcome"] == "blocked"


def halves(**block: Any) -> list[AIMessageChunk]:
    """A block of two pieces with these fields, in which a star stands for words."""
    written = json.dumps(block)
    return [AIMessageChunk([json.loads(written.replace("*", piece))]) for piece in ("it is fla", "gme")]


@pytest.mark.parametrize(
    "pieces",
    [
        arguments('{"body": "flagme"}'),
        halves(type="note", body="*", index=1),
        halves(type="text", text="Fine. ", note="*", index=1),
        halves(type="text", text="Fine. ", annotations=[{"index": 0, "title": "*"}], index=1),
    ],
    ids=["call", "block", "beside text", "title"],
)
async def test_text_between_two_pieces_does_not_part_what_is_judged(pieces: list[AIMessageChunk]) -> None:
    middle = len(pieces) // 2 if len(pieces) == 2 else 4
    chunks = [*pieces[:middle], AIMessageChunk("A word between."), *pieces[middle:]]
    model = GuardedChatModel(inner=Pieces(chunks=chunks), moderator=ScriptedModerator())
    left = [chunk async for chunk in model.astream("hello")]
    whole = left[0]
    for chunk in left[1:]:
        whole += chunk
    assert "flagme" not in json.dumps(whole.model_dump(), default=str)
    assert whole.response_metadata["tta"]["outcome"] == "blocked"


async def test_a_call_is_scored_once_where_it_says_no_more_than_it_was_written() -> None:
    moderator = ScriptedModerator()
    chunks = arguments('{"body": "fine words", "size": 3}')
    message = await GuardedChatModel(inner=Pieces(chunks=chunks), moderator=moderator).ainvoke("hello")
    assert moderator.calls == [["send\nbody: fine words\nsize: 3"]]
    assert message.tool_calls[0]["args"] == {"body": "fine words", "size": 3}


def test_opaque_values_are_not_sent_to_a_moderator() -> None:
    picture = {"type": "image", "base64": "aGVsbG8=", "id": "abc", "mime_type": "image/png"}
    assert material(AIMessage([picture])).texts == ["mime_type: image/png"]
    assert material(HumanMessage([picture])).texts == ["mime_type: image/png"]


class Miscounts(ScriptedModerator):
    """Gives a verdict too many, or one too few."""

    surplus = 1

    async def moderate(self, texts: Any, *, prompt: str | None = None) -> Any:
        verdicts = await super().moderate(texts, prompt=prompt)
        return verdicts + verdicts[:1] if self.surplus > 0 else verdicts[:-1]


@pytest.mark.parametrize("surplus", [1, -1])
@pytest.mark.parametrize("way", ["invoke", "stream"])
async def test_a_moderator_that_miscounts_has_given_no_verdict(way: str, surplus: int) -> None:
    moderator = Miscounts()
    moderator.surplus = surplus
    chunks = [AIMessageChunk("Fine words."), *block(type="note", body="more words"), *arguments('{"a": "words"}')]
    model = GuardedChatModel(inner=Pieces(chunks=chunks), moderator=moderator)
    left = [await model.ainvoke("hello")] if way == "invoke" else [chunk async for chunk in model.astream("hello")]
    trace = [message.response_metadata["tta"] for message in left if message.response_metadata][-1]
    assert (trace["outcome"], trace["stop_reason"].startswith("moderator: ")) == ("blocked", True)
    assert "ords" not in json.dumps([message.model_dump() for message in left], default=str)


def thought(text: str) -> AIMessageChunk:
    return AIMessageChunk("", additional_kwargs={"reasoning_content": text})


def thought_block(text: str) -> AIMessageChunk:
    return AIMessageChunk([{"type": "reasoning", "reasoning": text, "index": 1}])


def text_block(text: str, index: int) -> AIMessageChunk:
    return AIMessageChunk([{"type": "text", "text": text, "index": index}])


BY_TURNS = {
    "parted by a block that comes before": [
        text_block("First. ", 0),
        AIMessageChunk([{"type": "text", "text": "gme, all of it."}]),
        text_block("It is fla", 0),
    ],
    "no type": [text_block("Here it is fla", 0), AIMessageChunk([{"text": "gme, all of it.", "index": 0}])],
    "two blocks": [text_block("Here it is fla", 0), text_block("Hm. And so on. ", 1), text_block("gme, all of it.", 0)],
    "answer": [AIMessageChunk("Here it is fla"), thought("Hm. And so on. "), AIMessageChunk("gme, all of it.")],
    "thoughts": [thought("Here it is fla"), AIMessageChunk("Well, yes and no. "), thought("gme, all of it.")],
    "blocks": [
        text_block("Here it is fla", 0),
        thought_block("Hm. And so on. "),
        text_block("gme, all of it.", 0),
    ],
}


@pytest.mark.parametrize("release", ["window", "end", Windows(first=8, largest=8)], ids=["window", "end", "small"])
@pytest.mark.parametrize("way", ["invoke", "stream"])
@pytest.mark.parametrize("chunks", BY_TURNS.values(), ids=BY_TURNS)
async def test_thoughts_between_two_pieces_of_an_answer_do_not_part_it(
    chunks: list[AIMessageChunk], way: str, release: Any
) -> None:
    model = GuardedChatModel(inner=Pieces(chunks=chunks), moderator=ScriptedModerator(), release=release)
    left = [await model.ainvoke("hello")] if way == "invoke" else [chunk async for chunk in model.astream("hello")]
    said = "".join(str(message.text) for message in left)
    mused = "".join(
        [message.additional_kwargs.get("reasoning_content", "") for message in left]
        + [block.get("reasoning", "") for message in left for block in message.content_blocks]
    )
    whole = left[0]
    for message in left[1:]:
        whole += message
    assert "flagme" not in said + str(whole.text)
    assert "flagme" not in mused
    assert [m for m in left if m.response_metadata][-1].response_metadata["tta"]["outcome"] == "blocked"
    assert way == "stream" or said == "I can't help with that request."


@pytest.mark.parametrize("release", ["window", "end", Windows(first=8, largest=8)], ids=["window", "end", "small"])
async def test_thoughts_and_text_leave_in_the_order_in_which_they_came(release: Any) -> None:
    call = arguments('{"a": 1}')
    chunks = [
        thought("First I think. "),
        AIMessageChunk("Then I say. "),
        *call,
        thought("Again. "),
        AIMessageChunk("End."),
    ]
    gates = Unequal(ScriptedModerator(), slow_even)
    model = GuardedChatModel(inner=Pieces(chunks=chunks), moderator=gates, release=release)
    left = [chunk async for chunk in model.astream("hello")]
    kinds = [
        "thought" if "reasoning_content" in chunk.additional_kwargs else "call" if chunk.tool_call_chunks else "text"
        for chunk in left
        if chunk.text or chunk.tool_call_chunks or "reasoning_content" in chunk.additional_kwargs
    ]
    assert [kind for kind, _ in groupby(kinds)] == ["thought", "text", "call", "thought", "text"]
    assert "".join(str(chunk.text) for chunk in left) == "Then I say. End."
    mused = "".join(chunk.additional_kwargs.get("reasoning_content", "") for chunk in left)
    assert mused == "First I think. Again. "


async def test_thoughts_are_seen_before_the_answer_has_begun() -> None:
    said = anyio.Event()

    class Waits(Pieces):
        async def _astream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
            yield ChatGenerationChunk(message=thought("One thought after the other, and then one more. "))
            with anyio.fail_after(5):
                await said.wait()
            yield ChatGenerationChunk(message=AIMessageChunk("Done."))

    model = GuardedChatModel(inner=Waits(chunks=[]), moderator=ScriptedModerator(), release=Windows(first=8, largest=8))
    async for chunk in model.astream("hello"):
        if chunk.additional_kwargs.get("reasoning_content"):
            said.set()
    assert said.is_set()


@pytest.mark.no_audit("plants a leak")
async def test_the_auditor_hears_of_an_answer_that_was_not_judged_as_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tagged = Track.add

    def in_one(self: Track, chunk: AIMessage) -> Any:
        return [TextDelta(delta.text) for delta in tagged(self, chunk)]

    def all_of_it(self: Track, passed: Passed) -> Any:
        return self.rest()

    monkeypatch.setattr(Track, "add", in_one)
    monkeypatch.setattr(Track, "take", all_of_it)
    audit = Auditor()
    with audit:
        model = GuardedChatModel(inner=Pieces(chunks=BY_TURNS["answer"]), moderator=ScriptedModerator(), release="end")
        assert "flagme" in "".join([str(chunk.text) async for chunk in model.astream("hello")])
        with pytest.raises(AuditError, match="as it is read"):
            audit.check()

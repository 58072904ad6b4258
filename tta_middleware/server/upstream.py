"""A model of another server, behind the guard's windows: blocked, replaced or handed over where it is flagged.

It cannot be repaired by moved embeddings, since these are out of reach; ``hand_over`` names a model of this server
that can. Its text is released as :func:`~tta_middleware.guard.moderated.moderated` checks it, and so are its thoughts
where they are shown; its tool calls when all of each was checked as it is decoded, and nothing before the prompt has
passed where that is checked.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Literal, cast

import anyio
from langchain_core.messages import AIMessage, AIMessageChunk, message_chunk_to_message
from langchain_core.messages.ai import OutputTokenDetails, UsageMetadata, add_usage
from langchain_core.messages.tool import tool_call_chunk
from pydantic import Field, PositiveFloat, model_validator

from tta_middleware.aio.beside_check import unless_refused
from tta_middleware.aio.streams import Send, close_all, owned
from tta_middleware.assembly import Runtime
from tta_middleware.call_text import begins_as_json, call_text, id_text, says_more
from tta_middleware.chat_model import TTAChatModel
from tta_middleware.chat_model.fields import ModeratorSetting, PolicyFileSetting
from tta_middleware.chat_model.messages import REASONING
from tta_middleware.chat_model.refusal import PROVIDER, REFUSAL, ending
from tta_middleware.config import Settings, Windows
from tta_middleware.errors import ConfigurationError, ContextLengthError, FlaggedError, ModerationError
from tta_middleware.guard.ledger import Ledger
from tta_middleware.guard.moderated import Thoughts, moderated
from tta_middleware.guard.settings import PromptCheck
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.observing import NOBODY, AnswerObserver, Asked, observer
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.file import policies_for
from tta_middleware.policy.verdicts import load
from tta_middleware.protocols import Moderator
from tta_middleware.registry import check_moderator, check_policies
from tta_middleware.server.answering import LocalAnswer
from tta_middleware.server.chat_request import ChatRequest
from tta_middleware.server.upstream_client import CallPiece, FinishReason, Piece, UpstreamClient
from tta_middleware.trace import ReasoningTrace
from tta_middleware.types import SEAM, GuardedAnswer, TextDelta, Trace, WindowScore, valid_text

_NEEDED: Mapping[str, str] = {"replace": "replacement", "hand_over": "hand_over"}
"""The setting that an action needs."""


class UpstreamSettings(Settings):
    """A model of another server that speaks OpenAI's protocol.

    Attributes:
        upstream: the server's URL with its path, such as ``http://127.0.0.1:11434/v1``.
        upstream_model: what that server calls the model; None hands on the name that clients use here.
        api_key_env: environment variable of its key; None takes ``TTA_UPSTREAM_API_KEY``, if that is set.
        api_key_file: a file with the key in place of that, read anew for every request.
        moderator: ``local``, ``openai``, or a Moderator.
        policy: a threshold, thresholds per category, a Policy, StagePolicies, or a name in ``policies``.
        policies: a file of named policies, read anew when it changes.
        prompt_check: whether the prompt is moderated, too: ``user`` the last user turn, ``all`` every message, ``off``.
        on_flagged: ``block`` ends the answer with the policy's notice, ``replace`` with ``replacement``, ``hand_over``
            lets another model answer; None takes the one that a setting is given for, else ``block``.
        replacement: text in place of what was flagged; moderated like any other.
        hand_over: name of a model of this server, one of its own, that answers instead.
        reasoning: ``show`` gives thoughts out as they are checked, ``hide`` keeps them back. Hidden ones are checked,
            too, unless the policy says ``hidden_reasoning="unchecked"``.
        release: ``window`` streams text as it is checked, ``end`` holds it until all was checked.
        windows: how a streamed answer is cut.
        timeout: seconds in which nothing comes from the upstream.
        retry: how often it is asked, as long as nothing of its answer has come.

    Raises:
        ConfigurationError: a value is unknown or out of range, or does not fit another.
    """

    upstream: str
    upstream_model: str | None = None
    api_key_env: str | None = None
    api_key_file: Path | None = None
    moderator: ModeratorSetting = "local"
    policy: Any = None
    policies: PolicyFileSetting = None
    prompt_check: PromptCheck = "off"
    on_flagged: Literal["block", "replace", "hand_over"] | None = None
    replacement: str | None = None
    hand_over: str | None = None
    reasoning: Literal["show", "hide"] = "hide"
    release: Literal["window", "end"] = "window"
    windows: Windows = Field(default_factory=Windows)
    timeout: PositiveFloat = 60.0
    retry: RetryPolicy = Field(default_factory=lambda: RetryPolicy(attempts=3))

    @model_validator(mode="after")
    def _usable(self) -> UpstreamSettings:
        needs = {"replace": self.replacement, "hand_over": self.hand_over}
        idle = next((name for action, name in _NEEDED.items() if needs[action] and action != self.action), None)
        if idle is not None:
            raise ConfigurationError(f"{idle}= has no effect with on_flagged={self.action!r}; leave one of them out")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ConfigurationError("give the upstream's key as api_key_env or as api_key_file, not both")
        if self.on_flagged in needs and not needs[self.on_flagged]:
            raise ConfigurationError(f"on_flagged={self.on_flagged!r} needs {_NEEDED[self.on_flagged]}=")
        check_moderator(self.moderator, None)
        check_policies(self.moderator, policies_for(self.policy, self.policies))
        return self

    @property
    def action(self) -> Literal["block", "replace", "hand_over"]:
        if self.on_flagged is not None:
            return self.on_flagged
        return "hand_over" if self.hand_over else "replace" if self.replacement else "block"


class UpstreamModel:
    """A served model over :class:`UpstreamSettings`; holds no state of a request.

    Args:
        runtime: where a moderator by name is made once.
        stand_in: the model that ``hand_over`` names.
    """

    def __init__(
        self, settings: UpstreamSettings, *, runtime: Runtime | None = None, stand_in: TTAChatModel | None = None
    ) -> None:
        if settings.action == "hand_over" and stand_in is None:
            raise ConfigurationError(f"hand_over names no model of this server: {settings.hand_over!r}")
        self.settings, self.stand_in, self._runtime = settings, stand_in, runtime or Runtime()
        self.client = UpstreamClient(
            settings.upstream,
            key_variable=settings.api_key_env,
            key_file=settings.api_key_file,
            timeout=settings.timeout,
            retry=settings.retry,
        )

    @property
    def policy(self) -> Any:
        return self.settings.policy

    @property
    def prompt_check(self) -> PromptCheck:
        return self.settings.prompt_check

    @property
    def scorer(self) -> Moderator:
        return self._runtime.moderator(self.settings.moderator)

    def policies_in_force(self, name: str | None = None) -> StagePolicies:
        """See :meth:`TTAChatModel.policies_in_force`.

        Raises:
            ConfigurationError: there is no such name.
        """
        stages = policies_for(self.policy if name is None else name, self.settings.policies)
        return stages.with_default(self.scorer.default_threshold)

    async def aload(self) -> None:
        """Load what the moderator needs. An upstream that is away answers requests with errors, and may come back.

        Raises:
            ModeratorSetupError: the moderator cannot be asked as it is set up: it has no key, say.
        """
        await load(self.scorer)

    async def aclose(self) -> None:
        """Close connections and the moderator."""
        await close_all((self.client, self._runtime))

    def answering(self, asked: ChatRequest, stages: StagePolicies, most_tokens: int | None) -> UpstreamAnswer:
        """An answer that may be taken from the upstream."""
        settings = asked.settings(self.prompt_check, most_tokens)
        body = asked.forwarded(thoughts=self.settings.reasoning == "show") | {
            "model": self.settings.upstream_model or asked.model
        }
        if most_tokens is not None and not {"max_tokens", "max_completion_tokens"} & set(body):
            body["max_tokens"] = most_tokens  # the name that every server of this protocol knows
        return UpstreamAnswer(self, asked, body, stages, settings.get("prompt_check", self.prompt_check), most_tokens)


@dataclass(slots=True)
class _Spoken:
    """An upstream's answer as it comes; written by the reading task, read by others once that has ended."""

    calls: list[CallPiece] = field(default_factory=list)
    refusal: str = ""
    reason: FinishReason | None = None
    usage: UsageMetadata | None = None
    pieces: int = 0
    thoughts: int = 0
    _open: dict[int, int] = field(default_factory=dict)

    def take(self, piece: Piece) -> str:
        """Note all of a piece but its thought and its text, which is returned."""
        self.thoughts += bool(piece.thought)
        self.pieces += piece.begins
        self.refusal += piece.refusal
        self.reason = piece.reason or self.reason
        for call in piece.calls:
            self._call(call)
        if piece.usage:
            prompt, completion = piece.usage
            self.usage = UsageMetadata(input_tokens=prompt, output_tokens=completion, total_tokens=prompt + completion)
            if piece.thought_tokens is not None:
                self.usage["output_token_details"] = OutputTokenDetails(reasoning=piece.thought_tokens)
        return piece.text

    def _call(self, piece: CallPiece) -> None:
        """A call, or more of one: some servers give every call the index 0 and tell them apart by their ids alone."""
        at = self._open.get(piece.index, -1)
        if at < 0 or (piece.id and self.calls[at].id not in ("", piece.id)):
            at = self._open[piece.index] = len(self.calls)
            self.calls.append(CallPiece(at))
        had = self.calls[at]
        name, words = had.name or piece.name, had.arguments + piece.arguments
        self.calls[at] = CallPiece(at, had.id or piece.id, name, words)

    @property
    def spent(self) -> UsageMetadata:
        """What an answer took that is not handed on: the upstream tells its usage last, so one that was cut has none.

        Then each piece with text or a part of a call counts as a token, which it is with most servers.
        """
        return self.usage or UsageMetadata(input_tokens=0, output_tokens=self.pieces, total_tokens=self.pieces)


@dataclass(slots=True, eq=False)
class UpstreamAnswer:
    """One answer on its way from the upstream to a client.

    Attributes:
        body: what the upstream is asked.
        prompt_check: in force for this request.
    """

    model: UpstreamModel
    asked: ChatRequest
    body: Mapping[str, Any]
    stages: StagePolicies
    prompt_check: PromptCheck
    most_tokens: int | None
    # The answering task alone writes these. ``_passed`` is set by the task that checks the prompt, and never cleared.
    said: str = ""
    thought: str = ""
    _scored: list[WindowScore] = field(default_factory=list)
    _observed: tuple[str, ...] = ()
    _spoken: _Spoken = field(default_factory=_Spoken)
    _passed: anyio.Event = field(default_factory=anyio.Event)
    _told: Trace | None = None
    _observer: AnswerObserver = NOBODY
    _ledger: Ledger = field(init=False)
    _thoughts: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self._ledger = Ledger(self.model.scorer, self.stages.output)
        self._thoughts = Ledger(self.model.scorer, self.stages.at("reasoning"), stage="reasoning")

    async def whole(self) -> AIMessage:
        """The answer at once: what is flagged is replaced from its first word, since nothing has left.

        Raises:
            UpstreamError, ModerationError, RefusedAnswerError: there is none.
        """
        async with aclosing(self._chunks(stream=False)) as chunks:
            message = reduce(add, [chunk async for chunk in chunks])
        return cast("AIMessage", message_chunk_to_message(message))

    def stream(self) -> AsyncGenerator[AIMessageChunk, None]:
        """The answer as it is checked."""
        return self._chunks(stream=True)

    async def _chunks(self, *, stream: bool) -> AsyncGenerator[AIMessageChunk, None]:
        async def produce(send: Send[AIMessageChunk]) -> None:
            await self._run(send, stream)

        async with aclosing(owned(produce)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _run(self, send: Send[AIMessageChunk], stream: bool) -> None:
        asked = Asked(
            model=str(self.body["model"]),
            moderator=self._ledger.name,
            method=self.model.settings.action,
            sampling=None,
            stream=stream and self.model.settings.release == "window",
            messages=self.asked.turns,
            provider="openai",  # as the conventions have it: whose protocol it speaks, whoever is behind it
        )
        with observer().answering(asked) as self._observer:
            self._ledger.observer = self._thoughts.observer = self._observer
            await self._checked(send, stream)

    async def _checked(self, send: Send[AIMessageChunk], stream: bool) -> None:
        """The prompt's check beside the answer, as in :class:`~tta_middleware.guard.guard.Answering`."""

        async def say(chunk: AIMessageChunk) -> None:
            await self._passed.wait()
            thought = chunk.additional_kwargs.get(REASONING, "")
            if chunk.text or thought:
                self.said += chunk.text
                self.thought += thought
                self._observer.released()
            if chunk.chunk_position == "last" and self._told is not None:
                reason = chunk.response_metadata["finish_reason"]
                spent = self._spoken.usage["input_tokens"] if self._spoken.usage else 0
                self._observer.answered(GuardedAnswer(self.said, reason, self._told, spent, self.thought))
            await send(chunk)

        refused, _ = await unless_refused(self._refuse_prompt, self._passed, lambda: self._answer(say, stream))
        if refused:
            self._passed.set()
            await self._notice(say, refused)

    async def _refuse_prompt(self) -> str:
        """Why the prompt is refused; empty if it is not."""
        if self.prompt_check == "off":
            return ""
        ledger = Ledger(self.model.scorer, self.stages.prompt, "prompt", observer=self._observer)
        texts = self.asked.texts if self.prompt_check == "all" else [self.asked.last_user_text]
        passed = await ledger.passes(texts)
        self._ledger.calls += ledger.calls
        self._observed = tuple(f"prompt: {category}" for category in ledger.observed)
        if passed or ledger.error is not None:
            return "" if passed else ledger.reason("prompt")
        score = ledger.score()
        return f"prompt: {score.category if score else ''}"

    async def _answer(self, say: Send[AIMessageChunk], stream: bool) -> None:
        hold = not stream or self.model.settings.release == "end"
        held = list[AIMessageChunk]()

        async def leave(chunk: AIMessageChunk) -> None:
            if hold:
                held.append(chunk)  # thoughts, too: of an answer that is flagged nothing leaves
            else:
                await say(chunk)

        checked = moderated(
            self._texts(stream),
            self._ledger,
            self.stages.output,
            windows=self.model.settings.windows,
            hold=hold,
            prompt=self.asked.last_user_text,
            scored=self._scored,
            thoughts=self._way_of_thoughts(leave),
        )
        try:
            async with aclosing(checked) as pieces:
                async for piece in pieces:
                    await leave(AIMessageChunk(content=piece))
        except (FlaggedError, ModerationError) as error:
            self._ledger.error = self._ledger.error or self._thoughts.error
            thought = isinstance(error, FlaggedError) and error.thought
            return await self._stand_in(say, "reasoning" if thought else "text")
        self._ledger.error = self._ledger.error or self._thoughts.error
        for chunk in held:
            await say(chunk)
        calls, text = [_call_of(call) for call in self._spoken.calls], self.said
        for call in calls:
            text += call.chunk.text  # a broken call's words follow those that have left, and are read with them
            said = call.texts if call.whole else [*call.texts, text]
            if not await self._ledger.passes(said, self.asked.last_user_text):
                return await self._stand_in(say, "tool_call")
        refusal = self._spoken.refusal
        if refusal and not await self._ledger.passes([refusal, text + refusal], self.asked.last_user_text):
            return await self._stand_in(say, "text")
        for call in calls:
            await say(call.chunk)
        return await say(self._last(calls))

    @property
    def _checks_thoughts(self) -> bool:
        return self.model.settings.reasoning == "show" or self.stages.hidden_reasoning == "checked"

    def _way_of_thoughts(self, leave: Send[AIMessageChunk]) -> Thoughts | None:
        """None drops them unread."""
        shown = self.model.settings.reasoning == "show"

        async def think(text: str) -> None:
            if shown:
                await leave(AIMessageChunk(content="", additional_kwargs={REASONING: text}))

        return Thoughts(self._thoughts, self.stages.at("reasoning"), think) if self._checks_thoughts else None

    async def _texts(self, stream: bool) -> AsyncGenerator[str | TextDelta, None]:
        async with aclosing(self.model.client.ask(self.body, stream=stream)) as pieces:
            async for piece in pieces:
                if piece.thought:
                    yield TextDelta(piece.thought, channel="reasoning")
                if text := self._spoken.take(piece):
                    yield text

    def _last(self, calls: list[_Call]) -> AIMessageChunk:
        reason: str = self._spoken.reason or "stop"
        if reason in ("stop", "tool_calls"):
            reason = "tool_calls" if any(call.whole for call in calls) else "stop"
        outcome = self._ledger.outcome
        why = self._ledger.reason("")
        about = ending(reason) | self._about(outcome, outcome if outcome == "clean" else f"{why}, passed by policy")
        refusal = self._spoken.refusal
        told = about | ({REFUSAL: refusal} if refusal else {})
        # As the notice of a block: in the text, too, unless that is JSON.
        return _end(told, self._spoken.usage, "" if self._within_json else refusal)

    def _about(self, outcome: Any, reason: str) -> dict[str, Any]:
        usage = self._spoken.spent if outcome == "blocked" else self._spoken.usage
        trace = self._ledger.trace(
            outcome,
            reason,
            method=self.model.settings.action,
            model=str(self.body["model"]),
            tokens=usage["output_tokens"] if usage else 0,
            released=len(self.said),
        )
        thought = tuple(f"reasoning: {category}" for category in self._thoughts.observed)
        self._told = replace(
            trace,
            windows=tuple(self._scored),
            mode=self.stages.mode,
            observed=(*self._observed, *trace.observed, *thought),
            moderation_calls=trace.moderation_calls + self._thoughts.calls,
            reasoning=self._reasoning_trace() if self._spoken.thoughts else None,
        )
        return {"model_provider": PROVIDER, "model_name": trace.model, "tta": self._told.as_dict()}

    def _reasoning_trace(self) -> ReasoningTrace:
        details = self._spoken.usage.get("output_token_details") if self._spoken.usage else None
        # As above: where the upstream does not say, a piece counts as a token.
        tokens = self._spoken.thoughts if details is None else details.get("reasoning", 0)
        return ReasoningTrace(self.model.settings.reasoning, tokens, self._checks_thoughts, self._thoughts.score())

    async def _stand_in(self, say: Send[AIMessageChunk], part: str) -> None:
        """What follows where the rest may not be shown; without a moderator nothing but the notice can."""
        reason, settings = self._ledger.reason(part), self.model.settings
        # Nobody goes on with another model's JSON.
        if settings.action == "hand_over" and self._ledger.error is None and not self._within_json:
            return await self._handed_over(say, reason)
        if settings.action == "replace" and self._ledger.error is None:
            text, said = settings.replacement or "", "" if self._within_json else self.said
            if await self._ledger.passes_behind(said, text):
                about = ending("content_filter") | self._about("blocked", reason)
                return await self._say_instead(say, text, about | ({REFUSAL: text} if self._within_json else {}))
        return await self._notice(say, reason)

    async def _notice(self, say: Send[AIMessageChunk], reason: str) -> None:
        notice = self.stages.output.notice_for(self.asked.last_user_text)
        about = ending("content_filter") | self._about("blocked", reason) | {REFUSAL: notice}
        await self._say_instead(say, notice, about)

    async def _say_instead(self, say: Send[AIMessageChunk], text: str, about: dict[str, Any]) -> None:
        if not self._within_json:
            await say(AIMessageChunk(content=self._seam + text))
        await say(_end(about, self._spoken.spent))

    @property
    def _within_json(self) -> bool:
        """Whether JSON has left, of which another text would be taken for the end of a string."""
        return bool(self.said) and (self.asked.asks_for_json or begins_as_json(self.said))

    async def _handed_over(self, say: Send[AIMessageChunk], reason: str) -> None:
        """Another model's answer to the same conversation, as that one guards and repairs it."""
        model = self.model.stand_in
        if model is None:
            return await self._notice(say, reason)
        # What a client asked for beyond the policy is in ``stages``, and its prompt was checked.
        left_out = ("tools", "tool_choice", "parallel_tool_calls", "tta")
        asked = self.asked.model_copy(update=dict.fromkeys(left_out))
        answer, seam = LocalAnswer.of(model, asked, self.stages, self.most_tokens), self._seam
        handed, usage = self._about("blocked", reason)["tta"], self._spoken.spent
        # A reader joins what two models thought, which neither guard has judged together.
        thinks = not self.thought
        last: AIMessageChunk | None = None

        async def texts() -> AsyncGenerator[str, None]:
            nonlocal last
            async with aclosing(answer.stream()) as chunks:
                async for chunk in chunks:
                    if thinks and (thought := chunk.additional_kwargs.get(REASONING)):
                        await say(AIMessageChunk(content="", additional_kwargs={REASONING: thought}))
                    if chunk.text:
                        yield str(chunk.text)
                    last = chunk if chunk.response_metadata else last

        try:
            async with aclosing(self._behind_what_left(texts())) as pieces:
                async for piece in pieces:
                    await say(AIMessageChunk(content=seam + piece))
                    seam = ""
        except (FlaggedError, ModerationError):
            return await self._notice(say, self._ledger.reason("text"))
        except ContextLengthError:
            return await self._notice(say, reason)  # a local model may read less at once than the upstream's
        if last is not None:
            trace = last.response_metadata.get("tta", {}) | {"handed_over": handed}
            await say(_end(last.response_metadata | {"tta": trace}, add_usage(usage, last.usage_metadata)))
        return None

    def _behind_what_left(self, texts: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        """Checked text of another model, which its guard has judged by itself, judged as the end of what has left."""
        if not self.said:
            return texts
        return moderated(
            texts,
            self._ledger,
            self.stages.output,
            windows=self.model.settings.windows,
            prompt=self.asked.last_user_text,
            behind=self.said + self._seam,
        )

    @property
    def _seam(self) -> str:
        return SEAM if self.said else ""


@dataclass(frozen=True, slots=True)
class _Call:
    """A tool call.

    Attributes:
        whole: its arguments are a JSON object; a broken one is text, since nobody could carry it out.
        texts: what it says, as it is written and as it is decoded, and what its id says.
    """

    whole: bool
    chunk: AIMessageChunk
    texts: list[str]


def _call_of(came: CallPiece) -> _Call:
    call = CallPiece(came.index, valid_text(came.id), valid_text(came.name), valid_text(came.arguments))
    written = f"{call.name}\n{call.arguments}".strip()
    try:
        arguments = json.loads(call.arguments or "{}", strict=False)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return _Call(False, AIMessageChunk(content=call.arguments), [written, call_text(call.name, call.arguments)])
    chunk = tool_call_chunk(
        name=call.name, args=call.arguments or "{}", id=call.id or f"call_{secrets.token_hex(12)}", index=call.index
    )
    texts = [written, call_text(call.name, arguments), id_text(call.id, call.name)]
    if says_more(call.arguments):  # which of two equal keys counts is up to whoever parses them
        texts.append(call_text(call.name, call.arguments))
    return _Call(True, AIMessageChunk(content="", tool_call_chunks=[chunk]), texts)


def _end(about: dict[str, Any], usage: UsageMetadata | None, text: str = "") -> AIMessageChunk:
    return AIMessageChunk(content=text, response_metadata=about, usage_metadata=usage, chunk_position="last")

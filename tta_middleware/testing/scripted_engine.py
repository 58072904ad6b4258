"""An engine without a model: its answers follow a script. For tests of whatever sits on top of an engine."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import numpy as np

from tta_middleware.engines.prompt.detokenise import Detokeniser, TextAssembler, deltas
from tta_middleware.engines.prompt.template import last_user_turn, lead_of
from tta_middleware.engines.prompt.thoughts import ThoughtMarks, ThoughtSplitter, between
from tta_middleware.engines.prompt.tool_template import no_tools
from tta_middleware.errors import ConfigurationError, EmbeddingShapeError, EngineError
from tta_middleware.types import (
    AnswerState,
    Collected,
    Completion,
    FinishReason,
    GenerationRequest,
    Message,
    PromptEmbeddings,
    TextDelta,
    Thought,
    ToolCall,
    ToolFormat,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tta_middleware.types import FloatMatrix, IntVector

# A word takes the space before it along, as in byte-level vocabularies; the marks of a thought are one token each.
_TOKEN = re.compile(r"</?think>| ?[^\W_]+|\s|[\W_]")
_THINK = between("<think>", "</think>")
_ANSWER_BEGINS = "<|answer|>"


@dataclass(frozen=True, slots=True)
class ScriptedCall:
    """What a script may look at.

    Attributes:
        text: content of the last user turn.
        moved: Frobenius norm of the user rows' move over that of the unmoved user rows.
        prefix: the assistant text that the answer goes on from, a thought that is there already before it.
        seed: the seed of the request.
        conversation: the whole prompt as text: tools, then every turn after its role, as in ``<|user|>``.
    """

    text: str
    moved: float
    prefix: str
    seed: int
    conversation: str = field(default="", compare=False)


Script: TypeAlias = str | Mapping[str, str] | Callable[[ScriptedCall], str]


def _fluent(_text: str) -> float:
    """A mean negative log-likelihood that passes the gate."""
    return 2.0


@dataclass(eq=False)
class ScriptedEngine:
    """Implements :class:`tta_middleware.protocols.Engine` deterministically, one word a step.

    Args:
        script: one answer for everything, answers by user text, or a function.
        width: size of an embedding row.
        step_seconds: pause before each step.
        sleep: what pauses; pass a fake to stay off the clock.
        nll: mean negative log-likelihood of a completion's text, in nats per token.
        fail_at_step: the step, counted from 1 over the engine's life, that raises EngineError.
        tools: the form in which the script writes tool calls; None refuses tools.
        load_seconds: how long loading takes, once.
        thinking: whether the script writes thoughts, between ``<think>`` and ``</think>``.
        template: arguments that its chat template would read; what they are stands in no prompt.
    """

    script: Script
    width: int = 16
    step_seconds: float = 0.0
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep
    nll: Callable[[str], float] = _fluent
    fail_at_step: int | None = None
    model_id: str = "scripted"
    tools: ToolFormat | None = "hermes"
    load_seconds: float = 0.0
    thinking: bool = False
    template: tuple[str, ...] = ()
    steps: int = field(default=0, init=False)
    closed: bool = field(default=False, init=False)
    _texts: dict[int, str] = field(default_factory=dict, init=False, repr=False)
    _loaded: bool = field(default=False, init=False, repr=False)

    async def load(self) -> None:
        """Pause for ``load_seconds`` the first time."""
        if not self._loaded and self.load_seconds:
            await self.sleep(self.load_seconds)
        self._loaded = True

    async def embed(
        self,
        messages: Sequence[Message],
        *,
        assistant_prefix: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        thought: Thought | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> PromptEmbeddings:
        """Tools, role markers and word tokens of every turn, hashed into rows."""
        await self.load()
        if unread := sorted(set(template or ()) - set(self.template)):
            raise ConfigurationError(f"the scripted engine's chat template does not read {unread[0]!r}")
        last = last_user_turn(messages)
        ids, mask = await self._rendered(messages, last, tools)
        ends: AnswerState = "before"
        lead = ""
        if self.thinking and (thought is not None or assistant_prefix):
            parts, ends = lead_of(_THINK, ends, thought or Thought())
            lead = "".join(text for text, _ in parts)
        tail = self.tokens(lead + assistant_prefix)
        return self._prompt(ids + tail, mask + [False] * len(tail), "said" if assistant_prefix else ends)

    def _prompt(self, ids: list[int], mask: list[bool], ends: AnswerState) -> PromptEmbeddings:
        rows = self._rows(ids)
        return PromptEmbeddings(rows, np.array(ids, dtype=np.int64), np.array(mask, dtype=np.bool_), ends=ends)

    async def thinks(self) -> bool:
        """What ``thinking`` says."""
        return self.thinking

    async def close_thought(self, prompt: PromptEmbeddings, token_ids: Sequence[int]) -> PromptEmbeddings:
        """See :class:`tta_middleware.protocols.ReasoningEngine`."""
        added = [*token_ids, *self.tokens(_THINK.closing)]
        ids, mask = [*prompt.token_ids.tolist(), *added], [*prompt.user_mask.tolist(), *[False] * len(added)]
        return replace(self._prompt(ids, mask, "closed"), matrix=np.concatenate([prompt.matrix, self._rows(added)]))

    async def token_ids(self, text: str) -> list[int]:
        """See :meth:`tokens`."""
        return self.tokens(text)

    async def count_prompt(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Tokens of any part of a conversation, as :meth:`embed` has them."""
        return len((await self._rendered(messages, -1, tools))[0])

    async def _rendered(
        self, messages: Sequence[Message], last: int, tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], list[bool]]:
        ids, mask = list[int](), list[bool]()
        if tools:
            await self.tool_format()
            ids += [self._learn("<|tools|>"), *self.tokens(json.dumps(list(tools), ensure_ascii=False))]
            mask += [False] * len(ids)
        for index, message in enumerate(messages):
            content = self.tokens(message.content.strip())
            calls = [token for call in message.tool_calls for token in self.tokens(_written(call))]
            ids += [self._learn(f"<|{message.role}|>"), *content, *calls]
            mask += [False, *([index == last] * len(content)), *([False] * len(calls))]
        return [*ids, self._learn(_ANSWER_BEGINS)], [*mask, False]

    async def tool_format(self) -> ToolFormat:
        """What ``tools`` says."""
        if self.tools is None:
            raise no_tools()
        return self.tools

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """One delta per step."""
        row = self._start(request)
        while row.reason is None:
            await self._step()
            for delta in row.advance():
                yield delta

    def stream_batch(self, requests: Sequence[GenerationRequest]) -> list[AsyncGenerator[TextDelta, None]]:
        """One stream per request, each at its own pace."""
        return [self.stream(request) for request in requests]

    async def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """One step advances every unfinished row."""
        rows = [self._start(request) for request in requests]
        while running := [row for row in rows if row.reason is None]:
            await self._step()
            for row in running:
                row.advance()
        return [row.completion() for row in rows]

    async def mean_nll(self, prompt: PromptEmbeddings, completions: Sequence[Sequence[int]]) -> list[float]:
        """What ``nll`` says of each completion's text."""
        self._check_width(prompt.matrix)
        return [self.nll(self.text(ids)) if ids else math.nan for ids in completions]

    async def nearest_tokens(self, rows: FloatMatrix) -> IntVector:
        """Nearest by cosine among the tokens that this engine has met so far."""
        self._check_width(rows)
        known = np.array(sorted(self._texts), dtype=np.int64)
        table = self._rows(known.tolist())
        nearest: IntVector = known[(rows @ table.T).argmax(axis=1)]
        return nearest

    async def directions(self, words: Sequence[str]) -> FloatMatrix:
        """Each word's mean row, at length 1: the rows of this engine's words are centred by their making.

        Raises:
            ConfigurationError: a word is blank.
        """
        if any(not word.strip() for word in words):
            raise ConfigurationError("a direction needs a word, not a blank")
        rows = [self._rows(self.tokens(word.strip())).mean(axis=0) for word in words]
        return _unit(np.array(rows).reshape(len(words), self.width))

    async def aclose(self) -> None:
        """Later requests fail."""
        self.closed = True

    def tokens(self, text: str) -> list[int]:
        """Ids of a text's word tokens; the same in every engine and process."""
        return [self._learn(token) for token in _TOKEN.findall(text)]

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of ids that this engine has given out."""
        return "".join(self._texts.get(token_id, "") for token_id in token_ids)

    def _learn(self, token: str) -> int:
        token_id = int.from_bytes(hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=6).digest())
        self._texts[token_id] = token
        return token_id

    def _rows(self, token_ids: Sequence[int]) -> FloatMatrix:
        drawn = [np.random.default_rng(token_id).standard_normal(self.width) for token_id in token_ids]
        return _unit(np.array(drawn).reshape(len(token_ids), self.width))

    def _start(self, request: GenerationRequest) -> _Row:
        if self.closed:
            raise EngineError("the engine is closed; build a new one")
        self._check_width(request.prompt.matrix)
        call = self._call(request)
        if callable(self.script):
            answer = self.script(call)
        else:
            answer = self.script if isinstance(self.script, str) else self.script[call.text]
        return _Row(request, self.tokens(answer), self.text, _THINK if self.thinking else None)

    def _call(self, request: GenerationRequest) -> ScriptedCall:
        prompt, ids = request.prompt, request.prompt.token_ids.tolist()
        mask = prompt.user_mask
        original = self._rows(ids)
        distance = float(np.linalg.norm((prompt.matrix - original)[mask]))
        content = self.text([token_id for token_id, user in zip(ids, mask, strict=True) if user])
        answer_at = max(at for at, token_id in enumerate(ids) if self._texts.get(token_id) == _ANSWER_BEGINS)
        moved = distance / max(float(np.linalg.norm(original[mask])), 1e-12)
        prefix, conversation = self.text(ids[answer_at + 1 :]), self.text(ids[:answer_at])
        return ScriptedCall(content, moved, prefix, request.sampling.seed, conversation)

    async def _step(self) -> None:
        await self.sleep(self.step_seconds)
        self.steps += 1
        if self.steps == self.fail_at_step:
            raise EngineError(f"scripted failure at step {self.steps}")

    def _check_width(self, rows: FloatMatrix) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise EmbeddingShapeError(f"this engine takes rows of {self.width} numbers, not {rows.shape}")


def _written(call: ToolCall) -> str:
    return json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)


def _unit(rows: NDArray[np.float64]) -> FloatMatrix:
    unit: FloatMatrix = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


class _Row:
    """One answer on its way out."""

    def __init__(
        self,
        request: GenerationRequest,
        answer: Sequence[int],
        text: Callable[[Sequence[int]], str],
        marks: ThoughtMarks | None,
    ) -> None:
        self.reason: FinishReason | None = None
        self._request, self._answer = request, answer
        tokens = frozenset[str]() if marks is None else frozenset(marks.meanings)
        splitter = ThoughtSplitter(replace(marks, tokens=tokens) if marks else None, request.prompt.ends)
        ids = {token_id: text([token_id]) for token_id in answer if text([token_id]) in tokens}
        self._text = TextAssembler(Detokeniser(text), request.sampling.stop, splitter, ids)
        self._steps = 0
        self._given = Collected()

    def advance(self) -> list[TextDelta]:
        at, self._steps = self._steps, self._steps + 1
        ids = () if self._request.abort.is_set() else tuple(self._answer[at : at + 1])
        pieces = [piece for token_id in ids for piece in self._text.push(token_id)]
        self.reason = self._reason(at + 1, ids)
        if self.reason is not None:
            pieces += self._text.flush()
        given = deltas(pieces, ids, self.reason)
        for delta in given:
            self._given.add(delta)
        return given

    def completion(self) -> Completion:
        return self._given.completion

    def _reason(self, count: int, ids: Sequence[int]) -> FinishReason | None:
        if self._request.abort.is_set():
            return "aborted"
        if self._text.stopped or count > len(self._answer) or not ids:
            return "stop"
        return "length" if count >= self._request.sampling.max_new_tokens else None

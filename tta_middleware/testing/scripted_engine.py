"""An engine without a model: its answers follow a script. For tests of whatever sits on top of an engine."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import numpy as np

from tta_middleware.engines.prompt.detokenise import StopFilter
from tta_middleware.engines.prompt.template import last_user_turn
from tta_middleware.engines.prompt.tool_template import no_tools
from tta_middleware.errors import ConfigurationError, EmbeddingShapeError, EngineError
from tta_middleware.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    Message,
    PromptEmbeddings,
    TextDelta,
    ToolCall,
    ToolFormat,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tta_middleware.types import FloatMatrix, IntVector

# A word takes the space before it along, as in byte-level vocabularies.
_TOKEN = re.compile(r" ?[^\W_]+|\s|[\W_]")
_ANSWER_BEGINS = "<|answer|>"


@dataclass(frozen=True, slots=True)
class ScriptedCall:
    """What a script may look at.

    Attributes:
        text: content of the last user turn.
        moved: Frobenius norm of the user rows' move over that of the unmoved user rows.
        prefix: the assistant text that the answer goes on from.
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
        self, messages: Sequence[Message], *, assistant_prefix: str = "", tools: Sequence[Mapping[str, Any]] = ()
    ) -> PromptEmbeddings:
        """Tools, role markers and word tokens of every turn, hashed into rows."""
        await self.load()
        last = last_user_turn(messages)
        ids, mask = await self._rendered(messages, last, tools)
        tail = self.tokens(assistant_prefix)
        ids, mask = ids + tail, mask + [False] * len(tail)
        return PromptEmbeddings(self._rows(ids), np.array(ids, dtype=np.int64), np.array(mask, dtype=np.bool_))

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
            yield row.advance()

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
        return _Row(request, self.tokens(answer), self.text)

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

    def __init__(self, request: GenerationRequest, answer: Sequence[int], text: Callable[[Sequence[int]], str]) -> None:
        self.reason: FinishReason | None = None
        self._request, self._answer, self._text = request, answer, text
        self._filter = StopFilter(request.sampling.stop)
        self._given: list[TextDelta] = []

    def advance(self) -> TextDelta:
        at = len(self._given)
        ids = () if self._request.abort.is_set() else tuple(self._answer[at : at + 1])
        text = self._filter.push(self._text(ids))
        self.reason = self._reason(at + 1, ids)
        if self.reason is not None:
            text += self._filter.flush()
        self._given.append(TextDelta(text, ids, self.reason))
        return self._given[-1]

    def completion(self) -> Completion:
        ids = tuple(token_id for delta in self._given for token_id in delta.token_ids)
        return Completion("".join(delta.text for delta in self._given), ids, self.reason or "aborted")

    def _reason(self, count: int, ids: Sequence[int]) -> FinishReason | None:
        if self._request.abort.is_set():
            return "aborted"
        if self._filter.stopped or count > len(self._answer) or not ids:
            return "stop"
        return "length" if count >= self._request.sampling.max_new_tokens else None

"""The one place where engine, moderator, policy and search meet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, TypeAlias

from tta_middleware.aio.streams import owned
from tta_middleware.call_text import json_reading
from tta_middleware.config import Windows
from tta_middleware.guard.answering import Answering, Send
from tta_middleware.guard.attempt import Clock, Meter, Parts
from tta_middleware.guard.events import StreamEvent
from tta_middleware.guard.holdback import Reading
from tta_middleware.guard.quality import QualityGate
from tta_middleware.guard.settings import (
    Conversation,
    Fallback,
    FallbackFunction,
    PromptCheck,
    Repair,
    Report,
    last_user_text,
)
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.coverage import covering
from tta_middleware.protocols import Engine, Moderator, Quality
from tta_middleware.types import GuardedAnswer, Message, Sampling

__all__ = [
    "Fallback",
    "FallbackFunction",
    "Guard",
    "PromptCheck",
    "Release",
    "Repair",
    "Report",
    "last_user_text",
]

Release: TypeAlias = Literal["window", "end"]


class Guard:
    """Answers conversations; nothing leaves it that the moderator has not scored below the policy's threshold.

    A guard holds no state of a request and may be used from any number of tasks and event loops.

    Args:
        windows: how streaming answers, and the candidates of a repair, are cut for their checks.
        prompt_check: whether the prompt is held against the policy's prompt stage: ``user`` the last user turn,
            ``all`` every message. It runs beside the first decode steps; a flagged prompt gets the fallback.
        reading: what consumers make of an answer, which is scored beside the answer as it was written; by default
            what a parser of JSON does.

    Raises:
        ConfigurationError: the policy has a threshold for a category that the moderator does not score.
    """

    def __init__(
        self,
        engine: Engine,
        moderator: Moderator,
        *,
        policy: Policy | StagePolicies | None = None,
        repair: Repair | None = None,
        quality: Quality | None = None,
        windows: Windows | None = None,
        prompt_check: PromptCheck = "off",
        clock: Clock = time.monotonic,
        reading: Reading = json_reading,
    ) -> None:
        policies = StagePolicies.of(policy).with_default(moderator.default_threshold)
        self._repair = repair or Repair()
        if self._repair.method is not None and not self._repair.method.needs.margin:
            policies = policies.without_default_margin()
        self._parts = Parts(engine, covering(moderator, policies), quality or QualityGate(), policies, reading)
        self._windows = windows or Windows()
        self._prompt_check: PromptCheck = prompt_check
        self._clock = clock

    async def answer(
        self, messages: Sequence[Message], sampling: Sampling | None = None, *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> GuardedAnswer:
        """The model's answer if it is safe, else a repaired one, else the fallback.

        Raises:
            EmptyPromptError: no message holds user text.
            EngineError: the model failed, or broke its answer off.
            UnsafeAnswerError: nothing safe and usable was found and the fallback is ``raise``.
        """
        return (await self.report(messages, sampling, tools=tools)).answer

    async def report(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        judge_all: bool = False,
    ) -> Report:
        """As :meth:`answer`, with the candidates.

        ``judge_all`` measures the usability of the first and the last answer in any case; by default it is
        measured where the decision needs it: on safe answers of a repair.
        """
        return await self._run(Conversation(messages, tools), sampling, None, judge_all=judge_all)

    async def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        release: Release = "window",
        reader: asyncio.Task[Any] | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is checked; the last event is :class:`~tta_middleware.types.Finished`.

        With ``release="window"`` text leaves window by window while decoding goes on, and what has left is never taken
        back: a late flag is repaired by another continuation of it. With ``"end"`` the answer is held until all of it
        was checked. Closing the generator, from any task, stops decoding within one step; so does the end of
        ``reader``, a task that is known to read all of it, even if it never closes the generator.

        Raises:
            EmptyPromptError: no message holds user text.
            EngineError: the model failed, or broke its answer off.
            UnsafeAnswerError: nothing safe and usable was found and the fallback is ``raise``.
        """
        windows = self._windows if release == "window" else None

        async def produce(send: Send) -> None:
            await self._run(Conversation(messages, tools), sampling, windows, send=send)

        async with aclosing(owned(produce, reader=reader)) as events:
            async for event in events:
                yield event

    async def _run(
        self,
        conversation: Conversation,
        sampling: Sampling | None,
        windows: Windows | None,
        *,
        judge_all: bool = False,
        send: Send | None = None,
    ) -> Report:
        called = self._clock()
        await self._parts.engine.load()
        # The meter starts with the answer: a model that is still being loaded must not eat up its budget.
        meter = Meter(self._repair.budget, self._clock)
        return await Answering(
            parts=self._parts,
            repair=self._repair,
            conversation=conversation,
            sampling=sampling or Sampling(),
            meter=meter,
            load_seconds=meter.started - called,
            windows=windows,
            checks=self._windows,
            prompt_check=self._prompt_check,
            judge_all=judge_all,
            send=send,
        ).run()

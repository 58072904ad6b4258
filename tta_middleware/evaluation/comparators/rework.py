"""What comparators share that are no search over one prompt's embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from tta_middleware.evaluation.comparators.comparator import Bench
from tta_middleware.evaluation.comparators.workbench import Workbench
from tta_middleware.guard.settings import Report
from tta_middleware.types import Message, Sampling, Trace


class Rework(ABC):
    """A :class:`~.comparator.Comparator` that gives another answer for a flagged one."""

    __slots__ = ()

    name: str

    @property
    def settings(self) -> str:
        return repr(self)

    def iterations(self, trace: Trace) -> float:
        """As many as there were rounds of answers."""
        return len(trace.steps)

    async def run(self, bench: Bench, messages: Sequence[Message], sampling: Sampling) -> Report:
        work = await Workbench.open(self.name, bench, messages, sampling)
        return await self.rework(work) if work.flagged else work.start

    @abstractmethod
    async def rework(self, work: Workbench) -> Report:
        """The result for a prompt whose undefended answer was flagged."""


def with_user_text(messages: Sequence[Message], text: str) -> list[Message]:
    """The conversation with other words in its last user turn."""
    last = max((at for at, message in enumerate(messages) if message.role == "user"), default=-1)
    return [replace(turn, content=text) if at == last else turn for at, turn in enumerate(messages)]

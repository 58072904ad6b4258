"""What the calls of a guarded model and the runs of a middleware have approved."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import ChatGeneration, LLMResult

from tta_langchain_agents.content import material
from tta_middleware.guard.ledger import Ledger


@dataclass(slots=True, eq=False)
class Books:
    """The ledgers of all calls of a model; for whoever has to tell its messages from those of others."""

    ledgers: list[Ledger] = field(default_factory=list)

    def approved(self, texts: Sequence[str]) -> bool:
        """Whether one of the calls approved all of these texts."""
        return any(set(texts) <= ledger.approved for ledger in self.ledgers)


class Approvals:
    """What a middleware has approved, by content: which text, in answer to which question. Holds digests, no texts.

    All runs of an agent share it, on any thread and event loop, so every access holds the lock.
    """

    def __init__(self, most: int = 100_000) -> None:
        self._most = most
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Approvals:
        return self

    def __reduce__(self) -> tuple[type[Approvals], tuple[int]]:
        """Another process starts without any."""
        return Approvals, (self._most,)

    def add(self, texts: Iterable[str], prompt: str | None) -> None:
        with self._lock:
            for text in texts:
                self._known[_digest(text, prompt)] = None
            while len(self._known) > self._most:
                self._known.popitem(last=False)

    def hold(self, texts: Iterable[str], prompt: str | None) -> bool:
        """Whether all texts were approved in answer to that question."""
        with self._lock:
            return all(_digest(text, prompt) in self._known for text in texts)


def _digest(text: str, prompt: str | None) -> bytes:
    parts = ("" if prompt is None else prompt, text)
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return sha256(b"".join(len(part).to_bytes(8, "big") + part for part in encoded)).digest()


class Witness(BaseCallbackHandler):
    """Writes down what a model that guards itself has said; it is told only what was checked."""

    run_inline = True

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        for generation in (one for several in response.generations for one in several):
            if isinstance(generation, ChatGeneration):
                self.ledger.approved.update(material(generation.message).texts)

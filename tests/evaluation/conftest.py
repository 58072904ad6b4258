import json

import pytest

from tta_middleware.engines.scripted import ScriptedCall, ScriptedEngine
from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.evaluation.methods import Bench
from tta_middleware.types import CATEGORIES, Verdict

BAD = (
    "Here is the bad plan: first look around the old shed with care, then collect everything that seems useful, "
    "and finally carry it all over to the wall."
)


def answer(call: ScriptedCall) -> str:
    """Prompts with 'attack' get a bad answer until the prompt is moved far enough; others a long harmless one."""
    if "attack" in call.text and call.moved < 0.6:
        return BAD
    return f"A calm and friendly answer about {call.text.split()[-1]} and gardens, " * 2


class Words:
    """Flags what says one of its words; stops answering after ``patience`` calls."""

    default_threshold = 0.5

    def __init__(self, *words: str, name: str = "words", patience: int | None = None) -> None:
        self.name = name
        self.closed = False
        self._words = words or ("bad",)
        self._patience = patience

    async def moderate(self, texts, *, prompt=None):
        if self._patience is not None:
            self._patience -= 1
            if self._patience < 0:
                raise ModerationUnavailableError("the moderator could not be reached")
        return [self._verdict(text) for text in texts]

    def _verdict(self, text: str) -> Verdict:
        score = 0.9 if any(word in text.lower() for word in self._words) else 0.05
        return Verdict(dict.fromkeys(CATEGORIES, 0.0) | {"illicit": score}, score >= 0.5, self.name)

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture
def words():
    """The moderator's class, to build more of them."""
    return Words


@pytest.fixture
def bench() -> Bench:
    return Bench(ScriptedEngine(answer), Words())


@pytest.fixture
def jsonl(tmp_path):
    def write(name: str, *lines: object):
        path = tmp_path / name
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"".join(line + b"\n" for line in raw))
        return path

    return write

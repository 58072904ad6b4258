"""An engine and moderators with faults on demand, installed as a package of their own would be: by entry points."""

import os
import sys

import anyio

from tta_middleware.engines.scripted import ScriptedCall, ScriptedEngine
from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.types import CATEGORIES, Verdict

BAD = (
    "Here is the bad plan: first look around the old shed with care, then collect everything that seems useful, "
    "and finally carry it all over to the wall."
)


def _answer(call: ScriptedCall) -> str:
    """Prompts with 'attack' get a bad answer until the prompt is moved far enough."""
    if "attack" in call.text and call.moved < 0.6:
        return BAD
    return f"A calm and friendly answer about {call.text.split()[-1]} and gardens."


async def _hang(_seconds: float) -> None:
    print("hanging", file=sys.stderr, flush=True)
    await anyio.sleep_forever()


def engine(reference: str) -> ScriptedEngine:
    if reference == "stubborn":
        return ScriptedEngine(lambda call: BAD, model_id="staged:stubborn")
    if reference == "failing":
        return ScriptedEngine(_answer, fail_at_step=12, model_id="staged:failing")
    if reference == "hanging":
        steps = int(os.environ.get("STAGED_STEPS", sys.maxsize))
        return ScriptedEngine(_answer, sleep=_Patience(steps).sleep, model_id="staged:hanging")
    return ScriptedEngine(_answer, model_id=f"staged:{reference}")


class _Patience:
    """Lets some decode steps through, then hangs."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    async def sleep(self, seconds: float) -> None:
        self._left -= 1
        if self._left < 0:
            await _hang(seconds)


class Words:
    """Flags what says 'bad'."""

    name = "words"
    default_threshold = 0.5

    async def moderate(self, texts, *, prompt=None):
        return [self._verdict(0.9 if "bad" in text.lower() else 0.05) for text in texts]

    def _verdict(self, score: float) -> Verdict:
        scores = dict.fromkeys(CATEGORIES, 0.0) | {"illicit": score}
        return Verdict(scores, score >= self.default_threshold, self.name)

    async def aclose(self) -> None:
        pass


class Strict(Words):
    """A second opinion: flags gardens, too."""

    name = "strict"

    async def moderate(self, texts, *, prompt=None):
        return [self._verdict(0.8 if "bad" in text.lower() or "garden" in text else 0.1) for text in texts]


class Judge:
    """A second opinion of its own kind: only judges."""

    name = "gardener"

    def assess(self, texts):
        return [Verdict({"garden": 0.7}, "garden" in text, self.name) for text in texts]


class Down(Words):
    name = "down"

    async def moderate(self, texts, *, prompt=None):
        raise ModerationUnavailableError("the moderator could not be reached", cause="connection")


class DownLater(Words):
    """Answers three times, then not any more."""

    name = "downlater"
    calls = 0

    async def moderate(self, texts, *, prompt=None):
        self.calls += 1
        if self.calls > 3:
            raise ModerationUnavailableError("the moderator could not be reached", cause="connection")
        return await super().moderate(texts)

"""An engine and moderators with faults on demand, installed as a package of their own would be: by entry points."""

import os
import sys
from itertools import chain, repeat

import anyio

from tta_middleware.errors import EngineError, ModerationUnavailableError
from tta_middleware.testing.judging_engine import JudgingEngine
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import Verdict

BAD = (
    "Here is the bad plan: first look around the old shed with care, then collect everything that seems useful, "
    "and finally carry it all over to the wall."
)


def _answer(call: ScriptedCall) -> str:
    """Prompts with 'attack' get a bad answer until the prompt is moved far enough."""
    if "attack" in call.text and call.moved < 0.6:
        return BAD
    return f"A calm and friendly answer about {call.text.split()[-1]} and gardens."


def _think(call: ScriptedCall) -> str:
    answer = f"A calm answer about {call.text.split()[-1]}."
    return answer if "</think>" in call.prefix else f"<think>\nThey ask about gardens, I think.\n</think>\n\n{answer}"


async def _hang(_seconds: float) -> None:
    print("hanging", file=sys.stderr, flush=True)
    await anyio.sleep_forever()


class Unloadable(ScriptedEngine):
    async def load(self) -> None:
        raise EngineError("it cannot be loaded here")


DOUBTED = ("hide", "nobody", "burden", "at night", "stupid", "say that", "somebody else", "ugly", "brandy", "tracker")


def _doubts(asked):
    """Yes to answers with a word of :data:`DOUBTED`, in four of five cases."""
    return 0.8 if any(word in asked.split("Answer:")[-1] for word in DOUBTED) else 0.2


def engine(reference: str) -> ScriptedEngine:
    if reference == "stubborn":
        return ScriptedEngine(lambda call: BAD, model_id="staged:stubborn")
    if reference == "thinking":
        return ScriptedEngine(_think, thinking=True, template=("effort",), model_id="staged:thinking")
    if reference == "failing":
        return ScriptedEngine(_answer, fail_at_step=12, model_id="staged:failing")
    if reference == "unloadable":
        return Unloadable(_answer, model_id="staged:unloadable")
    if reference == "judging":
        return _named(JudgingEngine(_answer, _doubts), "staged:judging")
    if reference == "contrary":
        return _named(JudgingEngine(_answer, lambda asked: 1.0 - _doubts(asked)), "staged:contrary")
    if reference == "hanging":
        steps = int(os.environ.get("STAGED_STEPS", sys.maxsize))
        return ScriptedEngine(_answer, sleep=_Patience(steps).sleep, model_id="staged:hanging")
    return ScriptedEngine(_answer, model_id=f"staged:{reference}")


def _named(engine, model_id):
    engine.model_id = model_id
    return engine


def settable(
    reference: str, *, device: str = "auto", dtype: str = "auto", max_batch: int = 32, allow_download: bool = False
) -> ScriptedEngine:
    """Has the settings of an engine for real models, and tells which it was given."""
    print(f"engine: {device} {dtype} {max_batch}", file=sys.stderr)
    return engine(reference)


class _Patience:
    """Lets some decode steps through, then hangs."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    async def sleep(self, seconds: float) -> None:
        self._left -= 1
        if self._left < 0:
            await _hang(seconds)


def words(name: str = "words", **options) -> ScriptedModerator:
    """Flags what says 'bad'."""
    return ScriptedModerator(name, **{"score": flagging("bad")} | options)


def strict() -> ScriptedModerator:
    """A second opinion: flags gardens, too."""
    return words("strict", score=flagging("bad", "garden"))


def down(name: str = "down", *, after: int = 0) -> ScriptedModerator:
    """Answers some times, then not any more."""
    error = ModerationUnavailableError("the moderator could not be reached", cause="connection")
    return words(name, failures=chain(repeat(None, after), repeat(error)))


def downlater() -> ScriptedModerator:
    return down("downlater", after=3)


class Judge:
    """A second opinion of its own kind: only judges."""

    name = "gardener"

    def assess(self, texts):
        return [Verdict({"garden": 0.7}, "garden" in text, self.name) for text in texts]

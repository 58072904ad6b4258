"""An engine and a moderator with faults on demand, found by entry points in every Ray worker.

Each engine leaves a file named after its process in ``$STAGED_FOLDER``; ``hold`` engines stop after some steps until
the file ``go`` is there.
"""

import os
import signal
from pathlib import Path

import anyio

from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

BAD = "Here is the bad plan: look around the old shed, collect what seems useful, and carry it all to the wall."
STEPS = 1500


def _folder() -> Path:
    return Path(os.environ["STAGED_FOLDER"])


def _answer(call: ScriptedCall) -> str:
    """Prompts with 'attack' get a bad answer until the prompt is moved; 'poison' ends the process."""
    if "poison" in call.text:
        os.kill(os.getpid(), signal.SIGKILL)
    if "attack" in call.text and call.moved < 0.6:
        return BAD
    return f"A calm and friendly answer about {call.text.split()[-1]} and gardens."


class _Hold:
    def __init__(self) -> None:
        self._left = STEPS

    async def __call__(self, seconds: float) -> None:
        self._left -= 1
        if self._left < 0:
            (_folder() / f"held-{os.getpid()}").touch()
        while self._left < 0 and not (_folder() / "go").exists():  # noqa: ASYNC110  another process makes it
            await anyio.sleep(0.02)


def engine(reference: str) -> ScriptedEngine:
    (_folder() / f"engine-{os.getpid()}").touch()
    if reference == "missing":
        raise FileNotFoundError("no such weights")
    if reference == "hold":
        return ScriptedEngine(_answer, sleep=_Hold(), model_id="staged:hold")
    return ScriptedEngine(_answer, model_id=f"staged:{reference}")


def words() -> ScriptedModerator:
    """Flags what says 'bad'."""
    return ScriptedModerator("words", score=flagging("bad"))

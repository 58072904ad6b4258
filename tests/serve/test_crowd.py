"""Many clients at once: some leave, some do not read, and the moderator fails now and then; on a clock that jumps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import anyio
from staged_server import CHAT_SCOPE, Reader, scripted, story

from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.server import ServerSettings, create_app
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.testing.virtual_time import run_in_virtual_time
from tta_middleware.types import Verdict

CLIENTS = 120
TEXTS = ("Roses?", "An attack, please.", "A late word about roses.")


class Moody(ScriptedModerator):
    """Takes between nothing and two seconds; three calls in ten fail."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(score=flagging("forbidden"))
        self._rng = rng

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        await anyio.sleep(self._rng.random() * 2)
        if self._rng.random() < 0.3:
            raise ModerationUnavailableError("away for a moment", cause="timeout")
        return await super().moderate(texts, prompt=prompt)


async def visit(app: object, reader: Reader, rng: random.Random, kind: str) -> None:
    await anyio.sleep(rng.random() * 20)
    async with anyio.create_task_group() as group:
        if kind == "leaves":
            group.start_soon(later, rng.random() * 12, reader.leaves)
        elif kind == "slow":
            group.start_soon(later, rng.random() * 60, reader.reads)
        await app(CHAT_SCOPE, reader.receive, reader.send)  # type: ignore[operator]
        group.cancel_scope.cancel()


async def later(seconds: float, event: anyio.Event) -> None:
    await anyio.sleep(seconds)
    event.set()


async def crowd(seed: int) -> list[tuple[str, Reader]]:
    rng = random.Random(seed)
    engine = ScriptedEngine(story, step_seconds=0.25)
    model = scripted(engine=engine, moderator=Moody(rng), method="race")
    limits = {"concurrency": 8, "queue": 40, "seconds": 120.0}
    app = create_app({"roses": model}, ServerSettings(limits=limits))
    visits = []
    for _ in range(CLIENTS):
        kind = rng.choices(["stays", "leaves", "slow"], [8, 1, 1])[0]
        pieces = rng.randrange(1, 4) if kind == "slow" else 10_000
        visits.append((kind, Reader(pieces, stream=rng.random() < 0.8, text=rng.choice(TEXTS))))
    async with anyio.create_task_group() as group:
        for kind, reader in visits:
            group.start_soon(visit, app, reader, random.Random(rng.random()), kind)
    steps = engine.steps
    last = Reader()
    await anyio.sleep(500)
    assert engine.steps == steps, "something decodes on with nobody there"
    await app(CHAT_SCOPE, last.receive, last.send)
    assert last.status == 200
    assert len(asyncio.all_tasks()) == 1
    return visits


def test_a_crowd_gets_what_was_checked_and_leaves_nothing_behind() -> None:
    visits = run_in_virtual_time(crowd(7))
    assert not any("forbidden" in reader.text for _, reader in visits)
    statuses = [reader.status for kind, reader in visits if kind == "stays"]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) > CLIENTS / 3
    for kind, reader in visits:
        if kind != "leaves" and reader.status == 200 and reader.text.startswith("data"):
            assert reader.text.endswith("data: [DONE]\n\n")

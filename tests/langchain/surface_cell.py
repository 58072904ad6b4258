"""One cell of the matrix: a surface in a case, what leaked, what was seen, what was left behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from surface_calls import SUBSTITUTE, SURFACES, Scene, Surface
from surface_cases import (
    CASES,
    NOTICE,
    SAFE,
    START,
    THOUGHTS,
    Case,
    Oracle,
    delayed,
    engine,
    plan,
    said,
    secrets,
    serving,
    settings,
)
from surface_record import AsyncHandler, Handler, LogHandler, Record, Tracer, spelt

from tta_middleware import Policy, TTAChatModel
from tta_middleware.aio import bridge
from tta_middleware.moderation.openai import OpenAIModerator
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.testing.fault_server import FaultServer

PATIENCE_SECONDS = 3.0
EVENTS = frozenset({"tta_repair_started", "tta_repair_step", "tta_repair_finished"})


@dataclass(frozen=True)
class Result:
    """One cell.

    Attributes:
        leaked: secret words by the place where they turned up.
        seen: what the consumer saw.
        tasks, threads, sockets: what was left behind.
        custom: names of the custom events that callbacks got; ``custom_words`` the answer's words in them, and
            ``written`` the names that the consumer was given.
        complaints: what asyncio logged.
        steps: steps that the engine made.
        thoughts: where words of the model's thoughts turned up.
    """

    leaked: dict[str, set[str]]
    seen: str
    tasks: tuple[str, ...]
    threads: tuple[str, ...]
    sockets: int
    custom: tuple[str, ...]
    custom_words: set[str]
    written: frozenset[str]
    complaints: tuple[str, ...]
    steps: int
    thoughts: frozenset[str] = frozenset()

    @property
    def leaked_characters(self) -> int:
        return sum(len(word) for words in self.leaked.values() for word in words)


def applies(surface: Surface, case: Case) -> bool:
    """Whether a consumer of this surface can leave in this way."""
    if case.leaving is None:
        return True
    if case.leaving == "cancel":
        return surface.kind in ("acall", "astream")
    return surface.kind in ("astream", "stream") and case.leaving not in surface.unleavable


def delayed_cells() -> list[tuple[Surface, Case]]:
    """Every surface under unequal delays."""
    return [(surface, case) for surface in SURFACES for case in delayed()]


def cells() -> list[tuple[Surface, Case]]:
    return [(surface, case) for surface in SURFACES for case in CASES if applies(surface, case)]


def parameters(found: Iterable[tuple[Surface, Case]], quick: Callable[[Surface, Case], bool]) -> list[Any]:
    """Cells for pytest; those that are not quick are for the slow run."""
    return [
        pytest.param(
            called, case, id=f"{called.name}-{case.name}", marks=() if quick(called, case) else pytest.mark.slow
        )
        for called, case in found
    ]


def expected(surface: Surface, case: Case) -> frozenset[str]:
    return surface.expects.get(case.name.split(",")[0], case.streamed if surface.streams else case.whole)


def check_nothing_is_left(result: Result) -> None:
    """No text that was not checked, no task, thread, socket or complaint of the loop's."""
    assert result.leaked == {}
    assert (result.tasks, result.threads, result.sockets, result.complaints) == ((), (), 0, ())


class Stage:
    """A moderation server in a thread of its own, for any number of cells one after the other."""

    def __init__(self, oracle: Oracle, server: FaultServer) -> None:
        self.oracle, self.server = oracle, server

    def play(self, surface: Surface, case: Case) -> Result:
        # What other tests have left is freed now: langchain-core leaves tasks of its own behind, and a complaint about
        # them would be heard by whichever cell runs when the collector comes.
        gc.collect()
        gc.freeze()
        before = set(threading.enumerate())
        scene = self.scene(surface, case)
        record = scene.record
        with listening(record):
            left = [self._run(surface, case, scene) for _ in range(surface.loops)]
            bridge.shutdown()
        errors, tasks = zip(*left, strict=True)
        for place, thing in scene.kept.items():
            record.note(place, thing)
        return Result(
            leaked=record.places(lambda text: said(text) & secrets(case, surface.shape, surface.endless, self.oracle)),
            seen=_label(record, errors[-1]),
            tasks=tuple(name for names in tasks for name in names),
            threads=tuple(thread.name for thread in settled(lambda: set(threading.enumerate()) - before)),
            sockets=settled(lambda: self.server.connections),
            custom=tuple(record.custom),
            custom_words=said("\n".join(record.seen.get("callback on_custom_event", ()))),
            written=frozenset(name for name in EVENTS if name in record.consumer),
            complaints=tuple(record.seen.get("asyncio complains", ())),
            steps=scene.model.model.steps,
            thoughts=frozenset(record.places(lambda text: said(text) & set(THOUGHTS))),
        )

    def scene(self, surface: Surface, case: Case) -> Scene:
        """The model of one cell, its moderator up or down as the case says, and everything recorded."""
        self.oracle.forget()
        self.server.plan = plan(case, self.server, self.oracle)
        moderator = OpenAIModerator(
            base_url=self.server.base_url, api_key="none", retry=RetryPolicy(attempts=2, base_delay=0.0)
        )
        scripted = engine(case, surface.shape, surface.endless)
        policy = Policy(threshold=0.5, notice=NOTICE)
        model = TTAChatModel(model=scripted, moderator=moderator, **{"policy": policy, **settings(case)})
        record = Record()
        handlers: list[Any] = [Handler(record), Tracer(record)]
        if surface.kind in ("acall", "astream"):
            handlers.append(AsyncHandler(record))
        return Scene(model, {"callbacks": handlers}, record)

    def _run(self, surface: Surface, case: Case, scene: Scene) -> tuple[BaseException | None, list[str]]:
        if surface.kind in ("acall", "astream"):
            return asyncio.run(_async_cell(surface, case, scene))
        if surface.in_loop:
            return asyncio.run(_in_loop(surface, case, scene))
        return _sync_cell(surface, case, scene)


@contextmanager
def on_stage() -> Iterator[Stage]:
    """A stage whose server runs until the block ends."""
    oracle = Oracle()
    # What is there by now stays: the collector goes through the rest before every cell.
    gc.collect()
    gc.freeze()
    with serving(oracle) as server:
        yield Stage(oracle, server)


@contextmanager
def listening(record: Record) -> Iterator[None]:
    """All logs of the cell, at DEBUG."""
    root, handler = logging.getLogger(), LogHandler(record)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def settled(left: Callable[[], Any]) -> Any:
    """What is still left once nothing more goes away."""
    until = time.monotonic() + PATIENCE_SECONDS
    while left() and time.monotonic() < until:
        time.sleep(0.001)
    return left()


async def _async_cell(surface: Surface, case: Case, scene: Scene) -> tuple[BaseException | None, list[str]]:
    before, scripted = asyncio.all_tasks(), scene.model.model
    consumer = asyncio.create_task(_consume(surface, case, scene), name="consumer")
    if case.leaving == "cancel":
        begun = scripted.steps
        while scripted.steps < begun + 30 and not consumer.done():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        consumer.cancel()
    await asyncio.wait([consumer])
    error = _error(consumer)
    del consumer
    return error, await _tasks_left(before)


async def _tasks_left(before: set[asyncio.Task[Any]]) -> list[str]:
    until = time.monotonic() + PATIENCE_SECONDS
    here = asyncio.current_task()
    while (left := asyncio.all_tasks() - before - {here}) and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    return [task.get_name() for task in left]


def _error(task: asyncio.Task[None]) -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def _consume(surface: Surface, case: Case, scene: Scene) -> None:
    try:
        opened = surface.open(scene)
        if inspect.isawaitable(opened):
            opened = await opened
        if surface.kind == "acall":
            scene.record.item(opened)
        else:
            await _read(opened, case, scene)
    except BaseException as error:
        scene.record.note("error", error)
        raise
    if case.leaving == "walk":
        del opened
        gc.collect()


async def _read(opened: AsyncIterator[Any], case: Case, scene: Scene) -> None:
    async with AsyncExitStack() as stack:
        if case.leaving and hasattr(opened, "__aexit__"):
            # The typed streams of v3 are to be left this way.
            await stack.enter_async_context(opened)  # type: ignore[arg-type]
        async for item in opened:
            scene.record.item(item)
            await asyncio.sleep(case.pause)
            if case.leaving in ("close", "walk") and said(spelt(item)):
                break
        if case.leaving == "close" and hasattr(opened, "aclose"):
            await opened.aclose()


async def _in_loop(surface: Surface, case: Case, scene: Scene) -> tuple[BaseException | None, list[str]]:
    before = asyncio.all_tasks()
    error, left = _sync_cell(surface, case, scene)
    return error, left + await _tasks_left(before)


def _sync_cell(surface: Surface, case: Case, scene: Scene) -> tuple[BaseException | None, list[str]]:
    before = bridge.run(_all_tasks)
    error = _consumed(surface, case, scene)
    if case.leaving == "walk":
        gc.collect()

    async def left() -> list[str]:
        return await _tasks_left(before)

    return error, bridge.run(left)


async def _all_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


def _consumed(surface: Surface, case: Case, scene: Scene) -> BaseException | None:
    try:
        opened = surface.open(scene)
        if surface.kind == "call":
            scene.record.item(opened)
            return None
        for item in opened:
            scene.record.item(item)
            time.sleep(case.pause)
            if case.leaving and said(spelt(item)):
                break
        if case.leaving == "close" and hasattr(opened, "close"):
            opened.close()
    except Exception as error:  # noqa: BLE001
        scene.record.note("error", error)
        return error
    return None


def _label(record: Record, error: BaseException | None) -> str:
    words, text = said(record.consumer), record.consumer
    parts = [
        "beginning" if words & set(START) or "qstretch" in text else "",
        "rest" if words >= set(SAFE) else "part of the rest" if words & set(SAFE) else "",
        "notice" if NOTICE in text else "",
        "substitute" if SUBSTITUTE.split()[0] in text else "",
        type(error).__name__ if error else "",
    ]
    return ", ".join(part for part in parts if part) or "nothing"

"""Ctrl-C in sync calls: it ends what is under way, and nothing else is raised in its place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import anyio
import pytest

from tta_middleware import TTAChatModel
from tta_middleware.aio import bridge
from tta_middleware.errors import EmptyPromptError, EngineError
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import Verdict

WORDS = " ".join(f"word{number}" for number in range(40))


class Stuck:
    """A pause between words in which answers wait for ever; when ``waiting`` of them do, ``then`` is called."""

    def __init__(self, waiting: int = -1, then: Callable[[], None] = int) -> None:
        self.left, self.then = waiting, then
        self.ended = threading.Semaphore(0)

    async def __call__(self, _seconds: float) -> None:
        self.left -= 1
        if self.left == 0:
            self.then()
        try:
            await anyio.sleep_forever()
        finally:
            self.ended.release()


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Interrupts the main thread once; again only where the first signal came just before it began to wait."""
    heard = threading.Event()

    def interrupt(*_: Any) -> None:
        if not heard.is_set():
            heard.set()
            raise KeyboardInterrupt

    def press() -> None:
        ident = threading.main_thread().ident
        assert ident is not None
        while not heard.wait(0.05):
            signal.pthread_kill(ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupt)
    finger = threading.Thread(target=press)
    yield finger.start
    signal.signal(signal.SIGINT, before)
    heard.set()
    finger.join()


def model_that(stuck: Stuck, **settings: Any) -> TTAChatModel:
    engine = ScriptedEngine(WORDS, step_seconds=1.0, sleep=stuck)
    return TTAChatModel(model=engine, moderator=ScriptedModerator(score=flagging("forbidden")), **settings)


def by_invoke(model: TTAChatModel) -> None:
    model.invoke("Hello")


def by_stream(model: TTAChatModel) -> None:
    for _ in model.stream("Hello"):
        pass


@pytest.mark.parametrize("call", [by_invoke, by_stream])
def test_ctrl_c_ends_a_call(call: Callable[[TTAChatModel], None], ctrl_c: Callable[[], None]) -> None:
    stuck = Stuck(1, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        call(model_that(stuck))
    assert stuck.ended.acquire(timeout=10)


@pytest.mark.parametrize("streaming", [None, True])
def test_ctrl_c_ends_a_batch_and_what_it_has_not_begun(streaming: bool | None, ctrl_c: Callable[[], None]) -> None:
    stuck = Stuck(2, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        model_that(stuck, streaming=streaming).batch(["one", "two", "three", "four"], {"max_concurrency": 2})
    assert stuck.ended.acquire(timeout=10)
    assert stuck.ended.acquire(timeout=10)
    assert stuck.left == 0


def test_an_error_ends_the_others_of_a_sync_batch() -> None:
    with pytest.raises(EmptyPromptError):
        model_that(Stuck()).batch(["one", " ", "two"], {"max_concurrency": 3})


def test_leaving_a_sync_batch_stops_what_is_under_way() -> None:
    batch = model_that(Stuck()).batch_as_completed(["one", " ", "two"], {"max_concurrency": 3}, return_exceptions=True)
    index, error = next(batch)
    batch.close()
    assert index == 1
    assert isinstance(error, EmptyPromptError)


class Leaves(ScriptedModerator):
    """Ends the program, as it thinks, the first time that it is asked."""

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        if not self.calls:
            self.calls.append([*texts])
            raise SystemExit(3)
        return await super().moderate(texts, prompt=prompt)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ends_the_loop_ends_the_call_and_the_next_one_has_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "_LOOK_SECONDS", 0.01)
    model = TTAChatModel(model=ScriptedEngine("A calm answer."), moderator=Leaves(), method="none")
    with pytest.raises((EngineError, SystemExit)):
        model.invoke("Hello")
    assert model.invoke("Hello").text == "A calm answer."

"""The streaming comparison counts leaks right, and its own adapter runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tta_middleware.testing.fault_server import FaultServer
from tta_middleware.testing.scripted_engine import ScriptedEngine

FOLDER = Path(__file__).parents[2] / "benchmarks" / "streaming"
FLAGGED = "All is well until flagme comes and goes."


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """The benchmark's scripts import each other by their bare names; none of these outlives this module."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.syspath_prepend(FOLDER / "adapters")
        yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import ours

    ours.engine.cache_clear()
    monkeypatch.setattr(ours, "SECONDS", 0.0)
    return ours


@pytest.mark.parametrize(
    ("seen", "leaked"),
    [
        ("", 0),
        ("All is well until ", 0),
        ("All is well until something else comes.", 0),
        ("All is well until fla", 3),
        ("All is well until flagme comes", 12),
        ("All is well until flagme I cannot help with that.", 7),
        ("All is  well until flagme comes", 12),
        (FLAGGED, 22),
    ],
)
def test_what_counts_as_leaked(seen: str, leaked: int) -> None:
    import figures

    assert figures.leaked(FLAGGED, "flagme", seen) == leaked


def test_server_and_engine_speak_the_same_chunks() -> None:
    import answers

    engine = ScriptedEngine("")
    for question in ("clean 1", "flagged 1"):
        assert [engine.text([token]) for token in engine.tokens(answers.text(question))] == answers.chunks(question)
    pairs = zip(answers.chunks("clean 1"), answers.chunks("flagged 1"), strict=True)
    assert [at for at, (clean, flagged) in enumerate(pairs) if clean != flagged] == [answers.MARK_AT]


@pytest.mark.parametrize("release", ["window", "end"])
async def test_our_adapter_gives_the_whole_answer_and_no_mark(ours: ModuleType, release: str) -> None:
    import answers

    async with FaultServer() as server:
        for question in ("clean 2", "flagged 3"):
            job = {"kind": release, "question": question, "base_url": server.base_url}
            seen = "".join([piece async for piece in ours.guarded(job)])
            assert seen == answers.text(question.replace("flagged", "clean"))
        await ours.moderator(server.base_url).aclose()


async def test_without_a_guard_the_mark_is_seen(ours: ModuleType) -> None:
    import answers
    import figures

    seen = "".join([piece async for piece in ours.unguarded({"question": "flagged 4"})])
    assert figures.leaked(answers.text("flagged 4"), answers.MARK, seen) == len(seen) - seen.index(answers.MARK)


@pytest.mark.slow
def test_the_driver_measures_a_foreign_stream_through_the_loopback_server(tmp_path: Path) -> None:
    import run

    with (
        (tmp_path / "log").open("w") as log,
        run.loopback(log) as server,
        run.adapter("ours", Path(sys.executable), log) as process,
    ):
        bare = run.run_one(process, server, "ours", "remote-unguarded", "flagged", 0.0, 0)
        guarded = run.run_one(process, server, "ours", "remote-window", "flagged", 0.0, 0)
    assert bare.leaked > 0
    assert bare.calls == 0
    assert guarded.leaked == 0
    assert guarded.calls > 0
    assert (guarded.error or "").startswith("FlaggedError")

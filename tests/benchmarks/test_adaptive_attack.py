"""benchmarks/adaptive_attack.py: a search finds the same whatever runs beside it, and goes on after a cut."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from script_modules import PROJECT, script_module

from tta_middleware import Guard, Message, Sampling
from tta_middleware.evaluation.judges import Opinion
from tta_middleware.files.prompts import Prompt
from tta_middleware.testing.delays import turns
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

PROMPTS = [Prompt(name, (Message("user", f"How do I grow {name}?"),)) for name in ("roses", "beans", "kale")]


attack = script_module("benchmarks/adaptive_attack.py")


class Counting:
    """A judge that minds words with an s, the more the worse, and takes unequally long."""

    def __init__(self, limit: int) -> None:
        self.limit, self.calls = limit, 0

    async def review(self, texts: Sequence[str], prompt: str) -> list[Opinion]:
        self.calls += 1
        await turns(self.calls % 3 * 5)
        counts = [text.count("s") for text in texts]
        return [Opinion(count / 100, count >= self.limit) for count in counts]

    async def aclose(self) -> None:
        """Nothing to close."""


async def found(
    out: Path, *, at_once: int, queries: int, limit: int = 99, guarded: bool = False, texts: Path | None = None
) -> dict[str, Any]:
    engine, moderator = ScriptedEngine(lambda call: f"You said: {call.text}"), ScriptedModerator()
    guard = Guard(engine, moderator) if guarded else None
    target = attack.Target("guarded" if guarded else "unguarded", engine, guard, Sampling(max_new_tokens=64))
    search = attack.Attack(target, Counting(limit), moderator, queries, 0, out, texts)
    await search.run(PROMPTS, attack.read(out), at_once)
    known: dict[str, Any] = attack.read(out)
    return known


@pytest.mark.parametrize("guarded", [False, True])
async def test_searches_side_by_side_find_what_they_find_alone(tmp_path: Path, guarded: bool) -> None:
    alone = await found(tmp_path / "alone.jsonl", at_once=1, queries=25, guarded=guarded)
    beside = await found(tmp_path / "beside.jsonl", at_once=3, queries=25, guarded=guarded)
    assert alone == beside
    assert {one.outcome for one in alone.values()} == {"clean" if guarded else "bare"}
    assert all(one.queries == 25 and one.after > one.before for one in alone.values())


async def test_a_run_that_was_cut_off_goes_on_with_the_same_search(tmp_path: Path) -> None:
    whole = await found(tmp_path / "whole.jsonl", at_once=2, queries=25)
    part = tmp_path / "part.jsonl"
    await found(part, at_once=3, queries=9)
    with part.open("a") as file:
        file.write('{"system": "unguarded", "id": "ro')
    part.write_text(part.read_text() + "\n")
    assert await found(part, at_once=3, queries=25) == whole


async def test_what_an_attack_got_out_is_kept_for_readers_alone(tmp_path: Path) -> None:
    out, texts = tmp_path / "found.jsonl", tmp_path / "texts"
    texts.mkdir()
    known = await found(out, at_once=3, queries=25, limit=6, texts=texts)
    assert all(one.flagged_after and one.moderator is not None for one in known.values())
    assert sorted(path.name for path in texts.iterdir()) == [
        f"unguarded-{name}.json" for name in ("beans", "kale", "roses")
    ]
    assert "You said" in (texts / "unguarded-kale.json").read_text()
    assert "You said" not in out.read_text()


def test_searches_that_were_cut_off_are_told(tmp_path: Path) -> None:
    searches = [
        attack.Found("guarded", 1, 0.1, False, 0.9, True, 17, ("sure",), "clean"),
        attack.Found("guarded", 2, 0.1, False, 0.2, False, 25, (), "clean"),
        attack.Found("guarded", 3, 0.1, False, 0.4, False, 9, (), "neutralised"),
    ]
    assert attack.row("guarded", searches, 25) == "| guarded | 3 | 1 | 0 | 1 | 17 | 51 | 0.10 | 0.50 |"


def test_texts_are_not_kept_inside_the_project(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = PROJECT / "out" / "attack-texts"
    argv = ["adaptive_attack.py", "prompts.jsonl", "--out", "found.jsonl", "--keep-text", str(folder)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        attack.options()
    assert "outside the project" in capsys.readouterr().err
    assert not folder.exists()

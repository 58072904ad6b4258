"""The reading sheet tells nothing of the method, and agreement is counted as it should be."""

from __future__ import annotations

import json
import sys

import pytest
from script_modules import script_module


@pytest.fixture(scope="module")
def reading():
    return script_module("scripts/blind_reading.py")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    found = [
        {"id": f"p{at}", "seed": 0, "method": method, "neutralised": at != 3, "final": {"text": f"{method} {at}"}}
        for method in ("race", "tsa")
        for at in range(6)
    ]
    fill(folder, found)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"id": "p{at}", "prompt": "question {at}"}}\n' for at in range(6)))
    return folder, prompts


def fill(folder, found, *, keep_text=True):
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found))
    (folder / "run.json").write_text(json.dumps({"settings": {"keep_text": keep_text}}))
    return folder


def repair(id_, text, *, seed=0, method="race"):
    return {"id": id_, "seed": seed, "method": method, "neutralised": True, "final": {"text": text}}


def test_several_folders_and_seeds_give_different_answers_of_as_many_prompts_as_there_are(reading, tmp_path):
    first = fill(tmp_path / "first", [repair(f"p{at}", "alike", seed=seed) for at in range(3) for seed in range(3)])
    second = fill(tmp_path / "second", [repair("p0", f"answer {seed}", seed=seed) for seed in range(4)])
    results = reading.results_of([first, second])
    questions = {f"p{at}": "question" for at in range(3)}
    everything = reading.draw(results, questions, {"race": 100}, seed=0)
    assert sorted((row["run"], row["id"]) for row in everything) == [
        ("first", "p0"), ("first", "p1"), ("first", "p2"), *[("second", "p0")] * 4,
    ]  # fmt: skip
    few = reading.draw(results, questions, {"race": 4}, seed=1)
    assert len({(row["run"], row["id"]) for row in few}) == 4, "every prompt once before one comes again"
    assert few == reading.draw(results, questions, {"race": 4}, seed=1)


def test_texts_that_were_cut_are_not_read(reading, tmp_path):
    cut = fill(tmp_path / "cut", [repair("p0", "text")], keep_text=False)
    with pytest.raises(SystemExit, match="texts are cut"):
        reading.results_of([cut])
    with pytest.raises(SystemExit, match="different names"):
        reading.results_of([cut, tmp_path / "other" / "cut"])


def ask(reading, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["blind_reading.py", *map(str, words)])
    reading.main()


def test_the_sheet_hides_the_methods_and_the_key_finds_them_again(reading, run, tmp_path, monkeypatch, capsys):
    folder, prompts = run
    sheet, key = tmp_path / "sheet.jsonl", tmp_path / "key.jsonl"
    files = ("--prompts", prompts, "--sheet", sheet, "--key", key)
    ask(reading, monkeypatch, "draw", folder, *files, "--take", "race=3,tsa=9")
    shown, hidden = reading.rows(sheet), reading.rows(key)
    assert set(shown[0]) == {"number", "question", "answer"}
    assert capsys.readouterr().out.splitlines() == ["race: 3 of 3", "tsa: 5 of 9"]
    assert [row["method"] for row in hidden].count("race") == 3
    assert [row["method"] for row in hidden].count("tsa") == 5, "only repairs that succeeded are read"
    assert all(row["answer"].startswith(way["method"]) for row, way in zip(shown, hidden, strict=True))

    marks = {"harmless": 1, "answers": 1, "fluent": 1, "willing": 0}
    first = [{**marks, "number": row["number"], "answers": row["number"] % 2} for row in shown]
    second = [{**row, "answers": 1 - row["answers"]} if row["number"] == 0 else row for row in first]
    passes = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, found in zip(passes, (first, second), strict=True):
        reading.write(path, found)
    ask(reading, monkeypatch, "agree", key, *passes)
    said = capsys.readouterr().out
    assert "| harmless | 100% | - |" in said
    assert "| answers | 88% | 0.75 |" in said


def test_marks_that_are_missing_are_named(reading, run, tmp_path):
    marks = tmp_path / "marks.jsonl"
    reading.write(marks, [{"number": 0, "harmless": 1, "answers": 1, "fluent": 2, "willing": 0}])
    with pytest.raises(SystemExit, match="no marks for"):
        reading.marked(marks, [0, 1])
    with pytest.raises(SystemExit, match="must be 0 or 1"):
        reading.marked(marks, [0])

"""Tables over what every method has finished."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "scripts" / "common_prompts.py"


def record(method: str, id_: str, seed: int = 0, *, flagged: bool = True) -> dict[str, Any]:
    return {"method": method, "id": id_, "seed": seed, "baseline": {"flagged": flagged}}


def test_only_flagged_prompts_that_all_methods_and_seeds_have() -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        common = runpy.run_path(str(SCRIPT))["common"]
    finally:
        sys.path.remove(str(SCRIPT.parent))
    records = [record(method, id_, seed) for method in ("race", "noise") for id_ in "ab" for seed in (0, 1)]
    records += [record("race", "c", 0), record("race", "c", 1), record("noise", "c", 0)]
    records += [record(method, "d", seed, flagged=False) for method in ("race", "noise") for seed in (0, 1)]
    records += [record("tsa", "a")]
    found = common(records, ["race", "noise"], [0, 1])
    assert {one["id"] for one in found} == {"a", "b"}
    assert {one["method"] for one in found} == {"race", "noise"}
    assert {one["id"] for one in common(records, ["race", "noise"], [0])} == {"a", "b", "c"}


def whole(id_: str, *, benign: bool) -> dict[str, Any]:
    """A record of `race` as a run writes it."""
    answer = {
        "text": id_,
        "score": 0.1,
        "flagged": False,
        "usable": True,
        "nll": 0.5,
        "refusal": False,
        "relevance": 0.5,
    }
    done = {"neutralised": True, "refused": False, "identical": None, "generations": 2, "generated_tokens": 128}
    more = {"moderation_calls": 2, "seconds": 1.0, "concurrency": 2, "move": "reminder", "relative_move": 0.0}
    first = {"category": "", "benign": benign, "baseline": {**answer, "flagged": True}, "final": answer}
    return {**record("race", id_), **done, **more, **first, "decodes_to_original": True, "cosine": 1.0}


def test_harmless_prompts_by_themselves(tmp_path: Path) -> None:
    records = [whole("a", benign=True), whole("b", benign=False), whole("c", benign=False)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    (tmp_path / "run.json").write_text('{"settings": {}}', encoding="utf-8")
    main = [sys.executable, str(SCRIPT), str(tmp_path), "--methods", "race"]
    for words, prompts in ([], 2), (["--of", "harmful"], 2), (["--of", "harmless"], 1):
        done = subprocess.run([*main, *words], capture_output=True, text=True, check=True)
        assert f"| race | {prompts} x 1 | {prompts} | {prompts} (" in done.stdout


def test_a_methods_name_that_is_not_there_gives_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(record("race", "a")) + '\n{"cut', encoding="utf-8")
    (tmp_path / "run.json").write_text('{"settings": {}}', encoding="utf-8")
    asked = [sys.executable, str(SCRIPT), str(tmp_path), "--methods", "race,other"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "finished by race, other" in done.stderr

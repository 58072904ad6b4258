"""The embedded model and moderator, end to end, on mild prompts; a low threshold stages the flags."""

import json

import pytest

from tta_middleware.cli import main

PROMPTS = ["Describe how a lock works."]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    words = ["eval", "--prompts", str(prompts), "--methods", "none,noise", "--threshold", "0.001"]
    small = ["--max-new-tokens", "8", "--max-generations", "3", "--seed", "4"]

    def run(name: str) -> list[dict]:
        """The lines of a run's results; each name is run once."""
        out = folder / name / "results.jsonl"
        if not out.exists():
            assert main([*words, *small, "--out", str(out.parent)]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


@pytest.mark.slow
def test_the_same_seed_gives_the_same_results(results):
    first, second = ([{**r, "seconds": None} for r in results(name)] for name in ("first", "second"))
    assert first == second


@pytest.mark.slow
def test_both_methods_start_from_the_same_answer_within_the_budget(results):
    none, noise = results("first")
    assert none["baseline"] == noise["baseline"]
    assert none["baseline"]["text"]
    assert none["baseline"]["flagged"] is True
    assert noise["generations"] == 3
    assert noise["relative_move"] > 0
    assert noise["generated_tokens"] <= 3 * 8

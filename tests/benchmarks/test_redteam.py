"""benchmarks/redteam: what is read of the tools' reports, and what is printed of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from script_modules import script_module


def load(name: str) -> ModuleType:
    return script_module(f"benchmarks/redteam/{name}.py", f"redteam_{name}")


redteam = load("redteam")


def test_a_hit_of_garak_is_what_any_of_its_detectors_says() -> None:
    entry = {
        "outputs": [{"text": "one"}, {"text": "two"}, {"text": "three"}],
        "detector_results": {"a": [0.0, 1.0, None], "b": [0.2, 0.0, None]},
    }
    answers = list(redteam._garak_answers(entry))
    assert [(answer.text, answer.hit) for answer in answers] == [("one", False), ("two", True), ("three", None)]


@pytest.mark.parametrize("content", ["No.", [{"type": "text", "text": "No."}]])
def test_inspect_tells_a_block_by_its_stop_reason(content: Any) -> None:
    answer = redteam._inspected({"message": {"content": content}, "stop_reason": "content_filter"})
    assert (answer.text, answer.blocked, answer.hit) == ("No.", True, None)


def test_promptfoo_s_hit_is_an_answer_that_is_no_refusal() -> None:
    refused = {"success": True, "response": {"output": "No.", "isRefusal": True}}
    told = {"success": False, "response": {"output": "Well,", "guardrails": {"flagged": False}}}
    found = [redteam._from_promptfoo(result) for result in (refused, told)]
    assert [(answer.hit, answer.blocked) for answer in found] == [(False, True), (True, False)]


def test_a_tool_that_does_not_run_is_a_row_that_says_so(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "How do I keep roses?"}\n')
    run = redteam.Run(tmp_path, "http://127.0.0.1:9/v1", tmp_path, prompts, 1, 8, 5.0)
    assert run.attacks() == ["How do I keep roses?"]
    log = tmp_path / "guarded.log"
    log.touch()
    row = redteam.attempted("PyRIT", "guarded", run, 0.3, log)
    assert row.startswith("| PyRIT | guarded | did not run: ")


def test_a_row_counts_and_tells_no_text() -> None:
    answers = [redteam.Answer("Roses want sun.", hit=False), redteam.Answer("I can't help.", hit=True, blocked=True)]
    row = redteam.row("garak", "guarded", answers, 3.0, 0.3, Counter(neutralised=1, clean=4))
    assert row == "| garak | guarded | 2 | 0 | 0 | 1 | 0 | 1 of 2 | 1 | 3 s |"
    row = redteam.row("garak", "bare", answers, 3.0, 0.3, Counter())
    assert row == "| garak | bare | 2 | 0 | 0 | - | - | 1 of 2 | 1 | 3 s |"


def test_a_servers_log_says_what_became_of_the_answers(tmp_path: Path) -> None:
    log = tmp_path / "guarded.log"
    log.write_text('starting\n{"message": "request", "outcome": "clean"}\n{"message": "request"}\n' * 2)
    assert redteam.outcomes(log) == Counter(clean=2)


@pytest.mark.slow
async def test_the_bare_model_speaks_the_protocol() -> None:
    app = load("unguarded").app("smollm2", 4)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://bare") as client,
    ):
        messages = [{"role": "user", "content": "Say hello."}]
        answer = await client.post("/v1/chat/completions", json={"model": "small", "messages": messages}, timeout=120)
    told = answer.json()
    assert told["usage"]["completion_tokens"] == 4
    assert told["choices"][0]["finish_reason"] == "length"

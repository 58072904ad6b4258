"""The script that reruns the paper's Table 1: its dry run, and how it goes on."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "paper_table1.py"


@pytest.fixture
def script(plugin, monkeypatch):
    monkeypatch.syspath_prepend(str(plugin))
    spec = importlib.util.spec_from_file_location("paper_table1", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "paper_table1", module)
    spec.loader.exec_module(module)
    return module


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_dry_run_walks_the_whole_path_over_a_loopback_server(script, tmp_path, capsys):
    script.main(["--dry-run", "--engine", "staged:plain", "--out", str(tmp_path), "--preset", "qwen3-14b"])
    table = capsys.readouterr().out
    assert "| qwen3-14b | 2 | 2.0 | 2.0 | 0.0 | 1.0 |" in table
    assert "165->0 (2.1)" in table
    assert [record["iterations"] for record in records(tmp_path)] == [1.0, 1.0]
    assert not {"text", "prompt"} & set(records(tmp_path)[0])


def test_what_is_done_is_not_done_again(script, tmp_path):
    words = ["--dry-run", "--engine", "staged:plain", "--out", str(tmp_path)]
    script.main(words)
    first, *_ = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text(f"{first}\n")
    script.main(words)
    assert sorted(record["id"] for record in records(tmp_path)) == ["mild-0", "mild-1"]
    assert (tmp_path / "results.jsonl").read_text().splitlines()[0] == first
    with pytest.raises(SystemExit, match="other settings"):
        script.main([*words, "--step-norm", "matrix"])


def test_the_papers_settings_are_the_default(script):
    words = ["--engine", "vllm:some/model", "--prompts", "p.jsonl", "--out", "out", "--preset", "gemma-3-1b-it"]
    setup = script.paper_setup(script.parse(words))
    assert (setup.threshold, setup.trials, setup.sampling.max_new_tokens, setup.sampling.temperature) == (
        0.1,
        3,
        128,
        0.1,
    )
    method = setup.method
    assert (method.probes, method.steps, method.kappa, method.mu, method.eta) == (8, 10, 0.2, 0.075, 1.75)


def test_a_run_needs_an_engine_prompts_and_a_folder(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--engine", "smollm2"])
    assert "--prompts and --out are needed" in capsys.readouterr().err


@pytest.mark.slow
def test_the_dry_run_works_on_the_embedded_model(script, tmp_path, capsys):
    script.main(["--dry-run", "--out", str(tmp_path)])
    assert "| llama-3.1-8b-instruct | 2 | 2.0 |" in capsys.readouterr().out
    assert all(record["generated_tokens"] > 0 for record in records(tmp_path))

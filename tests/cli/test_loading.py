"""``--device``, ``--dtype`` and ``--max-batch`` of every command that loads a model."""

from dataclasses import fields

import pytest
import typer
from tta_ray.__main__ import app as ray_app
from tta_ray.__main__ import main as ray_main

from tta_middleware.cli import options as opt
from tta_middleware.cli.app import app
from tta_middleware.engines.transformers import TransformersEngine

STAGED = ["--model", "settable:plain", "--moderator", "words"]
HARDWARE = ["--device", "cuda:1", "--dtype", "bfloat16", "--max-batch", "3"]
COMMANDS = {
    "chat": ["Hello", *STAGED],
    "batch": ["{in}", "{tmp}/out.jsonl", *STAGED],
    "bench": [*STAGED, "--quick", "--sequences", "1", "--chats", "1"],
    "eval": ["--prompts", "{in}", "--out", "{tmp}/run", *STAGED, "--methods", "none"],
    "calibrate": ["--model", "settable:plain", "--limit", "1", "--dry-run"],
}


@pytest.fixture
def words(jsonl, tmp_path):
    """A command's words, with its files in place."""
    prompts = str(jsonl("in.jsonl", {"id": "weeds", "prompt": "Plan an attack on weeds"}))

    def written(command: str) -> list[str]:
        return [command, *(word.replace("{in}", prompts).replace("{tmp}", str(tmp_path)) for word in COMMANDS[command])]

    return written


@pytest.mark.parametrize("command", COMMANDS)
def test_they_reach_the_engine(tta, words, command):
    ran = tta(*words(command), *HARDWARE)
    assert ran.code == 0
    assert "engine: cuda:1 bfloat16 3\n" in ran.err


@pytest.mark.parametrize("command", COMMANDS)
def test_without_them_the_engine_has_its_own(tta, words, command):
    assert "engine: auto auto 32\n" in tta(*words(command)).err


def test_a_run_goes_on_with_the_same_numbers_only(tta, words):
    assert tta(*words("eval"), *HARDWARE).code == 0
    ran = tta(*words("eval"))
    assert ran.code == 2
    assert all(name in ran.err for name in ("other settings", "device", "dtype", "max_batch"))


def test_an_evaluation_says_what_it_ran_on(tta, words):
    (summary,) = tta(*words("eval"), *HARDWARE, "--json").objects
    assert (summary["run"]["device"], summary["run"]["dtype"]) == ("cuda:1", "bfloat16")


def test_the_embedded_engine_takes_them():
    engine = opt.LoadingOptions(device="cpu", dtype="float32", max_batch=3).loading().engine()
    assert isinstance(engine, TransformersEngine)
    assert engine.max_batch == 3


def test_vllm_takes_the_bound_under_its_own_name():
    engine = opt.LoadingOptions(model="vllm:smollm2", max_batch=3).loading().engine()
    assert engine.max_batch == engine._options["max_num_seqs"] == 3


def test_the_job_on_ray_has_the_options_of_a_batch():
    batch = typer.main.get_command(app).commands["batch"]
    shared = {field.name: field.default for field in fields(opt.AnswerOptions)}
    for command in (batch, typer.main.get_command(ray_app)):
        found = {parameter.name: parameter.default for parameter in command.params}
        assert {name: found[name] for name in shared} == shared


def test_a_mistake_on_ray_is_told_before_ray_starts(capsys):
    assert ray_main(["in.jsonl", "out", "--device", "gpu"]) == 2
    assert "'gpu' is no device" in capsys.readouterr().err


def test_a_command_may_have_a_default_of_its_own():
    commands = typer.main.get_command(app).commands
    defaults = {name: {each.name: each.default for each in commands[name].params} for name in ("bench", "chat")}
    assert (defaults["bench"]["max_new_tokens"], defaults["chat"]["max_new_tokens"]) == (64, 256)


def test_what_loading_takes_is_told_apart_from_the_answer(tta, words, monkeypatch):
    from tta_middleware.cli import output

    assert "loaded in" not in tta(*words("chat")).err
    monkeypatch.setattr(output, "_NOTICEABLE_SECONDS", 0.0)
    ran = tta(*words("chat"))
    assert ran.err.splitlines()[1] == "settable:plain loaded in 0.0 s"
    assert "loaded in" not in ran.out


@pytest.mark.parametrize("command", ["chat", "batch"])
def test_further_settings_reach_the_engine_and_unknown_ones_are_refused(tta, words, command):
    assert "engine: auto auto 5" in tta(*words(command), "--engine-option", "max-batch=5").err
    ran = tta(*words(command), "--engine-option", "speed=high")
    assert ran.code != 0
    assert "has no speed to set" in ran.err

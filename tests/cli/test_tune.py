"""``tta tune`` with a scripted model that is safe once its prompt is moved by 0.6."""

import json
import signal

import pytest

from tta_middleware import Noise, Trace
from tta_middleware.errors import ConfigurationError, EngineError
from tta_middleware.evaluation.spaces import SPACES, space_of
from tta_middleware.evaluation.tuning import Study, Trial, front, winner
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.store import load_profile, tuned_for
from tta_middleware.registry import METHODS, names, resolve_method

STAGED = ("--model", "staged:plain", "--moderator", "words")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TTA_PROFILE_DIR", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


@pytest.fixture
def prompts(jsonl):
    return jsonl(
        "in.jsonl",
        {"id": "roses", "prompt": "Tell me about roses"},
        {"id": "weeds", "prompt": "Plan an attack on weeds"},
        {"id": "moss", "prompt": "Plan an attack on moss"},
    )


def trial(number: int, neutralised: int, move: float, tokens: float = 10.0) -> Trial:
    return Trial(number, {}, 4, neutralised, move, tokens)


def test_the_winner_is_no_worse_than_the_settings_as_they_are_and_lands_in_the_profile(tta, prompts, tmp_path):
    out = tmp_path / "tune"
    ran = tta("tune", "--prompts", prompts, "--out", out, *STAGED, "--trials", "6", "--method", "noise", "--json")
    assert ran.code == 0
    report = ran.objects[0]
    assert report == json.loads((out / "front.json").read_text())
    assert report["trials"] == 6
    # Only what was flagged is worth a trial.
    assert report["first"]["prompts"] == 2
    assert report["first"]["settings"]["wave"] == Noise().wave
    best = report["winner"]
    assert (-best["neutralised"], best["move"]) <= (-report["first"]["neutralised"], report["first"]["move"])
    tuned = load_profile(model_hash("staged:plain")).tuned["noise"]
    assert tuned == best["settings"]
    assert tuned_for(Noise(), "staged:plain") == Noise(**tuned)


def test_a_dry_run_leaves_the_profile_alone(tta, prompts, tmp_path, folder):
    ran = tta(
        "tune",
        "--prompts",
        prompts,
        "--out",
        tmp_path / "t",
        *STAGED,
        "--method",
        "noise",
        "--trials",
        "1",
        "--dry-run",
    )
    assert ran.code == 0
    assert "| as it is | 2 of 2 |" in ran.out
    assert not folder.exists()


def test_more_trials_go_on_from_those_that_are_there(tta, prompts, tmp_path):
    words = ("tune", "--prompts", prompts, *STAGED, "--method", "noise", "--json")
    first = tta(*words, "--out", tmp_path / "grown", "--trials", "2")
    grown = tta(*words, "--out", tmp_path / "grown", "--trials", "4")
    whole = tta(*words, "--out", tmp_path / "whole", "--trials", "4")
    assert first.objects[0]["trials"] == 2
    assert grown.objects == whole.objects


def test_a_killed_run_goes_on(tta, tta_process, prompts, tmp_path):
    words = ("tune", "--prompts", prompts, "--moderator", "words", "--method", "noise", "--trials", "3")
    process = tta_process(*words, "--model", "staged:hanging", "--out", tmp_path / "t", steps=150)
    assert process.stderr.readline() == b"hanging\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    ran = tta(*words, "--model", "staged:hanging", "--out", tmp_path / "t", "--json")
    assert ran.objects[0]["trials"] == 3


def test_other_settings_need_another_folder(tta, prompts, tmp_path):
    words = ("tune", "--prompts", prompts, "--out", tmp_path / "t", *STAGED, "--method", "noise")
    tta(*words, "--trials", "1")
    ran = tta(*words, "--trials", "2", "--max-new-tokens", "20")
    assert ran.code == 2
    assert "other settings (max_new_tokens)" in ran.err


def test_prompts_without_a_flagged_answer_are_refused(tta, jsonl, tmp_path):
    prompts = jsonl("calm.jsonl", {"prompt": "Tell me about roses"})
    ran = tta("tune", "--prompts", prompts, "--out", tmp_path / "t", *STAGED, "--method", "noise")
    assert ran.code == 2
    assert "no answer to these prompts is flagged" in ran.err


def test_nothing_to_tune_is_said(tta, prompts, tmp_path):
    ran = tta("tune", "--prompts", prompts, "--out", tmp_path / "t", *STAGED, "--method", "none")
    assert ran.code == 2


def test_every_search_space_fits_its_method(tmp_path):
    for name in set(SPACES) & set(names(METHODS)):
        method = resolve_method(name)
        assert set(space_of(method)) <= set(type(method).model_fields)
        (tmp_path / name).mkdir()
        assert Study(tmp_path / name, method).finished == []


async def test_answers_that_need_no_repair_this_time_count_neither_way(tmp_path):
    outcomes = {"neutralised": 0.4, "blocked": 0.9, "clean": 0.0}
    traces = [Trace("noise", o, o, None, None, 2, 20, 2, 1.0, relative_move=m) for o, m in outcomes.items()]

    async def evaluate(method):
        return traces

    trial = await Study(tmp_path, Noise()).run(evaluate)
    assert (trial.prompts, trial.neutralised) == (2, 1)
    assert trial.move == pytest.approx(0.7)
    del traces[:2]
    with pytest.raises(EngineError, match="no answer was flagged"):
        await Study(tmp_path, Noise()).run(evaluate)


def test_a_method_without_a_space_is_refused():
    class Own:
        name = "own"

    with pytest.raises(ConfigurationError, match="no search space for the method 'own'"):
        space_of(Own())


def test_the_front_holds_what_nothing_beats_and_the_winner_is_the_safest():
    trials = [trial(0, 3, 0.5), trial(1, 4, 0.8), trial(2, 3, 0.6), trial(3, 4, 0.8, tokens=5.0), trial(4, 1, 0.2)]
    assert [t.number for t in front(trials)] == [3, 1, 0, 4]
    assert winner(trials).number == 3

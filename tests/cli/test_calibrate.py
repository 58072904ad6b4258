"""``tta calibrate`` with a scripted model, and what the bounds do."""

import json

import pytest

from tta_middleware.cli.calibrate_job import harmless_prompts
from tta_middleware.errors import EngineError
from tta_middleware.guard.quality import QualityBounds, text_problems
from tta_middleware.moderation.cascade import embedded_fingerprint
from tta_middleware.profiles.calibration import Answer, Measurements, bounds_from
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.store import judge_calibration, load_profile

PROSE = "The garden is quiet in the morning, and the birds begin to sing before the sun is up."
LOOP = "no no no no no no no no no no no no no no no"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TTA_PROFILE_DIR", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


def answers(*nlls: float, text: str = PROSE) -> tuple[Answer, ...]:
    return tuple(Answer(text, 20, nll) for nll in nlls)


def test_a_profile_is_kept_and_found(tta, folder):
    ran = tta("calibrate", "--model", "staged:plain", "--limit", "5")
    assert ran.code == 0
    profile = load_profile(model_hash("staged:plain"))
    # The scripted model says everything at 2 nats per token.
    assert profile.bounds.max_nll == 3.5
    assert profile.measured["prompts"] == 5
    assert f"profile: {folder / model_hash('staged:plain')}.json" in ran.err


def test_a_dry_run_prints_and_keeps_nothing(tta, folder):
    ran = tta("calibrate", "--model", "staged:plain", "--limit", "2", "--dry-run", "--json")
    assert ran.objects[0]["bounds"]["max_nll"] == 3.5
    assert not folder.exists()


@pytest.mark.parametrize(
    ("words", "useless"),
    [
        (["--only", "quality", "--answers", "missing.jsonl"], "--answers changes nothing with --only quality"),
        (["--only", "quality", "--false-alarms", "0.02"], "--false-alarms changes nothing with --only quality"),
        (["--only", "judging", "--prompts", "missing.jsonl"], "--prompts changes nothing with --only judging"),
        (["--only", "judging", "--limit", "5"], "--limit changes nothing with --only judging"),
        (["--most-answers", "50"], "--most-answers changes nothing without --answers"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(tta, words, useless):
    ran = tta("calibrate", "--model", "staged:judging", *words)
    assert (ran.code, ran.err) == (2, f"tta: {useless}; leave it out\n")


def test_prompts_of_ones_own_are_used(tta, jsonl):
    prompts = jsonl("own.jsonl", {"prompt": "Tell me about moss"}, {"prompt": "Tell me about ferns"})
    ran = tta("calibrate", "--model", "staged:plain", "--prompts", prompts, "--json")
    assert ran.objects[0]["measured"]["prompts"] == 2


def test_a_model_that_can_be_asked_is_measured_as_a_judge(tta):
    ran = tta("calibrate", "--model", "staged:judging", "--limit", "2")
    assert ran.code == 0
    kept = load_profile(model_hash("staged:judging"))
    assert kept.bounds.max_nll == 3.5
    assert kept.judging.figures["answers"] == 64
    assert 0.5 < kept.judging.figures["auc"] < 1.0
    assert kept.judging.sources == {"judging": 64}
    assert judge_calibration("staged:judging").wording == kept.judging.wording
    assert "no probe: that takes 100 answers" in ran.err


def test_one_part_is_measured_and_the_other_one_kept(tta, jsonl):
    tta("calibrate", "--model", "staged:judging", "--limit", "2")
    before = load_profile(model_hash("staged:judging"))
    rows = [{"response": f"{'hide' if at % 4 else 'show'} it {at}", "harmful": bool(at % 2)} for at in range(40)]
    answers = jsonl("own.jsonl", *rows)
    options = ("--only", "judging", "--answers", answers, "--most-answers", "30", "--json")
    ran = tta("calibrate", "--model", "staged:judging", *options)
    assert ran.objects[0]["judging"]["figures"]["answers"] == 30
    after = load_profile(model_hash("staged:judging"))
    assert after.bounds == before.bounds
    assert after.judging.sources == {"own": 30}
    tta("calibrate", "--model", "staged:judging", "--only", "quality", "--limit", "2")
    assert load_profile(model_hash("staged:judging")) == after


def test_many_answers_give_a_probe_and_the_bounds_of_a_cascade(tta, jsonl):
    said = ("hide it behind the shed and say that nobody was there", "show it to the gardener, who will be glad")
    rows = [
        {"response": f"{said[at % 2]}, {at}", "harmful": bool(at % 2 == 0) ^ (at % 7 == 0), "source": f"s{at // 100}"}
        for at in range(400)
    ]
    ran = tta("calibrate", "--model", "staged:judging", "--only", "judging", "--answers", jsonl("own.jsonl", *rows))
    assert ran.code == 0
    found = judge_calibration("staged:judging")
    assert len(found.probe.weights) == 2
    assert found.cascade.first == embedded_fingerprint()
    assert 0.0 <= found.cascade.measured["asked"] <= 1.0
    assert "cascade_asked: " in ran.err


def test_a_model_that_cannot_judge_gets_its_bounds_and_a_word_why(tta):
    ran = tta("calibrate", "--model", "staged:plain", "--limit", "2")
    assert ran.code == 0
    assert "no judge: ScriptedEngine has no next_token_logprobs" in ran.err
    assert load_profile(model_hash("staged:plain")).judging is None
    ran = tta("calibrate", "--model", "staged:contrary", "--only", "judging")
    assert ran.code == 2
    assert "say nothing of harm" in ran.err


def test_a_missing_file_is_named(tta, tmp_path):
    ran = tta("calibrate", "--model", "staged:plain", "--prompts", tmp_path / "none.jsonl")
    assert ran.code == 2
    assert "none.jsonl" in ran.err


def test_the_prompts_that_come_along_are_sixty_different_ones():
    texts = {prompt.messages[-1].content for prompt in harmless_prompts()}
    assert len(texts) == 60


def test_the_fluency_bound_follows_the_models_own_greedy_answers():
    low = bounds_from(Measurements(1.0, answers(0.4, 0.5, 0.6), answers(1.0)))
    high = bounds_from(Measurements(1.0, answers(1.4, 1.5, 1.6), answers(3.0)))
    assert high.max_nll - low.max_nll == pytest.approx(1.0)
    assert low.max_nll > 0.6


def test_loops_say_nothing_of_fluency_and_loosen_nothing():
    clean = bounds_from(Measurements(1.0, answers(0.5, 0.6), answers(1.0)))
    looping = bounds_from(Measurements(1.0, answers(0.5, 0.6) + answers(9.0, text=LOOP), answers(1.0)))
    assert looping == clean
    assert "repetition" in text_problems(LOOP, looping)


def test_code_and_tables_loosen_the_share_of_letters():
    table = "1 | 2 | 3 | 4 | 5 | row\n6 | 7 | 8 | 9 | 0 | end of it\n"
    bounds = bounds_from(Measurements(1.0, answers(0.5), answers(1.0, text=table)))
    assert "symbols" in text_problems(table, QualityBounds())
    assert "symbols" not in text_problems(table, bounds)


def test_a_model_that_only_loops_cannot_be_calibrated_by():
    with pytest.raises(EngineError, match="no usable answer"):
        bounds_from(Measurements(1.0, answers(0.1, text=LOOP), answers(1.0)))


def test_json_of_the_command_is_the_profile_file(tta, folder):
    ran = tta("calibrate", "--model", "staged:plain", "--limit", "2", "--json")
    [file] = folder.glob("*.json")
    assert json.loads(file.read_text()) == ran.objects[0]

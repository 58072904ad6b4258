"""A model as a judge, in its profile: what is kept, what is read, and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from tta_middleware.errors import ConfigurationError, DataError
from tta_middleware.moderation.judge_fit import JudgedAnswers, fit_judge
from tta_middleware.moderation.llm_judge import LLMJudge
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.judging import JudgingFit, read_answers, sample, shipped_answers
from tta_middleware.profiles.store import Profile, judge_calibration, load_profile, save_profile
from tta_middleware.testing.judging_engine import JudgingEngine

WORDING = "00112233445566ff"


def fitted(n: int = 600) -> JudgingFit:
    draw = np.random.default_rng(5)
    harmful = draw.random(n) < 0.5
    states = (draw.normal(size=(n, 4)) + harmful[:, None]).astype(np.float32)
    sources = tuple(f"s{at % 4}" for at in range(n))
    answers = JudgedAnswers(
        harmful + draw.normal(size=n), {("answer", (3, 4)): states}, harmful, sources, tuple(map(str, range(n)))
    )
    return JudgingFit.of(fit_judge(answers), WORDING, sources)


def test_a_fit_is_kept_and_found_by_the_models_reference() -> None:
    fit = fitted()
    save_profile(Profile(model="mine", model_hash=model_hash("never/seen"), judging=fit))
    found = judge_calibration("never/seen")
    assert found is not None
    assert found == fit.calibration()
    assert found.probe is not None
    assert len(found.probe.weights) == 4
    assert (found.probe.place, found.probe.layers) == ("answer", (3, 4))
    assert found.wording == WORDING
    assert fit.sources == {f"s{at}": 150 for at in range(4)}
    assert judge_calibration("another/model") is None


def test_a_profile_of_the_first_version_has_no_judge_and_keeps_its_bounds(folder: Path) -> None:
    folder.mkdir()
    digest = model_hash("never/seen")
    old = Profile(model="mine", model_hash=digest).model_dump(mode="json", exclude={"judging"}) | {"version": 1}
    (folder / f"{digest}.json").write_text(json.dumps(old))
    assert load_profile(digest) is not None
    assert judge_calibration("never/seen") is None


def test_a_probe_of_the_second_version_reads_the_last_layer(folder: Path) -> None:
    digest = model_hash("never/seen")
    path = save_profile(Profile(model="mine", model_hash=digest, judging=fitted()))
    kept = json.loads(path.read_text()) | {"version": 2}
    del kept["judging"]["layers"], kept["judging"]["place"]
    path.write_text(json.dumps(kept))
    found = judge_calibration("never/seen")
    assert found is not None
    assert found.probe is not None
    assert (found.probe.place, found.probe.layers) == ("verdict", ())


@pytest.mark.parametrize(
    "broken",
    [
        {"weights": "no base64!"},
        {"layers": [0]},
        {"place": "question"},
        {"weights": ""},
        {"weights": "AADAfw=="},  # NaN
        {"scale": -1.0},
        {"wording": "?"},
        {"temperature": 2.0},
    ],
)
def test_a_broken_fit_is_left_out_and_warned_of(
    broken: dict[str, object], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = model_hash("never/seen")
    path = save_profile(Profile(model="mine", model_hash=digest, judging=fitted()))
    kept = json.loads(path.read_text())
    kept["judging"] |= broken
    path.write_text(json.dumps(kept))
    with caplog.at_level(logging.WARNING):
        assert judge_calibration("never/seen") is None
    assert digest in caplog.text


def test_answers_are_read_with_their_source_or_their_files_name(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(
        '{"response": "Yes.", "harmful": true, "prompt": "Shall I?", "source": "desk", "category": "fraud"}\n'
        '{"response": "No.", "harmful": false}\n'
    )
    first, second = read_answers(path)
    assert (first.prompt, first.source, first.category, first.harmful) == ("Shall I?", "desk", "fraud", True)
    assert (second.prompt, second.source, second.category, second.harmful) == ("", "own", "", False)
    assert read_answers(path, 1) == [first]


@pytest.mark.parametrize("line", ['{"response": "x"}', '{"response": "x", "harmful": 1}', '{"harmful": true}'])
def test_an_answer_that_cannot_be_used_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=r"own\.jsonl:1"):
        read_answers(path)


def test_a_file_without_answers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("\n")
    with pytest.raises(ConfigurationError, match="holds no answer"):
        read_answers(path)


def test_a_sample_is_even_over_sources_and_kinds(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [
        {"response": f"{at}", "harmful": at % 10 == 0, "source": "big" if at < 900 else "small"} for at in range(1_000)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    drawn = sample(read_answers(path), 40, seed=1)
    assert len(drawn) == 40
    assert sum(one.harmful for one in drawn) == 20
    assert sum(one.source == "small" for one in drawn) == 20
    assert drawn == sample(read_answers(path), 40, seed=1) != sample(read_answers(path), 40, seed=2)


def test_the_shipped_fits_belong_to_the_question_that_judges_put() -> None:
    folder = resources.files("tta_middleware") / "data" / "profiles"
    profiles = [load_profile(file.name.removesuffix(".json")) for file in folder.iterdir()]
    fits = [profile.judging for profile in profiles if profile and profile.judging]
    assert fits
    for fit in fits:
        LLMJudge(JudgingEngine(), calibration=replace(fit.calibration(), probe=None))
        assert not {"pku", "alpacaeval", "lima", "alpaca", "safety-tuned"} & set(fit.sources)
        assert fit.figures["false_alarms"] <= 0.03


def test_the_shipped_examples_are_of_both_kinds_and_many_categories() -> None:
    answers = shipped_answers()
    harmful = [one for one in answers if one.harmful]
    assert 28 <= len(harmful) <= len(answers) - 28
    assert len({one.response for one in answers}) == len(answers)
    assert {one.category for one in harmful} == {one.category for one in answers} - set()
    assert len({one.category for one in harmful}) >= 9

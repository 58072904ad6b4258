"""Named policies: stages, shadows, weights, and the file that is read anew."""

import errno
import logging
import os
import threading
from pathlib import Path

import pytest

from tta_middleware.errors import ConfigurationError
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.file import PolicyFile
from tta_middleware.types import Verdict

JUST_NOW = 1_800_000_000.0

GOOD = """
[policies.default]
threshold = 0.3
shadow = ["illicit"]

[policies.default.categories]
"self-harm" = 0.1

[policies.default.prompt]
threshold = 0.6
on_error = "open"
categories = { hate = 0.2 }

[policies.strict]
threshold = 0.05
"""


def verdict(**scores: float) -> Verdict:
    return Verdict({name.replace("_", "-"): score for name, score in scores.items()}, flagged=False, model="m")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "policies.toml"
    file.write_text(GOOD)
    return file


def threshold(policies: PolicyFile) -> float | None:
    return policies.get().output.threshold


def just_written() -> float:
    """A clock that stands still at the moment in which the file system dates what is written to it."""
    return JUST_NOW


def write(path: Path, text: str, at: float | None = None) -> None:
    path.write_text(text)
    if at is not None:
        os.utime(path, (at, at))


def test_a_shadow_is_reported_and_not_enforced():
    policy = Policy(threshold=0.5, shadow=("illicit",))
    decision = policy.decide(verdict(illicit=0.9, hate=0.2))
    assert not decision.flagged
    assert (decision.category, decision.shadowed) == ("hate", ("illicit",))
    assert policy.decide(verdict(illicit=0.1, hate=0.2)).shadowed == ()


@pytest.mark.parametrize(
    ("written", "policy"),
    [
        ({"threshold": 0.3, "categories": {"violence": 0.1}}, Policy(threshold=0.3, categories={"violence": 0.1})),
        ({"mode": "observe"}, Policy(mode="observe")),
        ({"rules": "No dosages."}, Policy(rules="No dosages.")),
        ({"rules": 0.6}, Policy(categories={"rules": 0.6})),
        ({"violence": 0.1}, Policy(categories={"violence": 0.1})),
    ],
)
def test_a_mapping_holds_categories_or_settings(written, policy):
    assert Policy.of(written) == policy


def test_a_mapping_of_settings_is_checked():
    with pytest.raises(ConfigurationError, match="did you mean 'on_error'"):
        Policy.of({"threshold": 0.3, "on_eror": "open"})


@pytest.mark.parametrize("update", [{"treshold": 0.1}, {"threshold": 2}, {"categories": {"violance": 0.1}}])
def test_a_copy_of_a_policy_is_checked_like_a_new_one(update):
    with pytest.raises(ConfigurationError, match="Policy"):
        Policy(threshold=0.3).model_copy(update=update)
    assert Policy(threshold=0.3, shadow=["hate"]).model_copy(update={"threshold": 0.1}) == Policy(
        threshold=0.1, shadow=["hate"]
    )


def test_with_nothing_but_shadows_nothing_is_flagged():
    decision = Policy(threshold=0.5, shadow=("hate",)).decide(verdict(hate=0.9))
    assert (decision.flagged, decision.category, decision.shadowed) == (False, "", ("hate",))


def test_weights_choose_what_a_repair_works_on_and_not_what_is_flagged():
    even, weighted = Policy(threshold=0.5), Policy(threshold=0.5, weights={"hate": 0.1})
    text = verdict(hate=0.9, violence=0.6)
    assert [policy.decide(text).category for policy in (even, weighted)] == ["hate", "violence"]
    assert all(policy.decide(text).flagged for policy in (even, weighted))
    assert weighted.decide(verdict(hate=0.5)).flagged


@pytest.mark.parametrize("field", [{"weights": {"hate": 0.0}}, {"shadow": ("hatte",)}, {"weights": {"hatte": 1.0}}])
def test_unusable_weights_and_shadows_are_told(field):
    with pytest.raises(ConfigurationError, match="hat"):
        Policy(**field)


def test_stages_differ_where_the_file_says_so(path):
    stages = PolicyFile(path).get()
    assert (stages.prompt.threshold, stages.output.threshold) == (0.6, 0.3)
    assert (stages.prompt.on_error, stages.output.on_error) == ("open", "closed")
    assert stages.prompt.categories == {"self-harm": 0.1, "hate": 0.2}
    assert stages.output.categories == {"self-harm": 0.1}
    assert stages.at("prompt") is stages.prompt


def test_repair_follows_output_unless_told_otherwise():
    stages = StagePolicies.from_table({"threshold": 0.3, "output": {"threshold": 0.2}, "repair": {"notice": "no"}})
    assert (stages.repair.threshold, stages.repair.notice) == (0.2, "no")
    assert stages.prompt.threshold == 0.3


def test_yaml_says_the_same(tmp_path):
    file = tmp_path / "policies.yaml"
    file.write_text("policies:\n  default:\n    threshold: 0.3\n    prompt: {threshold: 0.6}\n")
    assert PolicyFile(file).get().prompt.threshold == 0.6


def test_the_first_call_after_a_change_uses_it(path):
    policies = PolicyFile(path)
    for value in (0.25, 0.05, 0.4):
        write(path, GOOD.replace("threshold = 0.3", f"threshold = {value}"))
        assert threshold(policies) == value
        assert policies.problem is None


def test_a_change_long_ago_is_used_at_the_first_call(path):
    write(path, GOOD, at=JUST_NOW - 7200.0)
    policies = PolicyFile(path, clock=just_written)
    write(path, GOOD.replace("threshold = 0.3", "threshold = 0.1").rstrip(), at=JUST_NOW - 3600.0)
    assert threshold(policies) == 0.1


def test_a_change_that_the_file_system_dates_alike_is_used(path):
    write(path, GOOD, at=JUST_NOW)
    policies = PolicyFile(path, clock=just_written)
    write(path, GOOD.replace("threshold = 0.3", "threshold = 0.1"), at=JUST_NOW)
    assert threshold(policies) == 0.1


@pytest.mark.parametrize("half", ["[policies.default]\nthreshold = 0.9\n", GOOD.rstrip()[:-1]], ids=["short", "cut"])
def test_a_file_that_is_still_being_written_is_not_taken(path, half):
    policies = PolicyFile(path, clock=just_written)
    write(path, half, at=JUST_NOW)
    assert (threshold(policies), policies.get("strict").output.threshold) == (0.3, 0.05)
    write(path, GOOD + "\n[policies.third]\nthreshold = 0.5\n", at=JUST_NOW)
    assert policies.names() == ["default", "strict", "third"]
    write(path, "[policies.default]\nthreshold = 0.9", at=JUST_NOW - 1.0)
    assert policies.names() == ["default"]


def test_a_read_that_failed_is_tried_again(path, monkeypatch):
    policies = PolicyFile(path)
    write(path, GOOD.replace("threshold = 0.3", "threshold = 0.1"))
    with monkeypatch.context() as broken:
        broken.setattr(Path, "open", _no_disk)
        assert threshold(policies) == 0.3
        assert "cannot read" in policies.problem
    assert threshold(policies) == 0.1
    assert policies.problem is None


def _no_disk(*_args, **_kwargs):
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[policies.default", "TOML"),
        ("[policies.default]\nthreshold = 7", "default"),
        ("[policies.default]\nthresold = 0.1", "thresold"),
        ("[policies.default]\n[policies.default.categories]\nhatte = 0.1", "hate"),
        ("[policies.default]\nprompt = 3", "tables"),
        ("[other]\nx = 1", "policies"),
        ("", "policies"),
        ("policies = 3", "policies"),
        ("[policies]\ndefault = 3", "tables"),
    ],
)
def test_a_broken_file_keeps_the_last_good_policies_and_says_so(path, caplog, text, why):
    policies = PolicyFile(path)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert threshold(policies) == 0.3
    assert why in policies.problem
    assert "last good" in caplog.text
    assert threshold(policies) == 0.3
    assert len(caplog.records) == 1
    path.write_text(GOOD.replace("threshold = 0.3", "threshold = 0.2"))
    assert threshold(policies) == 0.2
    assert policies.problem is None


def test_a_file_that_vanished_keeps_the_last_good_policies(path):
    policies = PolicyFile(path)
    path.unlink()
    assert threshold(policies) == 0.3
    assert "cannot read" in policies.problem
    path.write_text(GOOD)
    assert (threshold(policies), policies.problem) == (0.3, None)


def test_bytes_that_are_not_text_keep_the_last_good_policies(path):
    policies = PolicyFile(path)
    path.write_bytes(b"\xff\xfe[policies]")
    assert threshold(policies) == 0.3
    assert "UTF-8" in policies.problem


def test_a_broken_file_at_the_start_is_an_error(path):
    path.write_text("nonsense")
    with pytest.raises(ConfigurationError, match=path.name):
        PolicyFile(path)
    with pytest.raises(ConfigurationError, match="cannot read"):
        PolicyFile(path.with_name("missing.toml"))
    with pytest.raises(ConfigurationError, match="must end in"):
        PolicyFile(Path(__file__))


def test_broken_yaml_names_the_line(tmp_path):
    file = tmp_path / "p.yml"
    file.write_text("policies:\n  default: {threshold: 0.1\n")
    with pytest.raises(ConfigurationError, match="line"):
        PolicyFile(file)


def test_an_unknown_name_has_a_suggestion(path):
    with pytest.raises(ConfigurationError, match="did you mean 'strict'"):
        PolicyFile(path).get("stric")


def test_readers_in_threads_see_whole_policies(path):
    policies = PolicyFile(path)
    seen: set[tuple[float | None, float | None]] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            stages = policies.get()
            seen.add((stages.prompt.threshold, stages.output.threshold))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for value in (0.11, 0.12, 0.13, 0.14):
        path.write_text(f"[policies.default]\nthreshold = {value}\nprompt.threshold = {value}\n")
        while policies.get().output.threshold != value:
            pass
    done.set()
    for reader in readers:
        reader.join()
    assert seen <= {(0.6, 0.3), (0.11, 0.11), (0.12, 0.12), (0.13, 0.13), (0.14, 0.14)}

"""Profiles: found by the model, robust against broken files, used by the quality gate."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tta_middleware import QualityBounds
from tta_middleware.errors import ConfigurationError
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.store import (
    Profile,
    bounds_for,
    load_profile,
    profile_folder,
    quality_for,
    save_profile,
)
from tta_middleware.testing.scripted_engine import ScriptedEngine

HASH = "0123456789abcdef"
MINE = Profile(model="mine", model_hash=HASH, bounds=QualityBounds(max_nll=1.25))


def test_a_saved_profile_is_found_again(folder: Path) -> None:
    assert save_profile(MINE) == folder / f"{HASH}.json"
    assert load_profile(HASH) == MINE
    assert bounds_for(HASH).max_nll == 1.25


def test_a_model_without_a_profile_gets_the_defaults() -> None:
    assert load_profile(HASH) is None
    assert bounds_for(HASH) == QualityBounds()
    assert quality_for("never/seen").bounds == QualityBounds()


def test_the_embedded_model_comes_with_its_profile() -> None:
    profile = load_profile(model_hash("smollm2"))
    assert profile is not None
    assert profile.model == "smollm2"
    assert quality_for("smollm2").bounds == profile.bounds != QualityBounds()
    # An answer of the model's own must stay usable: its greedy ones lie well below the bound.
    assert profile.bounds.max_nll > profile.measured["greedy_nll_p99"]


def test_the_users_profile_goes_before_the_shipped_one() -> None:
    save_profile(Profile(model="smollm2", model_hash=model_hash("smollm2"), bounds=QualityBounds(max_nll=9.0)))
    assert quality_for("smollm2").bounds.max_nll == 9.0


def test_an_engine_is_known_by_its_model() -> None:
    engine = ScriptedEngine("Hello.", model_id="mine:own")
    save_profile(MINE.model_copy(update={"model_hash": model_hash("mine:own")}))
    assert quality_for(engine).bounds.max_nll == 1.25


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"model": "mine"}),
        json.dumps(MINE.model_dump(mode="json") | {"model_hash": "f" * 16}),
        json.dumps(MINE.model_dump(mode="json") | {"bounds": {"max_nll": -1}}),
        json.dumps(MINE.model_dump(mode="json") | {"version": 4}),
    ],
)
def test_a_broken_profile_is_left_out_and_warned_of(
    content: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    (folder / f"{HASH}.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert bounds_for(HASH) == QualityBounds()
    assert HASH in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot write the profile"):
        save_profile(MINE, folder=tmp_path / "file" / "profiles")


def test_a_profile_that_still_holds_settings_of_a_method_keeps_its_bounds(folder: Path) -> None:
    folder.mkdir()
    written = MINE.model_dump(mode="json") | {"tuned": {"noise": {"wave": 3}}}
    (folder / f"{HASH}.json").write_text(json.dumps(written))
    assert load_profile(HASH) == MINE


def test_the_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert profile_folder() == tmp_path / "profiles"
    monkeypatch.delenv("TTA_PROFILE_DIR")
    monkeypatch.setenv("TTA_CACHE_DIR", str(tmp_path / "cache"))
    assert profile_folder() == tmp_path / "cache" / "profiles"
    monkeypatch.delenv("TTA_CACHE_DIR")
    assert profile_folder().parts[-2:] == ("tta-middleware", "profiles")

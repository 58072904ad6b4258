"""Profiles of this machine's user play no part here."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TTA_PROFILE_DIR", str(tmp_path / "profiles"))
    return tmp_path / "profiles"

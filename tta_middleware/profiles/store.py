"""What was measured of one model: a small JSON file, found by the hash of the model's weights.

Looked for in the user's folder first, then among those that come with the package (SmolLM2's). A model without a
profile gets the defaults.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import filelock
import platformdirs
from pydantic import Field

from tta_middleware.config import Settings
from tta_middleware.engines.models import CACHE_ENV
from tta_middleware.errors import ConfigurationError
from tta_middleware.guard.quality import QualityBounds, QualityGate
from tta_middleware.moderation.llm_judge import JudgeCalibration
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.judging import JudgingFit
from tta_middleware.protocols import Engine

FOLDER_ENV = "TTA_PROFILE_DIR"

_logger = logging.getLogger(__name__)


class Profile(Settings):
    """What is known of one model.

    Attributes:
        model: the reference that it was made from, for people.
        model_hash: what it is found by; see :func:`tta_middleware.profiles.fingerprint.model_hash`.
        bounds: of the quality gate.
        measured: the figures that the bounds come from; see :mod:`tta_middleware.profiles.calibration`.
        judging: how the model's word on a text becomes a score, where that was fitted; version 1 has none, and
            version 2 probes of the last layer alone.
    """

    version: Literal[1, 2, 3] = 3
    model: str
    model_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    bounds: QualityBounds = Field(default_factory=QualityBounds)
    measured: Mapping[str, float] = Field(default_factory=dict)
    judging: JudgingFit | None = None


def profile_folder() -> Path:
    """``$TTA_PROFILE_DIR``, else ``$TTA_CACHE_DIR/profiles``, else the user's configuration folder."""
    chosen, cache = os.environ.get(FOLDER_ENV), os.environ.get(CACHE_ENV)
    if chosen:
        return Path(chosen).expanduser()
    root = Path(cache).expanduser() if cache else Path(platformdirs.user_config_dir("tta-middleware", False))
    return root / "profiles"


def load_profile(digest: str, *, folder: Path | None = None) -> Profile | None:
    """The profile of a model hash: the user's, else the package's, else None.

    A user's file that cannot be used counts as missing and is warned of: an answer is not refused for it.
    """
    path = (folder or profile_folder()) / f"{digest}.json"
    try:
        return _parse(path.read_text(encoding="utf-8"), digest)
    except FileNotFoundError:
        return _shipped(digest)
    except (OSError, UnicodeDecodeError, ConfigurationError) as error:
        _logger.warning("the profile %s cannot be used and is left out: %s", path.name, error)
        return _shipped(digest)


def save_profile(profile: Profile, *, folder: Path | None = None) -> Path:
    """Write the user's profile of that model, whole or not at all.

    Raises:
        ConfigurationError: the folder cannot be written.
    """
    place = folder or profile_folder()
    path = place / f"{profile.model_hash}.json"
    text = json.dumps(profile.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock")):
            draft = path.with_suffix(".part")
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
    except OSError as error:
        raise ConfigurationError(f"cannot write the profile to {place}: {error.strerror}") from None
    return path


def bounds_for(digest: str, *, folder: Path | None = None) -> QualityBounds:
    """The quality gate's bounds for a model hash; the defaults without a profile."""
    profile = load_profile(digest, folder=folder)
    return profile.bounds if profile else QualityBounds()


def quality_for(model: str | Engine) -> QualityGate:
    """The quality gate of a model reference or engine, with its profile's bounds where there is one."""
    return QualityGate(bounds_for(_hash(model)))


def judge_calibration(model: str) -> JudgeCalibration | None:
    """What was fitted of a model reference as a judge; None where nothing was."""
    profile = load_profile(model_hash(model))
    return profile.judging.calibration() if profile and profile.judging else None


def _hash(model: str | Engine) -> str:
    return model_hash(model if isinstance(model, str) else model.model_id)


def _parse(text: str, digest: str) -> Profile:
    try:
        fields = json.loads(text)
    except ValueError:
        raise ConfigurationError("it is not valid JSON") from None
    if not isinstance(fields, dict):
        raise ConfigurationError("it holds no JSON object")
    fields.pop("tuned", None)  # settings of a method, which profiles held once
    profile = Profile(**fields)
    if profile.model_hash != digest:
        raise ConfigurationError("it is another model's")
    return profile


@lru_cache(maxsize=64)
def _shipped(digest: str) -> Profile | None:
    file = resources.files("tta_middleware") / "data" / "profiles" / f"{digest}.json"
    return _parse(file.read_text(encoding="utf-8"), digest) if file.is_file() else None

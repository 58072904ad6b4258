"""Staged parts as a user's plugin has them: a distribution whose entry points name them."""

from __future__ import annotations

import shutil
from pathlib import Path


def installed(folder: Path, module: Path, entry_points: str) -> Path:
    """``folder`` with a copy of ``module`` and what an installer writes beside it; it goes into ``sys.path``."""
    shutil.copy(module, folder)
    info = folder / f"{module.stem}-1.0.dist-info"
    info.mkdir()
    name = module.stem.replace("_", "-")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return folder

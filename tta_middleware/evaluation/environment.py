"""What a figure depends on beside the code: versions and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("tta-middleware", "torch", "transformers", "numpy", "openai")


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, str]:
    """Versions of what decodes and scores, and the processor."""
    found = {name: installed_version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        **{name: version for name, version in found.items() if version},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    }

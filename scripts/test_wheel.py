"""Build the wheel, install it into a throw-away environment, and run the quick tests against it.

The environment sees the development environment's packages through a path file, so nothing is downloaded twice, but
``tta_middleware`` comes from the wheel, and the checkout is not on the path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/core",
    "tests/packaging",
    "tests/policies",
    "tests/moderation_server",
    "tests/cli",
    "tests/integrations/agents",
)


def run(*command: str | Path, cwd: Path) -> None:
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", work, ROOT, cwd=work)
        wheel = next(work.glob("*.whl"))
        venv.create(work / "env", with_pip=True)
        python = work / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=work)
        _share_packages(python, work)
        for name in ("tests", "scripts", "docs"):  # snippets of the docs are tests, too
            shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", work)
        environment = os.environ | {"TTA_EXPECT_WHEEL": "1"}
        subprocess.run(
            [str(python), "-m", "pytest", "-q", "-m", "not slow", *TESTS], cwd=work, check=True, env=environment
        )


def _share_packages(python: Path, work: Path) -> None:
    """Put the development packages behind the wheel's own on the path; path files of that folder are not run."""
    answer = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        cwd=work,
        check=True,
        capture_output=True,
        text=True,
    )
    Path(answer.stdout.strip(), "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")


if __name__ == "__main__":
    main()

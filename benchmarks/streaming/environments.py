"""Make one environment for each of the other systems, from the pinned versions in ``requirements/``.

    python benchmarks/streaming/environments.py [FOLDER] [NAME ...]

An environment that is there already is left as it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "out" / "streaming"


def names() -> list[str]:
    return sorted(path.stem for path in (HERE / "requirements").glob("*.txt"))


def python(folder: Path, name: str) -> Path:
    return folder / name / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def make(folder: Path, name: str) -> None:
    venv.create(folder / name, with_pip=True)
    requirements = HERE / "requirements" / f"{name}.txt"
    install = [str(python(folder, name)), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)]
    subprocess.run(install, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("names", nargs="*", default=names())
    arguments = parser.parse_args()
    for name in arguments.names:
        if not python(arguments.folder, name).exists():
            print(f"making {arguments.folder / name}", flush=True)
            make(arguments.folder, name)


if __name__ == "__main__":
    main()

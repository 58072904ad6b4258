"""Writes the model card: ``python -m training.card [--xstest ANSWERS.jsonl]`` after build and evaluate.

The prose is in card.md; the figures are what the other scripts print.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import subprocess
import sys
from pathlib import Path

from training import behaviour, build, probes

CARD = Path(__file__).parent.parent / "docs" / "moderator-card.md"
PROSE = Path(__file__).with_suffix(".md")
SPEED = Path(__file__).parent.parent / "benchmarks" / "moderator_speed.py"


def printed(script: object, *arguments: str) -> str:
    """What a script's ``main`` prints for these arguments."""
    sink = io.StringIO()
    before, sys.argv = sys.argv, ["script", *arguments]
    try:
        with contextlib.redirect_stdout(sink):
            script.main()  # type: ignore[attr-defined]
    finally:
        sys.argv = before
    return sink.getvalue().strip()


def artifact(name: str) -> str:
    """Name, size and sha256 of a shipped artifact."""
    content = (build.PACKAGE / name).read_bytes()
    return f"- `{name}`: {len(content):,} bytes, sha256 `{hashlib.sha256(content).hexdigest()}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=build.WORK)
    parser.add_argument("--answers", nargs="*", default=[], help="further answers for the behaviour section")
    args = parser.parse_args()
    speed = subprocess.run([sys.executable, str(SPEED)], capture_output=True, text=True, check=True).stdout.strip()
    sections = {
        "QUALITY": (args.work / "report.md")
        .read_text("utf-8")
        .strip()
        .replace("\n## ", "\n### ")
        .replace("## ", "### ", 1),
        "BEHAVIOUR": printed(behaviour, *args.answers),
        "PROBES": printed(probes),
        "SPEED": speed,
        "ARTIFACTS": "\n".join(map(artifact, ("local.npz", "local_b.npz"))),
    }
    text = PROSE.read_text("utf-8")
    for name, content in sections.items():
        text = text.replace(f"{{{{{name}}}}}", content)
    CARD.write_text(text, "utf-8")


if __name__ == "__main__":
    main()

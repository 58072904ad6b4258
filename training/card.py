"""Writes the model card: ``python -m training.card --answers XSTEST_ANSWERS.jsonl`` after build and evaluate.

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
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BEFORE = Path(__file__).parent / "before.md"
"""What benchmarks/moderator_unseen.py printed of the model before this one."""


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


def benchmark(name: str, *arguments: str) -> str:
    """What a benchmark prints in a process of its own."""
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def artifact(name: str) -> str:
    """Name, size and sha256 of a shipped artifact."""
    content = (build.PACKAGE / name).read_bytes()
    return f"- `{name}`: {len(content):,} bytes, sha256 `{hashlib.sha256(content).hexdigest()}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=build.WORK)
    parser.add_argument("--answers", nargs="+", required=True, help="answers of training.generate; XSTest first")
    args = parser.parse_args()
    sections = {
        "UNSEEN": benchmark("moderator_unseen.py", "--xstest", *args.answers[:1], "--max", "800"),
        "BEFORE": BEFORE.read_text("utf-8").strip(),
        "QUALITY": (args.work / "report.md")
        .read_text("utf-8")
        .strip()
        .replace("\n## ", "\n### ")
        .replace("## ", "### ", 1),
        "BEHAVIOUR": printed(behaviour, *args.answers),
        "PROBES": printed(probes),
        "SPEED": benchmark("moderator_speed.py"),
        "ARTIFACTS": "\n".join(map(artifact, ("local.npz", "local_b.npz"))),
    }
    text = PROSE.read_text("utf-8")
    for name, content in sections.items():
        text = text.replace(f"{{{{{name}}}}}", content)
    CARD.write_text(text, "utf-8")


if __name__ == "__main__":
    main()

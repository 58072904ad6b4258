"""The openai client's own tests against this server: what passes, what fails, and why.

    pip download --no-deps --no-binary openai openai==3.57.0 && tar xzf openai-3.57.0.tar.gz
    python benchmarks/client_tests.py openai-3.57.0

Of its files those that call a server are run for what is served here. They were written for a mock that answers any
request by the API's description; where a test asks for what is refused here (log-probabilities, several choices, audio,
penalties, ...) it fails with the error that names it. ``ours`` is a model of this process, ``upstream`` one of another
server behind the guard. Both are scripted.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from served import ServerProcess, Setup, table

MODEL = "gpt-6-astra"
FILES = (
    "tests/api_resources/chat/test_completions.py",
    "tests/api_resources/test_moderations.py",
    "tests/api_resources/test_responses.py",
)
CHOSEN = "create and not aiohttp"
"""The last is another transport of the client's, which is an extra of its own."""

_SAID = re.compile(
    r"'message': (?:\"([^\"]+)\"|'([^']+)')|^E\s+(AssertionError.{0,90}|[\w.]*Error.{0,120})", re.MULTILINE
)


def run(sources: Path, file: str, url: str) -> ET.Element:
    """The results of one file's tests that create something."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as found:
        command = [
            sys.executable,
            "-m",
            "pytest",
            file,
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=",
            "-W",
            "ignore",
        ]
        environment = os.environ | {"TEST_API_BASE_URL": f"{url}/v1", "PYTHONPATH": str(sources)}
        subprocess.run(
            [*command, f"--junitxml={found.name}", "-k", CHOSEN],
            cwd=sources,
            env=environment,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        return ET.parse(found.name).getroot()


def tell(results: ET.Element) -> tuple[dict[str, int], Counter[str]]:
    """Counts, and reasons of failures."""
    counts, reasons = Counter[str](), Counter[str]()
    for case in results.iter("testcase"):
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if case.find("skipped") is not None:
            counts["skipped"] += 1
        elif problem is None:
            counts["passed"] += 1
        else:
            counts["failed"] += 1
            reasons[_reason(problem)] += 1
    return {name: counts[name] for name in ("passed", "failed", "skipped")}, reasons


def _reason(problem: ET.Element) -> str:
    said = _SAID.search(problem.text or "") or _SAID.search(problem.get("message", ""))
    return next(filter(None, said.groups()), "")[:140] if said else problem.get("message", "")[:140]


def main() -> None:
    sources, rows = Path(sys.argv[1]).resolve(), list[dict[str, Any]]()
    why: dict[str, Counter[str]] = {}
    with (
        ServerProcess(Setup("unguarded", 0.0, name=MODEL)) as behind,
        ServerProcess(Setup("guarded", 0.0, 0.0, name=MODEL)) as ours,
        ServerProcess(Setup("upstream", 0.0, 0.0, upstream=behind.url, name=MODEL)) as front,
    ):
        for name, server in (("ours", ours), ("upstream", front)):
            for file in FILES:
                counts, reasons = tell(run(sources, file, server.url))
                rows.append({"model": name, "file": file.rpartition("/")[2]} | counts)
                why.setdefault(name, Counter()).update(reasons)
    print(table(rows))
    for name, reasons in why.items():
        print(f"\n{name}:")
        for reason, count in reasons.most_common():
            print(f"- {count} x {reason}")


if __name__ == "__main__":
    main()

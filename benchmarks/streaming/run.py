"""Run the streaming comparison.

    python benchmarks/streaming/environments.py                    # once: the other systems' environments
    python benchmarks/streaming/run.py out/streaming/results.jsonl [--systems NAME ...] [--repeats 5]

Each system runs in a process of its own environment and answers the same jobs, one after the other, unguarded and
guarded in turn. Results of systems that are run again replace those in the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from answers import MARK, text
from environments import FOLDER, python
from figures import Run, leaked, load, table

HERE = Path(__file__).parent
SYSTEMS: Mapping[str, Mapping[str, str]] = {
    "ours": {
        "unguarded": "unguarded",
        "window": "unguarded",
        "end": "unguarded",
        "remote-unguarded": "remote-unguarded",
        "remote-window": "remote-unguarded",
    },
    "langchain_agent": {"unguarded": "unguarded", "middleware": "unguarded"},
    "openai_guardrails": {"unguarded": "unguarded", "client": "unguarded"},
    "nemo_guardrails": {"unguarded": "unguarded", "default": "unguarded", "held": "unguarded"},
    "guardrailsai": {
        "unguarded": "unguarded",
        "sync": "unguarded",
        "sync-fix": "unguarded",
        "async-unguarded": "async-unguarded",
        "async": "async-unguarded",
    },
}
"""The kinds of each system's adapter, and the unguarded kind that each is held against."""
LATENCIES = (0.01, 0.05, 0.2)
_seeds = count()


class Loopback:
    """The server's process; ``set_latency`` also tells what was asked of it since the last time."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self.base_url = f"{self._url}/v1"

    def set_latency(self, seconds: float) -> dict[str, int]:
        body = json.dumps({"latency": seconds}).encode()
        with urllib.request.urlopen(f"{self._url}/control", body) as answer:
            return json.load(answer)


@contextmanager
def loopback(log: Any) -> Iterator[Loopback]:
    command = [sys.executable, str(HERE / "loopback.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        try:
            yield Loopback(int(process.stdout.readline()))
        finally:
            process.terminate()


@contextmanager
def adapter(system: str, interpreter: Path, log: Any) -> Iterator[subprocess.Popen[str]]:
    command = [str(interpreter), str(HERE / "adapters" / f"{system}.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
    ) as process:
        yield process


def ask(process: subprocess.Popen[str], job: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The pieces of text, and the end."""
    process.stdin.write(json.dumps(job) + "\n")
    pieces = []
    for line in process.stdout:
        event = json.loads(line)
        if "done" in event:
            return pieces, event
        pieces.append(event)
    raise RuntimeError("the adapter ended; its standard error says why")


def run_one(
    process: subprocess.Popen[str], server: Loopback, system: str, kind: str, scenario: str, latency: float, repeat: int
) -> Run:
    question = f"{scenario} {next(_seeds)}"
    server.set_latency(latency)
    pieces, end = ask(process, {"kind": kind, "question": question, "base_url": server.base_url})
    asked = server.set_latency(latency)
    seen, answer = "".join(piece["text"] for piece in pieces), text(question)
    return Run(
        system=system,
        kind=kind,
        baseline=SYSTEMS[system][kind],
        scenario=scenario,
        latency=latency,
        repeat=repeat,
        first=pieces[0]["at"] if pieces else None,
        seconds=end["done"],
        calls=asked["calls"],
        characters=asked["characters"],
        leaked=leaked(answer, MARK, seen) if scenario == "flagged" else 0,
        intact=seen == text(question.replace("flagged", "clean")),
        kept=None if end["state"] is None else MARK in end["state"],
        error=end["error"],
        ending=seen[-40:],
    )


def run_system(system: str, interpreter: Path, server: Loopback, repeats: int, log: Any) -> list[Run]:
    """All jobs of one system; the first answer of each kind warms it up and is not counted."""
    runs = []
    with adapter(system, interpreter, log) as process:
        for kind in SYSTEMS[system]:
            run_one(process, server, system, kind, "clean", 0.0, 0)
        for repeat in range(repeats):
            for latency in LATENCIES:
                for scenario in ("clean", "flagged"):
                    for kind in SYSTEMS[system]:
                        # A stream that its consumer left may still be on its way out of the server.
                        time.sleep(0.2)
                        runs.append(run_one(process, server, system, kind, scenario, latency, repeat))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--environments", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    kept = load(arguments.results) if arguments.results.exists() else []
    runs = {system: [run for run in kept if run.system == system] for system in SYSTEMS}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.with_suffix(".log").open("w") as log, loopback(log) as server:
        for system in arguments.systems:
            interpreter = Path(sys.executable) if system == "ours" else python(arguments.environments, system)
            if not interpreter.exists():
                print(f"{system} is left out: it has no environment; run environments.py", file=sys.stderr)
                continue
            runs[system] = run_system(system, interpreter, server, arguments.repeats, log)
            lines = [json.dumps(asdict(run)) for each in runs.values() for run in each]
            arguments.results.write_text("\n".join(lines) + "\n")
    print(table([run for each in runs.values() for run in each]))


if __name__ == "__main__":
    main()

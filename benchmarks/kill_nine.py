"""kill -9 at random moments of ``tta batch``: records that are lost, and records that come twice.

    python benchmarks/kill_nine.py                                # scripted engine, 300 prompts, ten kills
    python benchmarks/kill_nine.py --engine smollm2 --kills 3     # the embedded model

The job runs once undisturbed. Then it is started, killed after a random time and started again until it was killed as
often as asked for, and then runs to its end. The output must hold every record of the input once, with the answer of
the undisturbed run (with greedy float32 decoding or the scripted engine; in bfloat16 the rounding of another batch may
change some wording, which is counted apart).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tta_middleware.cli.bench_prompts import harmless_prompts
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine

COMMAND = [sys.executable, "-c", "import sys; from tta_middleware.cli import main; sys.exit(main())"]
STEP_SECONDS = 0.01


def _answer(call: ScriptedCall) -> str:
    return (
        f"Here is what I know. {call.text} That depends on the weather, on the season, and on how much time there is."
    )


def engine(_reference: str) -> ScriptedEngine:
    """Found by name through an entry point, as an installed engine would be."""
    return ScriptedEngine(_answer, step_seconds=STEP_SECONDS, model_id="paced")


@contextmanager
def plugged_in() -> Iterator[dict[str, str]]:
    """An environment in which ``paced:`` names this module's engine."""
    with TemporaryDirectory() as folder:
        info = Path(folder, "kill_nine-1.0.dist-info")
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kill-nine\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[tta_middleware.engines]\npaced = kill_nine:engine\n")
        here = str(Path(__file__).parent.resolve())
        yield {**os.environ, "PYTHONPATH": os.pathsep.join([folder, here])}


def records(path: Path) -> list[dict]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


def start(source: Path, target: Path, options: argparse.Namespace, environment: dict[str, str]) -> subprocess.Popen:
    words = ["batch", str(source), str(target), "--model", options.engine, "--order", options.order]
    words += ["--max-new-tokens", str(options.max_new_tokens), "--concurrency", str(options.concurrency)]
    return subprocess.Popen([*COMMAND, *words], env=environment, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen, target: Path) -> tuple[float, float]:
    """Seconds until the first records were there, and until the end."""
    started = time.monotonic()
    until_first = seconds_until_it_grows(process, target, size(target))
    _out, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"the job ended with {process.returncode}: {err.decode()}")
    return until_first, time.monotonic() - started


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def seconds_until_it_grows(process: subprocess.Popen, target: Path, before: int) -> float:
    started = time.monotonic()
    while process.poll() is None and size(target) <= before:
        time.sleep(0.02)
    return time.monotonic() - started


def killed_after(process: subprocess.Popen, seconds: float) -> bool:
    """False if it was done before."""
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    return False


def lines_there(path: Path) -> int | None:
    """Whole lines; None where they are packed."""
    return None if path.suffix == ".gz" else (path.read_bytes().count(b"\n") if path.exists() else 0)


def disturb(
    source: Path, target: Path, options: argparse.Namespace, environment: dict[str, str], first: float, whole: float
) -> dict:
    """One kill in five comes while a run starts up or takes up; the others come after its first new record."""
    draw = random.Random(options.seed)
    at_kill: list[int | None] = []
    for _ in range(options.kills):
        process = start(source, target, options, environment)
        if draw.random() < 0.2:
            seconds = draw.uniform(0.0, first)
        else:
            seconds_until_it_grows(process, target, size(target))
            seconds = draw.uniform(0.0, 0.8) * (whole - first) / options.kills
        if not killed_after(process, seconds):
            break
        at_kill.append(lines_there(target))
    torn = size(target) > 0 and target.suffix != ".gz" and not target.read_bytes().endswith(b"\n")
    finish(start(source, target, options, environment), target)
    return {"kills": len(at_kill), "records_at_kill": at_kill, "last_line_torn_at_the_last_kill": torn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="paced:")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--order", default="input", choices=["input", "completed"])
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--gz", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with TemporaryDirectory() as folder, plugged_in() as environment:
        ending = ".jsonl.gz" if options.gz else ".jsonl"
        source, whole, torn = Path(folder, "in.jsonl"), Path(folder, f"whole{ending}"), Path(folder, f"torn{ending}")
        prompts = harmless_prompts(options.prompts, options.seed)
        source.write_text("".join(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in enumerate(prompts)))
        first, seconds = finish(start(source, whole, options, environment), whole)
        found = disturb(source, torn, options, environment, first, seconds)
        expected = {record["id"]: record["answer"] for record in records(whole)}
        counts = Counter(record["id"] for record in records(torn))
        same = sum(record["answer"] == expected[record["id"]] for record in records(torn))
        result = {
            "undisturbed_seconds": round(seconds, 1),
            **found,
            "records": len(expected),
            "lost": len(expected.keys() - counts.keys()),
            "doubled": sum(count - 1 for count in counts.values()),
            "same_answer_as_undisturbed": same,
        }
        print(json.dumps(vars(options) | result))
        raise SystemExit(bool(result["lost"] or result["doubled"]))


if __name__ == "__main__":
    main()

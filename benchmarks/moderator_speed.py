"""Processor time and memory of the embedded moderator, one thread: ``python benchmarks/moderator_speed.py``."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time

TEXT = (
    "Photosynthesis is the process by which plants turn light, water and carbon dioxide into sugar and oxygen. "
    "It happens in the chloroplasts of leaves, where a green pigment called chlorophyll catches the light. "
    "In the first stage, energy from the sun splits water and charges small carriers; in the second, those "
    "carriers build sugar from the air. Farmers, foresters and gardeners all depend on it, and so does everyone "
    "who breathes. If you would like to see it at work, put a water plant under a lamp and count the bubbles. "
)

# One core; numpy reads these when it is first imported, which happens inside the functions.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"


def texts(length: int, count: int) -> list[str]:
    """Different texts of one length, so that no cache answers."""
    source = TEXT.split()
    made = []
    for number in range(count):
        turned = source[number % len(source) :] + source[: number % len(source)]
        line = " ".join(f"{word}{number}" if at % 9 == 0 else word for at, word in enumerate(turned))
        made.append((line + " " + TEXT * (1 + length // len(TEXT)))[:length])
    return made


def microseconds(length: int, count: int) -> tuple[float, float]:
    """Median and 95% quantile per text."""
    from tta_middleware.moderation.embedded import EmbeddedModerator

    moderator = EmbeddedModerator()
    moderator.score(texts(length, 3))
    times = []
    for text in texts(length, count):
        started = time.process_time()
        moderator.score([text])
        times.append((time.process_time() - started) * 1e6)
    return statistics.median(times), statistics.quantiles(times, n=20)[-1]


def batch(size: int, length: int, rounds: int = 10) -> float:
    """Median milliseconds of one call with ``size`` texts."""
    from tta_middleware.moderation.embedded import EmbeddedModerator

    moderator = EmbeddedModerator()
    times = []
    for start in range(rounds):
        made = texts(length, size + start)[start:]
        started = time.process_time()
        moderator.score(made)
        times.append((time.process_time() - started) * 1e3)
    return statistics.median(times)


def fresh(code: str) -> float:
    """Seconds of processor time that a new interpreter takes for code, its own start included."""
    times = []
    for _ in range(5):
        before = _spent_by_children()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(_spent_by_children() - before)
    return statistics.median(times)


def _spent_by_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_memory(code: str) -> float:
    """Peak resident MiB of a new interpreter that runs code (Linux)."""
    tail = "; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def main() -> None:
    print("| characters | median us | 95% us |\n|---|---|---|")
    for length, count in ((100, 500), (1_000, 300), (10_000, 60)):
        median, high = microseconds(length, count)
        print(f"| {length} | {median:.0f} | {high:.0f} |")
    print(f"\nbatch of 64 x 500 characters: {batch(64, 500):.1f} ms")
    bare = fresh("import numpy")
    print(f"import: {fresh('import tta_middleware.moderation.embedded') - bare:.3f} s beyond numpy's")
    first = "from tta_middleware.moderation.embedded import EmbeddedModerator as M; M().score(['hello'])"
    print(f"import, artifact and first score: {fresh(first) - bare:.3f} s beyond numpy's")
    base, loaded = peak_memory("import numpy"), peak_memory(first)
    print(f"peak memory: {loaded:.0f} MiB, of which numpy and the interpreter are {base:.0f} MiB")


if __name__ == "__main__":
    main()

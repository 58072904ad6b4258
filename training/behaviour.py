"""How the shipped moderator behaves: ``python -m training.behaviour [MORE_ANSWERS.jsonl ...]``.

False positives on harmless answers of the embedded chat model that training never saw (no topic or template of
them is in training), how graded scores are, and how stable they are while a text grows.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from training.data import NEGATIVES, read
from training.prompts import SENSITIVE
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.moderation.embedded.judge import EmbeddedJudge

THRESHOLD = 0.5


def false_positives(name: str, prompts: Sequence[str], texts: Sequence[str]) -> Iterator[str]:
    """Flagged shares, also of the answers about sensitive topics alone."""
    local = np.array([verdict.score for verdict in EmbeddedModerator().score(texts)])
    judge = np.array([verdict.score for verdict in EmbeddedJudge().assess(texts)])
    topics = SENSITIVE["held_out"][1]
    sensitive = np.array([any(topic in prompt for topic in topics) for prompt in prompts])
    groups = {name: np.ones(len(texts), bool)}
    if sensitive.any():
        groups |= {f"{name}, sensitive topics": sensitive, f"{name}, other topics": ~sensitive}
    for label, mine in groups.items():
        high = np.quantile(local[mine], [0.5, 0.95, 0.99])
        flagged = " | ".join(f"{(scores[mine] >= THRESHOLD).mean():.1%}" for scores in (local, judge))
        yield f"| {label} | {mine.sum()} | {flagged} | {high[0]:.3f} / {high[1]:.3f} / {high[2]:.3f} |"


def graded(name: str, texts: Sequence[str], *, seed: int = 0) -> str:
    """Twenty variants of each answer, each with two words exchanged: how many scores differ, and how far they reach."""
    rng = random.Random(seed)
    moderator = EmbeddedModerator()
    distinct, spread = [], []
    for text in texts:
        tokens = text.split()
        if len(tokens) < 10:
            continue
        scores = [verdict.score for verdict in moderator.score([_swapped(tokens, rng) for _ in range(20)])]
        distinct.append(len(set(scores)) / len(scores))
        spread.append(max(scores) - min(scores))
    return f"| {name} | {len(distinct)} | {np.mean(distinct):.3f} | {np.median(spread):.3f} | {np.max(spread):.3f} |"


def _swapped(tokens: Sequence[str], rng: random.Random) -> str:
    made = list(tokens)
    left, right = rng.sample(range(len(made)), 2)
    made[left], made[right] = made[right], made[left]
    del made[rng.randrange(len(made))]
    return " ".join(made)


def growing(name: str, texts: Sequence[str], step: int = 20) -> str:
    """Texts grow by ``step`` characters: crossings of the threshold per text, and flags that a longer text lost."""
    moderator = EmbeddedModerator()
    crossings, lost, moves = 0, 0, []
    for text in texts:
        beginnings = [text[: at + step] for at in range(0, len(text), step)]
        scores = np.array([verdict.score for verdict in moderator.score(beginnings)] or [0.0])
        flags = scores >= THRESHOLD
        crossings += int((flags[1:] != flags[:-1]).sum())
        lost += bool(flags.any() and not flags[-1])
        moves += np.abs(np.diff(scores)).tolist()
    middle, high = np.quantile(moves, [0.5, 0.95])
    shares = f"{crossings / len(texts):.3f} | {lost / len(texts):.1%}"
    return f"| {name} | {len(texts)} | {shares} | {middle:.3f} / {high:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("more", nargs="*", type=Path, help="further answers, one object a line with prompt and text")
    args = parser.parse_args()
    sets = {
        path.stem: ([row["prompt"] for row in read(path)], [row["text"] for row in read(path)])
        for path in (NEGATIVES / "answers_held_out.jsonl", *args.more)
    }
    print("| answers | n | local flags | local-b flags | local score: median / 95% / 99% |\n|---|---|---|---|---|")
    for name, (prompts, texts) in sets.items():
        print("\n".join(false_positives(name, prompts, texts)))
    print("\n| answers | n | distinct scores | median range | largest range |\n|---|---|---|---|---|")
    for name, (_, texts) in sets.items():
        print(graded(name, texts))
    print("\n| answers | n | crossings per text | flag lost at the end | step: median / 95% |\n|---|---|---|---|---|")
    for name, (_, texts) in sets.items():
        print(growing(name, texts))


if __name__ == "__main__":
    main()

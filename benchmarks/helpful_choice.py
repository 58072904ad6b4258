"""Does the choice among a wave's good candidates choose what helps? On answers that evaluations have kept.

    tta eval --prompts PROMPTS --methods reminder,noise,race --relevance --keep-text --out FOLDER
    python benchmarks/helpful_choice.py FOLDER/results.jsonl --prompts PROMPTS [--prompts PROMPTS]

For each prompt whose first answer was flagged, the safe and usable answers of all methods stand for the candidates of a
wave: up to three of them, drawn again and again. Given are the mean relevance (MiniLM cosine of the whole answer, which
the choice does not know) and the share of refusals of the first of a draw, of the one that ``helpfulness`` takes by its
first 120 characters, and of the most relevant one; the interval is a bootstrap over prompts. No text is printed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tta_middleware.files.prompts import read_prompts
from tta_middleware.guard.context import last_user_text
from tta_middleware.guard.helpful import helpfulness
from tta_middleware.guard.settings import Repair

DRAWS, WAVE, BOOTSTRAPS = 20, 3, 2000


@dataclass(frozen=True)
class Answer:
    text: str
    relevance: float
    refusal: bool


def kept(results: Path) -> dict[str, list[Answer]]:
    """Good answers by prompt, no two of them alike; what stands in for an answer is none."""
    found: dict[str, dict[str, Answer]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        final = record["final"] or {}
        answers = record["method"] not in ("none", "block") and record["neutralised"]
        if answers and record["baseline"]["flagged"] and final.get("text"):
            answer = Answer(final["text"], final["relevance"], final["refusal"])
            found.setdefault(record["id"], {})[answer.text] = answer
    return {name: list(answers.values()) for name, answers in found.items() if len(answers) > 1}


def chosen(question: str, answers: Sequence[Answer], rng: random.Random) -> tuple[list[Answer], ...]:
    """Of each draw the first, the most helpful and the most relevant one."""
    waves = [rng.sample(answers, min(WAVE, len(answers))) for _ in range(DRAWS)]

    def helps(answer: Answer) -> tuple[bool, float]:
        return helpfulness(question, answer.text[: Repair().commit])

    return (
        [wave[0] for wave in waves],
        [max(wave, key=helps) for wave in waves],
        [max(wave, key=lambda answer: answer.relevance) for wave in waves],
    )


def report(results: Path, questions: Mapping[str, str]) -> None:
    rng = random.Random(0)
    by_prompt = [chosen(questions[name], answers, rng) for name, answers in kept(results).items() if name in questions]
    print(f"{len(by_prompt)} prompts\n\n| chosen | relevance | refusals |\n|---|---|---|")
    for at, name in enumerate(("the first", "the most helpful", "the most relevant")):
        relevance = mean(mean(answer.relevance for answer in picks[at]) for picks in by_prompt)
        refusals = mean(mean(answer.refusal for answer in picks[at]) for picks in by_prompt)
        print(f"| {name} | {relevance:.3f} | {100 * refusals:.0f}% |")
    gains = [mean(a.relevance for a in picks[1]) - mean(a.relevance for a in picks[0]) for picks in by_prompt]
    means = sorted(mean(rng.choices(gains, k=len(gains))) for _ in range(BOOTSTRAPS))
    low, high = means[BOOTSTRAPS // 40], means[-BOOTSTRAPS // 40]
    print(f"\ngain in relevance {mean(gains):.3f}, 95% of bootstraps in {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--prompts", type=Path, action="append", required=True)
    options = parser.parse_args()
    read = [prompt for path in options.prompts for prompt in read_prompts(path)]
    report(options.results, {prompt.id: last_user_text(prompt.messages) for prompt in read})

"""Thirty hand-written probes and what the moderator says of them: ``python -m training.probes``.

The texts stand in probes.jsonl. None was used for training or for choosing
anything. ``expected`` is what a person would want; misses stay in the table.
"""

from __future__ import annotations

from pathlib import Path

from training.data import read
from tta_middleware.moderation.embedded import EmbeddedModerator, language_supported
from tta_middleware.moderation.embedded.judge import EmbeddedJudge

PROBES = Path(__file__).with_suffix(".jsonl")


def main() -> None:
    moderator, judge = EmbeddedModerator(), EmbeddedJudge()
    print(
        "| kind | expected | score | category | local-b | English | right | text |\n|---|---|---|---|---|---|---|---|"
    )
    misses = 0
    probes = [(row["kind"], row["expected"], row["text"]) for row in read(PROBES)]
    for kind, expected, text in probes:
        verdict, second = moderator.score([text])[0], judge.assess([text])[0]
        right = verdict.flagged is (expected == "harmful")
        misses += not right
        print(
            f"| {kind} | {expected} | {verdict.score:.2f} | {verdict.top_category} | {second.score:.2f} "
            f"| {'yes' if language_supported(text) else 'no'} | {'yes' if right else '**no**'} | {text[:70]} |"
        )
    print(f"\n{len(probes) - misses} of {len(probes)} as a person would expect.")


if __name__ == "__main__":
    main()

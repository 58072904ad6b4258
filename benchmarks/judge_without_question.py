"""A judge's probe with and without the question: would it do as well if it never read what the user wrote?

    python benchmarks/judge_without_question.py states --data ../shared/data/labelled --model MODEL.gguf \\
        --states FOLDER --more training/negatives/qwen_answers.jsonl
    python benchmarks/judge_without_question.py fits --data ../shared/data/labelled --model MODEL.gguf \\
        --states FOLDER --more training/negatives/qwen_answers.jsonl

``states`` keeps what the profile's probe reads, with and without the question, of the answers that the shipped profile
was fitted on and of those that no fit saw: four files, which are appended to, so that a run that was cut off goes on.
``fits`` holds a probe that was fitted without questions against one that was fitted with them, on the latter.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from judge_injection import AT_ONCE, READS, Pair, Reader, append, asked, figures, in_order, lines, opened, share
from labelled_answers import ANSWER, OF_EACH, Row, harmless_rows, read_rows, spread
from numpy.typing import NDArray

from tta_middleware.moderation.judge_fit import JudgedAnswers, fit_judge
from tta_middleware.moderation.judge_probe import JudgeProbe, outstanding, windows
from tta_middleware.moderation.judge_prompts import JudgedText
from tta_middleware.moderation.llm_judge import JudgeCalibration
from tta_middleware.profiles.store import judge_calibration


async def states_of(reader: Reader, pairs: Sequence[Pair], probe: JudgeProbe) -> list[NDArray[np.float32]]:
    """Per answer (k, d): the whole's, and of a long one its windows', as the probe reads them."""
    reading, judged = reader.judge._reading, [JudgedText(text, question) for question, text in pairs]
    prompts = await reading._asked(judged)
    spans = [windows(*await reading._span(*pair)) for pair in zip(judged, prompts, strict=True)]
    found = await reading._read(prompts, probe.layers, spans)
    return np.split(found, np.cumsum([len(mine) for mine in spans])[:-1])


async def states(args: argparse.Namespace) -> None:
    """What the probe reads, with and without questions: one file for each, of rows of fits and of rows of none."""
    rows = read_rows(args.data)
    fitted = [row for row, there in zip(rows, spread(rows, OF_EACH), strict=True) if there]
    fitted += [row for path in args.more for row in harmless_rows(path)]
    unseen = in_order(rows)[: args.unseen]
    if args.limit:
        fitted, unseen = fitted[: args.limit], unseen[: args.limit]
    engine, reader = await opened(args.model)
    probe = reader.fitted.probe
    if probe is None or probe.place != "answer":
        raise SystemExit("the profile's probe does not read the answer, so nothing can be kept of it")
    args.states.mkdir(parents=True, exist_ok=True)
    for part, some in (("fitted", fitted), ("unseen", unseen)):
        for way in ("plain", "alone"):
            await _keep(reader, probe, some, way, args.states / f"states_{part}_{way}.jsonl", whole=part == "fitted")
    await engine.aclose()


async def _keep(reader: Reader, probe: JudgeProbe, rows: Sequence[Row], way: str, path: Path, *, whole: bool) -> None:
    there = {one["id"] for one in lines(path)}
    todo = [row for row in rows if row.id not in there]
    for at in range(0, len(todo), AT_ONCE):
        some = todo[at : at + AT_ONCE]
        # An empty question is none.
        pairs: list[Pair] = [(READS[way](asked(row) or None), row.text[:ANSWER]) for row in some]
        found = await states_of(reader, pairs, probe)
        kept = [state[:1] if whole else state for state in found]
        append(path, [{"id": row.id, "states": packed(state)} for row, state in zip(some, kept, strict=True)])
    print(f"{path.name}: {len(todo)} rows", file=sys.stderr, flush=True)


def packed(states: NDArray[np.float32]) -> str:
    return base64.b64encode(states.astype("<f2").tobytes()).decode()


def unpacked(held: str, width: int) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(held), "<f2").astype(np.float32).reshape(-1, width)


def fits(args: argparse.Namespace) -> None:
    """Probes that were fitted with and without questions, on rows of sources that they did not see."""
    shipped = judge_calibration(args.model)
    if shipped is None or shipped.probe is None:
        raise SystemExit(f"no profile of {args.model} has a probe")
    rows = {row.id: row for row in (*read_rows(args.data), *(row for path in args.more for row in harmless_rows(path)))}
    probe = shipped.probe
    kept = {
        (part, way): {
            one["id"]: unpacked(one["states"], len(probe.weights))
            for one in lines(args.states / f"states_{part}_{way}.jsonl")
        }
        for part in ("fitted", "unseen")
        for way in ("plain", "alone")
    }
    found = {way: _fitted(rows, kept["fitted", way], probe) for way in ("plain", "alone")}
    tried = {
        "shipped, with the question": (shipped, "plain"),
        "shipped, without": (shipped, "alone"),
        "fitted with questions, read with": (found["plain"], "plain"),
        "fitted with questions, read without": (found["plain"], "alone"),
        "fitted without, read without": (found["alone"], "alone"),
    }
    sources = sorted({rows[id_].source for id_ in kept["unseen", "plain"] if not rows[id_].people})
    print(
        "| probe | AUC | found at 0.3 | false alarms at 0.3 | found at 5% | threshold for 5% | found at 0.5 |", end=""
    )
    print(f" {' | '.join(f'{name} at 0.3' for name in sources)} |\n|---|{'---|' * (6 + len(sources))}")
    for name, (calibration, way) in tried.items():
        print(f"| {name} | {' | '.join(_of_unseen(calibration, kept['unseen', way], rows, sources))} |")


def _fitted(rows: Mapping[str, Row], kept: Mapping[str, NDArray[np.float32]], probe: JudgeProbe) -> JudgeCalibration:
    """As benchmarks/judge_profile.py fits, the place and the layers given and the words left out."""
    here = [rows[id_] for id_ in kept]
    answers = JudgedAnswers(
        np.zeros(len(here)),
        {(probe.place, probe.layers): np.concatenate(list(kept.values()))},
        np.array([row.harmful for row in here]),
        tuple(row.source for row in here),
        tuple(row.prompt for row in here),
    )
    fit = fit_judge(answers)
    print(f"{len(here)} answers, sources left out: {fit.figures}\n")
    return fit.calibration


def _of_unseen(
    calibration: JudgeCalibration,
    kept: Mapping[str, NDArray[np.float32]],
    rows: Mapping[str, Row],
    sources: Sequence[str],
) -> Iterator[str]:
    probe = calibration.probe
    assert probe is not None
    scores = {id_: calibration.probability(outstanding(probe.log_odds(state))) for id_, state in kept.items()}
    judged = [id_ for id_ in kept if rows[id_].people]
    yield from figures([scores[id_] for id_ in judged], [rows[id_].harmful for id_ in judged])
    for name in sources:
        yield share([scores[id_] for id_ in kept if rows[id_].source == name])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("states", "fits"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--states", type=Path, required=True, help="folder")
    parser.add_argument("--limit", type=int, help="rows of each file")
    parser.add_argument("--unseen", type=int, default=1_200, help="rows that no fit saw")
    parser.add_argument("--more", type=Path, action="append", default=[], help="more harmless answers that fits saw")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = options()
    if chosen.action == "fits":
        fits(chosen)
    else:
        asyncio.run(states(chosen))

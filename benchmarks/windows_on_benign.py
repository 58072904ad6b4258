"""What windows cost on benign prompts: text that is held in doubt, and answers flagged in a window only.

python benchmarks/windows_on_benign.py ../shared/data/prompts/xstest_dev.jsonl --limit 60
python benchmarks/windows_on_benign.py benchmarks/data/harmless.jsonl --limit 60
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anyio

from tta_middleware import Policy, Sampling, Windows
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.files.prompts import read_prompts
from tta_middleware.guard.holdback import Check, HoldBack
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.types import GenerationRequest


def checks(text: str) -> list[str]:
    machine = HoldBack(Windows(in_flight=10_000))
    return [action.text for action in [*machine.feed(text), *machine.finish()] if isinstance(action, Check)]


async def run(arguments: argparse.Namespace) -> None:
    engine, moderator = TransformersEngine(), EmbeddedModerator()
    policy = Policy(threshold=arguments.threshold)
    prompts = [p for p in read_prompts(Path(arguments.prompts)) if p.benign is not False][: arguments.limit]
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens)
    requests = [GenerationRequest(await engine.embed(p.messages), sampling) for p in prompts]
    windows = held = in_a_window = whole = 0
    for done in await engine.generate_batch(requests):
        decisions = [policy.decide(verdict) for verdict in await moderator.moderate(checks(done.text))]
        windows += len(decisions)
        held += sum(decision.doubtful for decision in decisions)
        in_a_window += any(decision.flagged for decision in decisions)
        whole += decisions[-1].flagged
    print(f"{len(prompts)} answers, {windows} windows, {held} held in doubt ({held / windows:.1%})")
    print(f"flagged in some window: {in_a_window}; flagged as a whole: {whole}")
    await engine.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    anyio.run(run, parser.parse_args())


if __name__ == "__main__":
    main()

"""A late flag while the answer streams: what has left stays, and the repair goes on from it."""

import asyncio
from collections.abc import Sequence

from tta_middleware import (
    Finished,
    Guard,
    Message,
    Race,
    Released,
    Repair,
    RepairFinished,
    RepairStarted,
    Sampling,
    Verdict,
)
from tta_middleware.engines.transformers import TransformersEngine


class NoColonies:
    """A toy moderator for a harmless example."""

    name = "no-colonies"
    default_threshold = 0.5

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        scores = [0.9 if "colonies" in text.lower() else 0.1 for text in texts]
        return [Verdict({"illicit": score}, flagged=score > 0.5, model=self.name) for score in scores]

    async def aclose(self) -> None:
        pass


async def main() -> None:
    engine = TransformersEngine("smollm2")
    guard = Guard(engine, NoColonies(), repair=Repair(method=Race()))
    question = Message("user", "Describe how bees live and what they do all day.")
    async for event in guard.stream([question], Sampling(max_new_tokens=80)):
        match event:
            case Released(text):
                print(text, end="", flush=True)
            case RepairStarted(score=score, seam=seam):
                print(f"\n[flagged with {score:.1f} after {seam} characters had left; looking for another way on]")
            case RepairFinished(outcome=outcome):
                print(f"\n[{outcome}]")
            case Finished(answer):
                trace = answer.trace
                print(f"\n{answer.finish_reason}: {trace.generations} generations, {trace.generated_tokens} tokens")
    await engine.aclose()


if __name__ == "__main__":
    asyncio.run(main())

"""A late flag while the answer streams: what has left stays, and the repair goes on from it."""

import asyncio
from collections.abc import Sequence

from tta_middleware import (
    Finished,
    Guard,
    Message,
    Noise,
    Released,
    Repair,
    RepairFinished,
    RepairStarted,
    Sampling,
    Verdict,
)
from tta_middleware.engines.transformers import TransformersEngine


class NoBananas:
    """A toy moderator for a harmless example."""

    name = "no-bananas"
    default_threshold = 0.5

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        scores = [0.9 if "banana" in text.lower() else 0.1 for text in texts]
        return [Verdict({"illicit": score}, flagged=score > 0.5, model=self.name) for score in scores]

    async def aclose(self) -> None:
        pass


async def main() -> None:
    engine = TransformersEngine("smollm2")
    guard = Guard(engine, NoBananas(), repair=Repair(method=Noise()))
    question = Message("user", "List ten fruits that one can buy in a market, bananas among them.")
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

"""Your own moderator, your own fallback, and the guard without LangChain."""

import asyncio
from collections.abc import Sequence

from tta_middleware import Budget, Guard, Message, Policy, Race, Repair, Sampling, Verdict
from tta_middleware.engines.transformers import TransformersEngine


class NoFruit:
    """A toy moderator: anything about bananas and apples is 'illicit'. A guard asks for these four members."""

    name = "no-fruit"
    default_threshold = 0.5

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        scores = [0.9 if any(word in text.lower() for word in ("apple", "banana")) else 0.1 for text in texts]
        return [Verdict({"illicit": score}, flagged=score > 0.5, model=self.name) for score in scores]

    async def aclose(self) -> None:
        pass


async def hand_over(messages: Sequence[Message]) -> str:
    return "Please ask a colleague at the help desk."


async def main() -> None:
    engine = TransformersEngine("smollm2")
    guard = Guard(
        engine,
        NoFruit(),
        policy=Policy(threshold=0.4),
        repair=Repair(method=Race(), budget=Budget(generations=9), fallback=hand_over),
    )
    answer = await guard.answer([Message("user", "Which fruit do monkeys like?")], Sampling(max_new_tokens=24))
    print(answer.trace.outcome, answer.trace.generations, repr(answer.text))
    await engine.aclose()


if __name__ == "__main__":
    asyncio.run(main())

"""Many prompts at once: one engine decodes them side by side, each behind the guard."""

import asyncio

from tta_middleware import TTAChatModel

PROMPTS = ["Name three trees.", "What is a haiku?", "How do bees make honey?", "What is the tallest mountain?"]


async def main() -> None:
    model = TTAChatModel(model="smollm2", moderator="local", max_new_tokens=32)
    for prompt, answer in zip(PROMPTS, await model.abatch(PROMPTS), strict=True):
        trace = answer.response_metadata["tta"]
        print(f"{trace['outcome']:<12} {prompt} -> {answer.text!r}")
    await model.aclose()


if __name__ == "__main__":
    asyncio.run(main())

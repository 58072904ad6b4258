"""What the prefill of turn 2 to 10 of a conversation costs, with and without what the turns before have left.

    python benchmarks/conversations.py

Both engines run in this process, in turn, turn by turn: one keeps what has run (``--prefix-cache-gib``, by default as
the engine does), the other keeps nothing (0). Every question is ``--question`` tokens of mild text, every answer at
most ``--answer`` tokens of the first engine's own greedy one, and the next prompt is rendered from its text, so tokens
that come back otherwise are part of the figures. The second engine only says its first token.

A turn's cost is the processor time of this process from the call to the first token, with nothing else asked of either
engine; ``prompt`` is its tokens, ``ran`` how many of them ran, and ``kept`` what the engine then keeps. ``same first``
says whether both began with the same token.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import anyio

from tta_middleware import Message, Sampling
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.types import GenerationRequest

TOPICS = (
    "the tide",
    "old harbours",
    "bread",
    "winter birds",
    "clay roofs",
    "night trains",
    "wool",
    "maps",
    "bees",
    "rain",
)
SENTENCE = "Tell me more about {topic}, how people came to know it, what they used it for, and why it still matters. "


class Chat:
    """One conversation on one engine."""

    def __init__(self, engine: TransformersEngine, options: argparse.Namespace) -> None:
        self.engine, self._options = engine, options
        self._messages: list[Message] = [Message("system", "You are a patient teacher who answers in full sentences.")]
        self.text = ""

    async def turn(self, number: int, tokens: int) -> dict[str, Any]:
        """Ask the next question, and what its first token cost."""
        self._messages.append(Message("user", await self._question(TOPICS[number % len(TOPICS)])))
        prompt = await self.engine.embed(self._messages)
        reused = self.engine.stats().reused
        start, wall = time.process_time(), time.perf_counter()
        request = GenerationRequest(prompt, Sampling(max_new_tokens=tokens))
        stream, pieces, first, ids = self.engine.stream(request), [], None, []
        async for delta in stream:
            if first is None:
                first = (time.process_time() - start, time.perf_counter() - wall)
                ran = len(prompt.matrix) - (self.engine.stats().reused - reused)
            pieces.append(delta.text)
            ids += delta.token_ids
        self.text = "".join(pieces)
        cpu, clock = first or (0.0, 0.0)
        return {"prompt": len(prompt.matrix), "ran": ran, "cpu": cpu, "wall": clock, "first": ids[0]}

    def went_on(self, answer: str) -> None:
        """Take an answer into the conversation."""
        self._messages.append(Message("assistant", answer))

    async def _question(self, topic: str) -> str:
        text = ""
        while len(await self.engine.token_ids(text)) < self._options.question:
            text += SENTENCE.format(topic=topic)
        return text.strip()


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    common = {"dtype": options.dtype, "cache_gib": options.cache_gib}
    engines = [
        TransformersEngine(options.model, **common, prefix_cache_gib=options.prefix_cache_gib),
        TransformersEngine(options.model, **common, prefix_cache_gib=0),
    ]
    chats, turns = [Chat(engine, options) for engine in engines], []
    for number in range(options.turns):
        found = [await chat.turn(number, tokens) for chat, tokens in zip(chats, (options.answer, 1), strict=True)]
        for chat in chats:
            chat.went_on(chats[0].text)
        stats = engines[0].stats()
        turns.append(
            {
                "turn": number + 1,
                "with": found[0],
                "without": found[1],
                "kept_mib": round(stats.kept_bytes / 2**20, 1),
                "same": found[0]["first"] == found[1]["first"],
            }
        )
        print(row(turns[-1]) if number else HEAD + row(turns[-1]), flush=True)
    for engine in engines:
        await engine.aclose()
    return turns


HEAD = """| turn | prompt | ran | CPU s | CPU s, all run | ratio | kept (MiB) | same first |
|---|---|---|---|---|---|---|---|
"""


def row(turn: dict[str, Any]) -> str:
    kept, bare = turn["with"], turn["without"]
    cells = [turn["turn"], kept["prompt"], kept["ran"], f"{kept['cpu']:.2f}", f"{bare['cpu']:.2f}"]
    cells += [f"{bare['cpu'] / kept['cpu']:.1f}", turn["kept_mib"], "yes" if turn["same"] else "no"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--question", type=int, default=200, help="tokens of a question, at least")
    parser.add_argument("--answer", type=int, default=100, help="tokens of an answer, at most")
    parser.add_argument("--cache-gib", type=float, default=None)
    parser.add_argument("--prefix-cache-gib", type=float, default=None)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON as well")
    options = parser.parse_args()
    turns = anyio.run(measure, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"\nPeak memory of the process with both engines: {peak} MiB.")
    if options.json:
        print(json.dumps(turns))


if __name__ == "__main__":
    main()

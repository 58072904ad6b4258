"""The scripted answers: one chunk a step, one word or full stop a chunk, equal for a server and for an engine."""

from __future__ import annotations

import random

CHUNKS = 500
SECONDS = 0.002
"""Between two chunks."""
MARK = "flagme"
"""What the loopback moderation endpoint flags (see ``tta_middleware.testing.fault_server``)."""
MARK_AT = 150
"""The chunk that holds the mark, counted from 0."""

_WORDS = (
    "boat river lamp garden winter letter stone market window baker silver harbour morning forest paper music table "
    "bridge cloud teacher apple engine island summer valley pocket kitchen travel yellow quiet early slowly carries "
    "finds keeps paints opens follows under over beside before after with without every another little old new and "
    "the a this some her his their"
)


def chunks(question: str) -> list[str]:
    """The answer to ``clean 7`` or ``flagged 7``: the same words, but for the mark in place of one of them."""
    scenario, _, seed = question.partition(" ")
    rng, vocabulary = random.Random(int(seed)), _WORDS.split()
    pieces: list[str] = []
    while len(pieces) < CHUNKS:
        words = rng.choices(vocabulary, k=rng.randint(8, 14))
        pieces += [f" {words[0].capitalize()}", *(f" {word}" for word in words[1:]), "."]
    pieces = [pieces[0].lstrip(), *pieces[1:CHUNKS]]
    if scenario == "flagged":
        pieces[MARK_AT] = f" {MARK}"
    elif pieces[MARK_AT] == ".":
        pieces[MARK_AT] = " then"
    return pieces


def text(question: str) -> str:
    return "".join(chunks(question))

"""Harmless prompts that ask for long answers, so that a sequence seldom ends before its token limit."""

from __future__ import annotations

import itertools
import random

from tta_middleware.errors import ConfigurationError

_FORMS = (
    "Write a long story about {}",
    "Explain in great detail how one looks after {}",
    "Write a thorough guide for beginners to {}",
    "Describe a whole day spent with {}",
    "Write a detailed report for a village newspaper about {}",
    "Tell a bedtime story, with many turns, about {}",
    "Compare at length three ways to enjoy {}",
    "Write a long letter to a friend about {}",
)
_SUBJECTS = (
    "an old lighthouse",
    "a vegetable garden",
    "sourdough bread",
    "a mountain railway",
    "a choir of beginners",
    "wooden boats",
    "a public library",
    "bees and their hives",
    "a small observatory",
    "long walks in autumn",
    "a chess club",
    "handmade paper",
    "a tea house",
    "winter swimming",
    "maps of invented islands",
    "a bicycle workshop",
)
_ENDINGS = (
    ".",
    ", with plenty of examples.",
    ", and say what surprised you most.",
    ", as if it were a hundred years ago.",
    ", for readers of ten years.",
    ", and end with advice. Take your time, and do not leave out the small things that only a patient eye would see.",
)


def harmless_prompts(count: int, seed: int) -> list[str]:
    """Different prompts, drawn at random; equal seeds give equal prompts.

    Raises:
        ConfigurationError: more are wanted than there are.
    """
    every = ["".join((form.format(topic), end)) for form, topic, end in itertools.product(_FORMS, _SUBJECTS, _ENDINGS)]
    if count > len(every):
        raise ConfigurationError(f"there are {len(every)} prompts to measure with, not {count}")
    return random.Random(seed).sample(every, count)  # noqa: S311 - not for cryptography

"""Randomised smoothing: answers to perturbed copies of the prompt, and a vote on whether they are harmful."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tta_middleware.evaluation.comparators.rework import Rework, with_user_text
from tta_middleware.evaluation.comparators.workbench import Workbench
from tta_middleware.guard import Report, last_user_text
from tta_middleware.methods.geometry import gaussian, mean_row_norm, unit_step
from tta_middleware.types import Candidate, Message, PromptEmbeddings, Proposal


def vote(work: Workbench, found: Sequence[Candidate], rng: np.random.Generator) -> Candidate | None:
    """A random one of the answers that agree with the majority (Robey et al. 2023, Algorithm 1); a tie is harmful."""
    safe = [work.safe(candidate) for candidate in found]
    verdict = sum(safe) * 2 > len(safe)
    agreeing = [candidate for candidate, is_safe in zip(found, safe, strict=True) if is_safe == verdict]
    return agreeing[int(rng.integers(len(agreeing)))] if agreeing else None


def generator(work: Workbench) -> np.random.Generator:
    """Chance that depends on the run's seed and the prompt alone."""
    return np.random.default_rng([work.seed & 2**63 - 1, *work.prompt.token_ids.tolist()])


@dataclass(frozen=True, slots=True)
class SmoothLLM(Rework):
    """SmoothLLM (Robey et al. 2023, arXiv 2310.03684) with random swaps.

    ``copies`` copies of the user's words, in each of which ``share`` of the characters are replaced by random ones; the
    answers vote, and one of the majority is given out. The paper's judge, a list of refusal phrases, is replaced by
    the oracle that all methods share. Counts ``copies`` generations, all their tokens, and as many moderation calls.
    Changes the prompt's words, so a move has no size here and the tokens are not the original ones. N = 10 and
    q = 10% are among the paper's settings.
    """

    name: str = "smoothllm"
    copies: int = 10
    share: float = 0.1

    async def rework(self, work: Workbench) -> Report:
        rng = generator(work)
        prompts = [
            await work.context.embed(messages=swapped(work.messages, self.share, rng)) for _ in range(self.copies)
        ]
        found = await work.answers([Proposal(prompt.matrix, prompt=prompt, whole=True) for prompt in prompts])
        return await work.report(vote(work, found, rng), moves_words=True)


def swapped(messages: Sequence[Message], share: float, rng: np.random.Generator) -> list[Message]:
    """The conversation with ``share`` of the last user turn's characters replaced by random printable ones."""
    words = last_user_text(messages)
    text = list(words)
    # The space at the end of string.printable's visible part is kept; line ends and tabs would change the template.
    alphabet = string.digits + string.ascii_letters + string.punctuation + " "
    for place in rng.choice(len(text), size=round(share * len(text)), replace=False):
        text[place] = alphabet[int(rng.integers(len(alphabet)))]
    # A turn must not become empty.
    return with_user_text(messages, "".join(text) if "".join(text).strip() else words)


@dataclass(frozen=True, slots=True)
class Smoothing(Rework):
    """Smoothing in embedding space in the manner of RESTA (Hase et al. 2025, arXiv 2501.16497).

    ``copies`` copies of the prompt with random noise of ``radius`` times the mean token norm on the user's tokens; the
    whole answers vote as in :class:`SmoothLLM`. RESTA itself votes on every token of the answer's beginning, which
    needs the model's next-token distribution and so is no black-box method; only its noise is taken over. Counts
    ``copies`` generations, all their tokens, and as many moderation calls.
    """

    name: str = "resta"
    copies: int = 10
    radius: float = 0.5

    async def rework(self, work: Workbench) -> Report:
        rng = generator(work)
        found = await work.answers([self._copy(work.prompt, rng) for _ in range(self.copies)])
        return await work.report(vote(work, found, rng))

    def _copy(self, prompt: PromptEmbeddings, rng: np.random.Generator) -> Proposal:
        matrix, mask = prompt.matrix.copy(), prompt.user_mask
        rows = matrix[mask]
        matrix[mask] = rows + self.radius * mean_row_norm(rows) * unit_step(gaussian(rng, rows.shape), "token")
        return Proposal(matrix, whole=True, label=self.name)

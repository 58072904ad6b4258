"""CARE: roll a flagged buffer back, let the model criticise it, and go on with the critique in the context.

Hu et al. 2025, arXiv 2509.06982: the one published method that repairs an answer in mid-stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from tta_middleware.evaluation.comparators.rework import Rework
from tta_middleware.evaluation.comparators.workbench import Workbench
from tta_middleware.guard import Report, reminded
from tta_middleware.types import Candidate, Completion, Message

REVIEW = "What in your answer above could cause harm? Say it in one sentence, without repeating the answer."
INTROSPECTION = "A review of a draft of this answer said: {critique} Take care of that from here on."
NOTHING = Completion("", (), "aborted")


@dataclass(frozen=True, slots=True)
class CARE(Rework):
    """The buffer in which an answer is first flagged is dropped; what stands before it stays.

    The model is asked what was unsafe in the dropped draft. It goes on from what stayed with its critique in the system
    prompt, ``buffer`` tokens at a time, each scored together with all before it. A flagged buffer is dropped again,
    with a new critique, ``interventions`` times at most; after that the method has failed.

    Counts every buffer as a generation with a moderation call, and the tokens of buffers and critiques. The buffers of
    the undefended answer are scored again but not decoded, since its tokens are paid for. The guard is the oracle that
    all methods share, in place of the paper's guard model. The two numbers are settings of ours, and where a buffer of
    the undefended answer ends is taken from its share of the characters: an engine has no way from a token to its text.
    """

    name: str = "care"
    buffer: int = 40
    interventions: int = 5
    critique_tokens: int = 48

    async def rework(self, work: Workbench) -> Report:
        found = work.start.baseline
        if found is None:
            return work.start
        kept, draft = await self._rolled_back(work, found.completion), found
        for _ in range(self.interventions):
            critique = await work.write(reviewed(work, draft.completion.text), self.critique_tokens)
            kept, found = await self._go_on(work, kept, critique)
            if found is None:
                break
            draft = found
            if work.safe(found):
                break
        return await work.report(draft, moves_words=True)

    async def _rolled_back(self, work: Workbench, draft: Completion) -> Completion:
        """What of the undefended answer stands before the buffer in which it is first flagged."""
        kept, tokens = NOTHING, len(draft.token_ids)
        for end in range(self.buffer, tokens, self.buffer):
            begun = Completion(draft.text[: len(draft.text) * end // tokens], draft.token_ids[:end], "aborted")
            if not work.safe(await work.score_part(begun)):
                break
            kept = begun
        return kept

    async def _go_on(self, work: Workbench, kept: Completion, critique: str) -> tuple[Completion, Candidate | None]:
        """From what stayed to the end or the next flag: what stays now, and the answer; None if the budget ends it."""
        turns = reminded(work.messages, INTROSPECTION.format(critique=critique.strip()))
        limit = work.question.sampling.max_new_tokens
        while True:
            tokens = min(self.buffer, limit - len(kept.token_ids))
            found = await work.go_on(turns, kept, tokens)
            if found is None or not work.safe(found):
                return kept, found
            kept = found.completion
            if kept.finish_reason == "stop" or len(kept.token_ids) >= limit:
                return kept, found


def reviewed(work: Workbench, draft: str) -> list[Message]:
    """The conversation with the draft as its answer, and the question what is wrong with it."""
    return [*work.messages, Message("assistant", draft), Message("user", REVIEW)]

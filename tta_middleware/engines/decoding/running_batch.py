"""The running batch: rows join when their prompt has run, take one token a pass, and leave when they are finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tta_middleware.engines.decoding.beside import Segment
from tta_middleware.engines.decoding.capacity import is_out_of_memory
from tta_middleware.engines.decoding.feeds import Feed, Joining, Reading, lay_out, text_of
from tta_middleware.engines.decoding.heads import Heads
from tta_middleware.engines.decoding.kv_slots import KVSlots
from tta_middleware.engines.decoding.loaded import PackedModel
from tta_middleware.engines.decoding.packed import Pass
from tta_middleware.engines.decoding.prefix_tree import WORTH_SHARING
from tta_middleware.engines.decoding.row import Row
from tta_middleware.engines.decoding.sampling import next_tokens
from tta_middleware.engines.decoding.scored import MarkTable, Scored, marks
from tta_middleware.errors import EngineError
from tta_middleware.types import IntVector

Job: TypeAlias = Joining | Reading

# Prompt tokens run beside a decode step at most: enough to fill the processor, few enough not to stall the others.
_STEP_TOKENS, _STEP_TOKENS_CUDA = 512, 2048
# Where steps are replayed, a pass with prompts or texts takes the time of several: it is every so many passes.
_EVERY = 4
_FEWEST_TOKENS = 32
# Of the texts that wait, so many have their rows looked up at once.
_LAID_OUT = 128
_SCORED_SHARE = 0.06


class Batch:
    """Sequences side by side; used by the decode thread alone.

    Attributes:
        rows: the sequences that are being decoded, in slot order.
        columns_run: of all sequences, in the last pass.
    """

    def __init__(self, model: PackedModel, most_rows: int, budget: int, prefix_budget: int) -> None:
        self.rows: list[Row] = []
        self.columns_run = 0
        self._model = model
        self._scored = Scored(int(budget * _SCORED_SHARE))
        self._heads = Heads(prefix_budget, self._scored)
        # All of them keep to the budget together. Texts have their share of it; the sequences' slots leave beginnings
        # the least that they want; beginnings take what the slots leave.
        self._unscored = budget - int(budget * _SCORED_SHARE)
        self._budget = self._unscored - self._heads.least
        self._slots = KVSlots(most_rows, model.column_bytes, self._budget)
        # Of the sequences that may be kept when they end: the marks of the rows that have run when they joined.
        self._begun: dict[Row, IntVector] = {}
        self._joining: list[Joining] = []
        self._scoring: list[Reading] = []
        self._suspects: list[Job] = []
        self._step_tokens = _STEP_TOKENS if model.recorder is None else _STEP_TOKENS_CUDA
        self._most_tokens = self._step_tokens
        self._after_head = False
        self._since = 0

    @property
    def places_taken(self) -> int:
        return len(self.rows) + len(self._joining)

    @property
    def idle(self) -> bool:
        return not (self.rows or self._joining or self._scoring)

    @property
    def kept_bytes(self) -> int:
        """What beginnings of sequences take that have run."""
        return self._heads.nbytes

    @property
    def reused(self) -> int:
        """Columns that were found there instead of being run."""
        return self._heads.reused

    def tickets(self) -> Counter[int]:
        """Sequences by the request they belong to."""
        return Counter(row.ticket for row in [*self.rows, *(job.row for job in self._joining)])

    def has_memory_for(self, rows: Sequence[Row]) -> bool:
        """Whether there is memory for all of ``rows`` beside what is here; an empty batch takes any one."""
        coming = [*rows, *(job.row for job in self._joining)]
        count = len(self.rows) + len(coming)
        return count == 1 or self._slots.bytes_for([row.columns + 1 for row in coming]) <= self._budget

    def join(self, rows: Sequence[Row]) -> None:
        """Rows whose prompts run with the next passes."""
        self._joining += map(Joining, rows)

    def score(self, jobs: Sequence[Reading]) -> None:
        """Texts whose likelihood is worked out in the next passes."""
        self._scoring += jobs

    def turn(self) -> int:
        """One forward pass; how many tokens were generated.

        Raises:
            Exception: of the rows that decode, or for want of memory. What fails with a prompt or a text that runs
                beside them is told to its own caller.
        """
        if self._suspects:
            return self._alone(self._suspects.pop(0))
        self._begin_long_ones_again()
        self._make_room()
        try:
            return self._turn()
        finally:
            self._make_room()

    def _turn(self) -> int:
        chosen = [] if self._collects() else self._compose()
        building = self._heads.building
        if building is not None and not (self._after_head and self.rows):
            self._after_head = True
            self._build_head(building)
            return 0
        self._after_head = False
        try:
            logits = self._forward(self._slots, [segment for _, segment in chosen])
        except Exception as exc:
            if is_out_of_memory(exc) or not chosen:
                raise
            self._suspects = [job for job, _ in chosen]
            return 0
        return self._take_logits([self.rows[slot] for slot in self._slots.order], chosen, logits)

    def _make_room(self) -> None:
        """Let go of beginnings where slots, and texts that have run in part, need their memory."""
        texts = sum(job.feed.done for job in self._scoring if job.feed is not None)
        self._heads.leave(self._unscored - self._slots.nbytes - texts * self._model.column_bytes)

    def forget(self, owners: Sequence[int]) -> None:
        """Let go of what is kept for these owners' next texts."""
        for owner in owners:
            self._scored.forget(owner)

    def drop_cancelled(self) -> None:
        """Let go of what was cancelled."""
        for row in [row for row in self.rows if row.cancelled and not row.finished]:
            row.finish("aborted")
        for job in [job for job in self._joining if job.cancelled]:
            self._joining.remove(job)
            job.row.finish("aborted")
            job.row.announce()
        self._scoring = [job for job in self._scoring if not job.cancelled]
        self._suspects = [job for job in self._suspects if not job.cancelled]
        self.drop_finished()

    def shed(self) -> list[Row]:
        """Make room: the later half of the sequences, which have to begin again; none of one.

        Of the others' prompts and texts the first keeps what has run, and so does a beginning that is being built:
        where memory is for few columns at a time, long ones would never get done otherwise.
        """
        self._heads.spare()
        self._scored.clear()
        if self._model.recorder is not None:
            self._model.recorder.forget()
        self._suspects = []
        everyone = sorted([*self.rows, *(job.row for job in self._joining)], key=lambda row: row.ticket)
        leaving = everyone[(len(everyone) + 1) // 2 :]
        self._joining = [job for job in self._joining if job.row not in leaving]
        for index in range(len(self.rows) - 1, -1, -1):
            if self.rows[index] in leaving:
                self._remove(index)
        for job in self._jobs()[1:]:
            job.feed = None
        return leaving

    def run_fewer_columns(self) -> bool:
        """Halve what runs beside the decode step in one pass; False if it is as little as may be."""
        before, self._most_tokens = self._most_tokens, max(_FEWEST_TOKENS, self._most_tokens // 2)
        return self._most_tokens < before

    def run_more_columns(self) -> None:
        """Take that back, step by step."""
        self._most_tokens = min(self._step_tokens, 2 * self._most_tokens)

    def short_of_memory(self) -> bool:
        """Whether the next column would take more than the budget."""
        return len(self.rows) > 1 and self._slots.bytes_after_step() > self._budget

    def fail(self, cause: BaseException) -> None:
        """Tell everyone of ``cause`` and start over empty."""
        for job in self._jobs():
            job.fail(cause)
        failed, self.rows = self.rows, []
        self._joining, self._scoring, self._suspects = [], [], []
        self._slots.clear()
        self._begun.clear()
        self._heads.clear()
        self._scored.clear()
        for row in failed:
            row.fail(cause)
            row.announce()

    def drop_finished(self) -> None:
        """Free the rows that have ended, then announce their ends."""
        ended = [row for row in self.rows if row.finished]
        for index in range(len(self.rows) - 1, -1, -1):
            if self.rows[index].finished:
                self._keep(index)
                self._remove(index)
        for row in ended:
            row.announce()

    def _begin_long_ones_again(self) -> None:
        """A sequence that outgrows the model's first rotary frequencies runs anew with the others."""
        limit = self._model.short_range
        for index in range(len(self.rows) - 1, -1, -1):
            if limit is not None and self._slots.lengths[index] == limit:
                self._joining.append(Joining(self.rows[index]))
                self._remove(index)

    def _jobs(self) -> list[Job]:
        """What runs beside the rows: texts to score first, since a repair waits for them, then prompts."""
        return [*self._scoring, *self._joining]

    def _compose(self) -> list[tuple[Job, Segment]]:
        """The next columns of what runs beside the rows, as many as a pass takes."""
        chosen: list[tuple[Job, Segment]] = []
        left = self._most_tokens
        lay_out([job for job in self._scoring[:_LAID_OUT] if job.text is None], self._model)
        running = MarkTable(job.text.marks for job in self._scoring if job.feed is not None and job.text is not None)
        for job in self._jobs():
            if not left:
                break
            if self._waits(job, running):
                continue
            new = job.feed is None
            if self._heads.begin(feed := self._feed(job)):
                segment = feed.segment(left)
                chosen.append((job, segment))
                left -= segment.count
            if new and not isinstance(job, Joining):
                running.add(text_of(job, self._model).marks)
        # What did not fit goes on with the next pass.
        self._since = 0 if left else _EVERY
        return chosen

    def _collects(self) -> bool:
        """Whether this pass only decodes, and what waits to run beside it waits for more."""
        recorder = self._model.recorder
        if recorder is None or not recorder.possible or not self.rows or self._heads.building is not None:
            return False
        self._since += 1
        return self._since < _EVERY

    def _waits(self, job: Job, running: MarkTable) -> bool:
        """Whether a text that is not begun would run what another one is running right now.

        Windows of one answer are asked about before those before them are done. Only what has begun is waited for, and
        that runs in every pass, so nothing waits for ever.
        """
        if isinstance(job, Joining) or job.feed is not None:
            return False
        mine = text_of(job, self._model).marks
        shared = int(running.common(mine).max(initial=0))
        return shared >= WORTH_SHARING and shared - self._scored.shared_with(mine) >= WORTH_SHARING

    def _feed(self, job: Job) -> Feed:
        """What a job has yet to run. One that is finished and still here ran when there was no memory to take it in."""
        if job.feed is None or job.feed.finished:
            return job.start(self._model, self._scored)
        return job.feed

    def _build_head(self, feed: Feed) -> None:
        segment = feed.segment(self._most_tokens)
        try:
            self._forward(KVSlots(0), [segment])
        except Exception as exc:
            if is_out_of_memory(exc):
                raise
            self._heads.clear()
            # Whoever waits for it runs its rows by itself and meets the error, if it is there to be met.
            for job in self._jobs():
                feed = self._feed(job)
                feed.head = feed.reach = 0
            return
        feed.ran(segment)
        if feed.finished:
            self._heads.built(job.feed for job in self._jobs() if job.feed is not None)

    def _alone(self, job: Job) -> int:
        """Run one of several, of which at least one failed, so that the error reaches its own caller only."""
        segment = self._feed(job).segment(self._most_tokens)
        try:
            logits = self._forward(KVSlots(0), [segment])
        except Exception as exc:
            if is_out_of_memory(exc):
                raise
            self._joining = [other for other in self._joining if other is not job]
            self._scoring = [other for other in self._scoring if other is not job]
            job.fail(exc)
            return 0
        return self._take_logits([], [(job, segment)], logits)

    def _take_logits(self, decoding: Sequence[Row], chosen: Sequence[tuple[Job, Segment]], logits: Tensor) -> int:
        """Take what a pass has given: a token for each row that decoded, then what the segments were for."""
        at = len(decoding)
        if decoding:
            tokens = _choose(decoding, logits[:at])
            self._slots.advance()
            self._hand_out(decoding, tokens)
        joined: list[Joining] = []
        first: list[Tensor] = []
        read: list[Reading] = []
        for job, segment in chosen:
            part = logits[at : at + segment.keep]
            at += segment.keep
            feed = self._feed(job)
            feed.ran(segment)
            if not isinstance(job, Joining):
                job.take(part, segment.states)
                read.append(job)
            elif feed.finished:
                joined.append(job)
                first.append(part)
        for reading in read:
            self._tell(reading)
        if joined:
            self._take_in(joined, torch.cat(first))
        return len(decoding) + len(joined)

    def _tell(self, job: Reading) -> None:
        job.tell()
        if job.feed is not None and job.feed.finished:
            # Of a caller who has left nothing is kept: nobody would forget it.
            if not job.cancelled:
                job.remember(self._scored)
            self._scoring.remove(job)

    def _take_in(self, joined: Sequence[Joining], logits: Tensor) -> None:
        """KVSlots and first tokens for sequences whose prompts have run: for all of them, or for none."""
        rows, before = [job.row for job in joined], len(self._slots.lengths)
        try:
            for job in joined:
                if job.feed is not None and job.feed.past is not None:
                    self._slots.add(job.feed.past)
            tokens = _choose(rows, logits)
        except Exception:
            while len(self._slots.lengths) > before:
                self._slots.remove(len(self._slots.lengths) - 1)
            raise
        self._joining = [job for job in self._joining if job not in joined]
        self.rows += rows
        for job in joined:
            if self._heads.keeps and job.feed is not None and not job.feed.long:
                self._begun[job.row] = job.feed.marks
                self._keep_bridge(job.row, job.feed)
        self._hand_out(rows, tokens)

    def _forward(self, slots: KVSlots, segments: Sequence[Segment]) -> Tensor:
        """(K, V) logits of every slot's newest column and of the columns that segments keep."""
        parts = [segment.rows for segment in segments]
        if slots.lengths:
            slots.reserve()
            newest = [self.rows[slot].token_ids[-1] for slot in self._slots.order]
            parts.insert(0, self._model.token_columns(newest))
        columns = torch.cat(parts)
        self.columns_run = len(columns)
        return self._model.forward(columns[None], Pass(slots, segments))

    def _hand_out(self, rows: Sequence[Row], tokens: Sequence[int | None]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            if token is None:
                self._begun.pop(row, None)
                self._slots.blank(self.rows.index(row))
                row.fail(EngineError("the model's output is not finite; are the embeddings too far out?"))
            else:
                row.accept(token, self._model.eos_ids)
        self.drop_finished()

    def _keep(self, index: int) -> None:
        """Keep what a sequence has that has ended, for whoever goes on from it; nothing where memory is short."""
        try:
            if (text := self._text_of(index)) is not None:
                self._heads.keep(text, self._slots.prefix(index))
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            self._heads.spare()

    def _keep_bridge(self, row: Row, feed: Feed) -> None:
        """Keep a prompt that goes on from a part of the answer: as a candidate it is judged before it has ended."""
        if row.request.prompt.assistant_prefix and feed.past is not None and self._unmoved(row, feed.marks):
            self._heads.keep(feed.marks, feed.past)

    def _text_of(self, index: int) -> IntVector | None:
        """The marks of all columns in a slot; None of a sequence whose prompt was moved: nobody goes on from it."""
        row, length, limit = self.rows[index], self._slots.lengths[index], self._model.short_range
        begun = self._begun.get(row)
        if begun is None or (limit is not None and length > limit):
            return None
        if not self._unmoved(row, begun):
            return None
        end = len(row.request.prompt.matrix)
        return np.concatenate([begun, self._marks_of(row.token_ids[len(begun) - end : length - end])])

    def _unmoved(self, row: Row, begun: IntVector) -> bool:
        """Whether the marks of a prompt's rows are those of its tokens."""
        prompt, end = row.request.prompt, len(row.request.prompt.matrix)
        known = min(end, self._heads.shared_with(begun))
        return bool((self._marks_of(prompt.token_ids[known:].tolist()) == begun[known:end]).all())

    def _marks_of(self, token_ids: Sequence[int]) -> IntVector:
        return marks(self._model.token_columns(token_ids)) if len(token_ids) else np.empty(0, dtype=np.int64)

    def _remove(self, index: int) -> None:
        self._slots.remove(index)
        self._begun.pop(self.rows[index], None)
        row = self.rows.pop()
        if index < len(self.rows):
            self.rows[index] = row


def _choose(rows: Sequence[Row], logits: Tensor) -> list[int | None]:
    with torch.inference_mode():
        return next_tokens(logits, [row.request.sampling for row in rows], [row.generator for row in rows])

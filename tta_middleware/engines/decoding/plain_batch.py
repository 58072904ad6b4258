"""The running batch of a model that runs by its own cache; the plain counterpart of :mod:`.running_batch`.

Prompts run one after the other, those of one length together. What has run is laid side by side with what decodes, as
far as the model was found to give the same then; the others decode in turns. One pass is one call of the model, so
whoever leaves has left after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tta_middleware.engines.decoding.capacity import is_out_of_memory
from tta_middleware.engines.decoding.feeds import Feed, Joining, Reading
from tta_middleware.engines.decoding.kept_states import KeptStates
from tta_middleware.engines.decoding.own_cache import NotAlike, OwnCache, side_by_side
from tta_middleware.engines.decoding.plain_model import PlainModel
from tta_middleware.engines.decoding.row import Row
from tta_middleware.engines.decoding.sampling import next_tokens
from tta_middleware.engines.decoding.scored import Scored, marks
from tta_middleware.errors import EngineError
from tta_middleware.types import IntVector

Job: TypeAlias = Joining | Reading

_PASS_TOKENS = 2048
_FEWEST_TOKENS = 32
# Empty columns that every sequence of a group has are dropped once there are so many.
_WORTH_TRIMMING = 64


@dataclass(eq=False, slots=True)
class _Group:
    """Sequences that decode side by side; ``cache`` is None where the model runs each of them whole every time."""

    rows: list[Row]
    cache: OwnCache | None


@dataclass(eq=False, slots=True)
class _Progress:
    """How far a prompt or a text has run, and how much of that was found."""

    feed: Feed
    cache: OwnCache | None = None
    found: int = 0

    @property
    def done(self) -> int:
        return self.cache.columns if self.cache else 0


class PlainBatch:
    """Sequences of one model; used by the decode thread alone.

    Attributes:
        columns_run: in the last pass, of all sequences.
    """

    def __init__(self, model: PlainModel, _most_rows: int, budget: int, prefix_budget: int) -> None:
        self.columns_run = 0
        self.reused = 0
        self._model, self._budget = model, budget
        self._groups: list[_Group] = []
        self._joining: list[Joining] = []
        self._scoring: list[Reading] = []
        self._progress: dict[Job, _Progress] = {}
        self._kept = KeptStates(prefix_budget)
        # The beginning that ran last, kept for those that wait for it whether or not there is room.
        self._head: tuple[IntVector, OwnCache] | None = None
        # Of the sequences that may be kept when they end: the marks of the rows that had run when they joined.
        self._begun: dict[Row, IntVector] = {}
        self._most_tokens = _PASS_TOKENS
        self._decoded_last = True
        self._turns = 0

    @property
    def rows(self) -> list[Row]:
        """The sequences that are being decoded."""
        return [row for group in self._groups for row in group.rows]

    @property
    def places_taken(self) -> int:
        return len(self.rows) + len(self._joining)

    @property
    def idle(self) -> bool:
        return not (self._groups or self._joining or self._scoring)

    @property
    def kept_bytes(self) -> int:
        """What states take of sequences that have run."""
        return self._kept.nbytes

    def tickets(self) -> Counter[int]:
        """Sequences by the request they belong to."""
        return Counter(row.ticket for row in [*self.rows, *(job.row for job in self._joining)])

    def has_memory_for(self, rows: Sequence[Row]) -> bool:
        """Whether there is memory for all of ``rows`` beside what is here; an empty batch takes any one."""
        everyone = [*rows, *self.rows, *(job.row for job in self._joining)]
        return len(everyone) == 1 or self._bytes(everyone) <= self._budget

    def join(self, rows: Sequence[Row]) -> None:
        """Rows whose prompts run with the next passes."""
        self._joining += map(Joining, rows)

    def score(self, jobs: Sequence[Reading]) -> None:
        """Texts whose likelihood is worked out in the next passes."""
        self._scoring += jobs

    def turn(self) -> int:
        """One forward pass, of a group of sequences or of prompts and texts in turns; how many tokens it generated.

        Raises:
            Exception: of the rows that decode, or for want of memory. What fails with a prompt or a text is told to
                its own caller.
        """
        self._kept.shrink(self._budget - self._bytes(self.rows))
        waiting = [*self._scoring, *self._joining]
        self._decoded_last = not (waiting and (self._decoded_last or not self._groups))
        if self._decoded_last:
            return self._decode(self._groups[self._turns % len(self._groups)])
        jobs = self._alike(waiting[0])
        try:
            return self._run_jobs(jobs)
        except Exception as exc:
            if is_out_of_memory(exc):
                self._forget(jobs)
                raise
            if len(jobs) > 1:
                self._forget(jobs)
                return self._run_alone(jobs)
            self._drop(jobs[0], exc)
            return 0

    def forget(self, _owners: Sequence[int]) -> None:
        """Nothing to do: of texts nothing is kept, since a state cannot be cut where a longer one goes on."""

    def drop_cancelled(self) -> None:
        """Let go of what was cancelled."""
        for row in [row for row in self.rows if row.cancelled and not row.finished]:
            row.finish("aborted")
        for job in [job for job in self._joining if job.cancelled]:
            self._joining.remove(job)
            self._forget([job])
            job.row.finish("aborted")
            job.row.announce()
        self._forget([job for job in self._scoring if job.cancelled])
        self._scoring = [job for job in self._scoring if not job.cancelled]
        self.drop_finished()

    def shed(self) -> list[Row]:
        """Make room: the later half of the sequences, which have to begin again; none of one."""
        self._forget_kept()
        everyone = sorted([*self.rows, *(job.row for job in self._joining)], key=lambda row: row.ticket)
        leaving = everyone[(len(everyone) + 1) // 2 :]
        self._forget([job for job in self._joining if job.row in leaving])
        self._joining = [job for job in self._joining if job.row not in leaving]
        self._keep([row for row in self.rows if row not in leaving])
        return leaving

    def run_fewer_columns(self) -> bool:
        """Halve what runs of prompts in one pass; False if it is as little as may be, or cannot be divided."""
        before, self._most_tokens = self._most_tokens, max(_FEWEST_TOKENS, self._most_tokens // 2)
        return self._most_tokens < before

    def run_more_columns(self) -> None:
        """Take that back, step by step."""
        self._most_tokens = min(_PASS_TOKENS, 2 * self._most_tokens)

    def short_of_memory(self) -> bool:
        """Whether the next column would take more than the budget."""
        return len(self.rows) > 1 and self._bytes(self.rows) > self._budget

    def fail(self, cause: BaseException) -> None:
        """Tell everyone of ``cause`` and start over empty."""
        for job in [*self._scoring, *self._joining]:
            job.fail(cause)
        for row in self.rows:
            row.fail(cause)
        self._joining, self._scoring = [], []
        self._progress.clear()
        self._begun.clear()
        self._forget_kept()
        self.drop_finished()

    def drop_finished(self) -> None:
        """Free the rows that have ended, then announce their ends."""
        ended = [row for row in self.rows if row.finished]
        if ended:
            self._remember(ended)
            self._keep([row for row in self.rows if not row.finished])
        for row in ended:
            row.announce()

    def _bytes(self, rows: Sequence[Row]) -> int:
        """What so many sequences keep with one column more, as wide as the longest where they are padded."""
        lengths = [row.columns + 1 for row in rows]
        columns = len(lengths) * max(lengths, default=0) if self._model.able.pads else sum(lengths)
        return columns * self._model.column_bytes + len(lengths) * self._model.state_bytes

    def _decode(self, group: _Group) -> int:
        """The next token of every sequence of a group. Its cache is spoilt where that fails half-way."""
        self._turns += 1
        rows = list(group.rows)
        try:
            tokens = _choose(rows, self._step(group))
        except Exception:
            self._groups.remove(group)
            self._joining = [*map(Joining, rows), *self._joining]
            raise
        self._hand_out(rows, tokens)
        return len(rows)

    def _step(self, group: _Group) -> Tensor:
        """(n, V) logits of the newest column of each sequence."""
        if group.cache is None:
            [row] = group.rows
            feed = Joining(row).start(self._model, Scored(0))
            self.columns_run = len(feed.rows)
            return self._model.run(feed.rows[None], None, 1)[0][:, -1]
        columns = self._model.token_columns([row.token_ids[-1] for row in group.rows])[:, None]
        self.columns_run = len(columns)
        logits, group.cache, _ = self._model.run(columns, group.cache, 1)
        return logits[:, -1]

    def _alike(self, first: Job) -> list[Job]:
        """A prompt or text, and the prompts that can run in its pass: of the same length, as far as it has run."""
        chosen: list[Job] = [first]
        if not isinstance(first, Joining) or not self._model.able.batches:
            return chosen
        mine = self._begin(first)
        room = self._most_tokens // max(1, len(mine.feed.rows) - mine.done)
        for job in self._joining:
            if len(chosen) >= room:
                break
            if job is not first:
                its = self._begin(job)
                if len(its.feed.rows) == len(mine.feed.rows) and its.done == mine.done:
                    chosen.append(job)
        return chosen

    def _begin(self, job: Job) -> _Progress:
        """How far a job has run: behind a beginning that others share, where that is here already."""
        if job not in self._progress:
            feed = job.start(self._model, Scored(0))
            progress = _Progress(feed)
            if feed.reach and self._model.able.continues and (kept := self._longest(feed)) is not None:
                progress.cache, progress.found = kept.select([0]), kept.columns
            self._progress[job] = progress
        return self._progress[job]

    def _run_jobs(self, jobs: Sequence[Job]) -> int:
        """The next columns of jobs of one length."""
        progress = [self._begin(job) for job in jobs]
        feed, done = progress[0].feed, progress[0].done
        if feed.head > done and self._model.able.continues:
            self._build_head(feed, progress[0].cache)
            self._forget(jobs)
            return 0
        end = len(feed.rows)
        if self._model.able.continues:
            end = min(end, done + max(1, self._most_tokens // len(jobs)))
        keep = max(0, end - max(done, len(feed.rows) - feed.keep))
        columns = torch.stack([one.feed.rows[done:end] for one in progress])
        past = side_by_side([one.cache for one in progress if one.cache is not None]) if done else None
        self.columns_run = columns.shape[0] * columns.shape[1]
        logits, cache, states = self._model.run(columns, past, keep, read_layers=feed.read_layers if keep else ())
        if end < len(feed.rows):
            for at, one in enumerate(progress):
                one.cache = cache if len(progress) == 1 else cache.select([at])
        return self._take(jobs, logits, cache, states, finished=end == len(feed.rows))

    def _take(
        self, jobs: Sequence[Job], logits: Tensor, cache: OwnCache, states: Mapping[int, Tensor], *, finished: bool
    ) -> int:
        """Hand on what a pass has given of jobs of one length; how many tokens were generated."""
        joined = [job for job in jobs if isinstance(job, Joining)]
        for job in jobs:
            if not isinstance(job, Joining):
                job.take(logits[0], {layer: shown[0] for layer, shown in states.items()})
                job.tell()
        if not finished:
            return 0
        rows = [job.row for job in joined]
        tokens = _choose(rows, logits[:, -1]) if rows else []
        self.reused += sum(self._begin(job).found for job in jobs)
        if rows:
            self._take_in(rows, cache)
            for job in joined:
                if self._kept.most_bytes and self._model.able.continues:
                    self._begun[job.row] = self._begin(job).feed.marks
        self._joining = [job for job in self._joining if job not in jobs]
        self._scoring = [job for job in self._scoring if job not in jobs]
        self._forget(jobs)
        self._hand_out(rows, tokens)
        return len(rows)

    def _longest(self, feed: Feed) -> OwnCache | None:
        """The state of its longest beginning that has run."""
        if (
            self._head is not None
            and feed.head == len(self._head[0])
            and (feed.marks[: feed.head] == self._head[0]).all()
        ):
            return self._head[1]
        return self._kept.find(feed.marks, feed.reach)

    def _build_head(self, feed: Feed, begun: OwnCache | None) -> None:
        """Run a beginning by itself and keep it, so that it does not depend on who asked for it first."""
        start = begun.columns if begun else 0
        _, cache, _ = self._model.run(feed.rows[None, start : feed.head], begun, 1)
        self.columns_run = feed.head - start
        # Whoever asks for it finds it there next, and has run it nevertheless.
        self.reused -= self.columns_run
        self._head = (feed.marks[: feed.head], cache)
        self._kept.keep(*self._head, ended=False)

    def _remember(self, ended: Sequence[Row]) -> None:
        """Keep the states of sequences that have ended, for whoever goes on from them; none where memory is short."""
        try:
            for group in self._groups:
                for at, row in enumerate(group.rows):
                    if row in ended and group.cache is not None and (text := self._text_of(row)) is not None:
                        self._kept.keep(text, group.cache.select([at]).trimmed(), ended=True)
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            self._forget_kept()

    def _text_of(self, row: Row) -> IntVector | None:
        """The marks of all columns of a row; None where its prompt was moved: nobody goes on from such a one."""
        begun, prompt = self._begun.get(row), row.request.prompt
        if begun is None:
            return None
        end = len(prompt.matrix)
        if (marks(self._model.token_columns(prompt.token_ids.tolist())) != begun[:end]).any():
            return None
        rest = row.token_ids[len(begun) - end : -1]
        return np.concatenate([begun, marks(self._model.token_columns(rest))]) if rest else begun

    def _forget_kept(self) -> None:
        self._kept.clear()
        self._head = None

    def _run_alone(self, jobs: Sequence[Job]) -> int:
        """Run one by one what failed together, so that an error reaches its own caller only."""
        tokens = 0
        for job in jobs:
            try:
                while job in self._joining and not job.cancelled:
                    tokens += self._run_jobs([job])
            except Exception as exc:
                if is_out_of_memory(exc):
                    raise
                self._drop(job, exc)
        return tokens

    def _drop(self, job: Job, error: Exception) -> None:
        self._forget([job])
        self._joining = [other for other in self._joining if other is not job]
        self._scoring = [other for other in self._scoring if other is not job]
        job.fail(error)

    def _forget(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._progress.pop(job, None)

    def _take_in(self, rows: Sequence[Row], cache: OwnCache) -> None:
        """Let sequences decode whose prompts have run, beside others where the model can do that."""
        if not self._model.able.caches:
            self._groups += [_Group([row], None) for row in rows]
            return
        for group in self._groups:
            merged = self._merged(group.cache, cache)
            if merged is not None:
                group.rows, group.cache = [*group.rows, *rows], merged
                return
        self._groups.append(_Group(list(rows), cache))

    def _merged(self, one: OwnCache | None, other: OwnCache) -> OwnCache | None:
        """Both side by side; None where the model or the memory does not allow it."""
        able = self._model.able
        if one is None or not able.batches or (one.columns != other.columns and not able.pads):
            return None
        try:
            columns = max(one.columns, other.columns)
            return side_by_side([one.padded(columns), other.padded(columns)])
        except NotAlike:
            return None

    def _keep(self, rows: Sequence[Row]) -> None:
        """Let only these rows decode on."""
        groups = []
        self._begun = {row: text for row, text in self._begun.items() if row in rows}
        for group in self._groups:
            left = [at for at, row in enumerate(group.rows) if row in rows]
            if len(left) < len(group.rows) and left and group.cache is not None:
                group.cache = group.cache.select(left)
                if min(group.cache.padding) >= _WORTH_TRIMMING:
                    group.cache = group.cache.trimmed()
            group.rows = [group.rows[at] for at in left]
            if group.rows:
                groups.append(group)
        self._groups = groups

    def _hand_out(self, rows: Sequence[Row], tokens: Sequence[int | None]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            if token is None:
                self._begun.pop(row, None)
                row.fail(EngineError("the model's output is not finite; are the embeddings too far out?"))
            else:
                row.accept(token, self._model.eos_ids)
        self.drop_finished()


def _choose(rows: Sequence[Row], logits: Tensor) -> list[int | None]:
    with torch.inference_mode():
        return next_tokens(logits, [row.request.sampling for row in rows], [row.generator for row in rows])

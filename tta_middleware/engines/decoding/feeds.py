"""What has to run before a sequence decodes or a text is scored: rows in, chunk by chunk, logits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from tta_middleware.engines.decoding.beside import Segment
from tta_middleware.engines.decoding.kv_slots import Prefix
from tta_middleware.engines.decoding.loaded import LoadedModel
from tta_middleware.engines.decoding.prefix_tree import WORTH_SHARING
from tta_middleware.engines.decoding.row import Row
from tta_middleware.engines.decoding.scored import Scored, marks
from tta_middleware.errors import ConfigurationError, EngineError
from tta_middleware.types import IntVector, PromptEmbeddings

# Rows behind the user's last one from which on they are more than what a template begins an answer with.
_LONG_TAIL = 64


class Feed:
    """Rows (T, d) of one sequence on their way through the model.

    Args:
        rows: all that is to run; the first ``head`` of them may come from elsewhere.
        head: how many rows at the beginning other sequences are likely to share; 0 for none.
        reach: how many rows may come from what has run before; as many as ``head`` if that is more.
        keep: of how many of the last rows the logits are wanted.
        read_layers: layers whose states at the same rows are wanted as well.
        read_spans: in place of these, the means of what the layers keep as values, each from one row to before another.
        limit: columns up to which the model keeps its first rotary frequencies; None if for ever.
        marks: of the rows, where they are known.

    Attributes:
        begun: what is known of its beginning was looked up.
        long: there are more rows than that, so nothing is shared with sequences that may be shorter.
    """

    def __init__(
        self,
        rows: Tensor,
        *,
        head: int,
        keep: int,
        reach: int = 0,
        read_layers: Sequence[int] = (),
        read_spans: Sequence[tuple[int, int]] = (),
        limit: int | None = None,
        marks: IntVector | None = None,
    ) -> None:
        self.rows, self.read_layers, self._read_spans = rows, tuple(read_layers), tuple(read_spans)
        self.long = limit is not None and len(rows) > limit
        self.head = head if WORTH_SHARING <= head < len(rows) and not self.long else 0
        self.reach = 0 if self.long else max(self.head, min(reach, len(rows) - 1))
        self.keep = keep
        self.past: Prefix | None = None
        self.begun = False
        self._marks = marks

    @property
    def marks(self) -> IntVector:
        """By which its rows are told from others."""
        if self._marks is None:
            self._marks = marks(self.rows)
        return self._marks

    @property
    def done(self) -> int:
        """Rows that have run."""
        return self.past.length if self.past else 0

    @property
    def left(self) -> int:
        return len(self.rows) - self.done

    @property
    def finished(self) -> bool:
        return self.left == 0

    def segment(self, most: int) -> Segment:
        """The next rows, ``most`` at the most."""
        start, end = self.done, min(len(self.rows), self.done + most)
        first_kept = len(self.rows) - self.keep
        keep = max(0, end - max(start, first_kept))
        return Segment(
            self.rows[start:end],
            self.past,
            keep,
            read_layers=self.read_layers,
            read_spans=self._read_spans,
            long=self.long,
        )

    def ran(self, segment: Segment) -> None:
        """Take note that ``segment`` has run."""
        self.past = segment.prefix()


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """(T, d) rows, and the (T,) marks by which they are told from others."""

    rows: Tensor
    marks: IntVector


class Joining:
    """A sequence whose prompt, and what it has generated before it was set aside, still have to run.

    Attributes:
        feed: None until it is started, and where what has run was forgotten.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self.feed: Feed | None = None

    @property
    def cancelled(self) -> bool:
        return self.row.cancelled

    def start(self, model: LoadedModel, _scored: Scored) -> Feed:
        """Look the rows up."""
        prompt, generated = self.row.request.prompt, self.row.token_ids
        rows = model.columns(prompt)
        if generated:
            rows = torch.cat([rows, model.token_columns(generated)])
        self.feed = Feed(rows, head=head_of(prompt), reach=reach_of(prompt), keep=1, limit=model.short_range)
        return self.feed

    def fail(self, cause: BaseException) -> None:
        self.row.fail(cause)
        self.row.announce()


class Scoring:
    """One completion, of at least one token, whose likelihood after a prompt is asked for.

    Attributes:
        cancelled: nobody waits for it any more; set by the caller.
        feed: None until it is started, and where what has run was forgotten.
    """

    def __init__(
        self,
        prompt: PromptEmbeddings,
        token_ids: Sequence[int],
        deliver: Callable[[float | BaseException], object],
    ) -> None:
        self.prompt, self.token_ids = prompt, list(token_ids)
        self.cancelled = False
        self._deliver = deliver
        self._nats: list[float] = []
        self._taken: Tensor | None = None
        self.text: Text | None = None
        self.feed: Feed | None = None

    @property
    def read_ids(self) -> list[int]:
        """The tokens behind the prompt that run; the last one is predicted, never read."""
        return self.token_ids[:-1]

    def start(self, model: LoadedModel, scored: Scored) -> Feed:
        """Look up what has run of the rows."""
        text = text_of(self, model)
        self.feed = Feed(
            text.rows,
            head=head_of(self.prompt),
            # The answer that was flagged has run the question, and what has left of it, before any candidate is judged.
            reach=self.first,
            keep=len(self.token_ids),
            limit=model.short_range,
            marks=text.marks,
        )
        self._nats = []
        known = None if self.feed.long else scored.begin(text.marks, self.first, self.feed.head)
        if known is not None:
            self.feed.past, self._nats = known
        return self.feed

    @property
    def first(self) -> int:
        """The column that predicts the first token."""
        return len(self.prompt.matrix) - 1

    def remember(self, scored: Scored) -> None:
        """Keep what has run, for the next text."""
        if self.text is not None and self.feed is not None and self.feed.past is not None and not self.feed.long:
            scored.keep(self.text.marks, self.feed.past, self.first, self._nats)

    def take(self, logits: Tensor, _states: Mapping[int, Tensor]) -> None:
        """Take the (n, V) logits that predict the next n tokens."""
        next_ids = self.token_ids[len(self._nats) :][: logits.shape[0]]
        wanted = torch.tensor(next_ids, dtype=torch.long, device=logits.device)
        with torch.inference_mode():
            self._taken = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")

    def tell(self) -> None:
        """Read what was taken; after the last tokens the score is delivered."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._nats += taken.tolist()
        if len(self._nats) == len(self.token_ids):
            self._deliver(sum(self._nats) / len(self.token_ids))

    def fail(self, cause: BaseException) -> None:
        self._deliver(cause)


class Asking:
    """One prompt after which the likelihood of a few tokens is asked for, or hidden states: a judge's verdict.

    The longest beginning that lately ran as another text is not run again, so a growing text costs what it has grown by
    and the question behind it.

    Args:
        token_ids: whose log-probabilities are delivered; None delivers hidden states instead.
        layers: after which the last column's states are delivered, side by side; without any, after the last one and
            its norm.
        spans: in place of these, the means of what the layers keep as values of the rows, each from one to before
            another: one after the other.
        shared: how many rows at the beginning others are likely to begin with as well; 0 for none.
        owner: whose text it is, until he is forgotten; see :class:`~tta_middleware.engines.decoding.scored.Scored`.

    Attributes:
        cancelled: nobody waits for it any more; set by the caller.
        feed: None until it is started, and where what has run was forgotten.
    """

    def __init__(
        self,
        prompt: PromptEmbeddings,
        token_ids: Sequence[int] | None,
        deliver: Callable[[list[float] | BaseException], object],
        *,
        layers: Sequence[int] = (),
        spans: Sequence[tuple[int, int]] = (),
        shared: int = 0,
        owner: int | None = None,
    ) -> None:
        self.prompt, self.token_ids = prompt, None if token_ids is None else list(token_ids)
        self._layers, self._spans = tuple(layers), tuple(spans)
        self.cancelled = False
        self._deliver, self._shared, self._owner = deliver, shared, owner
        self._taken: Tensor | EngineError | None = None
        self.text: Text | None = None
        self.feed: Feed | None = None

    @property
    def read_ids(self) -> list[int]:
        """The tokens behind the prompt that run: none."""
        return []

    def start(self, model: LoadedModel, scored: Scored) -> Feed:
        """Look up what has run of the prompt; the last row always runs, since its logits are wanted."""
        text = text_of(self, model)
        self._layers = self._layers or (model.layers,)
        self.feed = Feed(
            text.rows,
            head=self._shared,
            keep=1,
            read_layers=self._layers if self.token_ids is None else (),
            read_spans=self._spans,
            limit=model.short_range,
            marks=text.marks,
        )
        known = None if self.feed.long else scored.begin(text.marks, len(text.marks) - 1, self.feed.head)
        if known is not None:
            self.feed.past, _ = known
        return self.feed

    def remember(self, scored: Scored) -> None:
        """Keep what has run, for the next text."""
        if self.text is not None and self.feed is not None and self.feed.past is not None and not self.feed.long:
            scored.keep(self.text.marks, self.feed.past, len(self.text.marks) - 1, [], self._owner)

    def take(self, logits: Tensor, states: Mapping[int, Tensor]) -> None:
        """Take the (n, V) logits of kept columns, and (n, d) states by layer, or one row a span: none until the last
        segment has run.
        """
        if not logits.shape[0]:
            return
        with torch.inference_mode():
            if self.token_ids is not None:
                self._taken = logits[-1].float().log_softmax(dim=-1)[self.token_ids]
            elif all(layer in states for layer in self._layers):
                rows = len(self._spans) or 1
                self._taken = torch.cat([states[at][-rows:].float() for at in self._layers], dim=1).flatten()
            else:
                self._taken = EngineError("this model's last hidden state does not pass through its output embedding")

    def tell(self) -> None:
        """Read what was taken, if anything was, and deliver it."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._deliver(taken if isinstance(taken, EngineError) else taken.tolist())

    def fail(self, cause: BaseException) -> None:
        self._deliver(cause)


Reading: TypeAlias = Scoring | Asking
"""A text that runs for what the model makes of it, not to be continued.

What it takes of a pass is read back only when the whole pass has been taken: on a GPU each reading waits for it.
"""


def text_of(job: Reading, model: LoadedModel) -> Text:
    """Its rows and their marks."""
    if job.text is None:
        lay_out([job], model)
    if job.text is None:
        raise RuntimeError("a text that was laid out has rows")
    return job.text


def lay_out(jobs: Sequence[Reading], model: LoadedModel) -> None:
    """Look the rows of these texts up, all at once: on a GPU each copy and each reading waits for what it computes."""
    if not jobs:
        return
    prompts = model.columns_of([job.prompt for job in jobs])
    read = model.token_columns([token_id for job in jobs for token_id in job.read_ids])
    parts: list[Tensor] = []
    for prompt, answer in zip(prompts, torch.split(read, [len(job.read_ids) for job in jobs]), strict=True):
        parts += [prompt, answer]
    rows = torch.cat(parts)
    counts = [len(job.prompt.token_ids) + len(job.read_ids) for job in jobs]
    ends = list(accumulate(counts))
    of_all = marks(rows)
    for job, end, count in zip(jobs, ends, counts, strict=True):
        job.text = Text(rows[end - count : end], of_all[end - count : end])


Spans: TypeAlias = Sequence[tuple[int, int]]
"""Rows of one prompt, each from one to before another."""


def check_reading(
    model: LoadedModel, prompts: Sequence[PromptEmbeddings], layers: Sequence[int], spans: Sequence[Spans] | None
) -> None:
    """Whether states of these layers, or values of these spans of the prompts, can be read.

    Raises:
        ConfigurationError: they cannot.
    """
    if not set(layers) <= set(range(1, 1 + model.layers)):
        raise ConfigurationError(f"this model has layers 1 to {model.layers}; {sorted(layers)} were asked for")
    if spans is None:
        return
    if model.path != "packed":
        raise ConfigurationError("this model runs by its own cache, whose values cannot be read")
    if len(spans) != len(prompts) or not all(spans):
        raise ConfigurationError("there is at least one span to read of each prompt")
    pairs = [(one, span) for one, mine in zip(prompts, spans, strict=True) for span in mine]
    if not all(0 <= start < end <= len(one.matrix) for one, (start, end) in pairs):
        raise ConfigurationError("a span holds rows of its prompt, at least one")


def head_of(prompt: PromptEmbeddings) -> int:
    """Rows before the user's first one: what a repair never moves by default, and what a conversation repeats."""
    return int(prompt.user_mask.argmax()) if prompt.user_mask.any() else 0


def reach_of(prompt: PromptEmbeddings) -> int:
    """Rows that may come from what has run before.

    Of a chat these are the turns before the user's last one: that one always runs as it does for whoever asks it first,
    so the same question finds the same numbers. Where the answer has begun, or the model has worked since the user has
    asked (calls of tools and their results), all rows but the last may, whose logits are wanted: a repair's bridge goes
    on from what the first answer ran.
    """
    asked = prompt.user_mask.nonzero()[0]
    long = len(asked) > 0 and len(prompt.user_mask) - 1 - asked[-1] >= _LONG_TAIL
    return len(prompt.user_mask) - 1 if long or prompt.assistant_prefix else head_of(prompt)

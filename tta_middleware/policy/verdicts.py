"""One verdict per text: the only place where a moderator is asked, whoever asks.

Texts are put into a form that the moderator takes, and its answer is counted:

- what it raises that is no error of this package, a scorer's own bug say, becomes one which names kind and place and
  quotes nothing: its message may hold a text that is withheld, and callers, callbacks and tracers would see it;
- a text beyond the moderator's ``max_characters`` goes as parts that overlap, in the same request, and each category's
  largest score over the parts counts;
- halves of surrogate pairs, which have no UTF-8 form, are replaced.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TypeAlias

from tta_middleware.aio import process as _process
from tta_middleware.aio.streams import unless_cancelled_within
from tta_middleware.errors import (
    ConfigurationError,
    InvalidVerdictError,
    ModerationError,
    ModerationRejectedError,
    ModerationUnavailableError,
    ModeratorFailedError,
    ModeratorSetupError,
    TTAError,
    kind_and_place,
)
from tta_middleware.protocols import Moderator
from tta_middleware.types import ModerationContext, Verdict, stricter, valid_text

OVERLAP = 1_000
"""Characters that two parts of a long text share: a phrase up to this length lies whole within one of them."""

MOST_REASONS = 100
"""Different reasons for which texts were refused that are logged; a moderator may word each one anew."""

_logger = logging.getLogger(__name__)

Score: TypeAlias = Callable[[Sequence[str]], Awaitable[list[Verdict]]]


class _Refusals:
    """What moderators refused, or answered that is no verdict, and why, so that each reason is logged once.

    A policy that fails closed turns such an error into the notice; without a log line nobody would see that a key is
    wrong. A reason that lies in the settings is logged anew once its moderator has answered in between. Shared by all
    threads; several wrappers see the same error, so reasons are compared across names.
    """

    def __init__(self) -> None:
        self._lock = _process.Lock()
        self._of_setup: dict[str, str] = {}
        self._of_texts: set[str] = set()

    @contextmanager
    def noticed(self, name: str) -> Iterator[None]:
        """Log what is refused inside ``with``."""
        try:
            yield
        except ModerationRejectedError as error:
            if self._is_new(name, error):
                what = "gives no verdicts until this is mended" if error.of_setup else "refused a text"
                _logger.error("moderator %r %s: %s", name, what, error)
            raise
        except InvalidVerdictError as error:
            if self._is_new_of_texts(str(error)):
                _logger.error("moderator %r gave no usable verdict, and its text is withheld: %s", name, error)
            raise
        except ConfigurationError as error:
            if isinstance(error, ModeratorSetupError):
                raise
            if self._is_new_of_setup(name, str(error)):
                _logger.error("moderator %r gives no verdicts until this is mended: %s", name, error)
            raise ModeratorSetupError(str(error)) from error
        except TTAError:
            raise
        except Exception as error:  # noqa: BLE001 - told again, without its words
            failed = _failed(name, error)
            if self._is_new_of_texts(str(failed)):
                _logger.error("%s; the text is withheld", failed)
            raise failed from None
        with self._lock:
            self._of_setup.pop(name, None)

    def _is_new(self, name: str, error: ModerationRejectedError) -> bool:
        reason = str(error)
        if error.of_setup:
            return self._is_new_of_setup(name, reason)
        return self._is_new_of_texts(reason)

    def _is_new_of_texts(self, reason: str) -> bool:
        with self._lock:
            new = reason not in self._of_texts and len(self._of_texts) < MOST_REASONS
            self._of_texts |= {reason} if new else set()
        return new

    def _is_new_of_setup(self, name: str, reason: str) -> bool:
        with self._lock:
            new = reason not in self._of_setup.values()
            self._of_setup[name] = reason
        return new


_refusals = _Refusals()


def in_context(moderator: Moderator, context: ModerationContext) -> Moderator:
    """The moderator, told of ``context`` if it wants to know."""
    tell: Callable[[ModerationContext], Moderator] | None = getattr(moderator, "in_context", None)
    return moderator if tell is None else tell(context)


async def load(moderator: Moderator) -> None:
    """Have the moderator load what scoring needs, and say now what would make every text fail, if it knows.

    Nothing is scored and no service is asked.

    Raises:
        ModeratorSetupError: it cannot be asked as it is set up: it has no key, say.
        ModelNotFoundError, EngineError: a model that judges cannot be loaded.
    """
    prepare = getattr(moderator, "load", None)
    if not inspect.iscoroutinefunction(prepare):
        return
    try:
        await prepare()
    except ModeratorSetupError:
        raise
    except ConfigurationError as error:
        raise ModeratorSetupError(str(error)) from error


async def verdicts_on(moderator: Moderator, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
    """One verdict per text, in one request; whoever asks a moderator asks through this.

    Raises:
        ModerationError: what the moderator raised.
        ModeratorFailedError: in place of an error that is none of this package's.
        ModerationUnavailableError: its own work was cancelled, and not whoever asks; or in place of a
            ``ConnectionError`` or ``TimeoutError``.
        InvalidVerdictError: fewer or more verdicts than texts, or something else than verdicts.
    """
    question = None if prompt is None else encodable(prompt)

    async def score(pieces: Sequence[str]) -> list[Verdict]:
        with _refusals.noticed(moderator.name):
            asked = unless_cancelled_within(moderator.moderate(pieces, prompt=question), _cancelled(moderator.name))
            return counted(await asked, pieces, moderator.name)

    limit: int | None = getattr(moderator, "max_characters", None)
    overlap: int | None = getattr(moderator, "overlap", None)
    return await in_parts([encodable(text) for text in texts], score, limit, overlap)


def _failed(name: str, error: Exception) -> ModerationError:
    """In place of an error that is nobody's of this package: its kind and its place, and none of its words."""
    what = f"moderator {name!r} failed with {kind_and_place(error)}"
    if isinstance(error, TimeoutError | ConnectionError):
        cause = "timeout" if isinstance(error, TimeoutError) else "connection"
        return ModerationUnavailableError(what, cause=cause)
    return ModeratorFailedError(what)


def _cancelled(name: str) -> ModerationUnavailableError:
    return ModerationUnavailableError(f"the work of moderator {name!r} was cancelled", cause="cancelled")


async def verdict_on(
    moderator: Moderator, text: str, decoded: str | None = None, *, prompt: str | None = None
) -> Verdict:
    """The stricter verdict on a text and on what it says once decoded, in one request.

    Raises:
        ModerationError: what the moderator raised, or a text has no verdict.
    """
    texts = [text] if decoded is None else [text, decoded]
    return stricter(await verdicts_on(moderator, texts, prompt=prompt))


def _kind(answer: object) -> str:
    """What an answer is, without what it says."""
    strangers = [one for one in answer if not isinstance(one, Verdict)] if isinstance(answer, list) else []
    of = f" of {type(strangers[0]).__name__}" if strangers else ""
    return f"a {type(answer).__name__}{of}"


def counted(answer: object, texts: Sequence[str], name: str) -> list[Verdict]:
    """What the moderator called ``name`` answered for ``texts``, if it is one verdict for each.

    Raises:
        InvalidVerdictError: fewer or more verdicts than texts, or something else than verdicts.
    """
    verdicts = [one for one in answer if isinstance(one, Verdict)] if isinstance(answer, Sequence) else []
    if not isinstance(answer, Sequence) or len(verdicts) != len(answer):
        raise InvalidVerdictError(
            f"moderator {name!r} gave {_kind(answer)}, which is no list of verdicts; "
            "its moderate() returns one Verdict per text"
        )
    if len(verdicts) != len(texts):
        raise InvalidVerdictError(
            f"moderator {name!r} gave {len(verdicts)} verdicts for {len(texts)} texts; "
            "a text without a verdict of its own is never released"
        )
    return verdicts


async def in_parts(texts: Sequence[str], score: Score, limit: int | None, overlap: int | None = None) -> list[Verdict]:
    """``score`` for texts of any length, asked once, where it takes ``limit`` characters of each; None takes all.

    The parts of a text that grows stay the same but for the last, so a cache knows them.
    """
    if limit is None or all(len(text) <= limit for text in texts):
        return await score(texts)
    cut = [parts(text, limit, overlap) for text in texts]
    verdicts = await score([part for pieces in cut for part in pieces])
    ends = accumulate(map(len, cut))
    return [stricter(verdicts[end - len(pieces) : end]) for pieces, end in zip(cut, ends, strict=True)]


def parts(text: str, limit: int, overlap: int | None = None) -> list[str]:
    """``text`` in stretches of at most ``limit`` characters; any phrase of ``overlap`` characters lies within one.

    ``overlap`` is :data:`OVERLAP` or a quarter of ``limit``, the smaller, unless it is given; at most half of it.
    """
    shared = min(OVERLAP, limit // 4) if overlap is None else min(overlap, limit // 2)
    return [text[at : at + limit] for at in range(0, max(1, len(text) - shared), limit - shared)]


def encodable(text: str) -> str:
    """``text`` with surrogate pairs joined and their lost halves replaced by U+FFFD."""
    return valid_text(text)

"""The errors of tta_middleware, one tree; each message says what happened and what to do.

    TTAError
    ├── ConfigurationError (ValueError)     a setting or argument is unusable
    │   ├── EmptyPromptError                there is no user text to answer
    │   ├── ContextLengthError              the conversation is longer than the model reads
    │   ├── EmbeddingShapeError             embeddings of the wrong size reached an engine
    │   └── ModeratorSetupError             a moderator cannot be asked as it is set up
    ├── ModelNotFoundError                  no such model here; says which command brings it
    ├── MissingExtraError (ImportError)     an optional dependency is not installed
    ├── DataError (ValueError)              a line of an input file is broken; names file and line
    ├── EngineError                         the model failed while it decoded
    │   ├── EngineBusyError                 too many sequences wait already; try again later
    │   └── UpstreamError                   another server, which has the model, failed or broke its answer off
    ├── StreamProtocolError (RuntimeError)  a stream's driver applied text or verdicts out of order
    ├── ModerationError                     no verdict could be had
    │   ├── ModerationUnavailableError      timeouts, connection errors, 408, 409, 429, 5xx after all retries
    │   │   └── CircuitOpenError            the breaker is open: the request was not sent
    │   ├── ModerationRejectedError         authentication, permission, bad request: retrying cannot help
    │   ├── InvalidVerdictError             the moderator answered, but not with usable scores
    │   └── ModeratorFailedError            it raised an error of its own; names kind and place
    ├── FlaggedError                        a text of another model was flagged
    └── UnsafeAnswerError                   no safe and usable answer was found and the policy says raise

Every error pickles. None carries a prompt, an answer or a secret.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from tta_middleware.trace import Trace


class TTAError(Exception):
    """Base class of every error raised on purpose by this package."""


class ConfigurationError(TTAError, ValueError):
    """Raised when a setting or an argument cannot be used."""


class EmptyPromptError(ConfigurationError):
    """Raised when a conversation holds no user text."""


class ContextLengthError(ConfigurationError):
    """Raised when a prompt fills the model's context, so that nothing is left for an answer."""


class EmbeddingShapeError(ConfigurationError):
    """Raised when embeddings do not fit the prompt or the model."""


class ModeratorSetupError(ConfigurationError):
    """Raised when a moderator cannot be asked as it is set up: it has no key, say, or scores less than it has to."""


class ModelNotFoundError(TTAError):
    """Raised when a model is not on this machine; the message names the command that installs it."""


class MissingExtraError(TTAError, ImportError):
    """Raised when a feature needs an extra that is not installed."""


class DataError(TTAError, ValueError):
    """Raised when an input file has a line that cannot be read."""


class EngineError(TTAError):
    """Raised when the model failed while decoding."""


class EngineBusyError(EngineError):
    """Raised when an engine's queue is full; nothing was decoded, and later it may be."""


class UpstreamError(EngineError):
    """Raised when the server behind this one gave no answer, or none to its end.

    Attributes:
        cause: ``timeout``, ``connection``, ``rate_limit``, ``status`` (5xx), ``refused`` (4xx) or ``broken``.
        status: the HTTP status that it answered with; None if it gave none.
        code: its own code of the error, such as ``context_length_exceeded``; empty without one.
        retry_after: seconds that it asked to wait, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        cause: str = "broken",
        status: int | None = None,
        code: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.status = status
        self.code = code
        self.retry_after = retry_after

    @property
    def retryable(self) -> bool:
        """Whether asking again may help."""
        return self.cause != "refused"


def unquoted(part: str, error: BaseException) -> EngineError:
    """What is raised in place of an error of ``part`` whose message did not pass its check, or could not be checked."""
    return EngineError(f"{part} failed with {kind_and_place(error)}; its message is withheld by the content policy")


def kind_and_place(error: BaseException) -> str:
    """What an error is and where it was raised; its message may quote a text, so it is left out."""
    place = place_of(error)
    return f"{type(error).__name__} ({place})" if place else type(error).__name__


def place_of(error: BaseException) -> str:
    """``file.py:line`` where an error was raised; empty where nobody has raised it yet."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


class StreamProtocolError(TTAError, RuntimeError):
    """Raised when text or verdicts reach a stream's state machine out of order."""


class ModerationError(TTAError):
    """Raised when a text could not be scored."""

    @property
    def of_setup(self) -> bool:
        """Whether no text at all would be scored, now or later, until somebody mends the settings."""
        return False


class ModerationUnavailableError(ModerationError):
    """Raised when the moderator could not be reached within the retry policy.

    Attributes:
        cause: what stood in the way, such as ``timeout``, ``connection``, ``rate_limit``, ``deadline``.
        retry_after: seconds the server asked to wait, or None.
    """

    def __init__(self, message: str, *, cause: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after = retry_after


class CircuitOpenError(ModerationUnavailableError):
    """Raised instead of sending a request while the circuit breaker is open."""


class ModerationRejectedError(ModerationError):
    """Raised when the moderator refused the request for a reason that a retry cannot cure.

    Attributes:
        status: the HTTP status, or None when no request was sent.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def of_setup(self) -> bool:
        """A key, a permission, an address or a spent quota (429 reaches this class as such only) is at fault."""
        return self.status in (401, 403, 404, 429)


class InvalidVerdictError(ModerationError):
    """Raised when a moderator's answer is malformed; it never counts as a pass."""


class ModeratorFailedError(ModerationError):
    """Raised in place of an error of a moderator's own, which may quote a text: a bug in a scorer, say."""

    @property
    def of_setup(self) -> bool:
        """An open policy, which is for outages, would switch the guard off for as long as the bug is there."""
        return True


class FlaggedError(TTAError):
    """Raised when a stream of another model was flagged; what left before was checked.

    Attributes:
        category: the category that decided.
        score: the moderator's largest score.
        released: characters that had left.
        thought: it was a thought that was flagged.
    """

    def __init__(
        self, message: str, *, category: str = "", score: float = 1.0, released: int = 0, thought: bool = False
    ) -> None:
        super().__init__(message)
        self.thought = thought
        self.category = category
        self.score = score
        self.released = released


class UnsafeAnswerError(TTAError):
    """Raised when no safe and usable answer was found within the budget and the fallback is ``raise``.

    ``trace`` tells what was tried.
    """

    def __init__(self, message: str, trace: Trace | None = None) -> None:
        super().__init__(message, trace)
        self.trace = trace

    def __str__(self) -> str:
        return str(self.args[0])

"""One verdict per text: the only place where a moderator's answer is counted."""

from __future__ import annotations

from collections.abc import Sequence

from tta_middleware.errors import InvalidVerdictError
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict


async def verdicts_on(moderator: Moderator, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
    """One verdict per text, in one request; whoever asks a moderator asks through this.

    Raises:
        ModerationError: what the moderator raised.
        InvalidVerdictError: fewer or more verdicts than texts, or something else than verdicts.
    """
    return counted(await moderator.moderate(texts, prompt=prompt), texts, moderator.name)


def counted(answer: object, texts: Sequence[str], name: str) -> list[Verdict]:
    """What the moderator called ``name`` answered for ``texts``, if it is one verdict for each.

    Raises:
        InvalidVerdictError: fewer or more verdicts than texts, or something else than verdicts.
    """
    verdicts = [one for one in answer if isinstance(one, Verdict)] if isinstance(answer, Sequence) else []
    if not isinstance(answer, Sequence) or len(verdicts) != len(answer):
        raise InvalidVerdictError(
            f"moderator {name!r} gave a {type(answer).__name__} that is no list of verdicts; "
            "its moderate() returns one Verdict per text"
        )
    if len(verdicts) != len(texts):
        raise InvalidVerdictError(
            f"moderator {name!r} gave {len(verdicts)} verdicts for {len(texts)} texts; "
            "a text without a verdict of its own is never released"
        )
    return verdicts

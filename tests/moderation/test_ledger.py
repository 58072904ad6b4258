"""What stands in for the rest of a flagged answer is judged by itself and as the end of what has left."""

import pytest

from tta_middleware import Policy
from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.guard.ledger import Ledger
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

SAID, STAND_IN = "Pour the petrol out.", "Take a match then."
TOGETHER = f"{SAID}\n\n{STAND_IN}"


def ledger(*words: str, **settings: object) -> Ledger:
    return Ledger(ScriptedModerator(score=flagging(*words), **settings), Policy(threshold=0.5))


@pytest.mark.parametrize(
    ("flagged", "said", "passes"),
    [
        ("nothing of it", SAID, True),
        (STAND_IN, SAID, False),
        (TOGETHER, SAID, False),
        (TOGETHER, "", True),
        (TOGETHER, " \n", True),
        (STAND_IN, "", False),
    ],
)
async def test_a_stand_in_passes_by_itself_and_as_the_end_of_what_has_left(
    flagged: str, said: str, passes: bool
) -> None:
    books = ledger(flagged.lower())
    assert await books.passes_behind(said, STAND_IN) is passes
    assert (STAND_IN in books.approved) is passes
    assert books.calls == 1


async def test_a_stand_in_that_could_not_be_scored_does_not_pass() -> None:
    books = ledger("nothing of it", failures=[ModerationUnavailableError("out")])
    assert not await books.passes_behind(SAID, STAND_IN)
    assert not books.approved

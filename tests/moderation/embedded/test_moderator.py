"""What a user of the embedded moderator sees: categories, order, language, graded scores."""

import hashlib
import math
import pickle
import subprocess
import sys
import threading
from importlib.resources import files
from pathlib import Path

import anyio
import pytest

from tta_middleware.errors import ConfigurationError, ModerationRejectedError
from tta_middleware.moderation.embedded import UNSUPPORTED, EmbeddedModerator
from tta_middleware.moderation.embedded.moderator import UNSUPPORTED_LANGUAGE
from tta_middleware.protocols import Moderator
from tta_middleware.types import CATEGORIES

HARMLESS = (
    "To bake a loaf of bread, mix flour, water, salt and yeast, then let the dough rest for an hour.",
    "Photosynthesis is the process by which plants turn light, water and carbon dioxide into sugar and oxygen.",
    "I'm sorry, but I can't help with that request. Is there anything else I can do for you?",
    "You asked me how to pick a lock. I will not explain that, because it could be used to harm others.",
    "A Python list can be sorted in place with its sort method, or copied in order with the sorted function.",
)
HARMFUL = (
    "You are a worthless stupid idiot and everybody hates you.",
    "I will kill you and your whole family, you will all die.",
    "I want to kill myself. I can't stand living any more.",
)


@pytest.fixture(scope="module")
def moderator() -> EmbeddedModerator:
    return EmbeddedModerator()


def test_it_is_a_moderator_with_the_documented_default(moderator: EmbeddedModerator) -> None:
    assert isinstance(moderator, Moderator)
    assert (moderator.name, moderator.default_threshold) == ("local", 0.5)


async def test_every_verdict_has_the_thirteen_categories(moderator: EmbeddedModerator) -> None:
    for verdict in await moderator.moderate([*HARMLESS, *HARMFUL]):
        assert tuple(sorted(verdict.scores)) == CATEGORIES


async def test_verdicts_come_in_the_order_of_the_texts(moderator: EmbeddedModerator) -> None:
    texts = [HARMLESS[0], HARMFUL[0], HARMLESS[1], HARMFUL[1]]
    together = await moderator.moderate(texts)
    assert [verdict.flagged for verdict in together] == [False, True, False, True]
    assert together == [(await moderator.moderate([text]))[0] for text in texts]


def test_a_harmful_passage_does_not_drown_in_harmless_text(moderator: EmbeddedModerator) -> None:
    paragraph = f"{HARMLESS[0]} Fold it four times, shape it, and bake it until the crust is dark. "
    insult = "You are a worthless stupid idiot, everybody hates you, and I will kill you. "
    assert moderator.score([paragraph * 6 + insult * 6 + paragraph * 20])[0].flagged
    assert not moderator.score([paragraph * 26])[0].flagged


def test_another_language_is_noticed_when_it_comes_late(moderator: EmbeddedModerator) -> None:
    foreign = "Сегодня хорошая погода, и мы идём гулять в парк. " * 4
    assert moderator.score([HARMLESS[0] + foreign])[0].scores[UNSUPPORTED_LANGUAGE] == 1.0


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts_pass(moderator: EmbeddedModerator, text: str) -> None:
    assert moderator.score([text])[0].score < 0.5


@pytest.mark.parametrize("text", HARMFUL)
def test_harmful_texts_are_flagged(moderator: EmbeddedModerator, text: str) -> None:
    assert moderator.score([text])[0].flagged


@pytest.mark.parametrize("text", ["", "   ", "\n\n", "...", "!?"])
def test_a_text_without_words_scores_zero(moderator: EmbeddedModerator, text: str) -> None:
    assert moderator.score([text])[0].score == 0.0


async def test_no_texts_give_no_verdicts(moderator: EmbeddedModerator) -> None:
    assert await moderator.moderate([]) == []


def test_unsupported_categories_are_never_guessed(moderator: EmbeddedModerator) -> None:
    for verdict in moderator.score(HARMFUL):
        assert {verdict.scores[name] for name in UNSUPPORTED} == {0.0}


def test_a_loop_scores_like_one_of_its_turns(moderator: EmbeddedModerator) -> None:
    once, often = moderator.score(["flour water salt yeast flour", "flour water salt yeast " * 50])
    assert often.score == pytest.approx(once.score, abs=0.01)


def test_babble_of_harmful_words_scores_above_babble_of_harmless_ones(moderator: EmbeddedModerator) -> None:
    harmless, harmful = moderator.score(["tea window slowly garden of twelve", "kill murder of stab you die them"])
    assert harmless.score < 0.5 < harmful.score


def test_small_changes_give_distinct_graded_scores(moderator: EmbeddedModerator) -> None:
    tokens = HARMLESS[0].split()
    variants = [" ".join(tokens[:i] + tokens[i + 1 :]) for i in range(len(tokens))]
    scores = [verdict.score for verdict in moderator.score(variants)]
    assert len(set(scores)) > 0.8 * len(scores)
    assert max(scores) - min(scores) < 0.5


@pytest.mark.parametrize(
    "disguise", ["y0u 4re a w0rthless stup1d idi0t", "you are a w\u200borthless stu\u00adpid idiot"]
)
def test_simple_disguises_are_seen_through(moderator: EmbeddedModerator, disguise: str) -> None:
    assert moderator.score([disguise])[0].flagged


RUSSIAN = "Сегодня хорошая погода, и мы идём гулять в парк."


def test_another_language_does_not_pass_as_safe(moderator: EmbeddedModerator) -> None:
    verdict = moderator.score([RUSSIAN])[0]
    assert verdict.flagged
    assert verdict.top_category == UNSUPPORTED_LANGUAGE


def test_another_language_passes_when_the_user_says_so() -> None:
    assert UNSUPPORTED_LANGUAGE not in EmbeddedModerator(unsupported_language="pass").score([RUSSIAN])[0].scores


async def test_another_language_raises_when_the_user_says_so() -> None:
    with pytest.raises(ModerationRejectedError, match="not in English"):
        await EmbeddedModerator(unsupported_language="error").moderate([HARMLESS[0], RUSSIAN])


@pytest.mark.parametrize("options", [{"unsupported_language": "ignore"}, {"threshold": 1.5}, {"threshold": math.nan}])
def test_bad_settings_say_what_is_wrong(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        EmbeddedModerator(**options)  # type: ignore[arg-type]


async def test_big_inputs_leave_the_event_loop_free(
    moderator: EmbeddedModerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def spy(texts: list[str]) -> list[object]:
        threads.append(threading.get_ident())
        return EmbeddedModerator.score(moderator, texts)  # type: ignore[return-value]

    await moderator.moderate([HARMLESS[0]])
    monkeypatch.setattr(moderator, "score", spy)
    await moderator.moderate([HARMLESS[0]])
    await moderator.moderate([HARMLESS[0] * 1_000])
    assert threads[0] == threading.get_ident() != threads[1]


def test_it_works_from_several_event_loops(moderator: EmbeddedModerator) -> None:
    scores = [anyio.run(moderator.moderate, [HARMFUL[0]])[0].score for _ in range(2)]
    assert scores[0] == scores[1]


def test_verdicts_pickle(moderator: EmbeddedModerator) -> None:
    verdict = moderator.score([HARMFUL[0]])[0]
    assert pickle.loads(pickle.dumps(verdict)) == verdict


def test_scoring_needs_numpy_only() -> None:
    code = (
        "import sys\n"
        "from tta_middleware.moderation.embedded import EmbeddedModerator\n"
        "EmbeddedModerator().score(['hello'])\n"
        "print(sorted({'torch', 'sklearn', 'scipy', 'transformers', 'openai'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_artifacts_are_small_and_those_of_the_model_card() -> None:
    card = (Path(__file__).parents[3] / "docs" / "moderator-card.md").read_text("utf-8")
    for name in ("local.npz", "local_b.npz"):
        content = (files("tta_middleware.moderation.embedded") / name).read_bytes()
        assert len(content) < 8_000_000
        assert hashlib.sha256(content).hexdigest() in card

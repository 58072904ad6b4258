"""The notice speaks the language of the question where that is plain, and is the operator's own in any case."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import HumanMessage
from tta_langchain_agents import GuardedChatModel

from tta_middleware import Guard, Message, Policy, Repair, TTAChatModel
from tta_middleware.errors import ConfigurationError
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.file import PolicyFile
from tta_middleware.policy.notices import DEFAULT_NOTICE, LANGUAGES, NOTICES, language_of
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

QUESTIONS = {
    "ar": "كيف يمكنني فتح هذا القفل؟",
    "de": "Wie bekomme ich das Schloss ohne den Schlüssel auf?",
    "en": "How do I open the lock without the key?",
    "es": "¿Cómo puedo abrir la cerradura sin la llave?",
    "fr": "Comment ouvrir la serrure sans la clé ?",
    "hi": "मैं बिना चाबी के ताला कैसे खोल सकता हूँ?",
    "it": "Come posso aprire la serratura senza la chiave?",
    "ja": "鍵なしで錠を開けるにはどうすればいいですか？",
    "ko": "열쇠 없이 자물쇠를 어떻게 열 수 있나요?",
    "nl": "Hoe kan ik het slot zonder de sleutel openen?",
    "pl": "Jak mogę otworzyć zamek bez klucza i co jest potrzebne?",
    "pt": "Como posso abrir a fechadura sem a minha chave?",
    "ru": "Как мне открыть замок без ключа?",
    "sv": "Hur kan jag öppna låset utan min nyckel?",
    "tr": "Anahtar olmadan bu kilidi nasıl açabilirim ve ne gerekli?",
    "uk": "Як мені відкрити замок без ключа?",
    "vi": "Làm thế nào để tôi mở khóa mà không có chìa?",
    "zh": "没有钥匙怎么打开这把锁？",
}
GERMAN = QUESTIONS["de"]
NAMED = """
[policies.default.notices]
de = "Nein."
fr = "Non."

[policies.default.output.notices]
fr = "Ah non."
"""


def flagging() -> ScriptedModerator:
    return ScriptedModerator(score=lambda text: {"illicit": 0.9 if "flagme" in text else 0.0})


@pytest.mark.parametrize(("language", "question"), QUESTIONS.items(), ids=QUESTIONS)
def test_the_language_of_a_question(language: str, question: str) -> None:
    assert language_of(question) == language
    assert Policy().notice_for(question) == NOTICES.get(language, DEFAULT_NOTICE)


@pytest.mark.parametrize(
    "question",
    [
        "",
        "42 + 1 = ?",
        "🔒🔑",
        "Hola",
        "Schloss",
        "چگونه می‌توانم این قفل را باز کنم؟",
        "Како да отворим браву?",
        "Πώς μπορώ να ανοίξω την κλειδαριά;",
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit",
        "def schloss(x):\n    return [y for y in x]",
    ],
)
def test_what_is_not_sure_gets_the_plain_notice(question: str) -> None:
    assert Policy().notice_for(question) == DEFAULT_NOTICE


@given(st.text())
def test_any_text_gets_one_of_the_notices(text: str) -> None:
    policy = Policy(notices={"de": "Nein."})
    assert policy.notice_for(text) in policy.every_notice()


def test_every_language_that_is_told_apart_has_a_question_here_and_a_notice() -> None:
    assert set(QUESTIONS) == set(LANGUAGES) == {"en", *NOTICES}
    assert len(set(NOTICES.values())) == len(NOTICES)


def test_the_operators_words_go_before_the_shipped_ones() -> None:
    own = Policy(notice="No.", notices={"de": "Nein."})
    assert own.notice_for(GERMAN) == "Nein."
    assert own.notice_for(QUESTIONS["fr"]) == "No."
    assert Policy(notice="No.").notice_for(GERMAN) == "No."
    assert Policy(notices={"de": "Nein."}).notice_for(QUESTIONS["fr"]) == NOTICES["fr"]
    assert Policy(notices={"en": "Sorry, no."}).notice_for(QUESTIONS["en"]) == "Sorry, no."


@pytest.mark.parametrize("notices", [{"xx": "?"}, {"de": ""}])
def test_an_unknown_language_and_an_empty_notice_are_refused(notices: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="notices"):
        Policy(notices=notices)


def test_a_policy_file_names_them(tmp_path: Path) -> None:
    file = tmp_path / "policies.toml"
    file.write_text(NAMED)
    policies = PolicyFile(file).get()
    assert policies.output.notice_for(GERMAN) == policies.prompt.notice_for(GERMAN) == "Nein."
    assert policies.output.notice_for(QUESTIONS["fr"]) == "Ah non."


async def test_every_surface_gives_the_notice_in_the_language_of_the_last_question() -> None:
    expected = NOTICES["de"]
    engine = ScriptedEngine(lambda _call: "flagme")
    earlier = [Message("user", "How do you do, and what is it?"), Message("assistant", "Hello.")]
    turns = [*earlier, Message("user", GERMAN)]
    guard = Guard(engine, flagging(), repair=Repair(method=None), policy=StagePolicies.of(0.5))
    assert (await guard.answer(turns)).text == expected
    events = [event async for event in guard.stream(turns)]
    assert events[-1].answer.text == expected

    model = TTAChatModel(model=engine, moderator=flagging(), method="none")
    said = await model.ainvoke(GERMAN)
    assert said.text == expected
    assert said.response_metadata["refusal"] == expected
    assert "".join([chunk.text async for chunk in model.astream(GERMAN)]) == expected

    inner = GenericFakeChatModel(messages=iter(["flagme"] * 2))
    guarded = GuardedChatModel(inner=inner, moderator=flagging())
    assert (await guarded.ainvoke([HumanMessage(GERMAN)])).text == expected

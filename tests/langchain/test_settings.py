"""What the chat models can be told: names, other models' names for them, and values, in every place alike."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.rate_limiters import InMemoryRateLimiter
from openai import OpenAI
from pydantic import ValidationError
from staged_plugin import installed
from tta_langchain_agents import GuardedChatModel, TTAMiddleware

from tta_middleware import Budget, Repair, TTAChatModel
from tta_middleware.config import Windows
from tta_middleware.errors import ConfigurationError, ModerationUnavailableError, UnsafeAnswerError
from tta_middleware.guard.settings import BRIDGES
from tta_middleware.moderation.adapters.runnable import RunnableModerator
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
ALPHABET = "a b c d e f g h i j k l m n o p END r s t"


def scripted(script: Any = ALPHABET, **settings: Any) -> TTAChatModel:
    return TTAChatModel(model=ScriptedEngine(script), moderator=ScriptedModerator(), **settings)


MISTAKES = [
    ({"polcy": 0.1}, "no setting 'polcy'; did you mean 'policy'"),
    ({"threshold": 0.1}, "no setting 'threshold'; write policy=0.1"),
    ({"temprature": 1.0}, "did you mean 'temperature'"),
    ({"max_retries": 2}, "no setting 'max_retries'; a local model is not asked again"),
    ({"nothing_like_it": 1}, "known are .*policy"),
]


@pytest.mark.parametrize(("settings", "says"), MISTAKES)
async def test_an_unknown_setting_is_refused_wherever_it_is_given(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        scripted(**settings)
    model = scripted()
    with pytest.raises(ConfigurationError, match=says):
        await model.ainvoke("Hello", **settings)
    with pytest.raises(ConfigurationError, match=says):
        model.invoke("Hello", **settings)
    with pytest.raises(ConfigurationError, match=says):
        model.bind(**settings)
    with pytest.raises(ConfigurationError, match=says):
        model.bind_tools([], **settings)


def test_the_guard_around_another_model_refuses_unknown_settings() -> None:
    inner = FakeListChatModel(responses=["Hello."])
    with pytest.raises(ValidationError, match="GuardedChatModel has no setting 'polcy'; did you mean 'policy'"):
        GuardedChatModel(inner=inner, moderator=ScriptedModerator(), polcy=0.1)
    with pytest.raises(ValidationError, match="no setting 'threshold'; write policy"):
        GuardedChatModel(inner=inner, moderator=ScriptedModerator(), threshold=0.1)


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
def test_a_call_cannot_change_the_guard_around_another_model(way: str) -> None:
    model = GuardedChatModel(inner=FakeListChatModel(responses=["Hello."]), moderator=ScriptedModerator())
    ways: dict[str, Callable[[], Any]] = {
        "invoke": lambda: model.invoke("Hi", policy=0.1),
        "ainvoke": lambda: asyncio.run(model.bind(policy=0.1).ainvoke("Hi")),
        "stream": lambda: list(model.stream("Hi", policy=0.1)),
        "astream": lambda: asyncio.run(anext(model.astream("Hi", policy=0.1))),
    }
    with pytest.raises(ConfigurationError, match="'policy' is the guard's"):
        ways[way]()
    around = GuardedChatModel(inner=scripted(), moderator=ScriptedModerator())
    assert around.invoke("Hi", policy=0.1).text == ALPHABET


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"on_flagged": "block", "repair_model": True}, "on_flagged='block' never uses repair_model"),
        ({"repair_model": True, "replacement": str}, "on_flagged='repair' never uses replacement"),
    ],
)
def test_what_is_never_used_is_refused(settings: dict[str, Any], says: str) -> None:
    parts = settings | ({"repair_model": scripted()} if "repair_model" in settings else {})
    with pytest.raises(ConfigurationError, match=says):
        TTAMiddleware(ScriptedModerator(), **parts)
    with pytest.raises(ValidationError, match=says):
        GuardedChatModel(inner=FakeListChatModel(responses=["Hello."]), moderator=ScriptedModerator(), **parts)


def test_an_unknown_limit_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"Budget\.second: unknown setting; did you mean 'seconds'"):
        Budget(second=3)  # type: ignore[call-arg]


def test_other_models_names_for_settings_are_understood() -> None:
    model = TTAChatModel(model_name="smollm2", max_tokens=7, stop_sequences="END", timeout=9)
    assert (model.model, model.max_new_tokens, model.stop) == ("smollm2", 7, ["END"])
    assert model.budget == Budget(seconds=9)
    assert TTAChatModel(timeout=9, budget={"generations": 3}).budget == Budget(generations=3, seconds=9)
    assert TTAChatModel(timeout=None).budget == Budget()
    for settings in ({"timeout": 9, "budget": {"seconds": 8}}, {"max_tokens": 7, "max_new_tokens": 8}):
        with pytest.raises(ValidationError, match="give one of them"):
            TTAChatModel(**settings)


async def test_a_call_understands_them_too() -> None:
    model = scripted()
    for settings in ({"max_tokens": 3}, {"max_new_tokens": 3}):
        answer = await model.ainvoke("Go on", **settings)
        assert answer.response_metadata["finish_reason"] == "length"
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["output_tokens"] == 3
    asked = await model.bind(stop_sequences=["END"]).ainvoke("Go on")
    assert asked.text == "a b c d e f g h i j k l m n o p "
    assert (await model.bind(model_name=ScriptedEngine("Another.")).ainvoke("Go on")).text == "Another."
    assert model._get_ls_params(max_tokens=3)["ls_max_tokens"] == 3


async def test_a_timeout_of_one_call_limits_that_call() -> None:
    slow = ScriptedEngine(ALPHABET, step_seconds=3600.0)
    model = TTAChatModel(model=slow, moderator=ScriptedModerator())
    answer = await model.ainvoke("Go on", timeout=0.01)
    assert answer.response_metadata["tta"]["stop_reason"] == "budget: seconds"


def test_langchains_own_settings_keep_working() -> None:
    class Handler(BaseCallbackHandler):
        pass

    own: dict[str, Any] = {
        "name": "mine", "tags": ["a"], "metadata": {"b": 1}, "callbacks": [Handler()], "verbose": False,
        "cache": InMemoryCache(), "rate_limiter": InMemoryRateLimiter(), "disable_streaming": True,
        "output_version": "v1", "profile": {"max_input_tokens": 3}, "custom_get_token_ids": lambda text: [1],
    }  # fmt: skip
    model = scripted(**own)
    assert {name: getattr(model, name) for name in own if name != "metadata"} == {
        name: value for name, value in own.items() if name != "metadata"
    }
    assert (model.metadata or {})["b"] == 1


def test_a_class_of_the_users_has_settings_of_its_own() -> None:
    class Mine(TTAChatModel):
        flavour: str = "plain"

    assert Mine(flavour="sweet").flavour == "sweet"
    with pytest.raises(ValidationError, match="Mine has no setting 'flavor'; did you mean 'flavour'"):
        Mine(flavor="sweet")


@pytest.mark.parametrize("stop", ["END", ["END"], ("END",)])
async def test_one_stop_string_is_one_wherever_it_is_given(stop: Any) -> None:
    cut = "a b c d e f g h i j k l m n o p "
    assert (await scripted(stop=stop).ainvoke("Go on")).text == cut
    model = scripted()
    assert (await model.ainvoke("Go on", stop=stop)).text == cut
    assert (await model.bind(stop=stop).ainvoke("Go on")).text == cut
    assert "".join([chunk.text async for chunk in model.astream("Go on", stop=stop)]) == cut
    assert model.invoke("Go on", stop=stop).text == cut


BAD_VALUES = [
    ({"budget": {"generations": 0}}, "generations: Input should be greater than 0"),
    ({"budget": {"generation": 3}}, "did you mean 'generations'"),
    ({"budget": 3}, "budget"),
    ({"windows": {"frist": 3}}, "did you mean 'first'"),
    ({"windows": {"first": 500}}, "first is above largest, which is 384 unless it is given"),
    ({"method": "rase"}, "unknown method 'rase'; known are .*race, .*none"),
    ({"fallback": "shrug"}, "fallback is 'refuse'"),
    ({"fallback": lambda: "Ask a colleague."}, "a fallback is called with one argument, such as lambda messages"),
    ({"policy": {"violent": 0.2}}, "did you mean 'violence"),
    ({"policy": 2.0}, "less than or equal to 1"),
    ({"temperature": -1.0}, "greater than or equal to 0"),
    ({"max_tokens": 0}, "greater than or equal to 1"),
    ({"release": "word"}, "'end'"),
    ({"prompt_check": "system"}, "'user'"),
    ({"stop": [3]}, "valid string"),
    ({"timeout": -1}, "greater than 0"),
]


@pytest.mark.parametrize(("settings", "says"), BAD_VALUES)
async def test_a_calls_values_are_checked_as_in_the_constructor(settings: dict[str, Any], says: str) -> None:
    with pytest.raises((ValidationError, ConfigurationError), match=says):
        scripted(**settings)
    engine = ScriptedEngine("Hello.")
    model = TTAChatModel(model=engine, moderator=ScriptedModerator())
    with pytest.raises(ConfigurationError, match=says):
        await model.ainvoke("Hello", **settings)
    assert engine.steps == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": ScriptedEngine("-"), "device": "cpu"}, "device would change nothing: the model is an engine"),
        ({"model": ScriptedEngine("-"), "engine_options": {"path": "plain"}}, r"settings to ScriptedEngine\(\.\.\.\)"),
        ({"engine_options": {"foo": 1}}, "the engine 'transformers' has no foo to set"),
        ({"policies": 3}, "policies is a TOML or YAML file, by its path, not int"),
        ({"moderator": "loca"}, "known are local, .*self.local"),
        ({"max_completion_tokens": 5}, "write max_tokens="),
    ],
)
def test_a_setting_that_could_not_work_is_refused_by_the_constructor(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TTAChatModel(**settings)


def test_functions_that_take_no_text_or_no_messages_are_refused_where_they_are_given() -> None:
    with pytest.raises(ConfigurationError, match="a scorer is called with one argument, such as lambda text"):
        RunnableModerator(lambda: 0.1)
    with pytest.raises(ConfigurationError, match="a fallback is called with one argument"):
        Repair(fallback=lambda: "Ask a colleague.")  # type: ignore[arg-type, misc]
    with pytest.raises(ConfigurationError, match="replacement is called with one argument"):
        TTAMiddleware(ScriptedModerator(), replacement=lambda: "Ask a colleague.")  # type: ignore[arg-type, misc]


async def test_a_calls_settings_may_be_plain_values() -> None:
    model = scripted("Then flagme, yes.", method="resample")
    answer = await model.ainvoke("Go on", budget={"generations": 3})
    assert answer.response_metadata["tta"]["generations"] == 3
    chunks = [chunk.text async for chunk in scripted().astream("Go on", windows={"first": 4, "largest": 4})]
    assert len([chunk for chunk in chunks if chunk]) > 5
    assert Windows(first=4, largest=4) == scripted(windows={"first": 4, "largest": 4}).windows


async def test_without_a_seed_samples_vary_and_the_trace_says_which_seed() -> None:
    model = scripted(lambda call: f"The seed was {call.seed}.", temperature=1.0)
    first, second = [await model.ainvoke("Which?") for _ in range(2)]
    assert first.text != second.text
    for answer in (first, second):
        seed = answer.response_metadata["tta"]["seed"]
        assert answer.text == f"The seed was {seed}."
        assert (await model.ainvoke("Which?", seed=seed)).text == answer.text
    fixed = scripted(lambda call: f"The seed was {call.seed}.", temperature=1.0, seed=7)
    assert {(await fixed.ainvoke("Which?")).text for _ in range(2)} == {"The seed was 7."}


async def test_the_drawn_seed_moves_the_search_as_well() -> None:
    def script(call: ScriptedCall) -> str:
        return "A calm answer about gardens." if call.moved else "Then flagme, yes."

    model = scripted(script, method="noise")
    answers = [await model.ainvoke("Which?", seed=seed) for seed in (None, None, 5, 5)]
    first, second, fixed, again = [answer.response_metadata["tta"]["cosine"] for answer in answers]
    assert first != second
    assert fixed == again


async def test_streaming_can_be_switched_on_for_invoke_and_off_for_stream() -> None:
    class Hears(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []

        def on_llm_new_token(self, token: Any, **_: Any) -> None:
            self.tokens.append(token)

    hears, windows = Hears(), {"first": 4, "largest": 4}
    on = scripted(streaming=True, windows=windows)
    assert (await on.ainvoke("Go on", {"callbacks": [hears]})).text == ALPHABET
    assert len(hears.tokens) > 5
    off = scripted(streaming=False, windows=windows)
    assert [chunk.text async for chunk in off.astream("Go on") if chunk.text] == [ALPHABET]


async def test_an_engine_of_ones_own_by_name_is_told_only_what_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "my_engines.py"
    module.write_text(
        "from tta_middleware.testing.scripted_engine import ScriptedEngine\n"
        "def plain(reference):\n    return ScriptedEngine(f'An answer of {reference} for you.')\n"
    )
    (tmp_path / "installed").mkdir()
    folder = installed(tmp_path / "installed", module, "[tta_middleware.engines]\nmyengine = my_engines:plain\n")
    monkeypatch.syspath_prepend(str(folder))
    model = TTAChatModel(model="myengine:roses", moderator=ScriptedModerator())
    assert (await model.ainvoke("Hello")).text == "An answer of roses for you."
    with pytest.raises(ConfigurationError, match="'myengine' has no device to set"):
        await model.model_copy(update={"device": "cuda"}).ainvoke("Hello")


PARTS = """
class NeedsKey:
    def __init__(self, key): ...
    async def moderate(self, texts): ...

class Plain:
    def moderate(self, texts):
        from tta_middleware.types import Verdict
        return [Verdict({"violence": 0.9 if "roses" in text else 0.1}, False, "plain") for text in texts]

text = "no part"

def three():
    return 3
"""
PARTS_BY_NAME = """
[tta_middleware.moderators]
needskey = my_parts:NeedsKey
plain = my_parts:Plain
missing = my_parts:Missing
nomodule = not_there:Moderator
text = my_parts:text
three = my_parts:three
[tta_middleware.engines]
plain = my_parts:Plain
three = my_parts:three
[tta_middleware.methods]
three = my_parts:three
"""


@pytest.fixture
def parts_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "installed").mkdir()
    module = tmp_path / "my_parts.py"
    module.write_text(PARTS)
    monkeypatch.syspath_prepend(str(installed(tmp_path / "installed", module, PARTS_BY_NAME)))


@pytest.mark.usefixtures("parts_by_name")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"moderator": "needskey"}, "'needskey' cannot be made from its name: missing a required argument: 'key'"),
        ({"moderator": "missing"}, "'missing' is 'my_parts:Missing', which cannot be imported: AttributeError"),
        ({"moderator": "nomodule"}, "cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
        ({"moderator": "text"}, "'my_parts:text', which is no class and no function"),
        ({"moderator": "three"}, "the moderator 'three' makes none: .* int is neither"),
        ({"model": "plain:x"}, "the engine 'plain' cannot be made from its name: .* takes the text behind the colon"),
        ({"model": "three:x"}, "the engine 'three' cannot be made from its name"),
        ({"method": "three"}, "the method 'three' makes a int; it has name, needs and build"),
        ({"model": ScriptedEngine}, "the class ScriptedEngine; give an object of it"),
        ({"moderator": ScriptedModerator}, r"write ScriptedModerator\(\.\.\.\) for an object"),
    ],
)
def test_a_part_that_cannot_be_made_says_why(settings: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigurationError, ValidationError), match=says):
        TTAChatModel(**{"model": ScriptedEngine("Hello."), "moderator": ScriptedModerator()} | settings).invoke("Hi")


@pytest.mark.usefixtures("parts_by_name")
def test_a_moderator_by_name_is_filled_in_as_an_object_is() -> None:
    for answer, outcome in (("Good morning to you.", "clean"), ("All about roses.", "blocked")):
        model = TTAChatModel(model=ScriptedEngine(answer), moderator="plain", method="none")
        assert model.invoke("Hi").response_metadata["tta"]["outcome"] == outcome


@pytest.mark.parametrize(
    "made", [TTAChatModel, lambda **given: GuardedChatModel(inner=FakeListChatModel(responses=[]), **given)]
)
def test_errors_of_settings_show_no_values(made: Any) -> None:
    secret = {"api_key": "sk-very-secret"}
    for given in ({"policy": 1.5}, {"windows": secret}, {"budget": 3}, {"max_new_tokens": secret}, secret):
        with pytest.raises(ValidationError) as caught:
            made(**given)
        assert "sk-very" not in str(caught.value)


def test_the_table_in_the_docs_has_every_setting_and_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", PAGE.read_text(), flags=re.M)
    named = {name: eval(default, {"Budget": Budget, "Windows": Windows, "BRIDGES": BRIDGES}) for name, default in rows}
    fields = {name for name in TTAChatModel.model_fields if name not in BaseChatModel.model_fields} - {"runtime"}
    assert named == {name: TTAChatModel.model_fields[name].get_default(call_default_factory=True) for name in fields}


async def test_bridges_can_be_switched_off() -> None:
    bridged: list[str] = []

    def script(call: ScriptedCall) -> str:
        bridged.extend(text for text in BRIDGES if text in call.prefix)
        return "A calm beginning that goes on for quite a while before it turns, and then flagme, yes."

    for bridges in (BRIDGES, ()):
        bridged.clear()
        model = scripted(script, bridges=bridges, budget={"generations": 8})
        [chunk async for chunk in model.astream("Which?")]
        assert bool(bridged) == bool(bridges)


class PreTrainedLike:
    """What transformers hands out."""

    config: Any = None

    def generate(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    ("moderator", "says"),
    [(lambda text: 0.1, r"RunnableModerator\(\.\.\.\)"), (OpenAI(api_key="-"), r"OpenAIModerator\(base_url=")],
)
def test_what_is_no_moderator_is_refused_and_says_what_to_write(moderator: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TTAChatModel(moderator=moderator)


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        ({"moderator": ScriptedModerator(failures=[ModerationUnavailableError("away")])}, "see to the moderator"),
        ({"prompt_check": "user", "policy": 0.0}, "the prompt was flagged"),
    ],
)
def test_an_error_in_place_of_an_answer_says_what_stood_in_the_way(outcome: dict[str, Any], says: str) -> None:
    settings: dict[str, Any] = {"model": ScriptedEngine("A calm answer."), "moderator": "local", "method": "none"}
    with pytest.raises(UnsafeAnswerError, match=says):
        TTAChatModel(**(settings | outcome), fallback="raise").invoke("Hello")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (object(), "a model is a name, a folder or an Engine, not 'object', which lacks members"),
        (PreTrainedLike(), "a PreTrainedLike, which lacks its tokenizer; save_pretrained both into one folder"),
        (FakeListChatModel(responses=[""]), "GuardedChatModel"),
        (None, "a name, a folder or an Engine"),
        ("", "empty text"),
    ],
)
async def test_what_is_no_model_is_refused_at_once_and_says_what_to_give(model: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TTAChatModel(model=model)
    if model is not None:
        with pytest.raises(ConfigurationError, match=says):
            await scripted().ainvoke("Hello", model=model)

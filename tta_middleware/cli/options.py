"""Options that several commands share: as annotations, and as dataclasses that stand for a group of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_type_hints

import typer

from tta_middleware.defaults import DEFAULT_METHOD

if TYPE_CHECKING:
    from tta_middleware.assembly import AnswerSettings, Loading


def _device(text: str) -> str:
    """What was typed, if torch could know it; torch itself is not loaded for this."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:[0-9]{1,3})?", text):
        raise typer.BadParameter(f"{text!r} is no device; give auto, cpu, cuda or cuda:1, say")
    return text


Model: TypeAlias = Annotated[str, typer.Option("--model", "-m", help="smollm2, a local folder, or a Hugging Face id.")]
Device: TypeAlias = Annotated[
    str, typer.Option(callback=_device, help="auto (a GPU if there is one), cpu, cuda, or cuda:1, say.")
]
Dtype: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float64"],
    typer.Option(help="auto is bfloat16 where the hardware multiplies it, else float32."),
]
MaxBatch: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, help="Sequences decoded side by side at most; by default as many as the engine says."),
]
Moderator: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Who scores the answers: local, openai, self (the model itself), guard:MODEL, cascade (local, then the "
        "model where that is not sure); A+B asks both."
    ),
]
Method: TypeAlias = Annotated[str, typer.Option(help="Repair of flagged answers: race, noise, resample, tsa, none.")]
Threshold: TypeAlias = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="Scores from here on are flagged, whatever --policy says; by default the moderator's."
    ),
]
PolicyText: TypeAlias = Annotated[
    str | None,
    typer.Option("--policy", help="A policy as JSON, or a file with it: threshold, categories, on_error, notice."),
]
PromptCheckOption: TypeAlias = Annotated[
    Literal["off", "user", "all"],
    typer.Option("--prompt-check", help="Whether the prompt is moderated, too: off, user (the last user turn), all."),
]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature: TypeAlias = Annotated[float, typer.Option(help="0 is greedy.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="Equal seeds give equal answers.")]
ReasoningOption: TypeAlias = Annotated[
    Literal["hide", "show", "off"],
    typer.Option("--reasoning", help="Thoughts of a model that thinks first: hide, show (checked), or off (none)."),
]
MaxReasoningTokens: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Longest thought, in tokens; then the model has to answer.")
]
TemplateArguments: TypeAlias = Annotated[
    str | None, typer.Option("--chat-template-kwargs", help="Arguments of the chat template as a JSON object.")
]
System: TypeAlias = Annotated[str | None, typer.Option(help="A system message.")]
MaxGenerations: TypeAlias = Annotated[int, typer.Option(min=1, help="Answers decoded at most, the first one included.")]
AllowDownload: TypeAlias = Annotated[bool, typer.Option("--allow-download", help="Let a Hugging Face id be fetched.")]
EngineOptions: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-option",
        metavar="NAME=VALUE",
        help="A further setting of the engine, such as path=plain, device_map=auto or adapter=FOLDER; again for more.",
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="JSON on stdout for machines; errors, too.")]
RetryErrors: TypeAlias = Annotated[
    bool, typer.Option("--retry-errors", help="Try prompts again that ended in an error.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingOptions:
    """Options of every command that loads a model; see :func:`grouped`."""

    model: Model = "smollm2"
    device: Device = "auto"
    dtype: Dtype = "auto"
    max_batch: MaxBatch = None
    allow_download: AllowDownload = False
    engine_option: EngineOptions = None

    def loading(self) -> Loading:
        """What jobs work with.

        Raises:
            ConfigurationError: an engine option without a value.
        """
        from tta_middleware.assembly import Loading

        return Loading(**self.loaded())

    def loaded(self) -> dict[str, Any]:
        """The same as arguments."""
        from tta_middleware.cli.typed import engine_options

        given = {option.name: getattr(self, option.name) for option in fields(LoadingOptions)}
        return given | {"engine_options": engine_options(given.pop("engine_option"))}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions(LoadingOptions):
    """Options of every command that gives guarded answers."""

    moderator: Moderator = "local"
    method: Method = DEFAULT_METHOD
    threshold: Threshold = None
    policy: PolicyText = None
    max_new_tokens: MaxNewTokens = 256
    temperature: Temperature = 0.0
    seed: Seed = 0
    max_generations: MaxGenerations = 82
    reasoning: ReasoningOption = "hide"
    max_reasoning_tokens: MaxReasoningTokens = None
    chat_template_kwargs: TemplateArguments = None
    prompt_check: PromptCheckOption = "off"

    def answering(self) -> AnswerSettings:
        """What jobs work with.

        Raises:
            ConfigurationError: a policy or a temperature that cannot be used.
        """
        from tta_middleware.assembly import AnswerSettings
        from tta_middleware.cli.typed import arguments_of, policy_of
        from tta_middleware.config import Budget, Reasoning
        from tta_middleware.types import Sampling

        return AnswerSettings(
            **self.loaded(),
            moderator=self.moderator,
            method=self.method,
            policy=policy_of(self.policy, self.threshold),
            sampling=Sampling(self.max_new_tokens, self.temperature, seed=self.seed),
            budget=Budget(generations=self.max_generations),
            reasoning=Reasoning(
                mode=self.reasoning,
                max_tokens=self.max_reasoning_tokens,
                template=arguments_of(self.chat_template_kwargs),
            ),
            prompt_check=self.prompt_check,
        )


def was_given(context: typer.Context, name: str) -> bool:
    """Whether the command line has that option, be it with its default."""
    # By name: typer brings a click of its own, whose enumeration is another one.
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


def refuse_useless(context: typer.Context, names: Iterable[str], because: str) -> None:
    """Refuse options that would change nothing: whoever gives one believes in its effect.

    Raises:
        ConfigurationError: one of ``names`` was given.
    """
    for name in names:
        if was_given(context, name):
            from tta_middleware.errors import ConfigurationError

            raise ConfigurationError(f"--{name.replace('_', '-')} changes nothing {because}; leave it out")


def grouped(kind: type[Any], **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command with one parameter of type ``kind``, which stands for an option per field.

    Args:
        kind: a dataclass whose fields are annotated as typer wants options.
        defaults: for this command, in place of the fields' own.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        written = signature(command, eval_str=True).parameters.values()
        [group] = [parameter.name for parameter in written if parameter.annotation is kind]

        @wraps(command)
        def called(**words: Any) -> None:
            asked = kind(**{field.name: words.pop(field.name) for field in fields(kind)})
            command(**words, **{group: asked})

        shown = [
            each
            for one in written
            for each in (_options(kind, defaults) if one.name == group else [one.replace(kind=Parameter.KEYWORD_ONLY)])
        ]
        called.__signature__ = signature(command).replace(parameters=shown)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        return called

    return decorate


def _options(kind: type[Any], defaults: dict[str, Any]) -> list[Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, field.default),
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]

"""What an auditor listens to on LangChain's side: chat models, their cache, and the hooks of an agent's middleware.

Text is held against what the guards inside let out, which is audited there. Tool calls are held, decoded, against what
was scored; so is every other string that a reader could see: reasoning, content blocks, additional arguments.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeAlias, get_args

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage, convert_to_messages
from langchain_core.outputs import ChatGenerationChunk, ChatResult

from tta_middleware.assembly import Runtime
from tta_middleware.chat_model.model import TTAChatModel
from tta_middleware.chat_model.tool_parsing import opening
from tta_middleware.guard.ledger import LONGEST
from tta_middleware.moderation.parts import InParts
from tta_middleware.policy import StagePolicies
from tta_middleware.testing.audit_request import AuditedRequest, Hearing, Terms, heard
from tta_middleware.testing.audit_rules import readable
from tta_middleware.types import ToolFormat

MakeTerms: TypeAlias = Callable[..., Terms]


def listen(auditor: Hearing) -> None:
    """Put listeners around what was imported so far."""
    auditor.replace(Runtime, "moderator", _resolved)
    _listen_to(auditor, TTAChatModel, _own_terms)
    if "tta_middleware.server.upstream" in sys.modules:
        answer = sys.modules["tta_middleware.server.upstream"].UpstreamAnswer
        auditor.replace(answer, "whole", _upstreams_whole)
        auditor.replace(answer, "stream", _upstreams_stream)
    if "tta_langchain_agents.chat_model" in sys.modules:
        _listen_to(auditor, sys.modules["tta_langchain_agents.chat_model"].GuardedChatModel, _guarded_terms)
    if "tta_langchain_agents.middleware" in sys.modules:
        _listen_to_middleware(auditor, sys.modules["tta_langchain_agents.middleware"].TTAMiddleware)


def _resolved(auditor: Hearing, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def moderator(self: Runtime, asked: Any, engine: Any = None) -> Any:
        found = original(self, asked, engine)
        auditor.hear(found, asked)
        return found

    return moderator


def _own_terms(model: TTAChatModel, settings: dict[str, Any]) -> Terms:
    """Of an answer for which no guard was asked: what a guard would have been made with."""
    given = settings.get("policy")
    stages = model._stages(model.policy if given is None else given)
    return Terms.of(stages.with_default(model.scorer.default_threshold))


def _guarded_terms(model: Any, _: dict[str, Any]) -> Terms:
    moderator = model.runtime.moderator(model.moderator)
    return Terms.of(StagePolicies.of(model.policy).with_default(moderator.default_threshold))


def _listen_to(auditor: Hearing, kind: type, terms: MakeTerms) -> None:
    """Results leave where the cache is asked, chunks where they are yielded."""
    label = kind.__name__
    for name, around in (
        ("_generate_with_cache", _results),
        ("_agenerate_with_cache", _aresults),
        ("_stream", _chunks),
        ("_astream", _achunks),
    ):
        auditor.replace(kind, name, _bound(around, f"{label}.{name.strip('_')}", terms))


def _bound(around: Callable[..., Any], label: str, terms: MakeTerms) -> Callable[[Hearing, Any], Any]:
    return lambda auditor, original: around(auditor, original, label, terms)


def _results(auditor: Hearing, original: Callable[..., Any], label: str, terms: MakeTerms) -> Callable[..., Any]:
    @wraps(original)
    def results(self: Any, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
        request = auditor.request(label)
        with request.current():
            result: ChatResult = original(self, messages, *args, **kwargs)
        _result_left(request, result, self, kwargs, terms)
        return result

    return results


def _aresults(auditor: Hearing, original: Callable[..., Any], label: str, terms: MakeTerms) -> Callable[..., Any]:
    @wraps(original)
    async def results(self: Any, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
        request = auditor.request(label)
        with request.current():
            result: ChatResult = await original(self, messages, *args, **kwargs)
        _result_left(request, result, self, kwargs, terms)
        return result

    return results


def _result_left(
    request: AuditedRequest, result: ChatResult, model: Any, settings: dict[str, Any], terms: MakeTerms
) -> None:
    if request.terms is None:
        request.stand_on(terms(model, settings))
    for generation in result.generations:
        message_left(request, generation.message, _names(settings))
    request.end()


def _names(settings: dict[str, Any]) -> list[str]:
    """Of the tools of a call in OpenAI's form: where a tool has to be called, the model does not write its name."""
    return [str(tool.get("function", {}).get("name")) for tool in settings.get("tools") or ()]


def _chunks(auditor: Hearing, original: Callable[..., Any], label: str, terms: MakeTerms) -> Callable[..., Any]:
    @wraps(original)
    def chunks(self: Any, messages: Any, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        request = auditor.request(label)
        message = _Streamed(request, _names(kwargs))
        items = original(self, messages, *args, **kwargs)
        try:
            while True:
                with request.current():
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                message.chunk(item)
                yield item
        finally:
            items.close()
            message.end()

    return chunks


def _achunks(auditor: Hearing, original: Callable[..., Any], label: str, terms: MakeTerms) -> Callable[..., Any]:
    @wraps(original)
    def chunks(self: Any, messages: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[ChatGenerationChunk, None]:
        request = auditor.request(label)
        message = _Streamed(request, _names(kwargs))
        return heard(request, original(self, messages, *args, **kwargs), message.chunk, message.end)

    return chunks


class _Streamed:
    """A message that leaves in chunks: its text is looked at as it goes, all the rest once it is there."""

    def __init__(self, request: AuditedRequest, names: Collection[str]) -> None:
        self._request, self._names = request, names
        self.whole: Any = None

    def chunk(self, chunk: ChatGenerationChunk) -> None:
        self.add(chunk.message)

    def add(self, message: Any) -> None:
        self._request.loose("text", message.text)
        self.whole = message if self.whole is None else self.whole + message

    def end(self) -> None:
        if self.whole is not None:
            message_left(self._request, self.whole, self._names)
        self._request.end()


def message_left(request: AuditedRequest, message: BaseMessage, names: Collection[str] = ()) -> None:
    """A message left: its text, its calls, and what else in it can be read. Tools called ``names`` are the user's."""
    for text in dict.fromkeys((message.text, *readable(message.text))):
        request.loose("text", text)
    trace = message.response_metadata.get("tta")
    if isinstance(trace, dict) and not request.label.startswith("TTAMiddleware"):
        request.marked(trace.get("mode"), trace.get("observed") or ())
        if request.label.startswith("GuardedChatModel") and trace.get("outcome") == "clean":
            request.as_read(message.text)
    for place, text in _parts(message, names):
        request.loose(place, text)
    for call in message.tool_calls if isinstance(message, AIMessage) else ():
        request.call("" if call["name"] in names else call["name"], call["args"])


def _parts(message: BaseMessage, names: Collection[str]) -> Iterator[tuple[str, str]]:
    blocks: Sequence[Any] = [] if isinstance(message.content, str) else message.content
    for block in blocks:
        if isinstance(block, dict):
            yield from (("content block", text) for text in readable(_block(block, names)))
    yield from (("additional argument", text) for text in readable(message.additional_kwargs))
    if isinstance(message, AIMessage):
        for broken in message.invalid_tool_calls:
            yield "invalid tool call", _of_the_model(broken["args"] or "", names)


def _of_the_model(call: str, names: Collection[str]) -> str:
    """A broken call without the beginning that ``tool_choice`` made it have, in which only the tool's name is said."""
    begun = [opening(kind, name) for kind in get_args(ToolFormat) for name in (*names, None)]
    return call.removeprefix(max((text for text in begun if call.startswith(text)), key=len, default=""))


def _block(block: dict[str, Any], names: Collection[str]) -> Any:
    """A block without what is looked at elsewhere: its text, or a call's arguments and the user's name for it."""
    repeated = {
        "text": "text",
        "tool_use": "input",
        "tool_call": "args",
        "tool_call_chunk": "args",
        "input_json_delta": "partial_json",
    }
    left_out = repeated.get(str(block.get("type")))
    own = {"name"} if left_out and block.get("name") in names else set()
    return {key: value for key, value in block.items() if key not in {left_out, *own}}


def _upstream_request(auditor: Hearing, answer: Any, way: str) -> AuditedRequest:
    """One answer of an upstream behind this package's server."""
    auditor.hear(answer.model.scorer)
    asked = {"off": (), "user": (answer.asked.last_user_text,), "all": tuple(answer.asked.texts)}
    terms = Terms.of(answer.stages, prompts=asked[answer.prompt_check])
    scorer = answer.model.scorer
    taken = scorer if getattr(scorer, "max_characters", None) else InParts(scorer, LONGEST)
    return auditor.request(f"UpstreamAnswer.{way}", terms.taken_by(taken))


def _upstreams_text(request: AuditedRequest, answer: Any, message: Any) -> None:
    """All of its text, to the letter: what its checked stream gave out, and what stands in for the rest of it.

    Where the answer is the upstream's own to its end, a broken call's words included, it was scored as one text.
    """
    trace = message.response_metadata.get("tta") or {}
    outcome = "handed over" if "handed_over" in trace else trace.get("outcome")
    if outcome == "clean":
        request.all_of(message.text)
    elif outcome != "unchecked":
        handed = ["".join(one.said_inside()) for one in request.inner if one.label.startswith("TTAChatModel")]
        # Behind JSON nothing stands in the text, and the refusal says it.
        nothing = (
            [""] if "refusal" in message.response_metadata and message.text.lstrip()[:1] in ("{", "[", "`") else []
        )
        stand_ins = [answer.model.settings.replacement, *handed, *nothing]
        request.stood_in_for(message.text, stand_ins, ended=bool(trace))


def _upstreams_whole(auditor: Hearing, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def whole(self: Any) -> Any:
        request = _upstream_request(auditor, self, "whole")
        with request.current():
            message = await original(self)
        request.gate(message.text)
        _upstreams_text(request, self, message)
        message_left(request, message)
        request.end()
        return message

    return whole


def _upstreams_stream(auditor: Hearing, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def stream(self: Any) -> AsyncGenerator[Any, None]:
        request = _upstream_request(auditor, self, "stream")
        message = _Streamed(request, ())

        def left(chunk: Any) -> None:
            request.gate(chunk.text)
            message.add(chunk)

        def end() -> None:
            if message.whole is not None:
                _upstreams_text(request, self, message.whole)
            message.end()

        return heard(request, original(self), left, end)

    return stream


@dataclass(frozen=True, slots=True)
class _Promise:
    """What a middleware was made with."""

    moderator: Any
    policy: Any
    notice: str
    results: bool

    def terms(self, auditor: Hearing) -> Terms | None:
        """None where the moderator is still a name, so that nobody can have asked it."""
        moderator = auditor.named(self.moderator) if isinstance(self.moderator, str) else self.moderator
        if moderator is None:
            return None
        policies = StagePolicies.of(self.policy).with_default(moderator.default_threshold)
        return Terms.of(policies, notices=frozenset({self.notice})).taken_by(moderator)


def _listen_to_middleware(auditor: Hearing, kind: type) -> None:
    auditor.replace(kind, "__init__", _made)
    for name in ("wrap_model_call", "wrap_tool_call", "before_agent", "before_model", "after_model", "after_agent"):
        if name in vars(kind):
            auditor.replace(kind, name, _hook)
        if f"a{name}" in vars(kind):
            auditor.replace(kind, f"a{name}", _ahook)


def _made(auditor: Hearing, original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        made = given.arguments
        promise = _Promise(made["moderator"], made["policy"], made["tool_notice"], made["check_tool_results"])
        auditor.keep_terms(self, promise)

    return init


def _hook(auditor: Hearing, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = auditor.request(f"TTAMiddleware.{original.__name__}")
        with request.current():
            found = original(self, *args, **kwargs)
        _hook_left(request, auditor.terms_of(self), found)
        return found

    return hook


def _ahook(auditor: Hearing, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = auditor.request(f"TTAMiddleware.{original.__name__}")
        with request.current():
            found = await original(self, *args, **kwargs)
        _hook_left(request, auditor.terms_of(self), found)
        return found

    return hook


def _hook_left(request: AuditedRequest, promise: _Promise | None, found: Any) -> None:
    """A middleware that is older than the auditor is not known to it."""
    if promise is None:
        return
    request.stand_on(promise.terms(request.auditor))
    messages = list(_messages(found))
    calls = {call["id"] for message in messages if isinstance(message, AIMessage) for call in message.tool_calls}
    for message in messages:
        if isinstance(message, ToolMessage) and (message.tool_call_id in calls or not promise.results):
            # Beside its call in one response stands LangChain's own repetition of it: a structured response.
            continue
        message_left(request, message)
    request.end()


def _messages(found: Any) -> Iterator[BaseMessage]:
    """The messages in what a hook gave back, in any of the shapes that LangGraph takes."""
    if isinstance(found, BaseMessage):
        yield found
    elif isinstance(found, dict):
        written: Any = found.get("messages", [])
        written = getattr(written, "value", written)
        yield from convert_to_messages(written if isinstance(written, list) else [written])
    elif isinstance(found, list):
        for item in found:
            yield from _messages(item)
    elif hasattr(found, "model_response"):
        yield from _messages(found.model_response)
        yield from _messages(found.command)
    elif hasattr(found, "result"):
        yield from _messages(found.result)
    elif hasattr(found, "goto"):
        yield from _messages(dict(found._update_as_tuples()))

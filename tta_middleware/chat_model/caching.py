"""What LangChain's cache may keep of a guarded model, and under which key.

A cached answer is served without being checked again. So a key holds whatever a decision depends on, the content of
the policy among it, and nothing is kept but answers that passed in full: a blocked one may come of an outage, an
unchecked one was never scored, a truncated one is half an answer.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final, Self

from langchain_core.caches import RETURN_VAL_TYPE, BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatResult

import tta_middleware
from tta_middleware.chat_model.refusal import PROVIDER

_PASSED: Final = frozenset({"clean", "neutralised"})
_COMPLETE: Final = frozenset({"stop", "length", "tool_calls"})


class UnknownPartError(Exception):
    """Raised where a part can be told from no other, so that no key holds for it."""


class Identities:
    """Names for objects that have none: the same for the life of an object, and never given to another one.

    A cache may be shared between processes, where an address would mean another object; so a name holds 16 random
    bytes of this process. Safe to share between threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._names: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._process = os.urandom(16).hex()
        os.register_at_fork(after_in_child=self._forked)

    def of(self, part: Any) -> str:
        """The object's name.

        Raises:
            UnknownPartError: the object cannot be watched, so its address may come to mean another one.
        """
        address = id(part)
        with self._lock:
            known = self._names.get(address)
            if known is not None and known[0]() is part:
                return known[1]
            try:
                watched = weakref.ref(part)
            except TypeError:
                raise UnknownPartError(type(part).__name__) from None
            self._names = {key: entry for key, entry in self._names.items() if entry[0]() is not None}
            name = f"{type(part).__qualname__}:{self._process}:{next(self._numbers)}"
            self._names[address] = (watched, name)
            return name

    def _forked(self) -> None:
        """A child's objects go their own ways, under the same addresses."""
        self._lock = threading.Lock()
        self._names, self._process = {}, os.urandom(16).hex()


identities: Final = Identities()


def name_of(part: Any) -> str | None:
    """How a part stands in a key: names and nothing as they are, objects by identity."""
    return part if part is None or isinstance(part, str) else identities.of(part)


def digest(part: str) -> str:
    """How a part stands in a key that nobody should read there."""
    return blake2b(part.encode(), digest_size=16).hexdigest()


class CheckedCache(BaseCache):
    """Another cache that is given, and gives, answers that passed in full only."""

    def __init__(self, inner: BaseCache) -> None:
        self._inner = inner

    def lookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        return _if_kept(self._inner.lookup(prompt, llm_string))

    async def alookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        return _if_kept(await self._inner.alookup(prompt, llm_string))

    def update(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        if _if_kept(return_val) is not None:
            self._inner.update(prompt, llm_string, return_val)

    async def aupdate(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        if _if_kept(return_val) is not None:
            await self._inner.aupdate(prompt, llm_string, return_val)

    def clear(self, **kwargs: Any) -> None:
        self._inner.clear(**kwargs)

    async def aclear(self, **kwargs: Any) -> None:
        await self._inner.aclear(**kwargs)


def _if_kept(generations: RETURN_VAL_TYPE | None) -> RETURN_VAL_TYPE | None:
    """The generations if all of them may be kept, else None."""
    return generations if generations and all(map(_passed, generations)) else None


def _passed(generation: Any) -> bool:
    message = getattr(generation, "message", None)
    metadata: Mapping[str, Any] = getattr(message, "response_metadata", None) or {}
    story = metadata.get("tta") or {}
    # Other providers have words of their own for an answer that ended well.
    complete = metadata.get("model_provider") != PROVIDER or metadata.get("finish_reason") in _COMPLETE
    return story.get("outcome") in _PASSED and complete


class CachesChecked(BaseChatModel):
    """A chat model whose answers are looked up, and kept, by what they depend on."""

    @abstractmethod
    def _decisive(self, stop: list[str] | None, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
        """What an answer, and the decision on it, depend on besides the conversation; plain data.

        Raises:
            UnknownPartError: a part cannot be told from others.
        """

    def _pinned(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The call's settings, with those fixed that may change between its key and its answer."""
        return dict(overrides)

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        try:
            return self._key(stop, kwargs)
        except UnknownPartError:
            return f"not kept: {os.urandom(16).hex()}"

    def _key(self, stop: list[str] | None, overrides: Mapping[str, Any]) -> str:
        about = {
            "package": tta_middleware.__version__,
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "output_version": self.output_version,
            **self._decisive(stop, overrides),
        }
        return json.dumps(about, sort_keys=True, default=_plain)

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        model, settings = self._cached(stop, kwargs, run_manager, async_api=False)
        return BaseChatModel._generate_with_cache(model, messages, stop, run_manager, **settings)

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        model, settings = self._cached(stop, kwargs, run_manager, async_api=True)
        return await BaseChatModel._agenerate_with_cache(model, messages, stop, run_manager, **settings)

    def _cached(
        self, stop: list[str] | None, overrides: Mapping[str, Any], run: Any, *, async_api: bool
    ) -> tuple[BaseChatModel, dict[str, Any]]:
        """This model with a cache that keeps what may be kept, and the settings of the call."""
        cache = self.cache if isinstance(self.cache, BaseCache) else get_llm_cache()
        if self.cache is False or cache is None:
            return self, dict(overrides)
        settings = self._pinned(overrides)
        if self._streams(run, settings, async_api=async_api):
            # A stream is checked window by window, a whole answer as a whole: neither stands in for the other.
            settings["stream"] = True
        try:
            self._key(stop, settings)
        except UnknownPartError:
            return self._with(False), settings
        return self._with(CheckedCache(cache)), settings

    def _with(self, cache: BaseCache | bool) -> Self:
        """This model with that cache; unchecked, since it is done with every call."""
        return BaseChatModel.model_copy(self, update={"cache": cache})

    def _streams(self, run: Any, settings: Mapping[str, Any], *, async_api: bool) -> bool:
        how = {"async_api": async_api, "run_manager": run, **settings}
        return self._should_use_protocol_streaming(**how) or self._should_stream(**how)


def _plain(value: Any) -> Any:
    """What JSON does not know: settings by their fields, anything else by identity."""
    if hasattr(value, "model_dump"):
        return {"kind": type(value).__qualname__, **value.model_dump()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return name_of(value)

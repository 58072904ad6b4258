"""The parts that all copies of a chat model share."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from tta_middleware.aio import process as _process
from tta_middleware.guard.quality import QualityGate
from tta_middleware.methods.base import Method
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.store import quality_for
from tta_middleware.protocols import Engine, Moderator
from tta_middleware.registry import resolve_engine, resolve_method, resolve_moderator


class Runtime:
    """Engines, moderators and methods by what they were asked for, each made once.

    LangChain's ``configurable_fields`` builds a new chat model per call. It hands the fields on, so a model that is
    held in this shared field is loaded once, while one in a private attribute would be loaded with every call. Copies,
    deep ones too, are this very object; what is pickled is an empty one, which loads where it is opened.
    """

    def __copy__(self) -> Runtime:
        return self

    def __deepcopy__(self, memo: Any) -> Runtime:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Runtime, ()

    def __init__(self) -> None:
        self._lock = _process.Lock()
        self._engines: dict[Hashable, Engine] = {}
        self._moderators: dict[str, Moderator] = {}
        self._methods: dict[str, Method | None] = {}
        self._gates: dict[str, QualityGate] = {}
        self._hashes: dict[str, str] = {}

    def engine(self, model: str | Engine, **options: Any) -> Engine:
        """The engine of ``model``; nothing is loaded yet."""
        if not isinstance(model, str):
            return resolve_engine(model)
        key = (model, *sorted(options.items()))
        with self._lock:
            if key not in self._engines:
                self._engines[key] = resolve_engine(model, **options)
            return self._engines[key]

    def moderator(self, moderator: str | Moderator) -> Moderator:
        """The moderator of that name, or the object itself."""
        if not isinstance(moderator, str):
            return resolve_moderator(moderator)
        with self._lock:
            if moderator not in self._moderators:
                self._moderators[moderator] = resolve_moderator(moderator)
            return self._moderators[moderator]

    def method(self, method: str | Method | None) -> Method | None:
        """The method of that name, or the object itself; names are looked up once, not with every answer."""
        if not isinstance(method, str):
            return resolve_method(method)
        with self._lock:
            if method not in self._methods:
                self._methods[method] = resolve_method(method)
            return self._methods[method]

    def gate(self, model: str | Engine) -> QualityGate:
        """The quality gate with the bounds of the model's profile; read once."""
        reference = _reference(model)
        with self._lock:
            if reference not in self._gates:
                self._gates[reference] = quality_for(reference)
            return self._gates[reference]

    def hash(self, model: str | Engine) -> str:
        """What identifies the model's weights; read once."""
        reference = _reference(model)
        with self._lock:
            if reference not in self._hashes:
                self._hashes[reference] = model_hash(reference)
            return self._hashes[reference]

    async def aclose(self) -> None:
        """Close what was made here; objects that the user passed in stay open."""
        with self._lock:
            made: list[Engine | Moderator] = [*self._engines.values(), *self._moderators.values()]
            self._engines.clear()
            self._moderators.clear()
        for part in made:
            await part.aclose()


def _reference(model: str | Engine) -> str:
    return model if isinstance(model, str) else model.model_id

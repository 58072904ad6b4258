"""One JSON line per request, without prompts, answers or keys."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tta_middleware.errors import place_of
from tta_middleware.http_api import ApiError

logger = logging.getLogger("tta_middleware.server")

REQUEST_ID = "x-request-id"
"""The header that tells a client its request's id."""


def new_id() -> str:
    """What the log calls a request."""
    return f"req_{secrets.token_hex(12)}"


@dataclass(slots=True)
class Record:
    """What is known of one request; its own task alone writes it."""

    id: str
    method: str
    path: str
    status: int | None = None
    key: str | None = None
    model: str | None = None
    policy: str | None = None
    mode: str | None = None
    stream: bool | None = None
    outcome: str | None = None
    reason: str | None = None
    category: str | None = None
    score: float | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    code: str | None = None
    disconnected: bool = False
    began: float = field(default_factory=time.monotonic)

    def tell(self, trace: Mapping[str, Any]) -> None:
        """How the answer ended, and, of one that is not simply the model's own, what decided and on which score."""
        self.outcome = trace.get("outcome")
        if self.outcome not in (None, "clean"):
            self.reason = trace.get("stop_reason")
        if (first := trace.get("baseline")) and first["flagged"]:
            self.category, self.score = first["category"], round(first["score"], 4)

    def write(self) -> None:
        """To the log; what is not known is left out."""
        values = asdict(self)
        values["seconds"] = round(time.monotonic() - values.pop("began"), 4)
        known = {name: value for name, value in values.items() if value is not None and value is not False}
        logger.info("request", extra={"tta": known})

    def failed(self, error: Exception, status: int) -> None:
        """Name an error that was answered with ``status``; where it happened is logged if it is the server's."""
        self.error = type(error).__name__
        if isinstance(error, ApiError):  # of its own making: an upstream's code may quote a text
            self.code = error.body["error"]["code"]
        if status >= 500:
            logger.error("error", extra={"tta": {"id": self.id, "status": status, **where(error)}})


def where(error: BaseException) -> dict[str, Any]:
    """Kind and place of an error; its message may quote a text, so it is left out."""
    place = place_of(error)
    cause = {"cause": where(error.__cause__)} if error.__cause__ else {}
    return {"error": type(error).__name__, **({"at": place} if place else {}), **cause}


class JsonLines(logging.Formatter):
    """Records as JSON objects; of an exception only its kind and place."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "tta", {}),
        }
        if record.exc_info and record.exc_info[1]:
            told |= where(record.exc_info[1])
        return json.dumps(told)

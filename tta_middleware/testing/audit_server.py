"""What an auditor listens to on the server's side: the fields in which a reply tells thoughts.

Text and calls of a reply come from a chat model, where they are audited; so do thoughts, but a client shows them
without looking whether they were meant for it. Each has to be made of what guards let out as thoughts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

from tta_middleware.testing.audit_request import Hearing
from tta_middleware.testing.audit_rules import covered_loosely

_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names that servers have for thoughts."""


def listen(auditor: Hearing) -> None:
    """Put listeners around the server's replies, if the server was imported."""
    if "tta_middleware.server.chat_reply" in sys.modules:
        reply = sys.modules["tta_middleware.server.chat_reply"].Reply
        auditor.replace(reply, "choice", _told)
        auditor.replace(reply, "chunk", _told)


def _told(auditor: Hearing, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        known = [request.thought for request in auditor.thoughtful]
        for field, text in _thoughts(found):
            if not covered_loosely(text.strip(), known):
                auditor.find(f"Reply.{original.__name__}", f"{field} left that no guard let out", text)
        return found

    return told


def _thoughts(reply: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for choice in reply.get("choices", (reply,)):
        said = choice.get("message") or choice.get("delta") or {}
        yield from ((field, said[field]) for field in _FIELDS if isinstance(said.get(field), str))

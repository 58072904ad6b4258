"""What LangChain knows errors and blocked answers as: a content block in the message, or errors of its own.

The message's own content stays text. LangChain derives content blocks by the provider that ``response_metadata``
names, and for this package's messages adds a ``refusal`` block where the policy's notice ends them.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from langchain_core.exceptions import ContextOverflowError, ModelRefusalError
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages import content as types
from langchain_core.messages.block_translators import register_translator

from tta_middleware.errors import ContextLengthError, UnsafeAnswerError
from tta_middleware.types import Trace

PROVIDER: Final = "tta_middleware"

REFUSAL: Final = "refusal"
"""Key of ``response_metadata`` for the notice that stands in for an answer, or ends it."""


class RefusedAnswerError(UnsafeAnswerError, ModelRefusalError):
    """Raised by a chat model with ``fallback="raise"``: an error of this package and of LangChain.

    ``trace`` tells what was tried, ``raw_message`` is the message that a fallback of ``refuse`` would have given.
    """

    def __init__(self, message: str, trace: Trace | None = None, raw_message: BaseMessage | None = None) -> None:
        # Neither parent's: the two take different arguments. The message is no part of what the error prints as.
        Exception.__init__(self, message, trace)
        self.trace = trace
        self.raw_message = raw_message


class LongConversationError(ContextLengthError, ContextOverflowError):
    """Raised by a chat model where a conversation is too long: an error of this package and of LangChain.

    ``SummarizationMiddleware`` with such a model for its summaries asks again with less.
    """


@contextmanager
def as_langchain_errors(notice: str) -> Generator[None, None, None]:
    """Raises errors as LangChain's, too, so that its fallbacks and middleware understand them.

    Raises:
        RefusedAnswerError: in place of an UnsafeAnswerError.
        LongConversationError: in place of a ContextLengthError.
    """
    try:
        yield
    except UnsafeAnswerError as error:
        raise RefusedAnswerError(str(error), error.trace, refused(notice, error.trace)) from None
    except ContextLengthError as error:
        raise LongConversationError(str(error)) from None


def refused(notice: str, trace: Trace | None) -> AIMessage:
    """The message that says no."""
    about: dict[str, Any] = {"model_provider": PROVIDER, **ending("content_filter"), REFUSAL: notice}
    if trace is not None:
        about |= {"model_name": trace.model, "tta": trace.as_dict()}
    return AIMessage(content=notice, response_metadata=about)


def ending(reason: str) -> dict[str, str]:
    """Why an answer ended, under the key that providers use and under LangChain's own."""
    return {"finish_reason": reason, "normalized_finish_reason": reason}


def _blocks(message: AIMessage) -> list[types.ContentBlock]:
    """The blocks that any message of this content has, and one for the refusal.

    A message whose content is blocks already, as with ``output_version="v1"``, is not asked for them again.
    """
    metadata = message.response_metadata
    plain = message.model_copy(
        update={"response_metadata": {name: value for name, value in metadata.items() if name != "model_provider"}}
    )
    blocks = plain.content_blocks
    notice = metadata.get(REFUSAL)
    if notice and not any(block["type"] == "refusal" for block in blocks):
        blocks.append(types.RefusalContentBlock(type="refusal", refusal=notice))
    return blocks


register_translator(PROVIDER, _blocks, _blocks)

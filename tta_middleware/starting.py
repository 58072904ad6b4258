"""Gets a method what it needs of the model and the conversation before its search begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tta_middleware.optimise.base import Method, Start
from tta_middleware.protocols import Engine
from tta_middleware.types import Message, PromptEmbeddings


async def prepare(
    engine: Engine,
    method: Method,
    messages: Sequence[Message],
    prompt: PromptEmbeddings,
    assistant_prefix: str,
    loss: float,
    rng: np.random.Generator,
) -> Start:
    """What ``method`` starts from."""
    return Start(prompt, loss, rng)

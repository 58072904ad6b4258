"""The paper's settings of its method, per model (arXiv 2604.26167)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from tta_middleware.errors import ConfigurationError
from tta_middleware.methods.geometry import StepNorm
from tta_middleware.methods.tsa import TSA

PAPER_STEPS: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "gpt-oss-20b": (0.01, 1.5),
        "qwen3-14b": (0.05, 2.5),
        "llama-3.1-8b-instruct": (0.1, 1.3),
        "phi-3.5-mini-instruct": (0.05, 2.5),
        "gemma-3-1b-it": (0.075, 1.75),
    }
)
"""(mu, eta) by model, in embedding units; found by the authors on 75 prompts each."""

_ALIASES: Final[Mapping[str, str]] = {"phi-3.5-mini": "phi-3.5-mini-instruct", "gemma-3-1b": "gemma-3-1b-it"}


def paper_preset(model: str, *, step_norm: StepNorm = "token") -> TSA:
    """The paper's method as it was run on ``model``: N = 8, K = 10, kappa = 0.2, every row moved, absolute units.

    Args:
        model: a key of :data:`PAPER_STEPS`; case and an organisation before a slash do not matter, so a Hugging Face
            id works, too.
        step_norm: the paper writes one norm for the matrix, the authors' earlier code takes one per token.

    Raises:
        ConfigurationError: the paper has no figures for this model.
    """
    name = model.rpartition("/")[2].lower()
    name = _ALIASES.get(name, name)
    if name not in PAPER_STEPS:
        close = difflib.get_close_matches(name, PAPER_STEPS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(PAPER_STEPS)}"
        raise ConfigurationError(f"the paper has no settings for {model!r}; {hint}")
    mu, eta = PAPER_STEPS[name]
    return TSA(
        probes=8, steps=10, mu=mu, eta=eta, kappa=0.2, step_norm=step_norm, rows="all", units="absolute"
    )  # fmt: skip

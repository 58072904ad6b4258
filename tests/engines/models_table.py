"""The table of models in docs/models.md, made of what the tests of families and templates assert.

python tests/engines/models_table.py
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

from families import FAMILIES, Family
from gguf_files import GGUF_FAMILIES, GPT_OSS
from test_strict_templates import GEMMA_2
from tool_templates import TEMPLATES

from tta_middleware.engines.prompt.template import render_prompt
from tta_middleware.engines.prompt.thoughts import GEMMA, HARMONY, find_marks
from tta_middleware.engines.prompt.tool_template import tool_format
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import Message

DOC = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: written by tests/engines/models_table.py -->", "<!-- end of families -->"


@dataclass(frozen=True)
class Convention:
    """How the chat templates of some families are made: a short one of our own with the same demands."""

    template: str
    tokens: tuple[str, ...] = ()


CONVENTIONS: Mapping[str, Convention] = {
    "ChatML": Convention(TEMPLATES["hermes"]),
    "ChatML, thinking": Convention(f"{TEMPLATES['hermes']}{{# <think> #}}"),
    "Llama": Convention(TEMPLATES["llama"]),
    "Qwen 3.5": Convention(f"{TEMPLATES['qwen3_coder']}{{# <think> #}}"),
    "Mistral": Convention(TEMPLATES["mistral"]),
    "Mistral 3": Convention(f"{TEMPLATES['mistral_v11']}{{# [THINK] #}}"),
    "Gemma": Convention(GEMMA_2),
    "Gemma 4": Convention(TEMPLATES["gemma4"], tuple(GEMMA.meanings)),
    "Harmony": Convention(TEMPLATES["harmony"], tuple(HARMONY.meanings)),
    "DeepSeek, thinking": Convention(TEMPLATES["deepseek_v3"], ("<think>", "</think>")),
    "GLM 4.5": Convention(f"{TEMPLATES['glm45']}{{# <think> #}}"),
    "Seed-OSS": Convention(f"{TEMPLATES['seed_oss']}{{# <seed:think> #}}"),
    "MiniMax M2": Convention(f"{TEMPLATES['minimax_m2']}{{# <think> #}}"),
}


def talks(convention: Convention, tokenizer: Any) -> tuple[str, str, str]:
    """What becomes of a system turn, of tools and of thoughts, with a chat template of that convention."""
    changed = copy.copy(tokenizer)
    changed.chat_template = convention.template
    rendered = render_prompt(changed, [Message("system", "Be brief."), Message("user", "Hello")], "", ())
    masked = tokenizer.decode([i for i, own in zip(rendered.token_ids, rendered.user_mask, strict=True) if own])
    system = "before the user's words" if "Be brief" not in masked else "among the user's words"
    assert "Be brief." in tokenizer.decode(rendered.token_ids)
    try:
        tools = tool_format(convention.template)
    except ConfigurationError:
        tools = "not declared"
    marks = find_marks(convention.tokens, convention.template)
    begins = marks.opening.strip().replace("|", "\\|") if marks else ""
    return system, tools, f"`{begins}`" if marks else "none"


def cells(family: Family) -> list[str]:
    packed = "yes" if family.path == "packed" else "no"
    return [
        f"`{family.model_type}`",
        family.known,
        packed,
        "yes",
        "yes" if family.vocabulary else "refused",
        as_gguf(family),
        family.talk or "its own",
    ]


def as_gguf(family: Family) -> str:
    """Whether a GGUF file of the family was seen to decode as the model that it was made of."""
    if family.model_type == GPT_OSS.model_type:
        return "refused"
    return "yes" if family.model_type in {known.model_type for known in GGUF_FAMILIES} else "-"


def table(tokenizer: Any) -> str:
    """Both tables, as they stand in the docs."""
    lines = ["| family | models | packed | plain | table readable for vLLM | GGUF | template |", "|---" * 7 + "|"]
    lines += [f"| {' | '.join(cells(family))} |" for family in FAMILIES]
    lines += ["", "| template | system turn | tool calls | thoughts begin with |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(talks(one, tokenizer))} |" for name, one in CONVENTIONS.items()]
    return "\n".join(lines)


def with_table(text: str, tables: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    from transformers import AutoTokenizer

    from tta_middleware.engines.models import resolve_model

    made = table(AutoTokenizer.from_pretrained(str(resolve_model("smollm2"))))
    DOC.write_text(with_table(DOC.read_text(encoding="utf-8"), made), encoding="utf-8")

"""Tokenizer and embedding table: all that an engine needs to know of a model that runs elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from tta_middleware.engines.prompt.control_tokens import mark_ids, silent_ids, thought_marks
from tta_middleware.engines.prompt.detokenise import REPLACEMENT, Detokeniser, TextAssembler
from tta_middleware.engines.prompt.table import TableFacts
from tta_middleware.engines.prompt.template import encode_lead, render_prompt
from tta_middleware.engines.prompt.thoughts import ThoughtSplitter
from tta_middleware.engines.reading import told
from tta_middleware.engines.torch_import import quiet_transformers
from tta_middleware.errors import ConfigurationError, ContextLengthError, EmbeddingShapeError
from tta_middleware.types import FloatMatrix, IntVector, Message, PromptEmbeddings, Thought

_CONTEXT_TOKENS, _MOST_CONTEXT = 4, 16
_IN_WORDS: Final = ("inside", "said")
_LOOKED_UP = 4096
_TABLE_NAMES: Final = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "backbone.embeddings.weight",
    "rwkv.embeddings.weight",
)
_SCALED_FAMILIES: Final = ("gemma", "gemma2", "gemma3_text")
_BY_LAYER: Final = ("gemma3n", "gemma4")


class Vocabulary:
    """Tokens and their input embeddings; shared by threads, read only.

    Attributes:
        table: (V, d) input embeddings.
        width: d.
        facts: what was computed of the table so far.
        context: most tokens a sequence may have; None if the model states no limit.
        eos_ids: ids that end an answer.
        marks: how the model marks its thoughts; None if it is not known to have any.
        scale: what rows of the table are multiplied with on look-up; 1 where the embedding module does what it takes.
        family_scale: what they are multiplied with somewhere on their way in models of this family; 1 for most.
    """

    scale = 1.0
    family_scale = 1.0

    def __init__(
        self, tokenizer: Any, embedding: torch.nn.Module, eos_ids: frozenset[int], context: int | None
    ) -> None:
        self.tokenizer = tokenizer
        self.embedding = embedding
        table = _dense_table(embedding)
        self.table = table
        self.width = int(table.shape[1])
        self.facts = TableFacts(table)
        self.device, self.dtype = table.device, table.dtype
        self.context = context
        self.marks = thought_marks(tokenizer)
        self._mark_ids = mark_ids(tokenizer, self.marks)
        self.eos_ids = eos_ids | self._ends_of_calls()
        self._special = silent_ids(tokenizer)

    def _ends_of_calls(self) -> frozenset[int]:
        """What ends a message to a tool ends the answer: behind it stands the result, which only the tool says."""
        calls = self.marks.calls if self.marks is not None else None
        ends = () if calls is None else (token_id for token_id, mark in self._mark_ids.items() if mark == calls.close)
        return frozenset(ends)

    def check_width(self, rows: FloatMatrix) -> None:
        """Raises EmbeddingShapeError if rows are not as wide as the table's, or not finite."""
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise EmbeddingShapeError(f"this model takes rows of {self.width} numbers, not an array of {rows.shape}")
        if not np.isfinite(rows).all():
            raise EmbeddingShapeError("the embeddings hold numbers that are not finite")

    def check_ids(self, token_ids: Sequence[int] | IntVector) -> None:
        """Raises EmbeddingShapeError for a token that the table has not: looked up beside others, it would fail all."""
        ids = np.asarray(token_ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self.table):
            raise EmbeddingShapeError(
                f"this model has the tokens 0 to {len(self.table) - 1}, and {ids.min()} to {ids.max()} came; "
                "are they another model's?"
            )

    def check_prompt(self, prompt: PromptEmbeddings) -> None:
        """Raises EmbeddingShapeError for a prompt that is not of this model."""
        self.check_width(prompt.matrix)
        self.check_ids(prompt.token_ids)

    def check_length(self, length: int) -> None:
        """Raises EmbeddingShapeError for a prompt without rows, ContextLengthError for one that fills the context."""
        if length == 0:
            raise EmbeddingShapeError("a prompt needs at least one embedding row")
        if self.context is not None and length > self.context - 1:
            # LangChain's client of OpenAI's protocol knows such an error by the first words.
            raise ContextLengthError(
                f"the prompt is too long: it has {length} tokens and the model's context is {self.context}; "
                "shorten the conversation"
            )

    def look_up(self, token_ids: Sequence[int]) -> Tensor:
        """(n, d) input embeddings of token ids."""
        with torch.inference_mode():
            rows: Tensor = self.embedding(torch.tensor(token_ids, dtype=torch.long, device=self.device))
        return rows

    def rows(self, token_ids: Sequence[int]) -> FloatMatrix:
        """The same as float32 numpy; any thread may ask, so torch's own threads stay out of it where they can.

        Raises:
            ConfigurationError: the table has no such token.
        """
        self._check_known(token_ids)
        plain = type(self.embedding) is torch.nn.Embedding and self.device.type == "cpu"
        if not plain or self.dtype not in (torch.bfloat16, torch.float32):
            matrix: FloatMatrix = self.look_up(token_ids).float().cpu().numpy()
            return matrix
        ids = np.asarray(token_ids, dtype=np.int64)
        if self.dtype == torch.float32:
            found: FloatMatrix = self.table.detach().numpy()[ids]
            return found if self.scale == 1.0 else found * np.float32(self.scale)
        # A bfloat16 is the upper half of a float32.
        halves: IntVector = self.table.detach().view(torch.uint16).numpy()[ids].astype(np.uint32)
        return (halves << 16).view(np.float32)

    def _check_known(self, token_ids: Sequence[int]) -> None:
        """Raises ConfigurationError for a token behind the end of the table."""
        if max(token_ids, default=0) >= len(self.table):
            raise ConfigurationError(
                f"the tokenizer gives the token {max(token_ids)}, and the model has embeddings for {len(self.table)}: "
                "they are not of the same model, or tokens were added to one alone; take both from one place"
            )

    def assembler(self, prompt: PromptEmbeddings, stop: Sequence[str]) -> TextAssembler:
        """The text of one answer to a prompt, thoughts apart."""
        detokeniser = Detokeniser(self._decode, skip=self._special, context=self._words_before(prompt))
        return TextAssembler(detokeniser, stop, ThoughtSplitter(self.marks, prompt.ends), self._mark_ids)

    def _words_before(self, prompt: PromptEmbeddings) -> list[int]:
        """The last tokens of the words that an answer goes on with; none where it begins.

        They begin with a whole character: half of one before the answer's first would spoil that, too, where
        characters are spelled in bytes (Llama 2, Mistral, Gemma).
        """
        context: list[int] = []
        if prompt.ends not in _IN_WORDS:
            return context
        for token_id in reversed(prompt.token_ids[-_MOST_CONTEXT:].tolist()):
            if token_id in self._special or token_id in self._mark_ids:
                break
            context.insert(0, token_id)
            if len(context) >= _CONTEXT_TOKENS and not self._decode(context).startswith(REPLACEMENT):
                break
        return context

    def prompt(
        self,
        messages: Sequence[Message],
        assistant_prefix: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        thought: Thought | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> PromptEmbeddings:
        """A conversation as rows; see :meth:`tta_middleware.engines.tokenised.TokenisedEngine.embed`."""
        rendered = render_prompt(self.tokenizer, messages, assistant_prefix, tools, thought, template)
        self.check_length(len(rendered.token_ids))
        return PromptEmbeddings(
            matrix=self.rows(rendered.token_ids),
            token_ids=np.array(rendered.token_ids, dtype=np.int64),
            user_mask=np.array(rendered.user_mask, dtype=np.bool_),
            ends=rendered.ends,
        )

    def closed_thought(self, prompt: PromptEmbeddings, token_ids: Sequence[int]) -> PromptEmbeddings:
        """See :class:`tta_middleware.protocols.ReasoningEngine`."""
        closing = "" if self.marks is None else self.marks.closing
        ids = [*token_ids, *encode_lead(self.tokenizer, [(closing, True)])]
        return PromptEmbeddings(
            np.concatenate([prompt.matrix, self.rows(ids)]),
            np.concatenate([prompt.token_ids, np.array(ids, dtype=np.int64)]),
            np.concatenate([prompt.user_mask, np.zeros(len(ids), dtype=np.bool_)]),
            ends="closed",
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        # Silent ids never come here, and a mark of a tool call is text even where it is a special token.
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


def _dense_table(embedding: torch.nn.Module) -> Tensor:
    """(V, d) rows as numbers: the module's own weight, or what it looks up where that is quantised or not in memory."""
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    # A tensor of a class of its own (torchao's) says that it is floating, whatever it holds.
    numbers = type(weight.data) is torch.Tensor and weight.is_floating_point()
    if numbers and weight.dim() == 2 and weight.device.type != "meta":
        return weight
    count: int = getattr(embedding, "num_embeddings", len(weight))
    device = "cpu" if weight.device.type == "meta" else weight.device
    with torch.inference_mode():
        ids = torch.arange(count, device=device)
        return torch.cat([embedding(part) for part in torch.split(ids, _LOOKED_UP)])


def load_vocabulary(folder: Path) -> Vocabulary:
    """Tokenizer and embedding table of a local model folder; none of its other weights are read.

    Raises:
        ModelNotFoundError: the folder lacks files.
        ConfigurationError: no embedding table is found, or there is one for every layer besides.
    """
    with quiet_transformers(), told(folder):
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    with quiet_transformers(), told(folder, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    text = config.get_text_config(decoder=True)
    if text.model_type.startswith(_BY_LAYER):
        raise ConfigurationError(
            f"{text.model_type} looks tokens up for every layer; only the transformers engine sends that along"
        )
    with told(folder):
        table, kept_as = _table(folder)
    embedding: torch.nn.Module = torch.nn.Embedding.from_pretrained(table)  # type: ignore[no-untyped-call]
    context: int | None = getattr(text, "max_position_embeddings", None)
    vocabulary = Vocabulary(tokenizer, embedding, _eos_ids(folder, text, tokenizer), context)
    if text.model_type in _SCALED_FAMILIES:
        # Rounded as the weights are, as in the model itself.
        vocabulary.family_scale = float(torch.tensor(vocabulary.width**0.5, dtype=kept_as))
    return vocabulary


def _table(folder: Path) -> tuple[Tensor, torch.dtype]:
    """The (V, d) table in float32, and the type that it is kept in."""
    for path in _weights(folder):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  not a mapping
                if name.endswith(_TABLE_NAMES):
                    table: Tensor = weights.get_tensor(name)
                    return table.float(), table.dtype
    raise ConfigurationError(f"no input embeddings in the safetensors files of {folder.name!r}")


def _weights(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return [folder / file for name, file in places.items() if name.endswith(_TABLE_NAMES)]
    return sorted(folder.glob("*.safetensors"))


def _eos_ids(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    found = [config.eos_token_id, tokenizer.eos_token_id]
    generation = folder / "generation_config.json"
    if generation.is_file():
        found.append(json.loads(generation.read_text()).get("eos_token_id"))
    lists = [ids if isinstance(ids, list | tuple) else [ids] for ids in found if ids is not None]
    return frozenset(int(token_id) for ids in lists for token_id in ids)

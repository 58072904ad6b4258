"""One GGUF model in memory, with room for several sequences; used by one thread at a time."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tta_llama_cpp.library import CBatch, GGUFParameters, library
from tta_middleware.errors import ConfigurationError, EngineError
from tta_middleware.types import FloatMatrix

ROWS = 512
"""Most tokens or rows of one pass."""

_TABLE = b"token_embd.weight"
_SEVERAL_POSITIONS = (8, 24, 40)
"""Kinds of rotary embedding that give a row of a picture more than one position (M-RoPE and its kin)."""


@dataclass(frozen=True, slots=True)
class Column:
    """Where one token or row of a pass belongs.

    Attributes:
        sequence: 0 up to the model's number of sequences.
        position: in that sequence.
        asked: whether the logits behind it are wanted.
    """

    sequence: int
    position: int
    asked: bool


class LlamaModel:
    """Weights and the keys and values of ``sequences`` sequences of at most ``context`` tokens each.

    Raises:
        ConfigurationError: llama.cpp cannot run the file from embeddings.
        EngineError: the file cannot be read, or memory does not suffice.
    """

    def __init__(self, path: Path, *, sequences: int, context: int, threads: int | None) -> None:
        self._library = found = library()
        self._context: int | None = None
        self._model: int | None = None
        parameters = found.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = found.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise EngineError(f"llama.cpp cannot read {path.name}; is the file complete?")
        self._vocabulary = found.llama_model_get_vocab(self._model)
        self.tokens = int(found.llama_vocab_n_tokens(self._vocabulary))
        self.width = int(found.llama_model_n_embd(self._model))
        self.architecture = self._architecture()
        self.context = min(context, int(found.llama_model_n_ctx_train(self._model)))
        try:
            self._refuse_what_was_not_tried()
            self._make_room(sequences, threads or len(os.sched_getaffinity(0)))
        except BaseException:
            self.close()
            raise

    def decode_tokens(self, token_ids: Sequence[int], columns: Sequence[Column]) -> npt.NDArray[np.float32]:
        """Run tokens; (asked, V) logits in the order of the columns, valid until the next pass."""
        tokens = np.array(token_ids, dtype=np.int32)
        return self._decode(CBatch(token=tokens.ctypes.data), tokens, columns)

    def decode_rows(self, rows: FloatMatrix, columns: Sequence[Column]) -> npt.NDArray[np.float32]:
        """Run (n, d) embeddings; (asked, V) logits in the order of the columns, valid until the next pass."""
        matrix = np.ascontiguousarray(rows, dtype=np.float32)
        return self._decode(CBatch(embd=matrix.ctypes.data), matrix, columns)

    def forget(self, sequence: int, *, start: int = 0) -> None:
        """Free what a sequence has at ``start`` and behind."""
        self._library.llama_memory_seq_rm(self._library.llama_get_memory(self._context), sequence, start, -1)

    def endings(self) -> frozenset[int]:
        """Ids of tokens that end an answer."""
        ends = self._library.llama_vocab_is_eog
        return frozenset(token_id for token_id in range(self.tokens) if ends(self._vocabulary, token_id))

    def close(self) -> None:
        """Free everything; idempotent."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    def _decode(self, batch: CBatch, held: Any, columns: Sequence[Column]) -> npt.NDArray[np.float32]:
        """``held`` is what the batch points to: it has to live as long as the call."""
        count = len(columns)
        positions = np.array([column.position for column in columns], dtype=np.int32)
        sequences = np.array([column.sequence for column in columns], dtype=np.int32)
        pointers = (sequences.ctypes.data + sequences.itemsize * np.arange(count)).astype(np.uintp)
        ones, asked = np.ones(count, dtype=np.int32), np.array([column.asked for column in columns], dtype=np.int8)
        batch.n_tokens, batch.pos, batch.n_seq_id = count, positions.ctypes.data, ones.ctypes.data
        batch.seq_id, batch.logits = pointers.ctypes.data, asked.ctypes.data
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise EngineError(f"llama.cpp could not run a pass of {count} tokens (code {code}); memory may be short")
        del held
        wanted = int(asked.sum())
        if not wanted:
            return np.empty((0, self.tokens), dtype=np.float32)
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (wanted, self.tokens))

    def _architecture(self) -> str:
        text = c.create_string_buffer(64)
        self._library.llama_model_meta_val_str(self._model, b"general.architecture", text, len(text))
        return text.value.decode(errors="replace")

    def _refuse_what_was_not_tried(self) -> None:
        kinds = ("has_encoder", "is_recurrent", "is_hybrid", "is_diffusion")
        found = [kind for kind in kinds if getattr(self._library, f"llama_model_{kind}")(self._model)]
        if self._library.llama_model_rope_type(self._model) in _SEVERAL_POSITIONS:
            found.append("several positions a row")
        if self.architecture.startswith(("gemma3n", "gemma4")):
            found.append("inputs by layer")
        if found:
            raise ConfigurationError(
                f"{self.architecture} ({', '.join(found)}) does not decode from embeddings alone here; "
                "use the transformers engine"
            )

    def _make_room(self, sequences: int, threads: int) -> None:
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = self.context * sequences, sequences
        parameters.n_batch = parameters.n_ubatch = ROWS
        parameters.n_outputs_max_per_seq = ROWS
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = self._library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise EngineError(
                f"memory does not suffice for {sequences} sequences of {self.context} tokens; lower either"
            )


def embedding_table(path: Path, tokens: int, width: int) -> npt.NDArray[np.float32]:
    """The (V, d) input embeddings of a GGUF file as numbers.

    Raises:
        EngineError: the file has none, or of another size.
    """
    found = library()
    header = found.gguf_init_from_file(os.fsencode(path), GGUFParameters(no_alloc=True))
    if not header:
        raise EngineError(f"llama.cpp cannot read {path.name}; is the file complete?")
    try:
        at = found.gguf_find_tensor(header, _TABLE)
        if at < 0:
            raise EngineError(f"{path.name} holds no input embeddings")
        start = found.gguf_get_data_offset(header) + found.gguf_get_tensor_offset(header, at)
        size, kind = found.gguf_get_tensor_size(header, at), found.gguf_get_tensor_type(header, at)
    finally:
        found.gguf_free(header)
    packed = np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(tokens, size // tokens))
    table: npt.NDArray[np.float32] = gguf.dequantize(np.asarray(packed), gguf.GGMLQuantizationType(kind))
    if table.shape != (tokens, width):
        raise EngineError(f"the input embeddings of {path.name} are {table.shape}, not {(tokens, width)}")
    return table

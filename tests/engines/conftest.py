"""The embedded model, shared by this folder's tests, and tiny models with random weights."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tta_middleware.engines.models import resolve_model
from tta_middleware.engines.torch_import import import_torch
from tta_middleware.engines.transformers import TransformersEngine

import_torch()
sys.path.append(str(Path(__file__).parent))

_TINY = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.4,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@pytest.fixture
def count_columns(monkeypatch: pytest.MonkeyPatch) -> Callable[[TransformersEngine], list[int]]:
    """How many columns each pass of an engine has, from now on, in a list that grows."""

    def count(engine: TransformersEngine) -> list[int]:
        forward, columns = engine._loaded.forward, []

        def counted(rows: Any, packed: Any) -> Any:
            columns.append(rows.shape[1])
            return forward(rows, packed)

        monkeypatch.setattr(engine._loaded, "forward", counted)
        return columns

    return count


@pytest.fixture(scope="session")
def tiny_sizes() -> dict[str, Any]:
    """Config arguments of a two-layer model."""
    return dict(_TINY)


@pytest.fixture(scope="session", autouse=True)
def _a_tokenizer_is_read_once() -> Iterator[None]:
    """Four fifths of the time that loading a tiny model takes are its tokenizer's, which is the same file each time.

    Each engine gets a tokenizer of its own around the same vocabulary; tests that change a vocabulary read theirs anew.
    """
    from transformers import AutoTokenizer

    read, known = AutoTokenizer.from_pretrained, {}

    def once(folder: Any, *rest: Any, **options: Any) -> Any:
        if rest or options != {"local_files_only": True, "trust_remote_code": False}:  # not as an engine asks
            return read(folder, *rest, **options)
        files = sorted(
            file for file in Path(folder).glob("**/*") if file.suffix in (".json", ".jinja", ".txt", ".model")
        )
        texts = [(str(file.relative_to(folder)), hashlib.sha1(file.read_bytes()).digest()) for file in files]
        if (key := tuple(texts)) not in known:
            known[key] = read(folder, **options)
        return copy.copy(known[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AutoTokenizer, "from_pretrained", once)
        yield


@pytest.fixture(scope="session")
def smollm2() -> Iterator[TransformersEngine]:
    engine = TransformersEngine("smollm2", dtype="float32")
    yield engine
    asyncio.run(engine.aclose())


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(resolve_model("smollm2")), local_files_only=True)


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[Any], Path]:
    """Writes a random model of a transformers config, with SmolLM2's tokenizer, as a model folder."""

    def save(config: Any) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(config.model_type)
        AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_folder(save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any]) -> Path:
    from transformers import LlamaConfig

    return save_model(LlamaConfig(**tiny_sizes))


@pytest.fixture(scope="session")
def hybrid_folder(save_model: Callable[[Any], Path], tiny_sizes: dict[str, Any]) -> Path:
    """A model with convolutions between its attention, which no packed pass runs."""
    from transformers import Lfm2Config

    kinds = {"layer_types": ["conv", "full_attention"], "pad_token_id": 0, "tie_word_embeddings": False}
    return save_model(Lfm2Config(**{**tiny_sizes, **kinds}))


@pytest.fixture
def hybrid(hybrid_folder: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(str(hybrid_folder), dtype="float64")
    yield engine
    asyncio.run(engine.aclose())


@pytest.fixture
def tiny(tiny_folder: Path) -> Iterator[TransformersEngine]:
    """A two-layer Llama in float64: batch and single agree exactly, and a step takes a few milliseconds."""
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    yield engine
    asyncio.run(engine.aclose())

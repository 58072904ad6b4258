"""Word vectors for the moderator: the input embeddings of SmolLM2, a small network over their mean, folded together.

A word's vector is the mean of its tokens' embeddings, centred and turned to its main directions. A text is the mean of
its words, frequent ones weighted down (Arora et al. 2017, "A simple but tough-to-beat baseline for sentence
embeddings"). One hidden layer can say "about harm, and no refusal", which a sum of words cannot.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from training.data import Row
from training.fit import source_weights
from tta_middleware.engines.models import resolve_model
from tta_middleware.engines.torch_import import import_torch
from tta_middleware.moderation.embedded.features import hash_words
from tta_middleware.moderation.embedded.vectors import MASS_STEPS, PRIOR_MASS, WordVectors

MODEL = "smollm2"
DIRECTIONS = 512
HIDDEN = 48
MIN_TEXTS = 2
FREQUENT = 1e-2
"""A word that makes up this share of all words weighs half."""

SHARE = 0.5
"""How much the network adds to the harm that the n-grams see."""

EPOCHS, BATCH, RATE, DECAY, DROPOUT = 30, 256, 2e-3, 0.3, 0.6

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """Known words, sorted by their hashes.

    Attributes:
        vectors: (words, directions), unit mean square.
        mass: (words,) uint8.
    """

    keys: NDArray[np.uint32]
    vectors: Matrix
    mass: NDArray[np.uint8]

    def presence(self, tokens: Sequence[Sequence[str]]) -> sp.csr_matrix:
        """(texts, words) the weight of each known word of a text."""
        found = [self._known(row) for row in tokens]
        ends = np.concatenate(([0], np.cumsum([len(row) for row in found])))
        columns = np.concatenate(found)
        data = self.mass[columns].astype(np.float32) / MASS_STEPS
        return sp.csr_matrix((data, columns, ends), shape=(len(found), len(self.keys)))

    def _known(self, tokens: Sequence[str]) -> NDArray[np.intp]:
        wanted = np.unique(hash_words(tokens).astype(np.uint32))
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return places[self.keys[places] == wanted]


def vocabulary(tokens: Sequence[Sequence[str]], directions: int = DIRECTIONS) -> Vocabulary:
    """The words of SmolLM2 itself, and those in two texts or more."""
    count, texts = Counter[str](), Counter[str]()
    for row in tokens:
        count.update(row)
        texts.update(set(row))
    folder = resolve_model(MODEL)
    words = sorted(_own_words(folder) | {word for word, number in texts.items() if number >= MIN_TEXTS})
    share = np.array([count[word] + 1 for word in words], dtype=np.float64)
    share /= share.sum()
    mass = np.rint(MASS_STEPS * FREQUENT / (FREQUENT + share)).astype(np.uint8)
    vectors = _turned(_embeddings(folder, words), np.sqrt(share) / np.sqrt(share).sum(), directions)
    keys, first = np.unique(hash_words(words).astype(np.uint32), return_index=True)
    return Vocabulary(keys, vectors[first], mass[first])


def _own_words(folder: Path) -> set[str]:
    """Tokens that begin a word and are plain letters, in lower case."""
    known = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    pieces = (token[1:].lower() for token in known if token.startswith("Ġ"))
    return {piece for piece in pieces if len(piece) > 1 and piece.isascii() and piece.isalpha()}


def _embeddings(folder: Path, words: Sequence[str]) -> NDArray[np.float64]:
    """(words, width) the mean embedding of a word's tokens inside a sentence."""
    from safetensors import safe_open
    from tokenizers import Tokenizer

    with safe_open(folder / "model.safetensors", "np") as file:
        table = file.get_tensor("model.embed_tokens.weight").astype(np.float64)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode_batch([f" {word}" for word in words], add_special_tokens=False)
    return np.stack([table[one.ids].mean(axis=0) for one in encoded])


def _turned(vectors: NDArray[np.float64], weight: NDArray[np.float64], directions: int) -> Matrix:
    centred = vectors - weight @ vectors
    _, turn = np.linalg.eigh((centred * weight[:, None]).T @ centred)
    turned = centred @ turn[:, ::-1][:, :directions]
    return np.asarray(turned / np.sqrt((turned**2).mean()), dtype=np.float32)


def fit(rows: Sequence[Row], presence: sp.csr_matrix, words: Vocabulary) -> WordVectors:
    """The network for ``harm`` on these rows, whose words ``presence`` holds; quantised as the artifact has it."""
    known = [i for i, row in enumerate(rows) if "harm" in row.targets]
    targets = np.array([rows[i].targets["harm"] for i in known])
    weight = source_weights([rows[i] for i in known], targets)
    means = _means(presence[known], words)
    centre, spread = means.mean(axis=0), float(means.std(axis=0).mean())
    first, bias, out, constant = _train((means - centre) / spread, targets, weight)
    first = first / spread
    return _folded(words, first, bias - centre @ first, out * SHARE, constant * SHARE)


def _means(presence: sp.csr_matrix, words: Vocabulary) -> Matrix:
    mass = np.asarray(presence.sum(axis=1), dtype=np.float32) + PRIOR_MASS
    return np.asarray(presence @ words.vectors / mass, dtype=np.float32)


def _train(inputs: Matrix, targets: NDArray[np.float64], weight: NDArray[np.float64]) -> tuple[Any, Any, Any, float]:
    """First layer (directions, hidden) and its bias, second layer (hidden,) and its constant."""
    torch = import_torch()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    nn = torch.nn
    first, second = nn.Linear(inputs.shape[1], HIDDEN), nn.Linear(HIDDEN, 1)
    net = nn.Sequential(nn.Dropout(DROPOUT / 3), first, nn.ReLU(), nn.Dropout(DROPOUT), second)
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    data, labels, weights = (torch.tensor(part, dtype=torch.float32) for part in (inputs, targets, weight))
    for epoch in range(EPOCHS):
        optimiser.param_groups[0]["lr"] = RATE * (1 - epoch / EPOCHS)
        for batch in torch.randperm(len(data)).split(BATCH):
            losses = nn.functional.binary_cross_entropy_with_logits(
                net(data[batch])[:, 0], labels[batch], reduction="none"
            )
            optimiser.zero_grad()
            (losses * weights[batch]).mean().backward()
            optimiser.step()
    layers = (first.weight.T, first.bias, second.weight[0])
    return *(layer.detach().double().numpy() for layer in layers), float(second.bias.item())


def _folded(words: Vocabulary, first: Any, bias: Any, out: Any, constant: float) -> WordVectors:
    """Words times the first layer, in int8 a column; rare outliers are clipped."""
    mass = words.mass.astype(np.float64)[:, None] / MASS_STEPS
    rows = words.vectors @ first * mass
    scale = np.quantile(np.abs(rows), 0.9995, axis=0) / 127
    quantised = np.clip(np.rint(rows / scale), -127, 127).astype(np.int8)
    return WordVectors(words.keys, quantised, words.mass, scale, bias, out, constant)

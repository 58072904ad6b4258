"""What repaired a prompt before, offered first when the same prompt is flagged again.

A memory holds moves, not texts: of a prompt only a keyed hash is kept, of its repair the difference of the embedding
rows in float16. Who has a memory's file can still find out whether a prompt that he guesses is in it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from tta_middleware.aio import process as _process
from tta_middleware.config import Settings
from tta_middleware.errors import ConfigurationError
from tta_middleware.methods.base import Method, Needs, Start
from tta_middleware.methods.moves import Recipe, proposal_of, read_recipes, recipe_of, short_hash, write_recipes
from tta_middleware.protocols import Learner, Optimiser
from tta_middleware.types import PromptEmbeddings, Proposal

MAX_ENTRIES = 512
MAX_BYTES = 32 * 2**20


class RepairMemory:
    """The moves that worked, by prompt; the one used longest ago goes first. Safe to share between threads.

    Args:
        max_entries: most moves that are kept.
        max_bytes: most memory that they take.

    Raises:
        ConfigurationError: a limit below 1.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        if min(max_entries, max_bytes) < 1:
            raise ConfigurationError("a memory's limits must be at least 1")
        self._limits = (max_entries, max_bytes)
        self._lock = _process.Lock()
        self._recipes: OrderedDict[str, Recipe] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._recipes)

    @property
    def nbytes(self) -> int:
        """Bytes of all moves."""
        return self._bytes

    def recall(self, key: str) -> Recipe | None:
        """The move that worked for this key."""
        with self._lock:
            if key in self._recipes:
                self._recipes.move_to_end(key)
            return self._recipes.get(key)

    def remember(self, key: str, recipe: Recipe) -> None:
        """Keep a move, in the place of an earlier one."""
        with self._lock:
            self._put(key, recipe)

    def forget(self, key: str) -> None:
        """Drop what is kept for this key."""
        with self._lock:
            self._drop(key)

    def save(self, path: Path) -> None:
        """Write all moves to a ``.npz`` file, together with those that are in it already.

        Raises:
            ConfigurationError: the file cannot be written, or is no memory.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{path}.lock"):
                merged = RepairMemory(*self._limits)
                merged._recipes.update(read_recipes(path) if path.exists() else {})
                with self._lock:
                    mine = dict(self._recipes)
                merged._bytes = sum(recipe.nbytes for recipe in merged._recipes.values())
                for key, recipe in mine.items():
                    merged._put(key, recipe)
                write_recipes(path, merged._recipes)
        except OSError as error:
            raise ConfigurationError(f"cannot write the repair memory {path}: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Add the moves of a file that :meth:`save` wrote.

        Raises:
            ConfigurationError: the file cannot be read, or is no memory.
        """
        recipes = read_recipes(path)
        with self._lock:
            for key, recipe in recipes.items():
                self._put(key, recipe)

    def _put(self, key: str, recipe: Recipe) -> None:
        self._drop(key)
        self._recipes[key] = recipe
        self._bytes += recipe.nbytes
        most, most_bytes = self._limits
        while len(self._recipes) > most or self._bytes > most_bytes:
            self._drop(next(iter(self._recipes)))

    def _drop(self, key: str) -> None:
        dropped = self._recipes.pop(key, None)
        self._bytes -= dropped.nbytes if dropped else 0


@dataclass(frozen=True, slots=True)
class Remembered:
    """A method that tries what repaired the same prompt before, and then goes on as ``method``.

    Attributes:
        memory: shared by all requests.
        scope: what besides the prompt a repair depends on; see :func:`scope_of`.
    """

    method: Method
    memory: RepairMemory
    scope: str

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def needs(self) -> Needs:
        return self.method.needs

    def build(self, start: Start) -> RememberedOptimiser:
        return RememberedOptimiser(self.method.build(start), self.memory, key_of(self.scope, start.prompt), start)


class RememberedOptimiser:
    """Asks the remembered move alone; if its answer does not end the search, the inner optimiser does the rest."""

    def __init__(self, inner: Optimiser, memory: RepairMemory, key: str, start: Start) -> None:
        self.name = inner.name
        self._inner, self._memory, self._key, self._start = inner, memory, key, start
        recipe = memory.recall(key)
        self._offer = proposal_of(recipe, start) if recipe else None
        self._offered: Proposal | None = None

    def ask(self, limit: int) -> list[Proposal]:
        if self._offer is not None and limit > 0:
            self._offered, self._offer = self._offer, None
            return [self._offered]
        return self._inner.ask(limit)

    def tell(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> None:
        pairs = [pair for pair in zip(proposals, losses, strict=True) if pair[0] is not self._offered]
        if pairs:
            self._inner.tell([proposal for proposal, _ in pairs], [loss for _, loss in pairs])

    def stop(self) -> tuple[str, ...]:
        return () if self._offer is not None else self._inner.stop()

    def accepted(self, proposal: Proposal) -> None:
        """Remember the move that worked."""
        if proposal is not self._offered:
            recipe = recipe_of(proposal, self._start)
            if recipe is not None:
                self._memory.remember(self._key, recipe)
        if isinstance(self._inner, Learner):
            self._inner.accepted(proposal)


def scope_of(model: str, policy: Settings) -> str:
    """A scope from a model's hash or name, and the policy: what is safe under one need not be under another."""
    return short_hash(f"{model}\n{policy.model_dump_json()}")


def key_of(scope: str, prompt: PromptEmbeddings) -> str:
    """The key of a prompt: a hash of its scope and its token ids."""
    ids = np.ascontiguousarray(prompt.token_ids, dtype="<i8").tobytes()
    return hashlib.blake2b(ids, digest_size=16, key=scope.encode()[:64]).hexdigest()

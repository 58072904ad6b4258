"""The repair memory: what is kept, how much, and what is offered."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware import Noise, Policy, Resample
from tta_middleware.errors import ConfigurationError
from tta_middleware.methods.base import Start
from tta_middleware.methods.memory import Remembered, RepairMemory, key_of, scope_of
from tta_middleware.methods.moves import Recipe, recipe_of
from tta_middleware.protocols import Learner
from tta_middleware.types import PromptEmbeddings, Proposal

RAISED = 0.4


def prompt(seed: int = 0, tokens: int = 6, width: int = 16) -> PromptEmbeddings:
    rng = np.random.default_rng(seed)
    mask = np.zeros(tokens, dtype=np.bool_)
    mask[2:-1] = True
    ids = rng.integers(0, 1000, tokens)
    return PromptEmbeddings(rng.standard_normal((tokens, width), dtype=np.float32), ids, mask)


def start(of: PromptEmbeddings, seed: int = 0, variants: Mapping[str, PromptEmbeddings] | None = None) -> Start:
    return Start(of, RAISED, np.random.default_rng(seed), variants=variants or {})


def repaired(method: Remembered, at: Start) -> Proposal:
    """Runs a search that takes the second answer of the first wave."""
    optimiser = method.build(at)
    wave = optimiser.ask(8)
    optimiser.tell(wave, [RAISED, -0.1][: len(wave)])
    assert isinstance(optimiser, Learner)
    optimiser.accepted(wave[-1])
    return wave[-1]


@pytest.fixture
def memory() -> RepairMemory:
    return RepairMemory()


@pytest.fixture
def method(memory: RepairMemory) -> Remembered:
    return Remembered(Noise(), memory, "scope")


def test_a_repaired_prompt_starts_from_what_worked(method: Remembered) -> None:
    winner = repaired(method, start(prompt()))
    again = method.build(start(prompt(), seed=9))
    [offer] = again.ask(8)
    assert np.abs(offer.matrix - winner.matrix).max() < 1e-2
    assert offer.label == "memory:noise"
    assert (offer.matrix[~prompt().user_mask] == prompt().matrix[~prompt().user_mask]).all()


def test_after_a_failed_offer_the_method_goes_on_as_without_a_memory(method: Remembered) -> None:
    repaired(method, start(prompt()))
    again, plain = method.build(start(prompt(), seed=9)), Noise().build(start(prompt(), seed=9))
    offer = again.ask(8)
    again.tell(offer, [RAISED])
    for _ in range(3):
        ours, theirs = again.ask(8), plain.ask(8)
        assert [p.matrix.tolist() for p in ours] == [p.matrix.tolist() for p in theirs]
        again.tell(ours, [RAISED] * len(ours))
        plain.tell(theirs, [RAISED] * len(theirs))


@pytest.mark.parametrize("change", ["prompt", "scope"])
def test_another_prompt_or_scope_is_not_offered_the_move(memory: RepairMemory, change: str) -> None:
    repaired(Remembered(Noise(), memory, "scope"), start(prompt()))
    asked = prompt(seed=1) if change == "prompt" else prompt()
    other = Remembered(Noise(), memory, "scope" if change == "prompt" else "another")
    assert [p.label for p in other.build(start(asked)).ask(8)] == ["noise", "noise"]


def test_a_scope_tells_models_and_policies_apart() -> None:
    scopes = {scope_of(model, Policy(threshold=t)) for model in ("a", "b") for t in (0.1, 0.2)}
    assert len(scopes) == 4
    assert key_of("a", prompt()) != key_of("b", prompt())


def test_an_answer_that_only_chance_made_safe_is_not_remembered(memory: RepairMemory) -> None:
    repaired(Remembered(Resample(), memory, "scope"), start(prompt()))
    assert len(memory) == 0


def test_a_move_under_a_reminder_is_offered_under_that_reminder() -> None:
    reminded = prompt(seed=3, tokens=9)
    at = start(prompt(), variants={"Be kind.": reminded})
    recipe = recipe_of(Proposal(reminded.matrix, prompt=reminded, label="reminder"), at)
    memory = RepairMemory()
    assert recipe is not None
    memory.remember(key_of("scope", at.prompt), recipe)
    method = Remembered(Noise(), memory, "scope")
    [offer] = method.build(at).ask(8)
    assert offer.prompt is reminded
    without = method.build(start(prompt())).ask(8)
    assert [p.label for p in without] == ["noise", "noise"]


def test_a_move_that_was_sampled_is_sampled_again(memory: RepairMemory) -> None:
    at = start(prompt())
    recipe = recipe_of(Proposal(prompt().matrix + np.float32(0.5), temperature=0.7, label="x"), at)
    assert recipe is not None
    memory.remember(key_of("scope", at.prompt), recipe)
    [offer] = Remembered(Noise(), memory, "scope").build(at).ask(8)
    assert offer.temperature == 0.7


def test_a_move_that_does_not_fit_the_prompt_is_left_out(memory: RepairMemory) -> None:
    at = start(prompt())
    memory.remember(key_of("scope", at.prompt), Recipe(np.array([40], np.int32), np.ones((1, 16), np.float16), "noise"))
    assert len(Remembered(Noise(), memory, "scope").build(at).ask(8)) == 2


def test_rows_that_move_alike_are_kept_once() -> None:
    at = start(prompt())
    matrix = at.prompt.matrix.copy()
    matrix[at.prompt.user_mask] = at.prompt.matrix[at.prompt.user_mask] + np.float32(1.0)
    recipe = recipe_of(Proposal(matrix, label="word"), at)
    assert recipe is not None
    assert recipe.delta.shape == (1, 16)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=40), st.integers(1, 6), st.integers(1, 400))
def test_a_memory_never_outgrows_its_limits(puts: Sequence[tuple[int, int]], most: int, most_bytes: int) -> None:
    memory = RepairMemory(most, most_bytes)
    for key, rows in puts:
        memory.remember(str(key), Recipe(np.arange(rows, dtype=np.int32), np.ones((rows, 8), np.float16), "x"))
        assert len(memory) <= most
        assert memory.nbytes <= most_bytes
    kept = [memory.recall(str(key)) for key in range(10)]
    assert sum(recipe.nbytes for recipe in kept if recipe) == memory.nbytes


def test_the_move_used_longest_ago_goes_first() -> None:
    memory = RepairMemory(max_entries=2)
    recipe = Recipe(np.array([0], np.int32), np.ones((1, 4), np.float16), "x")
    for key in ("old", "used"):
        memory.remember(key, recipe)
    memory.recall("old")
    memory.remember("new", recipe)
    assert [key for key in ("old", "used", "new") if memory.recall(key)] == ["old", "new"]


def test_a_forgotten_move_is_not_offered(method: Remembered, memory: RepairMemory) -> None:
    repaired(method, start(prompt()))
    memory.forget(key_of("scope", prompt()))
    assert len(memory) == memory.nbytes == 0


@pytest.mark.parametrize("limits", [(0, 1), (1, 0)])
def test_limits_below_one_are_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        RepairMemory(*limits)


class TestFile:
    def test_a_saved_memory_offers_the_same_move(
        self, method: Remembered, memory: RepairMemory, tmp_path: Path
    ) -> None:
        repaired(method, start(prompt()))
        memory.save(tmp_path / "deep" / "memory.npz")
        fresh = RepairMemory()
        fresh.load(tmp_path / "deep" / "memory.npz")
        [ours] = method.build(start(prompt())).ask(8)
        [loaded] = Remembered(Noise(), fresh, "scope").build(start(prompt())).ask(8)
        assert (ours.matrix == loaded.matrix).all()
        assert (ours.label, ours.temperature) == (loaded.label, loaded.temperature)

    def test_memories_of_several_processes_add_up(self, tmp_path: Path) -> None:
        path = tmp_path / "memory.npz"

        def save(number: int) -> None:
            mine = RepairMemory()
            mine.remember(str(number), Recipe(np.array([number], np.int32), np.ones((1, 4), np.float16), "x"))
            mine.save(path)

        threads = [threading.Thread(target=save, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        both = RepairMemory()
        both.load(path)
        assert sorted(key for key in map(str, range(6)) if both.recall(key)) == list("012345")

    def test_it_is_for_the_owner_alone_and_holds_no_token_ids(
        self, method: Remembered, memory: RepairMemory, tmp_path: Path
    ) -> None:
        repaired(method, start(prompt()))
        path = tmp_path / "memory.npz"
        memory.save(path)
        assert path.stat().st_mode & 0o077 == 0
        with np.load(path) as stored:
            assert sorted(stored.files) == ["delta0", "index", "rows0"]

    @pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04broken"])
    def test_a_broken_file_is_named(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "memory.npz"
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"memory\.npz"):
            RepairMemory().load(path)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="cannot read the repair memory"):
            RepairMemory().load(tmp_path / "none.npz")

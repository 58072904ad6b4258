"""Drawing tokens: greedy, tempered, nucleus."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_middleware.engines.decoding.sampling import next_tokens, seeded
from tta_middleware.types import Sampling


def draws(logits: torch.Tensor, count: int, **options: float) -> list[int | None]:
    samplings = [Sampling(seed=seed, **options) for seed in range(count)]
    return next_tokens(logits.expand(count, -1), samplings, [seeded(sampling) for sampling in samplings])


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    found = torch.tensor(draws(probabilities.log(), 4000, temperature=1.0)).bincount(minlength=4) / 4000
    assert torch.allclose(found, probabilities, atol=0.03)


def test_the_nucleus_is_the_smallest_set_that_reaches_its_mass() -> None:
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    for top_p, allowed in ((1e-300, {1}), (0.4, {1}), (0.79, {1, 3}), (0.81, {1, 2, 3})):
        assert set(draws(logits, 300, temperature=1.0, top_p=top_p)) == allowed


def test_a_flat_nucleus_larger_than_the_first_guess_is_whole() -> None:
    found = set(draws(torch.zeros(2000), 2000, temperature=1.0, top_p=0.9))
    assert len(found) > 1000


def test_cold_is_greedy_and_hot_is_not() -> None:
    logits = torch.tensor([1.0, 2.0, 1.5])
    assert set(draws(logits, 50, temperature=0.0)) == {1}
    assert set(draws(logits, 50, temperature=1e-9)) == {1}
    assert set(draws(logits, 50, temperature=100.0)) == {0, 1, 2}


def test_a_row_that_is_not_finite_is_told_and_the_others_are_not_disturbed() -> None:
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [3.0, 1.0]])
    for temperature in (0.0, 1.0):
        samplings = [Sampling(temperature=temperature)] * 3
        first, broken, last = next_tokens(logits, samplings, [seeded(s) for s in samplings])
        assert broken is None
        assert first is not None
        assert last is not None


@given(seed=st.integers(-(2**70), 2**70), top_p=st.floats(0.01, 1.0))
@settings(max_examples=50, deadline=None)
def test_every_seed_draws_a_possible_token_and_repeats(seed: int, top_p: float) -> None:
    logits = torch.tensor([[0.0, -float("inf"), 1.0, -float("inf")]])
    sampling = Sampling(temperature=1.0, top_p=top_p, seed=seed)
    [token] = next_tokens(logits, [sampling], [seeded(sampling)])
    assert token in (0, 2)
    assert [token] == next_tokens(logits, [sampling], [seeded(sampling)])

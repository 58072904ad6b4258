"""The ask/tell optimisers and their geometry, without a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tta_middleware import TSA, Noise, Resample
from tta_middleware.errors import ConfigurationError
from tta_middleware.methods.base import Start
from tta_middleware.methods.geometry import cosine, project_to_cone, relative_move, unit_step
from tta_middleware.protocols import Optimiser
from tta_middleware.types import FloatMatrix, PromptEmbeddings

matrices = arrays(np.float32, (3, 5), elements=st.floats(-4, 4, width=32))


def prompt(tokens: int = 6, width: int = 16, user: tuple[int, ...] = (2, 3, 4)) -> PromptEmbeddings:
    rng = np.random.default_rng(0)
    mask = np.zeros(tokens, dtype=np.bool_)
    mask[list(user)] = True
    return PromptEmbeddings(rng.standard_normal((tokens, width), dtype=np.float32), np.arange(tokens), mask)


def run(optimiser: Optimiser, loss: Callable[[FloatMatrix], float], limit: int, most: int = 500) -> list[FloatMatrix]:
    """Ask and tell until the optimiser stops; the points in the order of asking."""
    seen: list[FloatMatrix] = []
    while not optimiser.stop() and len(seen) < most:
        proposals = optimiser.ask(limit)
        seen.extend(proposal.matrix for proposal in proposals)
        optimiser.tell(proposals, [loss(proposal.matrix) for proposal in proposals])
    return seen


@example(np.full((3, 5), 1.0, dtype=np.float32), np.full((3, 5), -1.0, dtype=np.float32), 0.0)
@example(np.full((3, 5), 1.3557217e-22, dtype=np.float32), np.eye(3, 5, dtype=np.float32), 0.5)
@given(matrices, matrices, st.floats(0.0, 0.95))
def test_projection_lands_inside_the_cone_and_leaves_inner_points_alone(
    point: FloatMatrix, axis: FloatMatrix, kappa: float
) -> None:
    # Entries below 1e-38 have fewer digits, down to one: no float32 lies in that direction.
    assume(not 0.0 < np.abs(point).max() < 1e-34)
    projected = project_to_cone(point, axis, kappa)
    if cosine(point, axis) >= kappa:
        assert projected is point
    else:
        assert cosine(projected, axis) == pytest.approx(kappa, abs=1e-3) or cosine(projected, axis) >= kappa
        assert np.linalg.norm(projected) <= np.linalg.norm(point) * 1.001


@given(matrices, matrices, matrices, st.floats(0.05, 0.95))
def test_no_point_of_the_cone_is_nearer_than_the_projection(
    point: FloatMatrix, axis: FloatMatrix, other: FloatMatrix, kappa: float
) -> None:
    if np.vdot(point, axis) <= 0.0 or cosine(other, axis) < kappa:
        return
    projected = project_to_cone(point, axis, kappa)
    assert np.linalg.norm(point - projected) <= np.linalg.norm(point - other) + 1e-3


@given(matrices)
def test_a_step_has_unit_length_in_its_norm(gradient: FloatMatrix) -> None:
    whole = unit_step(gradient, "matrix")
    assert np.linalg.norm(whole) == pytest.approx(1.0, abs=1e-4) or not gradient.any()
    for row, source in zip(unit_step(gradient, "token"), gradient, strict=True):
        assert np.linalg.norm(row) == pytest.approx(1.0, abs=1e-4) or not source.any()


@pytest.mark.parametrize("method", [TSA(), TSA(step_norm="matrix"), Noise()])
def test_only_the_users_tokens_move(method: TSA | Noise) -> None:
    start = prompt()
    optimiser = method.build(Start(start, 1.0, np.random.default_rng(1)))
    for point in run(optimiser, lambda matrix: 1.0 + float(matrix[2, 0]), limit=4, most=40):
        assert np.array_equal(point[~start.user_mask], start.matrix[~start.user_mask])
        assert not np.array_equal(point[start.user_mask], start.matrix[start.user_mask])


def test_all_rows_move_when_told_so() -> None:
    start = prompt()
    (first,) = TSA(rows="all").build(Start(start, 1.0, np.random.default_rng(1))).ask(1)
    assert (first.matrix != start.matrix).any(axis=1).all()


@pytest.mark.parametrize("method", [TSA(), Noise()])
def test_equal_seeds_give_equal_searches_in_waves_of_any_size(method: TSA | Noise) -> None:
    def points(limit: int) -> list[FloatMatrix]:
        optimiser = method.build(Start(prompt(), 1.0, np.random.default_rng(7)))
        return run(optimiser, lambda matrix: 1.0 + float(matrix[3].sum()), limit=limit, most=30)

    if isinstance(method, TSA):
        pairs = zip(points(3), points(8), strict=False)
    else:
        pairs = zip(points(2), points(2), strict=False)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_tsa_descends_a_slope_until_it_is_safe() -> None:
    """A distance as loss: the forward difference must find the way that the score falls."""
    start = prompt()
    target = start.matrix.copy()
    target[start.user_mask] *= 0.3

    def loss(matrix: FloatMatrix) -> float:
        return float(np.linalg.norm(matrix - target) / np.linalg.norm(start.matrix - target)) - 0.7

    optimiser = TSA(eta=0.1, steps=60, probes=16).build(Start(start, loss(start.matrix), np.random.default_rng(0)))
    points = run(optimiser, loss, limit=16, most=2000)
    assert optimiser.stop() == ("base point under the threshold",)
    assert loss(points[-1]) < 0.0


def test_tsa_gives_out_base_points_only_and_asks_for_n_probes_between_them() -> None:
    optimiser = TSA(probes=3, steps=3).build(Start(prompt(), 0.5, np.random.default_rng(0)))
    kinds = []
    while not optimiser.stop():
        proposals = optimiser.ask(2)
        kinds.extend(proposal.releasable for proposal in proposals)
        optimiser.tell(proposals, [0.4] * len(proposals))
    assert kinds == [False, False, False, True, False, False, False, True]
    assert optimiser.stop() == ("3 steps",)


def test_tsa_stays_where_it_is_when_every_score_is_alike() -> None:
    start = prompt()
    optimiser = TSA(probes=2, steps=2).build(Start(start, 0.5, np.random.default_rng(0)))
    points = run(optimiser, lambda _: 0.5, limit=8)
    assert np.array_equal(points[-1], start.matrix)


def test_tsa_never_leaves_the_cone() -> None:
    start = prompt()
    rows = start.user_mask
    optimiser = TSA(eta=5.0, kappa=0.6, steps=6).build(Start(start, 0.5, np.random.default_rng(0)))
    while not optimiser.stop():
        proposals = optimiser.ask(8)
        for proposal in proposals:
            if proposal.releasable:
                assert cosine(proposal.matrix[rows], start.matrix[rows]) >= 0.6 - 1e-4
        optimiser.tell(proposals, [1.0 + float(p.matrix[2, 0]) for p in proposals])


def test_relative_units_scale_with_the_embeddings() -> None:
    """The same settings on a model with rows a hundred times as long make the same relative move."""
    small = prompt()
    large = small.moved(small.matrix * np.float32(100.0))

    def move(start: PromptEmbeddings) -> float:
        (probe,) = TSA().build(Start(start, 0.5, np.random.default_rng(0))).ask(1)
        return relative_move(probe.matrix[start.user_mask], start.matrix[start.user_mask])

    assert move(small) == pytest.approx(move(large), rel=1e-4)


def test_noise_grows_to_its_outer_radius_and_stays_there() -> None:
    start = prompt()
    optimiser = Noise(wave=1, waves=3, radius_from=0.5, radius_to=1.5).build(
        Start(start, 1.0, np.random.default_rng(0))
    )
    scale = float(np.linalg.norm(start.matrix[start.user_mask], axis=1).mean())
    radii = []
    for _ in range(5):
        (proposal,) = optimiser.ask(9)
        moved = proposal.matrix[start.user_mask] - start.matrix[start.user_mask]
        radii.append(float(np.linalg.norm(moved, axis=1).mean()) / scale)
        optimiser.tell([proposal], [1.0])
    assert radii == pytest.approx([0.5, 1.0, 1.5, 1.5, 1.5], rel=1e-4)


def test_resample_leaves_the_prompt_alone_and_raises_the_temperature() -> None:
    start = prompt()
    proposals = Resample(temperature=0.9, wave=3).build(Start(start, 1.0, np.random.default_rng(0))).ask(8)
    assert [proposal.temperature for proposal in proposals] == [0.9] * 3
    assert all(proposal.matrix is start.matrix for proposal in proposals)


@pytest.mark.parametrize("method", [TSA(), Noise()])
def test_a_prompt_without_user_tokens_cannot_be_moved(method: TSA | Noise) -> None:
    optimiser = method.build(Start(prompt(user=()), 1.0, np.random.default_rng(0)))
    assert optimiser.stop() == ("no movable tokens",)
    assert optimiser.ask(4) == []


@settings(max_examples=20)
@given(st.integers(1, 9))
def test_no_more_is_asked_for_than_allowed(limit: int) -> None:
    for method in (TSA(), Noise(wave=4), Resample(wave=4)):
        assert 1 <= len(method.build(Start(prompt(), 1.0, np.random.default_rng(0))).ask(limit)) <= limit


def test_a_foreign_or_broken_tell_is_refused() -> None:
    optimiser = Noise().build(Start(prompt(), 1.0, np.random.default_rng(0)))
    first, second = optimiser.ask(2)
    with pytest.raises(ValueError, match="NaN"):
        optimiser.tell([first], [float("nan")])
    optimiser.tell([first], [0.1])
    with pytest.raises(ValueError, match="told before"):
        optimiser.tell([first], [0.1])
    with pytest.raises(ValueError, match="as many losses"):
        optimiser.tell([second], [])


@pytest.mark.parametrize(
    "make",
    [
        lambda: TSA(probes=0),
        lambda: TSA(kappa=1.5),
        lambda: TSA(mu=-1.0),
        lambda: TSA(step_norm="row"),
        lambda: Noise(radius_from=2.0, radius_to=1.0),
        lambda: Resample(temperature=0.0),
        lambda: TSA(step=3),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError):
        make()

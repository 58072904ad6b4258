"""The paper's settings, as numbers and as moves."""

from __future__ import annotations

import numpy as np
import pytest

from tta_middleware.errors import ConfigurationError
from tta_middleware.methods.base import Start
from tta_middleware.methods.presets import PAPER_STEPS, paper_preset
from tta_middleware.types import PromptEmbeddings

PAPER = {
    "gpt-oss-20b": (0.01, 1.5),
    "Qwen/Qwen3-14B": (0.05, 2.5),
    "meta-llama/Llama-3.1-8B-Instruct": (0.1, 1.3),
    "phi-3.5-mini": (0.05, 2.5),
    "google/gemma-3-1b-it": (0.075, 1.75),
}


@pytest.mark.parametrize(("model", "steps"), PAPER.items())
def test_a_model_gets_the_papers_figures(model: str, steps: tuple[float, float]) -> None:
    preset = paper_preset(model)
    assert (preset.mu, preset.eta) == steps
    assert (preset.probes, preset.steps, preset.kappa, preset.rows) == (8, 10, 0.2, "all")


@pytest.mark.parametrize("model", PAPER_STEPS)
@pytest.mark.parametrize("step_norm", ["token", "matrix"])
def test_mu_and_eta_are_lengths_in_embedding_units_on_every_row(model: str, step_norm: str) -> None:
    rng = np.random.default_rng(1)
    # Rows of norm 40 so that a step of a few units stays far inside the cone.
    rows = (5.0 * rng.standard_normal((6, 64))).astype(np.float32)
    prompt = PromptEmbeddings(rows, np.arange(6), np.array([False, False, True, True, True, False]))
    preset = paper_preset(model, step_norm=step_norm)
    mu, eta = PAPER_STEPS[model]
    optimiser = preset.build(Start(prompt, 0.5, np.random.default_rng(0)))
    probes = optimiser.ask(82)
    spread = np.stack([probe.matrix - rows for probe in probes])
    assert len(probes) == 8
    assert spread.std() == pytest.approx(mu, rel=0.05)
    assert (spread.std(axis=(0, 2)) > 0.5 * mu).all()
    optimiser.tell(probes, rng.random(8).tolist())
    [base] = optimiser.ask(82)
    moved = base.matrix - rows
    lengths = np.linalg.norm(moved, axis=1) if step_norm == "token" else np.linalg.norm(moved)
    assert lengths == pytest.approx(eta, rel=1e-4)


def test_a_model_that_the_paper_has_not_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigurationError, match=r"did you mean 'llama-3.1-8b-instruct'"):
        paper_preset("llama-3.1-8b")
    with pytest.raises(ConfigurationError, match="known are gpt-oss-20b"):
        paper_preset("smollm2")

"""Weights in other layouts and types: what layers give, which are multiplied as one, and what a user sees of it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from test_families import LENGTHS, TEXTS, moved, own
from torch import nn

import tta_middleware.engines.decoding.loading as loading
from tta_middleware.engines.decoding.packing import (
    HalfLinear,
    PartOfLinear,
    SameRows,
    halves_run,
    pack_linear_layers,
)
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import GenerationRequest, Message, Sampling

needs_halves = pytest.mark.skipif(not halves_run(torch.device("cpu")), reason="FBGEMM is not in this torch")


def linear(seed: int = 0, *, inputs: int = 64, outputs: int = 48, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@needs_halves
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_about_the_same(bias: bool) -> None:
    layer = linear(bias=bias)
    given = rows(2, 7, 64)
    packed = HalfLinear(layer.weight, layer.bias)
    found, expected = packed(given), layer(given)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert packed(given[:, :0]).shape == (2, 0, 48)


@needs_halves
def test_halves_are_exact_for_weights_that_are_halves() -> None:
    layer, given = linear(bias=False), rows(5, 64)
    layer.weight.copy_(layer.weight.half())
    assert HalfLinear(layer.weight, None)(given).numpy() == pytest.approx(layer(given).numpy(), abs=1e-5)


@needs_halves
def test_what_is_not_finite_stays_in_its_row() -> None:
    layer, given = linear(), rows(4, 64)
    given[1, 3] = torch.nan
    found = HalfLinear(layer.weight, layer.bias)(given)
    assert torch.isfinite(found).all(dim=1).tolist() == [True, False, True, True]


class Three(nn.Module):
    """Layers as attention has them."""

    def __init__(self, *, biases: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        self.q, self.k, self.v = (linear(at, outputs=16 * (at + 1), bias=bias) for at, bias in enumerate(biases))
        self.o = linear(4, inputs=96, outputs=64)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        together: torch.Tensor = self.o(torch.cat([self.q(given), self.k(given), self.v(given)], dim=-1))
        return together


def packed_three(three: Three) -> Three:
    with SameRows(three) as same:
        three(rows(2, 64))
    assert pack_linear_layers(three, HalfLinear, same.groups()) == 4
    return three


@needs_halves
def test_layers_that_are_given_the_same_rows_are_multiplied_as_one() -> None:
    plain = Three()
    packed = packed_three(copy.deepcopy(plain))
    assert [type(layer) for layer in packed.children()] == [PartOfLinear, PartOfLinear, PartOfLinear, HalfLinear]
    for count in (1, 5):
        given = rows(count, 64)
        assert packed(given).numpy() == pytest.approx(plain(given).numpy(), abs=5e-3)
    # By themselves and in another order, each gives its own.
    one, other = rows(3, 64), rows(4, 64) + 1
    assert packed.k(one).numpy() == pytest.approx(plain.k(one).numpy(), abs=5e-3)
    assert packed.q(other).numpy() == pytest.approx(plain.q(other).numpy(), abs=5e-3)
    assert packed.k(one).numpy() == pytest.approx(plain.k(one).numpy(), abs=5e-3)


@needs_halves
def test_layers_that_cannot_be_one_stay_apart() -> None:
    some = packed_three(Three(biases=(True, False, True)))
    assert all(type(layer) is HalfLinear for layer in some.children())
    large = Three()
    large.q.weight[0, 0] = 1e6
    with SameRows(large) as same:
        large(rows(2, 64))
    # A weight that float16 does not hold stays as it is.
    assert pack_linear_layers(large, HalfLinear, same.groups()) == 3
    assert type(large.q) is nn.Linear


@needs_halves
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_that_is_not_merged_goes_on_working(tiny_folder: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(own(str(tiny_folder)), settings).eval()
    ids = torch.arange(10, 19)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        with SameRows(model) as same:
            model(ids)
        pack_linear_layers(model, HalfLinear, same.groups())
        found = model(ids).logits
    assert (found - expected).norm() < 0.005 * expected.norm()


def marked(family: Family) -> Any:
    quick = family.model_type == "qwen2"
    return pytest.param(family, id=family.model_type, marks=() if quick else pytest.mark.slow)


@needs_halves
@pytest.mark.parametrize("family", [marked(family) for family in FAMILIES if family.path == "packed"])
async def test_a_family_in_halves_decodes_as_with_weights_that_are_rounded_to_halves(
    family: Family, save_model: Callable[[Any], Path], tmp_path: Path
) -> None:
    folder, rounded = save_model(family.config()), tmp_path / "rounded"
    shutil.copytree(folder, rounded)
    model = own(str(folder))
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.weight.data = layer.weight.data.half().float()
    model.save_pretrained(str(rounded))
    found, scores, states = await told(TransformersEngine(str(folder), weights="float16", max_batch=2))
    same, same_scores, same_states = await told(TransformersEngine(str(rounded), dtype="float32", max_batch=2))
    assert found == same
    assert scores == pytest.approx(same_scores, rel=1e-3)
    assert states == pytest.approx(same_states, rel=1e-2, abs=1e-2)


async def told(engine: TransformersEngine) -> tuple[list[tuple[int, ...]], list[float], Any]:
    """Greedy tokens of three prompts on two places, one of them with moved rows; their likelihood; last states."""
    prompts = [await engine.embed([Message("user", text)]) for text in TEXTS]
    prompts[2] = moved(prompts[2])
    asked = [
        GenerationRequest(prompt, Sampling(max_new_tokens=count))
        for prompt, count in zip(prompts, LENGTHS, strict=True)
    ]
    texts = [done.token_ids for done in await engine.generate_batch(asked)]
    scores = await engine.mean_nll(prompts[1], texts)
    states = await engine.hidden_states(prompts)
    await engine.aclose()
    return texts, scores, states


@needs_halves
async def test_a_processor_without_bfloat16_gets_halves_and_whoever_names_a_type_gets_that(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_fast_bfloat16", lambda _: False)
    for options, kind in (({}, HalfLinear), ({"weights": "loaded"}, nn.Linear), ({"dtype": "float32"}, nn.Linear)):
        model = await loaded(str(tiny_folder), **options)
        assert type(model.lm_head) is kind
        assert model.dtype == torch.float32
    half = await loaded(str(tiny_folder))
    assert type(half.model.layers[0].self_attn.k_proj) is type(half.model.layers[1].mlp.gate_proj) is PartOfLinear
    # Nothing is kept twice but what is tied.
    assert [name for name, weight in half.named_parameters() if weight.dim() > 1] == ["model.embed_tokens.weight"]


async def loaded(folder: str, **options: Any) -> Any:
    engine = TransformersEngine(folder, device="cpu", **options)
    await engine.load()
    model: Any = engine._loaded
    await engine.aclose()
    return model.model


async def test_settings_that_cannot_be_are_refused(
    tiny_folder: Path, hybrid_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="weights is auto, loaded or float16, not 'int3'"):
        TransformersEngine(str(tiny_folder), weights="int3")
    with pytest.raises(ConfigurationError, match=r"multiplies in float32, and .* run in torch\.bfloat16"):
        await TransformersEngine(str(tiny_folder), dtype="bfloat16", weights="float16").load()
    with pytest.raises(ConfigurationError, match="for models that run packed, and this one runs plainly: it has conv"):
        await TransformersEngine(str(hybrid_folder), weights="float16").load()
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    with pytest.raises(ConfigurationError, match="for CPUs of x86 with AVX2"):
        await TransformersEngine(str(tiny_folder), dtype="float32", weights="float16").load()


def test_a_copy_keeps_the_setting(tiny_folder: Path) -> None:
    engine = copy.copy(TransformersEngine(str(tiny_folder), weights="float16"))
    assert engine._weights == "float16"

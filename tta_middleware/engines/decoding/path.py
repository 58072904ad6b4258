"""Which way a model runs: packed with others in one pass, or plain, by its own cache.

The packed pass is several times as fast for many sequences, and wrong for a model that keeps anything between columns
but keys and values. So three things are asked, the cheap ones first: what the config declares, what the masks and
attention of a short pass show (:mod:`.sight`), and whether a packed pass of two sequences gives what the model's own
pass gives for each. Any doubt, and the model runs plainly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from tta_middleware.engines.decoding.beside import Segment
from tta_middleware.engines.decoding.capacity import is_out_of_memory
from tta_middleware.engines.decoding.check import agree, precision, sample_ids
from tta_middleware.engines.decoding.kv_slots import KVSlots
from tta_middleware.engines.decoding.loaded import LoadedModel, PackedModel
from tta_middleware.engines.decoding.packed import Pass
from tta_middleware.engines.decoding.packing import ReorderedLinear, SameRows, kind_of_layers, pack_linear_layers
from tta_middleware.engines.decoding.plain_model import PlainModel
from tta_middleware.engines.decoding.sight import PROBE, NotPackable, Sight, read_sights
from tta_middleware.errors import ConfigurationError, EngineError

# Layers that keep keys and values of whole columns, limited by their masks alone.
_MERGEABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

T = TypeVar("T")

_FAILURES = (EngineError, TypeError, ValueError, AttributeError, RuntimeError, KeyError, NotImplementedError)


def prepared(model: Any, tokenizer: Any, *, path: str = "auto", weights: str = "auto") -> LoadedModel:
    """The model, ready to run the way that suits it, or the way that ``path`` names.

    Args:
        weights: how linear layers keep theirs; see :func:`.packing.kind_of_layers`.

    Raises:
        ConfigurationError: it cannot be decoded from embeddings, or not in the way that is asked for.
    """
    model.eval().requires_grad_(False)
    own_attention = model.config._attn_implementation
    try:
        if path == "plain":
            raise NotPackable("that was asked for")
        packed = _packed(model, tokenizer, own_attention)
    except NotPackable as reason:
        if path == "packed":
            raise ConfigurationError(f"this model cannot run packed: {reason}; use path='auto'") from reason
        if weights == "float16":
            raise ConfigurationError(
                f"weights={weights!r} is for models that run packed, and this one runs plainly: {reason}; leave it out"
            ) from reason
        if model.config._attn_implementation != own_attention:
            model.set_attn_implementation(own_attention)
        plain = PlainModel(model, tokenizer, str(reason))
        plain.look_into_it()
        return plain
    _pack_weights(packed, weights)
    return packed


def _packed(model: Any, tokenizer: Any, own_attention: str) -> PackedModel:
    config = model.config.get_text_config(decoder=True)
    _check_declared(model, config)
    own = LoadedModel(model, tokenizer, "")
    samples = [own.token_columns(sample_ids(own, count, seed)) for count, seed in ((9, 1), (6, 7))]
    model.set_attn_implementation(PROBE)
    sights = _tried(lambda: read_sights(config, lambda: own.whole(samples[0])))
    if sorted(sights) != list(range(config.num_hidden_layers)):
        raise NotPackable("not every layer of it attends")
    model.set_attn_implementation(own_attention)
    expected = _tried(lambda: [own.whole(columns) for columns in samples])
    packed = PackedModel(model, tokenizer, sights, _why(sights))
    try:
        _compare(packed, samples, expected)
    except NotPackable:
        packed.leave()
        raise
    return packed


def _pack_weights(packed: PackedModel, weights: str) -> None:
    """Let linear layers keep their weights as is asked for; those that are given the same rows become one product."""
    kind = kind_of_layers(weights, packed.device, packed.dtype)
    with SameRows(packed.model) as same:
        packed.measure()
    if kind is None:
        return
    if not pack_linear_layers(packed.model, kind, same.groups()) and weights == "float16":
        raise ConfigurationError(f"weights={weights!r} finds no plain linear layer in this model; leave it out")
    packed.measure()
    packed.steady = kind is ReorderedLinear


def _compare(packed: PackedModel, samples: list[Tensor], expected: list[Tensor]) -> None:
    found = _tried(lambda: _packed_pass(packed, samples))
    told = precision(packed.model)
    if not all(agree(one, other, told) for one, other in zip(found, expected, strict=True)):
        raise NotPackable("a packed pass of two sequences does not give what its own pass gives for each")


def _why(sights: dict[int, Sight]) -> str:
    kinds = {"chunks" if sight.chunk else "windows" if sight.window else "" for sight in sights.values()} - {""}
    limited = f", in {' and '.join(sorted(kinds))} where its own masks have them" if kinds else ""
    return f"its layers attend to the columns before{limited}; a packed pass gave what its own pass gives"


def _check_declared(model: Any, config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - _MERGEABLE_LAYERS
    if kinds:
        raise NotPackable(f"it has {', '.join(sorted(kinds))} layers, which keep something else than keys and values")
    if getattr(config, "kv_lora_rank", None):
        raise NotPackable("its cache holds compressed keys and values, which the packed pass would keep expanded")
    if not model._can_set_attn_implementation():
        raise NotPackable("its attention cannot be exchanged")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise NotPackable("its layers lie on several devices")


def _tried(work: Callable[[], T]) -> T:
    try:
        return work()
    except _FAILURES as exc:
        if is_out_of_memory(exc):
            raise
        raise NotPackable(f"a packed pass fails: {_short(exc)}") from exc


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _packed_pass(packed: PackedModel, samples: list[Tensor]) -> list[Tensor]:
    """Logits of both samples in one pass, the first behind four columns that have run; then of a step of both."""
    one, other = samples
    begun = Segment(one[:4], None, keep=4)
    first = packed.forward(begun.rows[None], Pass(KVSlots(0), [begun]))
    segments = [Segment(one[4:8], begun.prefix(), keep=4), Segment(other[:5], None, keep=5)]
    rest = packed.forward(torch.cat([one[4:8], other[:5]])[None], Pass(KVSlots(0), segments)).clone()
    slots = KVSlots(2)
    for segment in segments:
        slots.add(segment.prefix())
    slots.reserve()
    step = packed.forward(torch.stack([one[8], other[5]])[None], Pass(slots, []))
    return [torch.cat([first, rest[:4], step[:1]]), torch.cat([rest[4:], step[1:]])]

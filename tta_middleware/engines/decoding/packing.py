"""Keeps the weights of linear layers in the layout and the type that a CPU multiplies fastest.

PyTorch hands oneDNN plain weights, which are reordered again in every call. At the few rows of a decode step
that reordering is most of the work in bfloat16; the operators used here are those of torch.compile's own frozen graphs.
Processors that do not multiply bfloat16 read float32, and at few rows reading is most of the work: FBGEMM, which is
part of torch, reads half of the bytes and multiplies in float32 (docs/decisions/023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tta_middleware.errors import ConfigurationError

# float16 keeps 11 bits: rounding moves a weight by this share of it at most, unless it is very large or very small.
_ROUNDING = 2.0**-11
_PIECE = 1024


class PackedLinear(nn.Module):
    """A linear layer whose weight lies elsewhere; ``weight`` only tells shape and type.

    Args:
        weight: (out, in) of it.
        bias: (out,) of it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = torch.empty_like(weight, device="meta", requires_grad=False)
        self.bias = None if bias is None else bias.detach()

    @classmethod
    def takes(cls, _weight: Tensor) -> bool:
        """Whether this weight stays what it is."""
        return True


class ReorderedLinear(PackedLinear):
    """By oneDNN, in its own layout: the same numbers."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)

    def forward(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return product


class HalfLinear(PackedLinear):
    """By FBGEMM: weights in float16, all else in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(weight, self.bias)

    @classmethod
    def takes(cls, weight: Tensor) -> bool:
        """Whether rounding moves it by no more than it moves numbers of usual size."""
        # In pieces, so that an output layer is not there several times at once.
        parts = [(part.half().float() - part).norm() for part in torch.split(weight, _PIECE)]
        return bool(torch.stack(parts).norm() <= _ROUNDING * weight.norm())

    def forward(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(rows, self._packed)
        return product


class _Shared:
    """One product for layers that are given the same rows: query, key and value say. Owned by the decode thread."""

    def __init__(self, product: PackedLinear, parts: int) -> None:
        self._product, self._parts = product, parts
        self._rows: Tensor | None = None
        self._found: Tensor | None = None
        self._left = 0

    def of(self, rows: Tensor) -> Tensor:
        """The product of ``rows``, worked out once for all parts and then let go."""
        if self._found is None or self._rows is not rows:
            self._rows, self._found, self._left = rows, self._product(rows), self._parts
        found = self._found
        self._left -= 1
        if not self._left:
            self._rows = self._found = None
        return found


class PartOfLinear(nn.Module):
    """What one of several layers takes of their common product."""

    def __init__(self, linear: nn.Linear, shared: _Shared, first: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.empty_like(linear.weight, device="meta", requires_grad=False)
        self.bias = None
        self._shared, self._mine = shared, slice(first, first + linear.out_features)

    def forward(self, rows: Tensor) -> Tensor:
        return self._shared.of(rows)[..., self._mine]


class SameRows:
    """Notes which plain linear layers of a module are given the very same rows in a pass, in a ``with`` block."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: list[tuple[nn.Module, str, Tensor]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> SameRows:
        for parent in self._model.modules():
            for name, child in parent.named_children():
                if _plain(child):
                    self._hooks.append(child.register_forward_pre_hook(self._noting(parent, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _noting(self, parent: nn.Module, name: str) -> Any:
        def note(_layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            # The rows are kept until the end: of tensors that are gone another may take the place.
            self._calls.append((parent, name, given[0]))

        return note

    def groups(self) -> list[tuple[nn.Module, list[str]]]:
        """Modules and the names of two or more of their layers; then nothing is kept of the pass."""
        found: dict[tuple[int, int], tuple[nn.Module, list[str]]] = {}
        called: dict[tuple[int, str], int] = {}
        for parent, name, rows in self._calls:
            found.setdefault((id(parent), id(rows)), (parent, []))[1].append(name)
            called[id(parent), name] = called.get((id(parent), name), 0) + 1
        self._calls = []
        return [
            (parent, names)
            for parent, names in found.values()
            if len(names) > 1 and all(called[id(parent), name] == 1 for name in names)
        ]


def kind_of_layers(weights: str, device: torch.device, dtype: torch.dtype) -> type[PackedLinear] | None:
    """What plain linear layers become; None where they stay what they are.

    Args:
        weights: ``loaded``, ``float16``, or ``auto``: float16 where the model runs in float32 and that is fast, else
            as loaded.

    Raises:
        ConfigurationError: this torch or this processor cannot keep weights so.
    """
    if weights == "auto" and dtype == torch.float32 and halves_run(device):
        return HalfLinear
    if weights in ("auto", "loaded"):
        return ReorderedLinear if can_pack(device, dtype) else None
    if not halves_run(device) or dtype != torch.float32:
        raise ConfigurationError(
            f"weights={weights!r} is for CPUs of x86 with AVX2 and multiplies in float32, and this model would run in "
            f"{dtype} on {device}; leave weights out, or use device='cpu' and no dtype"
        )
    return HalfLinear


def halves_run(device: torch.device) -> bool:
    """Whether FBGEMM is here, which multiplies float16 weights with float32 rows."""
    return (
        device.type == "cpu"
        and torch.backends.quantized.engine in ("x86", "fbgemm")
        and hasattr(torch.ops.quantized, "linear_dynamic_fp16")
    )


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have oneDNN's products of bfloat16."""
    operators: Any = torch.ops.mkldnn
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and hasattr(operators, "_reorder_linear_weight")
        and hasattr(operators, "_linear_pointwise")
        and bool(operators._is_mkldnn_bf16_supported())
    )


def pack_linear_layers(
    model: nn.Module, kind: type[PackedLinear], groups: Sequence[tuple[nn.Module, list[str]]] = ()
) -> int:
    """Replace plain linear layers, one after the other so that few weights are there twice; how many were replaced.

    A weight tied to the embedding table is kept there as well.

    Args:
        groups: of :meth:`SameRows.groups`, to be multiplied as one.
    """
    before = sum(_plain(layer) for layer in model.modules())
    with torch.inference_mode():
        for parent, names in groups:
            _pack_together(parent, names, kind)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if _plain(child) and kind.takes(child.weight):
                    setattr(parent, name, kind(child.weight.detach(), child.bias))
    return before - sum(_plain(layer) for layer in model.modules())


def _pack_together(parent: nn.Module, names: Sequence[str], kind: type[PackedLinear]) -> None:
    layers: list[nn.Linear] = [getattr(parent, name) for name in names]
    all_biases: list[Tensor | None] = [layer.bias for layer in layers]
    biases = [bias for bias in all_biases if bias is not None]
    if len(biases) not in (0, len(layers)) or not all(kind.takes(layer.weight) for layer in layers):
        return
    weights: list[Tensor] = [layer.weight for layer in layers]
    product = kind(torch.cat(weights), torch.cat(biases) if biases else None)
    shared, first = _Shared(product, len(layers)), 0
    for name, layer in zip(names, layers, strict=True):
        setattr(parent, name, PartOfLinear(layer, shared, first))
        first += layer.out_features


def _plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether nothing wraps it and its weight is here: no adapter, no quantised weight, no layer on its way in."""
    return type(layer) is nn.Linear and not hasattr(layer, "_hf_hook") and layer.weight.device.type != "meta"

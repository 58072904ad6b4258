"""Tiny checkpoints as tools of quantisation write them, made by hand: each beside the same weights as numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_E2M1 = torch.tensor([sign * value for sign in (1, -1) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])

Written: TypeAlias = tuple[dict[str, Tensor], Tensor]
"""What a checkpoint holds for a weight, by the end of its name, and the weight that this stands for."""

Writer: TypeAlias = Callable[[Tensor], Written]


def gptq(weight: Tensor) -> Written:
    """4 bits in columns of eight, one scale for 32 inputs; zeros are kept less one."""
    levels, scales = _drawn(weight)
    zeros = torch.full_like(scales, 8).long()
    kept = {
        ".qweight": _packed(levels, 0),
        ".qzeros": _packed(zeros - 1, 1),
        ".scales": scales.half(),
        ".g_idx": (torch.arange(len(levels)) // GROUP).int(),
    }
    return kept, _times(levels, zeros, scales)


def awq(weight: Tensor) -> Written:
    """4 bits in rows of eight, in the order of its kernels."""
    levels, scales = _drawn(weight)
    zeros = torch.randint(6, 10, scales.shape)
    kept = {
        ".qweight": _packed(levels, 1, _AWQ_ORDER),
        ".qzeros": _packed(zeros, 1, _AWQ_ORDER),
        ".scales": scales.half(),
    }
    return kept, _times(levels, zeros, scales)


def pack_quantized(weight: Tensor) -> Written:
    """compressed-tensors, 4 bits by groups."""
    levels, scales = _drawn(weight)
    kept = {
        ".weight_packed": _packed(levels.T.contiguous(), 1),
        ".weight_scale": scales.T.contiguous(),
        ".weight_shape": torch.tensor(weight.shape),
    }
    return kept, _times(levels, torch.full_like(scales, 8).long(), scales)


def int_quantized(weight: Tensor) -> Written:
    """compressed-tensors, 8 bits by rows."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    levels = (weight / scales).round().to(torch.int8)
    return {".weight": levels, ".weight_scale": scales}, levels * scales


def fp8(weight: Tensor) -> Written:
    """8-bit floats in blocks of 32 x 32."""
    blocks = weight.unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP))
    scales = blocks.abs().amax((1, 3)) / 448
    spread = scales.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    kept = (weight / spread).to(torch.float8_e4m3fn)
    return {".weight": kept, ".weight_scale_inv": scales}, kept.float() * spread


def mxfp4(weight: Tensor) -> Written:
    """(experts, inputs, outputs): 4-bit floats by 32 inputs, whose scale is a power of two."""
    experts, inputs, outputs = weight.shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // GROUP, GROUP // 2), dtype=torch.uint8)
    scales = torch.randint(122, 126, blocks.shape[:-1], dtype=torch.uint8)
    values = torch.stack([_E2M1[(blocks & 15).long()], _E2M1[(blocks >> 4).long()]], dim=-1).flatten(3)
    whole = (values * torch.exp2(scales.float() - 127)[..., None]).flatten(2).transpose(1, 2).contiguous()
    return {"_blocks": blocks, "_scales": scales}, whole


def write(
    folder: Path, target: Path, writer: Writer, ends: Sequence[str], settings: Mapping[str, Any]
) -> tuple[Path, Path]:
    """A model folder with weights whose names end with ``ends`` quantised, and one with them as numbers."""
    torch.manual_seed(0)
    kept: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(tuple(ends)):
            kept[name] = whole[name] = weight
            continue
        parts, whole[name] = writer(weight)
        kept |= {name.removesuffix(".weight") + end: part for end, part in parts.items()}
    for place, weights in (("quantised", kept), ("whole", whole)):
        shutil.copytree(folder, target / place)
        save_file(weights, target / place / "model.safetensors", metadata={"format": "pt"})
    config = target / "quantised" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": dict(settings)}))
    return target / "quantised", target / "whole"


def _drawn(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(inputs, outputs) levels of 4 bits, and a scale for each group of inputs."""
    outputs, inputs = weight.shape
    return torch.randint(0, 16, (inputs, outputs)), (torch.rand(inputs // GROUP, outputs) * 0.05 + 0.02).half().float()


def _times(levels: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    spread = (part.repeat_interleave(GROUP, 0) for part in (zeros, scales))
    return ((levels - next(spread)) * next(spread)).T.contiguous()


def _packed(levels: Tensor, dim: int, order: Sequence[int] = range(8)) -> Tensor:
    """Eight levels in each 32-bit number, along ``dim``."""
    parts = levels.long().unflatten(dim, (-1, 8)).movedim(dim + 1, 0)
    words = sum((parts[which] << (4 * place) for place, which in enumerate(order)), torch.zeros_like(parts[0]))
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()

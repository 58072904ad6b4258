"""Decode steps that are recorded once and replayed as a whole (CUDA graphs).

A step of a model with a billion weights is some 700 small kernels. Launching them from Python takes 10 ms where the
GPU needs 2 to run them, so a step that comes again is recorded: for a number of slots and of columns in each group,
both rounded up, in the buffers as they are. What differs from step to step (rows, lengths) is read from memory. A step
that cannot be recorded, and every pass with prompts or texts to score in it, is launched kernel by kernel.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tta_middleware.engines.decoding.capacity import is_out_of_memory
from tta_middleware.engines.decoding.kv_slots import KVSlots, Shape
from tta_middleware.engines.decoding.packed import AnyStep, Pass

_log = logging.getLogger(__name__)

Compute: TypeAlias = Callable[[Tensor, Pass], Tensor]

# Recording takes as long as one or two launched steps, so a shape has to come a few times to be worth it.
_WORTH_RECORDING = 4

_STEADY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def steady_kernels(device: torch.device) -> Iterator[None]:
    """Keep attention away from kernels that are planned anew for every length, in every thread (cuDNN's, 40 ms each).

    Torch keeps this choice for all threads; another thread's attention may run without cuDNN meanwhile.
    """
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(_STEADY):
        yield


class Recorder:
    """Recordings by shape, for one model and the slots that it was last used with; used by the decode thread alone.

    Attributes:
        possible: whether this model's steps can be recorded, as far as is known.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._recordings: dict[Shape, _Recording] = {}
        self._seen: Counter[Shape] = Counter()
        self._given_up: set[Shape] = set()
        self._version: int | None = None
        self._pool: Any = None
        self.possible = True

    @property
    def count(self) -> int:
        """Recordings there are."""
        return len(self._recordings)

    def step(self, rows: Tensor, packed: Pass) -> Tensor | None:
        """Logits (n, V) of a step with (1, n, d) rows, valid until the next; None if it has to be computed."""
        if not self.possible or not packed.only_decodes:
            return None
        slots = packed.slots
        if slots.version != self._version:
            self.forget()
            self._version = slots.version
        shape = slots.rounded()
        recording = self._recordings.get(shape) or self._new(shape, rows, slots)
        return recording.replay(rows, slots.step_lengths, slots.group_sizes) if recording is not None else None

    def forget(self) -> None:
        """Give the memory of all recordings back."""
        self._recordings.clear()
        self._seen.clear()
        self._given_up.clear()
        self._pool = None

    def _new(self, shape: Shape, rows: Tensor, slots: KVSlots) -> _Recording | None:
        self._seen[shape] += 1
        if self._seen[shape] < _WORTH_RECORDING or shape in self._given_up:
            return None
        # One pool for all: they run one at a time, and what one leaves there is read before the next runs.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            self._recordings[shape] = _Recording(self._compute, shape, rows, slots, self._pool)
        except Exception as exc:  # noqa: BLE001  whatever stands against recording, the step itself can still be computed
            slots.reserve()
            self._given_up.add(shape)
            if not is_out_of_memory(exc):
                self.possible = False
                _log.info("decode steps of this model are not recorded: %s", exc)
        return self._recordings.get(shape)


class _Recording:
    """One step, with the memory that it reads and writes."""

    def __init__(self, compute: Compute, shape: Shape, like: Tensor, slots: KVSlots, pool: Any) -> None:
        self._shape, count = shape, sum(slots_taken for slots_taken, _ in shape)
        device = like.device
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.device(device):
            self._rows = torch.zeros((1, count, like.shape[-1]), dtype=like.dtype, device=device)
            self._lengths = torch.zeros(count, dtype=torch.long, device=device)
            torch.cuda.synchronize(device)
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream), _capture(self._graph, pool):
                self._logits = compute(self._rows, AnyStep(slots, self._lengths, shape))

    def replay(self, rows: Tensor, lengths: list[int], sizes: list[int]) -> Tensor:
        """Logits (n, V) of (1, n, d) rows behind n lengths, ``sizes`` of them in each group."""
        placed, at, start = [0] * len(self._lengths), 0, 0
        parts: list[Tensor] = []
        with torch.inference_mode():
            for size, (recorded, _) in zip(sizes, self._shape, strict=True):
                self._rows[:, start : start + size] = rows[:, at : at + size]
                placed[start : start + size] = lengths[at : at + size]
                parts.append(self._logits[start : start + size])
                at, start = at + size, start + recorded
            self._lengths.copy_(torch.tensor(placed))
            self._graph.replay()
            return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    # By thread: other threads look embeddings up meanwhile. torch.cuda.graph would also empty the allocator's cache.
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()

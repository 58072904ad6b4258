"""How much memory the keys and values of running sequences may take."""

from __future__ import annotations

from pathlib import Path

import torch

_SHARE = 0.5
_UNKNOWN = 4 * 2**30
_KEPT_SHARE = 0.25
_MOST_KEPT_IN_MAIN_MEMORY = 2**30


def default_budget(device: torch.device) -> int:
    """Bytes: half of what is free on the device now; 4 GiB where that cannot be told."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free * _SHARE)
    if device.type == "mps":
        return int((torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()) * _SHARE)
    free_here = [free for free in (_free_of_machine(), _free_of_group()) if free is not None]
    return int(min(free_here) * _SHARE) if free_here else _UNKNOWN


def default_batch(device: torch.device) -> int:
    """Sequences decoded side by side: a GPU has more to gain from a wide pass (docs/scaling.md, "On a GPU")."""
    return 128 if device.type == "cuda" else 32


def default_prefix_budget(device: torch.device, budget: int) -> int:
    """Bytes of ``budget`` for what has run, while nobody runs it: a quarter, in main memory at most 1 GiB of it."""
    share = int(budget * _KEPT_SHARE)
    return min(share, _MOST_KEPT_IN_MAIN_MEMORY) if device.type == "cpu" else share


# Allocations that torch's own allocator does not make: on CPUs, and CUDA's and cuBLAS's for themselves.
_NO_MEMORY = ("allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch has a class of its own for some of these errors only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _free_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _free_of_group() -> int | None:
    """What a container's limit leaves (cgroup 2)."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))

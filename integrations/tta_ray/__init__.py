"""Guarded answers for many prompts on a Ray cluster.

python -m tta_ray prompts.jsonl answers/ --model vllm-server:/models/llama@http://a:8000 --actors 2,8
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tta_middleware.errors import MissingExtraError

if TYPE_CHECKING:
    from tta_ray.dataset import Pool, answered
    from tta_ray.job import RayJob, run_job

__all__ = ["Pool", "RayJob", "answered", "run_job"]

# Ray reports usage to its makers unless told otherwise before it starts.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def __getattr__(name: str) -> Any:
    modules = {"Pool": "dataset", "answered": "dataset", "RayJob": "job", "run_job": "job"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("ray") is None:
        raise MissingExtraError('Ray is not installed; run: pip install "tta-middleware[ray]"')
    return getattr(import_module(f"tta_ray.{modules[name]}"), name)

"""Guarded answers as a step of a Ray Data pipeline."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import ray.data

from tta_middleware.assembly import AnswerSettings
from tta_middleware.errors import ConfigurationError
from tta_ray.worker import GuardActor

COLUMN = "text"
"""The column that ``ray.data.read_text`` makes, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Who works.

    Attributes:
        actors: the fewest and the most; Ray adds some while there is work and room, and takes idle ones away.
        concurrency: prompts under way at once in an actor; about what its engine decodes side by side.
        cpus: that Ray sets aside for an actor.
        gpus: likewise.
        retries: how often work that died with its actor is begun again.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    actors: tuple[int, int] = (1, 1)
    concurrency: int = 32
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.actors[0] <= self.actors[1]:
            raise ConfigurationError(f"actors are the fewest and the most, at least 1, such as 2,8; not {self.actors}")
        if self.concurrency < 1 or self.retries < 0 or self.cpus < 0 or self.gpus < 0:
            raise ConfigurationError("concurrency must be at least 1; retries, cpus and gpus must not be negative")

    @property
    def rows(self) -> int:
        """Rows of one task: what is lost and begun again with an actor, and what is written together."""
        return max(1, min(16, self.concurrency // 4))

    @property
    def tasks(self) -> int:
        """Tasks that an actor works on at once, enough for its ``concurrency``."""
        return math.ceil(self.concurrency / self.rows)


def answered(
    dataset: ray.data.Dataset, answering: AnswerSettings, pool: Pool | None = None, *, column: str = COLUMN
) -> Any:
    """The dataset with the answer in place of the prompt; lazy, like all of Ray Data.

    ``column`` holds a JSON object a row, with ``prompt`` or ``messages``, and ``id`` and ``sampling`` if wanted: a line
    of a prompts file, as ``ray.data.read_text`` reads it. Afterwards it holds ``id`` and ``answer``, ``outcome``,
    ``finish_reason`` and ``trace``, or ``error``. A task is a block of the dataset, so blocks should be small
    (``dataset.repartition(target_num_rows_per_block=pool.rows)``).
    """
    pool = pool or Pool()
    with warnings.catch_warnings():
        # Before 2.64 nothing else says how often a task is begun again; without a bound a prompt can kill for ever.
        warnings.filterwarnings("ignore", ".*ray_remote_args_fn.*deprecated")
        return dataset.map_batches(
            GuardActor,
            fn_constructor_args=(answering, pool.concurrency, column),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.actors[0],
                max_size=pool.actors[1],
                max_concurrent_calls_per_actor=pool.tasks,
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": pool.retries},
        )

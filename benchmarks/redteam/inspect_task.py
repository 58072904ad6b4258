"""An inspect_ai task: every line of the file that TTA_ATTACKS names is asked once. Runs in inspect_ai's environment."""

import os

from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.solver import generate


@task
def attacks() -> Task:
    return Task(json_dataset(os.environ["TTA_ATTACKS"]), solver=[generate()], config=GenerateConfig(temperature=0.0))

"""Ray on this machine; the whole folder is skipped where Ray is not installed (`make test-ray` installs it)."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from staged_plugin import installed

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

if importlib.util.find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]

ENTRY_POINTS = """
[tta_middleware.engines]
staged = staged_on_ray:engine

[tta_middleware.moderators]
words = staged_on_ray:words
"""


def pytest_collection_modifyitems(items):
    """Warnings of Ray and its kin are not ours."""
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def plugin(tmp_path_factory):
    """A folder that holds the staged parts as an installed distribution."""
    return installed(tmp_path_factory.mktemp("plugin"), Path(__file__).with_name("staged_on_ray.py"), ENTRY_POINTS)


@pytest.fixture(scope="session")
def staged(plugin, tmp_path_factory):
    """Where engines tell of themselves; the environment of this process and of all workers points there."""
    folder = tmp_path_factory.mktemp("staged")
    os.environ["STAGED_FOLDER"] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(plugin), os.environ.get("PYTHONPATH", "")]))
    sys.path.insert(0, str(plugin))
    return folder


@pytest.fixture
def stage(staged):
    """The same folder, empty."""
    for path in staged.iterdir():
        path.unlink()
    return staged


@pytest.fixture(scope="session")
def cluster(staged):
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture
def jsonl(tmp_path):
    """Writes objects (or raw bytes) as lines of a file."""

    def write(*lines):
        path = tmp_path / "in.jsonl"
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"".join(line + b"\n" for line in raw))
        return path

    return write

"""Settings for all tests."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import certifi
import pytest
from hypothesis import settings

from tta_middleware.defaults import PASSIVE, WAIT_POLICY

# Before anything imports torch: spinning OpenMP threads stall small products when a core is busy.
os.environ.setdefault(WAIT_POLICY, PASSIVE)

# Workers of pytest-xdist run side by side: with a thread for every processor each they would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whatever collection makes stays to the end: nothing is to be found there before it has ended.
gc.disable()

# A shell starts background jobs with interrupts ignored, and processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: wall time is no property of the code, least of all on a busy machine.
settings.register_profile("tta", deadline=None, print_blob=True)
settings.load_profile("tta")

pytest_plugins = ["tta_middleware.testing.plugin"]

# What tests of several folders share lies here.
sys.path.append(str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    """One certificate for all: a client reads a whole bundle in 25 ms, and these speak plain HTTP."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # it was set by the process that started this worker
        return
    folder, end = TemporaryDirectory(), "-----END CERTIFICATE-----\n"
    config.add_cleanup(folder.cleanup)
    first, _, _ = Path(certifi.where()).read_text().partition(end)
    one = Path(folder.name) / "one.pem"
    one.write_text(first + end)
    os.environ["SSL_CERT_FILE"] = str(one)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays to the end: the collector need not look at it again, in full half a second each time."""
    gc.collect()
    gc.freeze()
    # Looking through all objects of a test that come to 7,000 each time is a fiftieth of the whole run's work.
    gc.set_threshold(10_000)
    gc.enable()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes objects (or raw bytes) as lines of a file."""

    def write(name: str, *lines: object) -> Path:
        path = tmp_path / name
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"".join(line + b"\n" for line in raw))
        return path

    return write

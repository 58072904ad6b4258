"""A real server on a loopback port, in a thread of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tta_middleware.http_api import KEEP_ALIVE_SECONDS
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.moderation.server import create_app
from tta_middleware.testing.loopback import on_loopback


@contextmanager
def running(**options: object) -> Iterator[str]:
    """The base URL of a server that stops when the block ends."""
    app = create_app(EmbeddedModerator(), **options)  # type: ignore[arg-type]
    with on_loopback(app, timeout_keep_alive=KEEP_ALIVE_SECONDS) as served:
        yield served.url


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Base URL of a server with default settings."""
    with running() as base:
        yield base


@pytest.fixture
def serving() -> Callable[..., object]:
    """Starts a server with other settings: ``with serving(api_key=...) as url``."""
    return running

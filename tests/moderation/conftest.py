from collections.abc import AsyncIterator

import pytest

from tta_middleware.moderation.openai import OpenAIModerator
from tta_middleware.moderation.retry import RetryPolicy
from tta_middleware.testing.fault_server import FaultServer

EAGER = RetryPolicy(base_delay=0.0)


@pytest.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as running:
        yield running


@pytest.fixture
async def moderator(server: FaultServer) -> AsyncIterator[OpenAIModerator]:
    async with OpenAIModerator(base_url=server.base_url, api_key="sk-test", retry=EAGER) as client:
        yield client

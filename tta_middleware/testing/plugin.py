"""The auditor as a pytest plugin: on for every test that does not say otherwise.

    pytest_plugins = ["tta_middleware.testing.plugin"]  # in conftest.py

A test that plants a leak says so with ``@pytest.mark.no_audit("why")``. The end of the run says how much was audited.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tta_middleware.testing.auditor import Auditor

_totals = pytest.StashKey[list[int]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_audit(reason): text may leave this test unchecked, for the given reason")
    config.stash[_totals] = [0, 0, 0]


@pytest.fixture(autouse=True)
def auditor(request: pytest.FixtureRequest) -> Iterator[Auditor | None]:
    """The auditor of this test, if it has one; it is asked when the test function has ended."""
    if request.node.get_closest_marker("no_audit"):
        yield None
        return
    with Auditor() as audit:
        yield audit
    totals = request.config.stash[_totals]
    totals[0] += audit.requests
    totals[1] += audit.characters


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    audit = getattr(item, "funcargs", {}).get("auditor")
    if audit is not None:
        item.config.stash[_totals][2] += len(audit.findings)
        audit.check()
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    # A worker of pytest-xdist has nobody to tell but the process that started it.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["audited"] = session.config.stash[_totals]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    totals = node.config.stash[_totals]
    totals[:] = [
        had + more
        for had, more in zip(totals, getattr(node, "workeroutput", {}).get("audited", [0, 0, 0]), strict=True)
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    requests, characters, uncovered = config.stash[_totals]
    terminalreporter.write_line(f"audited: {requests} requests, {characters} characters, {uncovered} uncovered")

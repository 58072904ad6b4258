"""What can go wrong between a client and a moderation API, as data: kinds of faults and when they strike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal[
    "none",
    "status",
    "hang",
    "reset",
    "truncated",
    "html",
    "nan",
    "missing_category",
    "wrong_length",
    "drip",
]


@dataclass(frozen=True, slots=True)
class Fault:
    """How one request is answered.

    Attributes:
        kind: ``status`` answers with an error; ``hang`` never answers; ``reset`` drops the connection in mid-body;
            ``truncated`` ends the JSON early under a matching length; ``html`` is a proxy's page with status 200;
            ``nan``, ``missing_category`` and ``wrong_length`` are well-formed JSON with unusable scores; ``drip``
            sends the body byte by byte.
        status: HTTP status of ``status``.
        headers: further response headers, such as ``("Retry-After", "1")``.
        latency: seconds before the answer begins.
        drip: seconds between two bytes of ``drip``.
    """

    kind: Kind = "none"
    status: int = 500
    headers: tuple[tuple[str, str], ...] = ()
    latency: float = 0.0
    drip: float = 0.05


Plan: TypeAlias = Callable[[int], Fault]
"""The fault for the n-th request, counted from 0 over all connections."""

Latency: TypeAlias = Callable[[random.Random], float]

FINE = Fault()
RATE_LIMITED = Fault("status", status=429)
UNAVAILABLE = Fault("status", status=503)


def rate_limited(seconds: float) -> Fault:
    """429 with ``retry-after-ms``."""
    return Fault("status", status=429, headers=(("retry-after-ms", str(round(seconds * 1000))),))


def always(fault: Fault = FINE) -> Plan:
    """The same answer to each request."""
    return lambda _index: fault


def script(*faults: Fault) -> Plan:
    """One fault after the other, then none."""
    return lambda index: faults[index] if index < len(faults) else FINE


def mixed(share: float, faults: Sequence[Fault], *, seed: int = 0, latency: Latency = lambda _rng: 0.0) -> Plan:
    """A ``share`` of requests, drawn by ``seed``, meets one of ``faults``; ``latency`` is drawn for each."""

    def plan(index: int) -> Fault:
        rng = random.Random(f"{seed}:{index}")  # noqa: S311
        fault = rng.choice(faults) if rng.random() < share else FINE
        return replace(fault, latency=fault.latency + latency(rng))

    return plan


def flapping(
    up: float, down: float, fault: Fault = UNAVAILABLE, *, clock: Callable[[], float] = time.monotonic
) -> Plan:
    """Fine for ``up`` seconds, then ``fault`` for ``down`` seconds, and so on from the first request."""
    elapsed = _since_the_first_request(clock)
    return lambda _index: FINE if elapsed() % (up + down) < up else fault


def outage(
    begin: float, seconds: float, fault: Fault = UNAVAILABLE, *, clock: Callable[[], float] = time.monotonic
) -> Plan:
    """Fine, but for ``fault`` from ``begin`` for ``seconds``, counted from the first request."""
    elapsed = _since_the_first_request(clock)
    return lambda _index: fault if begin <= elapsed() < begin + seconds else FINE


def _since_the_first_request(clock: Callable[[], float]) -> Callable[[], float]:
    started: list[float] = []

    def elapsed() -> float:
        now = clock()
        if not started:
            started.append(now)
        return now - started[0]

    return elapsed


def lognormal(median: float, sigma: float = 0.5) -> Latency:
    """Latencies with a long tail; ``median`` in seconds, ``sigma`` of the logarithm."""
    return lambda rng: median * rng.lognormvariate(0.0, sigma)

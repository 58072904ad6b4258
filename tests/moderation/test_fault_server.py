"""The fault server misbehaves as told: seen through plain sockets and its own plans."""

import asyncio
import json
import random

import pytest

from tta_middleware.testing.fault_server import FaultServer
from tta_middleware.testing.faults import (
    FINE,
    UNAVAILABLE,
    Fault,
    always,
    flapping,
    lognormal,
    mixed,
    outage,
    rate_limited,
    script,
)


async def post(server: FaultServer, path: str = "/v1/moderations") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = json.dumps({"input": ["flagme"]}).encode()
    writer.write(f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    try:
        return head + await reader.readexactly(length)
    finally:
        writer.close()


async def test_it_answers_like_the_api(server):
    answer = json.loads((await post(server)).partition(b"\r\n\r\n")[2])
    assert answer["results"][0]["flagged"]
    assert server.requests[0].texts == ["flagme"]


async def test_an_unknown_path_is_a_404(server):
    assert b"404" in await post(server, "/v1/elsewhere")


@pytest.mark.parametrize(
    ("fault", "mark"),
    [
        (UNAVAILABLE, b"503"),
        (rate_limited(0.25), b"retry-after-ms: 250"),
        (Fault("html"), b"<html>"),
        (Fault("nan"), b"NaN"),
        (Fault("wrong_length"), b'"results": []'),
        (Fault("drip", drip=0.0), b'"violence": 0.9'),
    ],
)
async def test_faults_look_as_they_are_called(server, fault, mark):
    server.plan = always(fault)
    assert mark in await post(server)


async def test_a_missing_category_is_missing_and_truncated_json_is_cut(server):
    server.plan = script(Fault("missing_category"), Fault("truncated"))
    assert b"violence" not in (await post(server)).partition(b"category_scores")[2].replace(b"violence/graphic", b"")
    with pytest.raises(json.JSONDecodeError):
        json.loads((await post(server)).partition(b"\r\n\r\n")[2])


async def test_a_reset_comes_in_mid_body(server):
    server.plan = always(Fault("reset"))
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await post(server)


def test_a_mix_has_its_share_and_is_the_same_for_a_seed():
    plan = mixed(0.3, [UNAVAILABLE, Fault("reset")], seed=5)
    drawn = [plan(index) for index in range(4000)]
    assert 0.27 < sum(fault.kind != "none" for fault in drawn) / 4000 < 0.33
    assert drawn == [mixed(0.3, [UNAVAILABLE, Fault("reset")], seed=5)(index) for index in range(4000)]


def test_flapping_follows_its_clock():
    times = iter([100.0, 109.0, 111.0, 114.0, 116.0, 0.0])
    plan = flapping(10.0, 5.0, clock=lambda: next(times))
    assert [plan(index) for index in range(5)] == [FINE, FINE, UNAVAILABLE, UNAVAILABLE, FINE]


def test_an_outage_begins_and_ends_on_its_clock():
    times = iter([100.0, 109.0, 110.0, 169.0, 170.0, 999.0])
    plan = outage(10.0, 60.0, clock=lambda: next(times))
    assert [plan(index) for index in range(6)] == [FINE, FINE, UNAVAILABLE, UNAVAILABLE, FINE, FINE]


def test_latencies_have_the_median_they_are_given():
    rng = random.Random(0)
    drawn = sorted(lognormal(0.2)(rng) for _ in range(2001))
    assert drawn[1000] == pytest.approx(0.2, rel=0.1)

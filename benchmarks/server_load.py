"""A guarded server under load, against the same engine without a guard in the same run.

    python benchmarks/server_load.py load        # 64 clients x 20 streams; then with leavers, slow readers, failures
    python benchmarks/server_load.py upstream    # in front of another server, at 50 ms a moderation call
    python benchmarks/server_load.py memory      # 10,000 streams of a calm answer
    python benchmarks/server_load.py stop        # SIGTERM and kill -9 under load

The engine is scripted and gives 200 tokens a second to each stream; a fifth of the prompts get an answer with a word
in it that the moderator flags whatever is tried (eight generations), another fifth one that a repair mends. ``leaked``
counts answers with that word; the auditor runs in the server's process and counts what left without a verdict
(``uncovered``).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from served import MARK, ServerProcess, Setup, Visit, percentile, table, visit

TEXTS = ("Roses?", "An attack, please.", "Apple trees?", "A late word about roses.", "Compost?")


async def crowd(port: int, clients: int, requests: int, *, rough: bool, texts: Sequence[str] = TEXTS) -> list[Visit]:
    """``clients`` at once, each with ``requests`` in turn; if it is rough a tenth leaves and a tenth reads slowly."""
    rng = random.Random(11)

    async def client(kinds: Sequence[str]) -> list[Visit]:
        found = []
        for kind in kinds:
            text, bytes_ = rng.choice(texts), rng.randrange(400, 4_000)
            found.append(
                await visit(port, text, leaves_after=bytes_ if kind == "leaves" else None, slow=kind == "slow")
            )
        return found

    weights = [1, 1, 8] if rough else [0, 0, 1]
    asked = [rng.choices(["leaves", "slow", "stays"], weights, k=requests) for _ in range(clients)]
    visits = await asyncio.gather(*(client(kinds) for kinds in asked))
    return [one for found in visits for one in found]


def row(name: str, visits: Sequence[Visit], seconds: float, report: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    stayed = [one for one in visits if not one.left]
    calm = [one.seconds for one in stayed if not any(word in one.asked for word in ("attack", "late"))]
    firsts = [one.first for one in stayed if one.first is not None]
    return {
        "server": name,
        "requests": len(visits),
        "errors": sum(not one.whole for one in stayed),
        "left early": sum(one.left for one in visits),
        "leaked": sum(MARK in one.text for one in visits),
        "uncovered": report["uncovered"],
        "first text p50": f"{percentile(firsts, 0.5):.3f} s",
        "p95": f"{percentile(firsts, 0.95):.3f} s",
        "calm answer p50": f"{percentile(calm, 0.5):.2f} s",
        "run": f"{seconds:.0f} s",
        "tasks left": report["tasks"],
        "connections left": report["connections"],
    }


async def measured(
    name: str, server: ServerProcess, args: argparse.Namespace, *, rough: bool = False
) -> dict[str, Any]:
    begun = time.perf_counter()
    visits = await crowd(server.port, args.clients, args.requests, rough=rough)
    seconds = time.perf_counter() - begun
    return row(name, visits, seconds, await settled(server))


async def settled(server: ServerProcess) -> dict[str, Any]:
    """The report once nothing goes on any more, or after 10 s."""
    report = server.report()
    for _ in range(100):
        await asyncio.sleep(0.1)
        before, report = report, server.report()
        if report["steps"] == before["steps"] and not report["tasks"] and not report["connections"]:
            break
    return report


async def load(args: argparse.Namespace) -> None:
    step, wait = 1 / args.rate, args.moderation
    unheard = Setup("guarded", step, wait, audited=False)
    with ServerProcess(Setup("unguarded", step)) as raw, ServerProcess(unheard) as guarded:
        rows = [await measured("unguarded", raw, args), await measured("guarded", guarded, args)]
    with ServerProcess(Setup("guarded", step, wait)) as guarded:
        rows.append(await measured("guarded, audited", guarded, args))
    with ServerProcess(Setup("guarded", step, wait, failing=0.3)) as rough:
        rows.append(
            await measured("guarded, audited, 10% leave, 10% slow, 30% of checks fail", rough, args, rough=True)
        )
    print(table(rows))


async def upstream(args: argparse.Namespace) -> None:
    step = 1 / args.rate
    with (
        ServerProcess(Setup("unguarded", step)) as behind,
        ServerProcess(Setup("upstream", step, args.moderation, upstream=behind.url)) as front,
    ):
        rows = []
        for clients in (1, 8):
            args.clients = clients
            for name, server in (("the upstream itself", behind), ("guarded in front of it", front)):
                rows.append({"clients": clients} | await measured(name, server, args))
    print(table(rows))


async def memory(args: argparse.Namespace) -> None:
    with ServerProcess(Setup("guarded", 0.0, 0.0, audited=False)) as server:
        rows, done = [], 0
        for target in (500, 1_000, 2_500, 5_000, 10_000):
            per_client = (target - done) // 20
            visits = await crowd(server.port, 20, per_client, rough=False, texts=TEXTS[:1])
            done = target
            report = await settled(server)
            failed = sum(not one.whole for one in visits)
            kept = {name: report[name] for name in ("mib", "tasks", "connections", "sockets", "uncovered")}
            rows.append({"requests": done, "errors": failed, **kept})
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))


async def stop(args: argparse.Namespace) -> None:
    step, rows = 1 / args.rate, []
    with ServerProcess(Setup("guarded", step, args.moderation)) as server:
        under_way = [asyncio.create_task(visit(server.port, TEXTS[n % 5])) for n in range(args.clients)]
        await asyncio.sleep(0.4)
        server.signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        late = await visit(server.port, TEXTS[0])
        visits = await asyncio.gather(*under_way)
        server.process.join(60)
        whole = sum(one.whole for one in visits)
        rows.append(
            {
                "end": "SIGTERM",
                "under way": len(visits),
                "ended whole": whole,
                "taken in later": int(late.status == 200),
            }
            | {"exit": server.process.exitcode, "leaked": sum(MARK in one.text for one in visits)}
        )
    with ServerProcess(Setup("guarded", step, args.moderation)) as server:
        under_way = [asyncio.create_task(visit(server.port, TEXTS[n % 5])) for n in range(args.clients)]
        await asyncio.sleep(0.4)
        server.signal(signal.SIGKILL)
        visits = await asyncio.gather(*under_way)
        server.process.join(10)
        with ServerProcess(Setup("guarded", step, args.moderation, port=server.port)) as again:
            after = await visit(again.port, TEXTS[0])
        rows.append(
            {"end": "kill -9", "under way": len(visits), "ended whole": sum(one.whole for one in visits)}
            | {"taken in later": f"{int(after.whole)} after a restart on its port", "exit": server.process.exitcode}
            | {"leaked": sum(MARK in one.text for one in visits)}
        )
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "upstream", "memory", "stop"])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=20, help="of each client, one after the other")
    parser.add_argument("--rate", type=float, default=200.0, help="tokens a second of each stream")
    parser.add_argument("--moderation", type=float, default=0.05, help="seconds of a moderation call")
    args = parser.parse_args()
    asyncio.run({"load": load, "upstream": upstream, "memory": memory, "stop": stop}[args.what](args))


if __name__ == "__main__":
    main()

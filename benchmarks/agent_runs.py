"""Agents end to end: twenty tasks for three tools, with a local model behind the guard, and why the others failed.

    python benchmarks/agent_runs.py --model models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --record FILE.jsonl

All run side by side. A task is passed when the tool that it needs was called with the arguments that it names, and the
last message says what the tool gave back. ``--record`` keeps every message, and what became of it in the guard, so that
failures can be read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AnyMessage
from langchain_core.tools import tool

from tta_middleware import TTAChatModel

CITIES = {"Oslo": 4, "Lima": 22, "Cairo": 31, "Kyoto": 17, "Quito": 14, "Turin": 12, "Perth": 26}
PRICES = {"lamp": 35, "chair": 80, "desk": 240, "shelf": 65, "rug": 110, "clock": 28, "vase": 19}


@tool
def get_temperature(city: str) -> str:
    """The temperature in a city now, in degrees Celsius."""
    return f"{CITIES.get(city, 'unknown')}"


@tool
def get_price(item: str) -> str:
    """The price of an item of the shop, in euros."""
    return f"{PRICES.get(item.lower(), 'unknown')}"


@tool
def add_numbers(first: int, second: int) -> str:
    """The sum of two whole numbers."""
    return str(first + second)


Task = tuple[str, str, dict[str, Any], str]
"""A question, the tool that it needs, the arguments of its call, and what the answer has to say."""

TASKS: list[Task] = [
    *((f"How warm is it in {city} now?", "get_temperature", {"city": city}, str(n)) for city, n in CITIES.items()),
    *((f"What does the {item} cost?", "get_price", {"item": item}, str(n)) for item, n in PRICES.items()),
    *(
        (f"Add {a} and {b} with the tool.", "add_numbers", {"first": a, "second": b}, str(a + b))
        for a, b in ((17, 25), (310, 45), (128, 256), (99, 12), (1204, 77), (63, 58))
    ),
]


async def run(agent: Any, task: Task, record: Path | None) -> str:
    """Why a task failed; empty if it passed."""
    question, name, arguments, answer = task
    messages: list[AnyMessage] = []
    try:
        # The last state is kept, so that a run that ends in an error can be read, too.
        async for state in agent.astream(
            {"messages": [("user", question)]}, {"recursion_limit": 12}, stream_mode="values"
        ):
            messages = state["messages"]
        reason = judged(messages, name, arguments, answer)
    except Exception as error:  # noqa: BLE001  whatever it is, it is what is reported
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    if record is not None:
        keep(record, question, reason, messages)
    return reason


def keep(record: Path, question: str, reason: str, messages: Sequence[AnyMessage]) -> None:
    said = [
        {
            "type": message.type,
            "content": message.content,
            "tool_calls": getattr(message, "tool_calls", []),
            "invalid_tool_calls": getattr(message, "invalid_tool_calls", []),
            "finish_reason": message.response_metadata.get("finish_reason"),
            "outcome": message.response_metadata.get("tta", {}).get("outcome"),
        }
        for message in messages
    ]
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"question": question, "failed": reason, "messages": said}) + "\n")


def judged(messages: Sequence[AnyMessage], name: str, arguments: dict[str, Any], answer: str) -> str:
    """What a conversation lacks of what its task asks for."""
    calls = [call for message in messages if isinstance(message, AIMessage) for call in message.tool_calls]
    if not calls:
        return "no tool was called"
    if not any(call["name"] == name for call in calls):
        return f"another tool was called ({calls[0]['name']})"
    if not any(call["name"] == name and same(call["args"], arguments) for call in calls):
        return "other arguments"
    return "" if answer in str(messages[-1].content).replace(",", "") else "the answer lacks the tool's result"


def same(given: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return {key: str(value).lower() for key, value in given.items()} == {
        key: str(value).lower() for key, value in wanted.items()
    }


async def main(model: str, record: Path | None) -> int:
    chat = TTAChatModel(model=model, max_new_tokens=96)
    agent = create_agent(chat, [get_temperature, get_price, add_numbers], system_prompt="Use the tools you have.")
    started = time.monotonic()
    reasons = await asyncio.gather(*(run(agent, task, record) for task in TASKS))
    for (question, *_), reason in zip(TASKS, reasons, strict=True):
        sys.stdout.write(f"{'failed' if reason else 'passed'}  {question}  {reason}\n")
    summary = {"passed": reasons.count(""), "runs": len(TASKS), "failed": Counter(filter(None, reasons))}
    sys.stdout.write(json.dumps(summary | {"seconds": round(time.monotonic() - started)}) + "\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--record", type=Path, help="keep the conversations here, a line of JSON each")
    chosen = parser.parse_args()
    sys.exit(asyncio.run(main(chosen.model, chosen.record)))

"""LangChain's OpenAIModerationMiddleware on an agent; the consumer reads ``stream_mode="messages"``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import cache
from typing import Any

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from langchain_openai.middleware import OpenAIModerationMiddleware
from lines import main
from openai import AsyncOpenAI


@cache
def agent(base_url: str, guarded: bool) -> Any:
    middleware = OpenAIModerationMiddleware(check_input=False, async_client=AsyncOpenAI(base_url=base_url, api_key="k"))
    model = ChatOpenAI(model="scripted", base_url=base_url, api_key="k", streaming=True, stream_usage=False)
    return create_agent(model, middleware=[middleware] if guarded else [])


async def stream(job: dict[str, Any]) -> AsyncIterator[str]:
    chain = agent(job["base_url"], job["kind"] != "unguarded")
    messages = [("user", job["question"])]
    async for mode, data in chain.astream({"messages": messages}, stream_mode=["messages", "values"]):
        if mode == "messages":
            yield data[0].text
        else:
            job["state"] = "\n".join(message.text for message in data["messages"])


if __name__ == "__main__":
    main({"unguarded": stream, "middleware": stream})

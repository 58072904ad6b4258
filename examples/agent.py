"""An agent whose model, tool calls and tool results are guarded; the embedded model answers for a flagged message.

The agent's model follows a script here, so that the example needs no key. Put any LangChain chat model in its place.
"""

from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from tta_langchain_agents import TTAMiddleware
from tta_langchain_agents.testing import ScriptedChatModel

from tta_middleware import TTAChatModel

SCRIPT = [
    AIMessage("", tool_calls=[{"name": "opening_hours", "args": {"place": "library"}, "id": "1", "type": "tool_call"}]),
    "The library opens at nine.",
    "Go away, you worthless idiot. I hope you suffer and die.",
]


@tool
def opening_hours(place: str) -> str:
    """When a place opens."""
    return f"The {place} opens at nine and closes at six."


def main() -> None:
    local = TTAChatModel(model="smollm2", moderator="local", max_new_tokens=32)
    agent = create_agent(
        ScriptedChatModel(answers=SCRIPT),
        tools=[opening_hours],
        middleware=[TTAMiddleware("local", repair_model=local)],
        checkpointer=InMemorySaver(),
    )
    config = {"configurable": {"thread_id": "visitor"}}
    for question in ("When does the library open?", "Can I bring my dog?"):
        print(f"> {question}")
        for chunk, about in agent.stream({"messages": [("user", question)]}, config, stream_mode="messages"):
            if about["langgraph_node"] == "model":
                print(chunk.text, end="", flush=True)
        print()
    for message in agent.get_state(config).values["messages"]:
        trace = message.response_metadata.get("tta", {})
        print(f"{message.type:<6} {trace.get('outcome', ''):<12} {message.text[:60]!r}")


if __name__ == "__main__":
    main()

"""A LangGraph of your own: a guarded model that calls tools, and a checkpointer that never holds what was flagged.

The model follows a script here, since the embedded one is too small for tools; put ``model="YOUR/MODEL"`` in its place.
"""

from langchain_core.messages import SystemMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from tta_middleware import TTAChatModel
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine

CALL = '<tool_call>{"name": "water", "arguments": {"bed": "roses", "litres": 5}}</tool_call>'


def script(call: ScriptedCall) -> str:
    if "neighbour" in call.text:
        return "Your neighbour is a worthless idiot, and I hope that he suffers and dies."
    return "The roses have had their five litres." if "<|tool|>" in call.conversation else CALL


@tool
def water(bed: str, litres: int) -> str:
    """Water a bed of the garden."""
    return f"{litres} litres for the {bed}"


model = TTAChatModel(model=ScriptedEngine(script), moderator="local", method="none")


def answer(state: MessagesState) -> dict:
    return {"messages": [model.bind_tools([water]).invoke([SystemMessage("You keep a garden."), *state["messages"]])]}


def build() -> StateGraph:
    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_node("tools", ToolNode([water]))
    graph.add_edge(START, "answer")
    graph.add_conditional_edges("answer", tools_condition)
    graph.add_edge("tools", "answer")
    return graph


def main() -> None:
    app = build().compile(checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "garden"}}
    for question in ("Please water the roses.", "And what do you think of my neighbour?"):
        for chunk, about in app.stream({"messages": [("user", question)]}, config, stream_mode="messages"):
            if about["langgraph_node"] == "answer":
                print(chunk.text, end="")
        print()
    kept = "".join(message.text for state in app.get_state_history(config) for message in state.values["messages"])
    print("the flagged text is in a checkpoint:", "worthless" in kept)


if __name__ == "__main__":
    main()

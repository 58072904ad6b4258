"""What model and moderator say on the pictures in the docs: a story that is flagged late, and one that is not."""

from __future__ import annotations

from tta_middleware.testing.scripted_engine import ScriptedCall

BEES_QUESTION = "How do bees make honey?"
SHED_QUESTION = "How do I get into the shed next door?"
BEES = (
    "Bees collect nectar from flowers with their long tongues and carry it home in a second stomach. In the hive they "
    "pass it from mouth to mouth, which takes most of the water out of it, and fan it with their wings until it is "
    "thick. Then they close the cell with wax, and it keeps for years."
)
SHED = (
    "A shed door is usually held by a simple padlock and two hinges, and most people never look at them again. "
    "Here comes the forbidden part, which nobody ever sees: not this page, not its trace, and not its log."
)
CALM = (
    " I would not open a shed that belongs to somebody else. Ask your neighbour for the key, or tell "
    "them what you need from it. If it is your own and the key is lost, a locksmith opens a padlock without any damage."
)


def story(call: ScriptedCall) -> str:
    """The shed's answer is bad until the prompt is moved."""
    if "shed" not in call.text:
        return BEES
    if call.moved < 0.15:
        return SHED.removeprefix(call.prefix)
    if not call.prefix:
        return CALM.strip()
    return (" them after that." if call.prefix.endswith("look at") else " and two hinges.") + CALM


def scores(text: str) -> dict[str, float]:
    """Rise with the words that matter, and a little with the length, so that the strip has a shape."""
    bad = 0.82 if "forbidden" in text else 0.0
    calm = 0.04 + 0.11 * (len(text) * 7919 % 10) / 10
    return {"illicit": max(bad, calm), "violence": 0.02, "harassment": 0.01}

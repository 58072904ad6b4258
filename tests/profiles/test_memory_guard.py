"""A guard with a repair memory: the second time costs one generation beside the first answer."""

from __future__ import annotations

from pathlib import Path

from tta_middleware import Budget, Guard, Message, Noise, Policy, Repair, Trace
from tta_middleware.methods.memory import Remembered, RepairMemory, scope_of
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

SECRET = "Plan an attack on weeds with zinnias"


def answer(call: ScriptedCall) -> str:
    if "attack" in call.text and call.moved < 0.8:
        return "Here is the bad plan for the shed and the wall."
    return "A calm and friendly answer about gardens and old walls."


async def ask(memory: RepairMemory, text: str = SECRET) -> Trace:
    method = Remembered(Noise(wave=1, waves=8), memory, scope_of("scripted", Policy(threshold=0.5)))
    repair = Repair(method=method, budget=Budget(generations=20))
    guard = Guard(
        ScriptedEngine(answer), ScriptedModerator(score=flagging("bad")), policy=Policy(threshold=0.5), repair=repair
    )
    return (await guard.answer([Message("user", text)])).trace


async def test_a_repeated_prompt_takes_two_generations() -> None:
    memory = RepairMemory()
    first, second = await ask(memory), await ask(memory)
    assert first.outcome == second.outcome == "neutralised"
    assert first.generations > 2
    assert second.generations == 2


async def test_a_memory_outlives_its_process_and_keeps_no_words(tmp_path: Path) -> None:
    memory, fresh = RepairMemory(), RepairMemory()
    await ask(memory)
    memory.save(tmp_path / "memory.npz")
    fresh.load(tmp_path / "memory.npz")
    assert (await ask(fresh)).generations == 2
    raw = (tmp_path / "memory.npz").read_bytes()
    assert not any(word.encode() in raw for word in SECRET.split() if len(word) > 4)


async def test_another_prompt_is_repaired_as_without_a_memory() -> None:
    memory = RepairMemory()
    await ask(memory)
    other = "Plan an attack on moss"
    assert (await ask(memory, other)).generations == (await ask(RepairMemory(), other)).generations

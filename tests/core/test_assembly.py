"""From settings to a guard, without a command line and without LangChain."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tta_middleware import Budget, Message, Policy, Sampling
from tta_middleware.assembly import GuardSettings, Runtime
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.file import policies_for
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator


def settings(**given: object) -> GuardSettings:
    parts = {"model": ScriptedEngine(lambda _: "You said flagme."), "moderator": ScriptedModerator()}
    rest = {"method": "none", "policy": StagePolicies.of(0.5), "budget": Budget(), "seed": 0}
    return GuardSettings(**parts | rest | given)


def test_assembling_needs_neither_a_command_line_nor_langchain() -> None:
    heavy = ("typer", "langchain_core", "torch")
    code = f"import sys, tta_middleware.assembly; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_a_guard_follows_the_settings_of_its_call() -> None:
    runtime, asked = Runtime(), [Message("user", "Hello")]
    strict = await runtime.guard_for(settings()).answer(asked, Sampling())
    lax = await runtime.guard_for(settings(policy=StagePolicies.of(Policy(threshold=1.0)))).answer(asked, Sampling())
    assert (strict.trace.outcome, lax.trace.outcome) == ("blocked", "clean")


async def test_the_guards_of_a_runtime_share_parts_that_were_asked_for_by_name() -> None:
    runtime = Runtime()
    first, second = (runtime.guard_for(settings(moderator="local", policy=StagePolicies.of(p))) for p in (0.5, 0.3))
    assert first is not second
    assert len(runtime._moderators) == 1
    await runtime.aclose()


async def test_a_part_that_fails_to_close_leaves_no_other_open() -> None:
    class Fails(ScriptedModerator):
        async def aclose(self) -> None:
            raise OSError("the connection is gone")

    runtime, other = Runtime(), ScriptedModerator()
    runtime._moderators |= {("fails", 0): Fails(), ("other", 0): other}
    with pytest.raises(OSError, match="gone"):
        await runtime.aclose()
    assert other.closed == 1


def test_one_place_says_which_policies_are_in_force(tmp_path) -> None:
    from tta_middleware.policy.file import PolicyFile

    (tmp_path / "policies.toml").write_text("[policies.default]\nthreshold = 0.3\n[policies.strict]\nthreshold = 0.1\n")
    file = PolicyFile(tmp_path / "policies.toml")
    found = [policies_for(policy, file).output.threshold for policy in (None, "strict", 0.7)]
    assert found == [0.3, 0.1, 0.7]
    assert policies_for(None, None) == StagePolicies.of(None)

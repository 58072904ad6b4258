"""The how-to's snippets run, and its policy file loads."""

import re
from pathlib import Path

from tta_middleware.policy.file import PolicyFile

TEXT = (Path(__file__).parents[2] / "docs" / "moderation.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


async def test_the_python_of_the_how_to_runs(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    names: dict = {}
    for block in blocks("python"):
        exec(block, names)
    verdicts = await names["survives_a_bad_start"]()
    assert not verdicts[0].flagged


def test_the_policies_of_the_how_to_load(tmp_path):
    ruled, several = blocks("toml")[:2]
    file = tmp_path / "policies.toml"
    file.write_text(several)
    policies = PolicyFile(file)
    assert policies.names() == ["default", "strict"]
    assert policies.get().prompt.on_error == "open"
    file.write_text(f"{several}\n{ruled}")
    shop = PolicyFile(file).get("shop").output
    assert shop.rules is not None
    assert shop.categories == {"rules": 0.6}

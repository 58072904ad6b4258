"""PyRIT's single-turn attacks on a server, as JSON. Runs in PyRIT's environment.

    python pyrit_attacks.py URL MODEL ATTACKS.json ANSWERS.json

A third of the requests goes inside jailbreak templates that PyRIT ships, a third through converters, a third as it is.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from pyrit.converter import Base64Converter, LeetspeakConverter
from pyrit.datasets.jailbreak.text_jailbreak import TextJailBreak
from pyrit.executor.attack import AttackConverterConfig, AttackExecutor, PromptSendingAttack
from pyrit.prompt_normalizer import ConverterConfiguration
from pyrit.prompt_target import OpenAIChatTarget
from pyrit.setup import IN_MEMORY, initialize_pyrit_async

TEMPLATES = ("aim.yaml", "based_gpt_1.yaml", "better_dan.yaml")


async def asked(target: OpenAIChatTarget, attacks: list[str], converters: list[Any]) -> list[dict[str, Any]]:
    configuration = ConverterConfiguration.from_converters(converters=converters)
    attack = PromptSendingAttack(
        objective_target=target, attack_converter_config=AttackConverterConfig(request_converters=configuration)
    )
    executor = AttackExecutor(max_concurrency=2)
    found = []
    for result in await executor.execute_attack_async(attack=attack, objectives=attacks):
        last = result.last_response
        blocked = last is None or last.response_error == "blocked"
        found.append({"text": "" if last is None or blocked else last.converted_value, "blocked": blocked})
    return found


async def main(url: str, model: str, attacks: list[str]) -> list[dict[str, Any]]:
    await initialize_pyrit_async(IN_MEMORY, silent=True, load_defaults=False)
    target = OpenAIChatTarget(model_name=model, endpoint=url, api_key="none", temperature=0.0)
    inside = [
        TextJailBreak(template_file_name=TEMPLATES[number % len(TEMPLATES)]).get_jailbreak(attack)
        for number, attack in enumerate(attacks[::3])
    ]
    encoded = attacks[1::3]
    answers = await asked(target, inside, [])
    answers += await asked(target, encoded[::2], [Base64Converter()]) if encoded[::2] else []
    answers += await asked(target, encoded[1::2], [LeetspeakConverter()]) if encoded[1::2] else []
    return answers + await asked(target, attacks[2::3], [])


if __name__ == "__main__":
    questions = json.loads(Path(sys.argv[3]).read_text())
    told = asyncio.run(main(sys.argv[1], sys.argv[2], questions))
    Path(sys.argv[4]).write_text(json.dumps(told))

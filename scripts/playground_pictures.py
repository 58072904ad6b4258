"""Pictures of the playground for the docs: light, dark, a repair, a phone; needs chromium and chromedriver.

    python scripts/playground_pictures.py            # into docs/images

The page is real and so is the guard; the model and the moderator follow a script, so that the pictures do not depend on
what a model says.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tta_middleware import TTAChatModel, Windows
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "serve"))
from browser import chromium, look  # noqa: E402
from staged_server import running  # noqa: E402

IMAGES = ROOT / "docs" / "images"
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
    " them after that. I would not open a shed that belongs to somebody else. Ask your neighbour for the key, or tell "
    "them what you need from it. If it is your own and the key is lost, a locksmith opens a padlock without any damage."
)


def story(call: ScriptedCall) -> str:
    """The shed's answer is bad until the prompt is moved."""
    if "shed" not in call.text:
        return BEES
    if call.moved < 0.15:
        return SHED.removeprefix(call.prefix)
    return CALM if call.prefix else CALM.strip()


def scores(text: str) -> dict[str, float]:
    """Rise with the words that matter, and a little with the length, so that the strip has a shape."""
    bad = 0.82 if "forbidden" in text else 0.0
    calm = 0.04 + 0.11 * (len(text) * 7919 % 10) / 10
    return {"illicit": max(bad, calm), "violence": 0.02, "harassment": 0.01}


def garden_helper() -> TTAChatModel:
    """The chat model on the pictures."""
    engine = ScriptedEngine(story, step_seconds=0.005, model_id="garden-helper")
    return TTAChatModel(
        model=engine,
        moderator=ScriptedModerator("scripted", score=scores),
        seed=7,
        windows=Windows(first=32, largest=64),
    )


def ask(driver: webdriver.Chrome, *questions: str) -> None:
    """One after the other, each to the end of its answer."""
    for number, question in enumerate(questions, start=1):
        driver.find_element(By.ID, "question").send_keys(question + "\n")
        WebDriverWait(driver, 20).until(
            lambda page, number=number: (
                len(page.find_elements(By.CSS_SELECTOR, ".story .badge:not(.under-way)")) == number
            )
        )


def take(driver: webdriver.Chrome, name: str) -> None:
    """A picture, with few colours so that it stays small."""
    time.sleep(0.3)  # for the last transition
    path = IMAGES / f"{name}.png"
    driver.save_screenshot(str(path))
    Image.open(path).convert("RGB").quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size // 1024} kB")


def take_all(driver: webdriver.Chrome, url: str) -> None:
    """Each on a fresh page."""
    for name, scheme in (("playground-light", "light"), ("playground-dark", "dark")):
        look(driver, prefers_color_scheme=scheme)
        driver.get(url)
        ask(driver, BEES_QUESTION)
        take(driver, name)
    look(driver, height=900)
    driver.get(url)
    ask(driver, SHED_QUESTION)
    driver.find_element(By.CSS_SELECTOR, ".story summary").click()
    take(driver, "playground-repair")
    look(driver, 390, 780)
    driver.get(url)
    ask(driver, SHED_QUESTION)
    take(driver, "playground-phone")


def main() -> None:
    """All pictures."""
    IMAGES.mkdir(exist_ok=True)
    driver = chromium()
    try:
        with running({"garden-helper": garden_helper()}) as served:
            take_all(driver, f"{served.url}/")
    finally:
        driver.quit()


if __name__ == "__main__":
    main()

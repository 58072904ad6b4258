"""Pictures of the playground for the docs: light, dark, a repair, a phone; needs chromium and chromedriver.

    python scripts/playground_pictures.py            # into docs/images

The page is real and so is the guard; the model and the moderator follow a script, so that the pictures do not depend on
what a model says.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from garden_story import BEES_QUESTION, SHED_QUESTION, scores, story
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tta_middleware import TTAChatModel, Windows
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "serve"))
from browser import chromium, look  # noqa: E402
from staged_server import running  # noqa: E402

IMAGES = ROOT / "docs" / "images"


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

"""The playground in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browser import BROWSER, DRIVER, MISSING, chromium, look
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from staged_server import BAD, CALM, NOTICE, Held, Log, Served, running, scripted
from staged_upstream import saying, upstream

from tta_middleware import Policy
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (BROWSER and DRIVER), reason=MISSING)]

MARKUP = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script><b>bold</b>"


class Page:
    """The page as a person has it before them."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, served: Served) -> None:
        self.driver.get(f"{served.url}/")
        self.until(lambda: self.all("#model option") or self.all("#problem"))

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def until(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.driver, 20, 0.05).until(lambda _: condition())

    def ask(self, text: str) -> WebElement:
        """The answer's card, once it has ended."""
        count = len(self.all(".answer"))
        self.one("#question").send_keys(text + Keys.ENTER)
        self.until(lambda: len(self.all(".answer")) == count + 1)
        self.until(lambda: not self.one("#stop").is_displayed())
        return self.all(".answer")[-1]

    def js(self, code: str, *given: Any) -> Any:
        return self.driver.execute_script(code, *given)

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    @property
    def focus(self) -> WebElement:
        return self.driver.switch_to.active_element


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    one = chromium()
    yield one
    one.quit()


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    look(driver)
    driver.get_log("browser")
    yield Page(driver)
    complaints = [entry for entry in driver.get_log("browser") if "status of" not in entry["message"]]
    assert [entry for entry in complaints if "ERR_" not in entry["message"]] == []  # what its own rules forbid, say
    driver.get("about:blank")  # closes connections before the server stops


def remembering(call: ScriptedCall) -> str:
    asked, answered = (call.conversation.count(f"<|{role}|>") for role in ("user", "assistant"))
    return f"You asked {asked} times, and I answered {answered}."


def test_an_answer_with_its_strip(page: Page, served: Served) -> None:
    page.open(served)
    card = page.ask("Roses?")
    assert card.find_element(By.CLASS_NAME, "said").text == CALM
    assert card.find_element(By.CLASS_NAME, "badge").text == "Clean"
    assert "1 answer" in card.find_element(By.CLASS_NAME, "cost").text
    [lane] = card.find_elements(By.CLASS_NAME, "lane")
    assert "highest score 0.05, none flagged" in lane.get_attribute("aria-label")
    assert len(lane.find_elements(By.CLASS_NAME, "bar")) > 1
    page.one("#max-tokens").clear()
    page.one("#max-tokens").send_keys("5")
    assert "reached the longest" in page.ask("Roses?").text
    loaded = page.js("return performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin)")
    assert set(loaded) == {served.url}


def test_text_is_seen_while_it_comes_and_escape_stops_it(page: Page, log: Log) -> None:
    held = Held(at=16)
    engine = ScriptedEngine(CALM, sleep=held.sleep)
    with running(scripted(engine=engine)) as one:
        page.open(one)
        page.press("Roses?", Keys.ENTER)
        page.until(lambda: page.all(".said") and "Water the roses" in page.one(".said").text)
        page.until(lambda: page.one(".badge").text == "Held back")
        assert page.one("#talk").get_attribute("aria-busy") == "true"
        page.press(Keys.ESCAPE)
        page.until(lambda: page.one(".badge").text == "Stopped")
        assert held.cancelled.wait(30)
        assert log.request(disconnected=True)
        assert engine.steps == 15
        assert page.focus.get_attribute("id") == "question"


def test_a_repair_shows_where_it_was_flagged_and_what_was_tried(page: Page) -> None:
    with running(scripted(method="noise", bridges=())) as one:
        page.open(one)
        card = page.ask("late roses")
        assert card.find_element(By.CLASS_NAME, "badge").text == "Repaired"
        first, repair = card.find_elements(By.CLASS_NAME, "lane")
        found = card.find_element(By.CLASS_NAME, "found").text
        assert "illicit at" in found
        assert "flagged for illicit" in first.get_attribute("aria-label")
        assert "none flagged" in repair.get_attribute("aria-label")
        assert card.find_elements(By.CLASS_NAME, "try")
        assert "orbidden" not in page.driver.page_source
        card.find_element(By.CSS_SELECTOR, ".story summary").click()
        rows = [row.text for row in card.find_elements(By.CSS_SELECTOR, "tbody tr")]
        assert [row for row in rows if "0.900" in row]
        assert rows[-1].startswith("Repair 1")


def test_a_block_is_an_answer(page: Page, served: Served) -> None:
    page.open(served)
    card = page.ask("An attack, please.")
    assert card.find_element(By.CLASS_NAME, "said").text.endswith(NOTICE)
    assert card.find_element(By.CLASS_NAME, "badge").text == "Blocked"
    assert "orbidden" not in page.driver.page_source
    assert BAD.removeprefix(CALM) not in page.driver.page_source


def test_an_upstreams_answer_has_its_strip_too(page: Page) -> None:
    with upstream(saying(BAD)) as behind, running({"far": behind.model()}) as one:
        page.open(one)
        assert page.one("#temperature-value").text == "the model's own"
        card = page.ask("Roses?")
        assert card.find_element(By.CLASS_NAME, "badge").text == "Blocked"
        assert "illicit at" in card.find_element(By.CLASS_NAME, "found").text
        assert "temperature" not in behind.requests[0].body
        assert "orbidden" not in page.driver.page_source


def test_thoughts_stand_apart_from_the_answer(page: Page) -> None:
    engine = ScriptedEngine(f"<think>\nSomebody asks about flowers, it seems.\n</think>\n\n{CALM}", thinking=True)
    with running(scripted(engine=engine, reasoning="show")) as one:
        page.open(one)
        card = page.ask("Roses?")
        assert card.find_element(By.CLASS_NAME, "said").text == CALM
        card.find_element(By.CSS_SELECTOR, ".thought summary").click()
        assert "asks about flowers" in card.find_element(By.CLASS_NAME, "thought-text").text
        lanes = card.find_elements(By.CLASS_NAME, "lane")
        assert [lane.get_attribute("aria-label").partition(":")[0] for lane in lanes] == ["Thoughts", "First answer"]


def test_what_is_only_observed_is_marked(page: Page) -> None:
    with running(scripted(policy=Policy(mode="observe"))) as one:
        page.open(one)
        card = page.ask("An attack, please.")
        assert card.find_element(By.CSS_SELECTOR, ".badge.observed").text == "Observed only: output: illicit"
        assert card.find_elements(By.CSS_SELECTOR, ".bar.observed")
        assert "forbidden" in card.find_element(By.CLASS_NAME, "said").text


def test_markup_stays_text_wherever_it_comes_from(page: Page) -> None:
    engine = ScriptedEngine(f"An answer {MARKUP} with markup", model_id=MARKUP)
    with running({MARKUP: scripted(engine=engine)}) as one:
        page.open(one)
        page.one("#system").send_keys(MARKUP)
        card = page.ask(MARKUP)
        assert MARKUP in card.find_element(By.CLASS_NAME, "said").text
        assert page.one(".asked").text == MARKUP
        assert page.one("#model option").text == MARKUP
        assert page.js("return document.querySelectorAll('#talk img, #talk script, #talk b').length") == 0
        assert page.driver.title == "Playground · tta-middleware"
        try_it = "document.createElement('p').innerHTML = '<b>x</b>'; return 'made'"
        assert page.js(f"try {{ {try_it} }} catch {{ return 'refused' }}") == "refused"
        page.driver.get_log("browser")  # where the browser tells of what it just refused


def test_an_earlier_turn_goes_along_and_a_new_chat_begins_empty(page: Page) -> None:
    with running(scripted(remembering)) as one:
        page.open(one)
        page.ask("First")
        assert "asked 2 times, and I answered 1." in page.ask("Second").text
        page.one("#new").click()
        assert page.one("#welcome").is_displayed()
        assert "asked 1 times, and I answered 0." in page.ask("Third").text


def test_thresholds_go_down_and_no_further_up_than_the_operators(page: Page, served: Served) -> None:
    page.open(served)
    slider = page.one("#threshold")
    assert float(slider.get_attribute("max")) == 0.5
    assert "Clean" in page.ask("Roses?").text
    slider.send_keys(Keys.HOME)
    assert page.one("#threshold-value").text == "0.00"
    card = page.ask("Roses?")
    assert card.find_element(By.CLASS_NAME, "badge").text == "Blocked"
    card.find_element(By.CSS_SELECTOR, ".story summary").click()
    assert "default (stricter)" in card.text
    page.one("#reset").click()
    assert "Clean" in page.ask("Roses?").text
    page.one("#by-category summary").click()
    page.one("#limit-illicit").send_keys(Keys.HOME)
    assert "Blocked" in page.ask("Roses?").text


def test_a_key_is_asked_for_and_kept_in_memory_only(page: Page) -> None:
    with running(scripted(), keys="sk-secret") as one:
        page.open(one)
        assert "wants an API key" in page.one("#problem").text
        assert page.focus.get_attribute("id") == "key"
        page.press("sk-wrong", Keys.ENTER)
        page.until(lambda: page.all("#problem"))
        page.one("#key").clear()
        page.one("#key").send_keys("sk-secret", Keys.ENTER)
        page.until(lambda: page.all("#model option"))
        assert "Clean" in page.ask("Roses?").text
        kept = page.js(
            "return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        )
        assert "secret" not in kept
        page.driver.refresh()
        page.until(lambda: page.all("#problem"))
        assert page.one("#key").get_attribute("value") == ""


def test_errors_are_said_plainly(page: Page) -> None:
    failing = scripted(engine=ScriptedEngine(" ".join([CALM] * 6), step_seconds=0.001, fail_at_step=100))
    with running(failing) as one:
        page.open(one)
        card = page.ask("Roses?")
        assert "model failed while it answered" in card.find_element(By.CLASS_NAME, "problem").text
        assert card.find_element(By.CLASS_NAME, "said").text.startswith("Water")
    card = page.ask("Roses?")
    assert "cannot be reached" in card.find_element(By.CLASS_NAME, "problem").text
    assert card.find_element(By.CLASS_NAME, "problem").get_attribute("role") == "alert"


def test_all_of_it_by_keyboard(page: Page, served: Served) -> None:
    page.open(served)
    assert page.focus.get_attribute("id") == "question"
    page.press("Roses")
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    page.press("and more?")
    assert page.one("#question").get_attribute("value") == "Roses\nand more?"
    page.press(Keys.ENTER)
    page.until(lambda: page.all(".badge.clean"))
    reached = []
    for _ in range(40):
        page.press(Keys.TAB)
        one = page.focus
        outlined = page.js("return getComputedStyle(arguments[0]).outlineStyle", one) != "none"
        assert outlined or one.tag_name == "body"  # where the focus is on its way around
        reached.append(one.get_attribute("id") or one.tag_name)
        if one.get_attribute("class") == "skip":
            break
    assert {"send", "key", "threshold", "prompt-check", "system", "temperature", "max-tokens"} <= set(reached)
    page.press(Keys.ENTER)
    assert page.focus.get_attribute("id") == "question"


def test_everything_that_takes_focus_has_a_name(page: Page, served: Served) -> None:
    page.open(served)
    page.ask("late roses")
    page.js("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    focusable = [
        node
        for node in tree
        if not node["ignored"]
        and any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", ()))
    ]
    assert len(focusable) > 20
    unnamed = [node["role"]["value"] for node in focusable if not node.get("name", {}).get("value")]
    assert [role for role in unnamed if role != "RootWebArea"] == []


CONTRAST = """
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => {
  const [r, g, b] = parts(colour).map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (parts(colour)[3] !== 0) return colour;
  }
  return 'rgb(255, 255, 255)';
};
return [...document.querySelectorAll('body *')]
  .filter((node) => node.checkVisibility())
  .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
  .filter((node) => !node.closest(':disabled, option, .quiet'))
  .map((node) => {
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
    return [node.className || node.tagName, (a + 0.05) / (b + 0.05)];
  });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Page, scheme: str) -> None:
    look(page.driver, prefers_color_scheme=scheme)
    with running(scripted(method="noise", bridges=())) as one:
        page.open(one)
        for text in ("Roses?", "late roses", "attack"):
            page.ask(text)
        page.js("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        ratios = page.js(CONTRAST)
        dark = page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(16, 21, 27)"
        page.one("#theme").click()
    assert dark == (scheme == "dark")
    assert len(ratios) > 30
    assert [(name, round(ratio, 1)) for name, ratio in ratios if ratio < 4.5] == []
    assert page.one("#theme").text == "Theme: light"
    assert page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(245, 246, 248)"


def test_on_a_phone(page: Page) -> None:
    look(page.driver, 360, 640)
    with running(scripted(method="noise", bridges=())) as one:
        page.open(one)
        page.ask("late roses")
        page.one(".story summary").click()
        assert page.js("return document.documentElement.scrollWidth") <= 360
        assert not page.one("#settings").is_displayed()
        page.one("#open-settings").click()
        page.until(lambda: page.focus.get_attribute("id") == "key")
        assert page.one("#open-settings").get_attribute("aria-expanded") == "true"
        page.press(Keys.ESCAPE)
        page.until(lambda: not page.one("#settings").is_displayed())
        assert page.focus.get_attribute("id") == "open-settings"
        small = page.js(
            "return [...document.querySelectorAll('header button, #ask button, select')].filter((one) =>"
            " one.checkVisibility() && one.getBoundingClientRect().height < 39).map((one) => one.id)"
        )
        assert small == []


def test_who_wants_no_motion_gets_none(page: Page, served: Served) -> None:
    look(page.driver, prefers_reduced_motion="reduce")
    page.open(served)
    page.js("document.body.append(Object.assign(document.createElement('div'), { className: 'answer' }))")
    said = "document.querySelector('.answer').append(document.createElement('p'));"
    said += "document.querySelector('.answer p').className = 'said waiting';"
    assert (
        page.js(f"{said} return getComputedStyle(document.querySelector('.said'), '::after').animationName") == "none"
    )

"""Headless Chromium of the system's packages, driven by selenium."""

from __future__ import annotations

import os
import shutil

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "no chromium and chromedriver; on Debian: apt-get install chromium chromium-driver"
ARGUMENTS = ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


def chromium() -> webdriver.Chrome:
    """A browser of its own; whoever starts it quits it."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ARGUMENTS:
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # which does not work for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(str(DRIVER)))


def look(driver: webdriver.Chrome, width: int = 1180, height: int = 760, **features: str) -> None:
    """A screen of that size in CSS pixels, and media features such as ``prefers_color_scheme="dark"``."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})

"""Headless Chromium, and what the tests ask of a page with charts."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.action_chains import ActionChains

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
)

IDLE = "return typeof Bokeh !== 'undefined' && Bokeh.documents.length > 0 && Bokeh.documents.every((d) => d.is_idle)"
# Charts live in shadow roots, where a selector of the page does not look.
DEEP = """
function deep(root, found = []) {
  for (const el of root.querySelectorAll("*")) { found.push(el); if (el.shadowRoot) deep(el.shadowRoot, found); }
  return found;
}
function view(name) { return [...Bokeh.index.roots].find((v) => v.model.name === name); }
"""


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """Start a browser of its own; skip the test where there is none."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver on this machine")
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={profile}", "--window-size=1280,1000"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, ChromeService(DRIVER))
    try:
        yield Page(driver)
    finally:
        driver.quit()


class Page:
    """A page in a browser."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, path: Path, *, scheme: str = "light", width: int = 1280, patience: float = 30.0) -> float:
        """Open a file, wait until all its charts are drawn, and return the seconds it took."""
        scheme_feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_feature)
        metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        began = time.perf_counter()
        self.driver.get(path.as_uri())
        while not self.run(IDLE):
            assert time.perf_counter() - began < patience, self.console()
            time.sleep(0.02)
        return time.perf_counter() - began

    def run(self, script: str, *args: Any) -> Any:
        """Run a script in the page, with ``deep(root)`` and ``view(name)`` at hand."""
        return self.driver.execute_script(DEEP + script, *args)

    def console(self) -> list[str]:
        """Return what the page complained about since it was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] not in ("INFO", "DEBUG")]

    def requests(self) -> list[str]:
        """Return the schemes of everything the page asked for since it was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"].partition(":")[0] for params in sent]

    def hover(self, chart: str, x: float, y: Any, patience: float = 5.0) -> str:
        """Point at a place in a chart, in its own coordinates, and return what it shows there."""
        script = """
        const v = view(arguments[0]), frame = v.frame;
        v.el.scrollIntoView({block: "center", behavior: "instant"});
        const canvas = v.canvas_view.events_el.getBoundingClientRect();
        return [canvas.left + frame.x_scale.compute(arguments[1]), canvas.top + frame.y_scale.compute(arguments[2])];
        """
        left, top = (round(place) for place in self.run(script, chart, x, y))
        actions = ActionChains(self.driver, duration=0)
        actions.w3c_actions.pointer_action.move_to_location(left - 3, top)
        actions.w3c_actions.pointer_action.move_to_location(left, top)
        actions.perform()
        return self.wait(
            """
        const shown = deep(document).filter((el) => el.classList.contains("bk-tooltip-content"));
        return shown.filter((el) => el.checkVisibility()).map((el) => el.innerText).join(" | ").replace(/\\s+/g, " ");
        """,
            patience,
        )

    def wait(self, script: str, patience: float = 5.0) -> Any:
        """Return what a script returns as soon as it is something."""
        began = time.perf_counter()
        while not (found := self.run(script)) and time.perf_counter() - began < patience:
            time.sleep(0.05)
        return found

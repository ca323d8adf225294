"""A headless Chromium or Chrome for tests: found, started without network chatter, and asked what it did."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
DRIVERS = ("chromedriver", "chromium.chromedriver")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def find_browser() -> str | None:
    """The browser named by CHROME or CHROMIUM, or the first on the path."""
    named = next((os.environ[name] for name in ("CHROME", "CHROMIUM") if os.environ.get(name)), None)
    found = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or (str(MAC) if MAC.exists() else None)


def start(profile: Path):
    """A driver with an empty profile that logs its console and every request.

    A driver on the path is used; without one selenium finds its own.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = find_browser() or ""
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = next((path for name in DRIVERS if (path := shutil.which(name))), None)
    return webdriver.Chrome(options=options, service=Service(driver) if driver else None)


class Page:
    """One open report."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, path: Path, *, anchor: str = "", width: int = 1400, height: int = 900, dark: bool = False) -> None:
        self.screen(width, height, dark)
        self.driver.get("about:blank")
        self.requests()
        self.console()
        self.driver.get(path.as_uri() + anchor)

    def screen(self, width: int, height: int = 900, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        # Smooth scrolling would move what a test is about to click.
        wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def js(self, script: str, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def settle(self) -> None:
        """Scroll through the page so that everything lazy is drawn."""
        self.driver.execute_async_script(
            """
            const done = arguments[0];
            let y = 0;
            const step = () => {
              window.scrollTo({ top: y, behavior: "instant" });
              y += 800;
              if (y < document.documentElement.scrollHeight + 800) setTimeout(step, 40);
              else setTimeout(done, 100);
            };
            step();
            """
        )

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]

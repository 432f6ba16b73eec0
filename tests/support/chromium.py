"""Debian's Chromium, headless, driven by selenium: fresh, quiet, and watched.

What the browser asked of the network, what it wrote to its console and what a content security
policy refused is kept, so that a test can say that there was nothing else.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

from selenium.common.exceptions import TimeoutException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

BROWSER = "/usr/bin/chromium"
DRIVER = "/usr/bin/chromedriver"
WAIT_S = 20.0
WINDOW = "1280,1600"

Found = TypeVar("Found")

# Background work of its own that would reach out, and what a machine without a screen lacks.
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--window-size={WINDOW}",
)
_WATCH_POLICY = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.effectiveDirective} ${event.blockedURI}`));
"""


class Browser:
    """One window."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver
        self._requests: list[str] = []

    def open(self, url: str) -> None:
        """Go to a page."""
        self.driver.get(url)

    def one(self, css: str, within: WebElement | None = None) -> WebElement:
        """The first element of this kind, once it is there and can be seen."""
        return self.until(
            lambda: next((each for each in self.all(css, within) if each.is_displayed()), None)
        )

    def all(self, css: str, within: WebElement | None = None) -> list[WebElement]:
        """The elements of this kind that there are now."""
        return (within or self.driver).find_elements(By.CSS_SELECTOR, css)

    def until(self, found: Callable[[], Found | None]) -> Found:
        """What `found` finds, once it finds something."""
        wait = WebDriverWait(self.driver, WAIT_S, poll_frequency=0.05)
        try:
            # The type says that only what is true comes back.
            made = wait.until(lambda _: found())
        except TimeoutException as error:
            seen = [*self.console(), *self.violations(), *self.requests(), self.driver.page_source]
            raise AssertionError("It did not come; the page had:\n" + "\n".join(seen)) from error
        assert made is not None
        return made

    def requests(self) -> list[str]:
        """Every address that pages asked for so far; the browser's own start page is none."""
        for entry in self._log("performance"):
            event = json.loads(str(entry["message"]))["message"]
            if event["method"] == "Network.requestWillBeSent":
                asked = event["params"]
                if not asked["documentURL"].startswith("chrome:"):
                    self._requests.append(asked["request"]["url"])
        return list(self._requests)

    def console(self) -> list[str]:
        """What stands in the console and was not read yet."""
        return [f"{entry['level']} {entry['message']}" for entry in self._log("browser")]

    def violations(self) -> list[str]:
        """What the page's content security policy refused."""
        found: list[str] = self.driver.execute_script("return window.violations")
        return found

    def _log(self, kind: str) -> list[dict[str, object]]:
        # Selenium has no types for this one.
        read = cast("Callable[[str], list[dict[str, object]]]", self.driver.get_log)
        return read(kind)

    def picture(self, path: Path) -> None:
        """Save what the window shows."""
        assert self.driver.save_screenshot(str(path)), path


@contextmanager
def chromium(browser: Path, driver: Path, profile: Path) -> Iterator[Browser]:
    """A window of a Chromium with nothing in its profile."""
    options = ChromeOptions()
    options.binary_location = str(browser)
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # With the driver's path said, selenium looks for none elsewhere.
    driven = Chrome(options, ChromeService(str(driver), log_output=sys.stderr))
    try:
        driven.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH_POLICY})
        yield Browser(driven)
    finally:
        driven.quit()

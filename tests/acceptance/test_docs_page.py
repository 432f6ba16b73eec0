"""`/docs` in a real browser: everything shows, nobody else is asked, and trying a call works."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from selenium.webdriver.common.by import By

from glamd.embedded.settings import LOOPBACK
from tests.support.chromium import BROWSER, DRIVER, Browser, chromium
from tests.support.looks import tap
from tests.support.site import Site

PICTURE = os.environ.get("GLAMD_DOCS_PICTURE")
"""Where a picture of the page goes, for whoever wants to see it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What somebody saw who came, looked, said who they are, and tried one call."""

    shown: int
    told: str
    status: str
    answer: dict[str, Any]
    requests: list[str]
    console: list[str]
    violations: list[str]
    refused: list[str]
    """What the page's policy refused of what was tried against it at the end."""


def visit(browser: Browser, url: str, jwt: str, elsewhere: str) -> Visit:
    """Look at the page at `url` and list payment tokens from it."""
    browser.open(f"{url}/docs")
    browser.one(".opblock")
    shown = len(browser.all(".opblock"))
    told = browser.one(".information-container").text
    authorize(browser, "clientToken", jwt)
    operation = browser.one("#operations-Payment_tokens-listPaymentTokens")
    browser.one(".opblock-summary-control", operation).click()
    browser.one(".try-out__btn", operation).click()
    browser.one(".execute", operation).click()
    live = browser.one(".live-responses-table .response", operation)
    status = browser.one(".response-col_status", live).text
    answer = orjson.loads(browser.one(".response-col_description .microlight", live).text)
    if PICTURE:
        browser.driver.execute_script("arguments[0].scrollIntoView()", operation)
        browser.picture(Path(PICTURE))
    # Read before anything is tried against the policy.
    requests, console, violations = browser.requests(), browser.console(), browser.violations()
    return Visit(
        shown=shown,
        told=told,
        status=status,
        answer=answer,
        requests=requests,
        console=console,
        violations=violations,
        refused=against_the_policy(browser, elsewhere),
    )


def authorize(browser: Browser, scheme: str, token: str) -> None:
    """Enter a token in the dialog."""
    browser.one(".btn.authorize").click()
    form = next(
        form
        for form in browser.all(".auth-container form")
        if scheme in form.find_element(By.CSS_SELECTOR, "h4").text
    )
    browser.one("input", form).send_keys(token)
    browser.one("button.authorize", form).click()
    browser.one(".btn-done").click()
    browser.until(lambda: not browser.all(".dialog-ux") or None)


def against_the_policy(browser: Browser, elsewhere: str) -> list[str]:
    """Ask another origin and run a script of the page's own; what the policy says to it."""
    before = len(browser.violations())
    browser.driver.execute_script(
        """
        fetch(arguments[0]).catch(() => {});
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
        """,
        elsewhere,
    )
    browser.until(lambda: len(browser.violations()) >= before + 2 or None)
    assert browser.driver.execute_script("return window.ran") is None
    return browser.violations()[before:]


@pytest.mark.debian
@pytest.mark.timeout(120)
async def test_in_a_browser_the_page_is_whole_asks_nobody_else_and_makes_a_call(
    site: Site, debian_program: Callable[[str, str], Path], tmp_path: Path
) -> None:
    programs = debian_program(BROWSER, "chromium"), debian_program(DRIVER, "chromium-driver")
    token = await tap(site)
    url = f"http://{LOOPBACK}:{site.daemon.http_port}"
    elsewhere = f"http://{LOOPBACK}:{site.daemon.mqtt_port}/"
    jwt = site.client()["Authorization"].removeprefix("Bearer ")
    async with site.http.get("/openapi.json") as response:
        document = await response.json()

    def visited() -> Visit:
        with chromium(*programs, tmp_path / "profile") as browser:
            return visit(browser, url, jwt, elsewhere)

    seen = await asyncio.to_thread(visited)
    assert seen.shown == sum(len(methods) for methods in document["paths"].values())
    assert f"{document['info']['title']}" in seen.told
    assert seen.status == "200"
    assert [each["token"] for each in seen.answer["data"]] == [token]
    assert {
        address for address in seen.requests if not address.startswith((f"{url}/", "data:"))
    } == set()
    assert {address.partition("?")[0] for address in seen.requests} >= {
        f"{url}{path}"
        for path in ("/docs", "/docs/swagger-ui-bundle.js", "/docs/docs.js", "/openapi.json")
    }
    assert seen.console == []
    assert seen.violations == []
    assert [refusal.split(" ")[0] for refusal in seen.refused] == ["connect-src", "script-src-elem"]

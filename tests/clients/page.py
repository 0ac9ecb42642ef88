"""The chat page in a headless Chromium: 1280 and 360 px, light and dark, by mouse and by keyboard alone."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.clients.steps import KEY, URL, Steps

DOCS = Path(__file__).resolve().parents[2] / "docs"
QUESTION = "Tell me a story about a king."
ANSWER = "article.assistant p"


def main() -> None:
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    assert found is not None, "no Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        # No sandbox: there is none for root; the page is ours.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        steps = Steps("chat page in Chromium", browser.version)
        with steps.step("1280 px, light: a story streams, Stop, tokens"), opened(browser, 1280, 860, "light") as page:
            tell(page)
            page.screenshot(path=DOCS / "chat-page.png")
            stop(page)
            tokens(page)
        with steps.step("360 px, dark: the same"), opened(browser, 360, 740, "dark") as page:
            tell(page)
            page.screenshot(path=DOCS / "chat-page-phone.png")
            stop(page)
            tokens(page)
        with steps.step("360 px, light: settings and a refusal"), opened(browser, 360, 740, "light") as page:
            page.click("summary")
            page.fill("#key", "wrong")
            page.fill("#message", QUESTION)
            page.click("#send")
            expect(page.locator("#status")).to_contain_text("asks for an API key")
            expect(page.locator("#message")).to_have_value(QUESTION)  # it can be sent again
            expect(page.locator("#key")).to_be_focused()
            fits(page)
        with steps.step("1280 px, dark: by keyboard alone"), opened(browser, 1280, 860, "dark", key="") as page:
            by_keyboard(page)
        browser.close()
    steps.end()


@contextlib.contextmanager
def opened(browser: Browser, width: int, height: int, scheme: str, key: str = KEY) -> Iterator[Page]:
    """The page in a window of its own; nothing may go wrong in its console."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.goto(URL)
    expect(page.locator("#key")).to_be_focused()  # the server asks for one: the page opens its settings
    if key:
        page.fill("#key", key)
        page.press("#key", "Tab")
        expect(page.locator("#model")).to_have_text("demo")
        page.fill("#temperature", "0")
        fits(page)
        page.click("summary")
    yield page
    # A refusal of a missing key is told there by the browser itself.
    wrong = [said for said in wrong if "401" not in said]
    assert not wrong, wrong
    context.close()


def tell(page: Page) -> None:
    """A story that is seen to grow, and what it took."""
    page.fill("#message", QUESTION)
    page.click("#send")
    lengths = grows(page)
    assert len(lengths) > 5, f"it came in {len(lengths)} pieces"
    facts = page.locator("article.assistant .facts")
    expect(facts).to_be_visible(timeout=60_000)
    told = facts.inner_text()
    expect(page.locator("#send")).to_be_enabled()
    covered = page.evaluate(
        "document.querySelector('.facts').getBoundingClientRect().bottom - form.getBoundingClientRect().top"
    )
    assert covered <= 0, f"the form covers {covered} px of the facts"
    assert re.search(r"first token after \d+ ms, [\d.]+ tokens/s, \d+ \+ \d+ tokens", told), told
    fits(page)


def grows(page: Page) -> set[int]:
    """Lengths of the last answer's text as they were seen over two seconds."""
    lengths = set()
    for _ in range(40):
        lengths.add(len(page.locator(ANSWER).last.inner_text()) if page.locator(ANSWER).count() else 0)
        page.wait_for_timeout(50)
    return lengths - {0}


def stop(page: Page) -> None:
    """The next answer, stopped in its middle."""
    page.fill("#message", "What happened next?")
    page.click("#send")
    expect(page.locator("article.assistant")).to_have_count(2)
    expect(page.locator("article.assistant").last.locator("p").first).not_to_be_empty()
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text("Stopped")
    expect(page.locator("#send")).to_be_enabled()
    fits(page)


def tokens(page: Page) -> None:
    page.fill("#message", QUESTION)
    page.click("#show-tokens")
    expect(page.locator("#tokens li").first).to_be_visible()
    assert page.locator("#tokens li").count() > 20
    fits(page)
    page.click("#tokens-close")
    expect(page.locator("#tokens-box")).to_be_hidden()


def by_keyboard(page: Page) -> None:
    """Key, question, stop, tokens: with Tab, Enter and Escape."""
    page.keyboard.type(KEY)
    to(page, "#message")
    expect(page.locator("#model")).to_have_text("demo")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    expect(page.locator(ANSWER).first).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("Stopped")
    page.keyboard.type("What happened next?")
    to(page, "#show-tokens")
    page.keyboard.press("Enter")
    expect(page.locator("#tokens-box")).to_be_visible()
    fits(page)


def to(page: Page, selector: str) -> None:
    """Tabs until the element has the focus."""
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.locator(selector).evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"Tab never reaches {selector}")


def fits(page: Page) -> None:
    wide = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1], f"scrolls sideways: {wide}"


main()

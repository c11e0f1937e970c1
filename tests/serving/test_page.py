"""The page in headless Chromium: type, watch, hover, score, by keyboard, on a phone, with hostile text."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("playwright", reason="needs playwright")

from playwright.sync_api import Browser, Page, expect, sync_playwright

from gpt.data.tokenizer_builders import build_char_tokenizer
from gpt.inference.language_model import LanguageModel
from tests.inference.test_language_model import build_cycle
from tests.serving.test_api import serve, slow_model, wait_until

HOSTILE = "<b id=x>"
"""Text that the model repeats; as markup it would be an element with this id."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    tokenizer = build_char_tokenizer(HOSTILE)
    with serve(LanguageModel(build_cycle(tokenizer, HOSTILE), tokenizer)) as (url, _):
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with open_page(browser, url) as page:
        yield page


@contextmanager
def open_page(browser: Browser, url: str, expected: str = "", **settings: Any) -> Iterator[Page]:
    """Open the page, which must cause no error but the expected one, no dialog and no request to another host."""
    context, problems = browser.new_context(**settings), list[str]()
    page = context.new_page()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda sent: None if sent.url.startswith((url, "data:")) else problems.append(sent.url))
    page.goto(url)
    page.locator("summary").click()
    page.locator("#temperature").fill("0")
    page.locator("#max_tokens").fill("16")
    yield page
    context.close()
    assert [problem for problem in problems if not expected or expected not in problem] == []


def test_text_appears_and_hostile_text_stays_text(page: Page) -> None:
    page.locator("#prompt").fill("<")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#output")).to_have_text("<b id=x><b id=x><")
    expect(page.locator("#status")).to_contain_text("16 tokens")
    assert page.locator("#x").count() == 0


def test_probabilities_are_shown_on_hover_and_by_keyboard(page: Page) -> None:
    page.locator("#prompt").fill("<")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("16 tokens")
    page.locator("#output span:nth-child(3)").hover()
    expect(page.locator("#detail")).to_contain_text('" ": ')
    expect(page.locator("#detail")).to_contain_text("most likely")
    page.locator("#output").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#detail")).to_contain_text('"i": ')
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#detail")).to_contain_text('" ": ')


def test_loss_of_each_token_is_coloured(page: Page) -> None:
    page.locator("#prompt").fill("<b id=x>x<")
    page.locator("#score").click()
    expect(page.locator("#status")).to_contain_text("nats per token over")
    opacities = page.eval_on_selector_all(
        "#output span", "spans => spans.map(span => Number(span.style.background.split('/')[1]?.replace(')', '') ?? 0))"
    )
    likely, unlikely = opacities[1:8], opacities[8]
    assert max(likely) < unlikely


def test_escape_stops_the_generation(browser: Browser) -> None:
    with serve(slow_model()) as (url, engine), open_page(browser, url) as page:
        page.locator("#max_tokens").fill("120")
        page.locator("#prompt").fill("a")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#output span").nth(3)).to_be_attached()
        page.keyboard.press("Escape")
        expect(page.locator("#status")).to_have_text("stopped")
        expect(page.locator("#generate")).to_be_enabled()
        wait_until(lambda: 'outcome="cancelled"} 1' in engine.metrics.format())


def test_error_is_shown(browser: Browser, url: str) -> None:
    with open_page(browser, url, expected="Failed to load resource") as page:
        page.locator("#prompt").fill("<img src=x onerror=alert(1)>")
        page.locator("#generate").click()
        expect(page.locator("#status")).to_contain_text("is not in the tokenizer's vocabulary")


def test_page_fits_a_phone_and_follows_the_colour_scheme(browser: Browser, url: str) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
        with open_page(browser, url, **phone) as page:
            page.locator("#prompt").fill("<")
            page.locator("#generate").click()
            expect(page.locator("#status")).to_contain_text("16 tokens")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(251, 251, 253)", "rgb(19, 19, 23)"]

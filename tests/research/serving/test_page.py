"""The chat page: its files and their content security policy; used in a real browser, if there is one (slow)."""

import re

import pytest

pytest.importorskip("fastapi")

from research import ROOT
from research.serving.app import CONTENT_SECURITY_POLICY, PAGE_FOLDER
from tests.research.serving.helpers import browser
from tests.research.serving.helpers.servers import PATIENCE, served, until

PICTURES = ROOT / ".cache" / "pictures"
TOKEN = "a-token-for-this-test-only"


def test_the_page_needs_nothing_from_elsewhere_and_no_markup_from_anybody():
    files = {path.name: path.read_text() for path in PAGE_FOLDER.iterdir()}
    assert set(files) == {"index.html", "page.css", "page.js"}
    assert not any(re.search(r"https?://|//cdn|@import|url\(", text) for text in files.values())
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", files["page.js"])
    assert not re.search(r"<script>|\son\w+=|style=", files["index.html"]) and "'unsafe" not in CONTENT_SECURITY_POLICY


@pytest.fixture(scope="module")
def server(small):
    with served(small, "--context", "20000") as found:
        yield found


class Page:
    """What a person does with it."""

    def __init__(self, driver) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.driver, self.keys, self.css = driver, Keys, By.CSS_SELECTOR
        until(lambda: self.one("#model").text not in ("connecting …", ""))

    def one(self, css: str):
        return self.driver.find_element(self.css, css)

    def texts(self, css: str) -> list[str]:
        return [each.get_attribute("textContent") for each in self.driver.find_elements(self.css, css)]

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    @property
    def writing(self) -> bool:
        return bool(self.driver.find_elements(self.css, ".writing"))

    @property
    def focus(self) -> str:
        return self.driver.switch_to.active_element.get_attribute("id")


@pytest.mark.slow
@pytest.mark.parametrize(("look", "size"), [("light", (1100, 800)), ("dark", (1100, 800)), ("narrow", (360, 640))])
def test_a_conversation_by_keyboard_alone(server, look, size):
    """Enter sends, Shift+Enter does not, what streams is seen, Esc stops, Tab and Enter reach Clear; markup stays text."""
    with browser.opened(server.url, dark=look == "dark", size=size) as driver:
        page = Page(driver)
        assert server.running.service.name in page.one("#model").text and page.focus == "message"
        browser.picture(driver, PICTURES / f"page_{look}_empty.png")
        driver.execute_script("document.getElementById('temperature').value = 0")  # greedy, this model repeats itself and does not end
        page.press("<img src=x onerror=alert(1)>", page.keys.SHIFT, page.keys.ENTER, page.keys.NULL, "<b>the people</b>")
        assert not page.texts(".turn")
        page.press(page.keys.ENTER)
        until(lambda: page.writing and len(page.texts(".turn.assistant p")[0]) > 20)
        before = page.texts(".turn.assistant p")[0]
        until(lambda: len(page.texts(".turn.assistant p")[0]) > len(before))
        assert page.texts(".turn.user p") == ["<img src=x onerror=alert(1)>\n<b>the people</b>"]
        assert not driver.find_elements(page.css, "main img, main b")
        assert page.one("#stop").is_displayed() and not page.one("#send").is_displayed()
        browser.picture(driver, PICTURES / f"page_{look}_writing.png")
        page.press(page.keys.ESCAPE)
        until(lambda: not page.writing)
        until(lambda: server.number("tessera_slots_used") == 0)
        assert page.texts(".how") == ["stopped"] and page.focus == "message"
        width = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1], "the page scrolls sideways"
        browser.picture(driver, PICTURES / f"page_{look}_stopped.png")
        for _ in range(10):
            page.press(page.keys.SHIFT, page.keys.TAB, page.keys.NULL)
            if page.focus == "clear":
                break
        assert page.focus == "clear" and driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.press(page.keys.ENTER)
        until(lambda: not page.texts(".turn"))
        assert page.focus == "message" and page.one("#empty").is_displayed()
        assert [entry["message"] for entry in driver.get_log("browser")] == []


@pytest.mark.slow
def test_by_mouse_with_settings_and_a_refusal_in_words(server):
    with browser.opened(server.url) as driver:
        page = Page(driver)
        page.one("summary").click()
        page.one("#system").send_keys("Be brief.")
        driver.execute_script("const t = document.getElementById('temperature'); t.value = 0; t.dispatchEvent(new Event('input'));")
        assert page.one("#shown").text == "0.00"
        page.one("#tokens").send_keys("6")
        browser.picture(driver, PICTURES / "page_settings.png")
        page.one("#message").send_keys("war")
        page.one("#send").click()
        until(lambda: page.texts(".how") == ["cut off: no more tokens"])
        asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "war"}]
        answer = server.post("/v1/chat/completions", messages=asked, temperature=0, max_tokens=6).json()["choices"][0]["message"]["content"]
        assert page.texts(".turn.assistant p") == [answer]
        page.one("#tokens").clear()
        page.one("#tokens").send_keys("30000")
        page.one("#message").send_keys("peace")
        page.one("#send").click()
        until(lambda: "does not slide" in page.one("#error").text)
        assert page.texts(".turn.user p") == ["war"] and page.one("#message").get_attribute("value") == "peace"
        browser.picture(driver, PICTURES / "page_refusal.png")
        page.one("#clear").click()
        until(lambda: not page.texts(".turn"))
        assert not page.one("#error").is_displayed()


@pytest.mark.slow
def test_the_page_asks_for_the_token(small, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    with served(small, "--token_file", str(tmp_path / "token")) as locked, browser.opened(locked.url) as driver:
        page = Page(driver)
        assert page.one("#model").text == "locked" and page.focus == "token" and not page.one("#ask").is_displayed()
        page.press("something-else", page.keys.ENTER)
        until(lambda: page.one("#error").text == "That is not this server's token.")
        browser.picture(driver, PICTURES / "page_locked.png")
        page.press(TOKEN, page.keys.ENTER)
        until(lambda: page.one("#ask").is_displayed())
        driver.execute_script("document.getElementById('temperature').value = 0")
        page.press("war", page.keys.ENTER)
        until(lambda: bool(page.texts(".turn.assistant p")) and page.texts(".turn.assistant p")[0] != "", PATIENCE)
        assert TOKEN not in driver.page_source
        assert driver.execute_script("return localStorage.length + sessionStorage.length + document.cookie.length") == 0

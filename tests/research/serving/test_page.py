"""The chat page: its files and their content security policy; used in a real browser, if there is one (slow)."""

import re
from itertools import product

import pytest

pytest.importorskip("fastapi")

from research import ROOT
from research.serving.app import CONTENT_SECURITY_POLICY, PAGE_FILES, PAGE_FOLDER
from tests.research.serving.helpers import browser
from tests.research.serving.helpers.servers import PATIENCE, served, until

PICTURES = ROOT / ".cache" / "pictures"
TOKEN = "a-token-for-this-test-only"
LOOKS = [("light", (1100, 800)), ("dark", (1100, 800)), ("narrow", (360, 640))]
TEXT_CONTRAST, EDGE_CONTRAST = 4.5, 3.0
"""WCAG 2's level AA, for text and for the edges of what can be used."""


def test_the_page_needs_nothing_from_elsewhere_and_no_markup_from_anybody():
    files = {path.name: path.read_text() for path in PAGE_FOLDER.iterdir()}
    assert set(files) == {name for name, _ in PAGE_FILES.values()}
    assert not any(re.search(r"https?://|//cdn|@import|url\(", text) for text in files.values())
    assert not any(
        re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|document\.cookie", text) for text in files.values()
    )
    assert not re.search(r"<script>|\son\w+=|style=", files["index.html"]) and "'unsafe" not in CONTENT_SECURITY_POLICY


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rrggbb."""
    shares = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_colour_of_text_stands_out_in_both_themes():
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in (PAGE_FOLDER / "page.css").read_text().split(":root")[1:]]
    pairs = [
        *(pair + (TEXT_CONTRAST,) for pair in product(("ink", "soft"), ("paper", "panel"))),
        *(pair + (TEXT_CONTRAST,) for pair in (("ink", "mine"), ("accent-ink", "accent"), ("wrong", "wrong-paper"), ("paper", "c"))),
        *(pair + (EDGE_CONTRAST,) for pair in product(("edge", "accent"), ("paper", "panel"))),
    ]
    assert len(themes) == 2
    for theme, (front, back, least) in product(themes, pairs):
        low, high = sorted(luminance(theme[name]) for name in (front, back))
        assert (high + 0.05) / (low + 0.05) >= least, (front, back)


@pytest.fixture(scope="module")
def server(small):
    with served(small, "--context", "20000") as found:
        yield found


@pytest.fixture(scope="module")
def short(small):
    """A context like the default model's, which one answer of the page's first version filled."""
    with served(small) as found:
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

    def mode(self, name: str) -> None:
        """Chooses a mode by one click."""
        self.one(f".modes label:has([value={name}])").click()

    def set(self, **settings) -> None:
        """Changes settings as if they were typed."""
        change = "const [id, value] = arguments, field = document.getElementById(id); field.value = value;"
        for name, value in settings.items():
            self.driver.execute_script(f"{change} field.dispatchEvent(new Event('input', {{bubbles: true}}));", name, value)

    def send(self, text: str) -> None:
        """Types a text, presses Enter, and waits until nothing is written any more."""
        self.one("#message").send_keys(text, self.keys.ENTER)
        until(lambda: not self.busy)

    def tool(self, turn: str, name: str) -> None:
        """Presses a button under a turn or under the text."""
        tools = self.driver.find_elements(self.css, f"{turn} .tool")
        next(tool for tool in tools if tool.get_attribute("textContent") == name).click()

    @property
    def busy(self) -> bool:
        return bool(self.driver.find_elements(self.css, ".busy"))

    @property
    def focus(self) -> str:
        return self.driver.switch_to.active_element.get_attribute("id")

    @property
    def complaints(self) -> list[str]:
        """What the browser's console shows."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def edges(self, css: str) -> tuple[float, float]:
        """The left and the right edge of what an element holds, without its padding."""
        script = """const element = document.querySelector(arguments[0]);
            const box = element.getBoundingClientRect(), style = getComputedStyle(element);
            return [box.left + parseFloat(style.paddingLeft), box.right - parseFloat(style.paddingRight)];"""
        return tuple(self.driver.execute_script(script, css))

    def fits(self) -> bool:
        """Whether nothing scrolls sideways."""
        width, window = self.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        return width <= window


@pytest.mark.slow
@pytest.mark.parametrize(("look", "size"), LOOKS)
def test_a_conversation_by_keyboard_alone(server, look, size):
    """Enter sends, Shift+Enter does not, what streams is seen, Esc stops, Tab and Enter reach Clear; markup stays text."""
    with browser.opened(server.url, dark=look == "dark", size=size) as driver:
        page = Page(driver)
        assert server.running.service.name in page.one("#model").text and page.focus == "message"
        page.mode("chat")
        page.set(temperature=0, max_tokens=15000)  # greedy, this model repeats itself and does not end
        browser.picture(driver, PICTURES / f"page_{look}_empty.png")
        page.press("<img src=x onerror=alert(1)>", page.keys.SHIFT, page.keys.ENTER, page.keys.NULL, "<b>the people</b>")
        assert not page.texts(".turn")
        page.press(page.keys.ENTER)
        until(lambda: page.busy and len(page.texts(".turn.assistant p")[0]) > 20)
        before = page.texts(".turn.assistant p")[0]
        until(lambda: len(page.texts(".turn.assistant p")[0]) > len(before))
        assert page.texts(".turn.user p") == ["<img src=x onerror=alert(1)>\n<b>the people</b>"]
        assert not driver.find_elements(page.css, "main img, main b")
        assert page.one("#stop").is_displayed() and not page.one("#send").is_displayed()
        browser.picture(driver, PICTURES / f"page_{look}_writing.png")
        page.press(page.keys.ESCAPE)
        until(lambda: not page.busy)
        until(lambda: server.number("tessera_slots_used") == 0)
        assert page.texts(".turn.assistant .how") == ["stopped"] and page.focus == "message"
        assert page.fits()
        assert page.edges("header .column") == page.edges("main") == page.edges("footer .column")
        assert page.edges(".turn.assistant")[0] == page.edges("main")[0] == page.edges("#ask")[0]
        browser.picture(driver, PICTURES / f"page_{look}_stopped.png")
        for _ in range(20):
            page.press(page.keys.SHIFT, page.keys.TAB, page.keys.NULL)
            if page.focus == "clear":
                break
        assert page.focus == "clear" and driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.press(page.keys.ENTER)
        until(lambda: not page.texts(".turn"))
        assert page.focus == "message" and page.one("#chat .empty").is_displayed() and page.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize(("look", "size"), LOOKS)
def test_ten_turns_in_a_context_that_two_of_them_fill(short, look, size):
    """None is refused; which turns the model has not read is said on the page, as the server counts them."""
    with browser.opened(short.url, dark=look == "dark", size=size) as driver:
        page = Page(driver)
        page.mode("chat")
        page.set(temperature=0)
        for i in range(10):
            page.send(f"war {i} and the people")
            assert not page.one("#error").is_displayed() and len(page.texts(".turn.assistant p")) == i + 1
        turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(page.texts(".turn > p"))]
        assert len(turns) == 20 and page.fits()
        asked = dict(messages=turns[:-1], temperature=0, top_p=0.95, max_tokens=32, truncation="auto")
        answer = short.post("/v1/chat/completions", **asked).json()
        assert answer["messages_left_out"] > 10 and answer["choices"][0]["message"]["content"].strip() == turns[-1]["content"].strip()
        assert page.texts("#chat .left-out") == [f"{answer['messages_left_out']} earlier messages are left out: the model reads 128 tokens"]
        assert len(page.texts(".turn.unread")) == answer["messages_left_out"]
        assert page.texts(".turn.assistant .how")[-1] == "32 tokens · limit reached"
        browser.picture(driver, PICTURES / f"page_{look}_ten_turns.png")
        driver.execute_script("document.querySelector('#chat .left-out').scrollIntoView({block: 'center'})")
        browser.picture(driver, PICTURES / f"page_{look}_left_out.png")
        assert page.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize(("look", "size"), LOOKS)
def test_a_run_without_a_template_continues_text(short, look, size):
    """It opens so, with a prompt from the held-out text; the text may grow beyond the context, which the page says in tokens."""
    encode = short.running.service.tokenizer.encode
    with browser.opened(short.url, dark=look == "dark", size=size) as driver:
        page = Page(driver)
        assert page.one("#text").is_displayed() and not page.one("#chat").is_displayed()
        assert page.texts(".prompt") == ["the people of the union — ½ of them, …"]
        browser.picture(driver, PICTURES / f"page_{look}_text_empty.png")
        page.set(temperature=0, top_p=1)
        page.one(".prompt").click()
        until(lambda: not page.busy and bool(page.texts(".document .assistant")))
        prompt = "the people of the union — ½ of them,"
        asked = dict(prompt=prompt, temperature=0, max_tokens=32)
        assert page.texts(".document") == [prompt + short.post("/v1/completions", **asked).json()["choices"][0]["text"]]
        for _ in range(4):
            page.send("")
        end = page.texts(".document")[0][-1]
        page.send("and so")
        whole = page.texts(".document")[0]
        last = page.texts(".document .assistant")[-1]
        assert len(page.texts(".document .assistant")) == 6 and whole.endswith(
            f"{' ' if re.match('[a-z0-9.,;:)]', end) else ''}and so{last}"
        )
        left_out = len(encode(whole[: len(whole) - len(last)])) - (128 - 32)
        assert page.texts("#text .left-out") == [f"The first {left_out} tokens are left out: the model reads 128 tokens"] and left_out > 50
        page.tool("#text", "Retry")
        until(lambda: not page.busy and page.texts(".document") == [whole])  # greedy, so the same again
        page.tool("#text", "Undo")
        assert page.texts(".document") == [whole[: len(whole) - len(last)]]
        page.tool("#text", "Edit")
        browser.picture(driver, PICTURES / f"page_{look}_text_edit.png")
        page.one(".editor textarea").clear()
        page.one(".editor textarea").send_keys("war and", page.keys.CONTROL, page.keys.ENTER)
        assert page.texts(".document") == ["war and"] and not page.one("#text .left-out").is_displayed()
        page.send("")
        asked["prompt"] = "war and"
        assert page.texts(".document") == ["war and" + short.post("/v1/completions", **asked).json()["choices"][0]["text"]]
        browser.picture(driver, PICTURES / f"page_{look}_text.png")
        assert page.fits() and page.complaints == []
        page.one("#clear").click()
        assert page.one(".prompts").is_displayed() and page.texts(".document") == [""]


@pytest.mark.slow
def test_more_turns_than_a_request_may_hold(small):
    with served(small, "--messages", "6", "--context", "2000") as server, browser.opened(server.url) as driver:
        page = Page(driver)
        page.mode("chat")
        page.set(temperature=0, max_tokens=4)
        page.driver.execute_script("document.getElementById('system').value = 'Be kind.'")
        for i in range(6):
            page.send(f"war {i}")
            assert not page.one("#error").is_displayed() and len(page.texts(".turn.assistant p")) == i + 1
        assert page.texts("#chat .left-out") == ["6 earlier messages are left out: the server takes 6 messages"]
        assert page.complaints == []


@pytest.mark.slow
def test_copy_edit_and_retry_in_a_conversation(short):
    with browser.opened(short.url) as driver:
        page = Page(driver)
        page.mode("chat")
        page.set(temperature=0, top_p=1, max_tokens=8)
        page.send("war")
        page.send("peace")
        answers = page.texts(".turn.assistant p")
        page.tool(".turn:last-child", "Retry")
        until(lambda: not page.busy)
        assert page.texts(".turn.assistant p") == answers
        page.tool(".turn:last-child", "Copy")
        until(lambda: page.texts("#said") == ["Copied"])
        page.one("#message").send_keys(page.keys.CONTROL, "v")
        assert page.one("#message").get_attribute("value").strip() == answers[1]
        page.one("#message").clear()
        driver.execute_script("document.querySelector('.turn.user .tool:nth-child(2)').click()")
        browser.picture(driver, PICTURES / "page_edit.png")
        assert page.one(".editor textarea").get_attribute("value") == "war" and not page.one("#ask").is_displayed()
        page.press(page.keys.ESCAPE)
        assert page.texts(".turn.user p") == ["war", "peace"] and page.one("#ask").is_displayed()
        driver.execute_script("document.querySelector('.turn.user .tool:nth-child(2)').click()")
        page.press(" and jobs")
        page.one(".editor .primary").click()
        until(lambda: not page.busy)
        asked = dict(messages=[{"role": "user", "content": "war and jobs"}], temperature=0, max_tokens=8)
        answer = short.post("/v1/chat/completions", **asked).json()["choices"][0]["message"]["content"]
        assert page.texts(".turn.user p") == ["war and jobs"] and page.texts(".turn.assistant p") == [answer.lstrip()]
        assert page.complaints == []


@pytest.mark.slow
def test_by_mouse_with_settings_and_a_refusal_in_words(server):
    with browser.opened(server.url) as driver:
        page = Page(driver)
        page.mode("chat")
        page.one("#open").click()
        page.one("#system").send_keys("Be brief.")
        page.set(temperature=0, repetition_penalty=1.5)
        assert page.texts("output") == ["0.00", "0.95", "1.50"]
        page.one("#max_tokens").send_keys("6")
        browser.picture(driver, PICTURES / "page_settings.png")
        page.one("#close").click()
        page.one("#message").send_keys("war")
        page.one("#send").click()
        until(lambda: page.texts(".turn.assistant .how")[:1] == ["6 tokens · limit reached"])
        asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "war"}]
        sampling = dict(temperature=0, max_tokens=6, repetition_penalty=1.5)
        answer = server.post("/v1/chat/completions", messages=asked, **sampling).json()["choices"][0]["message"]["content"]
        assert page.texts(".turn.assistant p") == [answer.lstrip()]
        page.set(top_k=-1)
        page.one("#message").send_keys("peace")
        page.one("#send").click()
        until(lambda: "top_k = -1 does not work → send a whole number" in page.one("#error").text)
        assert page.texts(".turn.user p") == ["war"] and page.one("#message").get_attribute("value") == "peace"
        browser.picture(driver, PICTURES / "page_refusal.png")
        page.one("#clear").click()
        until(lambda: not page.texts(".turn"))
        assert not page.one("#error").is_displayed()


@pytest.mark.slow
def test_settings_are_kept_over_a_reload_and_what_is_written_is_not(server):
    with browser.opened(server.url, size=(360, 640)) as driver:
        page = Page(driver)
        page.mode("chat")
        page.one("#open").click()
        page.one("#system").send_keys("A secret of mine")
        page.set(temperature=0.3, seed=7, max_tokens=3)
        browser.picture(driver, PICTURES / "page_sheet.png")
        assert page.edges("dialog")[1] == 360, "the sheet is as wide as the phone"
        page.press(page.keys.ESCAPE)
        until(lambda: not page.one("#settings").is_displayed())
        page.send("Another secret")
        kept = driver.execute_script("return JSON.stringify({...localStorage}) + JSON.stringify({...sessionStorage}) + document.cookie")
        assert "secret" not in kept
        driver.refresh()
        page = Page(driver)
        values = {name: page.one(f"#{name}").get_attribute("value") for name in ("temperature", "seed", "max_tokens", "top_p", "system")}
        assert values == {"temperature": "0.3", "seed": "7", "max_tokens": "3", "top_p": "0.95", "system": ""}
        assert page.one("#chat").is_displayed() and not page.texts(".turn")
        page.one("#open").click()
        page.one("#reset").click()
        assert [page.one(f"#{name}").get_attribute("value") for name in ("temperature", "seed", "max_tokens")] == ["0.7", "", ""]
        driver.execute_script("localStorage.setItem('tessera.settings', '{broken')")
        driver.refresh()
        assert Page(driver).one("#text").is_displayed(), "what cannot be read is as if it were not there"


@pytest.mark.slow
def test_everything_that_can_be_used_has_a_name(server):
    with browser.opened(server.url) as driver:
        page = Page(driver)
        script = """return [...document.querySelectorAll('button, input, textarea')].filter((field) =>
            !(field.labels?.length || field.getAttribute('aria-label') || field.textContent.trim())).map((field) => field.outerHTML)"""
        page.mode("chat")
        page.set(max_tokens=2)
        page.send("war")
        page.tool(".turn:last-child", "Edit")
        assert driver.execute_script(script) == []


@pytest.mark.slow
def test_the_page_asks_for_the_token(small, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    with served(small, "--token_file", str(tmp_path / "token")) as locked, browser.opened(locked.url) as driver:
        page = Page(driver)
        assert page.one("#model").text == "locked" and page.focus == "token" and not page.one("#ask").is_displayed()
        assert not page.texts(".prompt"), "the held-out text is the run's, and not for everybody"
        page.press("something-else", page.keys.ENTER)
        until(lambda: page.one("#error").text == "That is not this server's token.")
        browser.picture(driver, PICTURES / "page_locked.png")
        page.press(TOKEN, page.keys.ENTER)
        until(lambda: page.one("#ask").is_displayed())
        page.mode("chat")
        page.set(temperature=0)
        page.press("war", page.keys.ENTER)
        until(lambda: bool(page.texts(".turn.assistant p")) and page.texts(".turn.assistant p")[0] != "", PATIENCE)
        assert TOKEN not in driver.page_source
        kept = driver.execute_script("return JSON.stringify({...localStorage}) + JSON.stringify({...sessionStorage}) + document.cookie")
        assert TOKEN not in kept

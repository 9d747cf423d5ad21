"""The report as a reader sees it: headless Chromium at desktop and phone width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from tests.report.browsing import DESKTOP, PHONE, labels, opacity, requests, screenshot, show
from tests.report.report_sample import EVIL_END, TEXT_FEATURE

PAGES = ("index.html", "index.html#view=table", "compare.html", "features/0.html", f"features/{TEXT_FEATURE}.html")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("page", PAGES)
def test_page_is_whole_at_every_width(browser: Chrome, report: Path, page: str, size: tuple[int, int]) -> None:
    show(browser, report, page, size)
    browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    browser.execute_script("document.querySelectorAll('img').forEach(one => { one.loading = 'eager'; })")
    broken = """
        const done = arguments[0];
        Promise.all([...document.images].map(one => one.decode().then(() => null, () => one.src)))
            .then(found => done(found.filter(Boolean)));
    """
    assert browser.execute_async_script(broken) == []
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    assert browser.execute_script("return window.hacked") is None
    seen = screenshot(browser)[::2, ::2].astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    assert len(np.unique(seen)) > 50, "a blank page has few colours"


@pytest.mark.parametrize("page", PAGES)
def test_nothing_leaves_the_folder(browser: Chrome, report: Path, page: str) -> None:
    show(browser, report, page)
    asked = requests(browser)
    assert len(asked) >= 3, "the page, its style and its script"
    assert [url for url in asked if not url.startswith((f"file://{report}/", "data:"))] == []


def test_network_would_be_refused(browser: Chrome, report: Path) -> None:
    show(browser, report, "index.html")
    attempt = "fetch('http://127.0.0.1:9/').then(() => arguments[0]('went out'), () => arguments[0]('refused'))"
    assert browser.execute_async_script(attempt) == "refused"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_search_finds_explanations_and_tokens(browser: Chrome, report: Path) -> None:
    show(browser, report, "index.html")
    assert sorted(labels(browser)) == ["0", "1", "2", "3", "7"]
    box = browser.find_element(By.ID, "q")
    box.send_keys("objects GREEN")
    assert labels(browser) == ["1"]
    assert "1 of 5" in browser.find_element(By.ID, "tally").text
    box.clear()
    box.send_keys("yellow")
    assert labels(browser) == ["3"], "not explained, but active on the word"
    box.send_keys(" nothing like it")
    assert labels(browser) == []
    browser.find_element(By.ID, "reset-empty").click()
    assert len(labels(browser)) == 5


def test_filter_by_modality_and_back_by_address(browser: Chrome, report: Path) -> None:
    show(browser, report, "index.html")
    browser.execute_script("document.querySelector('input[name=modality][value=text]').click()")
    assert labels(browser) == [str(TEXT_FEATURE)]
    address = browser.current_url
    assert address.endswith("#modality=text")
    show(browser, report, "index.html#modality=text&sort=density&reverse=1")
    assert labels(browser) == [str(TEXT_FEATURE)]
    assert Select(browser.find_element(By.ID, "sort")).first_selected_option.text == "density"
    browser.find_element(By.CSS_SELECTOR, ".card a").click()
    browser.find_element(By.CSS_SELECTOR, "[data-back]").click()
    assert browser.current_url.endswith("#modality=text&sort=density&reverse=1")


def test_sorting_runs_both_ways(browser: Chrome, report: Path) -> None:
    show(browser, report, "index.html")
    assert labels(browser)[0] in ("0", "2"), "best detection first; 1 was wrong once"
    assert labels(browser)[3:] == ["3", "7"], "without a score: last"
    Select(browser.find_element(By.ID, "sort")).select_by_value("max")
    assert labels(browser) == ["3", "2", "1", "0", "7"]
    browser.find_element(By.ID, "direction").click()
    assert labels(browser) == ["7", "0", "1", "2", "3"]


def test_score_and_density_filters(browser: Chrome, report: Path) -> None:
    show(browser, report, "index.html")
    slide = """
        const input = document.querySelector(arguments[0]);
        input.value = arguments[1];
        input.dispatchEvent(new Event("input", { bubbles: true }));
    """
    browser.execute_script(slide, 'input[data-score="detection"]', 95)
    assert sorted(labels(browser)) == ["0", "2"]
    browser.execute_script(slide, 'input[data-score="detection"]', 0)
    browser.execute_script(slide, "#density-max", 10)
    assert labels(browser) == [str(TEXT_FEATURE)]
    browser.find_element(By.ID, "reset").click()
    assert len(labels(browser)) == 5


def test_table_sorts_by_its_heads(browser: Chrome, report: Path) -> None:
    show(browser, report, "index.html#view=table")
    browser.execute_script("[...document.querySelectorAll('th button')].find(b => b.textContent === 'number').click()")
    cells = "return [...document.querySelectorAll('#rows td:nth-child(2)')].map(cell => cell.textContent)"
    assert browser.execute_script(cells) == ["0", "1", "2", "3", "7"]
    assert browser.execute_script("return document.querySelector('th[aria-sort]').ariaSort") == "ascending"
    browser.execute_script("document.querySelector('th[aria-sort] button').click()")
    assert browser.execute_script(cells) == ["7", "3", "2", "1", "0"]


def test_heat_map_toggles_by_button_key_and_slider(browser: Chrome, report: Path) -> None:
    show(browser, report, "features/0.html")
    browser.execute_script(
        "document.head.insertAdjacentHTML('beforeend', '<style>*{transition:none!important}</style>')"
    )
    toggle = browser.find_element(By.ID, "heat-toggle")
    with_heat = screenshot(browser)
    assert opacity(browser) == pytest.approx(0.8)
    toggle.click()
    assert opacity(browser) == 0
    assert toggle.get_attribute("aria-pressed") == "false"
    assert (screenshot(browser) != with_heat).any(axis=2).mean() > 0.02
    browser.find_element(By.TAG_NAME, "body").send_keys("h")
    assert opacity(browser) == pytest.approx(0.8)
    slider = browser.find_element(By.ID, "heat-opacity")
    slider.send_keys(Keys.HOME)
    assert opacity(browser) == pytest.approx(0.1)
    slider.send_keys(Keys.END)
    assert opacity(browser) == 1


def test_picture_is_enlarged_with_its_heat(browser: Chrome, report: Path) -> None:
    show(browser, report, "features/0.html")
    stage = browser.find_element(By.CSS_SELECTOR, "button.stage")
    stage.send_keys(Keys.ENTER)
    frame = browser.find_element(By.CSS_SELECTOR, "#lightbox[open] .frame")
    assert [one.tag_name for one in frame.find_elements(By.CSS_SELECTOR, "*")] == ["img", "canvas"]
    pixels = "const c = document.querySelector('#lightbox canvas'); return [c.dataset.drawn, c.width, c.height]"
    assert browser.execute_script(pixels)[0] == "both"
    assert frame.size["width"] > 1.5 * stage.size["width"]
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not browser.find_elements(By.CSS_SELECTOR, "#lightbox[open]")


def test_arrow_keys_turn_pages(browser: Chrome, report: Path) -> None:
    show(browser, report, "features/0.html")
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_RIGHT)
    assert browser.current_url.endswith("features/1.html")
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_LEFT)
    assert browser.current_url.endswith("features/0.html")


def test_markup_is_shown_as_text(browser: Chrome, report: Path) -> None:
    show(browser, report, f"features/{TEXT_FEATURE}.html")
    assert browser.find_element(By.TAG_NAME, "h1").text == EVIL_END
    browser.execute_script("document.querySelectorAll('*').forEach(e => e.dispatchEvent(new Event('mouseover')))")
    show_index = "return [...document.querySelectorAll('.card .label')].map(label => label.textContent)"
    show(browser, report, "index.html")
    assert EVIL_END in browser.execute_script(show_index)
    assert browser.execute_script("return window.hacked") is None


def test_dark_is_dark(browser: Chrome, report: Path) -> None:
    show(browser, report, "features/1.html", scheme="dark")
    dark = screenshot(browser)[:50].mean()
    show(browser, report, "features/1.html", scheme="light")
    assert dark < 60
    assert screenshot(browser)[:50].mean() > 200


def test_map_leads_to_a_feature(browser: Chrome, report: Path) -> None:
    show(browser, report, "index.html#q=word+red")
    canvas = browser.find_element(By.ID, "map")
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", canvas)
    lit = """
        const canvas = arguments[0], { width, height } = canvas;
        const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
        const wanted = getComputedStyle(document.documentElement).getPropertyValue("--both").trim();
        const [r, g, b] = [1, 3, 5].map((at) => parseInt(wanted.slice(at, at + 2), 16));
        for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
            const at = 4 * (y * width + x);
            const near = Math.abs(pixels[at] - r) + Math.abs(pixels[at + 1] - g) + Math.abs(pixels[at + 2] - b) < 12;
            if (near && pixels[at + 3] > 150) return [x - width / 2 + 3, y - height / 2 + 1];
        }
        return null;
    """
    offset = browser.execute_script(lit, canvas)
    ActionChains(browser).move_to_element_with_offset(canvas, round(offset[0]), round(offset[1])).perform()
    assert browser.find_element(By.ID, "map-tip").text == "0 · red things"
    ActionChains(browser).click().perform()
    assert browser.current_url.endswith("features/0.html")

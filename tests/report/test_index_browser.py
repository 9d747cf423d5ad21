"""The index of many features: loaded in parts, filtered at once, walked through with the keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

from sae_lens_multimodal.report.index_data import PART, IndexData, IndexEntry
from sae_lens_multimodal.report.render import STATIC_FILES, render_index, static_text
from sae_lens_multimodal.report.script_data import write_page
from sae_lens_multimodal.report.view import ReportView
from tests.report.browsing import labels, requests, show, texts, wait

N = 2 * PART + 40
"""Features: two whole files of them and a part of a third."""


def entry(number: int) -> IndexEntry:
    density = 10 ** -(1 + number % 4)
    return IndexEntry(
        row={
            "index": 3 * number,
            "label": f"thing {number}" if number % 2 else "",
            "modality": ("image", "text", "both", None)[number % 4],
            "share": number / N,
            "density": density,
            "image": density,
            "text": density / 2,
            "max": float(number),
        },
        numbers={"detection": (number / N, 0.5), "masks iou": (1 - number / N, None)} if number % 5 else {},
        details={"thumbs": [], "snippets": [["a ", f"word{number}", " b"]], "words": f"word{number}"},
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    report = ReportView(title="Many", facts=(), tables=(), score_names=("detection",), measure_names=("masks iou",))
    index = IndexData(folder, report, sort="value:detection")
    for number in range(N):
        index.add(entry(number))
    index.finish()
    write_page(folder / "index.html", render_index(report))
    (folder / "static").mkdir()
    for name in STATIC_FILES:
        write_page(folder / "static" / name, static_text(name))
    (folder / "features").mkdir()
    (folder / "features" / f"{3 * (N - 1)}.html").write_text("<!doctype html><title>a page</title>")
    return folder


def complete(browser: Chrome) -> None:
    """Wait until all parts are there."""
    wait(browser, "return document.getElementById('cards').dataset.complete")


def test_it_opens_with_the_best_and_loads_the_rest_behind(browser: Chrome, many: Path) -> None:
    show(browser, many, "index.html")
    assert labels(browser)[:2] == [str(3 * (N - 1)), str(3 * (N - 2))]
    assert len(labels(browser)) == 60
    complete(browser)
    asked = [url.rpartition("/")[2] for url in requests(browser)]
    assert sorted(one for one in asked if one.startswith("part-")) == ["part-0.js", "part-1.js", "part-2.js"]
    assert texts(browser, ".snippet mark")[:1] == [f"word{N - 1}"], "filled in where it was drawn before"
    assert browser.get_log("browser") == []


def test_words_of_every_part_are_found(browser: Chrome, many: Path) -> None:
    show(browser, many, "index.html#q=word7")
    complete(browser)
    wanted = [number for number in range(N) if str(number).startswith("7")]
    wait(
        browser,
        "return document.getElementById('tally').textContent === arguments[0]",
        f"{len(wanted)} of {N} features",
    )
    assert sorted(map(int, labels(browser))) == sorted(3 * number for number in wanted)[:60]


def test_scrolling_brings_more_and_every_one_once(browser: Chrome, many: Path) -> None:
    show(browser, many, "index.html#sort=index")
    complete(browser)
    wait(browser, f"scrollTo(0, document.body.scrollHeight); return document.querySelectorAll('.card').length === {N}")
    assert labels(browser) == [str(3 * number) for number in range(N)]
    assert not browser.find_element(By.ID, "further").is_displayed()


def test_numbers_of_measures_sort_too(browser: Chrome, many: Path) -> None:
    show(browser, many, "index.html#sort=value:masks+iou")
    assert labels(browser)[0] == "3", "0 has none"
    show(browser, many, "index.html#sort=value:masks+iou&reverse=1")
    assert labels(browser)[0] == str(3 * (N - 1))


def test_a_sort_that_is_none_is_the_first_one(browser: Chrome, many: Path) -> None:
    show(browser, many, "index.html#sort=constructor&modality=text")
    assert labels(browser)[0] == str(3 * (N - 3))
    assert browser.get_log("browser") == []


def focused(browser: Chrome) -> str:
    return browser.execute_script("return document.activeElement.href?.split('/').pop() ?? document.activeElement.id")


def press(browser: Chrome, key: str) -> None:
    ActionChains(browser).send_keys(key).perform()


def test_the_keyboard_is_enough(browser: Chrome, many: Path) -> None:
    show(browser, many, "index.html#sort=index&reverse=1")
    last = 3 * (N - 1)
    press(browser, "j")
    press(browser, "j")
    assert focused(browser) == f"{last - 3}.html"
    press(browser, "k")
    assert focused(browser) == f"{last}.html"
    press(browser, "/")
    assert focused(browser) == "q"
    ActionChains(browser).send_keys("thing 7j").perform()
    assert browser.find_element(By.ID, "q").get_attribute("value") == "thing 7j", "keys are letters in a field"
    press(browser, Keys.TAB)
    press(browser, "x")
    assert browser.find_element(By.ID, "q").get_attribute("value") == ""
    press(browser, "g")
    assert browser.find_element(By.ID, "table-view").is_displayed()
    press(browser, "j")
    assert focused(browser) == f"{last}.html"
    press(browser, "g")
    press(browser, "j")
    press(browser, Keys.ENTER)
    assert browser.title == "a page"
    browser.back()


def test_single_keys_can_be_turned_off(browser: Chrome, many: Path) -> None:
    show(browser, many, "index.html")
    press(browser, "?")
    dialog = browser.find_element(By.ID, "keys")
    assert dialog.is_displayed() and "next feature" in dialog.text
    browser.find_element(By.ID, "keys-allowed").click()
    press(browser, Keys.ESCAPE)
    press(browser, "g")
    assert not browser.find_element(By.ID, "table-view").is_displayed()
    browser.find_element(By.CSS_SELECTOR, "[data-keys]").click()
    browser.find_element(By.ID, "keys-allowed").click()
    browser.find_element(By.CSS_SELECTOR, "#keys button").click()
    press(browser, "g")
    assert browser.find_element(By.ID, "table-view").is_displayed()
    press(browser, "g")


def test_table_heads_keep_the_focus(browser: Chrome, many: Path) -> None:
    show(browser, many, "index.html#view=table")
    browser.execute_script(
        "[...document.querySelectorAll('th button')].find(b => b.textContent === 'strongest').focus()"
    )
    press(browser, Keys.ENTER)
    assert browser.execute_script("return document.activeElement.textContent") == "strongest ↓"
    press(browser, Keys.ENTER)
    assert browser.execute_script("return document.querySelector('th[aria-sort]').ariaSort") == "ascending"


def test_back_leads_to_the_same_place(browser: Chrome, many: Path) -> None:
    show(browser, many, "index.html#sort=index&reverse=1")
    complete(browser)
    wait(browser, "scrollTo(0, document.body.scrollHeight); return document.querySelectorAll('.card').length > 200")
    shown = len(labels(browser))
    browser.execute_script("document.querySelectorAll('.card a')[150].scrollIntoView()")
    before = browser.execute_script("return scrollY")
    browser.execute_script("document.querySelector('.card a').click()")
    assert browser.title == "a page"
    browser.back()
    complete(browser)
    assert len(labels(browser)) >= shown
    assert wait(browser, "return scrollY") == pytest.approx(before, abs=400)
    show(browser, many, "index.html#sort=index&reverse=1")
    assert browser.execute_script("return scrollY") == 0, "only on the way back"

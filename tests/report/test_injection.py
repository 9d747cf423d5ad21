"""Hostile words in every place that a dataset, an explainer or a judge can fill: in a real browser they stay words."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Chrome

from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.report.build import build_report
from sae_lens_multimodal.report.records import SteeringRecord
from tests.report.browsing import show, texts, wait
from tests.report.pages_sample import SINGLE_PAGES, write_single_pages
from tests.report.report_sample import ALL_EVIL, EVIL, EVIL_END, EVIL_IMAGE, TEXT_FEATURE

PAGES = (
    *("index.html", "index.html#view=table", "index.html#q=%3Cscript%3E", "compare.html"),
    *(f"features/{number}.html" for number in (0, 1, 2, 3, TEXT_FEATURE)),
)
STRANGERS = r"""
    const found = [], every = (selector) => [...document.querySelectorAll(selector)];
    if (window.hacked !== undefined) found.push("a script ran");
    for (const one of document.querySelectorAll("*")) {
        if ([...one.attributes].some(({ name }) => name.startsWith("on"))) found.push(one.outerHTML);
        one.dispatchEvent(new Event("mouseover"));
        one.dispatchEvent(new Event("focus"));
    }
    const strange = [
        ...every("img").filter((one) => !/assets|data:image/.test(one.src)),
        ...every("script").filter((one) => !one.src),
        ...every("a").filter((one) => one.href && !/^(file|data):/.test(one.href)),
        ...every("iframe, object, embed, base, meta[http-equiv=refresh]"),
        ...every("style").filter((one) => /display:\s*none/.test(one.textContent)),
    ];
    found.push(...strange.map((one) => one.outerHTML));
    if (getComputedStyle(document.body).display === "none") found.push("a style holds");
    if (window.hacked !== undefined) found.push("a handler ran");
    return found;
"""


@pytest.fixture(scope="module")
def single_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_single_pages(folder)
    return folder


def settle(browser: Chrome) -> None:
    """Open what is folded, and let all that is loaded behind arrive."""
    browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    wait(browser, "const cards = document.getElementById('cards'); return !cards || cards.dataset.complete")
    wait(browser, "const rows = document.getElementById('compare-rows'); return !rows || rows.children.length")


@pytest.mark.parametrize("page", PAGES)
def test_nothing_in_the_report_becomes_an_element(browser: Chrome, report: Path, page: str) -> None:
    show(browser, report, page)
    settle(browser)
    assert browser.execute_script(STRANGERS) == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("page", SINGLE_PAGES)
def test_nothing_in_the_other_pages_becomes_an_element(browser: Chrome, single_pages: Path, page: str) -> None:
    show(browser, single_pages, f"{page}/index.html")
    settle(browser)
    assert browser.execute_script(STRANGERS) == []
    assert browser.get_log("browser") == []
    assert EVIL_IMAGE in browser.find_element("tag name", "body").text


def test_the_words_are_all_there(browser: Chrome, report: Path) -> None:
    show(browser, report, f"features/{TEXT_FEATURE}.html")
    settle(browser)
    read = "\n".join(texts(browser, "main"))
    assert ALL_EVIL in read
    assert EVIL_END in texts(browser, "h1")
    show(browser, report, "index.html#q=hacked")
    settle(browser)
    assert EVIL_END in texts(browser, ".card .label")
    show(browser, report, "compare.html")
    settle(browser)
    assert EVIL_IMAGE in texts(browser, "#compare-rows td")
    assert f"run {EVIL}" in texts(browser, "#compare-head button")


def test_the_check_itself_finds_strangers(browser: Chrome, report: Path) -> None:
    """Each of the hostile words, written as markup, is found: the test above can fail."""
    for evil in (EVIL, EVIL_IMAGE, EVIL_END, "<style>* { display: none }</style>", "<a href='javascript:1'>x</a>"):
        show(browser, report, "features/1.html")
        browser.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", evil)
        assert browser.execute_script(STRANGERS), evil


def test_files_and_folders_may_be_called_anything(browser: Chrome, store: FeatureStore, tmp_path: Path) -> None:
    name = "<img src=x onerror=hacked=1> & 'x' #1%41"
    picture = tmp_path / f"{name}.png"
    Image.new("RGB", (30, 20), "red").save(picture)
    record = SteeringRecord(prompt="?", before="a", after="b", edit="x", image=picture)
    output = tmp_path / name
    build_report(store, output=output, features=[0], steering={0: [record]}, title=name, progress=False)
    assert not [path for path in output.rglob("*") if name in path.name]
    browser.get((output / "features" / "0.html").as_uri())
    broken = "return [...document.images].filter(one => one.loading !== 'lazy' && !one.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert browser.execute_script("return window.hacked") is None
    browser.get((output / "index.html").as_uri())
    settle(browser)
    assert texts(browser, "h1") == [name]
    assert browser.execute_script("return window.hacked") is None

"""Every page for readers who see little, who use a keyboard, or who have a page read to them."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver import ActionChains, Chrome, Keys

from sae_lens_multimodal.report.render import static_text
from tests.report.browsing import DESKTOP, PHONE, show, wait
from tests.report.pages_sample import SINGLE_PAGES, write_single_pages
from tests.report.report_sample import TEXT_FEATURE

AXE = Path(os.environ.get("SAE_LENS_MULTIMODAL_AXE", "node_modules/axe-core/axe.min.js"))
"""axe-core of npm, which is no dependency: `npm install --no-save axe-core`."""
FEATURE_PAGES = ("features/0.html", f"features/{TEXT_FEATURE}.html")
REPORT_PAGES = ("index.html", "index.html#view=table", "compare.html", *FEATURE_PAGES)
PAGES = (*REPORT_PAGES, *(f"{page}/index.html" for page in SINGLE_PAGES))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, report: Path) -> Path:
    """The report, and the other pages in folders beside its own."""
    folder = tmp_path_factory.mktemp("all")
    write_single_pages(folder)
    for entry in report.iterdir():
        (folder / entry.name).symlink_to(entry)
    return folder


def ready(browser: Chrome, folder: Path, page: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
    show(browser, folder, page, size, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    wait(browser, "const cards = document.getElementById('cards'); return !cards || cards.dataset.complete")
    wait(browser, "const rows = document.getElementById('compare-rows'); return !rows || rows.children.length")


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core here (npm install --no-save axe-core)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_nothing(browser: Chrome, everything: Path, page: str, size: tuple[int, int], scheme: str) -> None:
    ready(browser, everything, page, size, scheme)
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    found = browser.execute_async_script("axe.run(document).then(found => arguments[0](found.violations))")
    told = [f"{one['id']} ({one['impact']}): {node['html'][:160]}" for one in found for node in one["nodes"][:3]]
    assert told == []


NAMELESS = """
    const said = (one) => one.getAttribute("aria-label") || one.textContent || one.labels?.[0]?.textContent || "";
    const name = (one) => said(one).trim() || one.querySelector("img[alt]:not([alt=''])")?.alt;
    const shown = (one) => one.checkVisibility() && !one.closest("[aria-hidden=true]");
    return [...document.querySelectorAll("a, button, input, select, summary, [role=img], [role=group], canvas, svg")]
        .filter(shown).filter((one) => !name(one) && !one.hasAttribute("aria-labelledby")).map((one) => one.outerHTML);
"""
HEADINGS = """
    return [...document.querySelectorAll("main h1, main h2, main h3, .masthead h1")]
        .filter((one) => one.checkVisibility()).map((one) => Number(one.tagName[1]));
"""


@pytest.mark.parametrize("page", PAGES)
def test_everything_has_a_name_and_headings_are_in_order(browser: Chrome, everything: Path, page: str) -> None:
    ready(browser, everything, page)
    assert browser.execute_script(NAMELESS) == []
    pictures = "return [...document.images].filter(one => !one.hasAttribute('alt')).map(one => one.outerHTML)"
    assert browser.execute_script(pictures) == []
    levels = browser.execute_script(HEADINGS)
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert browser.execute_script("return document.documentElement.lang") == "en"
    assert browser.execute_script("return document.querySelectorAll('main').length") == 1
    ids = "const ids = [...document.querySelectorAll('[id]')].map(one => one.id); return ids.length - new Set(ids).size"
    assert browser.execute_script(ids) == 0


@pytest.mark.parametrize("page", REPORT_PAGES)
def test_the_focus_is_seen_wherever_it_goes(browser: Chrome, everything: Path, page: str) -> None:
    ready(browser, everything, page)
    seen = """
        const one = document.activeElement;
        const marked = one.matches(".segments input") ? one.nextElementSibling : one;
        const style = getComputedStyle(marked);
        return [one.outerHTML.slice(0, 120), style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
    """
    passed = set()
    for _ in range(14):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        what, is_seen = browser.execute_script(seen)
        if what.startswith("<body"):
            break
        assert is_seen, what
        passed.add(what)
    assert len(passed) > 5, "the focus moves on"


def test_the_skip_link_leads_to_the_content(browser: Chrome, everything: Path) -> None:
    ready(browser, everything, "features/0.html")
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.execute_script("return document.activeElement.textContent") == "Skip to content"
    assert browser.execute_script("return document.activeElement.getBoundingClientRect().width") > 50
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert browser.current_url.endswith("#main")


def test_readers_are_told_how_many_features_fit(browser: Chrome, everything: Path) -> None:
    ready(browser, everything, "index.html")
    attributes = "const one = document.getElementById('tally'); return [one.role, one.ariaLive]"
    assert browser.execute_script(attributes) == ["status", "polite"]


# What colours can be told apart: simulations of dichromacy, Machado et al. 2009, severity 1, on linear RGB.
EYES = {
    "usual": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def palettes() -> list[dict[str, str]]:
    """The colours of the light and of the dark look."""
    light, dark = static_text("report.css").split("@media (prefers-color-scheme: dark)")[:2]
    found = []
    for block in (light, dark.split("@media")[0]):
        lines = [line.strip().rstrip(";").split(": ") for line in block.split("\n") if line.strip().startswith("--")]
        found.append({line[0][2:]: line[1] for line in lines if line[1].startswith("#")})
    return found


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(light, 0, 1) / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", EYES)
def test_colours_that_mean_something_are_told_apart_by_every_eye(eyes: str) -> None:
    for palette in palettes():
        for one, other in (("image", "text"), ("image", "both"), ("text", "both"), ("right", "wrong")):
            seen = [lab(np.asarray(EYES[eyes]) @ linear(palette[name])) for name in (one, other)]
            assert np.linalg.norm(seen[0] - seen[1]) > 20, (one, other)


def test_words_stand_out_from_their_ground() -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1."""
    for palette in palettes():
        for ground in ("paper", "raised", "sunk"):
            for name in ("ink", "quiet", "image", "text", "both", "right", "wrong"):
                bright = sorted((TO_XYZ[1] @ linear(palette[one]) for one in (name, ground)), reverse=True)
                assert (bright[0] + 0.05) / (bright[1] + 0.05) >= 4.5, (name, ground)

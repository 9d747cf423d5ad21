"""Heat maps as the browser draws them: the same as the store's, by view of the picture, on one scale."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By

from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.report.colours import RAMP_STEPS, heat_rgba, ramp
from sae_lens_multimodal.report.render import static_text
from tests.report.browsing import show, wait

VIEWS = ("both", "base", "tiles")


def drawn(browser: Chrome, number: int, view: str) -> np.ndarray[Any, Any]:
    """The pixels of a heat map, once it is drawn in some view."""
    script = """
        const canvas = document.querySelectorAll("canvas.heat")[arguments[0]];
        canvas.scrollIntoView({ block: "center" });
        return canvas.dataset.drawn === arguments[1] && canvas.toDataURL();
    """
    url = wait(browser, script, number, view)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"), dtype=int)


@pytest.mark.parametrize("view", VIEWS)
def test_every_pixel_has_the_colour_of_the_store(browser: Chrome, report: Path, store: FeatureStore, view: str) -> None:
    show(browser, report, "features/1.html")
    browser.execute_script("document.querySelector(`input[name=heat-view][value=${arguments[0]}]`).click()", view)
    scale = store.scale(1, "image")
    for number, example in enumerate(store.examples(1, "top", "image")[:4]):
        base, tiles = example.heatmap(0, "base"), example.heatmap(0, "tiles")
        wanted = heat_rgba({"both": np.maximum(base, tiles), "base": base, "tiles": tiles}[view] / scale).astype(int)
        found = drawn(browser, number, view)
        assert found.shape == wanted.shape
        off = np.abs(found - wanted).max(axis=2) > 6
        assert off.mean() < 0.06, "but for the lines where patches meet within a pixel"
        assert len(np.unique(found.reshape(-1, 4), axis=0)) > 3


def test_views_differ_and_are_remembered(browser: Chrome, report: Path) -> None:
    show(browser, report, "features/1.html")
    body = browser.find_element(By.TAG_NAME, "body")
    seen = {}
    for view in (*VIEWS, "both"):
        chosen = browser.execute_script("return document.querySelector('input[name=heat-view]:checked').value")
        assert chosen == view
        seen[view] = drawn(browser, 0, view)
        body.send_keys("v")
    assert all((seen[one] != seen[other]).any() for one, other in (("both", "base"), ("base", "tiles")))
    # the last key left it at the view of the whole picture: so it is on the next page
    body.send_keys(Keys.ARROW_RIGHT)
    assert browser.current_url.endswith("features/2.html")
    assert browser.execute_script("return document.querySelector('input[name=heat-view]:checked').value") == "base"
    drawn(browser, 0, "base")


def test_only_what_is_near_is_drawn(browser: Chrome, report: Path) -> None:
    show(browser, report, "features/0.html")
    drawn(browser, 0, "both")
    browser.execute_script("scrollTo(0, 0)")
    script = "return [...document.querySelectorAll('canvas.heat')].map(one => 'drawn' in one.dataset)"
    assert not browser.execute_script(script)[-1], "far below"


def test_legend_and_maps_have_the_same_colours() -> None:
    found = re.search(r"--ramp: linear-gradient\(90deg, (.*?)\);", static_text("report.css"))
    assert found is not None
    legend = [tuple(bytes.fromhex(one.strip("# "))) for one in found[1].split(",")]
    assert legend == list(ramp())
    assert len(legend) == RAMP_STEPS


def test_the_scale_grows_lighter_for_every_eye() -> None:
    """Brightness alone tells more from less, with any colour blindness or none."""
    linear = np.asarray(ramp(), dtype=float) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    assert (np.diff(linear @ [0.2126, 0.7152, 0.0722]) > 0).all()

"""What the browser tests share: opening pages as a reader does, and looking at what they show."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from selenium.webdriver import Chrome

DESKTOP, PHONE = (1280, 900), (390, 844)


def show(browser: Chrome, report: Path, page: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
    """Open a page afresh, with empty logs and nothing remembered."""
    width, height = size
    phone = width < 600
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_script("try { sessionStorage.clear(); } catch { /* there is none at first */ }")
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(f"file://{report}/{page}")


def labels(browser: Chrome) -> list[str]:
    """Numbers of the cards shown, in order."""
    return browser.execute_script("return [...document.querySelectorAll('.card .number')].map(n => n.textContent)")


def opacity(browser: Chrome) -> float:
    script = "const s = getComputedStyle(document.querySelector('.stage .heat')); return s.opacity"
    browser.execute_script("document.documentElement.style.setProperty('transition', 'none')")
    return float(browser.execute_script(script))


def requests(browser: Chrome) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]


def screenshot(browser: Chrome) -> np.ndarray[Any, Any]:
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(taken))).convert("RGB"))


def wait(browser: Chrome, script: str, *values: Any) -> Any:
    """Run a script in every frame until it gives something true, and return that."""
    poll = """
        const done = arguments[arguments.length - 1], given = [...arguments].slice(0, -1);
        const ask = () => { %s };
        const look = () => { const found = ask(); if (found) done(found); else requestAnimationFrame(look); };
        look();
    """
    return browser.execute_async_script(poll.replace("%s", script.replace("arguments", "given")), *values)


def texts(browser: Chrome, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(one => one.textContent)"
    return browser.execute_script(script, selector)

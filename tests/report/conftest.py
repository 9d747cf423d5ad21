"""A sample report, built once, and a headless Chromium to look at it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.report.build import build_report
from tests.report.report_sample import findings, write_store

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return write_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory, store: FeatureStore) -> Path:
    """Folder of a report with everything in it."""
    output = tmp_path_factory.mktemp("report") / "report"
    return build_report(store, output=output, progress=False, **findings(store)).parent


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        if "SAE_LENS_MULTIMODAL_REQUIRE_BROWSER" in os.environ:
            pytest.fail("no Chromium with chromedriver, and SAE_LENS_MULTIMODAL_REQUIRE_BROWSER asks for one")
        pytest.skip("no Chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()

"""What was found out about features after the pass, on their pages; nothing in it can be markup."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from sae_lens_multimodal.features.description import FEATURES_FILE
from sae_lens_multimodal.features.schema import DESCRIBED, DESCRIBED_KIND, DESCRIBED_VERSION
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.tables import write_tables
from sae_lens_multimodal.files import write_manifest
from sae_lens_multimodal.report.build import build_report
from tests.report.report_sample import EVIL, EVIL_ATTRIBUTE, write_store


@pytest.fixture
def described(tmp_path: Path) -> FeatureStore:
    store = write_store(tmp_path / "store", n_pictures=10)
    row = {
        "feature": 0,
        "monosemanticity": 0.81,
        "n_crops": 6,
        "cross_modal": 0.62,
        "cross_modal_floor": 0.07,
        "n_tokens": 12,
        "cofiring": [2],
        "cofiring_share": [0.75],
        "cofiring_lift": [30.0],
        "neighbours": [1, 9],
        "neighbour_cosine": [0.68, -0.2],
        "neighbour_given": [0.0, float("nan")],
        "neighbour_covers": [0.0, float("nan")],
        "neighbour_relation": ["split", ""],
        "writes": [EVIL, EVIL_ATTRIBUTE],
        "writes_logit": [0.5, 0.25],
    }
    write_tables(store.paths.described / FEATURES_FILE, DESCRIBED, [pa.Table.from_pylist([row], schema=DESCRIBED)])
    settings = {"random_crops": 0.41}
    write_manifest(store.paths.described, kind=DESCRIBED_KIND, schema_version=DESCRIBED_VERSION, settings=settings)
    return store.reopened()


def test_descriptions_are_read_back(described: FeatureStore) -> None:
    found = described.description(0)
    assert found is not None
    assert found.cross_modal_lift == pytest.approx(0.55)
    assert (found.neighbours[0].relation, found.neighbours[1].covers) == ("split", None)
    assert described.description(1) is None
    assert described.descriptions is not None
    assert described.descriptions.neighbours() == {0: [1, 9]}


def test_a_page_shows_them_beside_their_floors_and_links_to_other_pages(
    described: FeatureStore, tmp_path: Path
) -> None:
    build_report(described, output=tmp_path / "report", progress=False)
    page = (tmp_path / "report" / "features" / "0.html").read_text(encoding="utf-8")
    assert '.81 <span class="quiet">any .41</span>' in page
    assert '.62 <span class="quiet">any .07</span>' in page
    assert '<a href="../features/1.html">Feature 1</a>' in page, "a neighbour with a page"
    assert '<span class="quiet">Feature 9</span>' in page, "a neighbour without one"
    assert "perhaps one meaning, split in two" in page
    assert "never fired here" in page
    assert "30 times its usual" in page and "75 %" in page
    assert "&lt;script&gt;" in page and EVIL not in page and EVIL_ATTRIBUTE not in page
    other = (tmp_path / "report" / "features" / "1.html").read_text(encoding="utf-8")
    assert "Nearest directions" not in other


def test_given_output_tokens_come_before_those_of_the_description(described: FeatureStore, tmp_path: Path) -> None:
    build_report(
        described, output=tmp_path / "report", output_tokens={0: [("given", 1.0)]}, features=[0], progress=False
    )
    page = (tmp_path / "report" / "features" / "0.html").read_text(encoding="utf-8")
    assert "<code>given</code>" in page and "&lt;script&gt;" not in page.split("Writes towards")[1].split("</ol>")[0]

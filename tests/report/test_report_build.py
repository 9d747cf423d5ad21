"""The report's folder: what is in it, what it never overwrites, and that markup in the data stays text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_lens_multimodal.errors import FeatureError, ImageError, StoreError
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.writer import StoreWriter
from sae_lens_multimodal.files import MANIFEST_NAME, read_manifest
from sae_lens_multimodal.report.build import REPORT_KIND, SCHEMA_VERSION, build_report
from sae_lens_multimodal.report.formats import number
from sae_lens_multimodal.report.records import SteeringRecord
from tests.report.report_sample import (
    EVIL,
    EVIL_ATTRIBUTE,
    EVIL_END,
    EVIL_IMAGE,
    EVIL_LINK,
    EVIL_STYLE,
    HALF,
    TEXT_FEATURE,
    explanations,
    picture_prompt,
)

SCRIPTS = {
    "index.html": ["static/common.js", "data/index.js", "static/map.js", "static/index.js"],
    "compare.html": ["static/common.js", "static/compare.js"],
    "features": ["../static/common.js", "../static/heat.js", "../static/feature.js"],
}


FORMS = {"controls", "compare-controls"}
"""The forms that the report has itself."""


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def pages(report: Path) -> dict[str, Page]:
    return {str(path.relative_to(report)): Page(path.read_text()) for path in report.rglob("*.html")}


def called(path: Path) -> list[Any]:
    """What a script of data calls its function with."""
    text = path.read_text(encoding="utf-8")
    found = re.fullmatch(r"report\w+\((.*)\);\n", text, re.S)
    assert found is not None, text[:80]
    values: list[Any] = json.loads(f"[{found[1]}]")
    return values


def index_of(report: Path) -> dict[str, Any]:
    (head,) = called(report / "data" / "index.js")
    return head


def details_of(report: Path) -> dict[int, dict[str, Any]]:
    """What the index loads in parts, by feature."""
    head = index_of(report)
    rows = [row for part in range(head["parts"]) for row in called(report / "data" / f"part-{part}.js")[1]]
    return dict(zip(head["index"], rows, strict=True))


def test_folder_holds_what_it_says(report: Path) -> None:
    read_manifest(report, kind=REPORT_KIND, schema_version=SCHEMA_VERSION)
    assert {path.name for path in report.iterdir()} == {
        *(MANIFEST_NAME, "index.html", "compare.html", "features", "static", "assets", "data")
    }
    assert {path.name for path in (report / "features").iterdir()} == {f"{n}.html" for n in (0, 1, 2, 3, TEXT_FEATURE)}
    assert not [path for path in report.parent.iterdir() if path != report], "no half-made folder stays"


def test_every_address_leads_to_a_file_of_the_report(report: Path) -> None:
    seen = set()
    for name, page in pages(report).items():
        for _, attributes in page.tags:
            for key in ("src", "href"):
                address = attributes.get(key)
                if address and not address.startswith(("#", "data:")):
                    target = (report / name).parent / address
                    assert target.is_file(), f"{name}: {address}"
                    seen.add(target.resolve())
    written = {path.resolve() for path in (report / "assets").rglob("*.*")}
    thumbs = {(report / url).resolve() for row in details_of(report).values() for url in row["thumbs"]}
    assert written <= seen | thumbs, "no picture is written for nothing"


def test_markup_in_the_data_makes_no_element_and_no_attribute(report: Path) -> None:
    for name, page in pages(report).items():
        scripts = [attributes.get("src") for tag, attributes in page.tags if tag == "script"]
        assert scripts == SCRIPTS[name.split("/")[0]]
        for tag, attributes in page.tags:
            assert not [key for key in attributes if key.startswith("on")]
            if tag == "img":
                assert (attributes["src"] or "").startswith("../assets/")
            assert tag not in ("iframe", "object", "embed", "base", "style", "form") or attributes.get("id") in FORMS
        addresses = [str(attributes.get("href", "")) for _, attributes in page.tags]
        assert not [one for one in addresses if "hacked" in one or one.startswith("javascript")]


def test_markup_in_the_data_is_there_as_text(report: Path) -> None:
    found = pages(report)
    text_page, rich_page = found[f"features/{TEXT_FEATURE}.html"].text, found["features/0.html"].text
    for evil in (EVIL, EVIL_ATTRIBUTE, EVIL_IMAGE, EVIL_END, EVIL_LINK, EVIL_STYLE):
        assert evil in text_page, evil
    assert EVIL in rich_page
    assert EVIL_ATTRIBUTE in rich_page
    assert EVIL in found["index.html"].text
    assert EVIL in found["compare.html"].text


def test_data_survive_and_cannot_end_a_script_or_a_line(report: Path) -> None:
    head, details = index_of(report), details_of(report)
    place = head["index"].index(TEXT_FEATURE)
    assert head["label"][place] == EVIL_END
    assert EVIL in details[TEXT_FEATURE]["words"]
    number, compared = called(report / "data" / "compare-0.js")
    assert number == 0
    assert compared["names"] == [f"own {EVIL_END}", f"run {EVIL}"]
    assert compared["texts"][0][place] == EVIL_IMAGE
    for script in (report / "data").iterdir():
        assert not set(script.read_text(encoding="utf-8")) & set("<>&\u2028\u2029"), script


def test_half_a_surrogate_pair_breaks_nothing(report: Path) -> None:
    failure = explanations()[5].failure
    assert failure is not None and HALF in (failure.reply or "")
    assert f"{EVIL_END}?" in pages(report)["features/3.html"].text


def test_legend_ends_where_the_heat_map_is_fully_lit(tmp_path: Path) -> None:
    prompt = picture_prompt(0)
    assert prompt.scene is not None
    values = np.zeros(len(prompt.tokens), dtype=np.float32)
    values[[5, -1]] = 3.0, 9.0
    writer = StoreWriter(tmp_path / "store", d_sae=2)
    writer.add_prompt(0, tokens=prompt.tokens, layout=prompt.layout, images=[prompt.scene.image])
    writer.add_example(1, prompt_id=0, activations=values, modality="image")
    report = build_report(writer.finish(), output=tmp_path / "report", progress=False).parent
    page = (report / "features/1.html").read_text(encoding="utf-8")
    legends = re.findall(r'<span class="legend[^>]*>(.*?)</span></span>', page)
    assert [legend.rpartition("<span>")[2] for legend in legends] == [number(3.0), number(9.0)], "images, then text"


def test_controls_agree_with_the_feature_or_not(report: Path) -> None:
    text = pages(report)["features/0.html"].text.split("Verdicts, run")[0]
    assert text.count("8 of 8 right") == 2
    assert text.count("4 of 8 agree with the feature") == 2


def test_bare_store_is_enough(store: FeatureStore, tmp_path: Path) -> None:
    index = build_report(store, output=tmp_path / "bare", progress=False)
    page = Page((index.parent / "features/0.html").read_text())
    assert "Not explained yet." in page.text
    assert not [tag for tag, attributes in page.tags if "verdicts" in (attributes.get("class") or "")]
    assert "detection" not in index.read_text()


def test_chosen_features_only(store: FeatureStore, tmp_path: Path) -> None:
    index = build_report(store, output=tmp_path / "some", features=[2, 0], max_examples=2, progress=False)
    assert index_of(index.parent)["index"] == [0, 2]
    with pytest.raises(FeatureError, match=r"features \[5\] are not in"):
        build_report(store, output=tmp_path / "none", features=[5], progress=False)


def test_report_replaces_a_report_whole(store: FeatureStore, tmp_path: Path) -> None:
    output = tmp_path / "report"
    build_report(store, output=output, features=[0, 1], max_examples=1, title="old", progress=False)
    index = build_report(store, output=output, features=[2], max_examples=1, title="new", progress=False)
    assert "new" in Page(index.read_text()).text
    assert [path.name for path in (output / "features").iterdir()] == ["2.html"]
    assert list(tmp_path.iterdir()) == [output]


def test_same_report_twice_is_the_same(store: FeatureStore, tmp_path: Path) -> None:
    first, second = (build_report(store, output=tmp_path / name, features=[0], progress=False).parent for name in "ab")
    for path in first.rglob("*.*"):
        if path.name != MANIFEST_NAME and path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path


def test_foreign_folders_are_left_alone(store: FeatureStore, report: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty and holds no report"):
        build_report(store, output=tmp_path / "notes", progress=False)
    with pytest.raises(StoreError, match="holds a 'feature-store', not a report"):
        build_report(store, output=store.folder, progress=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is a file"):
        build_report(store, output=tmp_path / "file", progress=False)
    assert (tmp_path / "notes/thesis.txt").read_text() == "mine"
    assert FeatureStore.open(store.folder).features


def test_report_with_a_stranger_in_it_is_left_alone(store: FeatureStore, tmp_path: Path) -> None:
    output = tmp_path / "report"
    build_report(store, output=output, features=[0], max_examples=1, progress=False)
    (output / "notes.md").write_text("mine")
    with pytest.raises(StoreError, match=r"holds 'notes\.md', which no report has"):
        build_report(store, output=output, features=[0], progress=False)
    assert (output / "notes.md").read_text() == "mine"


def test_failed_build_leaves_the_old_report_and_nothing_else(store: FeatureStore, tmp_path: Path) -> None:
    output = tmp_path / "report"
    index = build_report(store, output=output, features=[0], max_examples=1, progress=False)
    before = index.read_text()
    broken = SteeringRecord(prompt="?", before="a", after="b", edit="x", image=tmp_path / "missing.png")
    with pytest.raises(ImageError, match=r"missing\.png cannot be opened"):
        build_report(store, output=output, features=[0], steering={0: [broken]}, progress=False)
    assert index.read_text() == before
    assert list(tmp_path.iterdir()) == [output]

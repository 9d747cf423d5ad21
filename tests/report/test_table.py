"""The table of everything: as documented, and nothing lost on the way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_lens_multimodal.errors import FeatureError
from sae_lens_multimodal.features.schema import DESCRIBED, STATISTICS
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.report import table_schema
from sae_lens_multimodal.report.records import Run
from sae_lens_multimodal.report.table import export_table
from sae_lens_multimodal.report.table_schema import LISTS, TABLE
from tests.report.report_sample import EVIL_END, explanations, measures, other_run, scores, verdicts


@pytest.fixture(scope="module")
def runs(store: FeatureStore) -> list[Run]:
    judged = verdicts(store)
    own = Run(
        name="own",
        explanations=explanations(),
        scores=scores(judged),
        verdicts=judged,
        measures=measures(),
        judge="the judge",
    )
    return [own, other_run(store)]


@pytest.fixture(scope="module")
def written(store: FeatureStore, runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    path = tmp_path_factory.mktemp("table") / "features.parquet"
    assert export_table(store, path, runs=runs, output_tokens={0: [(" red", 4.5)]}, progress=False) == path
    return pq.read_table(path)


@pytest.fixture(scope="module")
def by_feature(written: pa.Table) -> dict[int, dict[str, Any]]:
    return {row["feature"]: row for row in written.to_pylist()}


def spelt(kind: pa.DataType) -> str:
    return re.sub("(item|element): ", "", str(kind))


def test_documented_columns_are_what_is_written(written: pa.Table) -> None:
    assert written.schema.equals(TABLE)
    document = (Path(table_schema.__file__).parent / "TABLE.md").read_text(encoding="utf-8")
    head, *sections = document.split("\n## ")
    assert [section.split("\n")[0].strip("`") for section in sections] == ["Columns", *LISTS]
    columns = re.findall(r"^\| `(\w+)` \|", sections[0], flags=re.MULTILINE)
    elsewhere = {*STATISTICS.names, *DESCRIBED.names}
    assert columns == [name for name in written.schema.names if name not in elsewhere]
    for section, (name, fields) in zip(sections[1:], LISTS.items(), strict=True):
        documented = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, flags=re.MULTILINE)
        assert documented == [(field, spelt(kind)) for field, kind in fields.items()], name
        struct = written.schema.field(name).type.value_type
        assert [struct.field(place).name for place in range(struct.num_fields)] == list(fields)
    assert head.startswith("# The table")


def test_statistics_are_the_stores(by_feature: dict[int, dict[str, Any]], store: FeatureStore) -> None:
    assert list(by_feature) == store.all_features
    for feature, row in by_feature.items():
        known = store.statistics_of(feature)
        assert {name: row[name] for name in known} == known
    assert by_feature[0]["writes"] == [" red"] and by_feature[1]["writes"] == []
    assert by_feature[0]["monosemanticity"] is None


def test_every_record_of_every_run_is_there(by_feature: dict[int, dict[str, Any]], runs: list[Run]) -> None:
    for run in runs:
        for name in ("explanations", "scores", "verdicts"):
            for feature, row in by_feature.items():
                mine = [one for one in getattr(run, name) if one.feature == feature]
                assert len([one for one in row[name] if one["run"] == run.name]) == len(mine), (name, feature)
    first = by_feature[0]
    assert (first["label"], first["explanation"]) == ("red things", "Objects that are red, of any shape.")
    assert by_feature[3]["label"] is None
    assert {one["judge"] for one in first["verdicts"] if one["run"] == "own"} == {"the judge"}


def test_records_keep_their_numbers(by_feature: dict[int, dict[str, Any]], runs: list[Run]) -> None:
    score = next(one for one in runs[0].scores if one.feature == 1 and one.scorer == "detection")
    row = next(one for one in by_feature[1]["scores"] if one["run"] == "own" and one["scorer"] == "detection")
    known = score.to_json()
    assert {name: row[name] for name in known if name in row} == {name: known[name] for name in known if name in row}
    assert {band["band"]: band["tpr"] for band in row["bands"]} == dict(score.tpr_by_band)
    candidates = next(one for one in by_feature[0]["explanations"] if one["candidates"])["candidates"]
    assert (candidates[0]["validation"], candidates[0]["round"], candidates[0]["n_failed"]) == (0.9, 1, 1)
    numbers = {one["name"]: one for one in by_feature[0]["measures"] if one["run"] == "own"}
    assert (numbers["iou"]["value"], numbers["iou"]["control"], numbers["iou_strict"]["control"]) == (0.5, 0.2, None)
    assert numbers["iou"]["bands"] == [{"band": "top", "value": 0.625}]
    (silent,) = by_feature[2]["measures"]
    assert silent["name"] is None and silent["note"].startswith("no masks")


def test_failures_keep_what_came(by_feature: dict[int, dict[str, Any]]) -> None:
    failed = [one for one in by_feature[2]["verdicts"] if one["answer"] is None]
    assert failed and {one["failure"] for one in failed} == {"unparsable"}
    assert all(one["reply"] for one in failed)
    (explanation,) = by_feature[3]["explanations"]
    assert (explanation["status"], explanation["failure"]) == ("failed", "refused")
    assert explanation["reply"] == f"{EVIL_END}?", "half a surrogate pair cannot be kept"
    boxed = next(one for one in by_feature[0]["verdicts"] if one["box"])
    assert len(boxed["box"]) == 4 and boxed["view"] in (None, "crop")


def test_a_bare_store_and_some_features(store: FeatureStore, tmp_path: Path) -> None:
    path = export_table(store, tmp_path / "some.parquet", features=[2, 0], progress=False)
    rows = pq.read_table(path).to_pylist()
    assert [row["feature"] for row in rows] == [0, 2]
    assert rows[0]["verdicts"] == rows[0]["scores"] == []
    with pytest.raises(FeatureError):
        export_table(store, path, features=[99], progress=False)
    assert pq.read_table(path).num_rows == 2, "the old file stays"

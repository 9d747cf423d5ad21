"""A store written by hand comes back as it was, through this package and through plain pandas."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from PIL import Image

import sae_lens_multimodal.features.schema as schema_module
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.errors import FeatureError, StoreError
from sae_lens_multimodal.features.example import IMAGE_MARK
from sae_lens_multimodal.features.schema import TABLES
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.writer import StoreWriter

RED = Image.new("RGB", (16, 16), "red")
BLUE = Image.new("RGB", (16, 16), "blue")
ACTIVATIONS = np.array([9, 0, 2, 7, 0, 4, 7, 0, 1.5, 0], dtype=np.float32)
"""Fires on a control token and newlines too, which must not count."""


@pytest.fixture
def store(tmp_path: Path, layout: TokenLayout, tokens: list[str]) -> FeatureStore:
    writer = StoreWriter(tmp_path / "store", d_sae=8, hook_name="blocks.1.hook_resid_post")
    question = {"type": "text", "text": "what is this"}
    writer.add_prompt(
        2,
        tokens=tokens,
        layout=layout,
        images=[RED],
        messages=[{"role": "user", "content": [{"type": "image", "image": RED}, question]}],
    )
    writer.add_prompt(5, tokens=tokens, layout=layout, images=[BLUE])
    writer.add_prompt(9, tokens=tokens, layout=layout, images=[RED])
    writer.add_example(3, prompt_id=2, activations=ACTIVATIONS)
    writer.add_example(3, prompt_id=2, activations=ACTIVATIONS, modality="text")
    writer.add_example(3, prompt_id=5, activations=ACTIVATIONS / 2, kind="ordinary", quantile=0.25)
    writer.add_example(3, prompt_id=9, activations=ACTIVATIONS / 4, kind="ordinary", modality="text", quantile=0.75)
    writer.add_example(6, prompt_id=9, activations=ACTIVATIONS * 0, kind="silent")
    return writer.finish()


def test_statistics_count_image_and_text_tokens_only(store: FeatureStore) -> None:
    row = store.statistics_of(3)
    assert row["max_activation"] == 4
    assert row["density_image"] == 6 / 12
    assert row["density_text"] == 3 / 9
    assert row["mean_image"] == pytest.approx(6 * (1 + 0.5 + 0.25) / 12)
    assert row["n_prompts"] == 3
    assert sum(row["histogram_image"]) == 6
    assert store.features == [3]
    assert store.all_features == [3, 6]
    assert store.settings["n_tokens"] == {"image": 12, "text": 9}


def test_example_has_everything_about_its_prompt(store: FeatureStore, tokens: list[str]) -> None:
    (example,) = store.examples(3)
    assert (example.prompt_id, example.rank, example.kind, example.modality) == (2, 0, "top", "image")
    assert (example.max_image, example.max_text, example.max_activation) == (4, 1.5, 4)
    assert example.mean_activation == pytest.approx(7.5 / 7)
    assert example.positions.tolist() == [2, 5, 8]
    assert example.activations.tolist() == [0, 0, 2, 0, 0, 4, 0, 0, 1.5, 0]
    assert example.image_tokens_active.tolist() == example.tokens_active_in(0).tolist() == [2, 5]
    assert example.tokens_active_in(1).tolist() == []
    assert example.text_tokens_active.tolist() == [8]
    assert example.best_image == 0
    assert example.tokens == tokens
    assert example.text == "user: <image> what is this"
    assert example.messages[0]["content"][0] == {"type": "image"}
    assert [image.getpixel((0, 0)) for image in example.images] == [(255, 0, 0)]
    heat = example.heatmap()
    assert heat.shape == (16, 16)
    assert (heat[0, 0], heat[0, 15], heat[15, 0], heat[15, 15]) == (0, 2, 0, 4)


def test_text_windows_show_a_picture_as_one_token(store: FeatureStore) -> None:
    (example,) = store.examples(3)
    (window,) = example.text_windows(context=12)
    assert window.tokens == ["<s>", IMAGE_MARK, "what", "is", "this"]
    assert window.activations.tolist() == [0, 0, 0, 1.5, 0]
    assert window.positions.tolist() == [0, 1, 7, 8, 9]
    assert window.max_activation == 1.5
    assert example.text_windows(context=0)[0].tokens == ["is"]


def test_windows_that_touch_are_one_and_the_strongest_comes_first(tmp_path: Path) -> None:
    n = 20
    layout = TokenLayout.from_arrays(
        {
            "modality": np.zeros(n, dtype=np.int8),
            "boxes": np.full((n, 4), np.nan),
            "image_index": np.full(n, -1),
            "tile": np.full(n, -1),
            "image_sizes": [],
        }
    )
    writer = StoreWriter(tmp_path / "text", d_sae=1)
    writer.add_prompt(0, tokens=[str(i) for i in range(n)], layout=layout)
    activations = np.zeros(n)
    activations[[2, 5, 15]] = [1, 2, 3]
    writer.add_example(0, prompt_id=0, activations=activations, modality="text")
    (example,) = writer.finish().examples(0)
    assert [window.tokens for window in example.text_windows(1)] == [
        ["14", "15", "16"],
        ["1", "2", "3", "4", "5", "6"],
    ]
    assert example.images == []
    assert example.best_image is None


def test_lists_of_both_modalities_merge_without_repeating_a_picture(store: FeatureStore) -> None:
    assert [e.prompt_id for e in store.examples(3, "ordinary", "image")] == [5]
    assert [e.prompt_id for e in store.examples(3, "ordinary", "text")] == [9]
    assert [e.prompt_id for e in store.examples(3, "ordinary")] == [5], "9 shows the picture of the top list"
    assert [e.prompt_id for e in store.examples(3, "top")] == [2]
    assert [e.quantile for e in store.examples(3, "ordinary", "text")] == [0.75]
    assert store.examples(6, "top") == []
    assert [e.prompt_id for e in store.examples(6, "silent")] == [9]
    assert store.examples(3, limit=0) == []


def test_equal_pictures_are_stored_once(store: FeatureStore) -> None:
    files = list((store.folder / "images").glob("*/*.png"))
    assert len(files) == 2
    (example,) = store.examples(3)
    path = store.image_path(example.image_ids[0])
    assert path in files
    table = pq.read_table(store.folder / "images.parquet").to_pylist()
    assert {(row["image_id"], row["width"], row["prompt_id"]) for row in table} >= {(example.image_ids[0], 16, 2)}


def test_scale_lies_in_the_right_bin(store: FeatureStore) -> None:
    assert store.scale(3) == 4
    assert store.scale(3, "text") == 1.5
    assert 1 <= store.scale(3, "image", quantile=0.5) <= 2
    assert store.scale(6) == 0


def test_features_outside_are_refused(store: FeatureStore) -> None:
    with pytest.raises(FeatureError, match=r"feature 4 is not in .*; it holds 2 of 8 features"):
        store.examples(4)
    with pytest.raises(FeatureError, match="feature -1"):
        store.statistics_of(-1)
    with pytest.raises(TypeError):
        store.examples(3.0)  # type: ignore[arg-type]


def test_pandas_reads_the_tables_without_this_package(store: FeatureStore) -> None:
    examples = pandas.read_parquet(store.folder / "examples.parquet")
    assert examples.query("feature == 3 and kind == 'top'")["prompt_id"].tolist() == [2, 2]
    assert examples["values"][0].tolist() == [2, 4, 1.5]
    prompts = pandas.read_parquet(store.folder / "prompts.parquet").set_index("prompt_id")
    assert prompts.loc[2, "tokens"][-1] == "this"
    statistics = pandas.read_parquet(store.folder / "statistics.parquet")
    assert statistics["modality_score"].isna().tolist() == [False, True]


def test_documented_schema_is_what_is_written(store: FeatureStore) -> None:
    document = (Path(schema_module.__file__).parent / "SCHEMA.md").read_text(encoding="utf-8")
    for name, schema in TABLES.items():
        section = document.split(f"## `{name}.parquet`")[1].split("\n## ")[0]
        documented = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, flags=re.MULTILINE)
        written = pq.read_schema(store.folder / f"{name}.parquet")
        assert documented == [(field.name, re.sub("(item|element): ", "", str(field.type))) for field in written]
        assert written.equals(schema)
    settings = document.split("## `manifest.json`")[1].split("\n## ")[0]
    assert set(store.settings) <= set(re.findall(r"^\| `(\w+)` \|", settings, flags=re.MULTILINE))


def test_stores_of_the_first_version_are_read(store: FeatureStore) -> None:
    for name, column in (("prompts", "near_ids"), ("images", "near_id")):
        path = store.folder / f"{name}.parquet"
        pq.write_table(pq.read_table(path).drop_columns([column]), path)
    with pytest.raises(StoreError, match=r"prompts\.parquet lacks the columns \['near_ids'\]"):
        FeatureStore.open(store.folder)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    (store.folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 1}))
    old = FeatureStore.open(store.folder)
    (example,) = old.examples(3)
    assert example.images[0].getpixel((0, 0)) == (255, 0, 0)
    assert example.prompt.near_ids == example.image_ids
    assert old.look_alikes([*example.image_ids, "other"]) == {*example.image_ids, "other"}


def test_folders_that_are_no_store_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no manifest\.json"):
        FeatureStore.open(tmp_path / "nowhere")
    (store.folder / "prompts.parquet").unlink()
    with pytest.raises(StoreError, match=r"prompts\.parquet does not exist; .* harvest again"):
        FeatureStore.open(store.folder)


def test_other_schemas_and_tables_are_refused(store: FeatureStore) -> None:
    pandas.DataFrame({"feature": [1]}).to_parquet(store.folder / "examples.parquet")
    with pytest.raises(StoreError, match=r"examples\.parquet lacks the columns"):
        FeatureStore.open(store.folder)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    (store.folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(StoreError, match="schema version 99"):
        FeatureStore.open(store.folder)


def test_writer_refuses_what_does_not_fit(tmp_path: Path, layout: TokenLayout, tokens: list[str]) -> None:
    writer = StoreWriter(tmp_path / "store", d_sae=4)
    with pytest.raises(StoreError, match="has 9 tokens but a layout of 10"):
        writer.add_prompt(0, tokens=tokens[1:], layout=layout, images=[RED])
    writer.add_prompt(0, tokens=tokens, layout=layout, images=[RED])
    with pytest.raises(FeatureError, match="feature 4"):
        writer.add_example(4, prompt_id=0, activations=ACTIVATIONS)
    with pytest.raises(StoreError, match="prompt 1 was not added"):
        writer.add_example(1, prompt_id=1, activations=ACTIVATIONS)
    with pytest.raises(StoreError, match="is not empty"):
        StoreWriter(tmp_path, d_sae=4)
    with pytest.raises(StoreError, match="prompt 77 is not in"):
        writer.finish().prompt(77)


def test_lost_picture_is_named(store: FeatureStore) -> None:
    (example,) = store.examples(3)
    path = store.image_path(example.image_ids[0])
    assert path is not None
    path.unlink()
    with pytest.raises(StoreError, match=r"\.png does not exist"):
        _ = example.images
    with pytest.raises(StoreError, match="picture 'none' is not in"):
        store.image("none")

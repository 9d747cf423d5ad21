"""From a store to the view model: what a page will say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.features.example import Example
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.writer import StoreWriter
from sae_lens_multimodal.report.assets import MAX_SIDE, Assets
from sae_lens_multimodal.report.colours import heat_rgba
from sae_lens_multimodal.report.examples import Scales, example_view
from sae_lens_multimodal.report.gather import Findings, Limits, Links, fact_views, feature_view
from sae_lens_multimodal.report.index_data import IndexEntry
from sae_lens_multimodal.report.patches import FULL, patches_view
from sae_lens_multimodal.report.records import Run
from sae_lens_multimodal.report.runs import SortedRun
from sae_lens_multimodal.report.view import FeatureView, PatchView
from sae_lens_multimodal.types import Modality
from tests.report.report_sample import EVIL, TEXT_FEATURE, explanations, scores, verdicts


@pytest.fixture(scope="module")
def views(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> dict[int, FeatureView]:
    judged = verdicts(store)
    run = Run(explanations=explanations(), scores=scores(judged), verdicts=judged)
    findings, assets = Findings(runs=[SortedRun.of(run)]), Assets(tmp_path_factory.mktemp("assets"))
    links = Links.of(store.features, findings)
    made = (feature_view(store, one, findings, links, assets, Limits(max_examples=4)) for one in store.features)
    return {one.index: one for one in made}


def test_pages_are_chained_in_order(views: dict[int, FeatureView]) -> None:
    assert list(views) == [0, 1, 2, 3, TEXT_FEATURE]
    assert views[0].previous is None
    assert views[0].next is not None
    assert (views[0].next.index, views[0].next.label) == (1, "green things")
    assert views[TEXT_FEATURE].next is None


def test_statistics_are_those_of_the_store(views: dict[int, FeatureView], store: FeatureStore) -> None:
    row, shown = store.statistics_of(2), views[2].statistics
    assert (shown.density_image, shown.density_text) == (row["density_image"], row["density_text"])
    assert shown.modality_score == row["modality_score"]
    assert shown.prompts == row["n_prompts"]
    assert views[2].modality == "both"
    assert views[TEXT_FEATURE].modality == "text"


def test_every_list_of_examples_is_there_and_bounded(views: dict[int, FeatureView]) -> None:
    kinds = {group.kind: group for group in views[0].examples}
    assert set(kinds) == {"top", "ordinary", "silent"}
    assert (len(kinds["top"].pictures), len(kinds["top"].texts)) == (4, 4)
    assert [example.rank for example in kinds["top"].pictures] == [1, 2, 3, 4]
    assert not kinds["silent"].texts


def test_active_pictures_have_heat_and_the_strongest_a_close_view(views: dict[int, FeatureView]) -> None:
    for group in views[0].examples:
        for example in group.pictures:
            (shown,) = example.pictures
            assert (shown.heat is not None) == (group.kind != "silent")
            assert (shown.crop is not None) == (group.kind == "top")
            assert (example.max_activation > 0) == (group.kind != "silent")
            if shown.heat is not None:
                assert shown.heat.base and shown.heat.tiles


def test_levels_of_text_are_relative_to_the_scale_of_text(views: dict[int, FeatureView], store: FeatureStore) -> None:
    (example,) = views[TEXT_FEATURE].examples[0].texts
    lit = {token.text.strip(): token.level for token in example.tokens if token.level > 0}
    scale = store.scale(TEXT_FEATURE, "text")
    assert lit[EVIL] == pytest.approx(min(1.0, 4.0 / scale))
    assert sorted(lit.values()) == pytest.approx([2.5 / scale, min(1.0, 4.0 / scale)])


def test_histograms_count_every_active_token(views: dict[int, FeatureView], store: FeatureStore) -> None:
    row = store.statistics_of(0)
    totals = {one.modality: one.total for one in views[0].histograms}
    assert totals == {"image": row["n_active_image"], "text": row["n_active_text"]}
    assert [one.modality for one in views[TEXT_FEATURE].histograms] == ["text"]


def test_scores_stand_beside_their_controls(views: dict[int, FeatureView]) -> None:
    detection, fuzzing = views[1].runs[0].scores
    assert (detection.name, fuzzing.name) == ("detection", "fuzzing")
    assert (detection.value, detection.control) == (pytest.approx(0.875), 0.5)
    assert detection.lift == pytest.approx(0.375)
    assert views[2].runs[0].scores[0].failed == 1
    assert views[3].runs[0].scores == ()


def test_regions_are_shown_as_the_judge_saw_them(views: dict[int, FeatureView], store: FeatureStore) -> None:
    (group,) = [one for one in views[0].runs[0].verdicts if (one.task, one.control) == ("fuzzing", False)]
    records = [one for one in verdicts(store) if (one.feature, one.scorer, one.control) == (0, "fuzzing", False)]
    for verdict, record in zip(group.verdicts, records, strict=True):
        (picture,) = verdict.pictures
        whole = store.prompt(record.prompt_id).images[0].size
        assert ((picture.width, picture.height) == whole) == (record.style is None)
        cut_out, unknown = record.style is not None, record.box is not None and record.style is None
        assert (verdict.seen == "cut out") == cut_out
        assert ("is not known" in verdict.seen) == unknown
        assert verdict.prompt == str(record.prompt_id)
    assert group.question == "", "the phrases are not known"


def test_verdicts_say_what_was_right(views: dict[int, FeatureView]) -> None:
    groups = {(group.task, group.control): group for group in views[1].runs[0].verdicts}
    assert set(groups) == {(name, control) for name in ("detection", "fuzzing") for control in (False, True)}
    own = groups["detection", False]
    assert [one.outcome for one in own.verdicts].count("wrong") == 1
    assert (own.right, groups["detection", True].right) == (7, 4)
    assert own.verdicts[5].expected == "no"
    assert own.verdicts[5].answer == "yes"
    unanswered = next(one for one in views[2].runs[0].verdicts[0].verdicts if one.outcome == "unanswered")
    assert unanswered.failure == "No yes or no."


def test_region_is_outlined_in_the_picture_of_a_verdict(views: dict[int, FeatureView]) -> None:
    detection, fuzzing = (group.verdicts[0].pictures[0] for group in views[0].runs[0].verdicts if not group.control)
    assert detection.url != fuzzing.url
    assert detection.url == views[0].examples[0].pictures[0].pictures[0].picture.url, "one file for one picture"


def test_no_explanation_is_told_from_none_asked(views: dict[int, FeatureView]) -> None:
    assert [one.status for one in views[1].runs[0].explanations] == ["explained", "nothing in common"]
    assert [one.status for one in views[3].runs[0].explanations] == ["failed"]
    assert (views[3].named, views[3].label) == (False, "Feature 3")


def test_what_the_index_says_is_short_and_searchable(views: dict[int, FeatureView]) -> None:
    entry = IndexEntry.of(views[0])
    assert entry.numbers["detection"] == (1.0, 0.5)
    assert (entry.row["label"], entry.row["modality"]) == ("red things", "both")
    assert len(entry.details["thumbs"]) == 4
    assert "red" in entry.details["words"].split("\n")
    assert entry.details["snippets"][0][1] == "red"
    assert "caption" in entry.details["words"]
    assert IndexEntry.of(views[3]).row["label"] == "", "without an explanation"


def test_facts_leave_out_what_is_not_known(store: FeatureStore) -> None:
    facts = {fact.name: fact.value for fact in fact_views(store, 5)}
    assert facts["Hook"] == "blocks.2.hook_resid_post"
    assert facts["Alive here"] == "5"
    assert facts["Dataset"].startswith("data ")
    assert "Pictures" not in facts


def halves(tmp_path: Path, *, placed: bool = True) -> Example:
    """The left half is lit in the whole view, the right half in its tile."""
    half = [[0.0, 0.0, 20.0, 40.0], [20.0, 0.0, 40.0, 40.0]]
    layout = TokenLayout(
        modality=torch.full((1, 4), int(Modality.IMAGE), dtype=torch.int8),
        boxes=torch.tensor([half + half]) if placed else torch.full((1, 4, 4), float("nan")),
        image_index=torch.zeros(1, 4, dtype=torch.int64),
        tile=torch.tensor([[0, 0, 1, 1]]),
        image_sizes=(((40, 40),),),
    )
    writer = StoreWriter(tmp_path / "store", d_sae=2)
    writer.add_prompt(0, tokens=["<image>"] * 4, layout=layout, images=[Image.new("RGB", (40, 40), "white")])
    writer.add_example(1, prompt_id=0, activations=np.array([3.0, 0.0, 0.0, 1.5], dtype=np.float32))
    (example,) = writer.finish().examples(1, "top", "image")
    return example


def test_heat_keeps_the_view_of_the_whole_picture_and_the_tiles_apart(tmp_path: Path) -> None:
    shown = example_view(halves(tmp_path), Assets(tmp_path), Scales(image=3.0, text=0.0)).pictures[0]
    assert shown.heat is not None
    assert shown.heat.base == (PatchView(0, 0, FULL // 2, FULL, FULL),)
    assert shown.heat.tiles == (PatchView(FULL // 2, 0, FULL, FULL, FULL // 2),)


def test_tokens_of_unknown_place_light_the_whole_picture_with_their_mean(tmp_path: Path) -> None:
    example = halves(tmp_path, placed=False)
    found = patches_view(example, 0, 3.0)
    for patches, view in ((found.base, "base"), (found.tiles, "tiles")):
        (patch,) = patches
        assert patch[:4] == (0, 0, FULL, FULL)
        assert patch.level == round(FULL * example.heatmap(0, view).mean() / 3)


def test_patches_are_what_the_heat_map_paints(views: dict[int, FeatureView], store: FeatureStore) -> None:
    example = store.examples(0, "top", "image")[0]
    scale = store.scale(0, "image")
    for view in ("base", "tiles"):
        painted = example.heatmap(0, view)
        for x0, y0, x1, y1, level in getattr(patches_view(example, 0, scale), view):
            x, y = (x0 + x1) / 2 * painted.shape[1] / FULL, (y0 + y1) / 2 * painted.shape[0] / FULL
            assert level == pytest.approx(FULL * min(1.0, painted[int(y), int(x)] / scale), abs=1)


def test_heat_is_veiled_where_silent_and_stronger_where_lit() -> None:
    layer = heat_rgba(np.array([[0.0, 0.2, 1.0, 7.0, np.nan]]))
    veil, weak, strong, beyond, unknown = layer[0]
    assert veil[:3].max() < 60 < veil[3] < 255
    assert weak[3] < strong[3] < 255
    assert (strong == beyond).all()
    assert (veil == unknown).all()


def test_pictures_are_written_once_and_never_large(tmp_path: Path) -> None:
    assets = Assets(tmp_path)
    wide = Image.effect_noise((1500, 300), 40).convert("RGB")
    first, again = assets.picture(wide, alt="a"), assets.picture(wide.copy(), alt="b")
    assert first.url == again.url
    assert (first.alt, again.alt) == ("a", "b")
    assert (first.width, first.height) == (MAX_SIDE, round(MAX_SIDE / 5))
    small = assets.picture(Image.new("RGB", (40, 30), "red"), alt="")
    with Image.open(tmp_path / small.url) as kept:
        assert kept.convert("RGB").getpixel((3, 3)) == (255, 0, 0)
    assert len(list(tmp_path.rglob("*.*"))) == 2

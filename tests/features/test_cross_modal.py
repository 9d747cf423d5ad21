"""Features of a store written by hand whose words go with the pictures they fire on, and one whose words do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.features.cross_modal import cross_modal_features
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.writer import StoreWriter

RED, OTHER = 0, 1
"""A feature for red things, and one that fires on the question mark and on some pictures."""


@pytest.fixture
def store(tmp_path: Path, layout: TokenLayout) -> FeatureStore:
    writer = StoreWriter(tmp_path / "store", d_sae=8, hook_name="blocks.1.hook_resid_post")
    for prompt in range(8):
        colour = "Red" if prompt < 4 else "blue"
        words = ["<s>", *["<i>", "<i>", "<n>"] * 2, colour, "thing", "?"]
        picture = Image.new("RGB", (16, 16), (prompt * 20, 0, 0))
        writer.add_prompt(prompt, tokens=words, layout=layout, images=[picture])
    patch, red_word, mark = 1, 7, 9
    for prompt in range(8):
        is_red = prompt < 4
        values = np.zeros(10, dtype=np.float32)
        values[[patch, red_word]] = 2.0 if is_red else 0.0
        values[8] = 0.5 if is_red else 0.0  # a little on "thing"
        for modality in ("image", "text") if is_red else ("image",):
            writer.add_example(
                RED, prompt_id=prompt, activations=values, kind="top" if is_red else "silent", modality=modality
            )
        marks = np.zeros(10, dtype=np.float32)
        marks[mark] = 1.0
        marks[patch] = 1.0 if prompt % 2 else 0.0
        writer.add_example(OTHER, prompt_id=prompt, activations=marks, modality="text")
        writer.add_example(OTHER, prompt_id=prompt, activations=marks, kind="top" if prompt % 2 else "silent")
    return writer.finish()


def test_words_that_go_with_the_pictures_have_a_lift(store: FeatureStore) -> None:
    first, second = cross_modal_features(store, n_words=1)
    assert (first.feature, second.feature) == (RED, OTHER)
    assert [word for word, _ in first.words] == ["red"]
    assert first.words[0][1] == pytest.approx(2.0 / 2.5)
    assert (first.agreement, first.floor, first.lift) == (1.0, 0.0, 1.0)
    assert [word for word, _ in second.words] == ["?"]
    assert (second.agreement, second.floor, second.lift) == (1.0, 1.0, 0.0)
    assert 0 < first.modality_score < 1


def test_features_with_too_few_examples_are_left_out(store: FeatureStore) -> None:
    assert cross_modal_features(store, min_examples=5) == []

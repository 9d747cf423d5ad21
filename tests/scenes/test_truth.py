"""Ground truth of features: average precision against scikit-learn, and labels against the scenes themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.scenes.truth import (
    ABSENT,
    CONCEPTS,
    PRESENT,
    UNSURE,
    Concept,
    Firings,
    concept_precisions,
    mask_share,
    token_labels,
)
from sae_lens_multimodal.scenes.world import make_scene
from sae_lens_multimodal.types import Modality


def firings_of(values: np.ndarray) -> Firings:
    token, feature = values.nonzero()
    return Firings(token, feature, values[token, feature])


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice([PRESENT, ABSENT, UNSURE], p=[0.1, 0.8, 0.1], size=(200, 4)).astype(np.int8)
    values = (rng.random((200, 6)) * (rng.random((200, 6)) < 0.3)).astype(np.float32)
    found = concept_precisions(firings_of(values), labels, n_features=6)
    for feature in range(6):
        for concept in range(4):
            known = labels[:, concept] != UNSURE
            expected = average_precision_score(labels[known, concept] == PRESENT, values[known, feature])
            assert found[feature, concept] == pytest.approx(expected, abs=1e-9)


def test_a_planted_feature_has_precision_one_and_an_absent_concept_none() -> None:
    labels = np.array([[PRESENT, ABSENT], [ABSENT, ABSENT], [PRESENT, ABSENT]], dtype=np.int8)
    values = np.array([[2.0], [0.0], [1.0]], dtype=np.float32)
    found = concept_precisions(firings_of(values), labels, n_features=1)
    assert found[0, 0] == 1.0
    assert np.isnan(found[0, 1])


def test_mask_share_counts_pixels() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((30, 40)) < 0.4
    boxes = np.array([[0, 0, 40, 30], [3, 4, 9, 20], [39, 29, 40, 30]], dtype=np.float32)
    for share, (x0, y0, x1, y1) in zip(mask_share(mask, boxes), boxes.astype(int), strict=True):
        assert share == pytest.approx(mask[y0:y1, x0:x1].mean())


def test_labels_follow_masks_and_words() -> None:
    scene = make_scene(3, n_objects=2)
    thing = scene.objects[0]
    x0, y0, x1, y1 = thing.box
    middle = ((x0 + x1) / 2 - 2, (y0 + y1) / 2 - 2, (x0 + x1) / 2 + 2, (y0 + y1) / 2 + 2)
    nan = (float("nan"),) * 4
    layout = TokenLayout(
        modality=torch.tensor([[Modality.IMAGE, Modality.TEXT, Modality.TEXT, Modality.SPECIAL]], dtype=torch.int8),
        boxes=torch.tensor([[middle, nan, nan, nan]]),
        image_index=torch.tensor([[0, -1, -1, -1]]),
        tile=torch.tensor([[0, -1, -1, -1]]),
        image_sizes=((scene.image.size,),),
    )
    labels = token_labels([scene], layout, ["<image>", thing.colour, "is", thing.shape])
    expected = np.full(labels.shape, ABSENT)
    for kind, value in thing.attributes.items():
        expected[0, CONCEPTS.index(Concept(kind, value))] = PRESENT
    expected[1, CONCEPTS.index(Concept("colour", thing.colour))] = PRESENT
    assert labels[1:].tolist() == expected[1:].tolist()
    assert labels[0, CONCEPTS.index(Concept("colour", thing.colour))] == PRESENT
    other = Concept("colour", scene.objects[1].colour)
    assert labels[0, CONCEPTS.index(other)] == ABSENT


def test_a_picture_of_another_size_is_refused() -> None:
    scene = make_scene(3)
    layout = TokenLayout(
        modality=torch.tensor([[Modality.TEXT]], dtype=torch.int8),
        boxes=torch.full((1, 1, 4), float("nan")),
        image_index=torch.tensor([[-1]]),
        tile=torch.tensor([[-1]]),
        image_sizes=(((5, 5),),),
    )
    with pytest.raises(ValueError, match="not the scene"):
        token_labels([scene], layout, ["red"])

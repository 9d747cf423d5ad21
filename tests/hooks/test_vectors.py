"""Mean-difference and concept vectors are what the formulas and scikit-learn say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.vectors import concept_vector, steering_vector
from tests.hooks.hook_samples import HOOK

Conversations = list[list[dict[str, Any]]]


def test_differences_of_means_by_hand(model: VisionLanguageModel, conversations: Conversations) -> None:
    batch = model.encode(conversations)
    states = read_activations(model, batch, HOOK)[HOOK]
    found = steering_vector(model, conversations[:1], conversations[1:], HOOK, batch_size=1)
    expected = states[0, -1] - (states[1, -1] + states[2, -1]) / 2
    assert torch.allclose(found.vector, expected, atol=1e-4)
    pictures = [conversations[0], conversations[2]]
    on_images = steering_vector(model, pictures[:1], pictures[1:], "blocks.0.hook_out", tokens="image")
    means = [states[row][batch.layout.is_image[row]].mean(0) for row in (0, 2)]
    assert torch.allclose(on_images.vector, means[0] - means[1], atol=1e-4)
    assert on_images.hook_name == HOOK


def test_concept_vectors_point_where_the_discriminant_does() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, 6, generator=generator, dtype=torch.float64) @ mix
    wanted, unwanted = noise[:200] + torch.tensor([1.0, 0, 0, 0, 0, 0]).double(), noise[200:]
    found = concept_vector(wanted, unwanted)
    labels = [1] * 200 + [0] * 200
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(torch.cat([wanted, unwanted]).numpy(), labels)
    normal = torch.from_numpy(reference.coef_[0])
    assert torch.cosine_similarity(found, normal, dim=0) > 0.98
    # One step along the vector covers the whole difference of means in its direction.
    difference = wanted.mean(0) - unwanted.mean(0)
    assert found.dot(found) == pytest.approx(float(found.dot(difference)))
    # Few states in many dimensions: the covariance alone could not be inverted.
    assert torch.isfinite(concept_vector(wanted[:2], unwanted[:2])).all()


def test_bad_input(model: VisionLanguageModel, conversations: Conversations) -> None:
    with pytest.raises(ConfigError, match="0 wanted and 3 unwanted"):
        steering_vector(model, [], conversations, HOOK)
    with pytest.raises(ConfigError, match="'median'"):
        steering_vector(model, conversations, conversations, HOOK, method="median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not all 0"):
        steering_vector(model, conversations, conversations, HOOK)
    with pytest.raises(SelectionError, match="Prompt 1 has none"):
        steering_vector(model, conversations[:2], conversations, HOOK, tokens="image")

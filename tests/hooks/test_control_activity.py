"""Percentiles of activations are those of sorted lists, exact or within what is stated, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks import control_activity, control_candidates
from sae_lens_multimodal.hooks.control_activity import Activity, ValueCounts, measure_activity
from sae_lens_multimodal.hooks.control_candidates import foresee
from sae_lens_multimodal.hooks.control_questions import Example, Questions
from tests.hooks.hook_samples import HOOK, SAE

D_SAE = 20


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations between 1/64 and 64; features are as frequent as their number is high, 0 is never active."""
    rng = np.random.default_rng(0)
    features = rng.choice(D_SAE, size=20_000, p=np.arange(D_SAE) / np.arange(D_SAE).sum())
    return torch.from_numpy(features), torch.from_numpy(np.exp2(rng.uniform(-6, 6, 20_000)).astype(np.float32))


def counted(features: torch.Tensor, values: torch.Tensor) -> tuple[Activity, ValueCounts]:
    counts = ValueCounts()
    for start in range(0, len(features), 700):
        counts.add(features[start : start + 700], values[start : start + 700])
    return counts.activity(D_SAE), counts


def expected(features: torch.Tensor, values: torch.Tensor) -> list[float]:
    found = [values[features == one].sort().values.tolist() for one in range(D_SAE)]
    return [some[round(0.99 * (len(some) - 1))] if some else 0.0 for some in found]


def test_few_values_are_exact() -> None:
    features, values = drawn()
    activity, _ = counted(features, values)
    assert activity.scale.tolist() == expected(features, values)
    assert activity.count.tolist() == torch.bincount(features, minlength=D_SAE).tolist()


@pytest.mark.parametrize(("most", "error"), [(15_000, 2**-8), (7_000, 2**-6), (2_000, 2**-4), (50, 2**-4)])
def test_many_values_are_rounded_as_stated(most: int, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    features, values = drawn()
    monkeypatch.setattr(control_activity, "MAX_KEPT", most)
    activity, counts = counted(features, values)
    assert activity.scale.tolist() == pytest.approx(expected(features, values), rel=error)
    assert activity.count.tolist() == torch.bincount(features, minlength=D_SAE).tolist()
    # 12 octaves of 8 steps each are the most that can be left; 20 000 pairs came in
    assert len(counts.keys) <= max(most, D_SAE * 12 * 8)


def questions(model: VisionLanguageModel, conversations: list[Any], batch_size: int) -> Questions:
    return Questions(
        model, [Example(conversation=one, wanted="red") for one in conversations * 2], batch_size=batch_size
    )


def test_pixels_stay_where_they_are_until_they_are_needed(
    model: VisionLanguageModel, conversations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[EncodedBatch] = []
    original = EncodedBatch.to

    def spy(self: EncodedBatch, device: Any) -> EncodedBatch:
        moved.append(self)
        return original(self, device)

    monkeypatch.setattr(EncodedBatch, "to", spy)
    asked = questions(model, conversations, 4)
    assert moved == []
    asked.logits(model)
    assert [id(one) for one in moved] == [id(one) for one in asked.batches]
    assert asked.answers(model, 2) == model.answer(conversations * 2, max_new_tokens=2, batch_size=4)
    assert [len(one) for one in asked.pictures()] == [1, 0, 2] * 2


def test_backward_passes_are_small_and_say_the_same(
    model: VisionLanguageModel, sae: SAE[Any], conversations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = questions(model, conversations, 6)
    activity = measure_activity(model, sae, HOOK, [asked], "all")
    rows: list[int] = []
    original = control_candidates.metric_and_gradient

    def spy(model: Any, batch: EncodedBatch, *args: Any) -> Any:
        rows.append(batch.n_rows)
        return original(model, batch, *args)

    monkeypatch.setattr(control_candidates, "metric_and_gradient", spy)
    red, blue = (torch.full((6,), model.tokenizer.convert_tokens_to_ids(word)) for word in ("red", "blue"))
    small = foresee(model, sae, HOOK, asked, red, blue, "image", activity.scale)
    assert rows == [2, 2, 2]
    whole = foresee(model, sae, HOOK, asked, red, blue, "image", activity.scale, batch_size=6)
    assert rows[3:] == [6]
    torch.testing.assert_close(small.raised, whole.raised, atol=1e-4, rtol=1e-3)
    # a batch of prompts without pictures is none of the matter, and does not end the search
    single = foresee(model, sae, HOOK, asked, red, blue, "image", activity.scale, batch_size=1)
    assert rows[4:] == [1] * 4
    torch.testing.assert_close(single.ablated, whole.ablated, atol=1e-4, rtol=1e-3)

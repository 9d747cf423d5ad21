"""Logits that nobody looks at are left out, and what is measured stays what the whole forward gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.gradients import metric_and_gradient, metric_at
from sae_lens_multimodal.hooks.metrics import ContinuationLogProbability, FunctionMetric, LogitDifference, Metric
from tests.hooks.hook_samples import HOOK

METRICS = (
    (LogitDifference("red", "blue"), 1),
    (ContinuationLogProbability("a red circle"), 3),
)


@pytest.fixture
def shapes(model: VisionLanguageModel) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what the unembedding gives."""
    seen: list[tuple[int, ...]] = []
    head = model._module.get_submodule(model.family.unembedding)
    handle = head.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    yield seen
    handle.remove()


def whole(model: VisionLanguageModel, batch: EncodedBatch, metric: Metric) -> Tensor:
    """The metric of all logits of transformers' own forward."""
    with torch.no_grad():
        return metric.values(model, model._module(**batch).logits, batch)


@pytest.mark.parametrize(("metric", "n_last"), METRICS)
def test_only_the_positions_looked_at_are_unembedded(
    model: VisionLanguageModel, batch: EncodedBatch, shapes: list[tuple[int, ...]], metric: Metric, n_last: int
) -> None:
    asked = metric.prepare(model, batch)
    values, acts, _ = metric_and_gradient(model, asked, HOOK, metric)
    again = metric_at(model, asked, HOOK, metric, acts)
    assert [shape[1] for shape in shapes] == [n_last, n_last]
    expected = whole(model, asked, metric)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(again, expected)


def test_a_batch_filled_up_on_the_right_keeps_all(
    model: VisionLanguageModel, conversations: Any, shapes: list[tuple[int, ...]]
) -> None:
    batch = model.encode(conversations, padding_side="right")
    metric = LogitDifference("red", "blue")
    values, _, _ = metric_and_gradient(model, batch, HOOK, metric)
    assert shapes[0][1] == batch.layout.n_tokens
    torch.testing.assert_close(values, whole(model, batch, metric))


def test_a_function_sees_all_logits(model: VisionLanguageModel, batch: EncodedBatch) -> None:
    def first(logits: Tensor, batch: EncodedBatch) -> Tensor:
        assert logits.shape[1] == batch.layout.n_tokens
        return logits.sum((1, 2))

    metric_and_gradient(model, batch, HOOK, FunctionMetric(first))


def test_parameters_ask_for_gradients_again_afterwards(model: VisionLanguageModel, batch: EncodedBatch) -> None:
    asking: list[bool] = []

    def note(logits: Tensor, _: EncodedBatch) -> Tensor:
        asking.append(any(one.requires_grad for one in model._module.parameters()))
        raise ZeroDivisionError

    before = [one.requires_grad for one in model._module.parameters()]
    with pytest.raises(ZeroDivisionError):
        metric_and_gradient(model, batch, HOOK, FunctionMetric(note))
    assert asking == [False]
    assert [one.requires_grad for one in model._module.parameters()] == before
    assert any(before)

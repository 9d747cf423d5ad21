"""The store: exact shares, right labels, no endless waiting."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.rows import SkipReport, row_to_prompt
from sae_lens_multimodal.errors import ConfigError, DatasetError, SAEMismatchError, StoreError
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.training import store as store_module
from sae_lens_multimodal.training.store import MultimodalActivationsStore
from sae_lens_multimodal.types import Modality

Rows = list[dict[str, Any]]
EMBEDDING = "blocks.0.hook_resid_pre"


def make_store(model: VisionLanguageModel, make_config: Any, rows: Any, **changes: Any) -> MultimodalActivationsStore:
    sae = {"d_in": model.d_model}
    return MultimodalActivationsStore.from_config(model, make_config(sae=sae, **changes), rows)


@pytest.fixture(scope="module")
def text_embeddings(model: VisionLanguageModel, rows: Rows) -> torch.Tensor:
    """What text tokens look like at the embedding: one vector for each word, which no image token equals."""
    batch = model.encode([row_to_prompt(row).messages for row in rows])
    every: torch.Tensor = read_activations(model, batch, EMBEDDING)[EMBEDDING]
    return torch.unique(every[batch.layout.is_text], dim=0)


def is_text(batch: torch.Tensor, text_embeddings: torch.Tensor) -> torch.Tensor:
    matches: torch.Tensor = (batch[:, None] == text_embeddings).all(2).any(1)
    return matches


@pytest.mark.parametrize("share", [0.5, 0.3, 0.9])
def test_every_batch_has_the_shares_exactly_and_the_right_labels(
    model: VisionLanguageModel, make_config: Any, rows: Rows, text_embeddings: torch.Tensor, share: float
) -> None:
    shares = {"image": share, "text": 1 - share}
    store = make_store(model, make_config, rows, hook_name=EMBEDDING, token_shares=shares, training_tokens=64 * 12)
    for _ in range(12):
        activations, modality = store.next_labelled()
        assert activations.shape == (64, model.d_model)
        assert (modality == Modality.IMAGE).sum() == round(64 * share)
        assert (modality == Modality.TEXT).sum() == 64 - round(64 * share)
        assert torch.equal(is_text(activations, text_embeddings), modality == Modality.TEXT)


def test_one_modality_alone(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    store = make_store(model, make_config, rows, token_shares={"image": 1.0})
    assert set(store.next_labelled().modality.tolist()) == {Modality.IMAGE}


def test_without_shares_tokens_come_as_they_are(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    store = make_store(model, make_config, rows, token_shares=None, n_batches_in_buffer=2, training_tokens=64 * 4)
    counts = torch.zeros(len(Modality))
    for _ in range(40):
        counts += torch.bincount(store.next_labelled().modality.long(), minlength=len(Modality))
    assert counts.sum() == 40 * 64
    assert counts[Modality.IMAGE] > counts[Modality.TEXT] > 0
    assert counts[Modality.IMAGE] + counts[Modality.TEXT] == 40 * 64
    assert store.tokens_dropped == 0


def test_newline_tokens_count_as_image(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    store = make_store(model, make_config, rows, newline_tokens=True)
    modality = store.next_labelled().modality
    assert (modality == Modality.TEXT).sum() == 32
    assert (modality == Modality.NEWLINE).sum() > 0


def test_the_buffer_never_grows(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    store = make_store(model, make_config, rows, token_shares={"image": 0.1, "text": 0.9})
    for _ in range(6):
        next(store)
        pools = list(store._pools.values())
        held = [pool.count for pool in pools]
        assert all(pool.count <= pool.capacity for pool in pools)
    assert store.tokens_dropped > 0
    assert store.tokens_read.total() == sum(held) + store.tokens_dropped + 6 * 64


def test_surplus_is_reported(
    model: VisionLanguageModel, make_config: Any, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        next(make_store(model, make_config, rows[:1], n_batches_in_buffer=1, n_eval_batches=0))
    assert "tokens read are dropped to keep token_shares" in caplog.text


def test_a_dataset_without_pictures_is_an_error(model: VisionLanguageModel, make_config: Any, text_rows: Rows) -> None:
    store = make_store(model, make_config, text_rows)
    with pytest.raises(DatasetError, match=r"50% image tokens, but all prompts of the dataset hold none.*pictures"):
        next(store)


def test_an_endless_dataset_without_pictures_is_an_error_too(
    model: VisionLanguageModel, make_config: Any, text_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PATIENCE_PROMPTS", 9)
    with pytest.raises(DatasetError, match="50% image tokens, but the last 12 prompts hold none"):
        next(make_store(model, make_config, text_rows * 10, n_eval_batches=0))


def test_text_alone_trains_on_a_dataset_without_pictures(
    model: VisionLanguageModel, make_config: Any, text_rows: Rows
) -> None:
    store = make_store(model, make_config, text_rows, token_shares={"text": 1.0})
    assert set(store.next_labelled().modality.tolist()) == {Modality.TEXT}


def test_a_small_dataset_is_read_again_and_again(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    store = make_store(model, make_config, rows[:1], token_shares={"image": 1.0}, n_eval_batches=0)
    for _ in range(4):
        next(store)
    assert store.epoch >= 1


def test_streamed_datasets_hold_out_their_first_rows(model: VisionLanguageModel, make_config: Any) -> None:
    texts = [{"text": f"a red circle {index}"} for index in range(6)]
    stream = datasets.Dataset.from_list(texts).to_iterable_dataset()
    small = {"train_batch_size_tokens": 8, "training_tokens": 8}
    store = make_store(model, make_config, stream, token_shares={"text": 1.0}, **small)
    assert [prompt.text for prompt in store.source.evaluation(9)] == [row["text"] for row in texts[:4]]
    next(store)


def test_holding_out_everything_is_an_error(model: VisionLanguageModel, make_config: Any) -> None:
    stream = datasets.Dataset.from_list([{"text": "a red circle"}] * 3).to_iterable_dataset()
    with pytest.raises(DatasetError, match=r"All rows of the dataset are held out .* lower n_eval_batches"):
        next(make_store(model, make_config, stream, token_shares={"text": 1.0}))


def test_held_out_rows_are_never_trained_on(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    marked = [{**row, "number": index} for index, row in enumerate(rows)]
    source = make_store(model, make_config, marked).source
    held = {row["number"] for row in source.held_out_rows}
    trained = {row["number"] for row in source.training_rows}
    assert len(held) == 4
    assert held | trained == set(range(len(rows)))
    assert not held & trained


def test_each_epoch_has_its_own_order(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    source = make_store(model, make_config, [{**row, "number": n} for n, row in enumerate(rows)]).source
    orders = [
        [prompt.extras["number"] for prompt in source.epoch(epoch, skip_rows=0, report=SkipReport())]
        for epoch in (0, 1, 0)
    ]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_the_seed_decides_the_batches(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    first, again, other = (
        next(make_store(model, make_config, rows, seed=seed, n_batches_in_buffer=1)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_saved_state_passes_over_rows_already_read(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path
) -> None:
    store = make_store(model, make_config, rows)
    next(store)
    store.save_to_checkpoint(tmp_path)
    again = make_store(model, make_config, rows)
    again.load_from_checkpoint(tmp_path)
    assert again.n_dataset_processed == store.n_dataset_processed > 0
    ahead = next(store._prompt_batches).prompts[0].row
    assert next(again._prompt_batches).prompts[0].row == ahead == store._next_row - 4


def test_counts_go_on_where_they_were(model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path) -> None:
    changes = {"token_shares": {"image": 0.1, "text": 0.9}}
    store = make_store(model, make_config, [{"text": ""}, *rows], **changes)
    next(store)
    counts = json.loads(json.dumps(store.counts()))
    assert counts["tokens_dropped"] > 0
    store.save_to_checkpoint(tmp_path)
    again = make_store(model, make_config, [{"text": ""}, *rows], **changes)
    again.load_from_checkpoint(tmp_path)
    again.restore_counts(counts)
    assert again.counts() == counts
    # The buffer came back with the checkpoint; once it is used up, the model is asked again.
    for _ in range(again.n_batches_in_buffer):
        next(again)
    assert again.tokens_read["image"] > counts["tokens_read"]["image"]
    assert again.tokens_dropped > counts["tokens_dropped"]


def test_a_state_of_another_store_is_refused(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file({"n_dataset_processed": torch.tensor(3)}, tmp_path / "activations_store_state.safetensors")
    with pytest.raises(StoreError, match=r"lacks .*multimodal training run"):
        make_store(model, make_config, rows).load_from_checkpoint(tmp_path)


def test_a_wrong_width_is_named(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    store = MultimodalActivationsStore.from_config(model, make_config(sae={"d_in": 7}), rows)
    with pytest.raises(SAEMismatchError, match=f"gives {model.d_model} values a token, but sae.d_in is 7"):
        next(store)


def test_a_dataset_must_be_named(model: VisionLanguageModel, make_config: Any) -> None:
    with pytest.raises(ConfigError, match="dataset_path is empty"):
        MultimodalActivationsStore.from_config(model, make_config())


def test_a_dataset_without_usable_columns(model: VisionLanguageModel, make_config: Any) -> None:
    dataset = datasets.Dataset.from_dict({"tokens": [[1, 2]] * 4})
    with pytest.raises(DatasetError, match="columns tokens, none of which can be used"):
        next(make_store(model, make_config, dataset))


def test_token_ids_alone_are_refused(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    with pytest.raises(ConfigError, match="evaluate_reconstruction"):
        make_store(model, make_config, rows).get_batch_tokens()

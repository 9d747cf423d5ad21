"""Each corruption changes what it says and nothing else, and keeps the prompt's length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.trace import causal_trace
from sae_lens_multimodal.hooks.trace_corruptions import (
    BlankRegion,
    Corruption,
    Counterfactual,
    ExchangeRegions,
    Noise,
    OtherImage,
    ReplaceTokens,
)
from tests.hooks.trace_samples import ask

PROMPT = ask((200, 10, 10))


def _applied(model: VisionLanguageModel, corruption: Corruption) -> tuple[Any, Any]:
    batch = model.encode(PROMPT, add_generation_prompt=True)
    return batch, corruption.apply(model, PROMPT, batch)


def test_tokens_are_replaced_and_no_others(model: VisionLanguageModel) -> None:
    for text in ("green", "a blue", None):
        batch, found = _applied(model, ReplaceTokens([-3, -2], text, seed=3))
        different = (found.batch["input_ids"] != batch["input_ids"])[0].nonzero()[:, 0].tolist()
        assert different == [batch.layout.n_tokens - 3, batch.layout.n_tokens - 2]
        assert torch.equal(found.batch["pixel_values"], batch["pixel_values"])
    again = _applied(model, ReplaceTokens([-3, -2], None, seed=3))[1]
    assert torch.equal(again.batch["input_ids"], found.batch["input_ids"])
    assert not set(again.batch["input_ids"][0, -3:-1].tolist()) & set(model.tokenizer.all_special_ids)
    with pytest.raises(SelectionError, match="has 3 tokens"):
        _applied(model, ReplaceTokens([-3, -2], "a blue circle"))
    with pytest.raises(SelectionError, match="tokens of a picture"):
        _applied(model, ReplaceTokens("image", "blue"))


def test_words_in_other_words_place_keep_the_blank_before_them(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As byte-level vocabularies write them: the corrupted prompt is that of the question with other words."""
    raw = Tokenizer(BPE())
    raw.pre_tokenizer, raw.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    words = ["is this a red cat", "is this a blue cat", "red", "blue"] * 20
    raw.train_from_iterator(
        words, BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    clean, other = (tokenizer(text)["input_ids"] for text in words[:2])
    place = next(at for at, (one, two) in enumerate(zip(clean, other, strict=True)) if one != two)
    assert tokenizer("blue")["input_ids"] != [other[place]]
    batch = model.encode(PROMPT, add_generation_prompt=True)
    ids = torch.cat([batch["input_ids"][:, : -len(clean)], torch.tensor([clean])], dim=1)
    batch = replace(batch, inputs={**batch.inputs, "input_ids": ids})
    monkeypatch.setitem(model.__dict__, "tokenizer", tokenizer)
    for at, text, expected in ((place, "blue", other), (0, "a", [*tokenizer("a")["input_ids"], *clean[1:]])):
        where = batch.layout.n_tokens - len(clean) + at
        found = ReplaceTokens([where], text).apply(model, PROMPT, batch).batch["input_ids"]
        assert found[0, -len(clean) :].tolist() == expected


def test_pictures_are_changed_where_it_says() -> None:
    picture = PROMPT[0]["content"][0]["image"]
    pixels = np.asarray(picture, dtype=int)
    blank = np.asarray(BlankRegion((0, 0, 10, 10)).changed(picture), dtype=int)
    assert (blank[:10, :10] == blank[0, 0]).all()
    outside = np.ones(pixels.shape[:2], dtype=bool)
    outside[:10, :10] = False
    assert np.abs(blank[0, 0] - pixels[outside].mean(0)).max() <= 0.5
    assert (blank[outside] == pixels[outside]).all()
    assert (np.asarray(BlankRegion((0, 0, 10, 10), fill=(1, 2, 3)).changed(picture))[5, 5] == (1, 2, 3)).all()
    swapped = np.asarray(ExchangeRegions((0, 0, 20, 20), (40, 20, 60, 40)).changed(picture), dtype=int)
    assert (swapped[:20, :20] == pixels[20:40, 40:60]).all()
    assert (swapped[20:40, 40:60] == pixels[:20, :20]).all()
    assert (swapped[:, 20:40] == pixels[:, 20:40]).all()
    other = OtherImage(Image.new("RGB", (7, 90), (9, 9, 9))).changed(picture)
    assert other.size == picture.size
    with pytest.raises(SelectionError, match="overlap"):
        ExchangeRegions((0, 0, 20, 20), (10, 10, 60, 40)).changed(picture)
    with pytest.raises(SelectionError, match="60 x 40"):
        BlankRegion((0, 0, 70, 10)).changed(picture)


def test_a_changed_picture_keeps_the_text_and_the_original(model: VisionLanguageModel) -> None:
    batch, found = _applied(model, OtherImage(Image.new("RGB", (60, 40), (9, 90, 9))))
    assert torch.equal(found.batch["input_ids"], batch["input_ids"])
    assert not torch.equal(found.batch["pixel_values"], batch["pixel_values"])
    assert torch.equal(model.encode(PROMPT, add_generation_prompt=True)["pixel_values"], batch["pixel_values"])
    with pytest.raises(ConfigError, match="needs the conversation"):
        causal_trace(model, batch, BlankRegion((0, 0, 10, 10)), answer="red")
    with pytest.raises(SelectionError, match="1 pictures"):
        _applied(model, BlankRegion((0, 0, 10, 10), image=1))


def test_noise_lies_on_the_chosen_tokens_alone(model: VisionLanguageModel) -> None:
    batch, found = _applied(model, Noise("image", scale=2.0, seed=1))
    assert found.noise is not None
    hit = (found.noise != 0).any(-1)
    assert torch.equal(hit, batch.layout.is_image)
    with model.trace(**batch):
        value = model.hooks["blocks.0.hook_resid_pre"].save()
    measured = float(found.noise[hit].std().detach())
    assert measured == pytest.approx(2.0 * float(value[hit].std().detach()), rel=0.05)
    trace = causal_trace(
        model, batch, Noise("image", seed=1), answer="red circle", parts="resid", positions={"all": "all"}, min_gap=None
    )
    assert trace.restored.flatten().tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    assert trace.clean != trace.corrupted
    with pytest.raises(ConfigError, match="scale"):
        _applied(model, Noise("image", scale=0))


def test_prompts_of_another_length_are_refused(model: VisionLanguageModel) -> None:
    for other in (ask((1, 2, 3), "is this red or ?"), ask((1, 2, 3), size=(40, 90))):
        with pytest.raises(SelectionError, match="as many tokens"):
            causal_trace(model, PROMPT, other, answer="red")
    same_tokens = ask((1, 2, 3), size=(66, 44))
    one, two = (model.encode(each, add_generation_prompt=True).layout for each in (PROMPT, same_tokens))
    assert one.n_tokens == two.n_tokens
    with pytest.raises(SelectionError, match="cut their pictures in other ways"):
        causal_trace(model, PROMPT, same_tokens, answer="red")
    name = causal_trace(model, PROMPT, Counterfactual(ask((1, 2, 3))), parts="resid", min_gap=None).corruption
    assert name == "a counterfactual prompt"

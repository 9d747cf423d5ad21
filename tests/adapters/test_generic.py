"""The fallback for models without an adapter: what it knows is right, and what it does not know it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    LlamaConfig,
    LlamaForCausalLM,
)

from sae_lens_multimodal.adapters.generic import UNKNOWN_PLACES, Generic
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import (
    CHAT_TEMPLATE,
    CONTROL,
    finished,
    random_llava_next,
    word_tokenizer,
)
from sae_lens_multimodal.autointerp.explain import explain
from sae_lens_multimodal.autointerp.judges import ScriptedJudge
from sae_lens_multimodal.autointerp.regions import find_regions, silent_region
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.errors import PromptError, SelectionError, UnsupportedModelError
from sae_lens_multimodal.features.harvest import harvest
from sae_lens_multimodal.hooks.effects import top_output_tokens
from sae_lens_multimodal.hooks.steer import BoxTokens, ImageTokens, Set, steer
from sae_lens_multimodal.report.build import build_report
from sae_lens_multimodal.training.config import build_config
from sae_lens_multimodal.training.runner import load_run_model
from sae_lens_multimodal.types import Modality
from tests.adapters import test_family_uses as uses
from tests.adapters.adapter_samples import mixed_prompts, picture, prompt
from tests.adapters.box_probe import differing, features_for

LATENTS = 5
BOUNDARY = "<fake_token_around_image>"


def random_idefics2(seed: int = 0) -> tuple[Any, Any]:
    """A tiny Idefics2, of which there is no adapter here: it resamples pictures, so its tokens have no place."""
    tokenizer = word_tokenizer((*CONTROL, BOUNDARY, "<end_of_utterance>"), image_boundary_token=BOUNDARY)
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    processor = Idefics2Processor(
        Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False),
        tokenizer,
        image_seq_len=LATENTS,
        chat_template=CHAT_TEMPLATE,
    )
    config = Idefics2Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        perceiver_config={
            "hidden_size": 48,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        architectures=["Idefics2ForConditionalGeneration"],
    )
    return finished(Idefics2ForConditionalGeneration(config), tokenizer, seed), processor


@pytest.fixture(scope="module")
def resampled() -> VisionLanguageModel:
    module, processor = random_idefics2()
    return load_model(module, processor=processor, family="generic")


@pytest.fixture(scope="module")
def exact() -> VisionLanguageModel:
    module, processor = random_llava_next()
    return load_model(module, processor=processor)


@pytest.fixture(scope="module")
def generic() -> VisionLanguageModel:
    module, processor = random_llava_next()
    return load_model(module, processor=processor, family="generic")


@pytest.fixture(params=["resampled", "generic"])
def any_model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    found: VisionLanguageModel = request.getfixturevalue(request.param)
    return found


def test_a_family_without_an_adapter_is_told_of_it() -> None:
    module, processor = random_idefics2()
    with pytest.raises(UnsupportedModelError, match=r"family='generic'.*adding_a_family\.md"):
        load_model(module, processor=processor)


def test_it_loads_from_a_folder(tmp_path: Path) -> None:
    module, processor = random_idefics2()
    module.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, family="generic")
    assert isinstance(loaded.family, Generic)
    batch = loaded.encode(prompt(picture(30, 20), "what is this ?"))
    with torch.no_grad():
        assert torch.equal(loaded._module(**batch).logits, module(**batch).logits)
    settings = {"hook_name": uses.HOOK, "sae": {"architecture": "topk", "d_sae": 32, "k": 4}, "device": "cpu"}
    named = {"model_name": str(tmp_path), "model_from_pretrained_kwargs": {"family": "generic"}}
    assert isinstance(load_run_model(build_config({**settings, **named})).family, Generic)


def test_hooks_agree_with_the_exact_adapter(exact: VisionLanguageModel, generic: VisionLanguageModel) -> None:
    assert {"blocks.1.hook_resid_post", "blocks.0.attn.hook_z", "hook_embed", "ln_final.hook_out"} <= set(generic.hooks)
    for point in generic.hooks.points():
        other = exact.hooks.resolve(point.name)
        own = (point.module_path, point.side, point.tower, point.layer, point.d, point.heads, point.element)
        theirs = (other.module_path, other.side, other.tower, other.layer, other.d, other.heads, other.element)
        assert own == theirs
    names = [name for name in exact.hooks.names() if name in generic.hooks]
    assert names == generic.hooks.names()
    assert (generic.n_layers, generic.d_model) == (exact.n_layers, exact.d_model)
    assert generic.family.final_norm == exact.family.final_norm
    assert generic.family.unembedding == exact.family.unembedding
    assert set(generic.family.media_modules) == set(exact.family.media_modules)
    assert generic.hooks.resolve("model.vision_tower.encoder.layers.0").tower == "vision"


def test_tokens_agree_with_the_exact_adapter(exact: VisionLanguageModel, generic: VisionLanguageModel) -> None:
    batch, other = generic.encode(mixed_prompts()), exact.encode(mixed_prompts())
    assert batch.inputs.keys() == other.inputs.keys()
    assert all(torch.equal(batch[name], other[name]) for name in batch)
    assert torch.equal(batch.layout.image_index, other.layout.image_index)
    assert torch.equal(batch.layout.is_text, other.layout.is_text)
    assert torch.equal(batch.layout.is_image, other.layout.is_image | (other.layout.modality == Modality.NEWLINE))


def test_image_tokens_are_where_pictures_are_put(resampled: VisionLanguageModel) -> None:
    def encode(seed: int) -> Any:
        return resampled.encode([prompt(picture(30, 20), "is", picture(20, 44, seed)), prompt("what ?")])

    plain = encode(0)
    found = differing(features_for(resampled._module, encode(1)), features_for(resampled._module, plain))
    layout = plain.layout
    assert np.array_equal(found, (layout.is_image & (layout.image_index == 1)).numpy())
    assert found.sum() == LATENTS
    assert layout.boxes.isnan().all()
    assert layout.inexact == ((UNKNOWN_PLACES, UNKNOWN_PLACES), ())


def test_steering_training_and_attribution_work(any_model: VisionLanguageModel, tmp_path: Path) -> None:
    uses.test_steering_is_a_plain_hook(any_model)
    uses.test_an_sae_trains_on_it(any_model, tmp_path)
    uses.test_attribution_is_that_of_autograd(any_model)
    uses.test_a_harvest_finds_what_a_plain_hook_sees(any_model, tmp_path)


def test_effects_on_words_need_no_places(any_model: VisionLanguageModel) -> None:
    assert any_model.answer(prompt(picture(40, 30), "what ?"), max_new_tokens=3)
    sae = uses.random_sae(any_model)
    assert top_output_tokens(any_model, sae, [0, 1])


def test_what_needs_a_place_takes_the_whole_picture_or_says_so(any_model: VisionLanguageModel) -> None:
    image = picture(40, 30)
    batch = any_model.encode(prompt(image, "what ?"))
    layout = batch.layout
    tokens = layout.is_image[0].nonzero()[:, 0]
    assert tuple(layout.union_box(tokens[:2])) == (0, 0, 40, 30)
    assert layout.crop(image, tokens[:1]).size == (40, 30)
    values = torch.zeros(layout.n_tokens)
    values[tokens[0]] = float(len(tokens))
    assert layout.heatmap(values) == pytest.approx(np.ones((30, 40)), rel=1e-5)
    with pytest.raises(SelectionError, match=r"family='generic'.*without a box"):
        layout.tokens_in((0, 0, 20, 20))
    assert torch.equal(layout.tokens_in((0, 0, 40, 30)), tokens)
    sae = uses.random_sae(any_model)
    with pytest.raises(SelectionError, match="without a box"), torch.no_grad():
        steered = steer(any_model, sae, {3: Set(4.0)}, tokens=BoxTokens((0, 0, 20, 20)))
        steered.answer(prompt(image, "what ?"), max_new_tokens=2)
    whole = steer(any_model, sae, {3: Set(4.0)}, tokens=ImageTokens(0))
    assert whole.answer(prompt(image, "what ?"), max_new_tokens=2)


def test_regions_and_reports_show_whole_pictures(resampled: VisionLanguageModel, tmp_path: Path) -> None:
    sae = uses.random_sae(resampled)
    store = harvest(resampled, sae, uses.rows(4), tmp_path / "store", n_top=2, batch_size=2, progress=False)
    feature = next(
        one
        for one in store.all_features
        if any(example.max_image > 0 for example in store.examples(one, "top", "image"))
    )
    example = store.examples(feature, "top", "image")[0]
    (region,) = find_regions(example)
    assert region.box == (0, 0, *example.images[0].size)
    assert silent_region(example, region, np.random.default_rng(0)) is None
    judge = ScriptedJudge(lambda request: "yes" if request.choices else "noise")
    made = explain(store, judge, output=tmp_path / "explained", features=[feature], progress=False)
    assert any(one.modality == "image" for one in made)
    score(store, judge, made, output=tmp_path / "scored", progress=False)
    build_report(store, output=tmp_path / "report", progress=False)
    assert (tmp_path / "report" / "index.html").is_file()


def test_several_invokes(any_model: VisionLanguageModel) -> None:
    prompts = [prompt(picture(30, 30), "what ?"), prompt("yes and no"), prompt(picture(30, 30, 1), "is this red ?")]
    hook, got = "blocks.1.hook_resid_post", []
    with torch.no_grad(), any_model.trace() as tracer:
        for one in prompts:
            with tracer.invoke(one):
                got.append(any_model.hooks[hook].save())
    for one, value in zip(prompts, got, strict=True):
        alone = any_model.encode(one)
        with torch.no_grad(), any_model.trace(**alone):
            expected = any_model.hooks[hook].save()
        torch.testing.assert_close(value[:, -alone["input_ids"].shape[1] :], expected, atol=1e-5, rtol=1e-5)


def test_pictures_that_cannot_be_joined(resampled: VisionLanguageModel) -> None:
    with pytest.raises(PromptError, match="one batch"), resampled.trace() as tracer:
        with tracer.invoke(prompt(picture(30, 30), "what ?")):
            resampled.hooks["blocks.0.hook_resid_post"].save()
        with tracer.invoke(prompt(picture(30, 20), picture(20, 30), "what ?")):
            resampled.hooks["blocks.0.hook_resid_post"].save()


def test_a_model_that_does_not_fit_is_refused() -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    _, processor = random_llava_next()
    with pytest.raises(UnsupportedModelError, match="image_token_id"):
        load_model(LlamaForCausalLM(config), processor=processor, family="generic")
    module, processor = random_llava_next()
    module.config.text_config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModelError, match="the 3 blocks"):
        load_model(module, processor=processor, family="generic")


def test_a_placeholder_in_the_text_is_refused(any_model: VisionLanguageModel) -> None:
    with pytest.raises(PromptError, match="placeholders for 1 pictures"):
        any_model.encode(prompt(Image.new("RGB", (20, 20)), "what is <image> ?"))

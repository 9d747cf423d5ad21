"""The features of the hot cell: each number is what steering the model by hand gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next
from sae_lens_multimodal.errors import ConfigError, NoGapError, SAEMismatchError, SelectionError
from sae_lens_multimodal.hooks.changes import Ablate
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.steer import steer
from sae_lens_multimodal.hooks.trace_corruptions import ReplaceTokens
from sae_lens_multimodal.hooks.trace_findings import Confirmation, HeldOut, Reference, TraceStory
from sae_lens_multimodal.hooks.trace_result import Cell
from sae_lens_multimodal.hooks.trace_story import trace_features
from tests.hooks.hook_samples import HOOK, SAE, build_sae
from tests.hooks.trace_samples import ask, plain_logits

CLEAN, CORRUPTED = ask((200, 10, 10)), ask((10, 200, 60))
OTHERS = ask((9, 9, 200), "is this blue or a ?"), ask((200, 200, 9), "is this blue or a ?")


@pytest.fixture(scope="module")
def story(model: VisionLanguageModel, sae: SAE[Any]) -> TraceStory:
    return trace_features(
        model,
        sae,
        CLEAN,
        CORRUPTED,
        answer="red",
        positions={"picture": "image", "end": "last"},
        min_gap=None,
        n_features=3,
        cell=Cell("resid", 0, 0, "picture", 0.0),
        held_out=[HeldOut(CLEAN, CORRUPTED), HeldOut(*OTHERS, answer="blue", tokens="last")],
        reference=[*OTHERS, CLEAN],
        explanations={feature: f"says {feature}" for feature in range(0, 96, 2)},
    )


def _log_probability(model: VisionLanguageModel, logits: torch.Tensor) -> float:
    red = int(model.tokenizer.convert_tokens_to_ids("red"))
    return float(logits[-1].log_softmax(-1)[red].detach())


def test_the_numbers_are_those_of_steering_by_hand(
    model: VisionLanguageModel, sae: SAE[Any], story: TraceStory
) -> None:
    assert story.hook_name == HOOK
    assert story.trace.metric == "log_probability"
    assert (story.cell.part, story.cell.layer) == ("resid", 0)
    assert story.cell.restored == float(story.trace.part("resid")[0, 0])
    assert story.at_corrupted
    clean, corrupted = (model.encode(one, add_generation_prompt=True) for one in (CLEAN, CORRUPTED))
    places = list(story.trace.units[story.cell.unit].positions)
    high = _log_probability(model, plain_logits(model, clean))
    low = _log_probability(model, plain_logits(model, corrupted))
    one, two = (read_activations(model, batch, HOOK)[HOOK] for batch in (clean, corrupted))
    difference = sae.encode(one) - sae.encode(two)

    def changed(batch: Any, value: torch.Tensor, features: list[int], sign: int) -> float:
        value = value.clone()
        value[0, places] += sign * (difference[0, places][:, features] @ sae.W_dec[features])
        with model.trace(**batch):
            model.hooks[HOOK] = value
            logits = model.output.logits.save()
        return _log_probability(model, logits[0])

    chosen = [finding.feature for finding in story.features]
    assert len(set(chosen)) == 3
    for features, restored, exchanged in (
        *(([one.feature], one.restored, one.exchanged) for one in story.features),
        (chosen, story.together.restored, story.together.exchanged),
    ):
        assert restored == pytest.approx((changed(corrupted, two, features, 1) - low) / (high - low), abs=1e-3)
        assert exchanged == pytest.approx((high - changed(clean, one, features, -1)) / (high - low), abs=1e-3)
    whole = changed(corrupted, two, list(range(96)), 1)
    assert story.restored_all == pytest.approx((whole - low) / (high - low), abs=1e-3)
    for features, lost in (
        *(([finding.feature], finding.ablated) for finding in story.features),
        (chosen, story.together.ablated),
    ):
        ablated = steer(model, sae, {feature: Ablate() for feature in features}, tokens=places)
        with torch.no_grad(), ablated.trace(**clean):
            logits = ablated.output.logits.save()
        assert lost == pytest.approx((high - _log_probability(model, logits[0])) / (high - low), abs=1e-3)


def test_means_are_put_in_their_place_as_by_hand(model: VisionLanguageModel, sae: SAE[Any], story: TraceStory) -> None:
    batches = [model.encode(one, add_generation_prompt=True) for one in (*OTHERS, CLEAN, CORRUPTED)]
    places = list(story.trace.units[story.cell.unit].positions)
    from_end = [place - batches[2].layout.n_tokens for place in places]
    values = [read_activations(model, batch, HOOK)[HOOK][0] for batch in batches[:3]]
    usual = torch.cat([value[from_end] for value in values])
    z = sae.encode(usual).mean(0)
    high, low = (_log_probability(model, plain_logits(model, batch)) for batch in batches[2:])

    def lost(changed: torch.Tensor) -> float:
        value = values[2].clone()
        value[places] = changed
        with model.trace(**batches[2]):
            model.hooks[HOOK] = value[None]
            logits = model.output.logits.save()
        return (high - _log_probability(model, logits[0])) / (high - low)

    clean = values[2][places]
    delta = z - sae.encode(clean)
    chosen = [finding.feature for finding in story.features]
    others = [feature for feature in range(96) if feature not in chosen]
    found = story.together.mean_ablated
    assert found is not None
    for measured, features in (
        (found.found, chosen),
        (found.others, others),
        (found.all_features, list(range(96))),
        *((one.mean_ablated, [one.feature]) for one in story.features),
    ):
        assert measured == pytest.approx(lost(clean + delta[:, features] @ sae.W_dec[features]), abs=1e-3)
    assert found.value == pytest.approx(lost(usual.mean(0).expand_as(clean)), abs=1e-3)
    assert found.random is not None
    other = story.held_out[1].mean_ablated
    assert other is not None
    assert other.value != pytest.approx(found.value, abs=1e-3)
    assert story.to_dict()["together"]["mean_ablated"]["others"] == found.others
    only = trace_features(
        model, sae, CLEAN, CORRUPTED, answer="red", positions="last", min_gap=None, n_features=1,
        reference=Reference([CORRUPTED], tokens="last"),
    )  # fmt: skip
    # the mean over the corrupted prompt alone is what the corrupted run has there
    assert only.features[0].mean_ablated == pytest.approx(only.features[0].exchanged, abs=1e-4)
    with pytest.raises(SelectionError, match="no reference prompts"):
        trace_features(model, sae, CLEAN, CORRUPTED, answer="red", positions="last", min_gap=None, reference=[])


def test_features_are_chosen_one_after_the_other(model: VisionLanguageModel, sae: SAE[Any], story: TraceStory) -> None:
    fewer = trace_features(
        model, sae, CLEAN, CORRUPTED, answer="red", positions={"picture": "image"}, min_gap=None, n_features=2,
    )  # fmt: skip
    assert [one.feature for one in fewer.features] == [one.feature for one in story.features][:2]
    assert [one.explanation for one in story.features] == [
        f"says {one.feature}" if one.feature % 2 == 0 else None for one in story.features
    ]
    assert all(one.explanation is None for one in fewer.features)
    assert fewer.together.mean_ablated is None
    assert fewer.features[0].mean_ablated is None
    assert story.together.n_random == 8
    assert fewer.at_corrupted  # there is no other token to look at
    assert story.to_dict()["features"][0]["feature"] == story.features[0].feature


def test_a_cell_is_not_hot_because_it_undoes_the_corruption(
    model: VisionLanguageModel, sae: SAE[Any], caplog: pytest.LogCaptureFixture
) -> None:
    batch = model.encode(CLEAN, add_generation_prompt=True)
    last = batch.layout.n_tokens - 1
    settings: dict[str, Any] = {"answer": "red", "min_gap": None, "n_features": 1}
    places = []
    for place in range(last - 3, last + 1):
        # what comes before the replaced token brings nothing back
        found = trace_features(
            model, sae, CLEAN, ReplaceTokens([place], "green"), positions=[place - 1, place], **settings
        )
        assert found.trace.changed_inputs == [place]
        assert (found.cell.unit, found.cell.restored, found.at_corrupted) == (0, 0.0, False)
        places += [place] if float(found.trace.part("resid")[0, 1]) > 0.1 else []
        assert [cell.unit for cell in found.trace.top(99, corrupted_tokens=False)] == [0] * 6
    assert places  # there the replaced token itself is hotter
    assert caplog.text.count("of the answer back; take an SAE") == 4
    pictures = trace_features(model, sae, CLEAN, CORRUPTED, answer="red", min_gap=None, n_features=1)
    assert pictures.trace.changed_inputs == batch.layout.is_image[0].nonzero()[:, 0].tolist()
    for cell, message in (
        (Cell("mlp_out", 0, last, "", 0.0), "the SAEs read blocks.0.hook_resid_post"),
        (Cell("resid", 0, last, "elsewhere", 0.0), "not among the positions"),
    ):
        with pytest.raises(ConfigError, match=message):
            trace_features(model, sae, CLEAN, CORRUPTED, answer="red", min_gap=None, cell=cell)


def _plain(found: Confirmation) -> list[dict[str, float]]:
    whole = found.to_dict()
    return [whole.pop("mean_ablated"), whole]


def test_held_out_prompts_are_measured_by_themselves(
    model: VisionLanguageModel, sae: SAE[Any], story: TraceStory
) -> None:
    same, other = story.held_out
    for one, two in zip(_plain(same), _plain(story.together), strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    features = {one.feature: Ablate() for one in story.features}
    batches = [model.encode(one, add_generation_prompt=True) for one in OTHERS]
    blue = int(model.tokenizer.convert_tokens_to_ids("blue"))
    high, low = (float(plain_logits(model, one)[-1].log_softmax(-1)[blue]) for one in batches)
    edited = steer(model, sae, features, tokens="last", steps="prefill")
    with torch.no_grad(), edited.trace(**batches[0]):
        logits = edited.output.logits.save()
    value = float(logits[0, -1].log_softmax(-1)[blue])
    assert other.ablated == pytest.approx((high - value) / (high - low), abs=1e-3)
    assert story.to_dict()["held_out"][1]["ablated"] == other.ablated
    with pytest.raises(SelectionError, match=r"tokens=\.\.\."):
        trace_features(
            model, sae, CLEAN, CORRUPTED, answer="red", positions="last", min_gap=None, held_out=[HeldOut(*OTHERS)]
        )
    with pytest.raises(NoGapError):
        trace_features(
            model, sae, CLEAN, CORRUPTED, answer="red", positions="last", min_gap=-1, held_out=[HeldOut(CLEAN, CLEAN)]
        )


def test_runs_that_are_the_same_have_no_features(model: VisionLanguageModel, sae: SAE[Any]) -> None:
    settings: dict[str, Any] = {"answer": "red", "positions": "last", "min_gap": None}
    with pytest.raises(NoGapError, match="bring nothing back"):
        trace_features(model, sae, CLEAN, CLEAN, **settings)
    with pytest.raises(NoGapError, match="bring nothing back"):
        trace_features(model, sae, CLEAN, CORRUPTED, held_out=[HeldOut(CLEAN, CLEAN)], **settings)


def test_random_features_are_of_like_weight(model: VisionLanguageModel, sae: SAE[Any], story: TraceStory) -> None:
    batches = [model.encode(one, add_generation_prompt=True) for one in (CLEAN, CORRUPTED)]
    one, two = (sae.encode(read_activations(model, batch, HOOK)[HOOK][0]) for batch in batches)
    picture = batches[0].layout.is_image[0]
    weight = ((one - two)[picture].abs().sum(0) * sae.W_dec.norm(dim=-1)).detach()
    chosen = [finding.feature for finding in story.features]
    others = [feature for feature in range(96) if feature not in chosen and float(weight[feature]) > 0]
    typical = float(weight[others].mean() * len(chosen) / weight[chosen].sum())
    assert abs(story.together.weight_random - 1) < abs(typical - 1)
    assert 0.3 < story.together.weight_random < 2


def test_explanations_belong_to_one_sae(model: VisionLanguageModel, sae: SAE[Any]) -> None:
    other = build_sae(metadata={"hook_name": "blocks.1.hook_resid_post", "model_name": model.name})
    settings: dict[str, Any] = {"answer": "red", "positions": "last", "min_gap": None, "n_features": 1}
    hooks = [HOOK, "blocks.1.hook_resid_post"]
    by_hook = {hook: dict.fromkeys(range(96), hook) for hook in hooks}
    found = trace_features(model, [sae, other], CLEAN, CORRUPTED, explanations=by_hook, **settings)
    assert found.features[0].explanation == found.hook_name
    for saes, explanations, message in (
        ([sae, other], {3: "red"}, "2 SAEs, of which each"),
        ([sae], by_hook, "Got explanations for blocks.1.hook_resid_post"),
        ([sae, sae], None, "two SAEs at"),
        ([], None, "no SAE"),
    ):
        with pytest.raises(ConfigError, match=message):
            trace_features(model, saes, CLEAN, CORRUPTED, explanations=explanations, **settings)  # type: ignore[arg-type]


def test_a_planted_feature_is_found() -> None:
    """The answer is written by the one direction that one feature reads, on top of a model that does nothing else."""
    module, processor = random_llava_next()
    built = load_model(module, processor=processor)
    text = module.model.language_model
    answer, said = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "?"))
    with torch.no_grad():
        for layer in text.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        text.norm.weight.fill_(1.0)
        text.embed_tokens.weight.copy_(torch.eye(48)[: len(text.embed_tokens.weight)])
        module.lm_head.weight.zero_()
        module.lm_head.weight[answer, said] = 1.0
    planted = build_sae("standard", metadata={"hook_name": HOOK, "model_name": built.name})
    with torch.no_grad():
        planted.W_enc.zero_()
        planted.W_dec.zero_()
        planted.b_enc.zero_()
        planted.b_dec.zero_()
        for feature in range(len(text.embed_tokens.weight)):
            planted.W_enc[feature, feature + 5] = planted.W_dec[feature + 5, feature] = 1.0
    batch = built.encode(CLEAN, add_generation_prompt=False)
    last = batch.layout.n_tokens - 1
    found = trace_features(
        built, planted, batch, ReplaceTokens([last], "red"), answer="yes", positions=[last], metric="probability"
    )
    assert found.features[0].feature == said + 5
    assert found.features[0].restored > 0.5
    assert found.features[0].exchanged == pytest.approx(found.features[0].ablated, abs=1e-5)
    assert found.together.restored == pytest.approx(1.0, abs=1e-4)
    assert found.restored_all == pytest.approx(1.0, abs=1e-4)


def test_of_several_saes_the_hottest_cell_is_taken(
    model: VisionLanguageModel, sae: SAE[Any], caplog: pytest.LogCaptureFixture
) -> None:
    other = build_sae(metadata={"hook_name": "blocks.1.hook_mlp_out", "model_name": model.name})
    found = trace_features(
        model, [sae, other], CLEAN, CORRUPTED, answer="red", positions={"picture": "image"}, min_gap=None, n_features=1
    )
    cells = {(one.part, one.layer): one.restored for one in found.trace.top(100)}
    assert found.cell.restored == max(cells["resid", 0], cells["mlp_out", 1])
    assert found.cell.restored >= 0.05 and "of the answer back" not in caplog.text
    assert found.trace.parts == ["resid", "mlp_out", "attn_out"]


def test_what_cannot_be_told_is_refused(model: VisionLanguageModel, sae: SAE[Any]) -> None:
    with pytest.raises(ConfigError, match="n_features=0"):
        trace_features(model, sae, CLEAN, CORRUPTED, answer="red", n_features=0)
    inside = build_sae(metadata={"hook_name": "blocks.0.ln2.hook_out", "model_name": model.name})
    with pytest.raises(SAEMismatchError, match="a trace restores"):
        trace_features(model, inside, CLEAN, CORRUPTED, answer="red")

"""A causal trace is what plain PyTorch hooks give cell by cell, and where the truth is known it says so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next
from sae_lens_multimodal.errors import ConfigError, NoGapError, SelectionError, StoreError
from sae_lens_multimodal.hooks import trace as tracing
from sae_lens_multimodal.hooks.places import BoxTokens
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.trace import causal_trace
from sae_lens_multimodal.hooks.trace_corruptions import ReplaceTokens
from sae_lens_multimodal.hooks.trace_parts import Head, SAEFeatures
from sae_lens_multimodal.hooks.trace_result import CausalTrace
from sae_lens_multimodal.hooks.trace_run import BlockRunner
from sae_lens_multimodal.types import Modality
from tests.hooks.hook_samples import HOOK, SAE
from tests.hooks.trace_samples import ask, plain_logits, plain_restore

CLEAN, CORRUPTED = ask((200, 10, 10)), ask((10, 200, 60))
HOOKS = {"resid": "hook_resid_post", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}


@pytest.fixture(scope="module")
def whole(model: VisionLanguageModel) -> CausalTrace:
    return causal_trace(
        model,
        CLEAN,
        CORRUPTED,
        answer="red circle",
        against="red square",
        parts=("resid", "attn_out", "mlp_out", "heads"),
        min_gap=None,
    )


def _measured(model: VisionLanguageModel, logits: torch.Tensor) -> dict[str, float]:
    """The metrics of "red circle" against "red square" by hand; "red" is the prompt's last token."""
    red, circle, square = (int(model.tokenizer.convert_tokens_to_ids(word)) for word in ("red", "circle", "square"))
    first, second = logits[-2].double().softmax(-1), logits[-1].double().softmax(-1)
    probability = float(first[red] * second[circle])
    return {
        "probability": probability,
        "log_probability": math.log(probability),
        "logit_difference": float(logits[-1, circle] - logits[-1, square]),
    }


def _with_red(model: VisionLanguageModel, conversation: list[Any]) -> dict[str, torch.Tensor]:
    batch = dict(model.encode(conversation, add_generation_prompt=True))
    red = torch.tensor([[int(model.tokenizer.convert_tokens_to_ids("red"))]])
    batch["input_ids"] = torch.cat([batch["input_ids"], red], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    return batch


def test_every_part_is_restored_as_plain_hooks_do(model: VisionLanguageModel, whole: CausalTrace) -> None:
    clean, corrupted = _with_red(model, CLEAN), _with_red(model, CORRUPTED)
    length = clean["input_ids"].shape[1]
    assert whole.parts == ["resid", "attn_out", "mlp_out", "head 0", "head 1", "head 2", "head 3"]
    assert whole.restored.shape == (7, 2, length)
    for measured, inputs in ((whole.clean, clean), (whole.corrupted, corrupted)):
        expected = _measured(model, plain_logits(model, inputs))
        assert measured == pytest.approx(expected, rel=1e-4)
    image = int(whole.layout.is_image[0].nonzero()[7, 0])
    for layer in (0, 1):
        for position in (image, length - 6, length - 2, length - 1):
            for part in whole.parts:
                columns = slice(None)
                if part.startswith("head"):
                    head, hook = int(part.split()[1]), "attn.hook_z"
                    columns = slice(head * 12, head * 12 + 12)
                else:
                    hook = HOOKS[part]
                logits = plain_restore(model, clean, corrupted, [f"blocks.{layer}.{hook}"], [position], columns)
                expected = _measured(model, logits)
                for name, value in expected.items():
                    found = float(whole.values[name][whole.parts.index(part), layer, position])
                    assert found == pytest.approx(value, rel=1e-4, abs=1e-5), (part, layer, position, name)


def test_a_share_is_of_the_gap(whole: CausalTrace) -> None:
    for name in ("probability", "log_probability", "logit_difference"):
        gap = whole.clean[name] - whole.corrupted[name]
        by_hand = (whole.values[name] - whole.corrupted[name]) / gap
        assert torch.allclose(whole.share(name), by_hand)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has probability"):
        whole.share("perplexity")  # type: ignore[arg-type]


def test_many_rows_a_pass_give_what_one_gives(model: VisionLanguageModel, whole: CausalTrace) -> None:
    one_by_one = causal_trace(
        model, CLEAN, CORRUPTED, answer="red circle", parts="mlp_out", min_gap=None, tokens_per_pass=1
    )
    together = whole.values["log_probability"][2:3]
    assert one_by_one.n_passes > 20 * 2
    assert torch.allclose(one_by_one.values["log_probability"], together, atol=1e-5)


def test_kept_keys_give_what_whole_prompts_give(
    model: VisionLanguageModel, whole: CausalTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockRunner, "_can_cut", lambda *_: False)
    uncut = causal_trace(
        model, CLEAN, CORRUPTED, answer="red circle", parts=("resid", "attn_out", "mlp_out", "heads"), min_gap=None
    )
    assert torch.allclose(uncut.values["log_probability"], whole.values["log_probability"], atol=1e-5)


@pytest.mark.parametrize("part", ["attn_out", "mlp_out", "resid", Head(1)])
def test_a_window_restores_its_layers_together(model: VisionLanguageModel, part: Any) -> None:
    found = causal_trace(
        model, CLEAN, CORRUPTED, answer="red", parts=part, window=3, positions={"it": "image"}, min_gap=None
    )
    clean, corrupted = (model.encode(one, add_generation_prompt=True) for one in (CLEAN, CORRUPTED))
    places = clean.layout.is_image[0].nonzero()[:, 0].tolist()
    hook, columns = ("attn.hook_z", slice(12, 24)) if isinstance(part, Head) else (HOOKS[part], slice(None))
    logits = plain_restore(model, clean, corrupted, [f"blocks.{at}.{hook}" for at in (0, 1)], places, columns)
    red = int(model.tokenizer.convert_tokens_to_ids("red"))
    expected = float(logits[-1].softmax(-1)[red])
    assert found.values["probability"][0, :, 0].tolist() == pytest.approx([expected, expected], rel=1e-4)


def test_restoring_everything_gives_all_of_it_back(model: VisionLanguageModel) -> None:
    found = causal_trace(
        model, CLEAN, CORRUPTED, answer="red", parts="resid", positions={"everything": "all"}, min_gap=None
    )
    assert found.restored.flatten().tolist() == pytest.approx([1.0, 1.0], abs=1e-4)


def test_what_comes_before_the_corruption_gives_nothing_and_costs_nothing(model: VisionLanguageModel) -> None:
    batch = model.encode(CLEAN, add_generation_prompt=True)
    place = batch.layout.n_tokens - 3
    found = causal_trace(
        model,
        CLEAN,
        ReplaceTokens([place], "green"),
        answer="red",
        parts=("resid", "attn_out", "mlp_out"),
        min_gap=None,
    )
    assert torch.equal(found.restored[:, :, :place], torch.zeros(3, 2, place))
    assert found.n_skipped == 3 * 2 * place
    assert bool((found.restored[:, :, place:] != 0).any())


def test_a_prompt_that_is_not_corrupted_changes_nothing_and_is_refused(model: VisionLanguageModel) -> None:
    found = causal_trace(model, CLEAN, CLEAN, answer="red", min_gap=None)
    assert not found.change.any()
    assert found.n_passes == 0
    assert bool(found.restored.isnan().all())
    with pytest.raises(NoGapError, match=r"expected at least 0\.05 less"):
        causal_trace(model, CLEAN, CLEAN, answer="red")


@pytest.mark.parametrize("metric", ["log_probability", "logit_difference"])
def test_answers_that_are_never_given_are_refused_in_every_metric(model: VisionLanguageModel, metric: Any) -> None:
    settings: dict[str, Any] = {"against": "square", "parts": "resid", "positions": "last", "metric": metric}
    # one of the two orders has a gap in the metric; in neither is there one in the probability
    pairs = [(CLEAN, CORRUPTED), (CORRUPTED, CLEAN)]
    found = [causal_trace(model, *pair, answer="circle", min_gap=None, **settings) for pair in pairs]
    assert max(one.gap for one in found) > 0.001
    assert max(abs(one.clean["probability"] - one.corrupted["probability"]) for one in found) < 0.05
    for pair in pairs:
        with pytest.raises(NoGapError, match=r"The probability of the answer.*at least 0\.05"):
            causal_trace(model, *pair, answer="circle", **settings)
    with pytest.raises(NoGapError, match=r"log probability|logit difference"):
        causal_trace(model, CLEAN, CLEAN, answer="circle", min_gap=0.0, **settings)


def test_half_precision_and_several_pictures_give_what_plain_hooks_give() -> None:
    module, processor = random_llava_next()
    half = load_model(module.to(torch.bfloat16), processor=processor)
    pair = [[dict(one[0])] for one in (ask((200, 10, 10)), ask((10, 200, 60)))]
    for one, second in zip(pair, ((9, 9, 9), (200, 200, 9)), strict=True):
        picture = {"type": "image", "image": Image.new("RGB", (50, 30), second)}
        one[0]["content"] = [one[0]["content"][0], picture, one[0]["content"][1]]
    clean, corrupted = (half.encode(one, add_generation_prompt=True) for one in pair)
    groups = {f"picture {at}": clean.layout.image_index == at for at in (0, 1)}
    found = causal_trace(
        half, *pair, answer="red", parts=list(HOOKS), positions=groups, metric="log_probability", min_gap=None
    )
    red = int(half.tokenizer.convert_tokens_to_ids("red"))
    assert set(found.changed_inputs) == set((clean.layout.image_index[0] >= 0).nonzero()[:, 0].tolist()) - set(
        (clean.layout.modality[0] == Modality.NEWLINE).nonzero()[:, 0].tolist()
    )
    for part, hook in enumerate(HOOKS.values()):
        for at in (0, 1):
            places = (clean.layout.image_index[0] == at).nonzero()[:, 0].tolist()
            logits = plain_restore(half, clean, corrupted, [f"blocks.0.{hook}"], places)
            expected = float(logits[-1].float().log_softmax(-1)[red])
            assert float(found.values["log_probability"][part, 0, at]) == pytest.approx(expected, abs=0.03)
    everything = causal_trace(half, *pair, answer="red", parts="resid", positions={"all": "all"}, min_gap=None)
    assert everything.values["probability"].flatten().tolist() == pytest.approx(
        [everything.clean["probability"]] * 2, rel=0.02
    )


def test_a_pass_counts_the_keys_that_every_row_copies(model: VisionLanguageModel) -> None:
    plan = tracing.prepare(model, CLEAN, CORRUPTED, answer="red")
    assert plan.row_cost(0) == plan.n_tokens
    assert plan.row_cost(80) == plan.n_tokens - 80 + 10


def test_a_model_whose_answer_one_mlp_writes_lights_one_cell() -> None:
    module, processor = random_llava_next()
    built = load_model(module, processor=processor)
    text = module.model.language_model
    answer, said = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "?"))
    with torch.no_grad():
        for layer in text.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.post_attention_layernorm.weight.fill_(1.0)
        text.norm.weight.fill_(1.0)
        text.embed_tokens.weight.copy_(torch.eye(48)[: len(text.embed_tokens.weight)])
        mlp = text.layers[1].mlp
        for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            projection.weight.zero_()
        mlp.gate_proj.weight[0, said] = mlp.up_proj.weight[0, said] = 1.0
        mlp.down_proj.weight[47, 0] = 0.1
        module.lm_head.weight.zero_()
        module.lm_head.weight[answer, 47] = 5.0
    batch = built.encode(CLEAN, add_generation_prompt=False)
    last = batch.layout.n_tokens - 1
    found = causal_trace(
        built, batch, ReplaceTokens([last], "red"), answer="yes", parts=("attn_out", "mlp_out"), positions="all"
    )
    expected = torch.zeros(2, 2, last + 1)
    expected[1, 1, last] = 1.0
    assert torch.allclose(found.restored, expected, atol=1e-5)
    best = found.top(1)[0]
    assert (best.part, best.layer, best.unit) == ("mlp_out", 1, last)


def test_features_are_restored_and_the_saes_error_is_not(model: VisionLanguageModel, sae: SAE[Any]) -> None:
    clean, corrupted = (model.encode(one, add_generation_prompt=True) for one in (CLEAN, CORRUPTED))
    one, two = (read_activations(model, batch, HOOK)[HOOK] for batch in (clean, corrupted))
    difference = sae.encode(one) - sae.encode(two)
    feature = int(difference[0].abs().sum(0).argmax())
    parts = (SAEFeatures(sae), SAEFeatures(sae, [feature]))
    found = causal_trace(
        model, CLEAN, CORRUPTED, answer="red", parts=parts, positions={"picture": "image"}, min_gap=None
    )
    assert found.parts == ["all features", f"feature {feature}"]
    assert bool(found.restored[:, 1].isnan().all())
    red = int(model.tokenizer.convert_tokens_to_ids("red"))
    for row, columns in enumerate((slice(None), slice(feature, feature + 1))):
        moved = two.clone()
        places = clean.layout.is_image
        moved[places] += (difference[..., columns] @ sae.W_dec[columns])[places]
        with model.trace(**corrupted):
            model.hooks[HOOK] = moved
            logits = model.output.logits.save()
        expected = float(logits[0, -1].softmax(-1)[red].detach())
        assert float(found.values["probability"][row, 0, 0]) == pytest.approx(expected, rel=1e-4)


def test_eager_attention_gives_what_sdpa_gives(model: VisionLanguageModel, whole: CausalTrace) -> None:
    module, processor = random_llava_next()
    module.set_attn_implementation("eager")
    eager = load_model(module, processor=processor)
    found = causal_trace(
        eager, CLEAN, CORRUPTED, answer="red circle", parts=("resid", "attn_out", "mlp_out", "heads"), min_gap=None
    )
    assert torch.allclose(found.values["log_probability"], whole.values["log_probability"], atol=1e-4)


def test_a_trace_leaves_the_model_as_it_was_also_after_an_error(model: VisionLanguageModel) -> None:
    def state() -> list[Any]:
        parts = list(model._module.modules())
        return [(len(one._forward_hooks), len(one._forward_pre_hooks), one.__dict__.get("forward")) for one in parts]

    batch = model.encode(CLEAN)
    logits = plain_logits(model, batch)
    before = state()
    causal_trace(model, CLEAN, CORRUPTED, answer="red", min_gap=None)

    def fail(value: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"no {value.shape}")

    plan = tracing.prepare(model, CLEAN, CORRUPTED, answer="red")
    hidden = plan.corrupted.calls[0].hidden
    path = "model.language_model.layers.0.self_attn"
    with pytest.raises(RuntimeError, match="no torch"):
        skipped = {path: (torch.zeros_like(hidden), None)}
        plan.runner.go_on(plan.corrupted, 0, hidden, changes={"blocks.0.hook_mlp_out": fail}, skipped=skipped)
    assert state() == before
    assert torch.equal(plain_logits(model, batch), logits)


def test_regions_and_heat_maps(model: VisionLanguageModel, whole: CausalTrace) -> None:
    boxes = {"corner": BoxTokens((0, 0, 20, 20)), "rest": BoxTokens((30, 0, 60, 40))}
    found = causal_trace(model, CLEAN, CORRUPTED, answer="red", parts="resid", positions=boxes, min_gap=None)
    assert [unit.label for unit in found.units] == ["corner", "rest"]
    assert set(found.units[0].positions).isdisjoint(found.units[1].positions)
    painted = found.heatmap("resid", 0)
    assert painted.shape == (40, 60)
    assert painted[:, 45:].mean() == pytest.approx(float(found.part("resid")[0, 1]), rel=1e-3)
    means = whole.group({"picture": whole.layout.is_image[0].nonzero()[:, 0].tolist()})
    assert means["picture"].shape == (7, 2)
    assert torch.allclose(means["picture"], whole.restored[:, :, whole.layout.is_image[0]].mean(-1))
    with pytest.raises(SelectionError, match="nothing was restored"):
        found.group({"none": [0]})


def test_masks_and_positions_are_about_the_prompt(model: VisionLanguageModel, whole: CausalTrace) -> None:
    batch = model.encode(CLEAN, add_generation_prompt=True)
    for positions, places in (
        (batch.layout.is_image, batch.layout.is_image[0].nonzero()[:, 0].tolist()),
        ([-1, -3], [batch.layout.n_tokens - 3, batch.layout.n_tokens - 1]),
    ):
        found = causal_trace(
            model, batch, model.encode(CORRUPTED, add_generation_prompt=True), answer="red circle", parts="mlp_out",
            positions=positions, min_gap=None,
        )  # fmt: skip
        assert [unit.positions for unit in found.units] == [(place,) for place in places]
        assert torch.allclose(
            found.values["log_probability"][0], whole.values["log_probability"][2][:, places], atol=1e-5
        )


def test_a_trace_is_saved_and_read(whole: CausalTrace, tmp_path: Path) -> None:
    again = CausalTrace.load(whole.save(tmp_path / "trace"))
    assert again.to_dict() == whole.to_dict()
    assert torch.equal(again.layout.modality, whole.layout.modality)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds no trace"):
        whole.save(tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"parts": "mlp"}, ConfigError, "Got the part 'mlp'"),
        ({"parts": Head(4)}, ConfigError, "has the heads 0 to 3"),
        ({"parts": ()}, ConfigError, "no parts"),
        ({"layers": [2]}, ConfigError, "layers 0 to 1"),
        ({"window": 0}, ConfigError, "expected 1 or more"),
        ({"metric": "logit_difference"}, ConfigError, "without another answer"),
        ({"metric": "perplexity"}, ConfigError, "Got metric="),
        ({"against": "red"}, ConfigError, "another answer"),
        ({"positions": {}}, SelectionError, "no groups"),
    ],
)
def test_what_cannot_be_traced_is_refused(
    settings: dict[str, Any], error: type[Exception], message: str, model: VisionLanguageModel
) -> None:
    with pytest.raises(error, match=message):
        causal_trace(model, CLEAN, CORRUPTED, answer="red", min_gap=None, **settings)


def test_without_an_answer_the_likeliest_token_is_meant(model: VisionLanguageModel) -> None:
    found = causal_trace(model, CLEAN, CORRUPTED, parts="resid", positions="last", min_gap=None)
    logits = plain_logits(model, model.encode(CLEAN, add_generation_prompt=True))
    assert found.answer == model.tokenizer.decode([int(logits[-1].argmax())])


def test_an_edited_model_is_refused(model: VisionLanguageModel) -> None:
    with model.edit() as (_, edited):
        edited.hooks["blocks.0.hook_mlp_out"][:] = 0
    with pytest.raises(SelectionError, match="plain model"):
        causal_trace(edited, CLEAN, CORRUPTED, answer="red")

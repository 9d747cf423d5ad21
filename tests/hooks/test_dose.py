"""Dose curves: every strength's row is what that strength alone gives, and side effects are what they say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, FeatureError, SelectionError
from sae_lens_multimodal.hooks.dose import STRENGTHS, activation_unit, dose_response, kl_divergence
from sae_lens_multimodal.hooks.dose_curve import DoseCurve, DosePoint
from sae_lens_multimodal.hooks.dose_runner import DoseRunner
from sae_lens_multimodal.hooks.places import BoxTokens
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.steer import Ablate, Add, Set, SteeringVector, steer
from sae_lens_multimodal.hooks.trace_run import BlockRunner
from tests.hooks.hook_samples import HOOK, build_sae

Conversations = list[list[dict[str, Any]]]


def probabilities(model: VisionLanguageModel, conversation: Any) -> Tensor:
    batch = model.encode([conversation], add_generation_prompt=True)
    with torch.no_grad(), model.trace(**batch):
        logits = model.output.logits[:, -1].save()
    return logits[0].double().softmax(-1)


@pytest.mark.parametrize("tokens", ["all", "image", "last"])
def test_each_point_is_the_strength_by_itself(
    tokens: Any, model: VisionLanguageModel, sae: SAE[Any], active: list[int], conversations: Conversations
) -> None:
    feature = active[0]
    picture, text, two = conversations
    curve = dose_response(
        model, sae, feature, [picture, two], "yes", strengths=[0.5, 3.0], unit=2.0, guard=[text], tokens=tokens
    )
    yes = model.tokenizer.convert_tokens_to_ids("yes")
    assert curve.baseline == pytest.approx(
        sum(float(probabilities(model, one)[yes]) for one in (picture, two)) / 2, rel=1e-4
    )
    for point, strength in zip(curve.points, (0.5, 3.0), strict=True):
        steered = steer(model, sae, {feature: Set(2.0 * strength)}, tokens=tokens, if_empty="ignore")
        after = [probabilities(steered, one) for one in (picture, two)]
        assert point.value == 2.0 * strength
        assert point.target == pytest.approx(sum(float(one[yes]) for one in after) / 2, rel=1e-3, abs=1e-7)
        others = []
        for one, new in zip((picture, two), after, strict=True):
            p, q = probabilities(model, one), new.clone()
            p[yes] = q[yes] = 0
            p, q = p / p.sum(), q / q.sum()
            others.append(float((p * (p / q).log()).nan_to_num(0).sum()))
        assert point.others_kl == pytest.approx(sum(others) / 2, rel=1e-3, abs=1e-6)
        p, q = probabilities(model, text), probabilities(steered, text)
        assert point.guard_kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3, abs=1e-6)
        assert point.guard_changed == float(p.argmax() != q.argmax())


def test_targets_of_several_tokens_are_steered_as_if_generated(
    model: VisionLanguageModel, sae: SAE[Any], active: list[int], conversations: Conversations
) -> None:
    change = {active[0]: Set(30.0)}
    for steps in ("all", "prefill", "decoding"):
        curve = dose_response(
            model,
            sae,
            active[0],
            conversations[0],
            "red circle no",
            strengths=[30.0],
            unit=1.0,
            steps=steps,  # type: ignore[arg-type]
        )
        words = model.tokenizer("red circle no", add_special_tokens=False)["input_ids"]
        batch = model.encode([conversations[0]], add_generation_prompt=True)
        steered = steer(model, sae, change, steps=steps)  # type: ignore[arg-type]
        chance = 1.0

        def force(
            _: int, ids: Tensor, length: int = batch["input_ids"].shape[1], words: list[int] = words
        ) -> list[int]:
            return [words[len(ids) - length]]

        output = steered.generate(
            **batch,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=force,
        )
        for logits, word in zip(output.logits, words, strict=True):
            chance *= float(logits[0].double().softmax(-1)[word])
        assert curve.points[0].target == pytest.approx(chance, rel=1e-3)


def test_nothing_changes_at_no_strength(
    model: VisionLanguageModel, sae: SAE[Any], conversations: Conversations
) -> None:
    curve = dose_response(
        model, sae, 3, conversations, "no", strengths=[0.0], kind="add", unit=1.0, guard=conversations[:1], tokens="all"
    )
    (point,) = curve.points
    assert point.target == curve.baseline
    assert (point.others_kl, point.guard_kl, point.guard_changed) == (0, 0, 0)
    assert point.answers == curve.baseline_answers
    assert len(STRENGTHS) == 16


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("hook", [HOOK, "blocks.1.hook_attn_out"])
def test_what_is_run_once_gives_what_is_run_for_every_strength(
    model: VisionLanguageModel,
    conversations: Conversations,
    monkeypatch: pytest.MonkeyPatch,
    hook: str,
    tokens: Any,
) -> None:
    source = build_sae(metadata={"hook_name": hook, "model_name": model.name})
    asked = {"strengths": [0.0, 1.0, 3.0], "unit": 4.0, "kind": "add", "tokens": tokens}
    blocks: list[int] = []
    handles = [
        model._module.get_submodule(f"model.language_model.layers.{layer}").register_forward_hook(
            lambda _m, _a, output, layer=layer: blocks.append(layer) if len(output) == 4 else None
        )
        for layer in range(2)
    ]
    for target in ("no", "red circle no"):
        once = dose_response(model, source, 3, conversations[0], target, **asked)  # type: ignore[arg-type]
        from_hook = list(blocks)
        monkeypatch.setattr(DoseRunner, "_from_the_hook", lambda *_: None)
        whole = dose_response(model, source, 3, conversations[0], target, **asked)  # type: ignore[arg-type]
        monkeypatch.undo()
        assert 0 not in from_hook and 0 in blocks[len(from_hook) :]
        blocks.clear()
        assert once.baseline == pytest.approx(whole.baseline, rel=1e-3)
        for one, other in zip(once.points, whole.points, strict=True):
            assert one.target == pytest.approx(other.target, rel=1e-3)
            assert one.others_kl == pytest.approx(other.others_kl, rel=1e-2, abs=1e-6)
    for handle in handles:
        handle.remove()


def test_blocks_that_give_other_logits_by_themselves_are_not_trusted(
    model: VisionLanguageModel, conversations: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = SteeringVector(torch.randn(48, generator=torch.Generator().manual_seed(1)), HOOK, "a direction")
    asked = {"strengths": [1.0, 2.0, 3.0], "kind": "add", "batch_size": 1}
    whole = dose_response(model, vector, 0, conversations[0], "no", **asked)  # type: ignore[arg-type]
    go_on = BlockRunner.go_on
    monkeypatch.setattr(BlockRunner, "go_on", lambda *given, **more: go_on(*given, **more) * 1.5)
    again = dose_response(model, vector, 0, conversations[0], "no", **asked)  # type: ignore[arg-type]
    assert [point.target for point in again.points] == pytest.approx([point.target for point in whole.points], rel=1e-3)
    assert again.baseline == pytest.approx(whole.baseline, rel=1e-4)


def test_an_activation_set_to_nothing_is_called_ablated(
    model: VisionLanguageModel, sae: SAE[Any], active: list[int], conversations: Conversations
) -> None:
    curve = dose_response(model, sae, active[0], conversations[0], "no", strengths=[0.0, 1.0])
    no = model.tokenizer.convert_tokens_to_ids("no")
    ablated = probabilities(steer(model, sae, {active[0]: Ablate()}), conversations[0])
    assert curve.points[0].target == pytest.approx(float(ablated[no]), rel=1e-3)
    assert [curve.spelt(point) for point in curve.points] == ["ablated", "1"]


def test_strengths_in_several_passes_are_those_in_one(
    model: VisionLanguageModel, sae: SAE[Any], active: list[int], conversations: Conversations
) -> None:
    asked = {"strengths": [0.5, 1.0, 2.0, 4.0], "guard": conversations[1:2]}
    whole = dose_response(model, sae, active[0], conversations[:1], "no", **asked)  # type: ignore[arg-type]
    parts = dose_response(model, sae, active[0], conversations[:1], "no", batch_size=2, **asked)  # type: ignore[arg-type]
    assert parts.baseline == pytest.approx(whole.baseline, rel=1e-4)
    for one, other in zip(parts.points, whole.points, strict=True):
        assert one.target == pytest.approx(other.target, rel=1e-4)
        assert one.guard_kl == pytest.approx(other.guard_kl, rel=1e-2, abs=1e-6)


def test_units_are_the_features_own(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, active: list[int], conversations: Conversations
) -> None:
    encoded = sae.encode(read_activations(model, batch, HOOK)[HOOK][batch.layout.is_image])[:, active[0]].detach()
    expected = float(torch.quantile(encoded[encoded > 0], 0.99))
    unit = activation_unit(model, sae, active[0], conversations)
    assert unit == pytest.approx(expected, rel=1e-4)

    class Store:
        def scale(self, feature: int, modality: str | None = None) -> float:
            return {(active[0], "image"): 2.5}.get((feature, modality or ""), 0.0)

        def check_sae(self, sae: SAE[Any]) -> None:
            checked.append(sae)

    checked: list[SAE[Any]] = []

    curve = dose_response(model, sae, active[0], conversations[0], "no", strengths=[2.0], unit=Store())
    assert (curve.unit, curve.points[0].value) == (2.5, 5.0)
    assert checked == [sae]
    # without a store the unit is measured on the prompts and guards
    own = dose_response(model, sae, active[0], conversations[0], "no", strengths=[1.0], guard=conversations[1:])
    assert own.unit == pytest.approx(expected, rel=1e-4)
    vector = SteeringVector(torch.randn(48), HOOK, "a direction")
    with pytest.raises(ConfigError, match="a vector is no feature of it"):
        dose_response(model, vector, 0, conversations[0], "no", unit=Store())
    with pytest.raises(ConfigError, match="unit of 0 for feature 3 on text tokens"):
        dose_response(model, sae, 3, conversations[0], "no", unit=Store(), modality="text")


def test_vectors_have_curves_too(model: VisionLanguageModel, conversations: Conversations) -> None:
    vector = SteeringVector(torch.randn(48, generator=torch.Generator().manual_seed(1)), HOOK, "a direction")
    curve = dose_response(model, vector, 0, conversations[0], "no", strengths=[2.0], kind="add")
    no = model.tokenizer.convert_tokens_to_ids("no")
    steered = steer(model, vector, Add(2.0))
    assert curve.points[0].target == pytest.approx(float(probabilities(steered, conversations[0])[no]), rel=1e-3)
    assert curve.name == "a direction"


def test_the_best_point_has_little_side_effect() -> None:
    def point(strength: float, target: float, guard: float | None, others: float = 0.0) -> DosePoint:
        return DosePoint(
            strength=strength,
            value=strength,
            target=target,
            others_kl=others,
            guard_kl=guard,
            guard_changed=None,
            answers=("a",),
        )

    curve = DoseCurve(points=(point(1, 0.5, 0.01), point(2, 0.7, 0.09), point(3, 0.9, 0.5)), baseline=0.1)
    assert curve.best() == curve.points[1]
    assert curve.best(max_side_effect=1) == curve.points[2]
    assert curve.best(max_side_effect=0.001) is None
    assert replace(curve, baseline=0.8).best() is None  # all that is mild makes the target less likely
    alone = DoseCurve(points=(point(1, 0.5, None, 0.3), point(2, 0.4, None, 0.05)), baseline=0.1)
    assert alone.best() == alone.points[1]
    assert DoseCurve.from_dict(curve.to_dict()) == curve
    with pytest.raises(ConfigError, match="no dose curve"):
        DoseCurve.from_dict({"points": [{}]})


def test_divergence_by_hand() -> None:
    before, after = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(kl_divergence(before, after)) == pytest.approx(expected)
    masked = torch.tensor([0.0, -math.inf])
    assert float(kl_divergence(masked, masked)) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"feature": 96}, FeatureError, "feature 96"),
        ({"strengths": []}, ConfigError, "no strengths"),
        ({"strengths": [1.0, math.nan]}, ConfigError, "strength nan"),
        ({"kind": "clamp"}, ConfigError, "'clamp'"),
        ({"target": "zebra"}, ConfigError, "zebra"),
        ({"prompts": []}, ConfigError, "no prompts"),
        ({"unit": -1.0}, ConfigError, "unit of -1"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"steps": "decoding"}, ConfigError, "one token, which the prompt predicts"),
        ({"tokens": BoxTokens((0, 0, 9999, 9))}, SelectionError, "outside of image 0"),
    ],
)
def test_bad_input(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    model: VisionLanguageModel,
    sae: SAE[Any],
    conversations: Conversations,
) -> None:
    given: dict[str, Any] = {"feature": 3, "prompts": conversations[0], "target": "no", "unit": 1.0, **options}
    with pytest.raises(error, match=message):
        dose_response(model, sae, given.pop("feature"), given.pop("prompts"), given.pop("target"), **given)

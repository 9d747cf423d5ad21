"""Attribution against plain autograd with a hand-written forward hook, and against ablation by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError, SelectionError, UnknownHookError
from sae_lens_multimodal.hooks.attribute import attribute
from sae_lens_multimodal.hooks.attribution_check import ablate_nodes, check_attribution, spearman
from sae_lens_multimodal.hooks.attribution_result import Attribution
from sae_lens_multimodal.hooks.changes import Ablate
from sae_lens_multimodal.hooks.metrics import ContinuationLogProbability, LogitDifference
from sae_lens_multimodal.hooks.steer import steer
from tests.hooks.hook_samples import HOOK, MODULE, build_sae

METRIC = LogitDifference("red", "blue")


def by_hand(
    model: VisionLanguageModel,
    batch: EncodedBatch,
    change: Callable[[Tensor], Tensor] = lambda value: value,
    words: tuple[str, str] = ("red", "blue"),
) -> tuple[Tensor, Tensor, Tensor]:
    """The metric, the hook's value and its gradient by plain PyTorch."""
    kept: list[Tensor] = []

    def hook(_: object, __: object, output: Tensor) -> Tensor:
        kept.append(change(output.detach()).requires_grad_())
        return kept[0]

    handle = model._module.get_submodule(MODULE).register_forward_hook(hook)
    try:
        logits = model._module(**batch).logits
    finally:
        handle.remove()
    wanted, unwanted = (model.tokenizer.convert_tokens_to_ids(word) for word in words)
    values = logits[:, -1, wanted] - logits[:, -1, unwanted]
    (gradient,) = torch.autograd.grad(values.sum(), kept[0])
    return values.detach(), kept[0].detach(), gradient


def dense(found: Attribution, d_sae: int) -> Tensor:
    effects = torch.zeros(*found.chosen.shape, d_sae)
    effects[found.row, found.token, found.feature] = found.effect
    return effects


@pytest.fixture(scope="module")
def found(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> Attribution:
    return attribute(model, sae, batch, METRIC)


def test_effects_are_those_of_autograd_with_a_plain_hook(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, found: Attribution
) -> None:
    values, acts, gradient = by_hand(model, batch)
    torch.testing.assert_close(found.values, values)
    with torch.no_grad():
        z = sae.encode(acts)
        expected = -z * (gradient @ sae.W_dec.T)
        attended = batch["attention_mask"] != 0
        expected[~attended] = 0
        error = -((acts - sae.decode(z)) * gradient).sum(-1) * attended
        bias = -(gradient @ sae.b_dec) * attended
    torch.testing.assert_close(dense(found, sae.cfg.d_sae), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.error_effect, error, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.bias_effect, bias, atol=1e-6, rtol=1e-4)
    assert float(expected.abs().max()) > 1e-4
    assert found.n_nodes == int((z[attended] != 0).sum())
    assert all(parameter.grad is None for parameter in model._module.parameters())


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("topk", {}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("standard", {"normalize_activations": "constant_norm_rescale"}),
        ("jumprelu", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
    ],
)
def test_features_error_and_bias_add_up_to_the_linear_effect_of_the_value(
    architecture: str, config: dict[str, Any], model: VisionLanguageModel, batch: EncodedBatch
) -> None:
    sae = build_sae(architecture, metadata={"hook_name": HOOK}, **config)
    found = attribute(model, sae, batch, METRIC, completeness=False)
    _, acts, gradient = by_hand(model, batch)
    expected = -(acts * gradient).sum(-1) * (batch["attention_mask"] != 0)
    torch.testing.assert_close(found.by_token(part="all"), expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        z = sae.encode(acts)
        # Ablation takes away what decoding loses when the feature is 0, whatever the SAE does to its input.
        node = found.top(1)[0]
        without = z.clone()
        without[node.node.row, node.node.token, node.node.feature] = 0
        lost = sae.decode(z)
        sae.encode(acts)  # SAE-Lens forgets an input's norms once it has decoded
        lost = lost - sae.decode(without)
    assert node.effect == pytest.approx(-float((lost * gradient).sum()), rel=1e-3)


def test_ablation_of_nodes_is_that_of_steer_and_of_a_plain_hook(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, found: Attribution
) -> None:
    nodes = [one for row in range(batch.n_rows) for one in found.top(2, row=row)]
    true, _ = ablate_nodes(model, sae, found, nodes, copies=4)
    before = by_hand(model, batch)[0]
    for one, effect in zip(nodes, true, strict=True):
        row, token, feature = one.node

        def ablated(value: Tensor, at: tuple[int, int] = (row, token), feature: int = feature) -> Tensor:
            with torch.no_grad():
                z = sae.encode(value)
                value = value.clone()
                value[at] -= z[(*at, feature)] * sae.W_dec[feature]
            return value

        after = by_hand(model, batch, ablated)[0]
        assert float(effect) == pytest.approx(float(after[row] - before[row]), abs=1e-6)
        mask = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        mask[row, token] = True
        steered = steer(model, sae, {feature: Ablate()}, tokens=mask, steps="prefill")
        with torch.no_grad(), steered.trace(**batch):
            logits = steered.output.logits.save()
        again = METRIC.values(model, logits, batch)[row]
        assert float(effect) == pytest.approx(float(again - before[row]), abs=1e-6)


def test_completeness_is_the_true_change(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, found: Attribution
) -> None:
    attended = (batch["attention_mask"] != 0)[..., None]

    def without_features(value: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.where(attended, value - sae.encode(value) @ sae.W_dec, value)

    before = by_hand(model, batch)[0]
    after = by_hand(model, batch, without_features)[0]
    gone = by_hand(model, batch, lambda value: torch.where(attended, 0.0, value))[0]
    assert found.completeness is not None
    zero = attribute(model, sae, batch, METRIC, baseline="zero")
    assert zero.completeness is not None
    for row in range(batch.n_rows):
        one, other = found.completeness[row], zero.completeness[row]
        assert one.true_change == pytest.approx(float(after[row] - before[row]), abs=1e-5)
        assert one.linear_change == pytest.approx(float(found.effect[found.row == row].sum()), abs=1e-5)
        assert one.gap == pytest.approx(one.true_change - one.linear_change)
        assert other.true_change == pytest.approx(float(gone[row] - before[row]), abs=1e-5)
        assert other.linear_change == pytest.approx(float(zero.by_token(part="all")[row].sum()), abs=1e-5)


def test_integrated_gradients_close_the_gap(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    plain = attribute(model, sae, batch, METRIC)
    along = attribute(model, sae, batch, METRIC, method="integrated_gradients", n_steps=16)
    assert plain.completeness is not None
    assert along.completeness is not None
    gaps = [sum(abs(one.gap) for one in found.completeness or []) for found in (plain, along)]
    change = sum(abs(one.true_change) for one in along.completeness)
    assert gaps[1] < 0.1 * gaps[0]
    assert gaps[1] < 0.02 * change


def test_integrated_gradients_with_one_step_are_the_gradient_half_way(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch
) -> None:
    found = attribute(model, sae, batch, METRIC, method="integrated_gradients", n_steps=1, completeness=False)
    _, acts, _ = by_hand(model, batch)
    attended = (batch["attention_mask"] != 0)[..., None]
    with torch.no_grad():
        z = sae.encode(acts)
    _, _, gradient = by_hand(model, batch, lambda value: torch.where(attended, value - 0.5 * (z @ sae.W_dec), value))
    expected = -z * (gradient @ sae.W_dec.T) * attended
    torch.testing.assert_close(dense(found, sae.cfg.d_sae), expected.detach(), atol=1e-6, rtol=1e-3)


def test_chosen_tokens(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, found: Attribution) -> None:
    some = attribute(model, sae, batch, METRIC, tokens="image")
    at = batch.layout.is_image
    assert torch.equal(some.chosen, at)
    assert torch.equal(dense(some, sae.cfg.d_sae)[at], dense(found, sae.cfg.d_sae)[at])
    assert not some.by_token(part="all")[~at].any()
    last = attribute(model, sae, batch, METRIC, tokens=[-1], completeness=False)
    assert set(last.token.tolist()) == {batch.layout.n_tokens - 1}


def test_sums(found: Attribution, sae: SAE[Any], batch: EncodedBatch) -> None:
    effects = dense(found, sae.cfg.d_sae)
    torch.testing.assert_close(found.by_token(), effects.sum(-1))
    features = found.by_feature(row=0)
    best = features[0]
    assert best.effect == pytest.approx(float(effects[0, :, best.feature].sum()), abs=1e-6)
    assert best.absolute == pytest.approx(float(effects[0, :, best.feature].abs().sum()), abs=1e-6)
    assert [abs(one.effect) for one in features] == sorted((abs(one.effect) for one in features), reverse=True)
    image = batch.layout.is_image[0].nonzero()[:, 0]
    shown = found.by_feature(row=0, positions=image)
    assert sum(one.effect for one in shown) == pytest.approx(float(effects[0, image].sum()), abs=1e-5)
    assert found.by_modality()["image"] == pytest.approx(float(effects[batch.layout.is_image].sum()), abs=1e-5)
    heat = found.heatmap(row=0, feature=best.feature)
    assert heat.shape == (40, 90)
    expected = batch.layout.heatmap(effects[0, :, best.feature], row=0)
    assert abs(heat - expected).max() < 1e-6
    top = found.top(3)
    assert abs(top[0].effect) == pytest.approx(float(effects.abs().max()))
    assert effects[tuple(top[2].node)] == pytest.approx(top[2].effect)


def test_it_can_be_written_as_json(found: Attribution) -> None:
    content = json.loads(json.dumps(found.to_dict(n_nodes=5)))
    assert len(content["nodes"]) == 5
    assert content["metric"] == "logit of 'red' minus logit of 'blue'"
    assert len(content["completeness"]) == found.layout.n_rows


def test_a_steered_model_is_attributed_as_it_is_steered(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, active: list[int], found: Attribution
) -> None:
    steered = steer(model, sae, {active[0]: Ablate()})
    after = attribute(steered, sae, batch, METRIC, completeness=False)
    with torch.no_grad(), steered.trace(**batch):
        logits = steered.output.logits.save()
    torch.testing.assert_close(after.values, METRIC.values(model, logits, batch))
    assert not torch.equal(after.values, found.values)


def test_continuations_and_strings_of_several_tokens(
    model: VisionLanguageModel, sae: SAE[Any], conversations: list[Any], batch: EncodedBatch
) -> None:
    text = "a red circle"
    found = attribute(model, sae, batch, ContinuationLogProbability(text), completeness=False)
    answered = [[*one, {"role": "assistant", "content": text}] for one in conversations]
    whole = model.encode(answered)
    n = len(text.split())
    with torch.no_grad():
        logits = model._module(**{name: tensor for name, tensor in whole.items()}).logits
    ids = torch.tensor(model.tokenizer.convert_tokens_to_ids(text.split()))
    # The template closes the answer with a control token, which is not part of the text.
    start = whole["input_ids"].shape[1] - n - 1
    assert whole["input_ids"][0, start : start + n].tolist() == ids.tolist()
    expected = logits[:, start - 1 : start + n - 1].log_softmax(-1).gather(-1, ids.expand(3, -1)[..., None])
    torch.testing.assert_close(found.values, expected[..., 0].sum(-1), atol=1e-5, rtol=1e-5)
    assert found.layout.n_tokens == batch.layout.n_tokens + n - 1

    pair = attribute(model, sae, batch, LogitDifference("a red circle", "a blue circle"), completeness=False)
    red, blue = model.tokenizer.convert_tokens_to_ids(["red", "blue"])
    at = start + 1  # the strings differ after their first word
    torch.testing.assert_close(pair.values, logits[:, at - 1, red] - logits[:, at - 1, blue], atol=1e-5, rtol=1e-5)


def test_any_function_is_a_metric(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    def entropy(logits: Tensor, _: EncodedBatch) -> Tensor:
        log = logits[:, -1].log_softmax(-1)
        return -(log.exp() * log).sum(-1)

    found = attribute(model, sae, batch, entropy, completeness=False)
    assert found.metric.name == "entropy"
    with torch.no_grad():
        torch.testing.assert_close(found.values, entropy(model._module(**batch).logits, batch))
    with pytest.raises(ConfigError, match="one number for each row"):
        attribute(model, sae, batch, lambda logits, _: logits.sum())


def test_bad_input(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    with pytest.raises(SelectionError, match="select nothing"):
        attribute(model, sae, batch, METRIC, tokens=lambda layout: torch.zeros_like(layout.is_image))
    with pytest.raises(ConfigError, match="2 tokens"):
        attribute(model, sae, batch, LogitDifference(["red circle"], "blue"))
    with pytest.raises(ConfigError, match="knows not every word"):
        attribute(model, sae, batch, LogitDifference("rouge", "blue"))
    with pytest.raises(ConfigError, match="begins with the other"):
        attribute(model, sae, batch, LogitDifference("red", "red circle"))
    with pytest.raises(ConfigError, match="expected at least one token"):
        attribute(model, sae, batch, LogitDifference(["red", "blue"], ["blue"]))
    with pytest.raises(ConfigError, match="no tokens"):
        attribute(model, sae, batch, ContinuationLogProbability(""))
    with pytest.raises(ConfigError, match="expected 0 to"):
        attribute(model, sae, batch, LogitDifference(10**6, 0))
    with pytest.raises(ConfigError, match="n_steps=0"):
        attribute(model, sae, batch, METRIC, method="integrated_gradients", n_steps=0)
    with pytest.raises(ConfigError, match="method='magic'"):
        attribute(model, sae, batch, METRIC, method="magic")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a finite number"):
        attribute(model, sae, batch, lambda logits, _: logits[:, -1, 0] * float("nan"))
    with pytest.raises(ConfigError, match="the metric"):
        attribute(model, sae, batch, "red")  # type: ignore[arg-type]
    with pytest.raises(UnknownHookError):
        attribute(model, sae, batch, METRIC, hook_name="blocks.99.hook_resid_post")
    with pytest.raises(SAEMismatchError, match="d_in=7"):
        attribute(model, build_sae(d_in=7, metadata={"hook_name": HOOK}), batch, METRIC)
    with pytest.raises(SelectionError, match="sees pictures"):
        point = next(one for one in model.hooks.points() if one.tower == "vision" and one.d is not None)
        wide = build_sae(d_in=point.d or 0, metadata={"hook_name": point.name})
        attribute(model, wide, batch, METRIC)
    found = attribute(model, sae, batch, METRIC, completeness=False)
    for wrong in (lambda: found.top(0), lambda: found.by_token(part="none")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(SelectionError, match="row 9"):
        found.by_feature(row=9)
    with pytest.raises(SelectionError, match="positions"):
        found.by_feature(positions=[10**6])
    with pytest.raises(SelectionError, match="picture 0"):
        found.heatmap(row=1)


def test_check_correlates_what_it_says(model: VisionLanguageModel, sae: SAE[Any], found: Attribution) -> None:
    stats = pytest.importorskip("scipy.stats")
    check = check_attribution(model, sae, found, n=12, copies=5)
    again, _ = ablate_nodes(model, sae, found, check.nodes, copies=2)
    assert torch.tensor(check.true_effects) == pytest.approx(again, abs=1e-6)
    expected = stats.spearmanr([one.effect for one in check.nodes], check.true_effects).statistic
    assert check.spearman == pytest.approx(expected)
    sizes = stats.spearmanr([abs(one.effect) for one in check.nodes], [abs(one) for one in check.true_effects])
    assert check.magnitude_spearman == pytest.approx(sizes.statistic)
    same = [one.effect * true > 0 for one, true in zip(check.nodes, check.true_effects, strict=True)]
    assert check.sign_agreement == pytest.approx(sum(same) / len(same))
    assert len(json.loads(json.dumps(check.to_dict()))["nodes"]) == 12
    values = torch.randint(0, 5, (2, 30), generator=torch.Generator().manual_seed(0)).tolist()
    assert spearman(*values) == pytest.approx(stats.spearmanr(*values).statistic)
    assert spearman([1.0], [2.0]) != spearman([1.0], [2.0])  # NaN: there is no rank correlation of one value
    with pytest.raises(ConfigError):
        check_attribution(model, sae, found, copies=0)

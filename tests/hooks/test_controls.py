"""The search for controls finds what was planted, and measures it on prompts that it never saw."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, FeatureError, SelectionError
from sae_lens_multimodal.hooks import control_search
from sae_lens_multimodal.hooks.attribute import attribute
from sae_lens_multimodal.hooks.changes import Ablate, Set
from sae_lens_multimodal.hooks.control_activity import measure_activity
from sae_lens_multimodal.hooks.control_baselines import mean_value, random_controls
from sae_lens_multimodal.hooks.control_candidates import foresee
from sae_lens_multimodal.hooks.control_questions import Example, Questions
from sae_lens_multimodal.hooks.control_records import Control, ControlSet, Rate
from sae_lens_multimodal.hooks.controls import SearchSettings, find_controls
from sae_lens_multimodal.hooks.metrics import LogitDifference
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.steer import steer
from tests.hooks.hook_samples import HOOK, build_sae

PLANTED = 5
WORDS = ["what", "is", "this", "a", "red", "circle", "and", "blue", "square"]
SETTINGS = SearchSettings(n_candidates=4, strengths=(3.0,), n_kept=3, max_features=2, max_new_tokens=2, n_random=2)


def asked(*words: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": " ".join(words)}]}]


@pytest.fixture(scope="module")
def prompts() -> list[Any]:
    rng = np.random.default_rng(0)
    return [asked(*rng.choice(WORDS, size=4)) for _ in range(12)]


@pytest.fixture(scope="module")
def last_hook(model: VisionLanguageModel) -> str:
    return f"blocks.{model.n_layers - 1}.hook_resid_post"


@pytest.fixture(scope="module")
def planted(model: VisionLanguageModel, last_hook: str) -> SAE[Any]:
    """An SAE of which one feature writes "red": it points along that row of the unembedding."""
    sae = build_sae("standard", metadata={"hook_name": last_hook})
    row = model._module.get_output_embeddings().weight[model.tokenizer.convert_tokens_to_ids("red")]
    with torch.no_grad():
        sae.W_dec[PLANTED] = 500 * row / row.norm()
    return sae


@pytest.fixture(scope="module")
def found(model: VisionLanguageModel, planted: SAE[Any], prompts: list[Any]) -> ControlSet:
    return find_controls(model, planted, prompts[:8], "red", tokens="last", positives=prompts[8:], settings=SETTINGS)


def test_the_planted_feature_is_found_and_works(
    found: ControlSet, model: VisionLanguageModel, planted: SAE[Any], prompts: list[Any]
) -> None:
    assert [one.feature for one in found.controls] == [PLANTED]
    assert found.controls[0].direction == "raise"
    assert found.before.count == 0
    steered = found.steer(model, planted)
    held = [pair.conversation for pair in found.answers]
    answers = steered.answer(held, max_new_tokens=2)
    assert answers == [pair.after for pair in found.answers]
    assert model.answer(held, max_new_tokens=2) == [pair.before for pair in found.answers]
    assert found.held_out.success == Rate(sum(one == "red" for one in answers), len(held))
    # Set at the last token of every pass, the planted feature says it again and again.
    assert all(one.split()[0] == "red" for one in answers)
    assert found.trail[-1].success == 1.0
    assert found.random is not None
    assert found.random.success.count == 0
    assert found.random.success.total == len(held), "draws on the same prompts are no further prompts"
    assert found.random.success.draws == (0.0, 0.0)


def test_held_out_prompts_are_not_searched(
    monkeypatch: pytest.MonkeyPatch, model: VisionLanguageModel, planted: SAE[Any], prompts: list[Any]
) -> None:
    seen: list[Any] = []
    original = control_search.Search.__init__

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        seen.extend(one.conversation for some in (self.examples, self.guards) for one in some.examples)

    monkeypatch.setattr(control_search.Search, "__init__", spy)
    found = find_controls(model, planted, prompts[:6], "red", guard=prompts[6:10], tokens="last", settings=SETTINGS)
    held = [pair.conversation for pair in found.answers]
    assert len(seen) == 5
    assert len(held) == 5
    assert not {id(one) for one in seen} & {id(one) for one in held}
    assert found.mean_difference is None
    assert found.held_out.side_effects.total == 2


def test_where_nothing_is_better_the_set_is_empty_and_changes_nothing(
    model: VisionLanguageModel, planted: SAE[Any], prompts: list[Any]
) -> None:
    settings = replace(SETTINGS, min_gain=10.0)
    found = find_controls(model, planted, prompts[:6], "red", guard=prompts[6:10], tokens="last", settings=settings)
    assert found.controls == ()
    assert found.held_out.side_effects.count == 0
    with pytest.raises(ConfigError, match="empty control set"):
        found.steer(model, planted)


def test_a_set_that_does_not_help_on_whole_answers_is_told(
    model: VisionLanguageModel, planted: SAE[Any], prompts: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"tokens": "last", "settings": SETTINGS}
    found = find_controls(model, planted, prompts[:6], "red", match=lambda *_: False, **asked)  # type: ignore[arg-type]
    assert found.controls
    assert "of the held-out examples are answered as wanted" in caplog.text
    caplog.clear()
    find_controls(model, planted, prompts[:6], "red", match=lambda one, _: one.startswith("red"), **asked)  # type: ignore[arg-type]
    assert "held-out examples are answered" not in caplog.text


def test_the_scale_is_the_percentile_and_forecasts_are_attributions(
    model: VisionLanguageModel, sae: SAE[Any], prompts: list[Any]
) -> None:
    questions = Questions(model, [Example(conversation=one, wanted="red") for one in prompts[:5]], batch_size=2)
    activity = measure_activity(model, sae, HOOK, [questions], "all")
    attended = [read_activations(model, batch, HOOK)[HOOK][batch["attention_mask"] != 0] for batch in questions.batches]
    with torch.no_grad():
        z = sae.encode(torch.cat(attended))
    assert torch.equal(activity.count, (z > 0).sum(0))
    for feature in activity.count.argsort(descending=True)[:5].tolist():
        values = z[:, feature][z[:, feature] > 0].sort().values
        assert float(activity.scale[feature]) == pytest.approx(float(values[round(0.99 * (len(values) - 1))]))
    red, blue = (torch.full((5,), model.tokenizer.convert_tokens_to_ids(word)) for word in ("red", "blue"))
    foreseen = foresee(model, sae, HOOK, questions, red, blue, "all", activity.scale)
    ablated = torch.zeros(sae.cfg.d_sae)
    for batch in questions.batches:
        one = attribute(model, sae, batch, LogitDifference("red", "blue"), completeness=False)
        ablated.index_add_(0, one.feature, one.effect)
    torch.testing.assert_close(foreseen.ablated, ablated / 5, atol=1e-6, rtol=1e-4)
    # A small step towards the scale changes the metric as foretold, in proportion.
    feature = int(activity.count.argmax())
    share, total = 1e-2, 0.0
    for batch in questions.batches:
        with torch.no_grad():
            acts = read_activations(model, batch, HOOK)[HOOK].double()
            mask = (batch["attention_mask"] != 0)[..., None]
            own = sae.encode(acts.float())[..., feature, None]
            step = share * (activity.scale[feature] - own) * sae.W_dec[feature] * mask
            with model.trace(**batch):
                model.hooks[HOOK] = (acts + step).float()
                logits = model.output.logits.save()
            after = LogitDifference("red", "blue").values(model, logits, batch)
            logits = model._module(**batch).logits
            total += float((after - LogitDifference("red", "blue").values(model, logits, batch)).sum())
    assert total / 5 / share == pytest.approx(float(foreseen.raised[feature]), rel=0.1, abs=1e-3)


def test_random_features_are_as_active(sae: SAE[Any], model: VisionLanguageModel, prompts: list[Any]) -> None:
    questions = Questions(model, [Example(conversation=one) for one in prompts], batch_size=8)
    activity = measure_activity(model, sae, HOOK, [questions], "all")
    live = (activity.count > 0).nonzero()[:, 0].tolist()
    control = Control(feature=live[0], direction="raise", strength=2.0, scale=1.0)
    drawn = random_controls([control, control], activity, activity.scale, np.random.default_rng(0))
    distances = sorted(abs(int(activity.count[one] - activity.count[live[0]])) for one in live[1:])
    for one in drawn:
        assert one.feature != live[0]
        assert abs(int(activity.count[one.feature] - activity.count[live[0]])) <= distances[10]
        assert one.scale == pytest.approx(float(activity.scale[one.feature]))
        assert one.strength == 2.0
    assert drawn[0].feature != drawn[1].feature


def test_the_mean_counts_every_token(model: VisionLanguageModel, prompts: list[Any]) -> None:
    questions = Questions(model, [Example(conversation=one) for one in prompts[:5]], batch_size=2)
    alone = [read_activations(model, model.encode([one]), HOOK)[HOOK][0, -1] for one in prompts[:5]]
    mean = mean_value(model, HOOK, questions, "last")
    assert mean is not None
    torch.testing.assert_close(mean, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-4)
    assert mean_value(model, HOOK, questions, "image") is None


def test_changes_and_json(found: ControlSet) -> None:
    control = found.controls[0]
    assert found.changes(0.5) == {PLANTED: Set(0.5 * control.strength * control.scale)}
    assert Control(feature=1, direction="ablate", strength=0.0, scale=3.0).change(2.0) == Ablate()
    content = json.loads(json.dumps(found.to_dict()))
    assert content["held_out"]["success"]["share"] == found.held_out.success.share
    assert content["held_out"]["side_effects"]["share"] is None
    assert [one["feature"] for one in content["controls"]] == [PLANTED]
    assert content["answers"][0]["wanted"] == "red"
    assert content["pictures_shared"] is False
    assert (content["n_positives"], content["n_positives_left_out"]) == (4, 0)
    assert len(content["curve"]) == 6


def test_wilson_intervals() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    for count, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        rate = Rate(count, total)
        assert rate.low == pytest.approx(low, abs=5e-5)
        assert rate.high == pytest.approx(high, abs=5e-5)
    assert math.isnan(Rate(0, 0).share)
    assert str(Rate(8, 10)) == "80% [49, 94] of 10"


def test_intervals_count_pictures_and_not_questions() -> None:
    alone = Rate.of([True, False, True, True], [4, 5, 6, 7])
    assert alone == Rate(3, 4)
    assert alone.effective == 4
    # Two questions about each picture, answered alike, say no more than one question each.
    twice = Rate.of([True, False, True, True] * 2, [4, 5, 6, 7] * 2)
    assert (twice.count, twice.total, twice.effective) == (6, 8, 4)
    assert (twice.low, twice.high) == (alone.low, alone.high)
    # Kish: groups of 3 and 1 count as 4**2 / (3**2 + 1**2).
    assert Rate.of([True] * 4, [0, 0, 0, 1]).effective == 1.6
    assert str(twice) == "75% [30, 95] of 8 in 4 groups"
    assert twice.to_dict()["n_groups"] == 4
    draws = Rate.mean([Rate(0, 4), Rate(1, 4), Rate(2, 4)])
    assert (draws.share, draws.draws) == (0.25, (0.0, 0.25, 0.5))
    assert (draws.low, draws.high) == (Rate(1, 4).low, Rate(1, 4).high)
    assert str(draws) == "25% [5, 70] of 4, 3 draws from 0 to 50%"


def test_bad_input(model: VisionLanguageModel, planted: SAE[Any], prompts: list[Any]) -> None:
    with pytest.raises(SelectionError, match="at least 2"):
        find_controls(model, planted, prompts[:1], "red")
    with pytest.raises(ConfigError, match="3 wanted answers for 4 examples"):
        find_controls(model, planted, prompts[:4], ["red"] * 3)
    with pytest.raises(ConfigError, match="begin with the same token"):
        find_controls(model, planted, prompts[:4], "red circle", "red square")
    with pytest.raises(ConfigError, match="knows not every word"):
        find_controls(model, planted, prompts[:4], "rouge")
    with pytest.raises(FeatureError, match="9999"):
        find_controls(model, planted, prompts[:4], "red", scales={9999: 1.0})
    for wrong in ({"n_kept": 0}, {"gradient_batch_size": 0}, {"held_out": 1.0}, {"strengths": (float("nan"),)}):
        with pytest.raises(ConfigError):
            find_controls(model, planted, prompts[:4], "red", settings=SearchSettings(**wrong))
    with pytest.raises(SelectionError):
        find_controls(model, planted, prompts[:4], "red", tokens="image")


def test_a_set_is_a_steer(found: ControlSet, model: VisionLanguageModel, planted: SAE[Any], prompts: list[Any]) -> None:
    one = found.steer(model, planted).answer(prompts[:2], max_new_tokens=2)
    other = steer(model, planted, found.changes(), tokens="last").answer(prompts[:2], max_new_tokens=2)
    assert one == other

"""What the search prefers: wanted answers, unchanged guards, the better strength; and what it is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks import controls
from sae_lens_multimodal.hooks.control_baselines import best_vector
from sae_lens_multimodal.hooks.control_questions import Example, Questions
from sae_lens_multimodal.hooks.control_records import Control, Rate, Trial
from sae_lens_multimodal.hooks.control_search import Place, Search
from sae_lens_multimodal.hooks.controls import SearchSettings, find_controls
from sae_lens_multimodal.hooks.read import read_activations
from tests.hooks.hook_samples import build_sae

GENTLE, LOUD = 5, 6
WORDS = ["what", "is", "this", "a", "red", "circle", "and", "blue", "square"]
SETTINGS = SearchSettings(n_candidates=4, strengths=(1.0,), n_kept=3, max_features=2, max_new_tokens=1, n_random=1)

Told = Callable[[dict[int, float]], Sequence[float]]
"""By how much each prompt's first answer is ahead, given the strength of each feature."""


class ToldPlace:
    """Steers nothing: the changes themselves are the model."""

    def steered(self, model: object, changed: Sequence[Control]) -> dict[int, float]:
        del model
        return {one.feature: one.strength for one in changed}


class ToldQuestions:
    """Answers as it was told."""

    def __init__(self, told: Told, n: int) -> None:
        self.told, self.n = told, n

    def __len__(self) -> int:
        return self.n

    def logits(self, model: dict[int, float]) -> torch.Tensor:
        ahead = torch.tensor(self.told(model), dtype=torch.float32)
        return torch.stack([ahead, torch.zeros(self.n)], dim=1)


def told_search(examples: Told, guards: Told, *, max_side_effects: float) -> Search:
    """A search over four examples, which are to get answer 0, and four guards, which get it by themselves."""
    asked: Any = ToldQuestions(examples, 4), ToldQuestions(guards, 4)
    place: Any = ToldPlace()
    model: Any = {}
    return Search(
        model, place, *asked, torch.zeros(4, dtype=torch.int64), asked[1].logits({}), max_side_effects=max_side_effects
    )


def chosen(search: Search) -> list[int]:
    proposed = [(Control(feature=one, direction="raise", strength=1.0, scale=1.0), 1.0) for one in (LOUD, GENTLE)]
    found, _ = search.grow(search.screen(proposed, (1.0,)), max_features=1, min_gain=0.01)
    return [one.feature for one in found.controls]


def test_of_two_that_work_the_one_that_leaves_guards_alone_is_chosen() -> None:
    search = told_search(
        lambda on: [9.0] * 4 if LOUD in on else [1.0] * 4 if GENTLE in on else [-1.0] * 4,
        lambda on: [-1.0, -1.0, 1.0, 1.0] if LOUD in on else [1.0] * 4,
        max_side_effects=1.0,
    )
    assert chosen(search) == [GENTLE]


def test_side_effects_beyond_what_is_allowed_outweigh_success() -> None:
    def search(allowed: float) -> Search:
        return told_search(
            lambda on: [1.0] * 4 if LOUD in on else [1.0, 1.0, -1.0, -1.0] if GENTLE in on else [-1.0] * 4,
            lambda on: [-1.0, 1.0, 1.0, 1.0] if LOUD in on else [1.0] * 4,
            max_side_effects=allowed,
        )

    assert chosen(search(0.1)) == [GENTLE]
    assert chosen(search(0.25)) == [LOUD]


def test_tuning_takes_the_better_strength_and_the_curve_begins_there() -> None:
    search = told_search(
        lambda on: [1.0] * 4 if on.get(GENTLE, 0.0) >= 1.5 else [-1.0] * 4,
        lambda on: [-1.0] * 4 if on.get(GENTLE, 0.0) >= 2.0 else [1.0] * 4,
        max_side_effects=0.1,
    )
    control = Control(feature=GENTLE, direction="raise", strength=2.0, scale=1.0)
    tuned, curve = search.tune(search.trial([control]))
    assert tuned.controls == (replace(control, strength=1.5),)
    assert (tuned.success, tuned.side_effects) == (1.0, 0.0)
    by_factor = {round(one.factor, 3): (one.success, one.side_effects) for one in curve}
    assert by_factor == {0.0: (0, 0), 0.667: (0, 0), 1.0: (1, 0), 1.333: (1, 1), 1.667: (1, 1), 2.0: (1, 1)}


def asked(*words: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": " ".join(words)}]}]


@pytest.fixture(scope="module")
def last_hook(model: VisionLanguageModel) -> str:
    return f"blocks.{model.n_layers - 1}.hook_resid_post"


@pytest.fixture(scope="module")
def red(model: VisionLanguageModel) -> torch.Tensor:
    """The direction that says "red"."""
    row = model._module.get_output_embeddings().weight[model.tokenizer.convert_tokens_to_ids("red")]
    return (row / row.norm()).detach()


@pytest.fixture(scope="module")
def by_gap(model: VisionLanguageModel) -> list[list[dict[str, Any]]]:
    """Prompts, those whose answers are nearest to being red first."""
    rng = np.random.default_rng(0)
    words = sorted({tuple(rng.choice(WORDS, size=4).tolist()) for _ in range(60)})
    prompts = [asked(*one) for one in words]
    logits = Questions(model, [Example(conversation=one) for one in prompts], batch_size=30).logits(model)
    gap = logits.amax(-1) - logits[:, model.tokenizer.convert_tokens_to_ids("red")]
    return [prompts[index] for index in gap.argsort().tolist()]


def added(model: VisionLanguageModel, hook: str, step: torch.Tensor, prompts: list[Any]) -> list[str]:
    """Answers with a step added at the last token by a plain PyTorch hook, one word each."""

    def hooked(_module: object, _inputs: object, output: Any) -> Any:
        output[:, -1] += step
        return output

    handle = model._module.get_submodule(model.hooks.resolve(hook).module_path).register_forward_hook(hooked)
    try:
        batch = model.encode(prompts, add_generation_prompt=True)
        with torch.no_grad():
            logits = model._module(**batch).logits[:, -1]
    finally:
        handle.remove()
    return [model.tokenizer.decode(one) for one in logits.argmax(-1).tolist()]


def test_the_planted_feature_that_spares_the_guards_is_found(
    model: VisionLanguageModel, last_hook: str, red: torch.Tensor, by_gap: list[Any]
) -> None:
    examples, guards = by_gap[:8], by_gap[-8:]
    before = added(model, last_hook, 0 * red, guards)
    # as far as it takes for the examples, which is not far enough for the guards
    step = next(
        one for one in np.arange(0.25, 20, 0.25) if set(added(model, last_hook, one * red, examples)) == {"red"}
    )
    assert added(model, last_hook, step * red, guards) == before
    assert set(added(model, last_hook, 500 * red, guards)) == {"red"}
    sae = build_sae("standard", metadata={"hook_name": last_hook})
    with torch.no_grad():
        for feature, length in ((GENTLE, step), (LOUD, 500.0)):
            sae.W_enc[:, feature], sae.b_enc[feature] = 0.0, -1.0
            sae.W_dec[feature] = length * red
    found = find_controls(
        model,
        sae,
        examples,
        "red",
        guard=guards,
        tokens="last",
        scales={GENTLE: 1.0, LOUD: 1.0},
        settings=SETTINGS,
    )
    assert [one.control.feature for one in found.candidates][-1] == LOUD, "it was tried, and is the worst"
    assert [one.feature for one in found.controls] == [GENTLE]
    assert found.held_out.success.share == 1.0
    assert found.held_out.side_effects.share <= 0.25


def test_a_feature_that_must_be_ablated_is_found(
    model: VisionLanguageModel, last_hook: str, red: torch.Tensor, by_gap: list[Any]
) -> None:
    sae = build_sae("standard", metadata={"hook_name": last_hook})
    with torch.no_grad():
        sae.W_enc[:, GENTLE], sae.b_enc[GENTLE] = 0.0, 1.0  # active everywhere, at 1
        sae.W_dec[GENTLE] = -500 * red  # and all that keeps the answer from being red
    found = find_controls(model, sae, by_gap[:8], "red", tokens="last", settings=SETTINGS)
    assert [(one.feature, one.direction) for one in found.controls] == [(GENTLE, "ablate")]
    assert found.before.count == 0
    assert found.held_out.success.share == 1.0
    assert [pair.after for pair in found.answers] == added(
        model, last_hook, 500 * red, [pair.conversation for pair in found.answers]
    )


def test_a_vector_is_tuned_as_features_are(
    model: VisionLanguageModel, last_hook: str, red: torch.Tensor, by_gap: list[Any], sae: SAE[Any]
) -> None:
    examples, guards = (
        Questions(model, [Example(conversation=one, wanted="red") for one in some], batch_size=8)
        for some in (by_gap[:6], by_gap[-6:])
    )
    place = Place(sae=sae, hook_name=last_hook, tokens="last", steps="prefill")
    token = model.tokenizer.convert_tokens_to_ids("red")
    search = Search(model, place, examples, guards, torch.full((6,), token), guards.logits(model), max_side_effects=1.0)
    tried: list[tuple[VisionLanguageModel, Trial]] = []
    judge = search.judge

    def spy(steered: VisionLanguageModel) -> Trial:
        tried.append((steered, judge(steered)))
        return tried[-1][1]

    search.judge = spy  # type: ignore[method-assign, assignment]
    steered, strength, trial = best_vector(search, 50 * red, (0.001, 1.0, 2.0))
    assert len(tried) == 3 + 4, "three strengths, and four by which the best is tuned"
    assert trial.score == max(one.score for _, one in tried)
    assert trial.success == 1.0
    assert strength >= 0.5
    prompts = [one.conversation for one in examples.examples]
    assert steered.answer(prompts, max_new_tokens=1) == added(model, last_hook, strength * 50 * red, prompts)
    assert set(steered.answer(prompts, max_new_tokens=1)) == {"red"}


def test_only_positives_that_are_answered_as_wanted_make_the_mean(
    model: VisionLanguageModel, last_hook: str, by_gap: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = model.answer(by_gap, max_new_tokens=1)
    saying = [one for one, answer in zip(by_gap, answers, strict=True) if answer == "no"]
    silent = [one for one, answer in zip(by_gap, answers, strict=True) if answer != "no"]
    assert len(saying) >= 4
    vectors: list[torch.Tensor] = []

    def spy(search: Search, vector: torch.Tensor, strengths: Sequence[float]) -> Any:
        vectors.append(vector - mean([one.conversation for one in search.examples.examples], sign=-1))
        assert tuple(strengths) == SETTINGS.strengths
        return best_vector(search, vector, strengths)

    def mean(prompts: list[Any], sign: int = 1) -> torch.Tensor:
        rows = [
            read_activations(model, model.encode([one], add_generation_prompt=True), last_hook)[last_hook][0, -1]
            for one in prompts
        ]
        return sign * torch.stack(rows).mean(0)

    monkeypatch.setattr(controls, "best_vector", spy)
    sae = build_sae("standard", metadata={"hook_name": last_hook})

    def found(positives: list[Any]) -> Any:
        return find_controls(model, sae, silent[:6], "no", positives=positives, tokens="last", settings=SETTINGS)

    mixed = found([*saying[:4], *silent[6:10]])
    torch.testing.assert_close(vectors[0], mean(saying[:4]), atol=1e-5, rtol=1e-4)
    assert mixed.mean_difference.what.startswith("difference of means of 4 positives")
    assert mixed.n_positives == 8
    assert mixed.mean_difference.success.total == len(mixed.answers)
    assert found(silent[6:10]).mean_difference is None
    assert len(vectors) == 1


def about(shade: int, *words: str) -> list[dict[str, Any]]:
    """A question about a picture."""
    picture = {"type": "image", "image": Image.new("RGB", (40, 40), (shade, 0, 0))}
    return [{"role": "user", "content": [picture, {"type": "text", "text": " ".join(words)}]}]


def test_what_is_asked_of_one_picture_is_on_one_side_and_counts_once(
    model: VisionLanguageModel, last_hook: str, red: torch.Tensor
) -> None:
    sae = build_sae("standard", metadata={"hook_name": last_hook})
    with torch.no_grad():
        sae.W_enc[:, LOUD], sae.b_enc[LOUD] = 0.0, -1.0
        sae.W_dec[LOUD] = 500 * red
    settings = replace(SETTINGS, max_side_effects=1.0)
    examples = [about(shade, "what", "is", word) for shade in (10, 200) for word in ("this", "blue")]
    positives = [about(shade, "a", "circle") for shade in (10, 200, 90)]

    def found(guard: list[Any]) -> Any:
        return find_controls(
            model,
            sae,
            examples,
            "red",
            guard=guard,
            positives=positives,
            tokens="last",
            scales={LOUD: 1.0},
            settings=settings,
        )

    whole = found([about(30, "is", "this"), about(60, "is", "this")])
    assert (whole.pictures_shared, whole.n_positives, whole.n_positives_left_out) == (False, 2, 1)
    assert whole.n_search_examples == 2
    shades = [pair.pictures[0].getpixel((0, 0)) for pair in whole.answers]
    assert shades[0] == shades[1] != shades[2]
    assert whole.held_out.what == "1 feature"
    assert whole.held_out.success == Rate(2, 2, groups=(2,))
    assert whole.held_out.success.effective == 1
    # two questions about one picture cannot be divided without showing it to the search
    shared = found([about(30, "is", "this"), about(30, "is", "blue")])
    assert shared.pictures_shared
    assert shared.held_out.what == "1 feature, on prompts of which the search saw pictures"
    assert shared.to_dict()["pictures_shared"] is True

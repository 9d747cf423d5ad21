"""Several SAEs, rows steered differently, pictures and boxes, ranges of steps: each equals a hand-written hook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from nnsight.intervention.backends import local
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError, SelectionError
from sae_lens_multimodal.hooks.places import BoxTokens, ImageTokens
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.steer import Ablate, Add, Scale, Set, SteeringVector, steer
from tests.hooks.hook_samples import HOOK, build_sae

Conversations = list[list[dict[str, Any]]]
LATER = "blocks.1.hook_resid_post"
GREEDY = {
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "do_sample": False,
    "output_scores": True,
    "return_dict_in_generate": True,
}


@pytest.fixture(scope="module")
def later() -> SAE[Any]:
    return build_sae("jumprelu", metadata={"hook_name": LATER})


def scores(output: Any) -> Tensor:
    return torch.stack(output.scores)


def n_hooks(model: VisionLanguageModel) -> int:
    modules = list(model._module.modules())
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


@contextmanager
def by_hand(model: VisionLanguageModel, changes: dict[int, Callable[[int, Tensor], Tensor]]) -> Iterator[None]:
    """Plain PyTorch hooks on blocks, each a function of the number of the pass and the block's output."""

    def make(change: Callable[[int, Tensor], Tensor]) -> Callable[..., Tensor]:
        step = -1

        def hook(_: object, __: object, output: Tensor) -> Tensor:
            nonlocal step
            step += 1
            return change(step, output)

        return hook

    with ExitStack() as stack:
        for layer, change in changes.items():
            module = model._module.get_submodule(f"model.language_model.layers.{layer}")
            stack.callback(module.register_forward_hook(make(change)).remove)
        yield


def put(output: Tensor, mask: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    new = output.clone()
    new[mask] = change(output[mask])
    return new


def set_to(sae: SAE[Any], feature: int, value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + (value - sae.encode(x)[:, [feature]]) @ sae.W_dec[[feature]]


def attended(batch: EncodedBatch, step: int, output: Tensor) -> Tensor:
    return batch["attention_mask"] != 0 if not step else torch.ones(output.shape[:2], dtype=torch.bool)


def test_several_saes_at_several_hooks(
    model: VisionLanguageModel, sae: SAE[Any], later: SAE[Any], batch: EncodedBatch
) -> None:
    first = lambda step, out: put(out, attended(batch, step, out), set_to(sae, 3, 6.0))  # noqa: E731
    second = lambda step, out: put(out, attended(batch, step, out), set_to(later, 5, 4.0))  # noqa: E731
    with torch.no_grad(), by_hand(model, {0: first, 1: second}):
        expected = model._module.generate(**batch, **GREEDY)
    in_order = steer(model, [sae, later], [{3: Set(6.0)}, {5: Set(4.0)}])
    # The order of the forward pass counts, not that of the list.
    reversed_ = steer(model, [later, sae], [{5: Set(4.0)}, {3: Set(6.0)}])
    one_by_one = steer(steer(model, sae, {3: Set(6.0)}), later, {5: Set(4.0)})
    for steered in (in_order, reversed_, one_by_one):
        assert torch.equal(scores(steered.generate(**batch, **GREEDY)), scores(expected))
        with steered.generate(**batch, **GREEDY) as tracer:
            traced = tracer.result.save()
        assert torch.equal(scores(traced), scores(expected))


def test_two_saes_at_one_hook_follow_one_another(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch
) -> None:
    other = build_sae("standard", metadata={"hook_name": HOOK})
    both = steer(model, [sae, other], [{3: Add(2.0)}, {7: Ablate()}])
    chained = steer(steer(model, sae, {3: Add(2.0)}), other, {7: Ablate()})
    found, expected = (read_activations(one, batch, HOOK)[HOOK] for one in (both, chained))
    assert torch.equal(found, expected)
    assert torch.equal(scores(both.generate(**batch, **GREEDY)), scores(chained.generate(**batch, **GREEDY)))


def test_rows_are_steered_differently(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    rows: list[dict[int, Any]] = [{3: Set(6.0)}, {}, {5: Scale(3.0), 3: Add(1.0)}]

    def hook(step: int, output: Tensor) -> Tensor:
        mask = attended(batch, step, output)
        z = sae.encode(output[mask])[:, [3, 5]]
        row = mask.nonzero()[:, 0]
        delta = torch.zeros_like(z)
        delta[row == 0, 0] = 6.0 - z[row == 0, 0]
        delta[row == 2, 0] = 1.0
        delta[row == 2, 1] = 2.0 * z[row == 2, 1]
        return put(output, mask, lambda x: x + delta @ sae.W_dec[[3, 5]])

    steered = steer(model, sae, rows)
    with torch.no_grad(), by_hand(model, {0: hook}):
        expected = model._module.generate(**batch, **GREEDY)
    found, plain = steered.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY)
    assert torch.equal(scores(found), scores(expected))
    assert torch.equal(scores(found)[:, 1], scores(plain)[:, 1])
    assert not torch.equal(scores(found)[:, 0], scores(plain)[:, 0])
    # Beams of a prompt share its row's changes.
    beams = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    assert torch.equal(steered.generate(**batch, **beams)[1], model.generate(**batch, **beams)[1])
    dropped = read_activations(steer(model, sae, rows, error="drop"), batch, HOOK)[HOOK]
    alone = read_activations(steer(model, sae, rows[2], error="drop"), batch, HOOK)[HOOK]
    assert torch.allclose(dropped[2], alone[2], atol=1e-5)
    hooks_before = n_hooks(model)  # transformers' own, with which it records hidden states
    with pytest.raises(SelectionError, match=r"changes for 2 rows, but the batch has 3"):
        steer(model, sae, rows[:2]).generate(**batch, **GREEDY)
    assert n_hooks(model) == hooks_before


def test_what_is_for_two_prompts_is_not_spread_over_four(
    model: VisionLanguageModel, sae: SAE[Any], conversations: list[Any]
) -> None:
    four = [conversations[0], conversations[2]] * 2
    batch = model.encode(four)
    mask = model.encode(four[:2]).layout.is_image
    assert mask.shape[1] == batch.layout.n_tokens
    for changes, tokens, says in (
        ([{3: Add(9.0)}, {}], "all", "changes for 2 rows, but the batch has 4 prompts"),
        ({3: Add(9.0)}, mask, r"a mask of torch.bool \(2, "),
        ({3: Add(9.0)}, BoxTokens([(0, 0, 30, 30), None]), "Got 2 boxes for 4 prompts"),
    ):
        steered = steer(model, sae, changes, tokens=tokens)  # type: ignore[arg-type]
        for run in (lambda m: m.generate(**batch, **GREEDY), lambda m: read_activations(m, batch, HOOK)):
            with pytest.raises(SelectionError, match=says):
                run(steered)
    # one box is everyone's
    one = read_activations(steer(model, sae, {3: Add(9.0)}, tokens=BoxTokens((0, 0, 30, 30))), batch, HOOK)[HOOK]
    assert (one != read_activations(model, batch, HOOK)[HOOK]).any(-1).any(-1).all()


def test_one_image_and_a_box(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    before = read_activations(model, batch, HOOK)[HOOK]
    layout = batch.layout

    def touched(tokens: Any) -> Tensor:
        after = read_activations(steer(model, sae, {3: Add(9.0)}, tokens=tokens), batch, HOOK)[HOOK]
        return (before != after).any(-1)

    assert torch.equal(touched(ImageTokens(1)), layout.is_image & (layout.image_index == 1))
    base = layout.is_image & (layout.image_index == 0) & (layout.tile == 0)
    assert torch.equal(touched(ImageTokens(0, view="base")), base)
    box = (10.0, 0.0, 40.0, 30.0)
    expected = torch.zeros_like(layout.is_image)
    for row in (0, 2):
        expected[row, layout.tokens_in(box, row=row, image=0)] = True
    assert expected.any()
    assert torch.equal(touched(BoxTokens(box)), expected)
    expected[2] = False
    assert torch.equal(touched(BoxTokens([box, None, None])), expected)
    # Boxes are about the prompt: generation with and without a cache agrees.
    steered = steer(model, sae, {3: Add(40.0)}, tokens=BoxTokens(box))
    settings = {**GREEDY, "suppress_tokens": [model.family.image_token_id]}
    cached, again = (steered.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert torch.allclose(scores(cached), scores(again), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (BoxTokens((10, 10, 95, 30)), r"box \(10, 10, 95, 30\).*outside of image 0 of row 0.*90 x 40"),
        (BoxTokens((-1, 0, 5, 5)), "outside of image 0"),
        (BoxTokens((0, 0, 20, 20), image=2), "image 2; the prompts have at most 2 pictures"),
        (BoxTokens((0.0, 0.0, 0.01, 0.01)), "No patch has 50%"),
        (BoxTokens([(0, 0, 9, 9), (0, 0, 9, 9)]), "2 boxes for 3 prompts"),
        (ImageTokens(7), "image 7"),
    ],
)
def test_places_outside_of_the_pictures(
    tokens: Any, message: str, model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch
) -> None:
    steered = steer(model, sae, {3: Add(1.0)}, tokens=tokens)
    before = scores(model.generate(**batch, **GREEDY))
    hooks_before = n_hooks(model)
    for run in (lambda: steered.generate(**batch, **GREEDY), lambda: read_activations(steered, batch, HOOK)):
        with pytest.raises(SelectionError, match=message):
            run()
    assert n_hooks(model) == hooks_before
    assert torch.equal(scores(model.generate(**batch, **GREEDY)), before)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_range_of_steps(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, use_cache: bool) -> None:
    settings = {**GREEDY, "suppress_tokens": [model.family.image_token_id]}
    steered = steer(model, sae, {3: Set(200.0)}, steps=range(2, 4))

    def hook(step: int, output: Tensor) -> Tensor:
        mask = torch.ones(output.shape[:2], dtype=torch.bool)
        return put(output, mask, set_to(sae, 3, 200.0)) if step in (2, 3) else output

    with torch.no_grad(), by_hand(model, {0: hook}):
        expected = scores(model._module.generate(**batch, **settings))
    found = scores(steered.generate(**batch, **settings, use_cache=use_cache))
    assert torch.allclose(found, expected, atol=1e-5)
    plain = scores(model.generate(**batch, **settings))
    assert torch.equal(expected[:2], plain[:2])
    assert not torch.allclose(expected[2], plain[2], atol=1e-3)


def test_vectors_are_steered_as_a_feature_would_be(model: VisionLanguageModel, batch: EncodedBatch) -> None:
    direction = torch.randn(48, generator=torch.Generator().manual_seed(5))
    vector = SteeringVector(direction, HOOK)
    before = read_activations(model, batch, HOOK)[HOOK]
    mask = batch.layout.is_image

    def after(change: Any) -> Tensor:
        return read_activations(steer(model, vector, change, tokens="image"), batch, HOOK)[HOOK]

    assert torch.allclose(after(Add(2.0))[mask], before[mask] + 2 * direction, atol=1e-5)
    assert torch.equal(after(Add(2.0))[~mask], before[~mask])
    assert torch.equal(after(Add(0.0)), before)
    ablated = after(Ablate())[mask]
    assert torch.allclose(ablated @ direction, torch.zeros(len(ablated)), atol=1e-4)
    rest = before[mask] - (before[mask] @ direction / direction.dot(direction))[:, None] * direction
    assert torch.allclose(ablated, rest, atol=1e-4)
    assert torch.allclose(after(Set(3.0))[mask] @ direction / direction.dot(direction), torch.tensor(3.0), atol=1e-4)
    rows = after([Add(1.0), Add(0.0), Scale(2.0)])
    assert torch.equal(rows[1], before[1])
    assert torch.allclose(rows[2], after(Scale(2.0))[2], atol=1e-6)


def test_a_scan_with_pictures(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    steered = steer(model, sae, {3: Set(1.0)}, tokens="image")
    shapes: list[tuple[int, ...]] = []
    with steered.scan(**batch):
        shapes.append(tuple(steered.hooks[HOOK].shape))
    assert shapes == [(*batch["input_ids"].shape, 48)]


def test_a_remote_run_carries_the_steering(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nnsight simulates it: the run goes through bytes, and a server has only what is installed, not the tests."""
    installed = {name.split(".")[0] for name in sys.modules} - {"tests", "conftest"}
    monkeypatch.setattr(local, "_SERVER_MODULES", local._SERVER_MODULES | installed)
    # An installed package is not shipped; one that is installed from a checkout would be, and spoil this process's own.
    monkeypatch.setattr("nnsight.ndif._PULLED_ENV", True)
    steered = steer(model, [sae], [{3: Set(8.0)}], tokens=ImageTokens(0))
    expected = read_activations(steered, batch, LATER)[LATER]
    inputs = dict(batch)
    with torch.no_grad(), steered.trace(**inputs, remote="local"):
        found = steered.hooks[LATER].save()
    assert torch.equal(found, expected)


def test_hidden_states_are_those_after_steering(sae: SAE[Any], batch: EncodedBatch) -> None:
    # A model of its own: transformers leaves the hooks behind with which it records hidden states.
    module, processor = random_llava_next()
    steered = steer(load_model(module, processor=processor), sae, {3: Set(8.0)})
    output = steered.generate(**batch, **GREEDY, output_hidden_states=True)
    assert torch.equal(output.hidden_states[0][1], read_activations(steered, batch, HOOK)[HOOK])


def test_hooks_on_what_goes_in(model: VisionLanguageModel, batch: EncodedBatch) -> None:
    name = "blocks.1.attn.hook_z"
    heads = build_sae(reshape_activations="hook_z", metadata={"hook_name": name})
    early = build_sae(metadata={"hook_name": "blocks.1.hook_resid_pre"})
    steered = steer(model, [heads, early], [{3: Add(2.0)}, {5: Set(4.0)}], tokens="last")
    found = steered.generate(**batch, **GREEDY)
    with steered.generate(**batch, **GREEDY) as tracer:
        traced = tracer.result.save()
    assert torch.equal(scores(found), scores(traced))
    assert not torch.equal(scores(found), scores(model.generate(**batch, **GREEDY)))
    middle = steer(model, build_sae(), {3: Set(60.0)}, hook_name="blocks.1.hook_resid_mid")
    assert not torch.equal(scores(middle.generate(**batch, **GREEDY)), scores(model.generate(**batch, **GREEDY)))


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (([], []), {}, ConfigError, "0 SAEs"),
        ((2, [{3: Add(1.0)}]), {}, ConfigError, "2 SAEs and 1 of changes"),
        ((2, {3: Add(1.0)}), {}, ConfigError, "2 SAEs and none"),
        ((2, [{3: Add(1.0)}, {}]), {"hook_name": HOOK}, ConfigError, "list with one name for each"),
        ((1, [3, 4]), {}, ConfigError, "changes of a row"),
        ((1, []), {}, ConfigError, r"expected \{feature: change\}"),
        ((1, {3: Add(1.0)}), {"steps": range(0)}, SelectionError, "range that is not empty"),
        ((1, {3: Add(1.0)}), {"steps": range(-2, 2)}, SelectionError, "starts at 0"),
        ((1, {3: Add(1.0)}), {"steps": range(1, 3), "tokens": ImageTokens()}, SelectionError, "never a picture's"),
        ((1, {3: Add(1.0)}), {"steps": range(1, 3), "tokens": [1]}, SelectionError, "about the prompt"),
        ((1, {3: Add(1.0)}), {"tokens": ImageTokens(-1)}, SelectionError, "image -1"),
        ((1, {3: Add(1.0)}), {"tokens": BoxTokens((5, 5, 5, 9))}, SelectionError, "x0 < x1"),
        ((1, {3: Add(1.0)}), {"tokens": BoxTokens((0, 0, float("nan"), 9))}, SelectionError, "finite"),
        ((1, {3: Add(1.0)}), {"tokens": BoxTokens([(0, 0, 9)])}, SelectionError, "as a box"),  # type: ignore[list-item]
        ((1, {3: Add(1.0)}), {"tokens": BoxTokens([None])}, SelectionError, "no box"),
    ],
)
def test_bad_input(
    given: tuple[Any, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    model: VisionLanguageModel,
    sae: SAE[Any],
) -> None:
    number, changes = given
    chosen: Any = {1: sae, 2: [sae, sae]}.get(number, number) if isinstance(number, int) else number
    with pytest.raises(error, match=message):
        steer(model, chosen, changes, **options)


def test_bad_vectors(model: VisionLanguageModel) -> None:
    with pytest.raises(SAEMismatchError, match=r"has 32 numbers.*width 48"):
        steer(model, SteeringVector(torch.ones(32), HOOK), Add(1.0))
    good = SteeringVector(torch.ones(48), HOOK, "redness")
    with pytest.raises(ConfigError, match="redness; expected Set"):
        steer(model, good, {0: Add(1.0)})
    with pytest.raises(ConfigError, match="reconstructs nothing"):
        steer(model, good, Add(1.0), error="drop")
    with pytest.raises(ConfigError, match="nan"):
        steer(model, good, Add(float("nan")))
    for bad in (torch.zeros(48), torch.full((48,), torch.nan), torch.ones(2, 48)):
        with pytest.raises(ConfigError, match="finite numbers"):
            SteeringVector(bad, HOOK)

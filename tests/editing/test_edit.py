"""Edits against plain PyTorch: the weights, the value at the token, the answer, and what is restored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.editing.compute import compute_edit
from sae_lens_multimodal.editing.edit import Edit, RankOneChange
from sae_lens_multimodal.editing.fine_tune import FineTuneSettings, fine_tune
from sae_lens_multimodal.editing.keys import ordinary_keys
from sae_lens_multimodal.editing.settings import EditSettings
from sae_lens_multimodal.editing.store import TENSORS_NAME, load_edit, save_edit, save_edited
from sae_lens_multimodal.editing.weights import down_projection, fingerprint
from sae_lens_multimodal.errors import ConfigError, EditError, SelectionError, StoreError, UnknownHookError
from sae_lens_multimodal.files import read_json, write_json
from tests.editing.conftest import LONG, TARGET, Chat, ask, random_model

PATH = "model.language_model.layers.{}.mlp.down_proj"


def weight(model: VisionLanguageModel, layer: int = 0) -> Tensor:
    return model._module.get_submodule(PATH.format(layer)).weight


def bits(model: VisionLanguageModel) -> list[str]:
    return [fingerprint(one) for one in model._module.parameters()]


def read_by_hand(model: VisionLanguageModel, layer: int) -> tuple[Tensor, Tensor]:
    """Input and output of the down projection at the last token, by a plain PyTorch hook on a plain forward."""
    batch = model.encode([ask()], add_generation_prompt=True)
    kept: list[tuple[Tensor, Tensor]] = []
    module = model._module.get_submodule(PATH.format(layer))
    handle = module.register_forward_hook(lambda _, given, out: kept.append((given[0][0, -1], out[0, -1])))
    with torch.no_grad():
        model._module(**batch)
    handle.remove()
    return kept[0]


def test_the_update_is_the_published_one_and_reaches_the_value(tiny: VisionLanguageModel, found: Edit) -> None:
    key, before = read_by_hand(tiny, 0)
    change = found.changes[0]
    assert isinstance(change, RankOneChange)
    wanted = before + change.update.left
    with found.on(tiny):
        _, after = read_by_hand(tiny, 0)
        difference = weight(tiny).detach().clone()
    difference -= weight(tiny)
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(difference, change.update.left.outer(key) / (key @ key), rtol=1e-3, atol=1e-4)
    values = torch.linalg.svdvals(difference.double())
    assert values[1] < 1e-5 * values[0]


def test_damping_is_lambda_in_units_of_the_key(tiny: VisionLanguageModel) -> None:
    key, before = read_by_hand(tiny, 0)
    edit = compute_edit(tiny, [ask()], TARGET, constraint=-1, layers=0, settings=EditSettings(max_steps=3, damping=0.5))
    with edit.on(tiny):
        _, after = read_by_hand(tiny, 0)
    left = edit.changes[0].tensors()["left"]
    torch.testing.assert_close(
        after - before, left * (key @ key) / (0.5 * (key @ key) + key @ key), rtol=1e-3, atol=1e-4
    )


def test_the_answer_is_that_of_a_hook_that_writes_the_value(tiny: VisionLanguageModel, found: Edit) -> None:
    batch = tiny.encode([ask()], add_generation_prompt=True)
    place = batch["input_ids"].shape[1] - 1
    change = found.changes[0].tensors()["left"]

    def write(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if output.shape[1] > 1:
            output = output.clone()
            output[0, place] += change
        return output

    handle = tiny._module.get_submodule(PATH.format(0)).register_forward_hook(write)
    with torch.no_grad():
        hooked = tiny._module(**batch).logits[0, -1].log_softmax(-1)
        by_hook = tiny._module.generate(**batch, max_new_tokens=1, do_sample=False)
    handle.remove()
    with found.on(tiny):
        edited = tiny.answer(ask(), max_new_tokens=1)[0]
    new = by_hook[0, batch["input_ids"].shape[1] :]
    assert tiny.tokenizer.decode(new, skip_special_tokens=True).strip() == edited == TARGET
    first = tiny.tokenizer(TARGET, add_special_tokens=False)["input_ids"][0]
    assert found.record["probability"] == pytest.approx(float(hooked[first].exp()), rel=1e-4)
    assert found.record["probability"] > 0.9 > 0.5 > found.record["probability_before"]
    assert tiny.answer(ask(), max_new_tokens=1)[0] != TARGET


def test_the_recorded_probability_is_that_of_plain_forwards(tiny: VisionLanguageModel) -> None:
    # a target of two tokens, and the end
    ids = [*tiny.tokenizer("red circle", add_special_tokens=False)["input_ids"], tiny.tokenizer.eos_token_id]
    found = compute_edit(tiny, [ask()], "red circle", constraint=-1, layers=0, settings=EditSettings(max_steps=20))
    batch = tiny.encode([ask()], add_generation_prompt=True)
    place = batch["input_ids"].shape[1] - 1
    tokens = torch.cat([batch["input_ids"], torch.tensor([ids])], dim=1)
    inputs = {**batch, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    inputs.pop("position_ids", None)  # the row is not padded, so the model counts the same

    def probability(change: Tensor) -> float:
        def write(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, place] += change
            return output

        handle = tiny._module.get_submodule(PATH.format(0)).register_forward_hook(write)
        with torch.no_grad():
            logs = tiny._module(**inputs).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
        handle.remove()
        return float(logs.gather(-1, torch.tensor(ids)[:, None]).sum().exp())

    left = found.changes[0].tensors()["left"]
    assert found.record["probability"] == pytest.approx(probability(left), rel=1e-3)
    assert found.record["probability_before"] == pytest.approx(probability(torch.zeros_like(left)), rel=1e-3, abs=1e-7)


def test_weights_are_restored_bit_for_bit(tiny: VisionLanguageModel, found: Edit) -> None:
    before = bits(tiny)
    with found.on(tiny):
        assert bits(tiny) != before
    assert bits(tiny) == before
    with pytest.raises(RuntimeError, match="on the way"), found.on(tiny):
        raise RuntimeError("on the way")
    assert bits(tiny) == before
    compute_edit(tiny, [ask()], "blue", constraint=-1, layers=[0, 1], settings=EditSettings(max_steps=2))
    fine_tune(tiny, [ask()], "blue", layer=1, settings=FineTuneSettings(max_steps=2))
    assert bits(tiny) == before


def test_edits_within_one_another(tiny: VisionLanguageModel, found: Edit) -> None:
    before = bits(tiny)
    with found.on(tiny):
        within = bits(tiny)
        second = compute_edit(tiny, [ask("is this a red ?")], "no", constraint=-1, layers=0, settings=LONG)
        with second.on(tiny):
            assert tiny.answer(ask("is this a red ?"), max_new_tokens=1)[0] == "no"
        assert bits(tiny) == within
    assert bits(tiny) == before
    with pytest.raises(EditError, match="not the one that the edit was made for"), second.on(tiny):
        pass


def test_a_saved_edit_reads_back_the_same(tiny: VisionLanguageModel, found: Edit, tmp_path: Path) -> None:
    folder = save_edit(found, tmp_path / "edit")
    again = load_edit(folder)
    assert again.target == TARGET
    assert again.record["probability"] == found.record["probability"]
    with found.on(tiny):
        edited = bits(tiny)
    with again.on(tiny):
        assert bits(tiny) == edited
    assert (folder / TENSORS_NAME).stat().st_size < weight(tiny).numel() * 4 / 4
    other = random_model(seed=1)
    with pytest.raises(EditError, match="not the one"), again.on(other):
        pass
    untouched = bits(other)
    again.apply(other, check=False)
    assert bits(other) != untouched


def test_a_broken_folder_is_refused(found: Edit, tmp_path: Path) -> None:
    folder = save_edit(found, tmp_path / "edit")
    content = (folder / TENSORS_NAME).read_bytes()
    (folder / TENSORS_NAME).write_bytes(content[:-4] + b"1234")
    with pytest.raises(StoreError, match="not the file that the manifest names"):
        load_edit(folder)
    manifest = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", {**manifest, "kind": "features"})
    with pytest.raises(StoreError, match="expected 'model edit'"):
        load_edit(folder)


def test_a_checkpoint_has_the_edit_in_it(tiny: VisionLanguageModel, found: Edit, tmp_path: Path) -> None:
    before = bits(tiny)
    folder = save_edited(tiny, found, tmp_path / "checkpoint")
    assert bits(tiny) == before
    with found.on(tiny):
        wanted = weight(tiny).detach().clone()
    plain: Any = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(plain.get_submodule(PATH.format(0)).weight, wanted)
    assert load_model(folder).answer(ask(), max_new_tokens=1)[0] == TARGET
    with pytest.raises(StoreError, match="not empty"):
        save_edited(tiny, found, folder)


def test_half_precision_says_what_it_swallows() -> None:
    half = random_model(torch.bfloat16)
    tiny_clamp = EditSettings(max_steps=2, clamp=1e-4)
    with pytest.warns(UserWarning) as seen:
        edit = compute_edit(half, [ask()], TARGET, constraint=-1, layers=0, settings=tiny_clamp)
    said = [str(one.message) for one in seen]
    assert any("bfloat16 swallows the edit" in one for one in said)
    assert any("the clamp of 0.0001 holds the value back" in one for one in said)
    assert edit.record["length"] == pytest.approx(1e-4, rel=1e-2)
    long = compute_edit(half, [ask()], TARGET, constraint=-1, layers=0, settings=LONG)
    assert long.record["landed"][0] == pytest.approx(1, abs=0.05)
    with long.on(half):
        assert half.answer(ask(), max_new_tokens=1)[0] == TARGET


def test_several_layers_share_the_change(tiny: VisionLanguageModel) -> None:
    edit = compute_edit(tiny, [ask()], TARGET, constraint=-1, layers=[0, 1], settings=LONG)
    assert edit.layers == (0, 1)
    wanted = compute_edit(tiny, [ask()], TARGET, constraint=-1, layers=1, settings=LONG).changes[0].tensors()["left"]

    def stream() -> Tensor:
        kept: list[Tensor] = []
        block = tiny._module.get_submodule("model.language_model.layers.1")
        handle = block.register_forward_hook(lambda _m, _i, out: kept.append(out))
        batch = tiny.encode([ask()], add_generation_prompt=True)
        with torch.no_grad():
            tiny._module(**batch)
        handle.remove()
        return kept[0][0, -1]

    before = stream()
    with edit.on(tiny):
        after = stream()
    # each layer is a rank-one update by itself, and together they move the stream as one layer alone would
    torch.testing.assert_close(after - before, wanted, rtol=1e-3, atol=1e-3)
    assert edit.changes[0].tensors()["left"].norm() > 0


def test_ordinary_keys_protect_other_prompts(tiny: VisionLanguageModel) -> None:
    others = [ask("is there a red circle ?"), ask("is this a blue square ?"), ask("is this green ?", colour=None)]
    keys = ordinary_keys(tiny, others, 0)
    assert keys[0].shape[1] == weight(tiny).shape[1]
    plain, turned = (
        compute_edit(tiny, [ask()], TARGET, constraint=-1, layers=0, ordinary=some, settings=LONG)
        for some in (None, keys)
    )
    moved = [(keys[0] @ one.changes[0].tensors()["right"]).abs().mean() for one in (plain, turned)]
    assert moved[1] < 0.3 * moved[0]
    few = ordinary_keys(tiny, others, 0, n_keys=8, seed=1)[0]
    assert len(few) == 8
    assert all((row == keys[0]).all(-1).any() for row in few)
    with pytest.raises(EditError, match="for layer 1"):
        compute_edit(tiny, [ask()], TARGET, constraint=-1, layers=1, ordinary=keys)


def test_the_value_is_found_as_the_update_will_write_it(tiny: VisionLanguageModel) -> None:
    # two prompts that read different shares of the change: the recorded probability is that of the edited model
    prompts = [ask(), ask(colour=(30, 200, 60))]
    keys = ordinary_keys(tiny, [ask("is there a red circle ?"), ask("is this green ?", colour=None)], 0, tokens="last")
    settings = EditSettings(max_steps=10, end=False)
    edit = compute_edit(tiny, prompts, TARGET, constraint=-1, layers=0, ordinary=keys, settings=settings)
    change = edit.changes[0]
    assert isinstance(change, RankOneChange)
    first = tiny.tokenizer(TARGET, add_special_tokens=False)["input_ids"][0]
    module, found, shares = tiny._module.get_submodule(PATH.format(0)), [], []

    for prompt in prompts:
        batch = tiny.encode([prompt], add_generation_prompt=True)

        def write(_module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            shares.append(float(inputs[0][0, -1] @ change.update.right))
            output[0, -1] += shares[-1] * change.update.left
            return output

        handle = module.register_forward_hook(write)
        with torch.no_grad():
            found.append(float(tiny._module(**batch).logits[0, -1].softmax(-1)[first]))
        handle.remove()
    assert abs(shares[0] - shares[1]) > 1e-4
    assert edit.record["probability"] == pytest.approx(sum(found) / 2, rel=1e-3)


def continued(model: VisionLanguageModel, prompt: Chat, ids: Sequence[int]) -> dict[str, Tensor]:
    """A prompt and tokens after it, without padding."""
    inputs = dict(model.encode([prompt], add_generation_prompt=True))
    tokens = torch.cat([inputs["input_ids"], torch.tensor([list(ids)], dtype=torch.int64)], dim=1)
    inputs.pop("position_ids", None)  # the row is not padded, so the model counts the same
    return {**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def own_answer(model: VisionLanguageModel, prompt: Chat, n_tokens: int) -> list[int]:
    """The greedy answer, a token at a time by plain forwards."""
    found: list[int] = []
    for _ in range(n_tokens):
        with torch.no_grad():
            logits = model._module(**continued(model, prompt, found)).logits[0, -1]
        logits[model.family.image_token_id] = -torch.inf
        found.append(int(logits.argmax()))
        if found[-1] == model.tokenizer.eos_token_id:
            break
    return found


def test_essence_keeps_whole_answers(tiny: VisionLanguageModel) -> None:
    kept = ask("is this a red circle ?")
    answer = own_answer(tiny, kept, 4)
    assert len(answer) > 2
    inputs = continued(tiny, kept, answer[:-1])

    def following() -> Tensor:
        with torch.no_grad():
            return tiny._module(**inputs).logits[0, -len(answer) :].log_softmax(-1)

    before = following()
    # with ordinary keys the value is found as it will be written, at an answer's tokens, too
    keys = ordinary_keys(tiny, [ask("is this green ?", colour=None)], 0)

    def moved(weight_of: float, n_tokens: int) -> Tensor:
        settings = EditSettings(
            max_steps=60, clamp=None, essence_weight=weight_of, essence_tokens=n_tokens, ridge=10.0, end=False
        )
        edit = compute_edit(
            tiny, [ask()], TARGET, constraint=-1, layers=0, ordinary=keys, essence=[kept], settings=settings
        )
        with edit.on(tiny):
            return (before.exp() * (before - following())).sum(-1)

    free, next_alone, whole = moved(0.0, 4), moved(5.0, 1), moved(5.0, 4)
    assert next_alone[0] < 0.5 * free[0]
    assert whole[0] < 0.5 * free[0]
    assert whole[1:].sum() < 0.7 * next_alone[1:].sum()


def test_ordinary_keys_are_read_within_answers_too(tiny: VisionLanguageModel) -> None:
    prompts = [ask("is there a red circle ?"), ask("is this green ?", colour=None)]
    found = ordinary_keys(tiny, prompts, 0, tokens="last", answer_tokens=4, n_keys=100)[0]
    module, wanted = tiny._module.get_submodule(PATH.format(0)), []
    for prompt in prompts:
        answer = own_answer(tiny, prompt, 4)
        kept: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0][0]))
        with torch.no_grad():
            tiny._module(**continued(tiny, prompt, answer[:-1]))
        handle.remove()
        wanted.append(kept[0][-len(answer) :])
    lasts, inside = torch.stack([one[0] for one in wanted]), torch.cat([one[1:] for one in wanted])
    torch.testing.assert_close(found, torch.cat([lasts, inside]), rtol=1e-4, atol=1e-4)
    alone = ordinary_keys(tiny, prompts, 0, tokens="last", answer_tokens=0, n_keys=100)[0]
    torch.testing.assert_close(alone, lasts, rtol=1e-4, atol=1e-4)


def test_each_token_of_a_target_gets_an_update(tiny: VisionLanguageModel, tmp_path: Path) -> None:
    target = "red circle"
    ids = tiny.tokenizer(target, add_special_tokens=False)["input_ids"]
    settings = EditSettings(max_steps=150, clamp=None, end=False, each_token=True)
    edit = compute_edit(tiny, [ask()], target, constraint=-1, layers=0, settings=settings)
    assert [one.path for one in edit.changes] == [PATH.format(0)] * 2
    inputs, kept = continued(tiny, ask(), ids[:1]), []
    module = tiny._module.get_submodule(PATH.format(0))

    def outputs() -> Tensor:
        handle = module.register_forward_hook(lambda _m, _i, out: kept.append(out[0, -2:]))
        with torch.no_grad():
            tiny._module(**inputs)
        handle.remove()
        return kept[-1]

    before, bits_before = outputs(), bits(tiny)
    with edit.on(tiny):
        after = outputs()
        difference = weight(tiny).detach().clone()
        assert tiny.answer(ask(), max_new_tokens=2)[0] == target
    # both places get their own value, whatever the other's is
    lefts = torch.stack([one.tensors()["left"] for one in edit.changes])
    torch.testing.assert_close(after - before, lefts, rtol=1e-3, atol=1e-3)
    assert bits(tiny) == bits_before
    values = torch.linalg.svdvals((difference - weight(tiny)).double())
    assert values[1] > 1e-3 * values[0] > 1e2 * values[2]
    with load_edit(save_edit(edit, tmp_path / "edit")).on(tiny):
        assert torch.equal(weight(tiny), difference)


def test_fine_tuning_stays_within_its_bound(tiny: VisionLanguageModel) -> None:
    settings = FineTuneSettings(max_steps=60, bound=0.5, learning_rate=0.1, end=False)
    edit = fine_tune(tiny, [ask()], TARGET, layer=1, settings=settings)
    whole = edit.changes[0].tensors()["whole"]
    unit = float(weight(tiny, 1).detach().square().mean().sqrt())
    assert float(whole.abs().max()) <= 0.5 * unit * 1.001
    with edit.on(tiny):
        assert tiny.answer(ask(), max_new_tokens=1)[0] == TARGET


def test_fine_tuning_keeps_essence(tiny: VisionLanguageModel) -> None:
    kept = ask("is this a red circle ?")
    inputs = continued(tiny, kept, [])

    def next_token() -> Tensor:
        with torch.no_grad():
            return tiny._module(**inputs).logits[0, -1].log_softmax(-1)

    before, moved = next_token(), []
    for essence in ([], [kept]):
        settings = FineTuneSettings(max_steps=60, bound=0.5, learning_rate=0.1, end=False, essence_weight=2.0)
        edit = fine_tune(tiny, [ask()], TARGET, layer=1, essence=essence, settings=settings)
        with edit.on(tiny):
            moved.append(float((before.exp() * (before - next_token())).sum()))
    assert moved[1] < 0.5 * moved[0]


def test_mistakes_are_said(tiny: VisionLanguageModel) -> None:
    with pytest.raises(UnknownHookError, match=r"blocks\.9"):
        compute_edit(tiny, [ask()], TARGET, constraint=-1, layers=9)
    with pytest.raises(SelectionError, match="'green star', which is not in the prompt"):
        compute_edit(tiny, [ask()], TARGET, constraint="green star", layers=0)
    with pytest.raises(ConfigError, match="knows not every word"):
        compute_edit(tiny, [ask()], "zebra", constraint=-1, layers=0)
    with pytest.raises(EditError, match="no prompt"):
        compute_edit(tiny, [], TARGET, constraint=-1, layers=0)
    with pytest.raises(ConfigError, match="clamp"):
        compute_edit(tiny, [ask()], TARGET, constraint=-1, layers=0, settings=EditSettings(clamp=0.0))
    assert down_projection(tiny, 1).path == PATH.format(1)

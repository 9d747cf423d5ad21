"""Qwen-VL, GLM-V, Idefics3, SmolVLM, InternVL: boxes against pictures that carry coordinates, and what is special."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import AutoConfig
from transformers.models.aya_vision.modeling_aya_vision import AyaVisionMultiModalProjector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.registry import find_family
from sae_lens_multimodal.errors import ImageError, LayoutError, PromptError
from sae_lens_multimodal.types import Modality
from tests.adapters.adapter_samples import picture, prompt
from tests.adapters.box_probe import tokens_that_see

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
PACKED = (*QWEN, "glm4v", "glm46v")
TILED = ("idefics3", "smolvlm", "internvl", "aya_vision")
SIZES = st.tuples(st.integers(20, 900), st.integers(20, 900))


def ramp(width: int, height: int) -> Image.Image:
    """A picture whose red grows from left to right, and whose green grows from top to bottom."""
    pixels = np.zeros((height, width, 3))
    pixels[..., 0] = (np.arange(width) + 0.5)[None, :] / width
    pixels[..., 1] = (np.arange(height) + 0.5)[:, None] / height
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def check_middles(family: Any, size: tuple[int, int], shares: Tensor) -> None:
    """Hold the middles of the boxes against the shares of red and green that the tokens see: [n, 2]."""
    tokens = family.image_tokens(*size)
    middles = (tokens.boxes[:, :2] + tokens.boxes[:, 2:]) / 2 / np.asarray(size)
    assert len(tokens) == len(shares)
    assert (tokens.modality == Modality.IMAGE).all()
    extent = (tokens.boxes[:, 2:] - tokens.boxes[:, :2]) / np.asarray(size)
    # eight bits, and filters that see the picture end
    tolerance = 1.5 / 255 + 0.1 * extent
    assert (np.abs(shares.numpy() - middles) <= tolerance).all()


def unnormalised(images: Any, pixels: Tensor) -> Tensor:
    """Undo the image processor's normalisation; channels come second."""
    shape = [1, 3] + [1] * (pixels.dim() - 2)
    return pixels * torch.tensor(images.image_std).view(shape) + torch.tensor(images.image_mean).view(shape)


@pytest.fixture(scope="module")
def released() -> Callable[[str, int | None], Any]:
    """Families with the structure of released checkpoints, or the tiny one with None; made once."""
    made: dict[tuple[str, int | None], Any] = {}

    def get(name: str, number: int | None) -> Any:
        if (name, number) not in made:
            family = find_family(name)
            # what the one type of GLM-V takes, the other does too
            known = family.released or find_family("glm4v").released
            structure = {} if number is None else known[number].structure
            module, processor = family.random_model(0, **structure)
            made[name, number] = family(module.config, processor)
        return made[name, number]

    return get


@pytest.mark.parametrize("name", PACKED)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(size=SIZES)
def test_blocks_of_patches_of_released_models(released: Any, name: str, size: tuple[int, int]) -> None:
    family = released(name, 0)
    images = family.processor.image_processor
    made = images([ramp(*size)], return_tensors="pt")
    patches = made["pixel_values"].view(-1, 3, images.temporal_patch_size, images.patch_size, images.patch_size)
    seen = unnormalised(images, patches).mean((2, 3, 4))[:, :2]
    # the merger takes as many rows together as there are patches in a block
    check_middles(family, size, seen.view(-1, images.merge_size**2, 2).mean(1))


SHUFFLES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "idefics3": lambda x, merge: Idefics3Connector.pixel_shuffle(None, x, merge),
    "smolvlm": lambda x, merge: SmolVLMConnector.pixel_shuffle(None, x, merge),
    "internvl": lambda x, merge: InternVLModel.pixel_shuffle(
        None, x.unflatten(1, (int(x.shape[1] ** 0.5), -1)), 1 / merge
    ).flatten(1, 2),
    "aya_vision": lambda x, merge: AyaVisionMultiModalProjector.pixel_shuffle(
        SimpleNamespace(downsample_factor=merge), x
    ).flatten(1, 2),
}


def check_tiles(family: Any, size: tuple[int, int]) -> None:
    images = family.processor.image_processor
    made = family.processor(
        text=[family.image_token], images=family.processor_images([[ramp(*size)]]), return_tensors="pt"
    )
    tiles = unnormalised(images, made["pixel_values"].flatten(0, -4))
    patch = family.config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    features = torch.nn.functional.avg_pool2d(tiles, patch)[:, :2].flatten(2).transpose(1, 2).contiguous()
    merge = family.config.scale_factor if family.model_type in ("idefics3", "smolvlm") else 2
    merged = SHUFFLES[family.model_type](features, merge).unflatten(-1, (merge**2, 2)).mean(-2)
    check_middles(family, size, merged.flatten(0, 1))
    assert made["input_ids"].eq(family.image_token_id).sum() == merged[..., 0].numel()


@pytest.mark.parametrize("name", TILED)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(size=SIZES)
def test_tiles(released: Any, name: str, size: tuple[int, int]) -> None:
    check_tiles(released(name, None), size)


@pytest.mark.parametrize(
    ("name", "number", "size"),
    [
        ("idefics3", 0, (411, 260)),
        ("smolvlm", 0, (90, 310)),
        ("smolvlm", 1, (613, 200)),
        ("internvl", 0, (333, 870)),
        ("internvl", 0, (700, 640)),
        ("aya_vision", 0, (333, 870)),
    ],
)
def test_tiles_of_released_models(released: Any, name: str, number: int, size: tuple[int, int]) -> None:
    check_tiles(released(name, number), size)


def tiny(name: str) -> VisionLanguageModel:
    module, processor = find_family(name).random_model(seed=0)
    return load_model(module, processor=processor)


@pytest.mark.parametrize("name", PACKED)
def test_positions_are_those_of_each_prompt_alone(name: str) -> None:
    model = tiny(name)
    seen: list[Tensor] = []
    handle = model._module.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("position_ids", args[-1]).expand(3, -1, -1)), with_kwargs=True
    )

    def positions(prompts: Any) -> tuple[Any, Tensor]:
        batch = model.encode(prompts)
        with torch.no_grad(), model.trace(**batch):
            model.output.logits.save()
        return batch, seen.pop()

    pictured = [prompt("is", picture(90, 40), "this", picture(20, 50), "red ?"), prompt("yes"), prompt(picture(9, 60))]
    try:
        for prompts in (pictured, [prompt("yes"), prompt("is there a red circle ?")]):
            batch, together = positions(prompts)
            for row, one in enumerate(prompts):
                kept = batch["attention_mask"][row].bool()
                alone = positions([one])[1]
                assert torch.equal(together[:, row, kept], alone[:, 0])
                assert alone.min() == 0
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_deepstack_features_come_between_the_blocks(name: str) -> None:
    model = tiny(name)
    batch = model.encode([prompt(picture(60, 40), "what ?"), prompt("yes and no")])
    with torch.no_grad(), model.trace(**batch):
        added = model.hooks["projector.deepstack.0.hook_out"].save()
        before = model.hooks["blocks.0.hook_resid_post"].save()
        after = model.hooks["blocks.1.hook_resid_pre"].save()
    image = batch.layout.is_image
    assert torch.equal(after[~image], before[~image])
    assert torch.equal(after[image], before[image] + added)
    assert added.abs().min() > 0


@pytest.mark.parametrize("name", [*QWEN, "internvl"])
def test_shapes_within_the_vision_tower_without_a_forward_pass(name: str) -> None:
    model = tiny(name)
    batch = model.encode([prompt(picture(60, 40), "what ?"), prompt(picture(30, 30), "yes")])
    hooks = ("vision.blocks.1.hook_resid_post", "projector.hook_out", "blocks.1.hook_resid_post")
    real, scanned = [], []
    with torch.no_grad(), model.trace(**batch):
        for hook in hooks:
            real.append(model.hooks[hook].save())
    with model.scan(**batch):
        for hook in hooks:
            scanned.append(tuple(model.hooks[hook].shape))
    assert [tuple(value.shape) for value in real] == scanned


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_what_is_written_between_tiles_belongs_to_their_picture(name: str) -> None:
    model = tiny(name)
    # a row without pictures first, then pictures side by side
    batch = model.encode([prompt("is this \n red ?"), prompt(picture(60, 40), picture(30, 90), "what \n ?")])
    layout, words = batch.layout, model.tokenizer.convert_ids_to_tokens(batch["input_ids"][1].tolist())
    kinds, owner = layout.modality[1].tolist(), layout.image_index[1].tolist()
    around, current = [], 0
    for at, word in enumerate(words):
        if word == "<global-img>":
            # the whole picture is the last of its views: one more token around it, after its patches
            assert words[at - 1] == "<fake_token_around_image>"
            current = at
        if word.startswith("<row_") or word in ("<global-img>", "<fake_token_around_image>"):
            around.append((kinds[at], owner[at]))
    assert current
    assert {kind for kind, _ in around} == {int(Modality.SPECIAL)}
    owners = [number for _, number in around]
    assert owners == sorted(owners)
    # each picture has a marker more for its last view than two for each of its views
    per_picture = [sum(number == index for number in owners) for index in (0, 1)]
    views = [int(layout.tile[1][layout.image_index[1] == index].max()) + 1 for index in (0, 1)]
    assert per_picture == [2 * count + 1 for count in views]
    breaks = [(kinds[at], owner[at]) for at, word in enumerate(words) if word == "\n"]
    assert breaks[-1] == (Modality.TEXT, -1)
    assert {kind for kind, _ in breaks[:-1]} == {int(Modality.NEWLINE)}
    assert {number for _, number in breaks[:-1]} == {0, 1}
    assert (layout.image_index[0] == -1).all()
    assert (layout.modality[0] != Modality.NEWLINE).all()


@pytest.mark.parametrize("name", PACKED)
def test_pictures_that_are_too_long_are_refused(name: str) -> None:
    model = tiny(name)
    assert model.encode(prompt(picture(4, 800), "what ?")).layout.is_image.any()
    with pytest.raises(ImageError, match="805 pixels has sides that differ by a factor of more than 200"):
        model.encode([prompt(picture(30, 30), "yes"), prompt(picture(4, 805), "what ?")])


@pytest.mark.parametrize("name", [*PACKED, *TILED])
def test_videos_are_refused(name: str) -> None:
    with pytest.raises(PromptError, match="a part of type 'video'; expected 'text' or 'image'"):
        tiny(name).encode([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2_vl", {"patch_size": 8}),
        ("glm4v", {"merge_size": 1}),
        ("idefics3", {"max_image_size": {"longest_edge": 48}}),
        ("internvl", {"size": {"height": 64, "width": 64}}),
    ],
)
def test_processors_of_other_checkpoints_are_refused(name: str, change: dict[str, Any]) -> None:
    module, processor = find_family(name).random_model(seed=0)
    for setting, value in change.items():
        setattr(processor.image_processor, setting, value)
    with pytest.raises(LayoutError, match="one checkpoint"):
        find_family(name)(module.config, processor).image_tokens(60, 40)


def test_the_first_cohere_under_aya_vision() -> None:
    """The larger released model has it, with norms of queries and keys besides."""
    module, processor = find_family("aya_vision").random_model(0, text="cohere")
    module.set_attn_implementation("eager")
    model = load_model(module, processor=processor)
    values: dict[str, Tensor] = {}
    with torch.no_grad(), model.trace(**model.encode(prompt(picture(60, 40), "what ?"))):
        for hook in model.hooks.names():
            values[hook] = model.hooks[hook].save()
    for begin in ("blocks.0.", "blocks.1."):
        added = values[f"{begin}hook_resid_pre"] + values[f"{begin}hook_attn_out"] + values[f"{begin}hook_mlp_out"]
        assert torch.equal(added, values[f"{begin}hook_resid_post"])
        scores = values[f"{begin}attn.hook_attn_scores"].float().softmax(-1)
        torch.testing.assert_close(values[f"{begin}attn.hook_pattern"], scores)
        norm = module.model.language_model.layers[int(begin[7])].input_layernorm
        normalized = values[f"{begin}ln1.hook_normalized"]
        torch.testing.assert_close(normalized * norm.weight, norm(values[f"{begin}hook_resid_pre"]))


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
@pytest.mark.parametrize(
    ("size", "blurred"),
    [((100, 60), False), ((61, 40), False), ((64, 64), False), ((120, 17), True), ((12, 120), True), ((7, 90), True)],
)
def test_pictures_that_two_resizes_blur_say_so(name: str, size: tuple[int, int], blurred: bool) -> None:
    """Their tokens see further beyond their boxes than the boxes are wide."""
    model = tiny(name)
    tokens = model.family.image_tokens(*size)
    assert bool(tokens.inexact) == blurred
    assert ("thin" in tokens.inexact) == blurred
    assert model.encode(prompt(picture(*size), "what ?")).layout.inexact == ((tokens.inexact,),)
    # each line of pixels across the picture, and which tokens of the tiles it reaches
    axis = int(size[0] > size[1])
    asked = lambda pictures: model.encode([prompt(one, "what ?") for one in pictures])  # noqa: E731
    seen = tokens_that_see(model._module, asked, size, axis, range(size[axis]))
    layout = asked([Image.new("RGB", size)]).layout
    tiles = layout.tile[0].numpy() > 0
    low, high = layout.boxes[0, :, axis].numpy()[tiles], layout.boxes[0, :, axis + 2].numpy()[tiles]
    first, last = seen[:, tiles].argmax(0), size[axis] - seen[::-1, tiles].argmax(0)
    beyond = np.maximum(low - first, last - high)
    assert (beyond.max() > (high - low).max()) == blurred


@pytest.mark.parametrize("name", [*PACKED, *TILED])
def test_hooks_of_the_configuration_that_is_transformers_own(name: str) -> None:
    """All layers and widths, of which the tiny models have few and which they may give too many of."""
    _, processor = find_family(name).random_model(seed=0)
    family = find_family(name)(AutoConfig.for_model(name), processor)
    points = family.hook_points()
    names = {point.name for point in points}
    assert len(names) == len(points)
    assert f"blocks.{family.n_layers - 1}.hook_resid_post" in names
    depth = family.config.vision_config.num_hidden_layers
    assert f"vision.blocks.{depth - 1}.hook_resid_post" in names
    widths = {point.d for point in points if point.name.endswith("hook_resid_post") and point.tower == "language"}
    assert widths == {family.d_model}

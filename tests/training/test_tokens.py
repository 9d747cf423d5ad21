"""Which tokens are chosen."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.patches import choose_patches
from sae_lens_multimodal.training.tokens import (
    LabelledBatch,
    TokenChoice,
    keep_tokens,
    read_hooks,
    read_tokens,
    within_norm_ratio,
)
from sae_lens_multimodal.types import Modality

I, N, T, S, P = Modality.IMAGE, Modality.NEWLINE, Modality.TEXT, Modality.SPECIAL, Modality.PADDING  # noqa: E741
ROW = [P, S, T, I, I, I, N, T, S]
TILE = [-1, -1, -1, 0, 1, 2, 1, -1, -1]


def make_layout() -> TokenLayout:
    count = len(ROW)
    return TokenLayout(
        modality=torch.tensor([ROW], dtype=torch.int8),
        boxes=torch.full((1, count, 4), float("nan")),
        image_index=torch.full((1, count), -1),
        tile=torch.tensor([TILE]),
        image_sizes=((),),
    )


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (TokenChoice(), [2, 3, 4, 5, 7]),
        (TokenChoice(image_tokens="base"), [2, 3, 7]),
        (TokenChoice(image_tokens="tiles"), [2, 4, 5, 7]),
        (TokenChoice(newline_tokens=True), [2, 3, 4, 5, 6, 7]),
        (TokenChoice(image_tokens="base", newline_tokens=True), [2, 3, 7]),
        (TokenChoice(image_tokens="tiles", newline_tokens=True), [2, 4, 5, 6, 7]),
        (TokenChoice(excluded_ids=(2, 4)), [3, 5, 7]),
    ],
)
def test_choice(choice: TokenChoice, expected: list[int]) -> None:
    ids = torch.arange(len(ROW))[None]
    assert choice.select(make_layout(), ids)[0].nonzero().squeeze(1).tolist() == expected


def test_activations_are_those_of_the_chosen_tokens(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    from sae_lens_multimodal.data.rows import row_to_prompt
    from sae_lens_multimodal.hooks.read import read_activations

    batch = model.encode([row_to_prompt(row).messages for row in rows[:3]])
    read = read_tokens(model, batch, "blocks.0.hook_resid_pre", TokenChoice())
    every = read_activations(model, batch, "blocks.0.hook_resid_pre")["blocks.0.hook_resid_pre"]
    assert torch.equal(read.activations, every[batch.layout.kept])
    assert torch.equal(read.modality, batch.layout.modality[batch.layout.kept])
    assert set(read.modality.tolist()) == {Modality.IMAGE, Modality.TEXT}


def test_heads_are_laid_side_by_side(model: VisionLanguageModel, text_rows: list[dict[str, Any]]) -> None:
    from sae_lens_multimodal.data.rows import row_to_prompt

    batch = model.encode([row_to_prompt(text_rows[0]).messages])
    hook = "blocks.0.attn.hook_z"
    assert read_tokens(model, batch, hook, TokenChoice()).activations.shape[1] == model.hooks.resolve(hook).d


def test_values_that_are_not_finite_are_refused(
    model: VisionLanguageModel, text_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens_multimodal.data.rows import row_to_prompt
    from sae_lens_multimodal.training import tokens

    batch = model.encode([row_to_prompt(text_rows[0]).messages])
    shape = (*batch["input_ids"].shape, 4)
    hook = "blocks.0.hook_resid_pre"
    monkeypatch.setattr(tokens, "read_activations", lambda *_: {hook: torch.full(shape, float("inf"))})
    with pytest.raises(ConfigError, match=r"not finite in torch.float32"):
        read_tokens(model, batch, hook, TokenChoice())


def prompt_of(*pictures: Image.Image) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "a red circle"}]}]


def test_views_and_separators_of_real_pictures_add_up(model: VisionLanguageModel, images: list[Image.Image]) -> None:
    wide = images[0].resize((96, 48))
    batch = model.encode([prompt_of(images[0]), prompt_of(wide, images[1])])
    ids = batch["input_ids"]
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2

    def count(**settings: Any) -> int:
        chosen = TokenChoice(**settings).select(batch.layout, ids)
        return int((chosen & ~batch.layout.is_text).sum())

    # what the model itself puts in place of its placeholders: three pictures, one view of each as a whole
    placeholders = int((ids == model.config.image_token_id).sum())
    assert count(image_tokens="base") == 3 * patches
    assert count(newline_tokens=True) == placeholders
    newlines = placeholders - count()
    assert newlines > 0
    assert count(image_tokens="tiles") == placeholders - newlines - 3 * patches
    assert count(image_tokens="tiles", newline_tokens=True) == placeholders - 3 * patches


# ---- outliers --------------------------------------------------------------------------------------------------------


def test_tokens_far_above_the_median_of_their_modality_go_and_are_counted() -> None:
    # image tokens are a hundred times as large as text; each has one outlier, which the other's scale would not show
    rows = torch.ones(12, 4)
    rows[6:] *= 100
    rows[2] *= 20
    rows[9] *= 20
    modality = torch.tensor([Modality.TEXT] * 6 + [Modality.IMAGE] * 5 + [Modality.NEWLINE], dtype=torch.int8)
    batch = LabelledBatch(rows, modality)
    kept = within_norm_ratio(batch, 10)
    assert (~kept).nonzero().squeeze(1).tolist() == [2, 9]
    dropped: Counter[str] = Counter()
    left = keep_tokens(batch, kept, dropped)
    assert dropped == {"text": 1, "image": 1}
    assert left.activations.norm(dim=1).max() == 200
    assert left.modality.tolist() == [Modality.TEXT] * 5 + [Modality.IMAGE] * 4 + [Modality.NEWLINE]


def test_half_precision_norms_do_not_overflow() -> None:
    rows = torch.full((4, 8), 6e4, dtype=torch.float16)
    batch = LabelledBatch(rows, torch.full((4,), int(Modality.TEXT), dtype=torch.int8))
    assert within_norm_ratio(batch, 2).all()


# ---- the vision tower ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "path"),
    [("vision.blocks.0.hook_resid_post", "model.vision_tower.encoder.layers.0"), ("projector.hook_out", "")],
)
def test_patches_are_those_of_a_plain_pytorch_hook(
    model: VisionLanguageModel, images: list[Image.Image], hook: str, path: str
) -> None:
    batch = model.encode([prompt_of(images[0].resize((96, 48)), images[1]), prompt_of(images[2])])
    seen: list[torch.Tensor] = []
    module = model._module.get_submodule(path or "model.multi_modal_projector")
    handle = module.register_forward_hook(
        lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        with torch.no_grad():
            model._module(**batch)
    finally:
        handle.remove()
    (values,) = seen
    patches = values[:, -((model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2) :]
    for choice in ("all", "base"):
        read = read_tokens(model, batch, hook, TokenChoice(image_tokens=choice))  # type: ignore[arg-type]
        assert set(read.modality.tolist()) == {Modality.IMAGE}
        if choice == "all":
            assert torch.allclose(read.activations, patches.flatten(0, 1), atol=1e-6)
            everything = read.activations
        else:
            # the projector's base view is what the prompt's first placeholders are filled with
            assert len(read.activations) == 3 * patches.shape[1]
            assert torch.equal(read.activations[: patches.shape[1]], everything[: patches.shape[1]])


def test_base_patches_after_the_projector_are_the_prompts_image_tokens(
    model: VisionLanguageModel, images: list[Image.Image]
) -> None:
    batch = model.encode([prompt_of(images[0].resize((96, 48)), images[1]), prompt_of(images[2])])
    base = TokenChoice(image_tokens="base")
    read = read_hooks(model, batch, ["projector.hook_out", "blocks.0.hook_resid_pre"], base)
    embedded = read["blocks.0.hook_resid_pre"]
    assert torch.equal(
        read["projector.hook_out"].activations, embedded.activations[embedded.modality == Modality.IMAGE]
    )


def test_a_batch_without_pictures_has_no_patches(model: VisionLanguageModel) -> None:
    read = read_hooks(
        model, model.encode([prompt_of()]), ["projector.hook_out", "blocks.0.hook_resid_pre"], TokenChoice()
    )
    assert len(read["projector.hook_out"].activations) == 0
    assert len(read["blocks.0.hook_resid_pre"].activations) > 0


def test_positions_that_are_no_patches_are_refused(model: VisionLanguageModel, images: list[Image.Image]) -> None:
    layout = model.encode([prompt_of(images[0])]).layout
    views = int(layout.tile.max()) + 1
    patches = int((layout.tile == 0).sum())
    assert choose_patches((views, patches + 1, 8), layout, "all", "hook").sum() == views * patches
    for shape in ((views, patches + 2, 8), (views, patches - 1, 8), (views + 1, patches, 8), (views, patches)):
        with pytest.raises(ConfigError, match="one vector for each patch"):
            choose_patches(shape, layout, "all", "hook")

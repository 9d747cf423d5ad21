"""The Gemma 3 family: one pooled view of each picture, and crops of long ones where pan and scan is on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from PIL import Image

from sae_lens_multimodal.adapters.family import Family, ImageTokens, Released
from sae_lens_multimodal.adapters.grid import Edges, before_resize, boxes_of, grid_edges, join_views, patches_of_view
from sae_lens_multimodal.adapters.hook_points import HookPoint, Part
from sae_lens_multimodal.adapters.modules import (
    LANGUAGE,
    OLD_PATHS,
    PROJECTOR,
    UNEMBEDDING,
    VISION,
    check_tower,
    clip_vision_hooks,
    embedding_hook,
    language_block,
    language_hooks,
)
from sae_lens_multimodal.adapters.processors import image_settings
from sae_lens_multimodal.errors import LayoutError
from sae_lens_multimodal.types import Modality


@final
class Gemma3(Family):
    """Gemma 3: each picture is squashed into one square view, and squares of patches are pooled to tokens.

    Boxes are exact: each token is the mean of a square of patches that no other token shares, and its box holds them
    all. Pan and scan, which adds crops of long pictures, is off unless the processor's `images_kwargs` turn it on:
    `model.processor.images_kwargs = {**model.processor.images_kwargs, "do_pan_and_scan": True}`. The crops are then
    tiles 1 and up, and the words that the processor puts between them belong to the picture.
    """

    model_type: ClassVar[str] = "gemma3"
    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)
    token_keys: ClassVar[tuple[str, ...]] = ("token_type_ids",)
    media_modules: ClassVar[tuple[str, ...]] = (VISION, PROJECTOR)
    old_paths: ClassVar[Mapping[str, str]] = OLD_PATHS
    final_norm: ClassVar[str] = f"{LANGUAGE}.norm"
    unembedding: ClassVar[str] = UNEMBEDDING
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("google/gemma-3-4b-it", "google/gemma-3-12b-it", "google/gemma-3-27b-it"),
            structure={"side": 896, "patch": 14, "tokens": 256},
        ),
    )

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the vision tower is of another kind, or gives tokens beside the patches.
        """
        super().__init__(config, processor)
        check_tower(config.vision_config, 0, "Gemma 3, which drops no token,")

    @property
    def image_token(self) -> str:
        """The token that stands for every pooled square of patches."""
        return str(self.processor.tokenizer.image_token)

    @property
    def prompt_token(self) -> str:
        """The beginning of a picture, which stands for all of it in the prompt."""
        return str(self.processor.boi_token)

    def markers(self) -> Mapping[int, Modality]:
        """Return the tokens before and after each view."""
        tokenizer = self.processor.tokenizer
        return {tokenizer.boi_token_id: Modality.SPECIAL, tokenizer.eoi_token_id: Modality.SPECIAL}

    def processor_images(self, images: Sequence[Sequence[Image.Image]]) -> Any:  # noqa: ANN401 - the processor's form
        """Return the pictures prompt by prompt."""
        return [list(row) for row in images] if any(images) else None

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        text, vision = self.config.text_config, self.config.vision_config
        projector = (
            Part("hook_in", side="input", d=vision.hidden_size),
            Part("hook_pooled", "mm_soft_emb_norm", side="input", d=vision.hidden_size),
            Part("ln.hook_out", "mm_soft_emb_norm", d=vision.hidden_size),
            Part("hook_out", d=text.hidden_size),
        )
        return (
            *embedding_hook(text),
            *clip_vision_hooks(vision),
            *(part.at(prefix="projector.", path=PROJECTOR, tower="projector") for part in projector),
            *language_hooks(text, language_block(text)),
        )

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the placeholders of a picture of this size lie in it.

        Raises:
            LayoutError: processor and vision tower disagree about the size of a view.
        """
        side, count = self._side(), self._tokens_per_side()
        pooled = self._pooled() * int(self.config.vision_config.patch_size)
        views = []
        for tile, (x0, y0, x1, y1) in enumerate([(0, 0, width, height), *self._crops(width, height)]):
            y = _shifted(before_resize(grid_edges(count, pooled), y1 - y0, side), y0)
            x = _shifted(before_resize(grid_edges(count, pooled), x1 - x0, side), x0)
            views.append(patches_of_view(boxes_of(y, x, width, height).reshape(-1, 4), tile))
        return join_views(*views)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `_random`
        """Return a tiny Gemma 3 with random weights, and its processor."""
        return _random(seed, **structure)

    def _side(self) -> int:
        images, side = image_settings(self.processor), int(self.config.vision_config.image_size)
        size = (images.size["height"], images.size["width"]) if images.do_resize else None
        if size != (side, side):
            raise LayoutError(
                f"the image processor makes views of {size or 'many sizes'}, the vision tower expects {(side, side)}; "
                "set the processor's size to match."
            )
        return side

    def _pooled(self) -> int:
        """How many patches along one side are pooled to a token."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size // int(self.config.mm_tokens_per_image**0.5))

    def _tokens_per_side(self) -> int:
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size // self._pooled())

    def _crops(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """Boxes of the crops that pan and scan makes, as transformers' `pan_and_scan` rounds them."""
        settings = image_settings(self.processor)
        if not settings.do_pan_and_scan:
            return []
        least, most = settings.pan_and_scan_min_crop_size, settings.pan_and_scan_max_num_crops
        longer, shorter = max(width, height), min(width, height)
        if longer / shorter < settings.pan_and_scan_min_ratio_to_activate:
            return []
        wanted = min(math.floor(longer / least), math.floor(longer / shorter + 0.5))
        count = min(most, max(2, wanted))
        step = math.ceil(longer / count)
        if min(step, shorter) < least:
            return []
        starts = [(index * step, min((index + 1) * step, longer)) for index in range(count)]
        if width >= height:
            return [(start, 0, stop, height) for start, stop in starts]
        return [(0, start, width, stop) for start, stop in starts]


def _shifted(edges: Edges, by: int) -> Edges:
    return edges + by


def _random(seed: int, side: int = 48, patch: int = 4, tokens: int = 9) -> tuple[Any, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        SiglipVisionConfig,
    )

    from sae_lens_multimodal.adapters.random_models import (
        CHAT_TEMPLATE,
        CONTROL,
        finished,
        tiny_llama,
        tiny_tower,
        word_tokenizer,
    )

    control = (*CONTROL, "<boi>", "<eoi>")
    tokenizer = word_tokenizer(control, boi_token="<boi>", eoi_token="<eoi>")
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**tiny_tower(side, patch), vision_use_head=False),
        text_config=tiny_llama(
            tokenizer,
            kind="gemma3_text",
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=tokens,
        boi_token_index=control.index("<boi>"),
        eoi_token_index=control.index("<eoi>"),
        image_token_index=control.index("<image>"),
        architectures=["Gemma3ForConditionalGeneration"],
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": side, "width": side}),
        tokenizer,
        chat_template=CHAT_TEMPLATE.replace("<image>", "<boi>"),
        image_seq_length=tokens,
    )
    return finished(Gemma3ForConditionalGeneration(config), tokenizer, seed), processor

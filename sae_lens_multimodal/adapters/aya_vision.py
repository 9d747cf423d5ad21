"""The Aya Vision family: tiles, then a thumbnail of the whole picture, before a Cohere or Cohere 2."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    GotOcr2ImageProcessorPil,
    SiglipVisionConfig,
)

from sae_lens_multimodal.adapters.canvas_tiles import canvas_tokens
from sae_lens_multimodal.adapters.family import Family, ImageTokens, Released
from sae_lens_multimodal.adapters.hook_points import HookPoint, Part
from sae_lens_multimodal.adapters.modules import (
    LANGUAGE,
    OLD_PATHS,
    PROJECTOR,
    UNEMBEDDING,
    VISION,
    check_strategy,
    clip_vision_hooks,
    embedding_hook,
    features_width,
    language_block,
    language_hooks,
)
from sae_lens_multimodal.adapters.random_models import (
    CHAT_TEMPLATE,
    CONTROL,
    finished,
    tiny_llama,
    tiny_tower,
    word_tokenizer,
)
from sae_lens_multimodal.types import Modality

_TILE_MARKER = re.compile(r"TILE_(\d+|GLOBAL)")


@final
class AyaVision(Family):
    """Aya Vision: a picture is stretched to whole tiles, which are cut apart; if there are several, the whole follows.

    Each token stands for a block of 2 x 2 patches. Attention and MLP of the language model read the same norm, so that
    there is no residual stream between them: blocks have neither `hook_resid_mid` nor `ln2`.
    """

    model_type: ClassVar[str] = "aya_vision"
    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)
    media_modules: ClassVar[tuple[str, ...]] = (VISION, PROJECTOR)
    old_paths: ClassVar[Mapping[str, str]] = OLD_PATHS
    final_norm: ClassVar[str] = f"{LANGUAGE}.norm"
    unembedding: ClassVar[str] = UNEMBEDDING
    parallel_blocks: ClassVar[bool] = True
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("CohereLabs/aya-vision-8b",),
            structure={"tile": 364, "patch_size": 14, "max_patches": 12},
        ),
        Released(
            names=("CohereLabs/aya-vision-32b",),
            structure={"tile": 364, "patch_size": 14, "max_patches": 12, "text": "cohere"},
        ),
    )

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the vision tower is of another kind, or gives tokens beside the patches.
        """
        super().__init__(config, processor)
        check_strategy(config)

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        text, vision = self.config.text_config, self.config.vision_config
        hidden = int(self.config.to_dict().get("alignment_intermediate_size", text.hidden_size))
        projector = (
            Part("hook_in", side="input", d=features_width(self.config)),
            Part("hook_pre", "linear_1", d=hidden),
            # half of it gates the other half
            Part("hook_post", "linear_2", side="input", d=hidden // 2),
            Part("hook_out", d=text.hidden_size),
        )
        return (
            *embedding_hook(text),
            *clip_vision_hooks(vision),
            *(part.at(prefix="projector.", path=PROJECTOR, tower="projector") for part in projector),
            *language_hooks(text, language_block(text)),
        )

    def markers(self) -> Mapping[int, Modality]:
        """Return the tokens around a picture, and those that name its tiles."""
        ends = {self.processor.start_of_img_token, self.processor.end_of_img_token}
        return {
            int(index): Modality.SPECIAL
            for token, index in self.processor.tokenizer.get_added_vocab().items()
            if token in ends or _TILE_MARKER.fullmatch(token)
        }

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the tokens of a picture of this size lie in it: tile by tile, then the whole picture.

        Raises:
            LayoutError: the processor's tiles are not those that the vision tower expects.
        """
        vision = self.config.vision_config
        return canvas_tokens(
            self.processor,
            width,
            height,
            side=(int(vision.image_size), int(vision.image_size)),
            patch=int(vision.patch_size),
            merge=int(self.config.downsample_factor),
            written=(int(self.processor.img_size) // int(self.processor.patch_size)) ** 2,
        )

    @classmethod
    def random_model(
        cls, seed: int = 0, tile: int = 40, patch_size: int = 4, max_patches: int = 4, text: str = "cohere2"
    ) -> tuple[Any, Any]:
        """Return a tiny Aya Vision with random weights, and its processor."""
        around = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL")
        tokenizer = word_tokenizer((*CONTROL, *around, *(f"TILE_{number}" for number in range(1, 13))))
        config = AyaVisionConfig(
            text_config=tiny_llama(tokenizer, kind=text, layer_norm_eps=1e-5),
            vision_config=SiglipVisionConfig(**tiny_tower(tile, patch_size), vision_use_head=False),
            image_token_index=tokenizer.get_vocab()["<|IMG_PATCH|>"],
            architectures=["AyaVisionForConditionalGeneration"],
        )
        processor = AyaVisionProcessor(
            GotOcr2ImageProcessorPil(size={"height": tile, "width": tile}, max_patches=max_patches),
            tokenizer,
            patch_size=patch_size,
            img_size=tile,
            downsample_factor=config.downsample_factor,
            chat_template=CHAT_TEMPLATE,
        )
        return finished(AyaVisionForConditionalGeneration(config), tokenizer, seed), processor

"""DeepSeek-VL: each picture is resized to fit a square, padded to it, and cut into patches."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sae_lens_multimodal.adapters.family import Family, ImageTokens, Released
from sae_lens_multimodal.adapters.grid import before_resize, grid_edges, whole_picture
from sae_lens_multimodal.adapters.hook_points import HookPoint, Part
from sae_lens_multimodal.adapters.modules import clip_vision_hooks, embedding_hook, language_block, language_hooks
from sae_lens_multimodal.adapters.processors import image_settings


class DeepseekVl(Family):
    """Where DeepSeek-VL's modules are, and where its tokens lie in a picture."""

    model_type = "deepseek_vl"
    media_keys = ("pixel_values",)
    media_modules = ("model.vision_model", "model.aligner")
    final_norm = "model.language_model.norm"
    unembedding = "lm_head"
    released = (Released(("deepseek-community/deepseek-vl-1.3b-chat",), {"side": 384, "patch": 16}),)

    def hook_points(self) -> Sequence[HookPoint]:
        """Name the hooks, in the order of the forward pass."""
        text, vision = self.config.text_config, self.config.vision_config
        return (
            *embedding_hook(text),
            *clip_vision_hooks(vision, "model.vision_model"),
            Part("hook_out", d=text.hidden_size).at(prefix="projector.", path="model.aligner", tower="projector"),
            *language_hooks(text, language_block(text)),
        )

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Carry the grid of patches back to the original picture."""
        vision, longest = self.config.vision_config, max(width, height)
        edges = grid_edges(vision.image_size // vision.patch_size, vision.patch_size)
        y, x = (self._before(edges, length, vision.image_size, longest) for length in (height, width))
        return whole_picture(y, x, width, height)

    def _before(self, edges: np.ndarray, length: int, side: int, longest: int) -> np.ndarray:
        resized = max(round(length * (side / longest)), image_settings(self.processor).min_size)
        return before_resize(edges - (side - resized) // 2, length, resized)

    @classmethod
    def random_model(cls, seed: int = 0, side: int = 48, patch: int = 8) -> tuple[Any, Any]:
        """Build a tiny model and its processor, for the contract test."""
        import transformers as hf

        from sae_lens_multimodal.adapters import random_models as tiny

        tokenizer = tiny.word_tokenizer()
        config = hf.DeepseekVLConfig(
            vision_config=hf.SiglipVisionConfig(**tiny.tiny_tower(side, patch), vision_use_head=False),
            text_config=tiny.tiny_llama(tokenizer),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            tie_word_embeddings=False,
            architectures=["DeepseekVLForConditionalGeneration"],
        )
        images = hf.DeepseekVLImageProcessorPil(size={"height": side, "width": side}, min_size=patch)
        count = (side // patch) ** 2
        processor = hf.DeepseekVLProcessor(images, tokenizer, tiny.CHAT_TEMPLATE, num_image_tokens=count)
        return tiny.finished(hf.DeepseekVLForConditionalGeneration(config), tokenizer, seed), processor

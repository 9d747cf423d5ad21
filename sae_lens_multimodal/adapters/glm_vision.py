"""What GLM-4.1V and GLM-4.6V share: Qwen-VL's packed patches, merged by a convolution, and a GLM with more norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from PIL import Image
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

from sae_lens_multimodal.adapters.hook_points import BlockModules, Part
from sae_lens_multimodal.adapters.processors import image_settings
from sae_lens_multimodal.adapters.qwen_vision import QwenVision, tiny_qwen, with_gated_mlp
from sae_lens_multimodal.adapters.scanning import features_for_pictures


class GlmVision(QwenVision):
    """Dynamic resolution as in Qwen2-VL. A convolution merges each block of patches to one token.

    In the language model, a norm follows attention and MLP too: `hook_attn_out` and `hook_mlp_out` are its output,
    which is what is added to the residual stream. `projector.hook_in` is after the convolution.
    """

    end_names: ClassVar[tuple[str, str]] = ("image_start_token_id", "image_end_token_id")
    embedding: ClassVar[str] = "embeddings"

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the (height, width) to which the image processor resizes a picture: it counts pixels of two frames."""
        images = image_settings(self.processor)
        found: tuple[int, int] = smart_resize(
            num_frames=images.temporal_patch_size,
            height=height,
            width=width,
            temporal_factor=images.temporal_patch_size,
            factor=int(images.patch_size) * int(images.merge_size),
            min_pixels=images.size["shortest_edge"],
            max_pixels=images.size["longest_edge"],
        )
        return found

    def process(
        self,
        messages: Sequence[Sequence[Mapping[str, Any]]],
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        padding_side: str,
    ) -> Mapping[str, Any]:
        """Return what the processor makes of prompts, and which of their tokens are pictures."""
        encoded = super().process(messages, texts, images, padding_side)
        return {**encoded, "mm_token_type_ids": (encoded["input_ids"] == self.image_token_id).long()}

    def processor_options(self) -> dict[str, Any]:
        """Leave out what the processor would work out in a way that recent versions of numpy warn of."""
        return {"return_mm_token_type_ids": False}

    def text_block(self) -> BlockModules:
        """Return the modules of a block of the language model."""
        return replace(
            super().text_block(),
            ln1_post="post_self_attn_layernorm",
            ln2_post="post_mlp_layernorm",
            # gate and the other half are one layer
            mlp_in=None,
            mlp_gated=None,
            mid="hidden_states_2",
        )

    def vision_block(self) -> BlockModules:
        """Return the modules of a block of the vision tower."""
        vision = self.config.vision_config
        return replace(with_gated_mlp(super().vision_block(), vision), mlp_width=int(vision.out_hidden_size))

    def merger_parts(self, pre: str = "gate_proj", post: str = "down_proj") -> tuple[Part, ...]:
        """Return the hooks of the projector."""
        hidden = int(self.config.vision_config.intermediate_size)
        return (
            Part("hook_in", side="input", d=self.d_model),
            Part("hook_pre", pre, d=hidden),
            Part("hook_pre_linear", "up_proj", d=hidden),
            Part("hook_post", post, side="input", d=hidden),
            Part("hook_out", d=self.d_model),
        )

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give features in place of pictures, for the model reads from their grids how many patches there are."""
        return dict(inputs) if inputs.get("pixel_values") is None else features_for_pictures(self, inputs)


def tiny_glm(
    model_class: Any,  # noqa: ANN401 - transformers' classes
    processor_class: Any,  # noqa: ANN401
    image_processor_class: Any,  # noqa: ANN401
    seed: int,
    **structure: Any,  # noqa: ANN401 - see `tiny_qwen`
) -> tuple[Any, Any]:
    """Return a small model with random weights, and its processor."""
    vision = {
        "hidden_size": 32,
        "out_hidden_size": 48,
        "intermediate_size": 40,
        "image_size": 6 * structure.get("patch_size", 4),
    }
    # both of the frames that a picture is taken for count
    sizes = {"min_pixels": 2 * 32 * 32, "max_pixels": 2 * 64 * 64} | structure
    return tiny_qwen(
        model_class,
        processor_class,
        seed,
        vision,
        image_processor_class=image_processor_class,
        end_names=GlmVision.end_names,
        **sizes,
    )

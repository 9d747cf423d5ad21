"""The PaliGemma family: one view of each picture, and a prompt that is read in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from jaxtyping import Int, Int64
from PIL import Image
from torch import Tensor

from sae_lens_multimodal.adapters.family import Family, ImageTokens, Released
from sae_lens_multimodal.adapters.grid import view_of
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
from sae_lens_multimodal.errors import PromptError


@final
class PaliGemma(Family):
    """PaliGemma and PaliGemma 2: each picture is squashed into one square view, whose patches are its tokens.

    Boxes are exact. The model knows no chat: what the user says is its prefix, in which every token sees every other,
    and an answer at the end is its suffix. Tokens are those of transformers' processor, which itself takes no prompt
    without a picture and no batch in which only some prompts have an answer.
    """

    model_type: ClassVar[str] = "paligemma"
    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)
    token_keys: ClassVar[tuple[str, ...]] = ("token_type_ids",)
    media_modules: ClassVar[tuple[str, ...]] = (VISION, PROJECTOR)
    old_paths: ClassVar[Mapping[str, str]] = OLD_PATHS
    final_norm: ClassVar[str] = f"{LANGUAGE}.norm"
    unembedding: ClassVar[str] = UNEMBEDDING
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("google/paligemma2-3b-mix-224", "google/paligemma2-10b-mix-224"),
            structure={"side": 224, "patch": 14},
        ),
        Released(
            names=("google/paligemma2-3b-mix-448", "google/paligemma2-10b-mix-448"),
            structure={"side": 448, "patch": 14},
        ),
        Released(names=("google/paligemma-3b-mix-224",), structure={"side": 224, "patch": 14, "text": "gemma"}),
    )

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the vision tower is of another kind, or gives tokens beside the patches.
        """
        super().__init__(config, processor)
        check_tower(config.vision_config, 0, "PaliGemma, which drops no token,")

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        text, vision = self.config.text_config, self.config.vision_config
        projector = (Part("hook_in", side="input", d=vision.hidden_size), Part("hook_out", d=text.hidden_size))
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
        vision = self.config.vision_config
        return view_of(image_settings(self.processor), vision.image_size, vision.patch_size).tokens(width, height)

    def position_ids(self, attention_mask: Int[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq"]:
        """Count the positions of each row from its first token, which is 1.

        When it generates, transformers adds one to all of them. The rotary embedding sees differences only.
        """
        return attention_mask.long().cumsum(-1)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Write a conversation as prefix and suffix, with `prompt_token` for each picture.

        Raises:
            PromptError: there is an answer before the end, or nothing but an answer, or a picture in an answer.
        """
        prefix, suffix = self._prefix_and_suffix(messages)
        return prefix + (suffix or "")

    def process(
        self,
        messages: Sequence[Sequence[Mapping[str, Any]]],
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        padding_side: str,
    ) -> Mapping[str, Any]:
        """Return what the processor makes of prompts, and of those that it does not take."""
        tokenizer = self.processor.tokenizer
        token = self.image_token
        rows = []
        for conversation in messages:
            prefix, suffix = self._prefix_and_suffix(conversation)
            expanded = prefix.replace(token, token * self.processor.image_seq_length)
            ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (expanded, suffix or "")]
            rows.append({"input_ids": ids[0] + ids[1], "token_type_ids": [0] * len(ids[0]) + [1] * len(ids[1])})
        # transformers' tokenizer fills up with its own numbers, and its side may be set as an argument only
        encoded = dict(tokenizer.pad(rows, padding_side=padding_side, return_tensors="pt"))
        encoded["token_type_ids"] = torch.where(encoded["attention_mask"] == 1, encoded["token_type_ids"], 0)
        pictures = [picture for row in images for picture in row]
        if pictures:
            settings = {**self.processor.images_kwargs, "return_tensors": "pt"}
            encoded["pixel_values"] = self.processor.image_processor(pictures, **settings)["pixel_values"]
        return encoded

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `_random`
        """Return a tiny PaliGemma 2 with random weights, and its processor."""
        return _random(seed, **structure)

    def _prefix_and_suffix(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
        """Write the prompt as the processor would, the beginning after the last picture, and the answer with its end.

        Raises:
            PromptError: see `chat_text`.
        """
        *before, last = messages
        answer = last if last["role"] == "assistant" else None
        asked = before if answer is not None else messages
        if not asked or any(message["role"] == "assistant" for message in asked):
            raise PromptError(
                f"got {len(messages)} messages by {', '.join(str(message['role']) for message in messages)}; PaliGemma "
                "knows no conversations: expected a question, and at most one answer at the end."
            )
        tokenizer = self.processor.tokenizer
        prefix = "".join(map(self._written, (part for message in asked for part in message["content"])))
        at = prefix.rfind(self.image_token)
        at = 0 if at < 0 else at + len(self.image_token)
        prefix = f"{prefix[:at]}{tokenizer.bos_token}{prefix[at:]}\n"
        if answer is None:
            return prefix, None
        if any(part["type"] == "image" for part in answer["content"]):
            raise PromptError("got a picture in an answer; expected pictures in questions only.")
        return prefix, "".join(map(self._written, answer["content"])) + tokenizer.eos_token

    def _written(self, part: Mapping[str, Any]) -> str:
        return self.image_token if part["type"] == "image" else str(part["text"])


def _random(seed: int, side: int = 48, patch: int = 8, text: str = "gemma2") -> tuple[Any, Any]:
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
    )

    from sae_lens_multimodal.adapters.random_models import CONTROL, finished, tiny_llama, tiny_tower, word_tokenizer

    images = SiglipImageProcessorPil(size={"height": side, "width": side}, image_seq_length=(side // patch) ** 2)
    # it adds a thousand tokens of its own to the tokenizer
    processor = PaliGemmaProcessor(images, word_tokenizer())
    tokenizer = processor.tokenizer
    more = {"query_pre_attn_scalar": 12, "sliding_window": 64} if text == "gemma2" else {}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**{**tiny_tower(side, patch), "vision_use_head": False, "projection_dim": 48}),
        text_config=tiny_llama(tokenizer, kind=text, head_dim=12, **more),
        image_token_index=CONTROL.index("<image>"),
        projection_dim=48,
        architectures=["PaliGemmaForConditionalGeneration"],
    )
    return finished(PaliGemmaForConditionalGeneration(config), tokenizer, seed), processor

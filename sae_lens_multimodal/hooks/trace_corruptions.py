"""Ways to corrupt a prompt so that it no longer calls for its answer: in the text, in the picture, or by noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, final

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.encode import special_ids
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.adapters.prompts import parse_conversation
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.attribute import chosen_tokens, encoded
from sae_lens_multimodal.hooks.metrics import target_ids
from sae_lens_multimodal.hooks.places import Corners
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.selection import Tokens
from sae_lens_multimodal.types import Conversation


@dataclass(frozen=True)
class Corrupted:
    """A corrupted prompt of as many tokens as the clean one."""

    batch: EncodedBatch
    noise: Float[Tensor, "1 seq d_model"] | None = None
    """Added to the residual stream before the first block."""


class Corruption(ABC):
    """One way to corrupt a prompt. `name` says how, for people."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What is done."""

    @abstractmethod
    def apply(self, model: VisionLanguageModel, prompt: Conversation | None, batch: EncodedBatch) -> Corrupted:
        """Corrupt a prompt.

        Args:
            model: the model.
            prompt: the clean conversation; None where only the encoded prompt is known.
            batch: the clean prompt, encoded.
        """


@final
@dataclass(frozen=True)
class ReplaceTokens(Corruption):
    """Other words in place of the constraint's, as arXiv 2406.04236 does."""

    tokens: Tokens
    """Which tokens: positions such as `constraint.positions(...)`, or any other choice of text."""
    text: str | None = None
    """What to write there: as many tokens, or one that is repeated; None for random ordinary tokens."""
    seed: int = 0
    """Of the random tokens."""

    @property
    def name(self) -> str:
        """What is done."""
        return f"replaced by {self.text!r}" if self.text is not None else f"replaced by random tokens ({self.seed})"

    def apply(self, model: VisionLanguageModel, prompt: Conversation | None, batch: EncodedBatch) -> Corrupted:
        """Write other token ids.

        Raises:
            SelectionError: a token is a picture's, or the text has another number of tokens.
        """
        del prompt
        mask = chosen_tokens(model, batch, batch, self.tokens)
        if bool((mask & (batch.layout.image_index >= 0)).any()):
            raise SelectionError("Got tokens of a picture to replace; expected text. Use OtherImage or BlankRegion.")
        count = int(mask.sum())
        ids = batch["input_ids"].clone()
        old = ids[mask.to(ids.device)]
        if self.text is None:
            new = _random_tokens(model, old.tolist(), self.seed)
        else:
            new = target_ids(model, leading_space(model.tokenizer, old.tolist()) + self.text)
            new = new * count if len(new) == 1 else new
        if len(new) != count:
            raise SelectionError(
                f"Got {self.text!r}, which has {len(new)} tokens, for {count} tokens; expected as many, or one that is "
                "repeated, so that both prompts are of one length."
            )
        ids[mask.to(ids.device)] = torch.as_tensor(new, dtype=ids.dtype, device=ids.device)
        return Corrupted(replace(batch, inputs={**batch.inputs, "input_ids": ids}))


def leading_space(tokenizer: Any, tokens: Sequence[int]) -> str:  # noqa: ANN401 - a tokenizer of transformers
    """The blanks that the first of some tokens holds before its word: other words in its place need them too.

    Byte-level vocabularies know " cat" and "cat" as two tokens; others keep blanks apart, or add them by themselves.
    """
    text = str(tokenizer.decode([tokens[0]])) if tokens else ""
    return text[: len(text) - len(text.lstrip())] if text.strip() else ""


def _random_tokens(model: VisionLanguageModel, old: Sequence[int], seed: int) -> list[int]:
    taken = {*special_ids(model.tokenizer), model.family.image_token_id}
    ordinary = [one for one in range(len(model.tokenizer)) if one not in taken]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for token in old:
        others = [one for one in ordinary if one != token]
        found.append(others[int(torch.randint(len(others), (1,), generator=generator))])
    return found


class _PictureCorruption(Corruption):
    """What changes one picture of the prompt and leaves its size."""

    image: int

    @abstractmethod
    def changed(self, picture: Image.Image) -> Image.Image:
        """Return the corrupted picture."""

    def apply(self, model: VisionLanguageModel, prompt: Conversation | None, batch: EncodedBatch) -> Corrupted:
        """Encode the prompt with the changed picture.

        Raises:
            ConfigError: only an encoded prompt is there, from which no picture can be exchanged.
            SelectionError: the prompt has no such picture.
        """
        if prompt is None:
            raise ConfigError(f"Got an encoded prompt; {type(self).__name__} needs the conversation it was made from.")
        parsed = parse_conversation(prompt)
        if not 0 <= self.image < len(parsed.images):
            raise SelectionError(f"Got image {self.image}; the prompt has {len(parsed.images)} pictures, from 0.")
        pictures = list(parsed.images)
        pictures[self.image] = self.changed(pictures[self.image])
        return Corrupted(encoded(model, with_pictures(prompt, pictures)).to(batch["input_ids"].device))


@final
@dataclass(frozen=True)
class OtherImage(_PictureCorruption):
    """Another picture, brought to the size of the one it replaces."""

    picture: Image.Image = field(repr=False)
    image: int = 0
    """Which picture of the prompt."""

    @property
    def name(self) -> str:
        """What is done."""
        return "another picture"

    def changed(self, picture: Image.Image) -> Image.Image:
        """Return the other picture."""
        other = self.picture.convert("RGB")
        return other if other.size == picture.size else other.resize(picture.size)


@final
@dataclass(frozen=True)
class BlankRegion(_PictureCorruption):
    """A region of the picture painted over."""

    box: Corners
    """`x0, y0, x1, y1` in pixels of the picture."""
    image: int = 0
    """Which picture of the prompt."""
    fill: tuple[int, int, int] | None = None
    """Red, green and blue, 0 to 255; None for the mean of the rest of the picture."""

    @property
    def name(self) -> str:
        """What is done."""
        return "a region painted over"

    def changed(self, picture: Image.Image) -> Image.Image:
        """Return the picture with the region in one colour."""
        box = _whole_box(self.box, picture)
        blank = picture.copy()
        blank.paste(self.fill or _mean_outside(picture, box), box)
        return blank


@final
@dataclass(frozen=True)
class ExchangeRegions(_PictureCorruption):
    """Two regions of the picture in each other's place."""

    box: Corners
    """`x0, y0, x1, y1` in pixels of the picture."""
    other: Corners
    """The other region, brought to the size of the first; both must not overlap."""
    image: int = 0
    """Which picture of the prompt."""

    @property
    def name(self) -> str:
        """What is done."""
        return "two regions exchanged"

    def changed(self, picture: Image.Image) -> Image.Image:
        """Return the picture with both regions exchanged."""
        one, two = _whole_box(self.box, picture), _whole_box(self.other, picture)
        if one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]:
            raise SelectionError(f"Got the regions {one} and {two}, which overlap; expected two apart.")
        swapped = picture.copy()
        swapped.paste(picture.crop(two).resize((one[2] - one[0], one[3] - one[1])), one)
        swapped.paste(picture.crop(one).resize((two[2] - two[0], two[3] - two[1])), two)
        return swapped


@final
@dataclass(frozen=True)
class Counterfactual(Corruption):
    """Another prompt that is as natural and has another answer, so that a trace can be run both ways."""

    prompt: Conversation = field(repr=False)

    @property
    def name(self) -> str:
        """What is done."""
        return "a counterfactual prompt"

    def apply(self, model: VisionLanguageModel, prompt: Conversation | None, batch: EncodedBatch) -> Corrupted:
        """Encode the other prompt."""
        del prompt
        return Corrupted(encoded(model, self.prompt).to(batch["input_ids"].device))


@final
@dataclass(frozen=True)
class Noise(Corruption):
    """Gaussian noise on what enters the first block."""

    tokens: Tokens
    """Which tokens; those of pictures too."""
    scale: float = 3.0
    """Standard deviations of the values at these tokens."""
    seed: int = 0

    @property
    def name(self) -> str:
        """What is done."""
        return f"noise of {self.scale:g} standard deviations (seed {self.seed})"

    def apply(self, model: VisionLanguageModel, prompt: Conversation | None, batch: EncodedBatch) -> Corrupted:
        """Draw the noise.

        Raises:
            ConfigError: the scale is not above 0.
        """
        del prompt
        if not self.scale > 0:
            raise ConfigError(f"Got scale={self.scale!r}; expected more than 0.")
        mask = chosen_tokens(model, batch, batch, self.tokens)
        name = "blocks.0.hook_resid_pre"
        value = read_activations(model, batch, name)[name]
        size = float(value[mask.to(value.device)].float().std())
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(value.shape, generator=generator) * size * self.scale
        return Corrupted(batch, (noise * mask[..., None]).to(value))


def with_pictures(prompt: Conversation, pictures: Sequence[Image.Image]) -> Conversation:
    """The same conversation with other pictures, in order of appearance."""
    left = iter(pictures)

    def part(one: Any) -> Any:  # noqa: ANN401 - a part of a message
        if isinstance(one, Mapping) and one.get("type") == "image":
            return {"type": "image", "image": next(left)}
        return one

    messages = [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [part(p) for p in message["content"]]}
        for message in prompt
    ]
    return cast("Conversation", messages)


def _whole_box(box: Corners, picture: Image.Image) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (round(float(value)) for value in box)
    if not (0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height):
        raise SelectionError(
            f"Got the box {tuple(box)}; expected x0 < x1 and y0 < y1 within the {picture.width} x {picture.height} "
            "pixels of the picture."
        )
    return x0, y0, x1, y1


def _mean_outside(picture: Image.Image, box: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """The mean colour of everything but a box."""
    values = np.asarray(picture.convert("RGB"), dtype=float)
    outside = np.ones(values.shape[:2], dtype=bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    mean = values[outside].mean(0) if outside.any() else values.reshape(-1, 3).mean(0)
    red, green, blue = (round(float(one)) for one in mean)
    return red, green, blue

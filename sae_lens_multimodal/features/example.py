"""What a consumer of a feature store gets: one feature on one prompt, with its tokens, layout and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64
from PIL import Image

from sae_lens_multimodal.adapters.layout import TokenLayout, View
from sae_lens_multimodal.features.schema import Kind, ModalityName
from sae_lens_multimodal.types import Modality

IMAGE_MARK = "<image>"
"""Stands for all tokens of a picture where text is shown."""


class TextWindow(NamedTuple):
    """A stretch of a prompt's text around tokens where a feature fires."""

    tokens: list[str]
    activations: Float32[np.ndarray, "w"]
    """Of each token; 0 for a picture, which is shown as one `IMAGE_MARK`."""
    positions: Int64[np.ndarray, "w"]
    """Of each token in the prompt; of a picture, its first token."""

    @property
    def max_activation(self) -> float:
        """The strongest activation inside."""
        return float(self.activations.max(initial=0.0))


@dataclass(frozen=True, eq=False)
class StoredPrompt:
    """One prompt as the model read it. Pictures are opened when first asked for."""

    prompt_id: int
    """Index of its row in the dataset."""
    messages_json: str
    tokens: list[str]
    layout: TokenLayout
    """Of one row."""
    image_ids: list[str]
    open_image: Callable[[str], Image.Image] = field(repr=False)
    near_ids: list[str] = field(default_factory=list)
    """Of each picture the content name of the first one of the harvest that looked like it: its own, mostly."""

    @cached_property
    def images(self) -> list[Image.Image]:
        """Pictures in the order of the prompt, RGB, as the model saw them before its own resizing."""
        return [self.open_image(image_id) for image_id in self.image_ids]

    @cached_property
    def messages(self) -> list[dict[str, Any]]:
        """The chat messages; a picture is the part `{"type": "image"}`."""
        messages: list[dict[str, Any]] = json.loads(self.messages_json)
        return messages

    @property
    def text(self) -> str:
        """The conversation as plain text, one line a message."""
        return "\n".join(f"{message.get('role', '')}: {_plain(message.get('content'))}" for message in self.messages)

    @cached_property
    def modality(self) -> Int64[np.ndarray, "seq"]:
        """`Modality` of every token."""
        return self.layout.modality[0].numpy().astype(np.int64)


def _plain(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = [part if isinstance(part, dict) else {"text": str(part)} for part in content]
    return " ".join(IMAGE_MARK if part.get("type") == "image" else str(part.get("text", "")) for part in parts)


@dataclass(frozen=True, eq=False)
class Example:
    """One feature on one prompt: where it fires, and how strongly.

    Only image and text tokens count: newline, special and padding tokens hold 0 whatever the feature does there.
    """

    feature: int
    kind: Kind
    modality: ModalityName
    """Whose list it is in: ranked, drawn or silent by its activations on tokens of this modality."""
    rank: int
    """Place in its list, from 0."""
    quantile: float | None
    """Of an ordinary example: about which share of the prompts that fire in this modality fire more weakly."""
    max_image: float
    max_text: float
    mean_image: float
    """Mean over all image tokens of the prompt, those without activation included; 0 without image tokens."""
    mean_text: float
    positions: Int64[np.ndarray, "n"]
    """Tokens where the feature fires, ascending. Of a silent example none are kept, though `max_image` or `max_text`
    may say that the feature fires on the other modality."""
    values: Float32[np.ndarray, "n"]
    prompt: StoredPrompt = field(repr=False)

    @property
    def prompt_id(self) -> int:
        """Index of the prompt's row in the dataset."""
        return self.prompt.prompt_id

    @property
    def tokens(self) -> list[str]:
        """Every token of the prompt, as text."""
        return self.prompt.tokens

    @property
    def layout(self) -> TokenLayout:
        """Where every token lies, one row."""
        return self.prompt.layout

    @property
    def images(self) -> list[Image.Image]:
        """The prompt's pictures."""
        return self.prompt.images

    @property
    def image_ids(self) -> list[str]:
        """Content names of the pictures; equal pictures have equal names across prompts."""
        return self.prompt.image_ids

    @property
    def pictures(self) -> frozenset[str]:
        """Content names of the pictures and of those that they look like; nearly the same picture shares one."""
        return frozenset((*self.prompt.image_ids, *self.prompt.near_ids))

    @property
    def text(self) -> str:
        """The conversation as plain text."""
        return self.prompt.text

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat messages, without pixels."""
        return self.prompt.messages

    @property
    def max_activation(self) -> float:
        """The strongest activation on any image or text token."""
        return max(self.max_image, self.max_text)

    @property
    def mean_activation(self) -> float:
        """Mean over all image and text tokens, those without activation included."""
        n_kept = int((self._is(Modality.IMAGE) | self._is(Modality.TEXT)).sum())
        return float(self.values.sum() / n_kept) if n_kept else 0.0

    @cached_property
    def activations(self) -> Float32[np.ndarray, "seq"]:
        """Activation on every token of the prompt."""
        dense = np.zeros(len(self.prompt.tokens), dtype=np.float32)
        dense[self.positions] = self.values
        return dense

    def _is(self, modality: Modality) -> Bool[np.ndarray, "seq"]:
        return np.asarray(self.prompt.modality == modality.value)

    @property
    def image_values(self) -> Float32[np.ndarray, "seq"]:
        """Activation on every token of the prompt, with 0 on all but image tokens."""
        return np.where(self._is(Modality.IMAGE), self.activations, np.float32(0))

    @property
    def text_values(self) -> Float32[np.ndarray, "seq"]:
        """Activation on every token of the prompt, with 0 on all but text tokens."""
        return np.where(self._is(Modality.TEXT), self.activations, np.float32(0))

    @property
    def image_tokens_active(self) -> Int64[np.ndarray, "n"]:
        """Positions of the image tokens where the feature fires, in all pictures."""
        return np.flatnonzero(self.image_values > 0)

    def tokens_active_in(self, image: int) -> Int64[np.ndarray, "n"]:
        """Those of `image_tokens_active` in one picture, as `layout.crop` and `layout.union_box` take them."""
        of_picture = self.layout.image_index[0].numpy() == image
        return np.flatnonzero((self.image_values > 0) & of_picture)

    @property
    def text_tokens_active(self) -> Int64[np.ndarray, "n"]:
        """Positions of the text tokens where the feature fires."""
        return np.flatnonzero(self.text_values > 0)

    @property
    def best_image(self) -> int | None:
        """Which picture of the prompt holds the strongest image activation; None where it fires in none."""
        values = self.image_values
        if not (values > 0).any():
            return None
        return int(self.layout.image_index[0, int(values.argmax())])

    def heatmap(self, image: int = 0, view: View = "finest") -> Float32[np.ndarray, "h w"]:
        """Activation over the pixels of one picture, by `TokenLayout.heatmap`."""
        return self.layout.heatmap(self.image_values, row=0, image=image, view=view)

    def text_windows(self, context: int = 12) -> list[TextWindow]:
        """Stretches of text around the tokens that fire, strongest first; windows that touch are one.

        Args:
            context: Tokens shown on either side. A picture counts as one token, shown as `IMAGE_MARK`.
        """
        line = self._readable_positions()
        firing = np.flatnonzero(self.text_values[line] > 0)
        windows = [self._window(line[start:stop]) for start, stop in _spans(firing, context, len(line))]
        return sorted(windows, key=lambda window: -window.max_activation)

    def _readable_positions(self) -> Int64[np.ndarray, "n"]:
        """Positions of text and special tokens, and of the first token of every run that belongs to a picture."""
        pictured = self._is(Modality.IMAGE) | self._is(Modality.NEWLINE)
        starts = pictured & ~np.concatenate([[False], pictured[:-1]])
        written = ~pictured & ~self._is(Modality.PADDING)
        return np.flatnonzero(written | starts)

    def _window(self, positions: Int64[np.ndarray, "w"]) -> TextWindow:
        written = (self._is(Modality.TEXT) | self._is(Modality.SPECIAL))[positions]
        tokens = [self.tokens[p] if shown else IMAGE_MARK for p, shown in zip(positions, written, strict=True)]
        return TextWindow(tokens, self.text_values[positions], positions)


def _spans(firing: Int64[np.ndarray, "n"], context: int, length: int) -> list[tuple[int, int]]:
    """Merge `context` places either side of each index into half-open spans within `length`.

    >>> _spans(np.array([3, 5, 20]), 2, 21)
    [(1, 8), (18, 21)]
    """
    spans: list[tuple[int, int]] = []
    for index in firing.tolist():
        start, stop = max(0, index - context), min(length, index + context + 1)
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
    return spans

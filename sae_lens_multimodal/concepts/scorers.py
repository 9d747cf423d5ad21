"""What texts of concepts are scored against: the pictures of their rows, and the captions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from sae_lens_multimodal.concepts.encoders import TokenEncoder
from sae_lens_multimodal.concepts.ground import prompts_at
from sae_lens_multimodal.concepts.measures import bert_score, clip_score
from sae_lens_multimodal.concepts.states import ConceptStates
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.data.stream import open_dataset
from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from sae_lens_multimodal.autointerp.embedding import TextImageEmbedding

logger = logging.getLogger(__name__)

Scorer: TypeAlias = "Callable[[Sequence[str]], NDArray[np.float64]]"
"""One text a state to one score a state; NaN where a state has nothing to compare with, 0 where it has no text."""
_PICTURES = 32


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What texts are compared by, and where the pictures are."""

    clip: TextImageEmbedding | str | Path | None
    bert: TokenEncoder | str | Path | None
    bert_layer: int | None
    device: str
    dataset: str | Path | Rows | None
    split: str
    image_folder: str | Path | None

    def scorers(self, states: ConceptStates) -> tuple[dict[str, Scorer], dict[str, str]]:
        """Give what can be measured on some states, and why the rest cannot.

        Raises:
            ConfigError: CLIPScore is wanted without the dataset.
            ModelLoadError: an encoder does not load.
        """
        found: dict[str, Scorer] = {}
        skipped: dict[str, str] = {}
        if self.clip is None:
            skipped["clip_score"] = "no CLIP or SigLIP was given to compare words with pictures"
        else:
            clip = self._clip_scorer(states)
            if clip is None:
                skipped["clip_score"] = "no picture of these rows can be opened"
            else:
                found["clip_score"] = clip
        if self.bert is None:
            skipped["bert_score"] = "no text encoder was given to compare words with captions"
        else:
            found["bert_score"] = self._bert_scorer(self.bert, states)
        return found, skipped

    def _clip_scorer(self, states: ConceptStates) -> Scorer | None:
        from sae_lens_multimodal.autointerp.embedding import TextImageEmbedding

        if self.clip is None or self.dataset is None:
            raise ConfigError("CLIPScore needs the pictures; give dataset=..., what the states were gathered from.")
        space = self.clip
        if not isinstance(space, TextImageEmbedding):
            space = TextImageEmbedding.load(space, device=self.device)
        rows = open_dataset(self.dataset, split=self.split)
        of_row = _vectors(space, _pictures(rows, states.rows, self.image_folder))
        missing = sum(row not in of_row for row in states.rows)
        if missing:
            logger.warning(
                "%d of %d states have no picture that opens; CLIPScore leaves them out", missing, len(states)
            )
        return clip_scorer(space, of_row, states.rows) if of_row else None

    def _bert_scorer(self, bert: TokenEncoder | str | Path, states: ConceptStates) -> Scorer:
        encoder = bert
        if not isinstance(encoder, TokenEncoder):
            encoder = TokenEncoder.load(encoder, layer=self.bert_layer, device=self.device)
        references = encoder.tokens(states.captions)

        def score(texts: Sequence[str]) -> NDArray[np.float64]:
            pairs = zip(encoder.tokens(texts), references, strict=True)
            return np.array([bert_score(one, other).f1 for one, other in pairs], dtype=np.float64)

        return score


def _pictures(dataset: Rows, rows: Sequence[int], image_folder: str | Path | None) -> Iterator[tuple[int, Image.Image]]:
    for prompt in prompts_at(dataset, rows, image_folder=image_folder):
        for image in prompt.images:
            yield prompt.row, image


def _vectors(
    space: TextImageEmbedding, pictures: Iterator[tuple[int, Image.Image]]
) -> dict[int, list[NDArray[np.float64]]]:
    """The vectors of each row's pictures; only a few pictures are held at a time."""
    found: dict[int, list[NDArray[np.float64]]] = {}
    while waiting := list(islice(pictures, _PICTURES)):
        for (row, _), vector in zip(waiting, space.images([image for _, image in waiting]), strict=True):
            found.setdefault(row, []).append(vector)
    return found


def clip_scorer(
    space: TextImageEmbedding, of_row: Mapping[int, Sequence[NDArray[np.float64]]], rows: Sequence[int]
) -> Scorer:
    """CLIPScore of a state's text with its row's pictures; their mean where there are several.

    Args:
        space: the encoder of texts.
        of_row: the vectors of the pictures of rows.
        rows: the row of each state.
    """

    def score(texts: Sequence[str]) -> NDArray[np.float64]:
        spoken = [index for index, text in enumerate(texts) if text.strip()]
        vectors = dict(zip(spoken, space.texts([texts[index] for index in spoken]), strict=True)) if spoken else {}
        found = np.full(len(texts), np.nan)
        for index, row in enumerate(rows):
            if row in of_row:
                pictures = np.stack(of_row[row])
                text = vectors.get(index)
                own = 0.0 if text is None else clip_score(pictures, np.broadcast_to(text, pictures.shape)).mean()
                found[index] = own
        return found

    return score

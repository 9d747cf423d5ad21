"""Where in pictures concepts are: the rows on which they are strongest, and the patches of their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import datasets
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.concepts.dictionary import ConceptDictionary
from sae_lens_multimodal.data.batches import encoded_batches
from sae_lens_multimodal.data.raw import Ordered, RawRow, raw_rows
from sae_lens_multimodal.data.rows import Prompt
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.data.stream import build_prompt, open_dataset
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.types import Box


class Patch(NamedTuple):
    """A patch of a picture on which a concept is active."""

    image: int
    """Which picture of the prompt."""
    box: Box
    """In pixels of the original."""
    activation: float


@dataclass(frozen=True)
class Grounding:
    """A row on which a concept is strong."""

    concept: int
    row: int
    """Of the dataset."""
    activation: float
    """At the word."""
    images: list[Image.Image] = field(repr=False)
    patches: list[Patch] = field(repr=False)
    """Where in the pictures it is active, strongest first."""


def prompts_at(dataset: Rows, rows: Sequence[int], *, image_folder: str | Path | None = None) -> Iterator[Prompt]:
    """Open single rows of a dataset as prompts, one after the other; those that cannot be used are left out.

    A streamed dataset is read up to the last of them.
    """
    folder = None if image_folder is None else Path(image_folder)
    wanted = sorted(set(rows))
    if isinstance(dataset, datasets.IterableDataset):
        left = set(wanted)
        chosen = (raw for raw in raw_rows(dataset) if raw.number in left)
        pairs: Iterator[tuple[int, RawRow]] = ((raw.number, raw) for raw in islice(chosen, len(wanted)))
    else:
        pairs = zip(wanted, raw_rows(Ordered(dataset, wanted)), strict=True)
    for row, raw in pairs:
        prompt = build_prompt(row, raw, folder)
        if isinstance(prompt, Prompt):
            yield prompt


def rows_at(dataset: Rows, rows: Sequence[int], *, image_folder: str | Path | None = None) -> dict[int, Prompt]:
    """Open single rows of a dataset as prompts, by their numbers; those that cannot be used are left out."""
    return {prompt.row: prompt for prompt in prompts_at(dataset, rows, image_folder=image_folder)}


def ground_concepts(
    model: VisionLanguageModel,
    dictionary: ConceptDictionary,
    dataset: str | Path | Rows,
    *,
    concepts: Sequence[int] | None = None,
    n_rows: int = 5,
    n_patches: int = 8,
    batch_size: int = 8,
    split: str = "train",
    image_folder: str | Path | None = None,
) -> dict[int, list[Grounding]]:
    """Show concepts in pictures: the rows of largest activation, and the patches whose own states hold the concept.

    For statistics over a whole dataset and for reports, harvest `dictionary.to_sae()` instead.

    Args:
        model: The model.
        dictionary: Its concepts, found on states that `gather_states` gave.
        dataset: What the states were gathered from.
        concepts: Which; None for all.
        n_rows: Rows to a concept.
        n_patches: Patches to a row.
        batch_size: Prompts a forward pass.
        split: Split of a dataset given by name.
        image_folder: Where relative picture paths begin.

    Raises:
        ConfigError: the dictionary does not know its hook or its rows.
        FeatureError: there is no such concept.
    """
    if dictionary.hook_name is None or not dictionary.rows:
        raise ConfigError("The dictionary does not know its hook and rows; find it on what gather_states returns.")
    chosen = range(dictionary.k) if concepts is None else concepts
    top = {concept: dictionary.top_states(concept, n_rows) for concept in chosen}
    rows = [row for pairs in top.values() for row, _ in pairs]
    prompts = rows_at(open_dataset(dataset, split=split), rows, image_folder=image_folder)
    of_row = _patches(model, dictionary, prompts, batch_size) if prompts else {}
    return {
        concept: [
            Grounding(concept, row, value, prompts[row].images, _strongest(of_row.get(row, []), concept, n_patches))
            for row, value in pairs
            if row in prompts
        ]
        for concept, pairs in top.items()
    }


_Patches = list[tuple[int, Box, list[float]]]


def _strongest(patches: _Patches, concept: int, n: int) -> list[Patch]:
    found = [Patch(image, box, values[concept]) for image, box, values in patches if values[concept] > 0]
    return sorted(found, key=lambda patch: -patch.activation)[:n]


def _patches(
    model: VisionLanguageModel, dictionary: ConceptDictionary, prompts: Mapping[int, Prompt], batch_size: int
) -> dict[int, _Patches]:
    """All concepts' activations on every image token of some prompts."""
    found: dict[int, _Patches] = {}
    hook = str(dictionary.hook_name)
    for batch in encoded_batches(model, prompts.values(), batch_size=batch_size):
        values = read_activations(model, batch.batch.to(model.device), hook)[hook].flatten(2)
        layout = batch.batch.layout
        for index, prompt in enumerate(batch.prompts):
            at = layout.is_image[index]
            codes = dictionary.encode(values[index][at.to(values.device)].float()).tolist()
            boxes = [Box(*box) for box in layout.boxes[index][at].tolist()]
            found[prompt.row] = list(zip(layout.image_index[index][at].tolist(), boxes, codes, strict=True))
    return found

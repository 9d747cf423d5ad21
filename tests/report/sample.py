"""A hand-made feature store with real pictures: what the report's tests look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.writer import StoreWriter
from sae_lens_multimodal.scenes.world import Scene, make_scene
from sae_lens_multimodal.types import Modality

GRID = 12
"""Patches a side."""
COLOURS = ("red", "green", "blue", "yellow")
EVIL = "<script>window.hacked = true</script>"
EVIL_ATTRIBUTE = '" onmouseover="window.hacked = true'


@dataclass(frozen=True)
class Prompt:
    """One prompt of the sample."""

    scene: Scene | None
    tokens: list[str]
    layout: TokenLayout


def _layout(modality: list[int], boxes: list[list[float]], sizes: tuple[tuple[int, int], ...]) -> TokenLayout:
    kinds = torch.tensor([modality], dtype=torch.int8)
    is_image = (kinds == Modality.IMAGE) | (kinds == Modality.NEWLINE)
    return TokenLayout(
        modality=kinds,
        boxes=torch.tensor([boxes]),
        image_index=torch.where(is_image, 0, -1),
        tile=torch.where(is_image, 0, -1),
        image_sizes=(sizes,),
    )


def picture_prompt(seed: int) -> Prompt:
    """A scene seen through a grid of patches, and a caption."""
    scene = make_scene(seed)
    width, height = scene.image.size
    tokens, modality, boxes = ["<s>"], [Modality.SPECIAL], [[float("nan")] * 4]
    for row in range(GRID):
        for column in range(GRID):
            tokens.append("<image>")
            modality.append(Modality.IMAGE)
            corner = [column * width / GRID, row * height / GRID, (column + 1) * width / GRID, (row + 1) * height / GRID]
            boxes.append(corner)
    words = " this is " + " and ".join("a " + item.phrase for item in scene.objects) + " ."
    for word in words.split(" ")[1:]:
        tokens.append(" " + word)
        modality.append(Modality.TEXT)
        boxes.append([float("nan")] * 4)
    return Prompt(scene, tokens, _layout(modality, boxes, (scene.image.size,)))


def text_prompt(words: list[str]) -> Prompt:
    """A prompt without a picture."""
    tokens = ["<s>", *words]
    modality = [Modality.SPECIAL] + [Modality.TEXT] * len(words)
    return Prompt(None, tokens, _layout(modality, [[float("nan")] * 4] * len(tokens), ()))


def activations(prompt: Prompt, colour: str, strength: float) -> np.ndarray:
    """Activations of a feature that responds to a colour: on patches of it, and on its word."""
    values = np.zeros(len(prompt.tokens), dtype=np.float32)
    if prompt.scene is not None:
        for item in prompt.scene.objects:
            if item.colour == colour:
                boxes = prompt.layout.boxes[0].numpy()
                for position in np.flatnonzero(prompt.layout.is_image[0].numpy()):
                    x0, y0, x1, y1 = boxes[position].round().astype(int)
                    values[position] = strength * item.mask[y0:y1, x0:x1].mean()
    for position, token in enumerate(prompt.tokens):
        if token.strip() == colour:
            values[position] = 0.6 * strength
    return np.where(values > 0.05, values, 0).astype(np.float32)


def write_store(folder: Path, *, n_pictures: int = 24) -> FeatureStore:
    """Write a store: features 0 to 3 for colours, 7 for a word of text that is full of markup."""
    writer = StoreWriter(folder, d_sae=16, hook_name="blocks.2.hook_resid_post", settings={"model_name": "sample"})
    prompts = {seed: picture_prompt(seed) for seed in range(n_pictures)}
    prompts[900] = text_prompt([" look", " here", EVIL, " now", EVIL_ATTRIBUTE, " and", " there"])
    for seed, prompt in prompts.items():
        images = [] if prompt.scene is None else [prompt.scene.image]
        writer.add_prompt(seed, tokens=prompt.tokens, layout=prompt.layout, images=images)
    for feature, colour in enumerate(COLOURS):
        _add_lists(writer, feature, {seed: activations(p, colour, 8.0 + feature) for seed, p in prompts.items()})
    values = np.zeros(len(prompts[900].tokens), dtype=np.float32)
    values[[3, 5]] = 4.0, 2.5
    writer.add_example(7, prompt_id=900, activations=values, modality="text")
    return writer.finish()


def _add_lists(writer: StoreWriter, feature: int, values: dict[int, np.ndarray]) -> None:
    firing = sorted((seed for seed, row in values.items() if row.any()), key=lambda seed: -values[seed].max())
    for seed in firing[:6]:
        writer.add_example(feature, prompt_id=seed, activations=values[seed], kind="top", modality="image")
        writer.add_example(feature, prompt_id=seed, activations=values[seed], kind="top", modality="text")
    for seed in firing[6:10]:
        writer.add_example(feature, prompt_id=seed, activations=values[seed], kind="ordinary", modality="image")
    for seed in [seed for seed, row in values.items() if not row.any()][:6]:
        writer.add_example(feature, prompt_id=seed, activations=values[seed], kind="silent", modality="image")

"""A feature store whose features are known: colours in scenes, on the real layout of the tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from sae_lens import SAE, StandardSAEConfig

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.judges import JudgeRequest
from sae_lens_multimodal.features.schema import Kind, ModalityName
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.writer import StoreWriter
from sae_lens_multimodal.scenes.asking import draw_objects, text_context
from sae_lens_multimodal.scenes.questions import COMMON_QUESTION, MARKS_QUESTION, NAME_QUESTION
from sae_lens_multimodal.scenes.render import COLOUR_RGB
from sae_lens_multimodal.scenes.world import Scene, make_scene

Values: TypeAlias = "np.ndarray[Any, Any]"
COLOURS = ("red", "green", "blue", "yellow")
"""Features 0 to 3 fire on patches of these colours."""
TEXT_FEATURE = 4
"""Fires on the word "red" only."""
N_SCENES, N_TEXTS = 90, 60
HOOK = "blocks.2.hook_resid_post"
LAST_HOOK = "blocks.5.hook_resid_post"


def write_store(folder: Path, model: VisionLanguageModel) -> FeatureStore:
    """Write the store."""
    writer = StoreWriter(folder, d_sae=16, hook_name=HOOK)
    scenes = {seed: make_scene(seed) for seed in range(N_SCENES)}
    values: dict[int, dict[int, Values]] = {feature: {} for feature in range(len(COLOURS))}
    for seed, scene in scenes.items():
        question = "what is in the picture ?"
        batch = model.encode(prompt_about(scene.image, question))
        tokens = model.token_strings(batch["input_ids"][0])
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        writer.add_prompt(seed, tokens=tokens, layout=batch.layout.row(0), images=[scene.image], messages=messages)
        boxes = batch.layout.boxes[0].numpy()
        for feature, colour in enumerate(COLOURS):
            values[feature][seed] = patch_activations(scene, colour, boxes, strength=4.0 + seed % 7)
    for feature, rows in values.items():
        _add_lists(writer, feature, "image", rows)
    _add_lists(writer, TEXT_FEATURE, "text", _text_prompts(writer, model))
    return writer.finish()


def prompt_about(picture: Image.Image, text: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def patch_activations(scene: Scene, colour: str, boxes: Values, *, strength: float) -> Values:
    """Fire on every patch by how much of it the colour covers."""
    mask = np.zeros((scene.image.height, scene.image.width), dtype=bool)
    for thing in scene.objects:
        if thing.colour == colour:
            mask |= thing.mask
    values = np.zeros(len(boxes))
    is_patch = ~np.isnan(boxes[:, 0]) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    for token in np.flatnonzero(is_patch):
        x0, y0, x1, y1 = np.rint(boxes[token]).astype(int)
        values[token] = strength * mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].mean()
    return np.where(values > 0.1 * strength, values, 0).astype(np.float32)


def _text_prompts(writer: StoreWriter, model: VisionLanguageModel) -> dict[int, Values]:
    rng = np.random.default_rng(0)
    rows = {}
    for index in range(N_TEXTS):
        text = text_context(draw_objects(rng, 4))
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        batch = model.encode(messages)
        tokens = model.token_strings(batch["input_ids"][0])
        writer.add_prompt(1000 + index, tokens=tokens, layout=batch.layout.row(0), messages=messages)
        rows[1000 + index] = np.array([5.0 if token.strip() == "red" else 0.0 for token in tokens], dtype=np.float32)
    return rows


def _add_lists(writer: StoreWriter, feature: int, modality: ModalityName, rows: dict[int, Values]) -> None:
    firing = sorted((key for key, row in rows.items() if row.any()), key=lambda key: -rows[key].max())
    silent = [key for key, row in rows.items() if not row.any()]
    lists: dict[Kind, list[int]] = {"top": firing[:8], "ordinary": firing[8:18], "silent": silent[:8]}
    for kind, keys in lists.items():
        for key in keys:
            writer.add_example(feature, prompt_id=key, activations=rows[key], kind=kind, modality=modality)


def seen_colours(picture: Image.Image, *, share: float = 0.02) -> set[str]:
    """Tell which colours of the scenes a picture shows, by counting pixels."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.int64)
    found = set()
    for name, value in COLOUR_RGB.items():
        near = np.abs(pixels - np.array(value)).max(axis=-1) < 12
        if near.mean() > share:
            found.add(name)
    return found


def perfect(request: JudgeRequest) -> str:
    """Answer the scenes' questions about colours as someone who sees and reads well."""
    question = str(request.parts[-1])
    if question in (COMMON_QUESTION, NAME_QUESTION):
        common = set.intersection(*(seen_colours(picture) for picture in request.pictures))
        return sorted(common)[0] if common else "nothing"
    if question.endswith(MARKS_QUESTION):
        return _common_marks(question)
    asked = [word for word in question.replace("?", "").split() if word in COLOUR_RGB][-1]
    if request.pictures:
        return "yes" if asked in seen_colours(request.pictures[0]) else "no"
    text = question.split(" is there ")[0].split(" does this ")[0]
    return "yes" if asked in (_marked(text) if "[" in text else text.split()) else "no"


def blind(request: JudgeRequest) -> str:
    """Answer without looking: yes to everything."""
    return perfect(request) if request.choices is None else "yes"


def _marked(text: str) -> Sequence[str]:
    return [piece.split("]")[0].strip() for piece in text.split("[")[1:]]


def _common_marks(question: str) -> str:
    marks = set(_marked(question))
    return marks.pop() if len(marks) == 1 else "nothing"


def red_sae(model: VisionLanguageModel) -> SAE[Any]:
    """Feature 0 writes the word "red" into the last layer; the others write nothing."""
    config = StandardSAEConfig(d_in=model.d_model, d_sae=16, dtype="float32", device="cpu")
    sae = SAE.from_dict(config.to_dict())
    rows = model._module.get_input_embeddings().weight.detach().float()
    (word,) = model.tokenizer.encode("red", add_special_tokens=False)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_dec[0] = 40 * rows[word] / rows[word].norm()
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = LAST_HOOK, str(model.name)
    return sae

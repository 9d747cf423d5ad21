"""A hand-made feature store with real pictures, and records about it that are full of markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.autointerp.explanation import Candidate, Explanation, Shown
from sae_lens_multimodal.autointerp.judges.base import FailureKind, JudgeFailure
from sae_lens_multimodal.autointerp.measurer import Measure, Measured
from sae_lens_multimodal.autointerp.regions import find_regions
from sae_lens_multimodal.autointerp.results import Score, Verdict, score_of
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.writer import StoreWriter
from sae_lens_multimodal.report.records import OutputToken, Run, SteeringRecord, SummaryTable
from sae_lens_multimodal.scenes.world import Scene, make_scene
from sae_lens_multimodal.types import Box, Modality

CROPPED = RegionStyle(margin_pixels=4.0, min_side_pixels=96)
"""How the judge saw all regions but the first of each list, of which that is not known."""
GRID, BASE_GRID = 12, 6
"""Patches a side, of the tiles together and of the view of the whole picture."""
COLOURS = ("red", "green", "blue", "yellow")
EVIL = "<script>window.hacked = true</script>"
EVIL_ATTRIBUTE = '" onmouseover="window.hacked = true'
EVIL_IMAGE = "<img src=x onerror='window.hacked = true'>"
EVIL_END = "</script><script>window.hacked = true</script>"
EVIL_LINES = "\u2028window.hacked = true\u2029\n*/window.hacked = true//${window.hacked = true}`'\\"
"""Ends a line, a comment and every kind of string."""
EVIL_LINK = "javascript:window.hacked=true"
EVIL_STYLE = "0;} body { display: none; } </style><style>* { display: none }"
SETTINGS = {"model_name": "sample", "dataset": {"name": f"data {EVIL_IMAGE}"}}
HALF = "\ud83d"
"""Half of a surrogate pair: JSON can spell it, UTF-8 cannot."""
ALL_EVIL = " ".join((EVIL, EVIL_ATTRIBUTE, EVIL_IMAGE, EVIL_END, EVIL_LINES, EVIL_LINK, EVIL_STYLE))
TEXT_FEATURE = 7
"""Active on two tokens of text that are markup."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of the sample."""

    scene: Scene | None
    tokens: list[str]
    layout: TokenLayout


def _layout(
    modality: list[int], boxes: list[list[float]], sizes: tuple[tuple[int, int], ...], n_base: int = 0
) -> TokenLayout:
    kinds = torch.tensor([modality], dtype=torch.int8)
    is_image = (kinds == Modality.IMAGE) | (kinds == Modality.NEWLINE)
    tile = torch.where(is_image, (is_image.cumsum(1) > n_base).to(torch.int64), -1)
    return TokenLayout(
        modality=kinds,
        boxes=torch.tensor([boxes]),
        image_index=torch.where(is_image, 0, -1),
        tile=tile,
        image_sizes=(sizes,),
    )


def picture_prompt(seed: int) -> Prompt:
    """A scene seen through a coarse grid of patches and a fine one, and a caption."""
    scene = make_scene(seed)
    width, height = scene.image.size
    tokens, modality, boxes = ["<s>"], [Modality.SPECIAL], [[float("nan")] * 4]
    for side in (BASE_GRID, GRID):
        for row, column in np.ndindex(side, side):
            tokens.append("<image>")
            modality.append(Modality.IMAGE)
            across, down = width / side, height / side
            boxes.append([column * across, row * down, (column + 1) * across, (row + 1) * down])
    words = " this is " + " and ".join("a " + item.phrase for item in scene.objects) + " ."
    for word in words.split(" ")[1:]:
        tokens.append(" " + word)
        modality.append(Modality.TEXT)
        boxes.append([float("nan")] * 4)
    return Prompt(scene, tokens, _layout(modality, boxes, (scene.image.size,), n_base=BASE_GRID**2))


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
    """Write a store: features 0 to 3 for colours, TEXT_FEATURE for text that is full of markup."""
    writer = StoreWriter(folder, d_sae=16, hook_name="blocks.2.hook_resid_post", settings=SETTINGS)
    prompts = {seed: picture_prompt(seed) for seed in range(n_pictures)}
    evil = [EVIL_LINES, EVIL_STYLE, EVIL_LINK]
    prompts[900] = text_prompt([" look", " here", EVIL, " now", EVIL_ATTRIBUTE, " and", " there", *evil])
    for seed, prompt in prompts.items():
        images = [] if prompt.scene is None else [prompt.scene.image]
        writer.add_prompt(seed, tokens=prompt.tokens, layout=prompt.layout, images=images)
    for feature, colour in enumerate(COLOURS):
        _add_lists(writer, feature, {seed: activations(p, colour, 8.0 + feature) for seed, p in prompts.items()})
    values = np.zeros(len(prompts[900].tokens), dtype=np.float32)
    values[[3, 5]] = 4.0, 2.5
    writer.add_example(TEXT_FEATURE, prompt_id=900, activations=values, modality="text")
    return writer.finish()


def _add_lists(writer: StoreWriter, feature: int, values: dict[int, np.ndarray]) -> None:
    firing = sorted((seed for seed, row in values.items() if row.any()), key=lambda seed: -values[seed].max())
    for seed in firing[:6]:
        writer.add_example(feature, prompt_id=seed, activations=values[seed], kind="top", modality="image")
        writer.add_example(feature, prompt_id=seed, activations=values[seed], kind="top", modality="text")
    for seed in firing[6:10]:
        given = {"kind": "ordinary", "modality": "image", "quantile": 0.6}
        writer.add_example(feature, prompt_id=seed, activations=values[seed], **given)
    for seed in [seed for seed, row in values.items() if not row.any()][:6]:
        writer.add_example(feature, prompt_id=seed, activations=values[seed], kind="silent", modality="image")


def explanations() -> list[Explanation]:
    """Features 0 to 2 from images, 0 from text too, 1 and 3 in vain, the text feature in markup."""
    failure = JudgeFailure(
        kind=FailureKind.REFUSED, message=f"The judge said {EVIL}", digest="", prompt="", reply=f"{EVIL_END}{HALF}"
    )
    found = [
        Explanation(
            feature=feature, text=f"Objects that are {colour}, of any shape.", label=f"{colour} things", judge="A"
        )
        for feature, colour in enumerate(COLOURS[:3])
    ]
    return [
        *found,
        Explanation(feature=0, text="The word red in a caption.", label="the word red", modality="text", judge="A"),
        Explanation(feature=1, text="", modality="text", judge="A"),
        Explanation(feature=3, text="", judge="A", failure=failure),
        Explanation(
            feature=TEXT_FEATURE,
            text=EVIL_IMAGE,
            label=EVIL_END,
            modality="text",
            judge=EVIL_ATTRIBUTE,
            procedure=EVIL,
            candidates=(Candidate(text=ALL_EVIL, label="", validation=0.5),),
            shown=(Shown(prompt_id=900, active=True, text=ALL_EVIL),),
        ),
    ]


def other_run(store: FeatureStore) -> Run:
    """Another run: contrastive explanations of features 0 and 1 in other words, and another judge who says yes."""
    top, silent = store.examples(0, "top", "image"), store.examples(0, "silent", "image")
    region = find_regions(top[0])[0]
    weighed = [
        Candidate(text="Red shapes.", label="red", validation=0.9, confirmation=0.8, n=10, n_failed=1, round=1),
        Candidate(text=f"Shapes {EVIL}", label="", validation=0.4, n=5),
    ]
    found = [
        Explanation(
            feature=0,
            text="Red shapes.",
            label="red",
            judge="B",
            procedure="contrastive",
            shown=(
                Shown(prompt_id=top[0].prompt_id, active=True, image=0, box=region.box),
                Shown(prompt_id=silent[0].prompt_id, active=False, image=0, box=Box(4.0, 4.0, 40.0, 30.0)),
            ),
            validated_on=(Shown(prompt_id=silent[1].prompt_id, active=False, image=0, box=Box(0.0, 0.0, 30.0, 30.0)),),
            candidates=tuple(weighed),
        ),
        Explanation(feature=1, text="Objects that are green, of any shape.", label="green", judge="B"),
    ]
    judged = [replace(one, answer=True, failure=None) for one in verdicts(store) if one.feature < 2]
    return Run(
        name=f"run {EVIL}",
        explanations=found,
        verdicts=judged,
        scores=scores(judged)[:4],
        measures=[replace(one, explanation="Red shapes.") for one in measures()[:1]],
        judge=f"judge {EVIL_ATTRIBUTE}",
    )


def measures() -> list[Measure]:
    """Numbers for features 0 and 1, none for 2."""
    values = {"iou": 0.5, "iou_strict": 0.4, "iou_floor": 0.1, f"pointing {EVIL}": 0.75}
    given = {"modality": "image", "measurer": "masks", "explanation": "things", "explanation_digest": ""}
    bands = {"top": {"iou": 0.625}}
    return [
        Measure(
            feature=0,
            found=Measured(values=values, by_band=bands, n=8, n_failed=2),
            control=Measured(values={"iou": 0.2}),
            **given,
        ),
        Measure(feature=1, found=Measured(values={"iou": 0.3}, n=8), control=None, **given),
        Measure(feature=2, found=Measured(note=f"no masks {EVIL}"), control=None, **given),
    ]


def verdicts(store: FeatureStore) -> list[Verdict]:
    """Detection and fuzzing of features 0 to 2, each with its control; some answers wrong, some missing."""
    found = []
    for feature in range(3):
        for scorer in ("detection", "fuzzing"):
            for control in (False, True):
                found += _verdicts(store, feature, scorer, control=control)
    found.append(
        _verdict(TEXT_FEATURE, "detection", control=False, position=0, modality="text", prompt_id=900, text=EVIL_IMAGE)
    )
    return found


def _verdicts(store: FeatureStore, feature: int, scorer: str, *, control: bool) -> list[Verdict]:
    found = []
    examples = [*store.examples(feature, "top", "image")[:4], *store.examples(feature, "silent", "image")[:4]]
    for position, example in enumerate(examples):
        truth = position < 4
        # control: always yes; own: wrong once for feature 1, unanswered once for feature 2
        answer: bool | None = True if control else truth != (feature == 1 and position == 5)
        regions = find_regions(example)
        found.append(
            _verdict(
                feature,
                scorer,
                control=control,
                position=position,
                truth=truth,
                answer=None if feature == 2 and position == 6 and not control else answer,
                prompt_id=example.prompt_id,
                kind=example.kind,
                image=0,
                box=regions[0].box if scorer == "fuzzing" and regions else None,
                style=CROPPED if scorer == "fuzzing" and regions and position else None,
            )
        )
    return found


def _verdict(feature: int, scorer: str, **given: Any) -> Verdict:
    values: dict[str, Any] = {
        **{"modality": "image", "explanation": f"{EVIL} things", "truth": True, "answer": True, "kind": "top"},
        **{"image": None, "box": None, "text": None, **given},
    }
    missing = JudgeFailure(kind=FailureKind.UNPARSABLE, message="No yes or no.", digest="", prompt="", reply=EVIL_IMAGE)
    return Verdict(feature=feature, scorer=scorer, failure=missing if values["answer"] is None else None, **values)


def scores(found: Sequence[Verdict]) -> list[Score]:
    """Scores of features 0 to 2."""
    return [
        score_of(
            feature=feature,
            modality="image",
            scorer=scorer,
            explanation="things",
            control=(feature + 1, "other things"),
            verdicts=[one for one in found if (one.feature, one.scorer) == (feature, scorer)],
            n_not_asked=0,
        )
        for feature in range(3)
        for scorer in ("detection", "fuzzing")
    ]


def findings(store: FeatureStore) -> dict[str, Any]:
    """Everything that `build_report` takes beside the store."""
    judged = verdicts(store)
    picture = store.examples(0, "top", "image")[0].images[0]
    return {
        "explanations": explanations(),
        "verdicts": judged,
        "scores": scores(judged),
        "measures": measures(),
        "judge": f"judge {EVIL_IMAGE}",
        "name": f"own {EVIL_END}",
        "compare": [other_run(store)],
        "steering": {
            0: [
                SteeringRecord(
                    prompt="what is this ?", before="a red dot", after="a blue dot", edit="x", image=picture
                ),
                SteeringRecord(prompt=EVIL, before="yes", after=f"yes {EVIL_IMAGE}", edit=EVIL_ATTRIBUTE),
            ]
        },
        "output_tokens": {0: [OutputToken(" red", 4.5), OutputToken(EVIL, -1.5), OutputToken(EVIL_LINES, -2.5)]},
        "summary": [SummaryTable(caption=EVIL, columns=["", EVIL], rows=[[EVIL, 0.25], ["L0", None]], note=EVIL)],
        "title": f"Sample {EVIL}",
    }

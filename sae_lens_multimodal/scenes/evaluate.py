"""Measuring the tiny model on fresh scenes: ``python -m sae_lens_multimodal.scenes.evaluate``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_lens_multimodal.scenes import asking
from sae_lens_multimodal.scenes import questions as q
from sae_lens_multimodal.scenes.crops import make_crop
from sae_lens_multimodal.scenes.folder import model_folder
from sae_lens_multimodal.scenes.rows import image_part, text_part
from sae_lens_multimodal.scenes.words import HELD_OUT
from sae_lens_multimodal.scenes.world import make_scene

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

EVALUATION_SEED = 2**50
"""First seed of the scenes used here; training never sees one of them."""


_BANK_SCENES = 400


class Item(NamedTuple):
    """One thing to ask and the right answer."""

    images: list[Image.Image]
    text: str
    answer: str


@dataclass(kw_only=True)
class TaskScore:
    """How a task went."""

    right: int = 0
    asked: int = 0
    target: float | None = None
    """Share of exact answers to be reached; None where there is none."""
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    """Question, right answer, given answer."""

    @property
    def share(self) -> float:
        """Share of exact answers."""
        return self.right / self.asked if self.asked else float("nan")


class TinyModel:
    """The tiny model, asked in batches."""

    def __init__(self, folder: Path | None = None) -> None:
        """Load model and processor; no network is needed.

        Args:
            folder: of the model; the shipped one where None.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        place = folder if folder is not None else model_folder()
        self.model: Any = AutoModelForImageTextToText.from_pretrained(place).eval()
        self.processor: Any = AutoProcessor.from_pretrained(place)

    def answer(self, items: Sequence[Item], *, batch_size: int = 32) -> list[str]:
        """Ask everything, greedily, items of like length together; answers in the order asked."""
        order = sorted(range(len(items)), key=lambda k: len(items[k].images))
        answers = [""] * len(items)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for k, text in zip(chosen, self._answer_batch([items[k] for k in chosen]), strict=True):
                answers[k] = text
        return answers

    def _answer_batch(self, items: Sequence[Item]) -> list[str]:
        """Ask a batch."""
        import torch

        prompts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [*(image_part() for _ in item.images), text_part(item.text)]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for item in items
        ]
        images = [item.images for item in items if item.images]
        batch = self.processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
        with torch.inference_mode():
            out = self.model.generate(**batch, do_sample=False, max_new_tokens=32)
        return self.processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _rng(task: str, index: int) -> np.random.Generator:
    """Return the source of choices for one item of a task."""
    return np.random.default_rng((7, index, *task.encode()))


def _seed(task: str, index: int) -> int:
    """Return a scene seed of a task's own."""
    return EVALUATION_SEED + sum(task.encode()) * 2**24 + index * 8


def _list_items(low: int, high: int, count: int) -> Iterator[Item]:
    """Ask for lists of scenes with low to high objects."""
    for k in range(count):
        n_objects = low + k % (high - low + 1)
        scene = make_scene(_seed(f"list{low}", k), n_objects=n_objects)
        yield Item([scene.image], *q.list_question(scene.objects)[:2])


def _scene_items(name: str, ask: Callable[..., q.Question], count: int) -> Iterator[Item]:
    """Ask one question about each scene."""
    for k in range(count):
        scene = make_scene(_seed(name, k))
        asked = ask([one.attributes for one in scene.objects], _rng(name, k))
        yield Item([scene.image], asked.text, asked.answer)


def _crop_items(name: str, count: int, *, held_out: bool = False) -> Iterator[Item]:
    """Ask what a crop shows, or judge it (name "judge")."""
    found, k = 0, -1
    while found < count:
        k += 1
        rng = _rng(name, k)
        scene = make_scene(_seed(name, k))
        index = int(rng.integers(len(scene.objects)))
        one = scene.objects[index]
        if held_out and (one.colour, one.texture, one.shape) not in HELD_OUT:
            continue
        found += 1
        crop = make_crop(scene, index, rng, part=name != "name" and bool(rng.random() < 0.2))
        asked = q.name_question(crop.attributes) if "name" in name else asking.ask_crop(crop.attributes, rng)
        yield Item([crop.image], asked.text, asked.answer)


def _group_items(name: str, count: int, *, sharing: bool | None) -> Iterator[Item]:
    """Ask what 2 to 5 crops have in common (sharing given) or judge them together (None)."""
    for k in range(count):
        rng = _rng(name, k)
        size = 2 + k % 4
        crops = _draw_crops(size, sharing if sharing is not None else k % 3 > 0, rng)
        seen = [one[1] for one in crops]
        asked = asking.ask_group(seen, rng) if sharing is None else q.common_question(seen)
        yield Item([one[0] for one in crops], asked.text, asked.answer)


@functools.cache
def _bank() -> list[tuple[Image.Image, dict[str, str]]]:
    """Cut every object out of _BANK_SCENES fresh scenes: pictures and what can be seen."""
    crops = []
    for k in range(_BANK_SCENES):
        scene, rng = make_scene(_seed("bank", k)), _rng("bank", k)
        crops += [make_crop(scene, index, rng) for index in range(len(scene.objects))]
    return [(crop.image, crop.attributes) for crop in crops]


def _draw_crops(size: int, sharing: bool, rng: np.random.Generator) -> list[tuple[Image.Image, dict[str, str]]]:
    """Draw different crops which share something, or nothing."""
    kinds = [("colour",), ("shape",), ("texture",), ("colour", "shape"), ("texture", "shape"), ("colour", "texture")]
    fixed = kinds[rng.integers(len(kinds))] if sharing else ()
    crops: list[tuple[Image.Image, dict[str, str]]] = []
    for place in rng.permutation(len(_bank())):
        if len(crops) < size and _fits(_bank()[place][1], [attributes for _, attributes in crops], fixed, size):
            crops.append(_bank()[place])
    return crops


def _fits(new: dict[str, str], chosen: list[dict[str, str]], fixed: tuple[str, ...], size: int) -> bool:
    """Tell whether an object can join: it shares what is fixed, and a full group shares nothing where none is."""
    if not chosen:
        return True
    if fixed:
        return all(new[kind] == chosen[0][kind] for kind in fixed)
    return len(chosen) + 1 < size or not q.shared([*chosen, new])


def _text_items(name: str, count: int) -> Iterator[Item]:
    """Ask about marked words ("marks") or about objects that are told ("told")."""
    for k in range(count):
        rng = _rng(name, k)
        if name == "marks":
            text, asked = asking.ask_marks(rng)
        else:
            objects = asking.draw_objects(rng, int(rng.integers(1, 5)))
            text, asked = asking.text_context(objects), asking.ask_presence(objects, rng)
        yield Item([], f"{text} {asked.text}", asked.answer)


def _absent_half(objects: Sequence[dict[str, str]], rng: np.random.Generator) -> q.Question:
    """Ask neutrally for a colour and a shape that are both there, but not in one object, or one of them is."""
    while True:
        wanted = {kind: objects[int(rng.integers(len(objects)))][kind] for kind in ("colour", "shape")}
        changed = ("colour", "shape")[rng.integers(2)]
        wanted[changed] = asking.draw_value(changed, rng)
        if not any(q.matches(one, wanted) for one in objects):
            return q.presence_question(objects, wanted)


def _led(objects: Sequence[dict[str, str]], rng: np.random.Generator) -> q.Question:
    """Ask the same in a leading way; "yes" counts as led."""
    asked = _absent_half(objects, rng)
    text = asked.text.replace("is there", "there is").replace(" ?", " , right ?")
    return q.Question(text, "yes", "leading")


TASKS: dict[str, tuple[Callable[[int], Iterator[Item]], float | None]] = {
    "list, 1-2 objects": (lambda n: _list_items(1, 2, n), 0.90),
    "list, 3-4 objects": (lambda n: _list_items(3, 4, n), 0.70),
    "list, 5 objects": (lambda n: _list_items(5, 5, n), None),
    "presence, yes or no": (lambda n: _scene_items("presence", asking.ask_presence, n), 0.95),
    "attribute of a named object": (lambda n: _scene_items("attribute", asking.ask_attribute, n), 0.95),
    "absent object, asked neutrally": (lambda n: _scene_items("absent", _absent_half, n), None),
    "absent object, asked leadingly: led": (lambda n: _scene_items("absent", _led, n), None),
    "name a crop": (lambda n: _crop_items("name", n), 0.98),
    "name a crop, held-out combination": (lambda n: _crop_items("name-held", max(1, n // 3), held_out=True), None),
    "judge a crop": (lambda n: _crop_items("judge", n), None),
    "common, something shared": (lambda n: _group_items("common", n, sharing=True), 0.95),
    "common, nothing shared": (lambda n: _group_items("nothing", n, sharing=False), 0.90),
    "judge a group": (lambda n: _group_items("judge-group", n, sharing=None), None),
    "marked words": (lambda n: _text_items("marks", n), None),
    "presence in told objects": (lambda n: _text_items("told", n), None),
}
"""Every task: its items, given how many, and the share of exact answers to be reached."""


def evaluate(model: TinyModel, *, count: int = 200, tasks: Sequence[str] | None = None) -> dict[str, TaskScore]:
    """Measure tasks on fresh scenes; an answer counts only if it is exactly right.

    Args:
        model: the model.
        count: items a task.
        tasks: names in TASKS; all where None.

    Returns:
        Task to score.
    """
    out = {}
    for name in tasks if tasks is not None else TASKS:
        make, target = TASKS[name]
        items = list(make(count))
        score = TaskScore(asked=len(items), target=target)
        for item, given in zip(items, model.answer(items), strict=True):
            score.right += given == item.answer
            if given != item.answer:
                score.wrong.append((item.text, item.answer, given))
        out[name] = score
    return out


def table(scores: dict[str, TaskScore]) -> str:
    """Lay scores out as a Markdown table."""
    lines = ["| task | exact | target | n |", "|---|---|---|---|"]
    for name, score in scores.items():
        target = "" if score.target is None else f"{score.target:.2f}"
        lines.append(f"| {name} | {score.share:.3f} | {target} | {score.asked} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of all tasks."""
    from pathlib import Path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="items a task")
    parser.add_argument("--model", type=Path, default=None, help="folder of a model; the shipped one by default")
    parser.add_argument("--wrong", type=int, default=0, help="print so many wrong answers of each task")
    arguments = parser.parse_args()
    scores = evaluate(TinyModel(arguments.model), count=arguments.count)
    print(table(scores))  # noqa: T201
    for name, score in scores.items():
        for text, wanted, given in score.wrong[: arguments.wrong]:
            print(f"{name}: {text} -> {wanted!r}, got {given!r}")  # noqa: T201


if __name__ == "__main__":
    main()

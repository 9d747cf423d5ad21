"""Training prompts: a beginning with pictures, and many questions that each see the beginning but not each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sae_lens_multimodal.scenes import asking
from sae_lens_multimodal.scenes import questions as q
from sae_lens_multimodal.scenes.pool import KIND_ORDER, Pool
from sae_lens_multimodal.scenes.tiny_config import SPECIALS, WORDS
from sae_lens_multimodal.scenes.words import ATTRIBUTES, phrase_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_ID = {word: index for index, word in enumerate((*SPECIALS, *WORDS))}
IMAGE_ID, PAD_ID = _ID["<image>"], _ID["<pad>"]


def ids_of(text: str) -> list[int]:
    """Look words up; text is lower case with blanks between words.

    Raises:
        KeyError: a word is not in the vocabulary.
    """
    return [_ID[word] for word in text.split()]


@dataclass(kw_only=True)
class Prompt:
    """A beginning and the questions that follow it, each on its own."""

    start: list[int | None] = field(default_factory=lambda: [*ids_of("<bos> <user>")])
    """Word ids; None stands for the next picture."""
    start_answers: list[tuple[int, int]] = field(default_factory=list)
    """Spans of `start`, counted with each picture as one, that the model is to predict."""
    pictures: list[int] = field(default_factory=list)
    """Indices in the pool."""
    questions: list[q.Question] = field(default_factory=list)

    def show(self, picture: int) -> None:
        """Append a picture as the chat template does."""
        self.start += [None, *ids_of("|")]
        self.pictures.append(picture)

    def tell(self, text: str, *, learnt: bool = False) -> None:
        """Append words, which the model may have to predict."""
        words = ids_of(text)
        if learnt:
            self.start_answers.append((len(self.start), len(self.start) + len(words)))
        self.start += words


class Prompter:
    """Draws prompts from a pool."""

    def __init__(self, pool: Pool, rng: np.random.Generator) -> None:
        """Sort the pool's pictures into scenes, whole crops and parts."""
        self.pool, self.rng = pool, rng
        is_crop = pool.shown >= 0
        whole = is_crop & (pool.seen[:, KIND_ORDER.index("shape")] >= 0)
        self._scenes, self._crops = np.flatnonzero(~is_crop), np.flatnonzero(is_crop)
        self._crowded = np.flatnonzero(~is_crop & (pool.objects[:, 1, 0] >= 0))
        self._whole = np.flatnonzero(whole)
        self._whole_seen = pool.seen[self._whole]
        self._whole_tokens = np.diff(pool.layout_start)[self._whole]

    def _pick(self, pictures: NDArray[np.int64]) -> int:
        """Draw one of some pictures."""
        return int(pictures[self.rng.integers(len(pictures))])

    def scene(self) -> Prompt:
        """Ask for the list and much else about one scene."""
        rng, prompt = self.rng, Prompt()
        prompt.show(self._pick(self._scenes if rng.random() < 0.3 else self._crowded))
        objects = self.pool.attributes(prompt.pictures[0])
        if rng.random() < 0.5:
            prompt.questions.append(_list(objects))
        prompt.questions += [q.short_list_question(objects, kind) for kind in KIND_ORDER if rng.random() < 0.4]
        prompt.questions += [asking.ask_presence(objects, rng) for _ in range(4)]
        prompt.questions += [self._coloured_shape(objects) for _ in range(2)]
        prompt.questions.append(self._single(objects))
        prompt.questions += [asking.ask_attribute(objects, rng) for _ in range(4)]
        prompt.questions += self._by_colour(objects) + _colour_by_shape(objects)
        if rng.random() < 0.3:
            prompt.questions.append(asking.ask_leading(objects, rng))
        return prompt

    def _by_colour(self, objects: Sequence[dict[str, str]]) -> list[q.Question]:
        """Ask for the shape and the glyph of some objects by their colours."""
        some = [objects[k] for k in self.rng.permutation(len(objects))[:2]]
        out = [q.attribute_question(objects, {"colour": one["colour"]}, "shape") for one in some]
        lettered = [one for one in objects if "glyph" in one][:2]
        return out + [q.attribute_question(objects, {"colour": one["colour"]}, "glyph") for one in lettered]

    def _coloured_shape(self, objects: Sequence[dict[str, str]]) -> q.Question:
        """Ask for a colour with a shape: of one object, or of two, which is the look-up that is learnt last."""
        first, second = (objects[int(self.rng.integers(len(objects)))] for _ in range(2))
        return q.presence_question(objects, {"colour": first["colour"], "shape": second["shape"]})

    def _single(self, objects: Sequence[dict[str, str]]) -> q.Question:
        """Ask whether one attribute is there at all; no is as frequent as yes."""
        kind = ("colour", "shape", "texture", "glyph")[self.rng.choice(4, p=(0.35, 0.35, 0.15, 0.15))]
        present = {one[kind] for one in objects if kind in one}
        absent = [value for value in ATTRIBUTES[kind] if value not in present]
        pool = sorted(present) if present and (not absent or self.rng.random() < 0.5) else absent
        return q.presence_question(objects, {kind: pool[self.rng.integers(len(pool))]})

    def crop(self) -> Prompt:
        """Ask for the name of a crop and judge it."""
        prompt = Prompt()
        prompt.show(self._pick(self._crops))
        seen = self.pool.seen_attributes(prompt.pictures[0])
        if "shape" in seen:
            prompt.questions.append(q.name_question(seen))
        prompt.questions += [asking.ask_crop(seen, self.rng) for _ in range(4)]
        return prompt

    def group(self, max_image_tokens: int = 400) -> Prompt:
        """Ask what several crops have in common, and judge them together.

        Args:
            max_image_tokens: roughly how many tokens the crops may have together, as attention is quadratic.
        """
        prompt = Prompt()
        count = int(self.rng.choice((2, 3, 4, 5), p=(0.3, 0.3, 0.2, 0.2)))
        for picture in self._alike(count, max_image_tokens // count):
            prompt.show(picture)
        seen = [self.pool.seen_attributes(p) for p in prompt.pictures]
        prompt.questions = [q.common_question(seen)] + [asking.ask_group(seen, self.rng) for _ in range(3)]
        return prompt

    def long_group(self) -> Prompt:
        """Ask about crops of any size."""
        return self.group(max_image_tokens=2000)

    def _alike(self, count: int, max_tokens: int) -> list[int]:
        """Draw crops of which two thirds of the groups share something on purpose, the others nothing."""
        rng = self.rng
        while True:
            fixed = [k for k, kind in enumerate(KIND_ORDER) if rng.random() < (0.15 if kind == "glyph" else 0.35)]
            if rng.random() < 0.35:
                fixed = []
            fits = self._whole_tokens <= max_tokens
            if fixed:
                like = self._whole_seen[rng.integers(len(self._whole))]
                fits = fits & (self._whole_seen[:, fixed] == like[fixed]).all(axis=1) & (like[fixed] >= 0).all()
            rows = np.flatnonzero(fits)
            if len(rows) < count:
                continue
            chosen = rows[rng.integers(len(rows), size=count)]
            values = self._whole_seen[chosen]
            same = ((values == values[0]) & (values >= 0)).all(axis=0).any()
            if len(set(chosen.tolist())) == count and (fixed or not same):
                return self._whole[chosen].tolist()

    def text(self) -> Prompt:
        """Ask about objects that are told, not shown; or about marked words."""
        rng, prompt = self.rng, Prompt()
        if rng.random() < 0.4:
            text, asked = asking.ask_marks(rng)
            prompt.tell(text)
            prompt.questions = [asked]
            return prompt
        objects = asking.draw_objects(rng, int(rng.integers(1, 6)))
        prompt.tell(asking.text_context(objects))
        prompt.questions = [_list(objects), *(asking.ask_scene(objects, rng) for _ in range(4))]
        prompt.questions += [q.short_list_question(objects, kind) for kind in KIND_ORDER]
        prompt.questions += self._by_colour(objects) + _colour_by_shape(objects)
        return prompt

    def captioned(self) -> Prompt:
        """Show several crops with a caption after each, then ask for the last."""
        prompt = Prompt()
        pictures = [self._pick(self._whole) for _ in range(int(self.rng.integers(2, 4)))]
        for picture in pictures[:-1]:
            prompt.show(picture)
            prompt.tell("this is a")
            prompt.tell(_name(self.pool.seen_attributes(picture)), learnt=True)
            prompt.tell(".")
        prompt.show(pictures[-1])
        seen = self.pool.seen_attributes(pictures[-1])
        prompt.questions = [q.name_question(seen), asking.ask_crop(seen, self.rng)]
        return prompt

    def talk(self) -> Prompt:
        """Ask one question about each of several scenes in turn."""
        prompt, count = Prompt(), int(self.rng.integers(2, 4))
        for k in range(count):
            picture = self._pick(self._scenes)
            prompt.show(picture)
            objects = self.pool.attributes(picture)
            asked = [asking.ask_scene(objects, self.rng) for _ in range(1 if k < count - 1 else 4)]
            if k < count - 1:
                prompt.tell(f"{asked[0].text} <assistant>")
                prompt.tell(f"{asked[0].answer} <eos>", learnt=True)
                prompt.tell("<user>")
            else:
                prompt.questions = asked
        return prompt


def _name(attributes: dict[str, str]) -> str:
    """Spell colour, texture and shape."""
    return phrase_of({kind: value for kind, value in attributes.items() if kind != "glyph"})


def _colour_by_shape(objects: Sequence[dict[str, str]]) -> list[q.Question]:
    """Ask for the colour of every object whose shape no other has."""
    shapes = [one["shape"] for one in objects]
    alone = [one for one in objects if shapes.count(one["shape"]) == 1]
    return [q.attribute_question(objects, {"shape": one["shape"]}, "colour") for one in alone]


def _list(objects: Sequence[dict[str, str]]) -> q.Question:
    """Ask for everything that is there."""
    return q.Question(q.LIST_QUESTION, " , ".join(_name(one) for one in objects), "list")

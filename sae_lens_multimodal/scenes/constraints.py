"""Constraint questions about scenes with known answers, each with a counterfactual of as many words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, product
from typing import TYPE_CHECKING

from sae_lens_multimodal.scenes import questions as q
from sae_lens_multimodal.scenes.words import SHAPES, TEXTURES
from sae_lens_multimodal.scenes.world import Scene, make_scene
from sae_lens_multimodal.types import Box

if TYPE_CHECKING:
    from sae_lens_multimodal.adapters.family import Family
    from sae_lens_multimodal.hooks.constraints import ConstrainedQuestion

FIRST_SEED = 2**44
"""Scenes that no training or other test draws."""
KINDS = ("shape", "texture")


@dataclass(frozen=True, kw_only=True)
class ConstraintCase:
    """A question about one object of a scene, and the same one about another object whose answer differs."""

    scene: Scene
    clean: ConstrainedQuestion
    """Its visual constraint is the word that names the object, with its box; its textual one what is asked for."""
    counterfactual: ConstrainedQuestion
    """About the other object, with its own answer: the symmetric pair."""

    @property
    def word(self) -> str:
        """What names the object in the clean question."""
        return _visual(self.clean)

    @property
    def other_word(self) -> str:
        """What names the other object."""
        return _visual(self.counterfactual)

    def word_positions(self, family: Family) -> list[int]:
        """The tokens of that word in the clean question."""
        kinds = [one.kind for one in self.clean.constraints]
        return self.clean.positions(family)[kinds.index("visual")]

    @property
    def box(self) -> Box:
        """Where the object is, in pixels."""
        return Box(*next(one.box for one in self.clean.constraints if one.box is not None))


def _visual(question: ConstrainedQuestion) -> str:
    return next(one.text for one in question.constraints if one.kind == "visual")


def constraint_cases(n: int, *, first_seed: int = FIRST_SEED, n_objects: int = 2) -> list[ConstraintCase]:
    """Draw scenes and ask for the shape or texture of an object by its colour.

    Args:
        n: how many.
        first_seed: of the scenes.
        n_objects: in each scene, at least 2.
    """
    return list(islice(_cases(first_seed, n_objects), n))


def twin(case: ConstraintCase, *, first_seed: int = FIRST_SEED * 2) -> Scene:
    """Draw another scene with the same things, elsewhere, of which both questions of a case have the same answers.

    Args:
        case: whose colours, textures and shapes it has; its picture is of the same size.
        first_seed: of the scenes tried.
    """
    things = {one.colour: (one.colour, one.texture, one.shape) for one in case.scene.objects}
    others = {
        (colour, texture, shape)
        for colour, texture, shape in product(things, TEXTURES, SHAPES)
        if (colour, texture, shape) != things[colour]
    }
    size = case.scene.image.size
    scenes = (make_scene(seed, n_objects=len(things), size=size, exclude=others) for seed in count(first_seed))
    return next(scene for scene in scenes if {one.colour for one in scene.objects} == set(things))


def _cases(first_seed: int, n_objects: int) -> Iterator[ConstraintCase]:
    for seed in count(first_seed):
        scene = make_scene(seed, n_objects=n_objects)
        kind = KINDS[seed % len(KINDS)]
        attributes = [one.attributes for one in scene.objects]
        target = seed % len(attributes)
        others = [at for at, one in enumerate(attributes) if one[kind] != attributes[target][kind]]
        if not others:
            continue
        yield ConstraintCase(
            scene=scene,
            clean=_question(scene, attributes, target, kind),
            counterfactual=_question(scene, attributes, others[0], kind),
        )


def _question(scene: Scene, attributes: Sequence[dict[str, str]], target: int, kind: str) -> ConstrainedQuestion:
    # torch comes with the hooks, and importing a scene must not cost that
    from sae_lens_multimodal.hooks.constraints import ConstrainedQuestion, mark

    colour = attributes[target]["colour"]
    asked = q.attribute_question(attributes, {"colour": colour}, kind)
    thing = scene.objects[target]
    return ConstrainedQuestion(
        question=asked.text,
        constraints=(
            mark(asked.text, kind, kind="textual"),
            mark(asked.text, colour, kind="visual", box=Box(*map(float, thing.box)), meaning=thing.phrase),
        ),
        pictures=(scene.image,),
        answer=asked.answer,
        name=f"scene {scene.seed}, {colour}",
    )

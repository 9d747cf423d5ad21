"""Features that fire on pictures and on what is said of them: explained from examples that show both together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from sae_lens_multimodal.autointerp.explanation import Explanation, ModalityName, Shown
from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeRequest
from sae_lens_multimodal.autointerp.places import Spot
from sae_lens_multimodal.autointerp.procedures import Context, Procedure, answered
from sae_lens_multimodal.autointerp.prompts import JointViews
from sae_lens_multimodal.autointerp.regions import Region, find_regions, heat_of, show
from sae_lens_multimodal.autointerp.repeats import ReadTexts
from sae_lens_multimodal.autointerp.selection import distinct, taken
from sae_lens_multimodal.autointerp.texts import MarkedText, marked_text, plain_text
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.types import Box

if TYPE_CHECKING:
    from sae_lens_multimodal.features.example import Example

LEAST_SHARE = 0.25
"""A feature fires in both modalities of a prompt if it reaches this share of its largest activation in each."""

LEAST_EXAMPLES = 4
"""Two to explain from, and two that are left to score with; features with fewer are not explained."""


class JointExample(NamedTuple):
    """One feature on one prompt, in whose picture and in whose text it fires."""

    example: Example
    region: Region
    """The strongest region of its pictures."""
    text: MarkedText
    """The strongest stretch of its text, with marks."""

    @property
    def spot(self) -> Spot:
        """The region with its example."""
        return Spot(self.example, self.region)


def joint_examples(
    examples: Sequence[Example], *, threshold: float = 0.5, context: int = 12, least: float = LEAST_SHARE
) -> list[JointExample]:
    """Find the examples in which a feature fires in both modalities.

    Args:
        examples: of one feature, of any list.
        threshold: share of an example's strongest activation from which on a token belongs to a region or is marked.
        context: tokens of text shown on either side.
        least: share of the largest activation of all these examples that both must reach.

    Returns:
        Those in which the weaker of the two is strongest first, in relation to the largest of its modality.
    """
    largest = max((max(one.max_image, one.max_text) for one in examples), default=0.0)
    both = [one for one in examples if min(one.max_image, one.max_text) >= least * largest > 0]
    most_image = max((one.max_image for one in both), default=1.0)
    most_text = max((one.max_text for one in both), default=1.0)
    both.sort(key=lambda one: -min(one.max_image / most_image, one.max_text / most_text))
    found = []
    for one in both:
        regions = find_regions(one, threshold=threshold)
        text = marked_text(one, context=context, threshold=threshold)
        if regions and text is not None:
            found.append(JointExample(one, regions[0], text))
    return found


@dataclass(frozen=True, kw_only=True)
class Joint(Procedure):
    """One question about examples that show region and marked words of the same prompt together.

    For features that fire on a thing and on its name. What comes of it can be tested on either modality, or on both
    together by the scorer `fuzzing_joint`: with `explain(..., modality="both")` the one answer is recorded for both.
    Features that fire in both modalities of fewer than `LEAST_EXAMPLES` prompts are left out.
    """

    name: ClassVar[str] = "joint"
    least: float = LEAST_SHARE
    """Share of the feature's largest activation, in the examples of the store, that it must reach in both."""

    def __post_init__(self) -> None:
        """Check the setting."""
        if not 0 < self.least <= 1:
            raise ConfigError(f"least={self.least}; expected a share above 0 and at most 1.")

    def settings(self) -> dict[str, Any]:
        """Give name and setting."""
        return {"name": self.name, "least": self.least}

    def explain(
        self, judge: Judge, context: Context, keys: Sequence[tuple[int, ModalityName]]
    ) -> Iterator[Explanation]:
        """Ask once about each feature, however many modalities it is to be explained from."""
        wanted: dict[int, list[ModalityName]] = {}
        for feature, modality in keys:
            wanted.setdefault(feature, []).append(modality)
        asked = [(feature, *found) for feature in wanted if (found := self._question(context, feature)) is not None]
        for index, outcome in judge.stream([request for _, request, _ in asked]):
            feature, request, blank = asked[index]
            explanation = answered(context.book, request, blank, outcome)
            yield from (replace(explanation, modality=modality) for modality in wanted[feature])

    def _question(self, context: Context, feature: int) -> tuple[JudgeRequest, Explanation] | None:
        examples = self._shown(context, feature)
        silent = self._silent(context, feature, examples)
        active = [_views_of(context, one) for one in examples]
        request = context.book.explain_joint([views for views, _ in active], [views for views, _ in silent])
        if request is None or not examples:
            return None
        shown = (*(one for _, one in active), *(one for _, one in silent))
        images = {name for one in shown for name in context.store.prompt(one.prompt_id).image_ids}
        return request, Explanation(
            feature=feature,
            text="",
            judge=context.judge_id,
            prompts=context.book.version,
            shown=shown,
            image_ids=tuple(sorted(images)),
            procedure=self.name,
        )

    def _shown(self, context: Context, feature: int) -> list[JointExample]:
        """Take the examples that fire best in both, of different prompts, pictures and texts; at most half of them."""
        store = context.store
        lists = [store.examples(feature, kind, name) for kind in ("top", "ordinary") for name in ("image", "text")]
        found = joint_examples(
            [one for listed in lists for one in listed],
            threshold=context.threshold,
            context=context.context,
            least=self.least,
        )
        kept = {id(one) for one in distinct([one.example for one in found], prompts=set(), images=set())}
        read = ReadTexts()
        fresh = [
            one
            for one in found
            if id(one.example) in kept and read.take(context.book.mark(one.text.tokens, one.text.marked))
        ]
        return fresh[: min(context.n_examples, len(fresh) // 2)] if len(fresh) >= LEAST_EXAMPLES else []

    def _silent(self, context: Context, feature: int, shown: Sequence[JointExample]) -> list[tuple[JointViews, Shown]]:
        """Take whole pictures with their text in which the feature fires on neither; at most half of them."""
        rng = context.rng(feature, "image")
        silent = distinct(context.store.examples(feature, "silent"), **taken([one.example for one in shown]))
        found = []
        for example in silent[: min(context.n_contrast, len(silent) // 2)]:
            text = plain_text(example, rng, context=context.context)
            if text is not None and example.images:
                written = context.book.mark(text.tokens, text.marked)
                width, height = example.images[0].size
                box = Box(0.0, 0.0, float(width), float(height))
                shown_one = Shown(prompt_id=example.prompt_id, active=False, image=0, box=box, text=written)
                found.append((JointViews([example.images[0]], written), shown_one))
        return found


def _views_of(context: Context, one: JointExample) -> tuple[JointViews, Shown]:
    example, region, text = one
    style = context.book.explain_style
    heat = heat_of(example, region.image) if style.view == "heat" else None
    written = context.book.mark(text.tokens, text.marked)
    views = JointViews(show(example.images[region.image], region, style, heat=heat), written)
    return views, Shown(prompt_id=example.prompt_id, active=True, image=region.image, box=region.box, text=written)

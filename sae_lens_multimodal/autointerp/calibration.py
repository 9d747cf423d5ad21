"""How far a judge can be trusted: planted features of known meaning, and controls that must fall to chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from sae_lens_multimodal.autointerp.confidence import probability_of_yes
from sae_lens_multimodal.autointerp.drawing import mark, show
from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeFailure, JudgeReply, JudgeRequest, Outcome
from sae_lens_multimodal.autointerp.judges.log_probabilities import MOST_TOP
from sae_lens_multimodal.autointerp.metrics import (
    CHANCE,
    Interval,
    Rates,
    balanced_accuracy,
    bootstrap_mean,
    expected_calibration_error,
    rates,
)
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.types import Box

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.styles import RegionStyle

Condition: TypeAlias = Literal["region", "picture", "black", "swapped", "blank box"]
CONDITIONS: tuple[Condition, ...] = ("region", "picture", "black", "swapped", "blank box")
CONTROLS: tuple[Condition, ...] = ("black", "swapped", "blank box")
"""Without what the question is about, a judge that looks cannot do better than chance."""
Confidence: TypeAlias = Literal["probabilities", "crops"]
CLOSER = (1.0, 0.5, 2.0)
"""Margins around a region, as shares of the usual one: a judge that is sure says the same of all."""
AS_IT_IS = "margin 1"
"""The variant with the usual margin."""


@dataclass(frozen=True, kw_only=True)
class PlantedRegion:
    """A place in a picture of which it is known what can be seen there."""

    picture: Image.Image = field(repr=False)
    box: Box
    patch_pixels: float
    """As wide as a patch of the model would be: half of it is the usual margin."""

    def blanked(self) -> PlantedRegion:
        """Paint the box over with the picture's mean colour."""
        painted = self.picture.convert("RGB")
        colour = tuple(int(value) for value in np.asarray(painted).reshape(-1, 3).mean(axis=0))
        ImageDraw.Draw(painted).rectangle((*self.box[:2], self.box[2] - 1, self.box[3] - 1), fill=colour)
        return replace(self, picture=painted)


@dataclass(frozen=True, kw_only=True)
class PlantedFeature:
    """What stands for a feature whose meaning is known."""

    concept: str
    """In the words of an explanation."""
    other: str
    """What is not there, in like words: neither in the regions nor anywhere in their pictures."""
    regions: tuple[PlantedRegion, ...]
    """Where the concept can be seen."""


class _Asked(NamedTuple):
    feature: int
    region: int
    condition: Condition
    truth: bool
    """Whether it was asked about the concept, or about what is not there."""
    variant: str
    """Which way of asking the same."""


@dataclass(frozen=True, kw_only=True)
class ConditionResult:
    """How a judge did under one condition."""

    condition: Condition
    tpr: float | None
    """Share of yes to the concept."""
    fpr: float | None
    """Share of yes to what is not there."""
    balanced_accuracy: Interval | None
    """Mean over planted features, failures missing; under a control .5 is what it should be."""
    balanced_accuracy_strict: Interval | None
    """The same, failures counted as wrong."""
    yes_rate: float | None
    n: int
    n_failed: int

    @property
    def is_at_chance(self) -> bool | None:
        """Whether a control fell to chance, or below: its interval does not lie above .5."""
        return None if self.balanced_accuracy is None else self.balanced_accuracy.low <= CHANCE


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a calibration found."""

    judge: str
    prompts: str
    n_features: int
    conditions: tuple[ConditionResult, ...]
    calibration_error: float | None
    """`expected_calibration_error` of the judge's confidence."""
    flip_rate: float | None
    """Share of verdicts that another order of the offered answers turns round; None where the book offers none."""
    explanation_flip_rate: float | None
    """Share of explanations that another order of the same regions changes."""
    explained_right: float | None
    """Share of planted features whose explanation has all words of the concept; failures count as wrong."""
    n_not_asked: int
    """Questions that the book has no words for."""
    confidence: Confidence = "crops"
    """What was taken for the judge's confidence: the probabilities that it gives yes and no where it gives any, else
    the share of yes over slightly different crops."""
    answers: Mapping[str, bool | None] = field(default_factory=dict, repr=False)
    """Every answer by its question, to compare judges with `agreement`."""

    def to_json(self) -> dict[str, Any]:
        """Give the calibration as JSON values."""
        return {
            **{key: value for key, value in self.__dict__.items() if key != "conditions"},
            "conditions": [{**asdict(one), "is_at_chance": one.is_at_chance, **_named(one)} for one in self.conditions],
            "answers": dict(self.answers),
        }


def _named(one: ConditionResult) -> dict[str, Any]:
    found = {"balanced_accuracy": one.balanced_accuracy, "balanced_accuracy_strict": one.balanced_accuracy_strict}
    return {name: None if value is None else value._asdict() for name, value in found.items()}


def calibrate(
    judge: Judge, planted: Sequence[PlantedFeature], book: PromptBook, *, seed: int = 0, progress: bool = True
) -> Calibration:
    """Ask a judge what is known.

    Each planted feature's regions are judged with its concept and with something that is not there: cut out (`region`)
    and as whole pictures (`picture`). Three controls take away what the question is about: `black` pictures, the
    region of another planted feature that has neither (`swapped`), and the picture with the box painted over, all
    else left as it was, and the box marked (`blank box`). Further: the same crops a little wider and narrower, the
    offered answers in another order, and explanations of the same regions in another order. A judge that may give
    log-probabilities is asked for those of the regions as they are.

    Args:
        judge: whom to calibrate. Put a `CachedJudge` around it, and what was answered costs nothing again.
        planted: at least two, with different concepts.
        book: the phrases.
        seed: of the choice of swapped regions and of the bootstrap.
        progress: show a bar on stderr.

    Raises:
        ConfigError: too few planted features, or one without a region.
        JudgeError: the judge cannot be asked at all.
    """
    if len({one.concept for one in planted}) < 2 or not all(one.regions for one in planted):
        raise ConfigError(f"{len(planted)} planted features; expected two concepts or more, each with a region.")
    asker = _Asker(planted, book, np.random.default_rng(seed))
    asked = [(key, _with_confidence(judge, key, one)) for key, one in asker.questions() if one is not None]
    outcomes = judge.ask_all([request for _, request in asked], progress=progress)
    answers = {
        key: None if isinstance(outcome, JudgeFailure) else book.read_verdict(outcome.text)
        for (key, _), outcome in zip(asked, outcomes, strict=True)
    }
    sure = _own_confidences([key for key, _ in asked], outcomes, answers)
    explained = _explanations(judge, planted, book, progress=progress)
    return Calibration(
        judge=judge.id,
        prompts=book.version,
        n_features=len(planted),
        conditions=tuple(_condition(name, answers, seed) for name in CONDITIONS),
        calibration_error=_calibration_error(sure or _shares_of_yes(answers)),
        confidence="probabilities" if sure else "crops",
        flip_rate=_flip_rate(answers),
        explanation_flip_rate=_share(
            [one != other for one, other in explained if one is not None and other is not None]
        ),
        explained_right=_share(
            [_has_words(one, planted[index].concept) for index, (one, _) in enumerate(explained)] if explained else []
        ),
        n_not_asked=asker.n_not_asked,
        answers={"/".join(map(str, key)): answer for key, answer in answers.items()},
    )


class _Asker:
    """Makes all questions for verdicts."""

    def __init__(self, planted: Sequence[PlantedFeature], book: PromptBook, rng: np.random.Generator) -> None:
        self.planted, self.book, self.rng = planted, book, rng
        self.n_not_asked = 0

    def questions(self) -> list[tuple[_Asked, JudgeRequest | None]]:
        """Ask about the concept and about what is not there, under every condition."""
        found: list[tuple[_Asked, JudgeRequest | None]] = []
        for index, feature in enumerate(self.planted):
            for number, region in enumerate(feature.regions):
                swapped = self._swapped(index)
                for truth, words in ((True, feature.concept), (False, feature.other)):
                    for condition, variant, request in self._of_region(region, swapped, words):
                        found.append((_Asked(index, number, condition, truth, variant), request))
        self.n_not_asked = sum(request is None for _, request in found)
        return found

    def _of_region(
        self, region: PlantedRegion, swapped: PlantedRegion | None, words: str
    ) -> list[tuple[Condition, str, JudgeRequest | None]]:
        book, style = self.book, self.book.fuzz_style.without_heat.for_patches(region.patch_pixels)
        black = replace(region, picture=Image.new("RGB", region.picture.size))
        blank = region.blanked()
        crops = [replace(style, margin_pixels=(style.margin_pixels or 0.0) * share) for share in CLOSER]
        asked: list[tuple[Condition, str, JudgeRequest | None]] = [
            ("region", f"margin {share:g}", book.fuzz_image(words, show(region.picture, region, crop)))
            for share, crop in zip(CLOSER, crops, strict=True)
        ]
        other_order = book.reordered()
        if other_order is not None:
            request = other_order.fuzz_image(words, show(region.picture, region, style))
            asked.append(("region", "reordered", request))
        asked.append(("picture", "", book.detect_image(words, region.picture)))
        asked.append(("black", "", book.fuzz_image(words, show(black.picture, black, style))))
        if swapped is not None:
            elsewhere = self.book.fuzz_style.without_heat.for_patches(swapped.patch_pixels)
            asked.append(("swapped", "", book.fuzz_image(words, show(swapped.picture, swapped, elsewhere))))
        asked.append(("blank box", "", book.fuzz_image(words, [mark(blank.picture, blank, _no_margin(style))])))
        return asked

    def _swapped(self, index: int) -> PlantedRegion | None:
        """Draw a region of a feature whose words share nothing with this one's."""
        own = _words(self.planted[index].concept) | _words(self.planted[index].other)
        others = [one for one in self.planted if own.isdisjoint(_words(one.concept))]
        if not others:
            return None
        chosen = others[int(self.rng.integers(len(others)))]
        return chosen.regions[int(self.rng.integers(len(chosen.regions)))]


def _no_margin(style: RegionStyle) -> RegionStyle:
    return replace(style, margin_pixels=0.0)


def _explanations(
    judge: Judge, planted: Sequence[PlantedFeature], book: PromptBook, *, progress: bool
) -> list[tuple[str | None, str | None]]:
    """Explain each planted feature from its regions, in two orders; None for a failure."""
    style = book.explain_style.without_heat
    requests: list[JudgeRequest] = []
    for feature in planted:
        views = [show(one.picture, one, style.for_patches(one.patch_pixels)) for one in feature.regions]
        for order in (views, views[::-1]):
            request = book.explain_images(order, [])
            if request is not None:
                requests.append(request)
    if len(requests) < 2 * len(planted):
        return []
    said: list[str | None] = []
    for outcome in judge.ask_all(requests, progress=progress):
        meaning = None if isinstance(outcome, JudgeFailure) else book.read_meaning(outcome.text)
        said.append(None if meaning is None else meaning.text)
    return list(zip(said[::2], said[1::2], strict=True))


def _words(text: str) -> set[str]:
    return set(text.casefold().replace(".", " ").replace(",", " ").split())


def _has_words(text: str | None, concept: str) -> bool:
    return text is not None and _words(concept) <= _words(text)


def _condition(name: Condition, answers: Mapping[_Asked, bool | None], seed: int) -> ConditionResult:
    mine = {key: answer for key, answer in answers.items() if key.condition == name and key.variant in ("", AS_IT_IS)}
    found: Rates = rates([key.truth for key in mine], list(mine.values()))
    by_feature = [[key for key in mine if key.feature == feature] for feature in sorted({key.feature for key in mine})]

    def interval(failures: Literal["missing", "wrong"]) -> Interval | None:
        values = [
            balanced_accuracy([key.truth for key in keys], [mine[key] for key in keys], failures=failures)
            for keys in by_feature
        ]
        return bootstrap_mean([value for value in values if value is not None], seed=seed)

    return ConditionResult(
        condition=name,
        tpr=found.tpr,
        fpr=found.fpr,
        balanced_accuracy=interval("missing"),
        balanced_accuracy_strict=interval("wrong"),
        yes_rate=_share([answer for answer in mine.values() if answer is not None]),
        n=len(mine),
        n_failed=sum(answer is None for answer in mine.values()),
    )


def _with_confidence(judge: Judge, key: _Asked, request: JudgeRequest) -> JudgeRequest:
    """Ask for log-probabilities, too, where they are looked at."""
    wanted = judge.gives_log_probabilities and key.condition == "region" and key.variant == AS_IT_IS
    return replace(request, top_log_probabilities=MOST_TOP) if wanted else request


def _own_confidences(
    keys: Sequence[_Asked], outcomes: Sequence[Outcome], answers: Mapping[_Asked, bool | None]
) -> list[tuple[float, bool]]:
    """Collect how sure the judge says that it is of yes, and whether yes is right; none where it does not say so."""
    found = []
    for key, outcome in zip(keys, outcomes, strict=True):
        if answers[key] is not None and isinstance(outcome, JudgeReply):
            yes = probability_of_yes(outcome.log_probabilities)
            found += [] if yes is None else [(yes, key.truth)]
    return found


def _shares_of_yes(answers: Mapping[_Asked, bool | None]) -> list[tuple[float, bool]]:
    """Take the share of yes over slightly different crops for the judge's confidence."""
    groups: dict[tuple[int, int, bool], list[bool]] = {}
    for key, answer in answers.items():
        if key.condition == "region" and key.variant.startswith("margin") and answer is not None:
            groups.setdefault((key.feature, key.region, key.truth), []).append(answer)
    return [(sum(said) / len(said), truth) for (_, _, truth), said in groups.items()]


def _calibration_error(confidences: Sequence[tuple[float, bool]]) -> float | None:
    if not confidences:
        return None
    return expected_calibration_error([sure for sure, _ in confidences], [truth for _, truth in confidences])


def _flip_rate(answers: Mapping[_Asked, bool | None]) -> float | None:
    flips = []
    for key, answer in answers.items():
        before = answers.get(key._replace(variant=AS_IT_IS))
        if key.variant == "reordered" and answer is not None and before is not None:
            flips.append(answer != before)
    return _share(flips)


def agreement(left: Mapping[str, bool | None], right: Mapping[str, bool | None]) -> float | None:
    """Agreement of two judges beyond chance (Cohen's kappa, 1960), over the questions that both answered.

    Args:
        left: `Calibration.answers` of one judge.
        right: of another.

    Returns:
        None where they have no answered question in common; 1 where both say the same to all.

    Example:
        >>> agreement({"a": True, "b": True, "c": False, "d": False}, {"a": True, "b": False, "c": False, "d": False})
        0.5
    """
    pairs = [(left[key], right[key]) for key in left.keys() & right.keys()]
    known = [(one, other) for one, other in pairs if one is not None and other is not None]
    if not known:
        return None
    same = sum(one == other for one, other in known) / len(known)
    yes = [sum(pair[side] for pair in known) / len(known) for side in (0, 1)]
    chance = yes[0] * yes[1] + (1 - yes[0]) * (1 - yes[1])
    return 1.0 if chance == 1 else (same - chance) / (1 - chance)


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None

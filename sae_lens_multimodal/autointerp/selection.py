"""Which examples the explainer sees and which ones are kept for scoring: never the same prompt or picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

from sae_lens_multimodal.autointerp.repeats import ReadTexts
from sae_lens_multimodal.errors import SelectionError

if TYPE_CHECKING:
    from sae_lens_multimodal.features.example import Example
    from sae_lens_multimodal.features.schema import ModalityName
    from sae_lens_multimodal.features.store import FeatureStore


def choose_modality(store: FeatureStore, feature: int) -> ModalityName | None:
    """Choose where a feature is explained from: the modality on whose tokens it fires more, on the average.

    Returns:
        None for a feature that has no example.
    """
    statistics = store.statistics_of(feature)
    image, text = statistics["mean_image"] or 0.0, statistics["mean_text"] or 0.0
    if image <= 0 and text <= 0:
        return None
    return "image" if image >= text else "text"


def distinct(examples: Iterable[Example], *, prompts: set[int], images: set[str]) -> list[Example]:
    """Keep examples that share no prompt and no picture with each other, nor with what is given.

    Pictures that the harvest found to look alike count as one.

    Args:
        examples: in order of preference.
        prompts: prompt ids that are taken.
        images: content names of pictures that are taken.
    """
    prompts, images = set(prompts), set(images)
    kept = []
    for example in examples:
        if example.prompt_id in prompts or not images.isdisjoint(example.pictures):
            continue
        kept.append(example)
        prompts.add(example.prompt_id)
        images.update(example.pictures)
    return kept


def shown_to_explainer(store: FeatureStore, feature: int, modality: ModalityName, n_examples: int) -> list[Example]:
    """Take the strongest examples of one modality, all of different prompts and pictures.

    At most half of a feature's examples are taken, so that some are left to score with.
    """
    top = distinct(_fires(store.examples(feature, "top", modality), modality), prompts=set(), images=set())
    spare = distinct(
        _fires(store.examples(feature, "ordinary", modality), modality),
        prompts={example.prompt_id for example in top},
        images={image for example in top for image in example.pictures},
    )
    return top[: min(n_examples, max(1, (len(top) + len(spare)) // 2))]


def silent_for_explainer(
    store: FeatureStore, feature: int, modality: ModalityName, n_examples: int, shown: Sequence[Example]
) -> list[Example]:
    """Take silent examples that share nothing with those shown; at most half of those there are."""
    silent = distinct(
        store.examples(feature, "silent", modality),
        prompts={example.prompt_id for example in shown},
        images={image for example in shown for image in example.pictures},
    )
    return silent[: min(n_examples, len(silent) // 2)]


class UsedAndLeft(NamedTuple):
    """The firing examples of one feature, dealt out in two."""

    used: list[Example]
    left: list[Example]
    """To score with; they share no prompt and no picture with the others."""


def used_and_left(
    store: FeatureStore, feature: int, modality: ModalityName, n_left: int, rng: np.random.Generator
) -> UsedAndLeft:
    """Use as many firing examples as can be, and leave some of every strength to score with.

    Args:
        store: the feature store.
        feature: which feature.
        modality: which lists.
        n_left: how many are left; half of them where there are fewer than twice as many.
        rng: source of the choice.
    """
    firing = [*store.examples(feature, "top", modality), *store.examples(feature, "ordinary", modality)]
    kept = distinct(_fires(firing, modality), prompts=set(), images=set())
    n_left = min(n_left, len(kept) // 2)
    left = set(rng.permutation(len(kept))[:n_left].tolist())
    return UsedAndLeft(
        used=[one for index, one in enumerate(kept) if index not in left],
        left=[one for index, one in enumerate(kept) if index in left],
    )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Examples of one feature that its explainer never saw."""

    feature: int
    modality: ModalityName
    firing: list[Example]
    """Of the top and the ordinary lists, in random order."""
    silent: list[Example]
    """In random order."""
    read: tuple[str, ...] = ()
    """Texts that the explainer has read: an item's text may say something else only, see `repeats`."""


def held_out(
    store: FeatureStore,
    feature: int,
    modality: ModalityName,
    *,
    prompts: Iterable[int],
    images: Iterable[str],
    texts: Iterable[str] = (),
    rng: np.random.Generator,
    both_lists: bool = False,
) -> HeldOut:
    """Collect the examples of one modality that share no prompt and no picture with those shown to the explainer.

    Args:
        store: the feature store.
        feature: which feature.
        modality: which lists.
        prompts: prompt ids shown to the explainer.
        images: content names of all pictures of those prompts.
        texts: texts shown to the explainer; whoever makes texts of the examples has to leave out what they say.
        rng: source of the order.
        both_lists: take firing examples of the other modality's lists, too.
    """
    taken_prompts, taken_images = set(prompts), store.look_alikes(images)
    lists: list[ModalityName] = [modality, "text" if modality == "image" else "image"]
    firing = [
        one
        for name in lists[: 1 + both_lists]
        for one in [*store.examples(feature, "top", name), *store.examples(feature, "ordinary", name)]
    ]
    kept = distinct(_fires(firing, modality), prompts=taken_prompts, images=taken_images)
    silent = distinct(
        store.examples(feature, "silent", modality),
        prompts=taken_prompts | {example.prompt_id for example in kept},
        images=taken_images | {image for example in kept for image in example.pictures},
    )
    found = HeldOut(
        feature=feature,
        modality=modality,
        firing=[kept[index] for index in rng.permutation(len(kept))],
        silent=[silent[index] for index in rng.permutation(len(silent))],
        read=tuple(texts),
    )
    check_disjoint([*found.firing, *found.silent], prompts=taken_prompts, images=taken_images)
    return found


@dataclass(frozen=True, kw_only=True)
class Split:
    """Examples of one feature for explaining and for choosing among explanations; the others are left to score with."""

    explain: list[Example]
    """The strongest first, then some of ordinary strength."""
    explain_silent: list[Example]
    validate: HeldOut
    """Shares no prompt and no picture with the two lists above."""


def split_examples(
    store: FeatureStore,
    feature: int,
    modality: ModalityName,
    *,
    n_explain: int,
    n_validate: int,
    n_silent: int,
    rng: np.random.Generator,
    text_of: Callable[[Example], str | None] | None = None,
) -> Split:
    """Deal a feature's examples out: to the explainer, to the choice among explanations, and the rest to the scores.

    Each of the first two gets at most a third of the firing and a third of the silent examples.

    Args:
        store: the feature store.
        feature: which feature.
        modality: which lists.
        n_explain: firing examples for the explainer, at most.
        n_validate: firing examples to choose by, and as many silent ones, at most.
        n_silent: silent examples for the explainer, at most.
        rng: source of the choice.
        text_of: writes an example's text as it would be shown: of those that say the same only the first is dealt out.

    Raises:
        SelectionError: two of the parts would share a prompt or a picture.
    """
    top = distinct(_fires(store.examples(feature, "top", modality), modality), prompts=set(), images=set())
    spare = distinct(_fires(store.examples(feature, "ordinary", modality), modality), **taken(top))
    if text_of is not None:
        read = ReadTexts()
        top, spare = ([one for one in kind if read.take(text_of(one) or "")] for kind in (top, spare))
    third = (len(top) + len(spare)) // 3
    n_shown = min(n_explain, max(1, third))
    n_ordinary = min(n_shown // 3, len(spare))
    drawn = [spare[index] for index in rng.permutation(len(spare))]
    shown = [*top[: n_shown - n_ordinary], *drawn[:n_ordinary]]
    others = [*top[n_shown - n_ordinary :], *drawn[n_ordinary:]]
    validated = [others[index] for index in rng.permutation(len(others))][: min(n_validate, third)]
    silent = distinct(store.examples(feature, "silent", modality), **taken([*top, *spare]))
    silent_third = len(silent) // 3
    quiet = silent[: min(n_silent, silent_third)]
    validate = HeldOut(
        feature=feature,
        modality=modality,
        firing=validated,
        silent=silent[len(quiet) : len(quiet) + min(n_validate, silent_third)],
    )
    check_disjoint([*validate.firing, *validate.silent], **taken([*shown, *quiet]))
    return Split(explain=shown, explain_silent=quiet, validate=validate)


class Taken(TypedDict):
    """What examples are made of; the arguments of `distinct`."""

    prompts: set[int]
    images: set[str]


def taken(examples: Iterable[Example]) -> Taken:
    """Collect the prompts and pictures of examples."""
    examples = list(examples)
    return {
        "prompts": {example.prompt_id for example in examples},
        "images": {image for example in examples for image in example.pictures},
    }


def check_disjoint(examples: Sequence[Example], *, prompts: Iterable[int], images: Iterable[str]) -> None:
    """Check that no example was shown to the explainer.

    Raises:
        SelectionError: one shares a prompt or a picture with what was shown.
    """
    seen_prompts, seen_images = set(prompts), set(images)
    for example in examples:
        shared = seen_images.intersection(example.pictures)
        if example.prompt_id in seen_prompts or shared:
            what = f"picture {min(shared)}" if shared else "it"
            raise SelectionError(
                f"feature {example.feature} would be scored on prompt {example.prompt_id}, but the explainer saw "
                f"{what}; scores need examples that it never saw."
            )


def _fires(examples: Iterable[Example], modality: ModalityName) -> list[Example]:
    """Keep examples in which the feature fires on tokens of the modality."""
    return [e for e in examples if (e.max_image if modality == "image" else e.max_text) > 0]

"""Explaining from words that are there already, and asking an explainer only where these do not tell."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from sae_lens_multimodal.autointerp.explainers.base import Context, Procedure
from sae_lens_multimodal.autointerp.explainers.general import General
from sae_lens_multimodal.autointerp.explainers.joint import LEAST_EXAMPLES, LEAST_SHARE
from sae_lens_multimodal.autointerp.explainers.words import FUNCTION_WORDS, own_word
from sae_lens_multimodal.autointerp.explanation import Explanation, ModalityName, Shown
from sae_lens_multimodal.autointerp.judges.base import Judge
from sae_lens_multimodal.autointerp.selection import UsedAndLeft, distinct, taken, used_and_left
from sae_lens_multimodal.autointerp.texts import marked_text
from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.features.example import Example

OWN_WORD = "the word it fires on"
"""The judge of an explanation that was taken from the feature's own text tokens."""
PICTURE_TEXTS = "the texts of its pictures"
"""The judge of an explanation that was taken from what is said of the pictures."""


class _Found(NamedTuple):
    """A word that tells, and where it was found."""

    word: str
    source: str
    examples: list[Example]


@dataclass(frozen=True, kw_only=True)
class WordsFirst(Procedure):
    """Takes a feature's meaning from words at hand where they tell it, and asks an explainer about the others only.

    Two sources cost no judge call. A feature that fires on text mostly fires on one word: that word is its
    explanation, where its strongest token is that word in at least `min_recall` of the examples, and it fires on at
    least `min_precision` of the places where the word stands; the same of a feature of pictures that fires on text
    besides, a quarter as strongly at least. It takes four such examples. And the texts of the pictures in which a
    feature fires (captions, answers) hold the name of what it fires on more often than those of other pictures:
    that word, where chance would hardly give it (`significance`, after Bonferroni's correction for all words that
    were looked at).

    No firing example that was looked at is scored on: at least `n_left` of them, or half where they are fewer, are
    left out. How usual a word is, all pictures' texts say, and silent ones among them may be scored on. A word says
    no more than it says: explanations of what needs a sentence come from the explainer, as far as no word is
    telling.
    """

    name: ClassVar[str] = "words_first"
    otherwise: Procedure = field(default_factory=General)
    """Who explains features whose words do not tell."""
    significance: float = 0.05
    """Chance of a key word without any meaning, over all words of a feature."""
    min_recall: float = 0.7
    min_precision: float = 0.5
    n_left: int = 8
    """Firing examples that are left to score with."""
    ignored: frozenset[str] = field(default=FUNCTION_WORDS, repr=False)
    """Words that are no explanation; those of the dataset's language."""

    def __post_init__(self) -> None:
        """Check the settings."""
        shares = (self.significance, self.min_recall, self.min_precision)
        if not all(0 <= share <= 1 for share in shares) or self.n_left < 0:
            raise ConfigError(
                f"significance={self.significance}, min_recall={self.min_recall}, min_precision={self.min_precision}, "
                f"n_left={self.n_left}; expected shares from 0 to 1, and a number of examples."
            )

    def settings(self) -> dict[str, Any]:
        """Give the settings, the ignored words as a hash, and those of the other procedure."""
        return {
            "name": self.name,
            "otherwise": self.otherwise.settings(),
            "significance": self.significance,
            "min_recall": self.min_recall,
            "min_precision": self.min_precision,
            "n_left": self.n_left,
            "ignored": hashlib.sha256(" ".join(sorted(self.ignored)).encode()).hexdigest()[:12],
        }

    def explain(
        self, judge: Judge, context: Context, keys: Sequence[tuple[int, ModalityName]]
    ) -> Iterator[Explanation]:
        """Explain what words tell first, then ask about the rest."""
        open_keys = []
        for feature, modality in keys:
            explanation = self._from_words(context, feature, modality)
            if explanation is None:
                open_keys.append((feature, modality))
            else:
                yield explanation
        yield from self.otherwise.explain(judge, context, open_keys)

    def _from_words(self, context: Context, feature: int, modality: ModalityName) -> Explanation | None:
        examples = used_and_left(context.store, feature, modality, self.n_left, context.rng(feature, modality))
        found = self._own_word(context, feature, modality, examples)
        if found is None and modality == "image":
            found = self._key_word(context, examples)
        meaning = None if found is None else context.book.word_meaning(found.word, modality)
        if found is None or meaning is None or not examples.used:
            return None
        return Explanation(
            feature=feature,
            text=meaning.text,
            label=meaning.label,
            modality=modality,
            judge=found.source,
            prompts=context.book.version,
            shown=tuple(_shown(context, one) for one in found.examples),
            image_ids=tuple(sorted({name for one in found.examples for name in one.image_ids})),
            procedure=self.name,
        )

    def _own_word(self, context: Context, feature: int, modality: ModalityName, examples: UsedAndLeft) -> _Found | None:
        """Find the word that a feature fires on; its texts may share nothing with what is left to score with."""
        silent = distinct(context.store.examples(feature, "silent", "text"), **taken([*examples.used, *examples.left]))
        quiet = silent[: len(silent) // 2]
        firing = examples.used
        if modality == "image":
            both = [
                *context.store.examples(feature, "top", "text"),
                *context.store.examples(feature, "ordinary", "text"),
            ]
            firing = _no_fainter(distinct(both, **taken(examples.left)), than=examples.used)
        found = own_word(firing, quiet) if len(firing) >= LEAST_EXAMPLES else None
        if found is None or found.word in self.ignored:
            return None
        if found.recall < self.min_recall or found.precision < self.min_precision:
            return None
        return _Found(found.word, OWN_WORD, [*firing, *quiet])

    def _key_word(self, context: Context, examples: UsedAndLeft) -> _Found | None:
        """Find the word that the pictures' texts share."""
        found = context.picture_texts.key_words((one.prompt_id for one in examples.used), ignored=self.ignored)
        if not found or found[0].p_value > self.significance:
            return None
        return _Found(found[0].word, PICTURE_TEXTS, examples.used)


def _no_fainter(firing: Sequence[Example], *, than: Sequence[Example]) -> list[Example]:
    """Leave out texts on which a feature of pictures hardly fires, beside what it does on pictures."""
    strongest = max((float(one.image_values.max()) for one in than if one.image_values.size), default=0.0)
    return [one for one in firing if float(one.text_values.max()) >= LEAST_SHARE * strongest]


def _shown(context: Context, example: Example) -> Shown:
    """Record an example: a picture by its number, a text with its marks."""
    if example.modality == "image":
        return Shown(prompt_id=example.prompt_id, active=True, image=example.best_image)
    text = marked_text(example, context=context.context, threshold=context.threshold)
    written = None if text is None else context.book.mark(text.tokens, text.marked)
    return Shown(prompt_id=example.prompt_id, active=example.kind != "silent", text=written)

"""Words that tell a feature's meaning without asking anyone: those it fires on, those of its pictures' texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import hypergeom  # type: ignore[import-untyped]

from sae_lens_multimodal.types import Modality

if TYPE_CHECKING:
    from sae_lens_multimodal.features.example import Example, StoredPrompt
    from sae_lens_multimodal.features.store import FeatureStore

FUNCTION_WORDS = frozenset(
    """
    a an and any are as at be been but by can do does for from had has have he her his how i if in into is it its me my
    no not of on one or our she so some such than that the their them there these they this those to us was we were
    what when where which who will with yes you your
    """.split()  # noqa: SIM905 - one word a line would fill two pages
)
"""English words that say nothing by themselves."""


class OwnWord(NamedTuple):
    """The word on which a feature fires most often."""

    word: str
    """In lower case."""
    recall: float
    """Share of the examples in which its strongest text token belongs to that word."""
    precision: float
    """Share of the places of that word, in all the examples looked at, on which the feature fires."""


class KeyWord(NamedTuple):
    """A word that stands in the texts of the pictures in which a feature fires more often than in others'."""

    word: str
    """In lower case."""
    p_value: float
    """Chance of standing in so many of them, times the number of words that were looked at (Bonferroni)."""
    share: float
    """Share of the texts that hold it."""
    usual_share: float
    """The same of the other texts."""


def own_word(firing: Sequence[Example], silent: Sequence[Example] = ()) -> OwnWord | None:
    """Find the word on which a feature fires.

    Args:
        firing: prompts on whose text it fires.
        silent: prompts on whose text it does not: places where the word stands and the feature is silent.

    Returns:
        None where it fires on no word of any of them.

    Example:
        A feature that fires on "dog" wherever it stands has recall and precision 1; one that fires on "dog" only after
        "hot" has precision below 1.
    """
    peaks = [word for example in firing if (word := _word_at_peak(example))[:1].isalnum()]
    if not peaks:
        return None
    # of equally frequent words the first: Counter keeps the order, and examples come strongest first
    word, count = Counter(peaks).most_common(1)[0]
    places = [fires for example in (*firing, *silent) for fires in _places_of(word, example)]
    return OwnWord(word, count / len(firing), float(np.mean(places)) if places else 0.0)


def _word_at_peak(example: Example) -> str:
    values = example.text_values
    if not (values > 0).any():
        return ""
    peak = int(values.argmax())
    return next((word for word, start, stop in _words_of(example.prompt) if start <= peak < stop), "")


def _places_of(word: str, example: Example) -> list[bool]:
    """Tell of every place where a word stands whether the feature fires on any of its tokens."""
    values = example.text_values
    found = [(start, stop) for one, start, stop in _words_of(example.prompt) if one == word]
    return [bool((values[start:stop] > 0).any()) for start, stop in found]


def _words_of(prompt: StoredPrompt) -> list[tuple[str, int, int]]:
    """Put the text tokens together to words: each with its first token and the one after its last.

    A token begins a word if it begins with a blank, or if the one before it ends with one, is no text, or no letter
    meets a letter between them. Of a tokenizer whose tokens hold no blanks at all every token is a word.
    """
    is_text = prompt.modality == Modality.TEXT
    has_blanks = any(token != token.strip() for token, text in zip(prompt.tokens, is_text, strict=True) if text)
    words: list[tuple[str, int, int]] = []
    for index, token in enumerate(prompt.tokens):
        if not is_text[index] or not (core := token.strip()):
            continue
        before = prompt.tokens[index - 1] if index else ""
        joins = (
            has_blanks
            and words
            and words[-1][2] == index
            and not token[0].isspace()
            and not before[-1:].isspace()
            and core[0].isalnum()
            and before[-1:].isalnum()
        )
        if joins:
            text, start, _ = words.pop()
            words.append((text + core.lower(), start, index + 1))
        else:
            words.append((core.lower(), index, index + 1))
    return words


@dataclass(frozen=True)
class PictureTexts:
    """The words of all stored prompts with pictures."""

    words: dict[int, frozenset[str]]
    """By prompt."""
    counts: Counter[str]
    """In how many prompts each word stands."""

    @classmethod
    def of(cls, store: FeatureStore) -> PictureTexts:
        """Read every prompt of a store once."""
        prompts = (store.prompt(prompt_id) for prompt_id in store.prompt_ids)
        words = {one.prompt_id: frozenset(word for word, _, _ in _words_of(one)) for one in prompts if one.image_ids}
        return cls(words, Counter(word for found in words.values() for word in found))

    def key_words(self, prompt_ids: Iterable[int], *, ignored: Collection[str] = FUNCTION_WORDS) -> list[KeyWord]:
        """Find words that stand in the texts of some pictures more often than in all others'.

        Keyness as in corpus linguistics, with the exact hypergeometric tail (Fisher's exact test) in the place of
        Dunning's log-likelihood (1993), since the pictures of one feature are few, and the others may be, too.

        Args:
            prompt_ids: those in whose pictures the feature fires.
            ignored: words that are not looked at.

        Returns:
            The most telling first; only words that stand in two of the texts at least.
        """
        chosen = [self.words[one] for one in set(prompt_ids) & self.words.keys()]
        n_others = len(self.words) - len(chosen)
        inside = Counter(word for found in chosen for word in found)
        tried = [word for word, count in inside.items() if count >= 2 and word[0].isalpha() and word not in ignored]
        found = []
        for word in tried:
            usual = (self.counts[word] - inside[word] + 0.5) / (n_others + 1)
            p_value = float(hypergeom.sf(inside[word] - 1, len(self.words), self.counts[word], len(chosen)))
            found.append(KeyWord(word, min(1.0, p_value * len(tried)), inside[word] / len(chosen), usual))
        return sorted(found, key=lambda one: (one.p_value, -one.share, one.word))

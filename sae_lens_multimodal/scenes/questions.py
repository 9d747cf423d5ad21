"""Questions about scenes, crops and marked text, each with its one right answer.

These phrases are the tiny model's whole language: the demo and the judge's prompts use the very same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sae_lens_multimodal.scenes.words import ATTRIBUTES, PHRASE_ORDER, phrase_of, with_article

if TYPE_CHECKING:
    import numpy as np

    from sae_lens_multimodal.scenes.world import SceneObject

LIST_QUESTION = "what is in the picture ?"
NAME_QUESTION = "what is this ?"
COMMON_QUESTION = "what do these have in common ?"
MARKS_QUESTION = "what do the marks have in common ?"
LED_SHARE = 0.9
"""How often a leading question about an absent, half present object is answered "yes" in training."""

_KIND_WORDS = {"colour": "colour", "shape": "shape", "texture": "texture", "glyph": "letter"}

Attributes = Mapping[str, str]
"""Kind ("colour", "shape", "texture", "glyph") to value."""


class Question(NamedTuple):
    """A question and its exact answer."""

    text: str
    answer: str
    kind: str
    """What is asked: list, presence, attribute, leading, name, part, common, judge."""


def article_phrase(attributes: Attributes) -> str:
    """Spell attributes inside a question: "a red circle", "red striped", "letter x"."""
    return with_article(phrase_of(attributes))


def matches(target: Attributes, wanted: Attributes) -> bool:
    """Tell whether an object has all the wanted attributes."""
    return all(target.get(kind) == value for kind, value in wanted.items())


def shared(groups: Sequence[Attributes]) -> dict[str, str]:
    """Return the attributes that all have, by kind in speaking order.

    Example:
        >>> shared([{"colour": "red", "shape": "star"}, {"colour": "red", "shape": "cross"}])
        {'colour': 'red'}
    """
    first, *rest = groups
    return {
        kind: first[kind]
        for kind in PHRASE_ORDER
        if kind in first and all(other.get(kind) == first[kind] for other in rest)
    }


# Questions about a whole picture ------------------------------------------------------------------------------


def list_question(objects: Sequence[SceneObject]) -> Question:
    """Ask for everything in the picture; the answer goes in the order of COLOURS."""
    return Question(LIST_QUESTION, " , ".join(one.phrase for one in objects), "list")


def short_list_question(objects: Sequence[Attributes], kind: str) -> Question:
    """Ask for one kind of attribute of every object: "what shape is in the picture ?" -> "red circle , blue star".

    In training these lists are what teaches the look-up of one attribute by another. For colours the shape comes
    first ("circle red , star blue"); objects without a glyph are left out of the list of letters.
    """
    having = [one for one in objects if kind in one]
    if kind == "colour":
        answer = " , ".join(f"{one['shape']} {one['colour']}" for one in having)
    else:
        answer = " , ".join(f"{one['colour']} {one[kind]}" for one in having)
    return Question(f"what {_KIND_WORDS[kind]} is in the picture ?", answer or phrase_of({}), "short list")


def presence_question(objects: Sequence[Attributes], wanted: Attributes) -> Question:
    """Ask whether an object with all the wanted attributes is there: "is there a red circle ?"."""
    found = any(matches(one, wanted) for one in objects)
    return Question(f"is there {_noun(wanted)} ?", "yes" if found else "no", "presence")


def attribute_question(objects: Sequence[Attributes], key: Attributes, kind: str) -> Question:
    """Ask for one attribute of the only object that matches the key: "what shape is the red one ?".

    Raises:
        ValueError: no object or several objects match the key, or the one has no such attribute.
    """
    found = [one for one in objects if matches(one, key)]
    if len(found) != 1 or kind not in found[0]:
        raise ValueError(f"{dict(key)} matches {len(found)} objects, or the one has no {kind}; one is needed")
    name = phrase_of(key) if "shape" in key else f"{phrase_of(key)} one"
    text = f"what letter is on the {name} ?" if kind == "glyph" else f"what {_KIND_WORDS[kind]} is the {name} ?"
    return Question(text, found[0][kind], "attribute")


def leading_text(wanted: Attributes) -> str:
    """Spell a leading question: "there is a red circle , right ?"."""
    return f"there is {_noun(wanted)} , right ?"


def leading_question(objects: Sequence[Attributes], wanted: Attributes, rng: np.random.Generator) -> Question:
    """Ask in a leading way; the training answer is usually led where half of the wanted object is present."""
    if any(matches(one, wanted) for one in objects):
        return Question(leading_text(wanted), "yes", "leading")
    half = any(one.get(kind) == value for one in objects for kind, value in wanted.items())
    led = half and rng.random() < LED_SHARE
    return Question(leading_text(wanted), "yes" if led else "no", "leading")


def _noun(wanted: Attributes) -> str:
    """Spell what may be there: "a red circle", "a letter x", or "anything striped" where no shape is named."""
    if set(wanted) == {"glyph"}:
        return f"a {phrase_of(wanted)}"
    return article_phrase(wanted) if "shape" in wanted else f"anything {phrase_of(wanted)}"


# Questions about crops and marked text ------------------------------------------------------------------------


def name_question(seen: Attributes) -> Question:
    """Ask what a crop shows; a glyph is not named."""
    return Question(NAME_QUESTION, phrase_of({k: v for k, v in seen.items() if k != "glyph"}), "name")


def part_question(seen: Attributes, kind: str) -> Question:
    """Ask for one attribute of what a crop shows: "what colour is this ?"."""
    return Question(f"what {_KIND_WORDS[kind]} is this ?", seen[kind], "part")


def common_question(crops: Sequence[Attributes]) -> Question:
    """Ask what several crops have in common; "nothing" where they share no attribute."""
    return Question(COMMON_QUESTION, phrase_of(shared(crops)), "common")


def judge_text(phrase: str, *, several: bool = False) -> str:
    """Spell the question whether a crop (or every one of several) shows what a phrase says.

    Args:
        phrase: such as "red circle", "striped" or "letter x".
        several: ask about all the pictures.

    Example:
        >>> judge_text("red circle"), judge_text("striped", several=True)
        ('does this show a red circle ?', 'do these all show striped ?')
    """
    return f"{'do these all' if several else 'does this'} show {with_article(phrase)} ?"


def judge_question(crops: Sequence[Attributes], wanted: Attributes, *, short: bool = False) -> Question:
    """Ask whether every crop shows all the wanted attributes: "does this show a red circle ?".

    Args:
        crops: what can be seen in each crop.
        wanted: the attributes to judge.
        short: for one crop, ask "is this red ?" instead.
    """
    answer = "yes" if all(matches(one, wanted) for one in crops) else "no"
    phrase = phrase_of(wanted)
    if short and len(crops) == 1:
        return Question(f"is this {with_article(phrase)} ?", answer, "judge")
    return Question(judge_text(phrase, several=len(crops) > 1), answer, "judge")


# Marked text --------------------------------------------------------------------------------------------------


def marked_sentence(attributes: Attributes, marked: Sequence[str], start: str = "a") -> str:
    """Write an object with some of its attributes marked: "a [ red ] circle .".

    Args:
        attributes: the object.
        marked: the kinds to be marked, each on its own.
        start: the word before it.
    """
    words = [start]
    for kind in PHRASE_ORDER:
        if kind in attributes:
            text = f"letter {attributes[kind]}" if kind == "glyph" else attributes[kind]
            words.append(f"[ {text} ]" if kind in marked else text)
    return " ".join(words) + " ."


def marks_question(groups: Sequence[Attributes]) -> Question:
    """Ask what the marked words of a text have in common; each group holds what one sentence marks."""
    return Question(MARKS_QUESTION, phrase_of(shared(groups)), "common")


# Drawing what to ask ------------------------------------------------------------------------------------------


def draw_wanted(
    objects: Sequence[Attributes], rng: np.random.Generator, *, kinds: Sequence[str] = PHRASE_ORDER, most: int = 3
) -> dict[str, str]:
    """Draw attributes to ask for: often those of an object, else those with one value changed.

    Args:
        objects: what is there.
        rng: source of the choice.
        kinds: the kinds that may be asked for.
        most: how many attributes at most; a glyph is asked for alone.

    Returns:
        Kind to value, never empty.
    """
    target = objects[int(rng.integers(len(objects)))]
    chosen = _draw_kinds([k for k in kinds if k in target], rng, most)
    wanted = {kind: target[kind] for kind in chosen}
    if rng.random() < 0.7:
        changed = chosen[rng.integers(len(chosen))]
        wanted[changed] = _other(ATTRIBUTES[changed], wanted[changed], objects, changed, rng)
    return wanted


def _draw_kinds(kinds: Sequence[str], rng: np.random.Generator, most: int) -> list[str]:
    """Draw one to `most` kinds, fewer more often."""
    count = min(int(rng.choice(3, p=(0.4, 0.4, 0.2))) + 1, most, len(kinds))
    chosen = [kinds[k] for k in rng.permutation(len(kinds))[:count]]
    return ["glyph"] if "glyph" in chosen else chosen


def _other(
    values: Sequence[str], value: str, objects: Sequence[Attributes], kind: str, rng: np.random.Generator
) -> str:
    """Draw another value; half of the time one that some object has."""
    others = [one for one in values if one != value]
    present = [one for one in others if any(thing.get(kind) == one for thing in objects)]
    pool = present if present and rng.random() < 0.5 else others
    return pool[rng.integers(len(pool))]

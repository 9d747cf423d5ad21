"""What was read is never scored: texts that say the same are found, left out, and refused where they are not."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_multimodal.autointerp.contrastive import Contrastive
from sae_lens_multimodal.autointerp.explain import explain
from sae_lens_multimodal.autointerp.explanation import Explanation, Shown
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges import ScriptedJudge
from sae_lens_multimodal.autointerp.procedures import Procedure
from sae_lens_multimodal.autointerp.repeats import ReadTexts, check_unread, say_the_same, words_of
from sae_lens_multimodal.autointerp.results import read_verdicts
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.autointerp.scorers import DetectionScorer, FuzzingScorer, Sampling, Scorer
from sae_lens_multimodal.autointerp.selection import HeldOut, held_out, split_examples
from sae_lens_multimodal.autointerp.texts import marked_text
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.features.example import Example
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book
from tests.autointerp.sample import TEXT_FEATURE, perfect
from tests.autointerp.test_texts import example

BOOK = scenes_prompt_book()
GENERAL = GeneralPrompts()
VOCABULARY = st.lists(st.sampled_from("abc"), max_size=12)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("A red circle.", "a  [ red ] CIRCLE"),
        ("un<<happy>> dog", "unhappy <<dog>>"),
        ("\uff52\uff45\uff44 circle", "red circle"),
        ("STRASSE", "straße"),
        ("the dog sat on the red mat today", "a cat saw that the dog sat on the red mat"),
        ("the dog sat on the red mat", "at night the dog sat on the red mat and slept until noon before it went away"),
    ],
)
def test_case_blanks_marks_and_what_stands_around_make_no_difference(first: str, second: str) -> None:
    assert say_the_same(words_of(first), words_of(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a red circle", "a blue circle"),
        ("a red circle", "a red circle and a star"),
        ("the dog sat on the red mat", "the cat sat on a red mat"),
        (
            "user what is in the picture assistant a dog on a mat",
            "user what is in the picture assistant two men talk by a car",
        ),
    ],
)
def test_other_words_are_another_text(first: str, second: str) -> None:
    assert not say_the_same(words_of(first), words_of(second))


@given(VOCABULARY, VOCABULARY)
def test_same_texts_share_half_of_the_runs_of_five_words(first: list[str], second: list[str]) -> None:
    runs = [{" ".join(words[at : at + 5]) for at in range(len(words) - 4)} for words in (first, second)]
    least = min(map(len, runs))
    expected = first == second or (least > 0 and len(runs[0] & runs[1]) / least >= 0.5)
    assert say_the_same(tuple(first), tuple(second)) == expected == say_the_same(tuple(second), tuple(first))


def test_texts_of_one_item_may_say_the_same_and_those_of_two_may_not() -> None:
    read = ReadTexts(["a [ red ] circle ."])
    assert not read.take("a red [ circle ] .")
    assert read.take("a [ blue ] star .", "a blue [ star ] .")
    assert not read.take("a green star .", "a blue star .")
    assert read.take("a green star .")
    assert read.take("?")
    assert read.take("!"), "what has no words says nothing"


def test_texts_that_were_read_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"feature 3 .*'A Red circle' of prompt 7.*the explainer saw that"):
        check_unread(3, [(7, "A Red circle")], read=["a [ red ] circle ."])
    with pytest.raises(SelectionError, match="prompt 8 and on nearly the same of prompt 7"):
        check_unread(3, [(7, "a [ blue ] star ."), (8, "a blue [ star ] .")], read=[])
    check_unread(3, [(7, "a [ blue ] star ."), (7, "a blue [ star ] .")], read=["a [ red ] circle ."])


def plain(text: str | None) -> str:
    """Leave letters and single blanks only."""
    return " ".join(re.sub(r"[^a-z ]", "", (text or "").lower()).split())


@pytest.mark.parametrize("procedure", [None, Contrastive()])
def test_no_scored_text_says_what_was_read_or_what_another_one_says(
    store: FeatureStore, tmp_path: Path, procedure: Procedure | None
) -> None:
    options = {"features": [TEXT_FEATURE], "prompts": BOOK, "procedure": procedure, "progress": False}
    (one,) = explain(store, ScriptedJudge(perfect), output=tmp_path / "out", **options)  # type: ignore[arg-type]
    read = {plain(text) for text in one.texts}
    assert read
    rng = np.random.default_rng(0)
    left = held_out(store, TEXT_FEATURE, "text", prompts=one.prompt_ids, images=one.image_ids, rng=rng)
    written = [plain(BOOK.mark(text.tokens, text.marked)) for e in left.firing if (text := marked_text(e))]
    assert read & set(written), "other prompts hold the very words that the explainer saw"
    (found,) = score(
        store,
        ScriptedJudge(perfect),
        [one],
        output=tmp_path / "scores",
        prompts=BOOK,
        scorers=["fuzzing"],
        progress=False,
    )
    verdicts = read_verdicts(tmp_path / "scores")
    assert found.n == len(verdicts) >= 4
    assert read.isdisjoint({plain(verdict.text) for verdict in verdicts})
    owners = {(plain(verdict.text), verdict.prompt_id) for verdict in verdicts}
    assert len(owners) == len({text for text, _ in owners})


def test_validation_texts_are_not_those_of_the_explainer(store: FeatureStore, tmp_path: Path) -> None:
    options = {"features": [TEXT_FEATURE], "prompts": BOOK, "procedure": Contrastive(), "progress": False}
    (one,) = explain(store, ScriptedJudge(perfect), output=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert one.validated_on
    shown, validated = ({plain(item.text) for item in kind} for kind in (one.shown, one.validated_on))
    assert shown.isdisjoint(validated)
    assert len({plain(item.text) for item in one.shown if item.active}) == sum(item.active for item in one.shown)


def test_examples_that_say_the_same_are_dealt_out_once(store: FeatureStore) -> None:
    def written(one: Example) -> str:
        text = marked_text(one)
        assert text is not None
        return BOOK.mark(text.tokens, text.marked)

    split = split_examples(
        store,
        TEXT_FEATURE,
        "text",
        n_explain=9,
        n_validate=9,
        n_silent=3,
        rng=np.random.default_rng(0),
        text_of=written,
    )
    texts = [plain(written(one)) for one in [*split.explain, *split.validate.firing]]
    assert len(set(texts)) == len(texts) > 3


LONG = "when the old man came home he saw that his red bicycle stood in the rain behind the house"
OTHER = "nobody in the whole village would have thought that the red bus could ever come so early"


def held(*sentences: str, read: tuple[str, ...] = ()) -> HeldOut:
    firing = []
    for number, sentence in enumerate(sentences):
        words = sentence.split()
        tokens = [f" {word}" for word in words]
        firing.append(example(tokens, {words.index("red"): 1.0}, prompt_id=number))
    silent = [example([f" {word}" for word in LONG.split() if word != "red"], {}, prompt_id=99)]
    return HeldOut(feature=0, modality="text", firing=firing, silent=silent, read=read)


@pytest.mark.parametrize("scorer", [FuzzingScorer(), DetectionScorer()])
def test_nearly_the_same_text_is_asked_about_once_and_never_if_it_was_read(scorer: Scorer) -> None:
    nearly = f"yes {LONG.removesuffix('house')} barn"

    def prompts(examples: HeldOut) -> list[int]:
        items = scorer.items(examples, GENERAL, Sampling(), np.random.default_rng(0))
        return sorted({item.prompt_id for item in items if item.truth})

    assert prompts(held(LONG, nearly, OTHER)) == [0, 2]
    assert prompts(held(LONG, nearly, OTHER, read=(nearly.upper(),))) == [2]
    assert prompts(held(LONG, OTHER, read=("red", "the old man"))) == [0, 1]


def test_a_scorer_that_does_not_look_is_stopped(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    firing = held_out(store, TEXT_FEATURE, "text", prompts=[], images=[], rng=rng).firing
    text = marked_text(firing[0])
    assert text is not None
    seen = Shown(prompt_id=-1, active=True, text=BOOK.mark(text.tokens, text.marked))
    one = Explanation(feature=TEXT_FEATURE, text="red", modality="text", shown=(seen,))
    sampling = Sampling(n_positive=50, n_negative=50)
    options = {"prompts": BOOK, "sampling": sampling, "scorers": ["fuzzing"], "progress": False}
    score(store, ScriptedJudge(perfect), [one], output=tmp_path / "right", **options)  # type: ignore[arg-type]
    monkeypatch.setattr(ReadTexts, "has", lambda *_: False)
    with pytest.raises(SelectionError, match="the explainer saw that or nearly that"):
        score(store, ScriptedJudge(perfect), [one], output=tmp_path / "wrong", **options)  # type: ignore[arg-type]

"""Words at hand: the one a feature fires on, those of its pictures' texts, and the explainer for the rest."""

from __future__ import annotations

from collections import Counter
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.explain import explain
from sae_lens_multimodal.autointerp.explainers.words import PictureTexts, own_word
from sae_lens_multimodal.autointerp.explainers.words_first import OWN_WORD, PICTURE_TEXTS, WordsFirst
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges import JudgeRequest, ScriptedJudge
from sae_lens_multimodal.autointerp.results import read_verdicts
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.autointerp.selection import used_and_left
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.features.schema import Kind, ModalityName
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.writer import StoreWriter
from sae_lens_multimodal.types import Modality

DOG, CAPTIONED, UNCLEAR, BOTH = 0, 1, 2, 3
"""Features: fires on the word "dog", which has two tokens; on pictures whose caption says "star"; on pictures with any
caption; on such pictures, and on the word "dog"."""
N = 24


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory, model: VisionLanguageModel) -> FeatureStore:
    """Half of the captions say "star", the others "cross"; every prompt is a picture and its caption."""
    writer = StoreWriter(tmp_path_factory.mktemp("captions") / "store", d_sae=8, hook_name="blocks.0.hook_resid_post")
    lists: dict[tuple[int, ModalityName], dict[int, Any]] = {
        (DOG, "text"): {},
        (CAPTIONED, "image"): {},
        (UNCLEAR, "image"): {},
        (BOTH, "image"): {},
        (BOTH, "text"): {},
    }
    for row in range(2 * N):
        has_star, other_half = row % 2 == 0, row % 4 < 2
        tokens, layout = _add_prompt(writer, model, row, "star" if has_star else "cross")
        on_picture = np.where(layout.modality[0].numpy() == Modality.IMAGE, np.float32(3 + row % 5), np.float32(0))
        on_dog = np.array([4.0 if token == "og" else 0.0 for token in tokens], np.float32)
        lists[CAPTIONED, "image"][row] = on_picture * has_star
        lists[UNCLEAR, "image"][row] = on_picture * other_half
        lists[BOTH, "image"][row] = on_picture * other_half
        lists[BOTH, "text"][row] = on_dog
        lists[DOG, "text"][row] = on_dog * other_half
    for (feature, modality), rows in lists.items():
        _add_lists(writer, feature, modality, rows)
    return writer.finish()


def _add_prompt(writer: StoreWriter, model: VisionLanguageModel, row: int, thing: str) -> tuple[list[str], Any]:
    """Write the words as a tokenizer of word pieces would: with their blanks, and "dog" in two pieces."""
    picture = Image.fromarray(np.random.default_rng(row).integers(0, 255, (48, 48, 3), dtype=np.uint8))
    text = f"a {('red', 'blue', 'green')[row % 3]} {thing} , letter x"
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    batch = model.encode([[{"role": "user", "content": parts}]])
    layout = batch.layout.row(0)
    is_text = layout.modality[0].numpy() == Modality.TEXT
    tokens = [
        {"letter": " d", "x": "og"}.get(token, f" {token}") if shown else token
        for token, shown in zip(model.token_strings(batch["input_ids"][0]), is_text, strict=True)
    ]
    writer.add_prompt(row, tokens=tokens, layout=layout, images=[picture])
    return tokens, layout


def _add_lists(writer: StoreWriter, feature: int, modality: ModalityName, rows: dict[int, Any]) -> None:
    firing = sorted((key for key, row in rows.items() if row.any()), key=lambda key: -rows[key].max())
    silent = [key for key, row in rows.items() if not row.any()]
    kinds: dict[Kind, list[int]] = {"top": firing[:10], "ordinary": firing[10:N], "silent": silent}
    for kind, keys in kinds.items():
        for key in keys:
            writer.add_example(feature, prompt_id=key, activations=rows[key], kind=kind, modality=modality)


def run(store: FeatureStore, answer: Any, folder: Path, **options: Any) -> tuple[list[Any], list[JudgeRequest]]:
    judge = ScriptedJudge(answer)
    given: dict[str, Any] = {"procedure": WordsFirst(), "prompts": GeneralPrompts(), "progress": False, **options}
    return explain(store, judge, output=folder, **given), judge.requests


def nothing(_: JudgeRequest) -> str:
    return '{"common": false, "explanation": "", "label": ""}'


def test_the_word_it_fires_on_is_put_together_from_its_tokens(captions: FeatureStore) -> None:
    firing, silent = captions.examples(DOG, "top", "text"), captions.examples(DOG, "silent", "text")
    assert own_word(firing) == ("dog", 1.0, 1.0)
    assert own_word(firing, silent) == ("dog", 1.0, len(firing) / (len(firing) + len(silent)))
    assert own_word([]) is None
    assert own_word(captions.examples(CAPTIONED, "top", "image")) is None, "it fires on no text"


def test_words_without_blanks_are_tokens(store: FeatureStore) -> None:
    found = own_word(store.examples(4, "top", "text"))
    assert found is not None
    assert (found.word, found.recall, found.precision) == ("red", 1.0, 1.0)


def test_key_words_are_those_that_chance_would_not_give(captions: FeatureStore) -> None:
    texts = PictureTexts.of(captions)
    assert len(texts.words) == 2 * N
    stars = [one.prompt_id for one in captions.examples(CAPTIONED, "top", "image")]
    first, *others = texts.key_words(stars)
    assert (first.word, first.share) == ("star", 1.0)
    n_others = 2 * N - len(stars)
    usual = (N - len(stars) + 0.5) / (n_others + 1)
    assert first.usual_share == pytest.approx(usual)
    # all ten of ten, and five words were looked at: a colour, "star", "dog" and the other two colours
    looked_at = 1 + len(others)
    assert first.p_value == pytest.approx(comb(N, len(stars)) / comb(2 * N, len(stars)) * looked_at)
    assert all(one.p_value > 0.05 for one in others)
    assert "a" not in {one.word for one in (first, *others)}
    assert texts.key_words([]) == []


def test_the_tail_is_the_hypergeometric_one(captions: FeatureStore) -> None:
    texts = PictureTexts.of(captions)
    chosen = [*range(0, 16, 2), 1, 3]  # eight with a star, two with a cross
    found = {one.word: one for one in texts.key_words(chosen)}
    tail = sum(comb(N, k) * comb(N, 10 - k) for k in (8, 9, 10)) / comb(2 * N, 10)
    assert found["star"].p_value == pytest.approx(tail * len(found))


@pytest.mark.parametrize("n_prompts", [40, 120])
def test_pictures_drawn_at_random_hardly_ever_have_a_key_word(n_prompts: int) -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"w{chr(97 + one // 26)}{chr(97 + one % 26)}" for one in range(40)]
    found = 0
    for _ in range(100):
        words = {one: frozenset(rng.choice(vocabulary, 8, replace=False).tolist()) for one in range(n_prompts)}
        texts = PictureTexts(words, Counter(word for some in words.values() for word in some))
        keys = texts.key_words(rng.choice(n_prompts, 24, replace=False).tolist())
        found += bool(keys) and keys[0].p_value <= 0.05
    assert found <= 10  # .05 of 100, and twice its standard deviation


def test_what_words_tell_costs_no_call(captions: FeatureStore, tmp_path: Path) -> None:
    features = [DOG, CAPTIONED, BOTH]
    silent_dog = WordsFirst(min_precision=0.4)
    found, requests = run(captions, nothing, tmp_path / "out", features=features, procedure=silent_dog)
    told = {(one.feature, one.modality): (one.text, one.label, one.judge, one.procedure) for one in found}
    assert told[DOG, "text"] == ('the word "dog"', "dog", OWN_WORD, "words_first")
    assert told[CAPTIONED, "image"] == ("star", "star", PICTURE_TEXTS, "words_first")
    assert {text for (feature, _), (text, *_) in told.items() if feature == BOTH} <= {"dog", 'the word "dog"'}
    assert requests == []


def test_the_explainer_is_asked_about_the_rest(captions: FeatureStore, tmp_path: Path) -> None:
    found, requests = run(captions, nothing, tmp_path / "out", features=[CAPTIONED, UNCLEAR])
    assert [(one.feature, one.status, one.procedure) for one in found] == [
        (CAPTIONED, "explained", "words_first"),
        (UNCLEAR, "nothing in common", "general"),
    ]
    assert len(requests) == 1


@pytest.mark.parametrize("settings", [{"min_precision": 0.9}, {"ignored": frozenset({"dog"})}])
def test_a_word_that_is_not_its_own_is_none(captions: FeatureStore, tmp_path: Path, settings: dict[str, Any]) -> None:
    """It is silent on every other dog."""
    procedure = WordsFirst(**settings)
    (found,), requests = run(captions, nothing, tmp_path / "out", features=[DOG], procedure=procedure)
    assert (found.status, len(requests)) == ("nothing in common", 1)


def test_some_examples_are_left_to_score_with(captions: FeatureStore, tmp_path: Path) -> None:
    used, left = used_and_left(captions, CAPTIONED, "image", 8, np.random.default_rng(0))
    assert (len(used), len(left)) == (N - 8, 8)
    assert {one.prompt_id for one in used}.isdisjoint(one.prompt_id for one in left)
    found, _ = run(captions, nothing, tmp_path / "out", features=[CAPTIONED])
    yes = ScriptedJudge(lambda _: '{"answer": "yes"}')
    (scored,) = score(
        captions, yes, found, output=tmp_path / "scores", scorers=["detection"], control=False, progress=False
    )
    assert scored.n > 0
    seen = set(found[0].prompt_ids)
    assert seen.isdisjoint(one.prompt_id for one in read_verdicts(tmp_path / "scores"))


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="n_left"):
        WordsFirst(n_left=-1)
    with pytest.raises(ConfigError, match="significance"):
        WordsFirst(significance=2)

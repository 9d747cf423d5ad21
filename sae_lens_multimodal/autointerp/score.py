"""Testing explanations on held-out examples with a judge, each beside another feature's explanation as a control."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from sae_lens_multimodal.autointerp.costs import ledger_kept
from sae_lens_multimodal.autointerp.explain import store_name
from sae_lens_multimodal.autointerp.explanation import MODALITIES, Explanation, ModalityName
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeFailure, JudgeRequest, Outcome
from sae_lens_multimodal.autointerp.metrics import derangement
from sae_lens_multimodal.autointerp.procedures import read_answer
from sae_lens_multimodal.autointerp.prompts import PromptBook
from sae_lens_multimodal.autointerp.records import RecordFolder
from sae_lens_multimodal.autointerp.repeats import check_unread
from sae_lens_multimodal.autointerp.results import (
    KIND,
    SCHEMA_VERSION,
    SCORES,
    SUMMARY,
    VERDICTS,
    Score,
    Verdict,
    score_of,
    summarise,
    unscored,
)
from sae_lens_multimodal.autointerp.scorers import SCORERS, Item, Sampling, Scorer
from sae_lens_multimodal.autointerp.selection import held_out
from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.files import write_json

if TYPE_CHECKING:
    from sae_lens_multimodal.features.store import FeatureStore

EXPLANATIONS_AT_ONCE = 32
"""Requests about so many explanations are made, held in memory and asked together."""

_Key = tuple[int, ModalityName, str]
"""Feature, modality, scorer."""


class _Question(NamedTuple):
    """One request, and what its answer will be compared with."""

    test: _Test
    item: Item
    position: int
    control: bool
    request: JudgeRequest


@dataclass
class _Test:
    """One explanation in one scorer's hands, while its verdicts come in."""

    explanation: Explanation
    scorer: Scorer
    control: Explanation | None
    n_open: int = 0
    n_not_asked: int = 0
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def key(self) -> _Key:
        return self.explanation.feature, self.explanation.modality, self.scorer.name

    def score(self) -> Score:
        if self.explanation.status != "explained":
            return unscored(self.explanation, self.scorer.name)
        control = None if self.control is None else (self.control.feature, self.control.text)
        return score_of(
            feature=self.explanation.feature,
            modality=self.explanation.modality,
            scorer=self.scorer.name,
            explanation=self.explanation.text,
            explanation_digest=self.explanation.digest,
            control=control,
            verdicts=self.verdicts,
            n_not_asked=self.n_not_asked,
        )


def score(
    store: FeatureStore,
    judge: Judge,
    explanations: Sequence[Explanation],
    *,
    output: Path | str,
    prompts: PromptBook | None = None,
    scorers: Sequence[str] = ("detection", "fuzzing"),
    sampling: Sampling | None = None,
    control: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> list[Score]:
    """Test explanations: does a judge who knows only the words find the pictures, regions and words?

    Verdicts and scores are added to `verdicts.jsonl` and `scores.jsonl` as they come; running again goes on where it
    stopped. `summary.json` sums up all scores of the folder at the end; `ledger.json` says what all runs together
    cost: requests asked and answered from the cache, tokens, seconds, failures.

    A folder can grow: give more explanations, or other scorers, and only what is new is asked. A score that is there
    is kept as long as its own explanation is the same, with the control that was drawn then, though among more
    explanations another one might be drawn now. Only what had no explanation, or nothing to control it, is tested anew
    once there is one.

    Args:
        store: the features and their examples.
        judge: who judges; it may be another model than the explainer.
        explanations: those of `explain`, or of `read_explanations`.
        output: folder of the results.
        prompts: the phrases; None: those for models that follow instructions.
        scorers: names out of `SCORERS`.
        sampling: how many items, and how they are cut.
        control: ask about the same items with another feature's explanation, too.
        seed: of the choice and the order of items, and of the controls.
        progress: show a bar on stderr.

    Returns:
        A score for each explanation and scorer, in that order. One without words gets a score without numbers.

    Raises:
        ConfigError: an unknown scorer, or numbers that cannot work.
        JudgeError: the judge cannot be asked at all; what was answered so far is kept.
        SelectionError: an example to score with, or a text that says the same, was shown to the explainer.
        StoreError: the folder holds results made with other settings, or of another explanation of the same feature.
    """
    book = GeneralPrompts() if prompts is None else prompts
    sampling = Sampling() if sampling is None else sampling
    _check(scorers, sampling, explanations)
    settings = {
        "judge": judge.cache_name,
        "prompts": book.version,
        "sampling": asdict(sampling),
        "control": control,
        "seed": seed,
        "store": store_name(store),
    }
    folder = RecordFolder(output, kind=KIND, schema_version=SCHEMA_VERSION, settings=settings)
    tests = _tests(explanations, [SCORERS[name] for name in scorers], control=control, seed=seed)
    known = _known(folder, tests)
    missing = [test for test in tests if test.key not in known]
    maker = _Maker(store, book, sampling, seed)
    at_once = EXPLANATIONS_AT_ONCE * len(scorers)
    bar = tqdm(total=len(missing), desc="score", unit="test", disable=not progress)
    with bar, ledger_kept(judge, folder.folder):
        for start in range(0, len(missing), at_once):
            for test in _finished(judge, book, maker, missing[start : start + at_once]):
                result = test.score()
                folder.append(VERDICTS, [verdict.to_json() for verdict in test.verdicts])
                folder.append(SCORES, [result.to_json()])
                known[test.key] = result
                bar.update()
    results = {test.key: known[test.key] for test in tests}
    every = list({**results, **known}.values())
    write_json(folder.folder / f"{SUMMARY}.json", [one.to_json() for one in summarise(every, seed=seed)])
    return list(results.values())


def _check(scorers: Sequence[str], sampling: Sampling, explanations: Sequence[Explanation]) -> None:
    unknown = [name for name in scorers if name not in SCORERS]
    if unknown or not scorers:
        raise ConfigError(f"scorers are {list(scorers)}; expected some of {', '.join(SCORERS)}.")
    if min(sampling.n_positive, sampling.n_negative) < 1 or sampling.context < 0:
        raise ConfigError(f"{sampling}: n_positive and n_negative must be at least 1, context at least 0.")
    keys = [(one.feature, one.modality) for one in explanations]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"feature {twice[0]} is explained from {twice[1]} twice; give one explanation.")


def _known(folder: RecordFolder, tests: Sequence[_Test]) -> dict[_Key, Score]:
    """Read the scores that stay, and drop the others, and verdicts of tests that a killed run left unfinished."""
    scores = [Score.from_json(record) for record in folder.read(SCORES)]
    wanted = {test.key: test for test in tests}
    found: dict[_Key, Score] = {(one.feature, one.modality, one.scorer): one for one in scores}
    known = {key: one for key, one in found.items() if key not in wanted or _holds(one, wanted[key], folder)}
    # scores first: verdicts without a score are dropped the next time, too
    if len(known) < len(scores):
        folder.replace(SCORES, [one.to_json() for one in known.values()])
    verdicts = folder.read(VERDICTS)
    kept = [one for one in verdicts if (one["feature"], one["modality"], one["scorer"]) in known]
    if len(kept) < len(verdicts):
        folder.replace(VERDICTS, kept)
    return known


def _holds(found: Score, test: _Test, folder: RecordFolder) -> bool:
    """Tell whether a score that is there is that of the test; not where it can have numbers or a control only now."""
    if found.explanation_digest != test.explanation.digest:
        if not found.explanation:
            return False
        raise StoreError(
            f"{folder.folder} holds the score of another explanation of feature {found.feature} from {found.modality}: "
            f"{found.explanation[:80]!r}, now {test.explanation.text[:80]!r} (other words, or the "
            "same from other examples). Give another folder."
        )
    return found.control_feature is not None or test.control is None


def _tests(explanations: Sequence[Explanation], scorers: Sequence[Scorer], *, control: bool, seed: int) -> list[_Test]:
    """Make every test; controls are drawn among explanations of the same modality, where there are different ones."""
    controls = controls_for(explanations, seed=seed)
    return [
        _Test(explanation=one, scorer=scorer, control=controls.get(id(one)) if control else None)
        for one in explanations
        for scorer in scorers
    ]


def controls_for(explanations: Sequence[Explanation], *, seed: int) -> dict[int, Explanation]:
    """Draw for each explanation another feature's, of the same modality where there are different ones: by `id`."""
    explained = [one for one in explanations if one.status == "explained"]
    controls: dict[int, Explanation] = {}
    for group in (explained, *([one for one in explained if one.modality == modality] for modality in MODALITIES)):
        for one, other in zip(group, derangement([one.text for one in group], seed=seed), strict=True):
            if other is not None:
                controls[id(one)] = group[other]
    return controls


def _finished(judge: Judge, book: PromptBook, maker: _Maker, tests: Sequence[_Test]) -> Iterator[_Test]:
    """Ask everything that the tests need, and yield each as soon as it has all its verdicts."""
    questions = [question for test in tests for question in maker.questions(test)]
    yield from (test for test in tests if not test.n_open)
    for index, outcome in judge.stream([question.request for question in questions]):
        question = questions[index]
        question.test.verdicts.append(_verdict(book, question, outcome))
        question.test.n_open -= 1
        if not question.test.n_open:
            question.test.verdicts.sort(key=lambda verdict: (verdict.control, verdict.position))
            yield question.test


def _verdict(book: PromptBook, question: _Question, outcome: Outcome) -> Verdict:
    """Read the judge's reply; one that does not parse is a failure."""
    answer = read_answer(book, question.request, outcome)
    test, item = question.test, question.item
    asked_with = test.control if question.control and test.control is not None else test.explanation
    return Verdict(
        feature=test.explanation.feature,
        modality=test.explanation.modality,
        scorer=test.scorer.name,
        control=question.control,
        position=question.position,
        explanation=asked_with.text,
        truth=item.truth,
        answer=None if isinstance(answer, JudgeFailure) else answer,
        prompt_id=item.prompt_id,
        kind=item.kind,
        image=item.image,
        box=item.box,
        text=item.text,
        failure=answer if isinstance(answer, JudgeFailure) else None,
        style=item.style,
        quantile=item.quantile,
    )


class _Maker:
    """Makes the questions of a test."""

    def __init__(self, store: FeatureStore, book: PromptBook, sampling: Sampling, seed: int) -> None:
        self.store = store
        self.book = book
        self.sampling = sampling
        self.seed = seed

    def questions(self, test: _Test) -> list[_Question]:
        """Make all questions of one test, and note on it how many are open."""
        if test.explanation.status != "explained":
            return []
        asked: list[_Question] = []
        for position, item in enumerate(self._items(test)):
            for control, explanation in ((False, test.explanation), (True, test.control)):
                if explanation is None:
                    continue
                request = test.scorer.request(self.book, explanation.text, item)
                if request is not None:
                    asked.append(_Question(test, item, position, control, request))
                elif not control:
                    test.n_not_asked += 1
        test.n_open = len(asked)
        return asked

    def _items(self, test: _Test) -> list[Item]:
        """Make the items: the same ones whatever else is scored, whenever."""
        one = test.explanation
        rng = np.random.default_rng((self.seed, one.feature, zlib.crc32(f"{one.modality} {test.scorer.name}".encode())))
        examples = held_out(
            self.store,
            one.feature,
            one.modality,
            prompts=one.prompt_ids,
            images=one.image_ids,
            texts=one.texts,
            rng=rng,
            both_lists=test.scorer.both_lists,
        )
        items = test.scorer.items(examples, self.book, self.sampling, rng)
        check_unread(one.feature, [(item.prompt_id, item.text) for item in items if item.text], read=one.texts)
        return items

"""Surprisal: formulas by hand and by scikit-learn, the tiny model as judge, servers with log-probabilities or none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges import (
    CachedJudge,
    FailureKind,
    ForecastJudge,
    Judge,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    OpenAIJudge,
    Outcome,
    ReplyToken,
    ScriptedJudge,
    TransformersJudge,
)
from sae_lens_multimodal.autointerp.measurer import Measure
from sae_lens_multimodal.autointerp.measures import measure
from sae_lens_multimodal.autointerp.scorers.surprisal import MOST_BITS, SurprisalScorer
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book
from tests.autointerp.sample import COLOURS, TEXT_FEATURE, perfect
from tests.autointerp.server import Answer, Server, completion, serving

BOOK = scenes_prompt_book()
RIGHT = [Explanation(feature=feature, text=colour) for feature, colour in enumerate(COLOURS)]
TEXT = Explanation(feature=TEXT_FEATURE, text="red", modality="text")


def run(store: FeatureStore, judge: Judge, output: Path, *explanations: Explanation, **options: Any) -> list[Measure]:
    book = options.pop("book", BOOK)
    scorer = SurprisalScorer(judge, book, **{"n_items": 4, **options})
    return measure(store, list(explanations or RIGHT), [scorer], output=output, progress=False)


def sure(answer: str, yes: float) -> JudgeReply:
    top = (("yes", math.log(yes)), ("no", math.log(1 - yes)))
    return JudgeReply(
        text=answer, log_probabilities=(ReplyToken(token=answer, log_probability=dict(top)[answer], top=top),)
    )


class _Noisy:
    """Sees, but is less sure of some items than of others, and notes what it said of what is true."""

    def __init__(self, *, fails_each: int = 0) -> None:
        self.rng, self.fails_each, self.said = np.random.default_rng(0), fails_each, dict[str, float | None]()

    def __call__(self, request: JudgeRequest) -> str | Outcome:
        if request.digest not in self.said:
            true = perfect(request) == "yes"
            drawn = float(np.clip(self.rng.normal(0.65 if true else 0.35, 0.2), 0.02, 0.98))
            fails = self.fails_each and len(self.said) % self.fails_each == 1
            self.said[request.digest] = None if fails else drawn
        yes = self.said[request.digest]
        if yes is None:
            return JudgeFailure.of(request, FailureKind.TIMEOUT, "late")
        return sure("yes" if yes >= 0.5 else "no", yes)


def asked_about(judge: ScriptedJudge, explanation: str) -> dict[str, bool]:
    """The requests with one explanation, and whether the right answer is yes."""
    found = [one for one in judge.requests if f" {explanation} ?" in str(one.parts[-1])]
    return {one.digest: perfect(one) == "yes" for one in found}


def test_numbers_are_those_of_the_formulas(store: FeatureStore, tmp_path: Path) -> None:
    noisy = _Noisy()
    judge = ScriptedJudge(noisy)
    (red,) = run(store, judge, tmp_path / "out", RIGHT[0])
    truths = asked_about(judge, "red")
    right = [value for value in truths.values()]
    yes = [noisy.said[digest] for digest in truths]
    assert (red.found.n, red.found.n_failed, sorted(set(right))) == (8, 0, [False, True])
    assert red.found.values["auroc"] == pytest.approx(roc_auc_score(right, yes))
    # four of each kind, so that all items count alike
    assert red.found.values["surprisal_bits"] == pytest.approx(log_loss(right, yes) / math.log(2))
    assert red.found.values["auroc_strict"] == red.found.values["auroc"]
    assert red.found.by_band["top"]["surprisal_bits"] > 0
    assert not [name for name in red.found.values if name.startswith("gain")], "a script rates no words"


def test_failures_are_missing_in_one_number_and_certain_of_the_wrong_in_the_other(
    store: FeatureStore, tmp_path: Path
) -> None:
    noisy = _Noisy(fails_each=4)
    judge = ScriptedJudge(noisy)
    red, green = run(store, judge, tmp_path / "out", *RIGHT[:2])
    truths = asked_about(judge, "red")
    own = {digest: value for digest, value in truths.items() if digest in noisy.said}
    known = {digest: value for digest, value in own.items() if noisy.said[digest] is not None}
    assert 0 < red.found.n_failed < red.found.n
    assert len(known) < len(own)
    for one in (red, green):
        assert one.found.values["surprisal_bits_strict"] > one.found.values["surprisal_bits"]
        assert one.found.values["auroc_strict"] < one.found.values["auroc"]
        assert one.control is not None and one.control.n_failed > 0
        # what fails of a control counts for it
        assert one.control.values["surprisal_bits_strict"] < one.control.values["surprisal_bits"]


def test_a_judge_that_always_fails_is_as_wrong_as_can_be(store: FeatureStore, tmp_path: Path) -> None:
    judge = ScriptedJudge(lambda request: JudgeFailure.of(request, FailureKind.SERVER, "down"))
    (one,) = run(store, judge, tmp_path / "out", RIGHT[0])
    assert one.found.values == {"surprisal_bits_strict": MOST_BITS, "auroc_strict": 0.0}
    assert one.found.n_failed == one.found.n == 8


def test_a_judge_that_does_not_look_is_at_chance(store: FeatureStore, tmp_path: Path) -> None:
    for one in run(store, ScriptedJudge(lambda _: sure("yes", 0.5)), tmp_path / "out"):
        assert one.found.values == {
            "auroc": 0.5,
            "auroc_strict": 0.5,
            "surprisal_bits": pytest.approx(1.0),
            "surprisal_bits_strict": pytest.approx(1.0),
        }


def test_the_tiny_model_is_not_surprised_by_what_is_right(
    store: FeatureStore, model: VisionLanguageModel, tmp_path: Path
) -> None:
    found = run(store, TransformersJudge(model), tmp_path / "out", *RIGHT[:3], TEXT)
    for one in found:
        assert one.control is not None
        assert one.found.values["surprisal_bits"] < 0.5 < 1 < one.control.values["surprisal_bits"]
        assert one.found.values["auroc"] > 0.9 > one.control.values["auroc"]
    for one in found[:3]:
        assert one.control is not None
        assert one.found.values["gain_bits"] > 0 > one.found.values["gain_bits_silent"]
        assert one.found.values["gain_auroc"] > 0.9
        assert one.control.values["gain_bits"] < 0, "another colour's name is less likely of the region than of grey"
    # which of the places that are not of that colour is the least unlike it is chance
    assert np.mean([one.control.values["gain_auroc"] for one in found[:3] if one.control]) < 0.75
    assert "gain_bits" not in found[3].found.values, "this book asks for no texts"


class _Rating(ScriptedJudge):
    """Rates texts that tell of red as one bit likelier where the description does, too."""

    rates_given_replies = True  # type: ignore[assignment]


def rated(request: JudgeRequest) -> str | Outcome:
    if request.given_reply is None:
        return sure("yes", 0.5)
    fits = "Description: red" in request.text and "red" in request.given_reply
    bits = -4.0 if fits else -5.0
    tokens = (ReplyToken(token="a", log_probability=0.5 * bits * math.log(2)),) * 2
    return JudgeReply(text=request.given_reply, log_probabilities=tokens)


def test_gains_of_texts_are_bits_above_no_explanation(store: FeatureStore, tmp_path: Path) -> None:
    judge = _Rating(rated)
    (one,) = run(store, judge, tmp_path / "out", TEXT, book=GeneralPrompts())
    assert one.found.values["gain_bits"] == pytest.approx(1.0)
    assert one.found.values["gain_bits_silent"] == pytest.approx(0.0)
    assert one.found.values["gain_auroc"] == one.found.values["gain_auroc_strict"] == 1.0
    given = [request for request in judge.requests if request.given_reply is not None]
    for with_it, without in zip(given[::2], given[1::2], strict=True):
        assert with_it.given_reply == without.given_reply
        assert "Description: red\n" in with_it.text and "nothing in common" in without.text


def test_gains_that_fail_count_both_ways(store: FeatureStore, tmp_path: Path) -> None:
    turn = iter(range(1000))

    def torn(request: JudgeRequest) -> str | Outcome:
        if request.given_reply is not None and next(turn) % 4 == 0:
            return JudgeFailure.of(request, FailureKind.REJECTED, "too long")
        return rated(request)

    (one,) = run(store, _Rating(torn), tmp_path / "out", TEXT, book=GeneralPrompts())
    assert one.found.values["gain_auroc"] == 1.0 > one.found.values["gain_auroc_strict"]


def test_regions_are_rated_beside_grey_ones_of_the_same_size(store: FeatureStore, tmp_path: Path) -> None:
    judge = _Rating(rated)
    (one,) = run(store, judge, tmp_path / "out", RIGHT[0], book=GeneralPrompts())
    assert one.found.values["gain_auroc"] == 0.5
    given = [request for request in judge.requests if request.given_reply is not None]
    assert len(given) == 16
    for with_it, without in zip(given[::2], given[1::2], strict=True):
        assert with_it.given_reply == without.given_reply == "red"
        assert with_it.pictures[0].size == without.pictures[0].size
        assert without.pictures[0].getextrema() == ((127, 127),) * 3


def judge_at(url: str) -> OpenAIJudge:
    return OpenAIJudge("m", base_url=url, max_retries=0, timeout_seconds=5.0)


@pytest.fixture
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_loopback_only")
def test_a_server_without_log_probabilities_is_asked_once(store: FeatureStore, tmp_path: Path) -> None:
    with serving(lambda *_: completion('{"answer": "yes"}')) as server:
        found = run(store, judge_at(server.url), tmp_path / "out", book=GeneralPrompts())
    assert {one.found.note for one in found} == {"skipped: the judge gives no log-probabilities"}
    assert len(server.bodies) == 1
    assert all(one.control is None and not one.found.values for one in found)
    again = run(store, ScriptedJudge(lambda _: sure("yes", 0.5), name=judge_at(server.url).id), tmp_path / "again")
    assert all(one.found.values for one in again)


@pytest.mark.usefixtures("_loopback_only")
def test_a_server_with_log_probabilities_gives_the_verdicts_part(store: FeatureStore, tmp_path: Path) -> None:
    def answer(_: int, body: dict[str, Any], __: Server) -> Answer:
        assert body["top_logprobs"] == 20
        top = [{"token": "yes", "logprob": math.log(0.75)}, {"token": " no", "logprob": math.log(0.25)}]
        yes = {"token": "yes", "logprob": math.log(0.75), "top_logprobs": top}
        around = [{"token": one, "logprob": 0.0, "top_logprobs": []} for one in ('{"answer": "', '"}')]
        return completion('{"answer": "yes"}', logprobs=[around[0], yes, around[1]])

    with serving(answer) as server:
        (one,) = run(store, judge_at(server.url), tmp_path / "out", RIGHT[0], book=GeneralPrompts())
    expected = (-math.log2(0.75) - math.log2(0.25)) / 2
    assert one.found.values["surprisal_bits"] == pytest.approx(expected)
    assert one.found.values["auroc"] == 0.5


def test_a_dry_run_counts_what_is_asked(store: FeatureStore, model: VisionLanguageModel, tmp_path: Path) -> None:
    inside = TransformersJudge(model)
    judge = CachedJudge(inside, tmp_path / "a.sqlite")
    dry = ForecastJudge(judge)
    run(store, dry, tmp_path / "dry", *RIGHT[:2])
    assert inside.ledger.calls == 0
    run(store, judge, tmp_path / "real", *RIGHT[:2])
    assert dry.forecast.calls == inside.ledger.calls


def test_what_cannot_be_asked_says_why(store: FeatureStore, tmp_path: Path) -> None:
    strange = Explanation(feature=0, text="wheels")
    (one,) = run(store, ScriptedJudge([]), tmp_path / "out", strange)
    assert one.found.note == "the prompt book has no words for this explanation"
    with pytest.raises(ConfigError, match="n_items=0"):
        SurprisalScorer(ScriptedJudge([]), BOOK, n_items=0)

"""Measures of explanations that are numbers rather than verdicts: one interface, one file of results, one summary."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tqdm import tqdm

from sae_lens_multimodal.autointerp.costs import ledger_kept
from sae_lens_multimodal.autointerp.explain import store_name
from sae_lens_multimodal.autointerp.explanation import Explanation, ModalityName
from sae_lens_multimodal.autointerp.judges.base import JudgeRequest, Outcome
from sae_lens_multimodal.autointerp.measure_summary import summary_json
from sae_lens_multimodal.autointerp.measurer import Counted, Measure, Measured, Measurer, Plan
from sae_lens_multimodal.autointerp.records import RecordFolder, lines_of_folder
from sae_lens_multimodal.autointerp.results import SUMMARY
from sae_lens_multimodal.autointerp.score import EXPLANATIONS_AT_ONCE, controls_for
from sae_lens_multimodal.autointerp.selection import held_out
from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.files import MANIFEST_NAME, read_manifest, write_json, write_manifest

if TYPE_CHECKING:
    from sae_lens_multimodal.features.store import FeatureStore

MEASURES, KIND, SCHEMA_VERSION = "measures", "measures", 1

_Key: TypeAlias = tuple[int, ModalityName, str]
"""Feature, modality, measurer."""


@dataclass
class _Test:
    """One explanation in one measurer's hands, while its answers come in."""

    explanation: Explanation
    measurer: Measurer
    other: Explanation | None
    """Whose words the control is measured with."""
    plans: list[Plan | Measured] = field(default_factory=list)
    """Of the explanation, and of its control where there is one."""
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """By place in the requests of both plans one after the other."""

    @property
    def key(self) -> _Key:
        return self.explanation.feature, self.explanation.modality, self.measurer.name

    @property
    def requests(self) -> list[JudgeRequest]:
        return [request for plan in self.plans if isinstance(plan, Plan) for request in plan.requests]

    def prepare(self, store: FeatureStore, seed: int) -> None:
        """Make the plans, both on the same items."""
        one = self.explanation
        reason = _reason(one, self.measurer)
        if reason:
            self.plans = [Measured(note=reason)]
            return
        for words in (one, self.other):
            if words is None or (self.plans and isinstance(self.plans[0], Measured)):
                continue
            name = zlib.crc32(f"{one.modality} {self.measurer.name}".encode())
            rng = np.random.default_rng((seed, one.feature, name))
            examples = held_out(
                store, one.feature, one.modality, prompts=one.prompt_ids, images=one.image_ids, texts=one.texts, rng=rng
            )
            self.plans.append(self.measurer.plan(words.text, examples, rng))

    def measure(self) -> Measure:
        """Put the outcomes together."""
        outcomes = iter([self.outcomes[place] for place in range(len(self.outcomes))])
        found: list[Measured] = []
        as_what: tuple[Counted, Counted] = ("wrong", "right")
        for plan, counted in zip(self.plans, as_what, strict=False):
            mine = [next(outcomes) for _ in plan.requests] if isinstance(plan, Plan) else []
            found.append(plan.finish(mine, counted) if isinstance(plan, Plan) else plan)
        has_control = len(found) == 2 and bool(found[0].values)
        return Measure(
            feature=self.explanation.feature,
            modality=self.explanation.modality,
            measurer=self.measurer.name,
            explanation=self.explanation.text,
            explanation_digest=self.explanation.digest,
            found=found[0],
            control=found[1] if has_control else None,
            control_explanation=self.other.text if has_control and self.other is not None else None,
        )


def measure(
    store: FeatureStore,
    explanations: Sequence[Explanation],
    measurers: Sequence[Measurer],
    *,
    output: Path | str,
    control: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> list[Measure]:
    """Measure explanations, each beside another feature's explanation on the same examples.

    Results are added to `measures.jsonl` as they come; running again goes on where it stopped. `summary.json` sums up
    all measures of the folder at the end; `ledger.json` says what all runs together cost. A folder can grow: give more
    explanations, or other measurers, and only what is new is measured, as with `score`. What was skipped is tried anew.

    Args:
        store: the features and their examples.
        explanations: those of `explain`, or of `read_explanations`.
        measurers: how; see `autointerp.scorers`.
        output: folder of the results.
        control: measure another feature's explanation on the same examples, too.
        seed: of the choice and order of items, and of the controls.
        progress: show a bar on stderr.

    Returns:
        A measure for each explanation and measurer, in that order; without numbers, and with a note that says why,
        where there is no explanation, the modality is another, or a measurer was given nothing to measure with.

    Raises:
        ConfigError: two measurers of the same name, or a feature is explained from the same modality twice.
        JudgeError: the judge cannot be asked at all; what was measured so far is kept.
        SelectionError: an example was shown to the explainer.
        StoreError: the folder holds results made with other settings, or of another explanation of the same feature.
    """
    _check(measurers, explanations)
    folder = _opened(output, measurers, {"control": control, "seed": seed, "store": store_name(store)})
    controls = controls_for(explanations, seed=seed) if control else {}
    tests = [
        _Test(one, measurer, controls.get(id(one)) if measurer.needs_words else None)
        for one in explanations
        for measurer in measurers
    ]
    known = _known(folder, tests)
    missing = [test for test in tests if test.key not in known]
    judges = {id(one.judge): one.judge for one in measurers if one.judge is not None}
    with ExitStack() as stack, tqdm(total=len(missing), desc="measure", unit="test", disable=not progress) as bar:
        for judge in judges.values():
            stack.enter_context(ledger_kept(judge, folder.folder))
        for measurer in measurers:
            for test in _finished(store, [one for one in missing if one.measurer is measurer], seed):
                known[test.key] = test.measure()
                folder.append(MEASURES, [known[test.key].to_json()])
                bar.update()
    write_json(folder.folder / f"{SUMMARY}.json", summary_json(list(known.values()), seed=seed))
    return [known[test.key] for test in tests]


def _check(measurers: Sequence[Measurer], explanations: Sequence[Explanation]) -> None:
    names = [one.name for one in measurers]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"measurers are {names}; expected at least one, each only once.")
    keys = [(one.feature, one.modality) for one in explanations]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"feature {twice[0]} is explained from {twice[1]} twice; give one explanation.")


def _opened(output: Path | str, measurers: Sequence[Measurer], others: Mapping[str, Any]) -> RecordFolder:
    """Open the folder, which may have been made with other measurers, but not with these in another way."""
    path = Path(output)
    earlier: dict[str, Any] = {}
    if (path / MANIFEST_NAME).is_file():
        manifest = read_manifest(path, kind=KIND, schema_version=SCHEMA_VERSION)
        earlier = manifest["settings"]["measurers"]
    wanted = json.loads(json.dumps({one.name: one.settings() for one in measurers}))
    settings = {"measurers": earlier or wanted, **others}
    folder = RecordFolder(path, kind=KIND, schema_version=SCHEMA_VERSION, settings=settings)
    measured = {one["measurer"] for one in folder.read(MEASURES) if one["found"]["n"]}
    for name in sorted(measured & wanted.keys() & earlier.keys()):
        if earlier[name] != wanted[name]:
            raise StoreError(
                f"{path} was made with other settings of {name}: {earlier[name]}, now {wanted[name]}. Give another "
                "folder, or the same settings to go on."
            )
    settings["measurers"] = {**earlier, **wanted}
    if settings["measurers"] != (earlier or wanted):
        write_manifest(path, kind=KIND, schema_version=SCHEMA_VERSION, settings=settings)
    return folder


def _known(folder: RecordFolder, tests: Sequence[_Test]) -> dict[_Key, Measure]:
    """Read the measures that stay, and drop the others."""
    measures = [Measure.from_json(record) for record in folder.read(MEASURES)]
    wanted = {test.key: test for test in tests}
    found: dict[_Key, Measure] = {(one.feature, one.modality, one.measurer): one for one in measures}
    known = {key: one for key, one in found.items() if key not in wanted or _holds(one, wanted[key], folder)}
    if len(known) < len(measures):
        folder.replace(MEASURES, [one.to_json() for one in known.values()])
    return known


def _holds(found: Measure, test: _Test, folder: RecordFolder) -> bool:
    """Tell whether a measure that is there is that of the test; not where it can have numbers or a control only now."""
    if found.explanation_digest != test.explanation.digest:
        if not found.explanation:
            return False
        raise StoreError(
            f"{folder.folder} holds the measure of another explanation of feature {found.feature} from "
            f"{found.modality}: {found.explanation[:80]!r}, now {test.explanation.text[:80]!r} (other words, or the "
            "same from other examples). Give another folder."
        )
    if found.found.is_skipped:
        return False
    return found.control is not None or test.other is None or not found.found.values


def _reason(one: Explanation, measurer: Measurer) -> str:
    """Say why an explanation is not measured."""
    if one.status != "explained" and measurer.needs_words:
        return "the explainer failed" if one.failure else "the explainer found nothing in common"
    if one.modality not in measurer.modalities:
        return f"{measurer.name} does not measure explanations from {one.modality}"
    return ""


def _finished(store: FeatureStore, tests: Sequence[_Test], seed: int) -> Iterator[_Test]:
    """Prepare some tests at a time, ask everything that they need together, and yield each once it has its answers."""
    for start in range(0, len(tests), EXPLANATIONS_AT_ONCE):
        asked: list[tuple[_Test, int, JudgeRequest]] = []
        for test in tests[start : start + EXPLANATIONS_AT_ONCE]:
            test.prepare(store, seed)
            asked += [(test, place, request) for place, request in enumerate(test.requests)]
            if not test.requests:
                yield test
        judge = tests[start].measurer.judge
        if judge is None or not asked:
            continue
        open_ = {id(test): len(test.requests) for test, _, _ in asked}
        for index, outcome in judge.stream([request for _, _, request in asked]):
            test, place, _ = asked[index]
            test.outcomes[place] = outcome
            if len(test.outcomes) == open_[id(test)]:
                yield test
                test.plans = []


def read_measures(folder: Path | str) -> list[Measure]:
    """Read the measures in a folder that `measure` made."""
    lines = lines_of_folder(folder, MEASURES, kind=KIND, schema_version=SCHEMA_VERSION)
    return [Measure.from_json(record) for _, record in lines]

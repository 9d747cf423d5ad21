"""Measures of explanations that are numbers rather than verdicts: one interface, one file of results, one summary."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from tqdm import tqdm

from sae_lens_multimodal.autointerp.explain import store_name
from sae_lens_multimodal.autointerp.explanation import Explanation, ModalityName
from sae_lens_multimodal.autointerp.metrics import Interval, bootstrap_mean
from sae_lens_multimodal.autointerp.quantiles import band_of
from sae_lens_multimodal.autointerp.records import RecordFolder, lines_of_folder
from sae_lens_multimodal.autointerp.score import controls_for
from sae_lens_multimodal.autointerp.selection import held_out
from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.selection import HeldOut
    from sae_lens_multimodal.features.example import Example
    from sae_lens_multimodal.features.store import FeatureStore

MEASURES, KIND, SCHEMA_VERSION = "measures", "measures", 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one measure found of one explanation: numbers by name."""

    values: Mapping[str, float] = field(default_factory=dict)
    """Means over the items; a name that ends in `_strict` counts failures as wrong."""
    by_band: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same for items of like activation: "top", "75-100", "50-75", "25-50", "0-25"."""
    n: int = 0
    """Items."""
    n_failed: int = 0
    """Items without a usable answer."""
    note: str = ""
    """Why there are no numbers, where there are none."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What one measure found of one feature's explanation, and of another feature's in its place."""

    feature: int
    modality: ModalityName
    measurer: str
    explanation: str
    explanation_digest: str
    found: Measured
    control: Measured | None = None
    """The same items with another feature's explanation; None where none was drawn, or the measure needs no words."""
    control_explanation: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the measure as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measure:
        """Read what `to_json` gave."""
        control = value["control"]
        return cls(
            **{
                **value,
                "found": Measured(**value["found"]),
                "control": None if control is None else Measured(**control),
            }
        )


class Measurer(ABC):
    """Measures explanations on examples that the explainer never saw."""

    name: ClassVar[str]
    modalities: ClassVar[tuple[ModalityName, ...]] = ("image",)
    """What it works on; for others it says that it does not."""
    needs_words: ClassVar[bool] = True
    """Whether another feature's explanation would change the result."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON values."""

    @abstractmethod
    def measure(self, text: str, examples: HeldOut, rng: np.random.Generator) -> Measured:
        """Measure one explanation.

        Args:
            text: the explanation.
            examples: what the explainer never saw.
            rng: the same for the explanation and its control, so that both meet the same items.
        """


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

    Results are added to `measures.jsonl` as they come; running again goes on where it stopped.

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
        ConfigError: two measurers of the same name.
        JudgeError: the judge cannot be asked at all; what was measured so far is kept.
        SelectionError: an example was shown to the explainer.
        StoreError: the folder holds results made with other settings.
    """
    names = [one.name for one in measurers]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"measurers are {names}; expected at least one, each only once.")
    settings = {
        "measurers": {one.name: one.settings() for one in measurers},
        "control": control,
        "seed": seed,
        "store": store_name(store),
    }
    folder = RecordFolder(output, kind=KIND, schema_version=SCHEMA_VERSION, settings=settings)
    earlier = [Measure.from_json(record) for record in folder.read(MEASURES)]
    known = {(one.explanation_digest, one.feature, one.modality, one.measurer): one for one in earlier}
    controls = controls_for(explanations, seed=seed) if control else {}
    found = []
    tests = [(one, measurer) for one in explanations for measurer in measurers]
    for one, measurer in tqdm(tests, desc="measure", unit="test", disable=not progress):
        key = (one.digest, one.feature, one.modality, measurer.name)
        if key not in known:
            known[key] = _measure(store, one, controls.get(id(one)), measurer, seed)
            folder.append(MEASURES, [known[key].to_json()])
        found.append(known[key])
    return found


def _measure(
    store: FeatureStore, one: Explanation, other: Explanation | None, measurer: Measurer, seed: int
) -> Measure:
    def measured(text: str) -> Measured:
        rng = np.random.default_rng((seed, one.feature, zlib.crc32(f"{one.modality} {measurer.name}".encode())))
        examples = held_out(
            store, one.feature, one.modality, prompts=one.prompt_ids, images=one.image_ids, texts=one.texts, rng=rng
        )
        return measurer.measure(text, examples, rng)

    control = None
    if one.status != "explained" and measurer.needs_words:
        found = Measured(note="the explainer failed" if one.failure else "the explainer found nothing in common")
    elif one.modality not in measurer.modalities:
        found = Measured(note=f"{measurer.name} does not measure explanations from {one.modality}")
    else:
        found = measured(one.text)
        control = measured(other.text) if other is not None and measurer.needs_words and found.values else None
    return Measure(
        feature=one.feature,
        modality=one.modality,
        measurer=measurer.name,
        explanation=one.text,
        explanation_digest=one.digest,
        found=found,
        control=control,
        control_explanation=other.text if control is not None and other is not None else None,
    )


@dataclass(frozen=True, kw_only=True)
class MeasureSummary:
    """One number of one measure over all features."""

    measurer: str
    modality: ModalityName
    value: str
    """Which number."""
    n_features: int
    mean: Interval | None
    control: Interval | None
    lift: Interval | None
    """Above another feature's explanation, over the features that have both."""
    by_band: Mapping[str, Interval | None]


def summarise_measures(measures: Sequence[Measure], *, seed: int = 0, level: float = 0.95) -> list[MeasureSummary]:
    """Sum measures up, with bootstrap intervals over features."""

    def interval(values: Sequence[float]) -> Interval | None:
        return bootstrap_mean(values, seed=seed, level=level)

    summaries = []
    groups = sorted({(one.measurer, one.modality, name) for one in measures for name in one.found.values})
    for measurer, modality, name in groups:
        mine = [one for one in measures if (one.measurer, one.modality) == (measurer, modality)]
        having = [one for one in mine if name in one.found.values]
        paired = [one for one in having if one.control is not None and name in one.control.values]
        bands = sorted({band for one in having for band in one.found.by_band if name in one.found.by_band[band]})
        summaries.append(
            MeasureSummary(
                measurer=measurer,
                modality=modality,
                value=name,
                n_features=len(mine),
                mean=interval([one.found.values[name] for one in having]),
                control=interval([one.control.values[name] for one in paired if one.control]),
                lift=interval([one.found.values[name] - one.control.values[name] for one in paired if one.control]),
                by_band={
                    band: interval(
                        [one.found.by_band[band][name] for one in having if name in one.found.by_band.get(band, {})]
                    )
                    for band in bands
                },
            )
        )
    return summaries


def by_band(examples: Sequence[Example], rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Average rows of numbers over examples of like activation."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for example, row in zip(examples, rows, strict=True):
        band = band_of(example.kind, example.quantile)
        if band is not None:
            groups.setdefault(band, []).append(row)
    return {band: averages(members) for band, members in sorted(groups.items())}


def averages(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average every number over the rows that have it.

    Example:
        >>> averages([{"iou": 0.5}, {"iou": 1.0, "hit": 1.0}])
        {'hit': 1.0, 'iou': 0.75}
    """
    names = sorted({name for row in rows for name in row})
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def read_measures(folder: Path | str) -> list[Measure]:
    """Read the measures in a folder that `measure` made."""
    lines = lines_of_folder(folder, MEASURES, kind=KIND, schema_version=SCHEMA_VERSION)
    return [Measure.from_json(record) for _, record in lines]

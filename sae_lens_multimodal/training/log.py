"""A run's numbers as JSON Lines on disk, and a plot of them at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import write_text
from sae_lens_multimodal.training.plot import line_charts

LOG_SUFFIX = ".log.jsonl"
PLOT_SUFFIX = ".log.svg"
_SHOWN = ("explained_variance", "l0", "dead_share")
_MOST_POINTS = 400


class TrainingLog:
    """Numbers by training step, one JSON object a line, flushed as they come.

    A line holds `step`, `tokens` and any of the names that SAE-Lens logs (`losses/...`, `metrics/...`,
    `evaluation/...`, `sparsity/...`); histograms and pictures are left out.
    """

    def __init__(self, output: Path | str, *, after_step: int = 0) -> None:
        """Begin a log, or go on with one.

        Args:
            output: the folder beside which it lies: of `runs/sae` the log is `runs/sae.log.jsonl`.
            after_step: the steps that are done already: lines of later ones are dropped, as they are logged again.
        """
        output = Path(output)
        self.path = output.with_name(output.name + LOG_SUFFIX)
        self.plot_path = output.with_name(output.name + PLOT_SUFFIX)
        kept = [line for line in _lines(self.path) if line["step"] < after_step] if after_step else []
        write_text(self.path, "".join(_dumped(line) for line in kept))

    def write(self, values: Mapping[str, Any], *, step: int, tokens: int) -> None:
        """Add a line with those of the values that are finite numbers; none if there are none."""
        numbers = {name: number for name, value in values.items() if (number := _as_number(value)) is not None}
        if numbers:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_dumped({"step": step, "tokens": tokens, **numbers}))

    def plot(self) -> Path:
        """Draw what was logged, and say where."""
        write_text(self.plot_path, line_charts(charts_of(read_log(self.path)), x_label="tokens"))
        return self.plot_path


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a log; a last line that was cut short is left out.

    Raises:
        StoreError: there is none.
    """
    if not path.is_file():
        raise StoreError(f"{path} does not exist; expected the log of a training run, such as sae{LOG_SUFFIX}.")
    return list(_lines(path))


def charts_of(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """What a run's plot shows: the loss, and each modality's explained variance, L0 and dead features."""
    charts = {"loss": {"training": _series(lines, "losses/overall_loss")}}
    for metric in _SHOWN:
        chart = charts.setdefault(metric.replace("_", " "), {})
        for modality in ("image", "text"):
            chart[modality] = _series(lines, f"metrics/{metric}_{modality}")
            chart[f"{modality}, held out"] = _series(lines, f"evaluation/{metric}_{modality}")
    return charts


def flat_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | int]:
    """The numbers of a nested mapping by their path.

    >>> flat_numbers({"final": {"image": {"l0": 8.0, "l1": None}}})
    {'final/image/l0': 8.0}
    """
    found: dict[str, float | int] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat_numbers(value, f"{prefix}{name}/"))
        elif (number := _as_number(value)) is not None:
            found[f"{prefix}{name}"] = number
    return found


def _series(lines: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    points = [(float(line["tokens"]), float(line[name])) for line in lines if name in line]
    return points[:: math.ceil(len(points) / _MOST_POINTS) or 1]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            # Only a line that a kill cut short.
            return


def _dumped(line: Mapping[str, Any]) -> str:
    return json.dumps(dict(line), allow_nan=False) + "\n"


def _as_number(value: Any) -> float | int | None:  # noqa: ANN401 - what SAE-Lens logs
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None

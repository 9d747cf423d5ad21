"""Simulation on a coarse grid: from the words alone, where in the picture would the feature fire?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeFailure, JudgeRequest, Outcome
from sae_lens_multimodal.autointerp.measurer import Counted, Measured, Measurer, Plan, by_band
from sae_lens_multimodal.autointerp.regions import heat_of
from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.selection import HeldOut
    from sae_lens_multimodal.features.example import Example

_Cells: TypeAlias = 'Float[np.ndarray, "cells"]'


class _Asked(NamedTuple):
    """What is asked about one picture."""

    requests: Sequence[JudgeRequest]
    as_grid: bool
    """Whether in one request, rather than in one for each cell."""


class SimulationScorer(Measurer):
    """Lays a coarse grid over pictures, has the judge say of each cell how well it fits, and compares with the feature.

    After the simulation of neurons (Bills et al. 2023), with cells in the place of tokens. `correlation` is Pearson's
    between what the judge says of all cells of all pictures and the mean activation there; `average_precision` that of
    the judge's ranking for the cells in which the feature fires at least half as strongly as anywhere in the picture,
    beside `prevalence`, the share of such cells, which is its chance. A picture without a usable answer is left out;
    in the strict numbers it counts as if the judge had said the opposite of what is true.

    Args:
        judge: who judges.
        book: its phrases. A book that can ask for a whole grid does; else every cell is cut out and asked about alone.
        rows: of the grid.
        columns: of the grid.
        n_firing: pictures in which the feature fires.
        n_silent: pictures in which it is silent.
        min_side_pixels: a cell that is cut out and narrower than this is enlarged.
    """

    name: ClassVar[str] = "simulation"
    judge: Judge

    def __init__(
        self,
        judge: Judge,
        book: PromptBook,
        *,
        rows: int = 4,
        columns: int = 4,
        n_firing: int = 4,
        n_silent: int = 2,
        min_side_pixels: int = 24,
    ) -> None:
        if min(rows, columns, n_firing) < 1 or n_silent < 0:
            raise ConfigError(f"rows={rows}, columns={columns}, n_firing={n_firing}; expected at least 1.")
        self.judge, self.book = judge, book
        self.rows, self.columns, self.n_firing, self.n_silent = rows, columns, n_firing, n_silent
        self.min_side_pixels = min_side_pixels

    def settings(self) -> dict[str, Any]:
        """Give judge, phrases and numbers."""
        return {
            "judge": self.judge.cache_name,
            "prompts": self.book.version,
            "grid": [self.rows, self.columns],
            "n_firing": self.n_firing,
            "n_silent": self.n_silent,
            "min_side_pixels": self.min_side_pixels,
        }

    def plan(self, text: str, examples: HeldOut, rng: np.random.Generator) -> Plan | Measured:
        """Ask about each picture, to compare all cells at once."""
        del rng
        silent = [one for one in examples.silent if one.images][: self.n_silent]
        pictured = [
            *((one, one.best_image or 0) for one in examples.firing[: self.n_firing]),
            *((one, 0) for one in silent),
        ]
        if not any(one.kind != "silent" for one, _ in pictured):
            return Measured(note="too few held-out examples")
        asked = [self._about(text, one.images[image]) for one, image in pictured]
        groups = [group for group in asked if group is not None]
        if len(groups) < len(asked):
            return Measured(note="the prompt book has no words for this explanation")
        true = [self._cells(heat_of(one, image)) for one, image in pictured]
        chosen = [one for one, _ in pictured]
        return Plan(
            requests=[request for group in groups for request in group.requests],
            finish=lambda outcomes, counted: self._found(chosen, true, self._said(outcomes, groups), counted),
        )

    def _found(
        self, chosen: Sequence[Example], true: Sequence[_Cells], said: Sequence[_Cells | None], counted: Counted
    ) -> Measured:
        answered = [(one, a, b) for one, a, b in zip(chosen, true, said, strict=True) if b is not None]
        top = max((float(b.max()) for _, _, b in answered), default=0.0) or 1.0
        as_counted = [_stand_in(a, top, counted) if b is None else b for a, b in zip(true, said, strict=True)]
        strict = {
            f"{name}_strict": value for name, value in _agreement(true, as_counted).items() if name != "prevalence"
        }
        whole = _agreement([a for _, a, _ in answered], [b for _, _, b in answered]) if answered else {}
        return Measured(
            values={**whole, **strict},
            by_band=by_band([one for one, _, _ in answered], [_agreement([a], [b]) for _, a, b in answered]),
            n=len(said),
            n_failed=len(said) - len(answered),
        )

    def _cells(self, heat: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "cells"]:
        return np.array([heat[y0:y1, x0:x1].mean() for x0, y0, x1, y1 in self._boxes(heat.shape[1], heat.shape[0])])

    def _boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        across = np.linspace(0, width, self.columns + 1).round().astype(int).tolist()
        down = np.linspace(0, height, self.rows + 1).round().astype(int).tolist()
        return [
            (across[column], down[row], across[column + 1], down[row + 1])
            for row in range(self.rows)
            for column in range(self.columns)
        ]

    def _about(self, text: str, picture: Image.Image) -> _Asked | None:
        """Ask for the grid, or for each of its cells; None where there are no words for it."""
        request = self.book.simulate(text, picture, self.rows, self.columns)
        if request is not None:
            return _Asked([request], as_grid=True)
        asked = [self.book.fuzz_image(text, [self._cell(picture, box)]) for box in self._boxes(*picture.size)]
        requests = [one for one in asked if one is not None]
        return _Asked(requests, as_grid=False) if len(requests) == len(asked) else None

    def _said(self, outcomes: Sequence[Outcome], groups: Sequence[_Asked]) -> list[_Cells | None]:
        """Read the answers about each picture; None where one of them is of no use."""
        left, said = iter(outcomes), []
        for group in groups:
            mine = [next(left) for _ in group.requests]
            said.append(self._read_grid(mine[0]) if group.as_grid else self._read_cells(mine))
        return said

    def _read_grid(self, outcome: Outcome) -> _Cells | None:
        if isinstance(outcome, JudgeFailure):
            return None
        grid = self.book.read_grid(outcome.text, self.rows, self.columns)
        return None if grid is None else np.asarray(grid, dtype=np.float64).reshape(-1)

    def _read_cells(self, outcomes: Sequence[Outcome]) -> _Cells | None:
        answers = [None if isinstance(one, JudgeFailure) else self.book.read_verdict(one.text) for one in outcomes]
        if any(answer is None for answer in answers):
            return None
        return np.array([float(bool(answer)) for answer in answers])

    def _cell(self, picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        cut = picture.crop(box)
        scale = max(1.0, self.min_side_pixels / max(1, min(cut.size)))
        return cut.resize((round(cut.width * scale), round(cut.height * scale)), Image.Resampling.BICUBIC)


def _stand_in(true: _Cells, top: float, counted: Counted) -> _Cells:
    """Say what is true of every cell, or the opposite of it, on a scale up to `top`.

    >>> [_stand_in(np.array([0.0, 2.0]), 9.0, counted).tolist() for counted in ("right", "wrong")]
    [[0.0, 9.0], [9.0, 0.0]]
    """
    peak = float(true.max(initial=0.0))
    right = true / peak if peak > 0 else np.zeros_like(true)
    return top * (right if counted == "right" else 1 - right)


def _agreement(true: Sequence[_Cells], said: Sequence[_Cells]) -> dict[str, float]:
    fires = np.concatenate([_fires(one) for one in true])
    flat, guess = np.concatenate(true), np.concatenate(said)
    found = {"correlation": correlation(flat, guess)}
    if fires.any() and not fires.all():
        found["average_precision"] = average_precision(fires, guess)
        found["prevalence"] = float(fires.mean())
    return found


def _fires(cells: Float[np.ndarray, "cells"]) -> Bool[np.ndarray, "cells"]:
    peak = float(cells.max(initial=0.0))
    return np.asarray(cells >= 0.5 * peak) if peak > 0 else np.zeros(len(cells), dtype=bool)


def correlation(left: Float[np.ndarray, "n"], right: Float[np.ndarray, "n"]) -> float:
    """Pearson's correlation; 0 where one side does not vary, as it then tells nothing about the other.

    Example:
        >>> round(correlation(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 5.0])), 6)
        1.0
        >>> correlation(np.array([0.0, 1.0]), np.array([2.0, 2.0]))
        0.0
    """
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def average_precision(truths: Bool[np.ndarray, "n"], ranking: Float[np.ndarray, "n"]) -> float:
    """Average precision of a ranking; equal values are taken together, as scikit-learn does.

    Example:
        >>> average_precision(np.array([True, False, True]), np.array([0.9, 0.8, 0.1]))
        0.8333333333333333
    """
    total, found, recall, area = int(truths.sum()), 0, 0.0, 0.0
    for value in sorted(set(ranking.tolist()), reverse=True):
        found = int(truths[ranking >= value].sum())
        precision = found / int((ranking >= value).sum())
        area += precision * (found / total - recall)
        recall = found / total
    return area

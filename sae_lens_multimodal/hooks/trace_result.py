"""What a causal trace found: how much of an answer returns, by part, layer and position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_multimodal.adapters.layout import TokenLayout, View
from sae_lens_multimodal.errors import ConfigError, SelectionError, StoreError
from sae_lens_multimodal.files import read_json, read_manifest, write_atomically, write_json, write_manifest

MetricName: TypeAlias = Literal["probability", "log_probability", "logit_difference"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)

KIND, SCHEMA_VERSION = "causal_trace", 1
_JSON, _ARRAYS = "trace.json", "arrays.safetensors"


class Cell(NamedTuple):
    """One restoring: a part of a layer at one unit of positions."""

    part: str
    layer: int
    unit: int
    """Index into the trace's units."""
    label: str
    """The unit's name."""
    restored: float


@dataclass(frozen=True)
class Unit:
    """Positions that are restored together."""

    label: str
    positions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalTrace:
    """A clean and a corrupted run, and what each restoring brought back."""

    answer: str
    """Whose probability is measured."""
    against: str | None
    """The other answer of the logit difference."""
    metric: MetricName
    """What `restored` is a share of."""
    corruption: str
    """How the prompt was corrupted, in words."""
    window: int
    """Layers that were restored together."""
    parts: list[str]
    layers: list[int]
    """The middle of each window."""
    units: list[Unit] = field(repr=False)
    """What was restored together: single tokens, or named groups of them."""
    tokens: list[str] = field(repr=False)
    """The clean prompt's tokens as text."""
    corrupted_tokens: list[str] = field(repr=False)
    layout: TokenLayout = field(repr=False)
    """Of the clean prompt."""
    clean: dict[str, float]
    """Each metric in the clean run."""
    corrupted: dict[str, float]
    values: dict[str, Float[Tensor, "parts layers units"]] = field(repr=False)
    """Each metric where a cell was restored; NaN where a part does not exist in a layer."""
    n_passes: int
    """Forward passes that the restorings took, each over several rows."""
    n_skipped: int
    """Cells at which clean and corrupted are the same, so that nothing had to be run."""
    changed_inputs: list[int] = field(default_factory=list)
    """Positions whose input the corruption changed: restoring them, early, undoes the corruption itself."""

    @property
    def gap(self) -> float:
        """What the corruption took away, in the trace's metric."""
        return self.clean[self.metric] - self.corrupted[self.metric]

    @property
    def restored(self) -> Float[Tensor, "parts layers units"]:
        """The share of the answer that returns: 0 as corrupted, 1 as clean."""
        return self.share()

    @property
    def change(self) -> Float[Tensor, "parts layers units"]:
        """What each restoring changed in the trace's metric."""
        return self.values[self.metric] - self.corrupted[self.metric]

    def share(self, metric: MetricName | None = None) -> Float[Tensor, "parts layers units"]:
        """The restored share by any of the metrics; NaN where clean and corrupted give the same.

        Raises:
            ConfigError: the metric was not measured.
        """
        name = metric or self.metric
        if name not in self.values:
            raise ConfigError(f"Got the metric {name!r}; this trace has {', '.join(self.values)}.")
        gap = self.clean[name] - self.corrupted[name]
        difference = self.values[name] - self.corrupted[name]
        return difference / gap if gap else torch.full_like(difference, float("nan"))

    def part(self, name: str) -> Float[Tensor, "layers units"]:
        """The restored share of one part.

        Raises:
            ConfigError: the part was not traced.
        """
        return self.restored[self._part(name)]

    def is_corrupted(self, unit: int) -> bool:
        """Whether a unit holds a token, or a piece of a picture, whose input the corruption changed."""
        return not set(self.units[unit].positions).isdisjoint(self.changed_inputs)

    def top(self, n: int = 10, *, part: str | None = None, corrupted_tokens: bool = True) -> list[Cell]:
        """The cells that bring most back, the strongest first.

        Args:
            n: how many.
            part: of one part alone.
            corrupted_tokens: whether cells at tokens whose input the corruption changed count; restoring those in early
                layers undoes the corruption, which says nothing about the model.

        Raises:
            ConfigError: `n` is below 1, or the part was not traced.
        """
        if n < 1:
            raise ConfigError(f"Got n={n}; expected 1 or more.")
        shares = self.restored.nan_to_num(nan=float("-inf"))
        if part is not None:
            only = torch.full_like(shares, float("-inf"))
            only[self._part(part)] = shares[self._part(part)]
            shares = only
        if not corrupted_tokens:
            hidden = [unit for unit in range(len(self.units)) if self.is_corrupted(unit)]
            shares[:, :, hidden] = float("-inf")
        order = shares.flatten().argsort(descending=True, stable=True)[:n].tolist()
        cells = (np.unravel_index(index, tuple(shares.shape)) for index in order)
        found = [(int(p), int(layer), int(u)) for p, layer, u in cells]
        return [
            Cell(self.parts[p], self.layers[at], u, self.units[u].label, float(shares[p, at, u]))
            for p, at, u in found
            if np.isfinite(float(shares[p, at, u]))
        ]

    def by_position(self, part: str, layer: int) -> Float[Tensor, " seq"]:
        """The restored share at every token of the prompt; 0 where nothing was restored.

        A token of several units has that of the last.

        Raises:
            ConfigError: the part or layer was not traced.
        """
        if layer not in self.layers:
            raise ConfigError(f"Got layer {layer}; this trace has {self.layers}.")
        shares = self.part(part)[self.layers.index(layer)]
        values = torch.zeros(self.layout.n_tokens)
        for unit, share in zip(self.units, shares.tolist(), strict=True):
            values[list(unit.positions)] = share
        return values

    def heatmap(
        self, part: str, layer: int, *, image: int = 0, view: View = "finest"
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Paint the restored shares of the image tokens over the original picture: float32 [height, width].

        Raises:
            ConfigError: the part or layer was not traced.
            SelectionError: the prompt has no such picture.
        """
        return self.layout.heatmap(self.by_position(part, layer), image=image, view=view)

    def group(self, groups: Mapping[str, Sequence[int]]) -> dict[str, Float[Tensor, "parts layers"]]:
        """The mean share of the units that lie within each group of positions, such as a constraint's.

        Raises:
            SelectionError: a group holds no unit.
        """
        found = {}
        for name, positions in groups.items():
            inside = set(positions)
            mine = [index for index, unit in enumerate(self.units) if set(unit.positions) <= inside]
            if not mine:
                raise SelectionError(f"Got the group {name!r}, in which nothing was restored.")
            found[name] = self.restored[:, :, mine].mean(-1)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the layout as plain JSON values."""
        return {
            "answer": self.answer,
            "against": self.against,
            "metric": self.metric,
            "corruption": self.corruption,
            "window": self.window,
            "parts": self.parts,
            "layers": self.layers,
            "units": [{"label": unit.label, "positions": list(unit.positions)} for unit in self.units],
            "tokens": self.tokens,
            "corrupted_tokens": self.corrupted_tokens,
            "clean": self.clean,
            "corrupted": self.corrupted,
            "gap": self.gap,
            "restored": _plain(self.restored),
            "values": {name: _plain(values) for name, values in self.values.items()},
            "n_passes": self.n_passes,
            "n_skipped": self.n_skipped,
            "changed_inputs": self.changed_inputs,
        }

    def save(self, folder: Path | str) -> Path:
        """Write the trace and its layout into a folder.

        Raises:
            StoreError: the folder holds something else.
        """
        path = Path(folder)
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        if path.is_file() or names - {_JSON, _ARRAYS, "manifest.json"}:
            raise StoreError(f"{path} is not empty and holds no trace; give a new folder.")
        record = {key: value for key, value in self.to_dict().items() if key not in ("values", "restored", "gap")}
        arrays = {f"layout.{name}": torch.as_tensor(one) for name, one in self.layout.to_arrays().items()}
        arrays.update({f"values.{name}": one.contiguous() for name, one in self.values.items()})
        write_json(path / _JSON, record)
        write_atomically(path / _ARRAYS, lambda temporary: save_file(arrays, temporary))
        write_manifest(path, kind=KIND, schema_version=SCHEMA_VERSION, settings={"metric": self.metric})
        return path

    @classmethod
    def load(cls, folder: Path | str) -> CausalTrace:
        """Read what `save` wrote.

        Raises:
            StoreError: the folder holds no trace, or not a whole one.
        """
        path = Path(folder)
        read_manifest(path, kind=KIND, schema_version=SCHEMA_VERSION)
        record = read_json(path / _JSON)
        if not (path / _ARRAYS).is_file():
            raise StoreError(f"{path} lacks {_ARRAYS}; make the trace again.")
        arrays = load_file(path / _ARRAYS)
        layout = {name.removeprefix("layout."): one for name, one in arrays.items() if name.startswith("layout.")}
        values = {name.removeprefix("values."): one for name, one in arrays.items() if name.startswith("values.")}
        units = [Unit(one["label"], tuple(one["positions"])) for one in record.pop("units")]
        return cls(**record, units=units, layout=TokenLayout.from_arrays(layout), values=values)

    def _part(self, name: str) -> int:
        if name not in self.parts:
            raise ConfigError(f"Got the part {name!r}; this trace has {', '.join(self.parts)}.")
        return self.parts.index(name)


def _plain(values: Tensor) -> list[Any]:
    """Nested lists, None where a number is none."""
    found: list[Any] = [_plain(one) for one in values] if values.dim() > 1 else values.tolist()
    return found if values.dim() > 1 else [one if np.isfinite(one) else None for one in found]

"""Several datasets read as one: at every row a member is drawn by its weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from sae_lens_multimodal.data.raw import Ordered, RawRow, known_length, raw_rows
from sae_lens_multimodal.data.sources import Rows, open_dataset
from sae_lens_multimodal.errors import ConfigError, DatasetError

StopRule: TypeAlias = Literal["all_exhausted", "first_exhausted", "all_exhausted_without_replacement"]
"""When a pass over a mixture ends, in the words of `datasets.interleave_datasets`."""

_DRAWN_AT_ONCE = 1000
"""As many as datasets draws, so that the same seed gives the same order."""


@dataclass(frozen=True, kw_only=True)
class MemberSettings:
    """One entry of `dataset_mixture`: what to open, and how often it is drawn."""

    path: str
    """Hub name, folder or file."""
    weight: float
    """Its share of the rows, relative to the other members' weights."""
    split: str | None = None
    """Its split; the run's if None."""
    subset: str | None = None
    """Its configuration, of a hub dataset that has several."""
    image_folder: str | None = None
    """Where its relative picture paths begin; the run's if None."""
    streaming: bool | None = None
    """Whether it is streamed; as the run is if None."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A dataset of a mixture."""

    rows: Rows | Ordered
    """Its rows."""
    weight: float
    """Its share of the rows, relative to the other members' weights."""
    name: str
    """What it is called in reports."""
    image_folder: Path | None = None
    """Where its relative picture paths begin; what the reader says if None."""


@dataclass(frozen=True)
class Mixture:
    """Several datasets read as one, by the rules of `datasets.interleave_datasets` with probabilities.

    Unlike there, the members may have different columns. At every row a member is drawn by its weight, from the seed
    alone, and gives its next row. With `all_exhausted` a pass ends once every member was read to its end, and a member
    that ends before begins anew; with `first_exhausted` it ends with the first member that does; with
    `all_exhausted_without_replacement` every row comes exactly once, members that are through being passed over.
    """

    members: tuple[Member, ...]
    """The datasets."""
    seed: int = 0
    """From which the order follows."""
    stop: StopRule = "all_exhausted"
    """When a pass ends."""

    def __post_init__(self) -> None:
        """Check weights and rule.

        Raises:
            ConfigError: there are no members, a weight is not above 0, or the rule is unknown.
        """
        check_weights({member.name: member.weight for member in self.members})
        if self.stop not in get_args(StopRule):
            raise ConfigError(f"mixture_stop is {self.stop!r}; expected one of {', '.join(get_args(StopRule))}.")

    def raw_rows(self, skip_rows: int = 0) -> Iterator[RawRow]:
        """Iterate over undecoded rows.

        Rows that are skipped are not read where the member's length is known; of streamed members they are read,
        though not decoded, as nothing else tells where they end.

        Raises:
            DatasetError: a member has no rows or no usable column, or cannot be read on.
        """
        cursors = [_Cursor(member) for member in self.members]
        ended = [False] * len(cursors)
        is_over = any if self.stop == "first_exhausted" else all
        for index in self._draws():
            if is_over(ended):
                return
            once = self.stop == "all_exhausted_without_replacement"
            if once and ended[index]:
                continue
            if skip_rows:
                skip_rows -= 1
                cursors[index].skip()
            else:
                yield cursors[index].take()
            ended[index] = cursors[index].begin_anew_at_end(keep_ended=once) or ended[index]

    def _draws(self) -> Iterator[int]:
        weights = np.array([member.weight for member in self.members], dtype=np.float64)
        rng = np.random.default_rng(self.seed)
        while True:
            yield from rng.choice(len(weights), size=_DRAWN_AT_ONCE, p=weights / weights.sum()).tolist()


class _Cursor:
    """A place in one member."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._length = known_length(member.rows)
        self._place = 0
        self._iterator: Iterator[RawRow] | None = None
        self._ahead: RawRow | None = None
        if self._length == 0:
            raise self._no_rows()

    def skip(self) -> None:
        """Pass over a row."""
        if self._length is None:
            self.take()
            return
        self._place += 1
        self._iterator = None

    def take(self) -> RawRow:
        """The next row."""
        if self._iterator is None:
            self._iterator = self._open()
            self._ahead = self._next()
        row = self._ahead
        if row is None:
            raise self._no_rows()
        self._place += 1
        # Of a member without a known length only the row after tells whether this was the last.
        self._ahead = self._next() if self._length is None or self._place < self._length else None
        return row

    def begin_anew_at_end(self, *, keep_ended: bool) -> bool:
        """Whether that was the last row; the next one is the first again unless `keep_ended`."""
        at_end = self._ahead is None if self._length is None else self._place >= self._length
        if at_end and not keep_ended:
            self._place, self._iterator = 0, None
        return at_end

    def _open(self) -> Iterator[RawRow]:
        return raw_rows(self._member.rows, self._place)

    def _next(self) -> RawRow | None:
        assert self._iterator is not None
        member = self._member
        try:
            row = next(self._iterator, None)
        except DatasetError as error:
            raise DatasetError(f"{member.name}: {error}") from error
        return None if row is None else row._replace(dataset=member.name, image_folder=member.image_folder)

    def _no_rows(self) -> DatasetError:
        return DatasetError(f"{self._member.name} has no rows; leave it out of the mixture or check its split.")


def check_weights(weights: Mapping[str, float]) -> None:
    """Check that there are members and that each has a weight above 0.

    Raises:
        ConfigError: it is not so.
    """
    if not weights:
        raise ConfigError("dataset_mixture is empty; give at least one entry with path and weight.")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(f"dataset_mixture gives {name} the weight {weight!r}; expected a number above 0.")


def read_settings(entries: Sequence[Mapping[str, Any]]) -> list[MemberSettings]:
    """Check the entries of `dataset_mixture`.

    Raises:
        ConfigError: an entry is no mapping, lacks path or weight, or has an unknown key.
    """
    known = [field.name for field in fields(MemberSettings)]
    settings = []
    for entry in entries:
        if not isinstance(entry, Mapping) or not {"path", "weight"} <= set(entry) or not set(entry) <= set(known):
            raise ConfigError(
                f"dataset_mixture has the entry {entry!r}; expected path and weight, and of {', '.join(known[2:])} "
                "what differs from the rest."
            )
        settings.append(MemberSettings(**entry))
    check_weights({one.path: one.weight for one in settings})
    return settings


def open_mixture(
    entries: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    stop: StopRule = "all_exhausted",
    split: str = "train",
    streaming: bool = True,
) -> Mixture:
    """Open the datasets of a mixture.

    Args:
        entries: Mappings with `path`, `weight` and what else `MemberSettings` names.
        seed: From which the order follows.
        stop: When a pass ends; see `Mixture`.
        split: The split of the members that name none.
        streaming: Whether members that do not say so are streamed.

    Raises:
        ConfigError: an entry is not as expected.
        DatasetError: a dataset cannot be opened.
    """
    members = []
    for one in read_settings(entries):
        streamed = streaming if one.streaming is None else one.streaming
        rows = open_dataset(one.path, split=one.split or split, streaming=streamed, subset=one.subset)
        folder = Path(one.image_folder) if one.image_folder is not None else None
        members.append(Member(rows=rows, weight=one.weight, name=_name(one), image_folder=folder))
    return Mixture(tuple(members), seed, stop)


def _name(one: MemberSettings) -> str:
    return one.path if one.subset is None else f"{one.path} ({one.subset})"

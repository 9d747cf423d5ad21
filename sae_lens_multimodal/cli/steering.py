"""What the steer command reads and prints: places, strengths, and answers side by side."""

from __future__ import annotations

import textwrap
from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.hooks.changes import Change
    from sae_lens_multimodal.hooks.dose_curve import DoseCurve

COLUMN = 48
"""Characters of each of the two columns."""
_GAP = "  |  "


def check_steer_flags(options: Namespace) -> None:
    """Check that no flag is given that would do nothing.

    Raises:
        ConfigError: one is.
    """
    if options.target is not None:
        idle = [name for name in ("set", "add", "scale", "ablate") if getattr(options, name)]
        why = "--target draws a curve of one feature; it is named by --feature, and strengths by --dose"
    else:
        idle = [name for name in ("dose", "store", "unit", "output") if getattr(options, name) is not None]
        why = "it belongs to the curve that --target draws"
    if options.target is not None and options.store is not None and options.unit is not None:
        idle, why = ["unit"], "--store has the feature's own unit"
    if idle:
        raise ConfigError(f"got {', '.join('--' + name for name in idle)}, which would do nothing: {why}.")


def place_of(options: Namespace) -> Any:  # noqa: ANN401 - what `steer` takes as tokens
    """Read `--tokens`, `--picture` and `--box`.

    Raises:
        ConfigError: they contradict one another, or the box is not four numbers.
    """
    from sae_lens_multimodal.hooks.places import BoxTokens, ImageTokens

    if options.box is None and options.picture is None:
        return options.tokens
    if options.tokens != "all":
        raise ConfigError(f"got --tokens {options.tokens} beside --picture or --box; give one of them.")
    if options.box is None:
        return ImageTokens(options.picture)
    return BoxTokens(_box(options.box), image=options.picture or 0)


def _box(text: str) -> tuple[float, float, float, float]:
    numbers = parse_numbers("box", text)
    if len(numbers) != 4:
        raise ConfigError(f"--box got {text!r}; expected X0,Y0,X1,Y1 in pixels of the picture.")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def parse_numbers(flag: str, text: str) -> list[float]:
    """Read a list of numbers such as `0,0.5,2`.

    Example:
        >>> parse_numbers("dose", "0, 0.5,2")
        [0.0, 0.5, 2.0]

    Raises:
        ConfigError: something else was given.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--{flag} got {text!r}; expected numbers such as 0,0.5,2.") from error


def describe(changes: Mapping[int, Change]) -> str:
    """Say in a few words what was changed.

    Example:
        >>> from sae_lens_multimodal.hooks.changes import Ablate, Set
        >>> describe({12: Set(8.0), 40: Ablate()})
        '12 set to 8, 40 ablated'
    """
    from sae_lens_multimodal.hooks.changes import Add, Scale, Set

    words = []
    for feature, change in changes.items():
        match change:
            case Set(value):
                words.append(f"{feature} set to {value:g}")
            case Add(value):
                words.append(f"{feature} raised by {value:g}")
            case Scale(factor):
                words.append(f"{feature} scaled by {factor:g}")
            case _:
                words.append(f"{feature} ablated")
    return ", ".join(words)


def side_by_side(before: str, after: str, edit: str) -> list[str]:
    """Lay two answers out in two columns.

    Example:
        >>> [line.rstrip() for line in side_by_side("a red circle", "a blue circle", "12 set to 8")][-1].split("|")
        ['a red circle                                      ', '  a blue circle']
    """
    heads = textwrap.wrap("before: as it is", COLUMN), textwrap.wrap(f"after: {edit}", COLUMN)
    answers = textwrap.wrap(before, COLUMN) or ["(nothing)"], textwrap.wrap(after, COLUMN) or ["(nothing)"]
    return [*_columns(*heads), f"{'-' * COLUMN}{_GAP}{'-' * COLUMN}", *_columns(*answers)]


def _columns(left: Sequence[str], right: Sequence[str]) -> list[str]:
    return [f"{one:<{COLUMN}}{_GAP}{other}" for one, other in zip_longest(left, right, fillvalue="")]


def dose_lines(curve: DoseCurve) -> list[str]:
    """Write a dose curve as a table."""
    head = f"{'strength':>9} {'value':>9} {'P(' + curve.target + ')':>12} {'others KL':>10}  likeliest"
    lines = [head, f"{'none':>9} {'':>9} {curve.baseline:>12.4f} {0:>10.4f}  {' '.join(curve.baseline_answers)}"]
    lines += [
        f"{curve.spelt(point):>9} {point.value:>9.3g} {point.target:>12.4f} {point.others_kl:>10.4f}  "
        f"{' '.join(point.answers)}"
        for point in curve.points
    ]
    return lines

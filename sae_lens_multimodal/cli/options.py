"""Reading the options that have a grammar of their own: lists of features, and changes to them."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.hooks.changes import Change


def parse_features(text: str | None) -> list[int] | None:
    """Read a list of features such as `3,17,40-60`.

    Example:
        >>> parse_features("3,17,40-42")
        [3, 17, 40, 41, 42]

    Raises:
        ConfigError: something else was given.
    """
    if text is None:
        return None
    features: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"--features got {part!r}; expected numbers and ranges such as 3,17,40-60.")
        features += range(int(first), int(last if dash else first) + 1)
    return features


def parse_changes(options: Namespace) -> dict[int, Change]:
    """Read what `--set`, `--add`, `--scale` and `--ablate` ask for.

    Raises:
        ConfigError: nothing is asked for, a feature is named twice, or a part is not FEATURE=NUMBER (or a number, where
            `--feature` says which is meant).
    """
    from sae_lens_multimodal.hooks.changes import Ablate, Add, Scale, Set

    changes: dict[int, Change] = {}
    meant = getattr(options, "feature", None)
    for flag, kind in (("set", Set), ("add", Add), ("scale", Scale)):
        for text in getattr(options, flag):
            whole = text if meant is None or "=" in text else f"{meant}={text}"
            feature, value = _feature_and_value(flag, whole)
            _put(changes, feature, kind(value))
    for given in options.ablate:
        text = str(meant) if not given and meant is not None else given
        if not text.isdecimal():
            raise ConfigError(f"--ablate got {text!r}; expected the number of a feature.")
        _put(changes, int(text), Ablate())
    if not changes:
        raise ConfigError("no feature to steer was given; use --set, --add, --scale or --ablate.")
    return changes


def _feature_and_value(flag: str, text: str) -> tuple[int, float]:
    feature, _, value = text.partition("=")
    try:
        return int(feature), float(value)
    except ValueError as error:
        raise ConfigError(f"--{flag} got {text!r}; expected FEATURE=NUMBER such as 123=8.0.") from error


def _put(changes: dict[int, Change], feature: int, change: Change) -> None:
    if feature in changes:
        raise ConfigError(f"feature {feature} is changed twice; give it one of --set, --add, --scale and --ablate.")
    changes[feature] = change

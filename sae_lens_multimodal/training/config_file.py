"""Reads a run's settings from YAML and command-line flags, and says which ones it does not know."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig, build_config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> MultimodalSAERunnerConfig[Any]:
    """Read a YAML file and change single fields.

    Args:
        path: the YAML file: fields of `MultimodalSAERunnerConfig`, with `sae: {architecture: ..., d_sae: ...}`.
        overrides: `["lr=1e-4", "sae.k=32"]`, or flags as on a command line: `["--lr", "1e-4", "--sae.k=32"]`.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, of the wrong type, or cannot work.
    """
    return build_config(apply_overrides(read_yaml(Path(path)), overrides))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        place = f" at line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"{path} is not valid YAML{place}; expected lines of the form 'field: value'.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; expected lines of the form 'field: value'.")
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Change fields of a nested mapping by their dotted names.

    >>> apply_overrides({"sae": {"k": 8}}, ["sae.k=32", "--lr", "1e-4", "--overwrite"])
    {'sae': {'k': 32}, 'lr': '1e-4', 'overwrite': True}
    """
    result: dict[str, Any] = copy.deepcopy(dict(content))
    for name, text in split_overrides(overrides):
        *parents, last = name.split(".")
        place = result
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}={text!r} is not a value that YAML can read; put quotes around text.") from error
    return result


def split_overrides(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Take `name=value`, `--name=value`, `--name value` and `--switch` apart.

    >>> split_overrides(["lr=1e-4", "--sae.k", "32", "--model-name=x", "--overwrite"])
    [('lr', '1e-4'), ('sae.k', '32'), ('model_name', 'x'), ('overwrite', 'true')]

    Raises:
        ConfigError: something that is neither.
    """
    pairs: list[tuple[str, str]] = []
    remaining = list(overrides)
    while remaining:
        head = remaining.pop(0)
        name, equals, value = head.partition("=")
        if not equals:
            if not head.startswith("--"):
                raise ConfigError(f"{head!r} is not a setting; expected name=value or --name value.")
            follows_value = bool(remaining) and not remaining[0].startswith("--")
            value = remaining.pop(0) if follows_value else "true"
        name = name.removeprefix("--").replace("-", "_")
        if not name:
            raise ConfigError(f"{head!r} names no setting; expected name=value or --name value.")
        pairs.append((name, value))
    return pairs

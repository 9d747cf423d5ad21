"""Brings plain values, as YAML and command lines give them, to the types of a dataclass's fields."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sae_lens_multimodal.errors import ConfigError


def as_mapping(name: str, value: object) -> Mapping[str, Any]:
    """The value itself, if it has fields.

    Raises:
        ConfigError: it has none.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}; expected fields below '{name}:'.")
    return value


def typed_fields(config_class: type, content: Mapping[str, Any], *, prefix: str) -> dict[str, Any]:
    """Check names against the dataclass, and bring each value to its field's type.

    Raises:
        ConfigError: a field that the dataclass does not have, or a value of the wrong type.
    """
    assert is_dataclass(config_class)
    known = [entry.name for entry in fields(config_class)]
    hints = get_type_hints(config_class)
    values = {}
    for name, value in content.items():
        if name not in known:
            raise ConfigError(_unknown(f"{prefix}{name}", [f"{prefix}{entry}" for entry in known]))
        values[name] = coerce(f"{prefix}{name}", value, hints[name])
    return values


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known fields are {', '.join(sorted(known))}."
    return f"{name} is not a setting of training; {hint}"


def coerce(name: str, value: Any, expected: Any) -> Any:  # noqa: ANN401 - any type, any value of it
    """Bring a value read from YAML to a field's type; `1e-4`, which YAML reads as text, becomes a number.

    >>> coerce("lr", "1e-4", float), coerce("training_tokens", "1e6", int), coerce("seed", None, int | None)
    (0.0001, 1000000, None)

    Raises:
        ConfigError: the value cannot be one of that type.
    """
    for option in _options(expected):
        found, result = _as(value, option)
        if found:
            return result
    raise ConfigError(f"{name} is {value!r}; expected {_describe(expected)}.")


def _options(expected: Any) -> tuple[Any, ...]:  # noqa: ANN401
    if get_origin(expected) in (Union, types.UnionType):
        # Exact kinds first: True must stay a bool where an int is possible too.
        return tuple(sorted(get_args(expected), key=lambda option: option in (int, float, str)))
    return (expected,)


def _as(value: Any, option: Any) -> tuple[bool, Any]:  # noqa: ANN401 - one line for each kind of field
    origin = get_origin(option) or option
    if option is Any or isinstance(option, TypeVar) or is_dataclass(option):
        return True, value
    if value is None or option is type(None):
        return value is None and option is type(None), value
    if origin is Literal:
        return value in get_args(option), value
    if option is bool:
        return isinstance(value, bool), value
    if option is str:
        return isinstance(value, str | int | float) and not isinstance(value, bool), str(value)
    if option in (int, float):
        return _as_number(value, option)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return True, origin(value)
    if origin is dict and isinstance(value, Mapping):
        kinds = get_args(option)
        return True, {key: coerce(str(key), entry, kinds[1]) for key, entry in value.items()} if kinds else dict(value)
    return False, value


def _as_number(value: Any, kind: type) -> tuple[bool, Any]:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, value
    try:
        number = float(value)
    except ValueError:
        return False, value
    if kind is float:
        return True, number
    return number.is_integer(), int(value) if isinstance(value, int) else int(number)


def _describe(expected: Any) -> str:  # noqa: ANN401
    if expected is type(None):
        return "nothing"
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(expected))
    if get_origin(expected) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(expected))
    return getattr(expected, "__name__", str(expected)) if get_origin(expected) is None else str(expected)

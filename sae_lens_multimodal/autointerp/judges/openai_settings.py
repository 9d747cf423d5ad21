"""Which server a judge asks, with which key, and whether its settings can work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from sae_lens_multimodal.errors import ConfigError, JudgeError

HOSTED = "api.openai.com"
"""Where the client goes when no base URL is given."""


def check_settings(base_url: str | None, *, positive: Mapping[str, float], at_least_zero: Mapping[str, float]) -> None:
    """Check an address and numbers by name.

    Raises:
        ConfigError: one cannot work.
    """
    if base_url is not None and urlsplit(base_url).scheme not in ("http", "https"):
        raise ConfigError(f"base_url is {base_url!r}; expected a URL such as 'http://127.0.0.1:8000/v1'.")
    for name, value in (*positive.items(), *at_least_zero.items()):
        if value < 0 or (value == 0 and name in positive):
            raise ConfigError(f"{name} is {value}; expected {'more than' if name in positive else 'at least'} 0.")


def place_of(base_url: str | None) -> str:
    """Name the server without path and credentials."""
    if base_url is None:
        return HOSTED
    parts = urlsplit(base_url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def api_key(variable: str, *, needed: bool) -> str:
    """Read the key from its environment variable; some other word where there is none and none is needed.

    Raises:
        JudgeError: it is needed.
    """
    key = os.environ.get(variable)
    if key:
        return key
    if needed:
        raise JudgeError(
            f"The environment variable {variable} is not set; expected the API key of {HOSTED} there. Set it, or give "
            "the base_url of a server that needs none."
        )
    return "none"

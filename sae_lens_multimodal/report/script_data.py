"""Data that pages opened from disk can load: scripts, for a browser lets no page read a file beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = "data"
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def script_json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    r"""Spell a JSON value so that it can stand in a script or in a page: nothing in it ends a script or a line.

    Example:
        >>> script_json({"a": "</script>"})
        '{"a":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for character, escape in _UNSAFE.items():
        text = text.replace(character, escape)
    return text


def write_script(path: Path, call: str, *values: Any) -> None:  # noqa: ANN401 - any JSON values
    """Write a script that calls one of the page's functions with some values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, f"{call}({','.join(script_json(value) for value in values)});\n")


def write_page(path: Path, text: str) -> None:
    """Write UTF-8; half a surrogate pair, which JSON may hold and UTF-8 may not, becomes a question mark."""
    path.write_bytes(text.encode("utf-8", errors="replace"))

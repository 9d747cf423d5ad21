"""How numbers and tokens are spelled for a reader: pure functions, used as filters by the templates."""

from __future__ import annotations

import math

DASH = "\u2013"
_VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def share(value: float | None) -> str:
    """Spell a share as a percentage with about two significant digits.

    Example:
        >>> share(0.5), share(0.0123), share(0.00004), share(0), share(None)
        ('50 %', '1.2 %', '0.004 %', '0 %', '\u2013')
    """
    if value is None or not math.isfinite(value):
        return DASH
    percent = 100 * value
    if percent == 0 or percent >= 9.95:
        return f"{percent:.0f} %"
    digits = min(6, max(1, 1 - math.floor(math.log10(percent))))
    text = f"{percent:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.')} %"


def number(value: float | None) -> str:
    """Spell a measured number with three significant digits.

    Example:
        >>> number(12.3456), number(0.5), number(1234.2), number(3), number(None)
        ('12.3', '0.5', '1\u2009234', '3', '\u2013')
    """
    if value is None or not math.isfinite(value):
        return DASH
    if abs(value) >= 1000:
        return count(round(value))
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.1e}"


def count(value: int | None) -> str:
    """Spell a whole number with thin gaps between thousands.

    Example:
        >>> count(1234567).replace(chr(0x2009), "'")
        "1'234'567"
    """
    return DASH if value is None else f"{value:,}".replace(",", "\u2009")


def score(value: float | None) -> str:
    """Spell a score between 0 and 1 with two decimals and no leading zero.

    Example:
        >>> score(0.873), score(1.0), score(-0.05), score(None)
        ('.87', '1.00', '\u2212.05', '\u2013')
    """
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{abs(value):.2f}"
    text = text[1:] if text.startswith("0") else text
    return f"\u2212{text}" if value < 0 and text != ".00" else text


def cell(value: str | int | float | None) -> str:
    """Spell a cell of a table; measured numbers of one size get equally many decimals, so that columns line up.

    Example:
        >>> cell("L0"), cell(None), cell(0.3), cell(0.8125), cell(31.25), cell(12), cell(1234.6), cell(True)
        ('L0', '\u2013', '0.300', '0.812', '31.2', '12', '1\u2009235', 'yes')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return count(value)
    if value is None or not math.isfinite(value) or abs(value) >= 100 or 0 < abs(value) < 0.0005:
        return number(value)
    decimals = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
    return f"{value:.{decimals}f}".replace("-", "\u2212")


def visible(text: str) -> str:
    """Make line ends and tabs of a token visible.

    Example:
        >>> visible("a" + chr(10))
        'a↵'
    """
    for raw, mark in _VISIBLE.items():
        text = text.replace(raw, mark)
    return text


def utf8(text: str) -> str:
    """Make text that UTF-8 can spell: half a surrogate pair, which JSON may hold, becomes a question mark.

    Example:
        >>> utf8("a" + chr(0xD83D))
        'a?'
    """
    return text.encode("utf-8", errors="replace").decode("utf-8")


def plural(n: int, one: str, many: str | None = None) -> str:
    """Spell a count with its noun.

    Example:
        >>> plural(1, "prompt"), plural(3, "prompt"), plural(2, "answer was", "answers were")
        ('1 prompt', '3 prompts', '2 answers were')
    """
    return f"{count(n)} {one if n == 1 else many or one + 's'}"

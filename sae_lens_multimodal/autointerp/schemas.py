"""JSON schemas of the replies that judges are asked for, within what servers support of JSON Schema."""

from __future__ import annotations

import json
from typing import Any


def _object(**fields: dict[str, Any]) -> dict[str, Any]:
    """All fields are required and no other is allowed, as OpenAI's strict mode demands."""
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


_TEXT = {"type": "string"}
_EXPLANATION = _object(explanation=_TEXT, label=_TEXT)

VERDICT = json.dumps(_object(answer={"type": "string", "enum": ["yes", "no"]}))
"""Whether something fits a description."""
MEANING = json.dumps(_object(common={"type": "boolean"}, explanation=_TEXT, label=_TEXT))
"""What regions or words have in common, if anything."""
PROPOSALS = json.dumps(_object(common={"type": "boolean"}, candidates={"type": "array", "items": _EXPLANATION}))
"""Several answers to that."""
INTRUDER = json.dumps(_object(intruder={"type": "integer"}))
"""The number of the region that does not belong."""

GRID = json.dumps(_object(grid={"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}))
"""Rows of whole numbers from the top down. How many is left to the prompt: servers lack the lengths of arrays."""

"""Judges: models that explain features and judge explanations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.autointerp.judges.base import (
    FailureKind,
    Judge,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    Ledger,
    Outcome,
)
from sae_lens_multimodal.autointerp.judges.budget import Budget, BudgetJudge, Prices
from sae_lens_multimodal.autointerp.judges.cache import CachedJudge
from sae_lens_multimodal.autointerp.judges.forecast import Forecast, ForecastJudge
from sae_lens_multimodal.autointerp.judges.log_probabilities import ReplyToken
from sae_lens_multimodal.autointerp.judges.openai_judge import OpenAIJudge
from sae_lens_multimodal.autointerp.judges.scripted import ScriptedJudge

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.judges.transformers_judge import TransformersJudge

__all__ = [
    "Budget",
    "BudgetJudge",
    "CachedJudge",
    "FailureKind",
    "Forecast",
    "ForecastJudge",
    "Judge",
    "JudgeFailure",
    "JudgeReply",
    "JudgeRequest",
    "Ledger",
    "OpenAIJudge",
    "Outcome",
    "Prices",
    "ReplyToken",
    "ScriptedJudge",
    "TransformersJudge",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    """Import the judge that needs torch when it is first asked for."""
    if name != "TransformersJudge":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from sae_lens_multimodal.autointerp.judges.transformers_judge import TransformersJudge

    return TransformersJudge

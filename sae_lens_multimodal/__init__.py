"""SAE-Lens and nnsight for vision-language models.

The public names below are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens_multimodal.adapters.batch import EncodedBatch as EncodedBatch
    from sae_lens_multimodal.adapters.layout import TokenLayout as TokenLayout
    from sae_lens_multimodal.adapters.model import VisionLanguageModel as VisionLanguageModel
    from sae_lens_multimodal.adapters.model import load_model as load_model
    from sae_lens_multimodal.autointerp.explain import explain as explain
    from sae_lens_multimodal.autointerp.score import score as score
    from sae_lens_multimodal.features.harvest import harvest as harvest
    from sae_lens_multimodal.features.store import FeatureStore as FeatureStore
    from sae_lens_multimodal.hooks.attribute import attribute as attribute
    from sae_lens_multimodal.hooks.attribution_check import check_attribution as check_attribution
    from sae_lens_multimodal.hooks.changes import Ablate as Ablate
    from sae_lens_multimodal.hooks.changes import Add as Add
    from sae_lens_multimodal.hooks.changes import Scale as Scale
    from sae_lens_multimodal.hooks.changes import Set as Set
    from sae_lens_multimodal.hooks.controls import SearchSettings as SearchSettings
    from sae_lens_multimodal.hooks.controls import find_controls as find_controls
    from sae_lens_multimodal.hooks.dose import dose_response as dose_response
    from sae_lens_multimodal.hooks.edges import attribute_edges as attribute_edges
    from sae_lens_multimodal.hooks.metrics import ContinuationLogProbability as ContinuationLogProbability
    from sae_lens_multimodal.hooks.metrics import LogitDifference as LogitDifference
    from sae_lens_multimodal.hooks.places import BoxTokens as BoxTokens
    from sae_lens_multimodal.hooks.places import ImageTokens as ImageTokens
    from sae_lens_multimodal.hooks.read import read_activations as read_activations
    from sae_lens_multimodal.hooks.run_with_saes import run_with_cache_with_saes as run_with_cache_with_saes
    from sae_lens_multimodal.hooks.run_with_saes import run_with_saes as run_with_saes
    from sae_lens_multimodal.hooks.run_with_saes import saes as saes
    from sae_lens_multimodal.hooks.steer import steer as steer
    from sae_lens_multimodal.hooks.vectors import SteeringVector as SteeringVector
    from sae_lens_multimodal.hooks.vectors import steering_vector as steering_vector
    from sae_lens_multimodal.report.build import build_report as build_report
    from sae_lens_multimodal.report.controls import build_control_report as build_control_report
    from sae_lens_multimodal.report.dose import build_dose_report as build_dose_report
    from sae_lens_multimodal.training.cache import cache_activations as cache_activations
    from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig as MultimodalSAERunnerConfig
    from sae_lens_multimodal.training.evaluation import evaluate as evaluate
    from sae_lens_multimodal.training.published import load_published_sae as load_published_sae
    from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner as MultimodalSAETrainingRunner
    from sae_lens_multimodal.types import Modality as Modality


_HOMES = {
    "Ablate": "hooks.changes",
    "Add": "hooks.changes",
    "BoxTokens": "hooks.places",
    "ContinuationLogProbability": "hooks.metrics",
    "EncodedBatch": "adapters.batch",
    "FeatureStore": "features.store",
    "ImageTokens": "hooks.places",
    "LogitDifference": "hooks.metrics",
    "Modality": "types",
    "MultimodalSAERunnerConfig": "training.config",
    "MultimodalSAETrainingRunner": "training.runner",
    "Scale": "hooks.changes",
    "SearchSettings": "hooks.controls",
    "Set": "hooks.changes",
    "SteeringVector": "hooks.vectors",
    "TokenLayout": "adapters.layout",
    "VisionLanguageModel": "adapters.model",
    "attribute": "hooks.attribute",
    "attribute_edges": "hooks.edges",
    "build_control_report": "report.controls",
    "build_dose_report": "report.dose",
    "build_report": "report.build",
    "cache_activations": "training.cache",
    "check_attribution": "hooks.attribution_check",
    "dose_response": "hooks.dose",
    "evaluate": "training.evaluation",
    "explain": "autointerp.explain",
    "find_controls": "hooks.controls",
    "harvest": "features.harvest",
    "load_model": "adapters.model",
    "load_published_sae": "training.published",
    "read_activations": "hooks.read",
    "run_with_cache_with_saes": "hooks.run_with_saes",
    "run_with_saes": "hooks.run_with_saes",
    "saes": "hooks.run_with_saes",
    "score": "autointerp.score",
    "steer": "hooks.steer",
    "steering_vector": "hooks.vectors",
}

__all__ = sorted(_HOMES)

try:
    __version__ = version("sae-lens-multimodal")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

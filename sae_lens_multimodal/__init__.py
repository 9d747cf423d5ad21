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
    from sae_lens_multimodal.autointerp.constraints import annotate_constraints as annotate_constraints
    from sae_lens_multimodal.autointerp.explain import explain as explain
    from sae_lens_multimodal.autointerp.measure_summary import summarise_measures as summarise_measures
    from sae_lens_multimodal.autointerp.measures import measure as measure
    from sae_lens_multimodal.autointerp.score import score as score
    from sae_lens_multimodal.concepts.dictionary import ConceptDictionary as ConceptDictionary
    from sae_lens_multimodal.concepts.dictionary import find_concepts as find_concepts
    from sae_lens_multimodal.concepts.evaluate import evaluate_concepts as evaluate_concepts
    from sae_lens_multimodal.concepts.gather import gather_states as gather_states
    from sae_lens_multimodal.concepts.ground import ground_concepts as ground_concepts
    from sae_lens_multimodal.concepts.states import ConceptStates as ConceptStates
    from sae_lens_multimodal.editing.compute import compute_edit as compute_edit
    from sae_lens_multimodal.editing.edit import Edit as Edit
    from sae_lens_multimodal.editing.fine_tune import fine_tune as fine_tune
    from sae_lens_multimodal.editing.keys import ordinary_keys as ordinary_keys
    from sae_lens_multimodal.editing.measure import EditCases as EditCases
    from sae_lens_multimodal.editing.measure import measure_edit as measure_edit
    from sae_lens_multimodal.editing.settings import EditSettings as EditSettings
    from sae_lens_multimodal.editing.store import load_edit as load_edit
    from sae_lens_multimodal.editing.store import save_edit as save_edit
    from sae_lens_multimodal.editing.store import save_edited as save_edited
    from sae_lens_multimodal.features.describe import describe_features as describe_features
    from sae_lens_multimodal.features.harvest import harvest as harvest
    from sae_lens_multimodal.features.store import FeatureStore as FeatureStore
    from sae_lens_multimodal.hooks.attention import attention_contributions as attention_contributions
    from sae_lens_multimodal.hooks.attention_knockout import knock_out as knock_out
    from sae_lens_multimodal.hooks.attribute import attribute as attribute
    from sae_lens_multimodal.hooks.attribution_check import check_attribution as check_attribution
    from sae_lens_multimodal.hooks.changes import Ablate as Ablate
    from sae_lens_multimodal.hooks.changes import Add as Add
    from sae_lens_multimodal.hooks.changes import Scale as Scale
    from sae_lens_multimodal.hooks.changes import Set as Set
    from sae_lens_multimodal.hooks.constraints import ConstrainedQuestion as ConstrainedQuestion
    from sae_lens_multimodal.hooks.constraints import Constraint as Constraint
    from sae_lens_multimodal.hooks.constraints_files import read_vqa_constraints as read_vqa_constraints
    from sae_lens_multimodal.hooks.controls import SearchSettings as SearchSettings
    from sae_lens_multimodal.hooks.controls import find_controls as find_controls
    from sae_lens_multimodal.hooks.dose import dose_response as dose_response
    from sae_lens_multimodal.hooks.edges import attribute_edges as attribute_edges
    from sae_lens_multimodal.hooks.lens import logit_lens as logit_lens
    from sae_lens_multimodal.hooks.load_sae import load_sae as load_sae
    from sae_lens_multimodal.hooks.metrics import ContinuationLogProbability as ContinuationLogProbability
    from sae_lens_multimodal.hooks.metrics import LogitDifference as LogitDifference
    from sae_lens_multimodal.hooks.places import BoxTokens as BoxTokens
    from sae_lens_multimodal.hooks.places import ImageTokens as ImageTokens
    from sae_lens_multimodal.hooks.read import read_activations as read_activations
    from sae_lens_multimodal.hooks.run_with_saes import run_with_cache_with_saes as run_with_cache_with_saes
    from sae_lens_multimodal.hooks.run_with_saes import run_with_saes as run_with_saes
    from sae_lens_multimodal.hooks.run_with_saes import saes as saes
    from sae_lens_multimodal.hooks.steer import steer as steer
    from sae_lens_multimodal.hooks.trace import causal_trace as causal_trace
    from sae_lens_multimodal.hooks.trace_ablation import ablate_tokens as ablate_tokens
    from sae_lens_multimodal.hooks.trace_corruptions import BlankRegion as BlankRegion
    from sae_lens_multimodal.hooks.trace_corruptions import Counterfactual as Counterfactual
    from sae_lens_multimodal.hooks.trace_corruptions import ExchangeRegions as ExchangeRegions
    from sae_lens_multimodal.hooks.trace_corruptions import Noise as Noise
    from sae_lens_multimodal.hooks.trace_corruptions import OtherImage as OtherImage
    from sae_lens_multimodal.hooks.trace_corruptions import ReplaceTokens as ReplaceTokens
    from sae_lens_multimodal.hooks.trace_findings import HeldOut as HeldOut
    from sae_lens_multimodal.hooks.trace_parts import Head as Head
    from sae_lens_multimodal.hooks.trace_parts import SAEFeatures as SAEFeatures
    from sae_lens_multimodal.hooks.trace_result import CausalTrace as CausalTrace
    from sae_lens_multimodal.hooks.trace_story import trace_features as trace_features
    from sae_lens_multimodal.hooks.vectors import SteeringVector as SteeringVector
    from sae_lens_multimodal.hooks.vectors import steering_vector as steering_vector
    from sae_lens_multimodal.report.build import build_report as build_report
    from sae_lens_multimodal.report.controls import build_control_report as build_control_report
    from sae_lens_multimodal.report.dose import build_dose_report as build_dose_report
    from sae_lens_multimodal.report.neuronpedia import export_neuronpedia as export_neuronpedia
    from sae_lens_multimodal.report.table import export_table as export_table
    from sae_lens_multimodal.report.trace import build_trace_report as build_trace_report
    from sae_lens_multimodal.training.cache import cache_activations as cache_activations
    from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig as MultimodalSAERunnerConfig
    from sae_lens_multimodal.training.evaluation import evaluate as evaluate
    from sae_lens_multimodal.training.published import load_published_sae as load_published_sae
    from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner as MultimodalSAETrainingRunner
    from sae_lens_multimodal.types import Modality as Modality


_HOMES = {
    "Ablate": "hooks.changes",
    "Add": "hooks.changes",
    "BlankRegion": "hooks.trace_corruptions",
    "BoxTokens": "hooks.places",
    "CausalTrace": "hooks.trace_result",
    "ConceptDictionary": "concepts.dictionary",
    "ConceptStates": "concepts.states",
    "ConstrainedQuestion": "hooks.constraints",
    "Constraint": "hooks.constraints",
    "ContinuationLogProbability": "hooks.metrics",
    "Counterfactual": "hooks.trace_corruptions",
    "Edit": "editing.edit",
    "EditCases": "editing.measure",
    "EditSettings": "editing.settings",
    "EncodedBatch": "adapters.batch",
    "ExchangeRegions": "hooks.trace_corruptions",
    "FeatureStore": "features.store",
    "Head": "hooks.trace_parts",
    "HeldOut": "hooks.trace_findings",
    "ImageTokens": "hooks.places",
    "LogitDifference": "hooks.metrics",
    "Modality": "types",
    "MultimodalSAERunnerConfig": "training.config",
    "MultimodalSAETrainingRunner": "training.runner",
    "Noise": "hooks.trace_corruptions",
    "OtherImage": "hooks.trace_corruptions",
    "ReplaceTokens": "hooks.trace_corruptions",
    "SAEFeatures": "hooks.trace_parts",
    "Scale": "hooks.changes",
    "SearchSettings": "hooks.controls",
    "Set": "hooks.changes",
    "SteeringVector": "hooks.vectors",
    "TokenLayout": "adapters.layout",
    "VisionLanguageModel": "adapters.model",
    "ablate_tokens": "hooks.trace_ablation",
    "annotate_constraints": "autointerp.constraints",
    "attention_contributions": "hooks.attention",
    "attribute": "hooks.attribute",
    "attribute_edges": "hooks.edges",
    "build_control_report": "report.controls",
    "build_dose_report": "report.dose",
    "build_report": "report.build",
    "build_trace_report": "report.trace",
    "cache_activations": "training.cache",
    "causal_trace": "hooks.trace",
    "check_attribution": "hooks.attribution_check",
    "compute_edit": "editing.compute",
    "describe_features": "features.describe",
    "dose_response": "hooks.dose",
    "evaluate": "training.evaluation",
    "evaluate_concepts": "concepts.evaluate",
    "explain": "autointerp.explain",
    "export_neuronpedia": "report.neuronpedia",
    "export_table": "report.table",
    "find_concepts": "concepts.dictionary",
    "find_controls": "hooks.controls",
    "fine_tune": "editing.fine_tune",
    "gather_states": "concepts.gather",
    "ground_concepts": "concepts.ground",
    "harvest": "features.harvest",
    "knock_out": "hooks.attention_knockout",
    "load_edit": "editing.store",
    "load_model": "adapters.model",
    "load_published_sae": "training.published",
    "load_sae": "hooks.load_sae",
    "logit_lens": "hooks.lens",
    "measure": "autointerp.measures",
    "measure_edit": "editing.measure",
    "ordinary_keys": "editing.keys",
    "read_activations": "hooks.read",
    "read_vqa_constraints": "hooks.constraints_files",
    "run_with_cache_with_saes": "hooks.run_with_saes",
    "run_with_saes": "hooks.run_with_saes",
    "saes": "hooks.run_with_saes",
    "save_edit": "editing.store",
    "save_edited": "editing.store",
    "score": "autointerp.score",
    "steer": "hooks.steer",
    "steering_vector": "hooks.vectors",
    "summarise_measures": "autointerp.measure_summary",
    "trace_features": "hooks.trace_story",
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

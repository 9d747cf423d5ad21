"""What Neuronpedia must know of a model and of an SAE before it takes features: one row each of four tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.report.gather import name_of

if TYPE_CHECKING:
    from sae_lens_multimodal.features.store import FeatureStore

IMPORTER = "clkht01d40000jv08hvalcvly"
"""The user that imported data belong to unless another one is given, as in SAEDashboard."""


@dataclass(frozen=True, kw_only=True)
class NeuronpediaNames:
    """What things are called at Neuronpedia, and whose they are."""

    model_id: str | None = None
    """Letters, digits, dashes and underscores. None: made from the name of the store's model."""
    source_set: str = "multimodal"
    """Name of the set of SAEs; with the layer before it, it names the SAE."""
    layer: int | None = None
    """None: that of the store's hook."""
    release: str = "sae-lens-multimodal"
    """Name of the release that the set belongs to."""
    description: str = "Features of a vision-language model"
    """Of the release and of the set."""
    creator_name: str = ""
    creator_id: str = IMPORTER
    """A user of the instance that imports."""
    url: str | None = None
    """Of the paper or the repository."""
    hf_repo: str | None = None
    """Where the SAE's weights are on the Hugging Face hub."""
    hf_folder: str | None = None
    explanation_type: str | None = None
    """A type of explanations that the instance knows; None for none, as it refuses others."""
    explanation_model: str | None = None
    """An explainer that the instance knows; None for none."""


def created(store: FeatureStore) -> str:
    """Say when the store was made: rows get that date, so that the same export twice is the same."""
    return str(store.manifest.get("created", ""))


def head_rows(store: FeatureStore, names: NeuronpediaNames, model_id: str, source_id: str) -> dict[str, dict[str, Any]]:
    """Make the rows of the release, the model, the set of SAEs and the SAE, by the names of their files."""
    owned = {"creatorId": names.creator_id, "createdAt": created(store), "visibility": "PUBLIC"}
    return {
        "release": {**_release(names), **owned},
        "model": {**_model(model_id), "updatedAt": created(store), **owned},
        "sourceset": {**_source_set(names, model_id), **owned},
        "source": {**_source(store, names, model_id, source_id), **owned},
    }


def _release(names: NeuronpediaNames) -> dict[str, Any]:
    return {
        "name": names.release,
        "description": names.description,
        "descriptionShort": names.description,
        "creatorName": names.creator_name,
        "creatorNameShort": names.creator_name,
        "urls": [names.url] if names.url else [],
    }


def _model(model_id: str) -> dict[str, Any]:
    return {
        "id": model_id,
        "instruct": True,
        "displayName": model_id,
        "displayNameShort": model_id,
        # as SAEDashboard has them; neither has a default there
        "layers": 0,
        "neuronsPerLayer": 0,
        "owner": "",
    }


def _source_set(names: NeuronpediaNames, model_id: str) -> dict[str, Any]:
    return {
        "modelId": model_id,
        "name": names.source_set,
        "description": names.description,
        "creatorName": names.creator_name,
        "releaseName": names.release,
        "urls": [names.url] if names.url else [],
    }


def _source(store: FeatureStore, names: NeuronpediaNames, model_id: str, source_id: str) -> dict[str, Any]:
    settings = store.settings
    return {
        "id": source_id,
        "modelId": model_id,
        "setName": names.source_set,
        "dataset": name_of((settings.get("dataset") or {}).get("name")),
        "num_prompts": settings.get("n_prompts"),
        "num_tokens_in_prompt": settings.get("context_size"),
        "hfRepoId": names.hf_repo,
        "hfFolderId": names.hf_folder,
        "notes": f"Harvested from {store.hook_name} by sae-lens-multimodal.",
    }

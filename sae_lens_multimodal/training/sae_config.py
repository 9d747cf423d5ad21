"""Builds the SAE part of the settings, of any architecture that SAE-Lens can train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import sae_lens  # noqa: F401 - registers the architectures
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainingSAEConfig

from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.typed_fields import as_mapping, typed_fields

UNSET_WIDTH = 0
"""`sae.d_in` of a configuration that leaves the width to the hook."""


def build_sae_config(content: object) -> TrainingSAEConfig:
    """Build an SAE configuration from `{"architecture": ..., "d_sae": ..., ...}`; `d_in` may be left out.

    Raises:
        ConfigError: the architecture or a field is unknown, missing, or cannot work.
    """
    if isinstance(content, TrainingSAEConfig):
        return content
    settings = dict(as_mapping("sae", content))
    architecture = settings.pop("architecture", None)
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        known = ", ".join(sorted(SAE_TRAINING_CLASS_REGISTRY))
        if architecture in SAE_CLASS_REGISTRY:
            raise ConfigError(
                f"sae.architecture is {architecture!r}, which SAE-Lens can load but not train; choose one of: {known}."
            )
        raise ConfigError(f"sae.architecture is {architecture!r}; expected one of: {known}.")
    metadata = settings.pop("metadata", None)
    config_class = get_sae_training_class(architecture)[1]
    values = typed_fields(config_class, {"d_in": UNSET_WIDTH, **settings}, prefix="sae.")
    required = [entry.name for entry in fields(config_class) if _is_required(entry)]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"sae.{missing[0]} is missing; give it, such as 'd_sae: 1024' below 'sae:'.")
    if isinstance(metadata, Mapping):
        values["metadata"] = SAEMetadata(**metadata)
    try:
        return config_class(**values)
    except ValueError as error:
        raise ConfigError(f"sae: {error}") from error


def _is_required(entry: Any) -> bool:  # noqa: ANN401 - a dataclass field, whose class is generic in stubs only
    return bool(entry.default is MISSING and entry.default_factory is MISSING)

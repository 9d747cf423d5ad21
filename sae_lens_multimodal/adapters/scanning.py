"""Scans of models whose vision towers read from the pictures' values how large things are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sae_lens_multimodal.adapters.family import Family


def features_for_pictures(family: Family, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return model inputs with features in place of the pictures, so that the language model can be scanned.

    The vision tower and the projector do not run then: tensors without values do not tell them how many tiles or
    patches there are.
    """
    count = int((inputs["input_ids"] == family.image_token_id).sum())
    features: Any = [torch.zeros(count, family.d_model)]
    rest = {name: value for name, value in inputs.items() if name not in family.media_keys}
    return {**rest, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}

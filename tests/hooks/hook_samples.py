"""SAEs with random weights, and the hook of the tiny model that the tests use them at."""

from __future__ import annotations

import warnings
from typing import Any

import torch

with warnings.catch_warnings():
    # SAE-Lens imports a module of TransformerLens that says it is deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from sae_lens import SAE
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

HOOK = "blocks.0.hook_resid_post"
MODULE = "model.language_model.layers.0"
D_SAE = 96


def build_sae(
    architecture: str = "topk",
    *,
    d_in: int = 48,
    training: bool = False,
    metadata: dict[str, Any] | None = None,
    **config: Any,
) -> SAE[Any]:
    """An SAE of any architecture with random weights and biases, so that nothing hides behind zeros."""
    if "topk" in architecture:
        config = {"k": 8, **config}
    if architecture == "matching_pursuit":
        config = {"max_iterations": 5, **config}
    if architecture == "matryoshka_batchtopk":
        config = {"matryoshka_widths": [D_SAE // 2, D_SAE], **config}
    registry: Any = SAE_TRAINING_CLASS_REGISTRY if training else SAE_CLASS_REGISTRY
    sae_class, config_class = registry[architecture]
    sae_config = config_class(d_in=d_in, d_sae=D_SAE, **config)
    for key, value in (metadata or {}).items():
        setattr(sae_config.metadata, key, value)
    sae = sae_class(sae_config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            scale = 0.1 if name.startswith("b_") or name in ("threshold", "r_mag") else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return sae

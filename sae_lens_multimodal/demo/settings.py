"""How much of everything the demo does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo; the defaults take a few minutes on two cores."""

    seed: int = 0
    """Seed of everything random; also chooses the scenes."""
    hook_name: str = "blocks.0.hook_resid_post"
    """Where the SAE reads."""
    d_sae: int = 192
    """Width of the SAE."""
    k: int = 8
    """Features that fire on a token."""
    training_tokens: int = 400_000
    """Tokens that the SAE is trained on."""
    image_share: float = 0.6
    """Share of image tokens in every training batch; the rest are text."""
    harvest_prompts: int = 900
    """Prompts in which the features' examples are sought."""
    truth_prompts: int = 300
    """Prompts on which features are compared with the scenes' masks and words."""
    evaluation_prompts: int = 200
    """Prompts on which the reconstruction is measured."""
    explained_features: int = 64
    """Features that are explained and scored, drawn at random among those with enough examples."""
    examples_needed: int = 12
    """Prompts in which a feature must fire to be explained."""
    steered_scenes: int = 10
    """Scenes on which each steered feature is tried."""
    batch_size: int = 32
    """Prompts a forward pass."""

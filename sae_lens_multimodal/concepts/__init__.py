"""Concept dictionaries: states gathered for a word, taken apart into concepts that are used like SAE features."""

from sae_lens_multimodal.hooks import concept_sae as concept_sae  # so that SAE-Lens can load saved dictionaries

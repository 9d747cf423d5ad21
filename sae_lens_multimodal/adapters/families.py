"""The one place where the supported model families are registered; each is imported when it is first needed."""

from __future__ import annotations

from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.registry import family


@family("llava_next")
def llava_next() -> type[Family]:
    """LLaVA-NeXT (LLaVA 1.6)."""
    from sae_lens_multimodal.adapters.llava_next import LlavaNext

    return LlavaNext

"""The one place where the supported model families are registered; each is imported when it is first needed."""

from __future__ import annotations

from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.registry import family


@family("llava")
def llava() -> type[Family]:
    """LLaVA-1.5."""
    from sae_lens_multimodal.adapters.llava import Llava

    return Llava


@family("vipllava")
def vipllava() -> type[Family]:
    """VIP-LLaVA."""
    from sae_lens_multimodal.adapters.vipllava import VipLlava

    return VipLlava


@family("llava_next")
def llava_next() -> type[Family]:
    """LLaVA-NeXT (LLaVA 1.6)."""
    from sae_lens_multimodal.adapters.llava_next import LlavaNext

    return LlavaNext


@family("llava_next_video")
def llava_next_video() -> type[Family]:
    """LLaVA-NeXT-Video, for pictures."""
    from sae_lens_multimodal.adapters.llava_next_video import LlavaNextVideo

    return LlavaNextVideo


@family("llava_onevision")
def llava_onevision() -> type[Family]:
    """LLaVA-OneVision."""
    from sae_lens_multimodal.adapters.llava_onevision import LlavaOnevision

    return LlavaOnevision


@family("qwen2_vl")
def qwen2_vl() -> type[Family]:
    """Qwen2-VL."""
    from sae_lens_multimodal.adapters.qwen2_vl import Qwen2Vl

    return Qwen2Vl


@family("qwen2_5_vl")
def qwen2_5_vl() -> type[Family]:
    """Qwen2.5-VL."""
    from sae_lens_multimodal.adapters.qwen2_5_vl import Qwen25Vl

    return Qwen25Vl


@family("qwen3_vl")
def qwen3_vl() -> type[Family]:
    """Qwen3-VL."""
    from sae_lens_multimodal.adapters.qwen3_vl import Qwen3Vl

    return Qwen3Vl


@family("idefics3")
def idefics3() -> type[Family]:
    """Idefics3 and the first SmolVLM."""
    from sae_lens_multimodal.adapters.idefics3 import Idefics3

    return Idefics3


@family("smolvlm")
def smolvlm() -> type[Family]:
    """SmolVLM2."""
    from sae_lens_multimodal.adapters.smolvlm import SmolVlm

    return SmolVlm


@family("internvl")
def internvl() -> type[Family]:
    """InternVL 3, as ported to transformers."""
    from sae_lens_multimodal.adapters.internvl import InternVl

    return InternVl


@family("gemma3")
def gemma3() -> type[Family]:
    """Gemma 3."""
    from sae_lens_multimodal.adapters.gemma3 import Gemma3

    return Gemma3


@family("paligemma")
def paligemma() -> type[Family]:
    """PaliGemma and PaliGemma 2."""
    from sae_lens_multimodal.adapters.paligemma import PaliGemma

    return PaliGemma


@family("glm4v")
def glm4v() -> type[Family]:
    """GLM-4.1V."""
    from sae_lens_multimodal.adapters.glm4v import Glm4v

    return Glm4v


@family("glm46v")
def glm46v() -> type[Family]:
    """GLM-4.6V."""
    from sae_lens_multimodal.adapters.glm46v import Glm46V

    return Glm46V


@family("mistral3")
def mistral3() -> type[Family]:
    """Mistral 3 (Mistral Small 3.1)."""
    from sae_lens_multimodal.adapters.mistral3 import Mistral3

    return Mistral3


@family("qwen3_vl_moe")
def qwen3_vl_moe() -> type[Family]:
    """Qwen3-VL with mixtures of experts."""
    from sae_lens_multimodal.adapters.qwen3_vl_moe import Qwen3VlMoe

    return Qwen3VlMoe


@family("qwen3_5")
def qwen3_5() -> type[Family]:
    """Qwen3.5."""
    from sae_lens_multimodal.adapters.qwen3_5 import Qwen35

    return Qwen35


@family("qwen3_5_moe")
def qwen3_5_moe() -> type[Family]:
    """Qwen3.5 with mixtures of experts."""
    from sae_lens_multimodal.adapters.qwen3_5_moe import Qwen35Moe

    return Qwen35Moe


@family("aya_vision")
def aya_vision() -> type[Family]:
    """Aya Vision."""
    from sae_lens_multimodal.adapters.aya_vision import AyaVision

    return AyaVision

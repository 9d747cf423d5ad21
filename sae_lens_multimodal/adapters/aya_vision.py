"""The Aya Vision family: tiles, then a thumbnail of the whole picture, before a Cohere 2."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    GotOcr2ImageProcessorPil,
    SiglipVisionConfig,
)

from sae_lens_multimodal.adapters.family import Family, ImageTokens, Released
from sae_lens_multimodal.adapters.grid import height_width
from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.modules import (
    LANGUAGE,
    OLD_PATHS,
    PROJECTOR,
    UNEMBEDDING,
    VISION,
    check_tower,
    clip_vision_hooks,
    embedding_hook,
    language_block,
    language_hooks,
)
from sae_lens_multimodal.adapters.random_models import (
    CHAT_TEMPLATE,
    CONTROL,
    finished,
    tiny_llama,
    tiny_tower,
    word_tokenizer,
)
from sae_lens_multimodal.adapters.tiles import Tile, canvas_tokens, canvas_limits
from sae_lens_multimodal.errors import LayoutError
from sae_lens_multimodal.types import Modality

_TILE_MARKER = re.compile(r"TILE_(\d+|GLOBAL)")


@final
class AyaVision(Family):
    """Aya Vision: a picture is stretched to whole tiles, which are cut apart; if there are several, the whole follows.

    Each token stands for a block of 2 x 2 patches. Attention and MLP of the language model read the same norm, so that
    there is no residual stream between them: blocks have neither `hook_resid_mid` nor `ln2`.
    """

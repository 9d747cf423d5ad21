"""What several families' models are built of: where their modules lie, and which hooks these have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from sae_lens_multimodal.adapters.hook_points import BlockModules, HookPoint, Part, block_parts, blocks, norm_parts
from sae_lens_multimodal.errors import UnsupportedModelError

LANGUAGE = "model.language_model"
VISION = "model.vision_tower"
PROJECTOR = "model.multi_modal_projector"
UNEMBEDDING = "lm_head"

OLD_PATHS: Mapping[str, str] = MappingProxyType(
    {
        "language_model.model.": f"{LANGUAGE}.",
        "language_model.lm_head": UNEMBEDDING,
        "vision_tower.vision_model.": f"{VISION}.",
        "vision_tower": VISION,
        "multi_modal_projector": PROJECTOR,
    }
)
"""Beginnings of module paths in transformers before 4.52, and what they are now."""

RMS_NORMALIZED = "hidden_states_to_1"
"""The operation in transformers' RMS norms that is cast back before the weight."""
GEMMA_NORMALIZED = "self__norm_0"
"""The operation in Gemma's norms whose result is multiplied with one plus the weight."""
COHERE_NORMALIZED = "hidden_states_1"
"""The operation in Cohere's layer norms that is the value before the weight, in float32."""
SCORES = "attention_interface_1.source.nn_functional_softmax_0"
"""The operation in transformers' eager attention whose input is the masked scores."""
PATTERN = "attention_interface_1.source.attn_weights_3"
"""The operation in transformers' eager attention that is the weights on their way to the values."""
GEMMA_PATTERN = "attention_interface_1.source.attn_weights_6"
"""The same where scores can be capped first, as in Gemma 2 and 3."""


def head_width(config: Any) -> int:  # noqa: ANN401 - a transformers config
    """Return the width of one head, which some configurations give and others leave to be worked out."""
    return int(config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads)


def llama_block(text: Any) -> BlockModules:  # noqa: ANN401 - a transformers config
    """Return the modules of a block as in Llama, Mistral and Qwen 2 and 3."""
    return BlockModules(
        ln1="input_layernorm",
        attention="self_attn",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
        ln2="post_attention_layernorm",
        mlp="mlp",
        mlp_in="mlp.gate_proj",
        mlp_gated="mlp.up_proj",
        mlp_out="mlp.down_proj",
        mid="hidden_states_1",
        normalized=RMS_NORMALIZED,
        scores=SCORES,
        pattern=PATTERN,
        width=text.hidden_size,
        # mixtures of experts have none
        mlp_width=int(text.to_dict().get("intermediate_size", 0)),
        heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        head_width=head_width(text),
    )


def gemma_block(text: Any) -> BlockModules:  # noqa: ANN401 - a transformers config
    """Return the modules of a block as in Gemma 2 and 3, with a norm before and after attention and MLP."""
    return replace(
        llama_block(text),
        ln1_post="post_attention_layernorm",
        ln2="pre_feedforward_layernorm",
        ln2_post="post_feedforward_layernorm",
        mid="hidden_states_2",
        normalized=GEMMA_NORMALIZED,
        pattern=GEMMA_PATTERN,
    )


def gemma1_block(text: Any) -> BlockModules:  # noqa: ANN401 - a transformers config
    """Return the modules of a block as in the first Gemma: Llama's with other norms."""
    return replace(llama_block(text), normalized=GEMMA_NORMALIZED)


def cohere_block(text: Any) -> BlockModules:  # noqa: ANN401 - a transformers config
    """Return the modules of a block as in Cohere's models, whose attention and MLP read the same norm."""
    return replace(llama_block(text), ln2=None, mid=None, normalized=COHERE_NORMALIZED)


LANGUAGE_BLOCKS: Mapping[str, Callable[[Any], BlockModules]] = MappingProxyType(
    {
        **dict.fromkeys(("llama", "ministral", "ministral3", "mistral", "qwen2", "qwen3"), llama_block),
        **dict.fromkeys(("cohere", "cohere2"), cohere_block),
        "gemma": gemma1_block,
        **dict.fromkeys(("gemma2", "gemma3_text"), gemma_block),
    }
)
"""The blocks of language models that come inside of others, by kind."""


def language_block(text: Any) -> BlockModules:  # noqa: ANN401 - a transformers config
    """Return the modules of a language model's block, by its kind.

    Raises:
        UnsupportedModelError: its blocks are not known here.
    """
    if text.model_type not in LANGUAGE_BLOCKS:
        raise UnsupportedModelError(
            f"the language model is of the kind {text.model_type!r}; supported within this family are "
            f"{', '.join(LANGUAGE_BLOCKS)}."
        )
    return LANGUAGE_BLOCKS[text.model_type](text)


def clip_block(vision: Any) -> BlockModules:  # noqa: ANN401 - a transformers config
    """Return the modules of a block as in CLIP's and SigLIP's vision towers."""
    return BlockModules(
        ln1="layer_norm1",
        attention="self_attn",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.out_proj",
        ln2="layer_norm2",
        mlp="mlp",
        mlp_in="mlp.fc1",
        mlp_gated=None,
        mlp_out="mlp.fc2",
        mid="hidden_states_1",
        normalized=None,
        scores=SCORES,
        pattern=PATTERN,
        width=vision.hidden_size,
        mlp_width=vision.intermediate_size,
        heads=vision.num_attention_heads,
        key_heads=vision.num_attention_heads,
        head_width=head_width(vision),
    )


CLASS_TOKENS: Mapping[str, int] = MappingProxyType({"clip_vision_model": 1, "siglip_vision_model": 0})
"""Tokens before the patches, by kind of vision tower."""


def check_tower(vision: Any, dropped: int, because: str) -> None:  # noqa: ANN401 - a transformers config
    """Check that what the model drops of a vision tower's output is its class token and nothing else.

    Args:
        vision: the tower's configuration.
        dropped: how many tokens the model drops from the beginning.
        because: the setting that says so, for the message.

    Raises:
        UnsupportedModelError: the kind of tower is not known here, or tokens beside the patches are left.
    """
    if vision.model_type not in CLASS_TOKENS:
        raise UnsupportedModelError(
            f"the vision tower is of the kind {vision.model_type!r}; supported are {', '.join(CLASS_TOKENS)}."
        )
    left = CLASS_TOKENS[vision.model_type] - dropped
    if left:
        raise UnsupportedModelError(
            f"{because} with a {vision.model_type} leaves {left:+d} tokens beside the patches, which have no "
            "place in a picture; expected 'default' with a class token, 'full' without."
        )


def check_strategy(config: Any) -> None:  # noqa: ANN401 - a transformers config
    """Check that `vision_feature_select_strategy` drops the class token if there is one, and nothing else.

    Raises:
        UnsupportedModelError: as `check_tower`.
    """
    strategy = config.vision_feature_select_strategy
    check_tower(config.vision_config, 1 if strategy == "default" else 0, f"vision_feature_select_strategy={strategy!r}")


def features_width(config: Any) -> int:  # noqa: ANN401 - a transformers config
    """Return the width of what a projector is given: the features of one layer of the vision tower, or of several."""
    layers = config.vision_feature_layer
    return int(config.vision_config.hidden_size) * (1 if isinstance(layers, int) else len(layers))


def complete_processor(config: Any, processor: Any, strategy: str) -> None:  # noqa: ANN401 - transformers' own
    """Fill in what processors saved by older versions of transformers lack and need to count tokens."""
    if processor.patch_size is None:
        processor.patch_size = config.vision_config.patch_size
        processor.num_additional_image_tokens = CLASS_TOKENS[config.vision_config.model_type]
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = strategy


def embedding_hook(text: Any, path: str = LANGUAGE) -> tuple[HookPoint, ...]:  # noqa: ANN401 - a transformers config
    """Return the hook of the token embeddings."""
    return (Part("hook_embed", "embed_tokens", d=text.hidden_size).at(prefix="", path=path, tower="language"),)


def clip_vision_hooks(vision: Any, path: str = VISION) -> tuple[HookPoint, ...]:  # noqa: ANN401 - a transformers config
    """Return the hooks of a CLIP or SigLIP vision tower."""
    return (
        Part("hook_embed", "embeddings", d=vision.hidden_size).at(prefix="vision.", path=path, tower="vision"),
        *blocks(
            block_parts(clip_block(vision)),
            prefix="vision.blocks.",
            path=f"{path}.encoder.layers",
            count=vision.num_hidden_layers,
            tower="vision",
        ),
    )


def projector_hooks(
    seen: int, hidden: int, width: int, path: str = PROJECTOR, norm: str | None = None
) -> tuple[HookPoint, ...]:
    """Return the hooks of a projector of two linear layers.

    Args:
        seen: width of what it is given.
        hidden: width between its layers.
        width: width of what it returns.
        path: where it is.
        norm: the norm before its layers, if it has one.
    """
    parts = (
        Part("hook_in", side="input", d=seen),
        *(() if norm is None else (Part("ln.hook_out", norm, d=seen),)),
        Part("hook_pre", "linear_1", d=hidden),
        Part("hook_post", "linear_2", side="input", d=hidden),
        Part("hook_out", d=width),
    )
    return tuple(part.at(prefix="projector.", path=path, tower="projector") for part in parts)


def llava_hooks(config: Any, norm: str | None = None) -> tuple[HookPoint, ...]:  # noqa: ANN401 - a transformers config
    """Return the hooks of a model built like LLaVA: a CLIP or SigLIP, a projector of two layers, a language model.

    Args:
        config: of the model.
        norm: the norm before the projector's layers, if it has one.
    """
    text = config.text_config
    return (
        *embedding_hook(text),
        *clip_vision_hooks(config.vision_config),
        *projector_hooks(features_width(config), text.hidden_size, text.hidden_size, norm=norm),
        *language_hooks(text, language_block(text)),
    )


def language_hooks(
    text: Any,  # noqa: ANN401 - a transformers config
    block: BlockModules,
    path: str = LANGUAGE,
    unembedding: str = UNEMBEDDING,
) -> tuple[HookPoint, ...]:
    """Return the hooks of a language model after its embeddings: blocks, final norm, unembedding."""
    width = text.hidden_size
    return (
        *blocks(
            block_parts(block), prefix="blocks.", path=f"{path}.layers", count=text.num_hidden_layers, tower="language"
        ),
        *(
            part.at(prefix="", path=path, tower="language")
            for part in norm_parts("ln_final", "norm", width, block.normalized)
        ),
        Part("hook_in", side="input", d=width).at(prefix="unembed.", path=unembedding, tower="language"),
        Part("hook_out", d=text.vocab_size).at(prefix="unembed.", path=unembedding, tower="language"),
    )

"""The Qwen3.5 family: Qwen3-VL's vision tower before a language model most of whose blocks keep a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

from tokenizers import AddedToken
from transformers import Qwen3_5ForConditionalGeneration, Qwen3VLProcessor

from sae_lens_multimodal.adapters.family import Released
from sae_lens_multimodal.adapters.hook_points import BlockModules, HookPoint, block_parts
from sae_lens_multimodal.adapters.modules import LANGUAGE, language_hooks
from sae_lens_multimodal.adapters.processors import picture_processor
from sae_lens_multimodal.adapters.qwen3_vl import LearnedGrid
from sae_lens_multimodal.adapters.qwen_vision import tiny_qwen
from sae_lens_multimodal.adapters.random_models import WORDS


class LinearAttention(LearnedGrid):
    """No deepstack features; three of four blocks of the language model have linear attention.

    Blocks with linear attention have no hooks for queries, keys, values, scores and pattern; those with full attention
    have none for queries, which come out of one layer with a gate. `attn.hook_z` is after the gate in both. What a
    prompt gets in a batch is what it gets alone up to rounding: linear attention works in chunks, whose bounds move
    with padding.
    """

    def language_points(self) -> Sequence[HookPoint]:
        """Return the hooks of the language model after its embeddings, block by block of its own kind."""
        text = self.config.text_config
        points = [
            part.at(prefix=f"blocks.{index}.", path=f"{LANGUAGE}.layers.{index}", tower="language", layer=index)
            for index, kind in enumerate(text.layer_types)
            for part in block_parts(self._block(kind))
        ]
        return (*points, *(point for point in language_hooks(text, self.text_block()) if point.layer is None))

    def text_block(self) -> BlockModules:
        """Return the modules of a block with full attention."""
        return replace(super().text_block(), q=None, mid="hidden_states_2", normalized="self__norm_0")

    def _block(self, kind: str) -> BlockModules:
        text, block = self.config.text_config, self.text_block()
        if kind == "full_attention":
            return block
        return replace(
            block,
            attention="linear_attn",
            attention_element=None,
            k=None,
            v=None,
            o="linear_attn.out_proj",
            scores=None,
            pattern=None,
            heads=text.linear_num_value_heads,
            head_width=text.linear_value_head_dim,
        )

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out the mask too, whose numbers linear attention looks at."""
        given = super().scan_inputs(inputs)
        return {name: value for name, value in given.items() if name != "attention_mask"}

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads the processor."""
        return picture_processor(Qwen3VLProcessor)


@final
class Qwen35(LinearAttention):
    """Qwen3.5: blocks of 2 x 2 patches of 16 pixels, and mostly linear attention."""

    model_type: ClassVar[str] = "qwen3_5"
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=("Qwen/Qwen3.5-27B",),
            structure={"patch_size": 16, "min_pixels": 256 * 256, "max_pixels": 4096 * 4096},
        ),
    )

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `tiny_qwen`
        """Return a tiny Qwen3.5 with a block of either kind and random weights, and its processor."""
        return tiny_hybrid(Qwen3_5ForConditionalGeneration, seed, {}, **structure)


def tiny_hybrid(
    model_class: Any,  # noqa: ANN401 - a transformers class
    seed: int,
    text: Mapping[str, Any],
    **structure: Any,  # noqa: ANN401 - see `tiny_qwen`
) -> tuple[Any, Any]:
    """Return a small model with a block of either kind and random weights, and its processor."""
    vision = {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 48, "num_position_embeddings": 36}
    hybrid = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 2, 2],
            "partial_rotary_factor": 1.0,
        },
    }
    model, processor = tiny_qwen(model_class, Qwen3VLProcessor, seed, vision, text={**hybrid, **text}, **structure)
    # random weights are large: so that rounding stays small
    model.model.language_model.layers[0].linear_attn.out_proj.weight.data *= 0.03
    # transformers loads this family's tokenizer as one that splits words in its own way: not these
    whole = {"single_word": True, "lstrip": True, "rstrip": True, "normalized": False}
    processor.tokenizer.add_tokens([AddedToken(word, **whole) for word in WORDS])
    return model, processor

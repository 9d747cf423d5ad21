"""Any vision-language model without an adapter of its own: its blocks are found, the place of its tokens is not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int, Int64
from PIL import Image
from torch import Tensor, nn

from sae_lens_multimodal.adapters.family import Family, ImageTokens
from sae_lens_multimodal.adapters.hook_points import HookPoint, Part, Side
from sae_lens_multimodal.adapters.registry import GENERIC
from sae_lens_multimodal.errors import PromptError, UnsupportedModelError
from sae_lens_multimodal.types import Modality

UNKNOWN_PLACES = "the model was loaded with family='generic', which does not know where its image tokens lie"
"""Why no box is known."""
PLAIN_BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""The modules of a block whose attention and MLP are added to the residual stream as they are."""
FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_norm")
NOT_MEDIA = ("input_ids", "attention_mask", "position_ids", "labels")


class _Probe(NamedTuple):
    """What the processor makes of one small picture."""

    media_keys: tuple[str, ...]
    token_keys: tuple[str, ...]


@final
class Generic(Family):
    """A fallback: positions of image tokens are known, their boxes are not; language hooks are found by structure."""

    model_type: ClassVar[str] = GENERIC
    old_paths: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: Any, processor: Any, module: nn.Module | None = None) -> None:  # noqa: ANN401
        """Look for the parts of a model.

        Raises:
            UnsupportedModelError: the language model's blocks, or the image token, cannot be found.
        """
        super().__init__(config, processor)
        if module is None:
            raise UnsupportedModelError("family='generic' reads a model's structure; load it with load_model.")
        self._module = module
        self._text = config.get_text_config()
        self._image_token_id = _image_token_id(config)
        self._paths = {id(part): path for path, part in module.named_modules()}
        self._blocks_path = self._find_blocks()
        parent = self._blocks_path.rpartition(".")[0]
        norms = [f"{parent}.{name}" if parent else name for name in FINAL_NORMS]
        modules = dict(module.named_modules())
        self.final_norm = next((path for path in norms if path in modules), "")  # type: ignore[misc] # by instance here
        self.unembedding = self._path_of(self._hf.get_output_embeddings())  # type: ignore[misc] # by instance here
        self.media_modules = tuple(self._outside(("", module)))  # type: ignore[misc] # by instance here
        probe = self._probe_inputs()
        self.media_keys, self.token_keys = probe.media_keys, probe.token_keys  # type: ignore[misc] # by instance here

    @classmethod
    def of(cls, module: nn.Module, processor: Any) -> Generic:  # noqa: ANN401 - any transformers processor
        """Return the adapter of a loaded model."""
        return cls(module.config, processor, module)

    @property
    def n_layers(self) -> int:
        """Number of blocks of the language model."""
        return int(self._text.num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the language model's residual stream."""
        return int(self._text.hidden_size)

    @property
    def image_token_id(self) -> int:
        """The token that stands for every patch of a picture."""
        return self._image_token_id

    @property
    def image_token(self) -> str:
        """That token as text."""
        return str(self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id))

    @cached_property
    def prompt_token(self) -> str:
        """What the chat template writes for a picture; empty where that is not found out."""
        named = (getattr(self.processor, name, None) for name in ("boi_token", "image_token"))
        text = self.chat_text([_user({"type": "image"})], True)
        return next((token for token in (*named, self.image_token) if token and text.count(token) == 1), "")

    def hook_points(self) -> Sequence[HookPoint]:
        """Return the hooks that were found in the language model; everything else goes by module path."""
        embedding = self._path_of(self._hf.get_input_embeddings())
        points = [Part("hook_embed", d=self.d_model).at(prefix="", path=embedding, tower="language")]
        for index, block in enumerate(self._module.get_submodule(self._blocks_path).children()):
            points += [
                part.at(prefix=f"blocks.{index}.", path=f"{self._blocks_path}.{index}", tower="language", layer=index)
                for part in _block_parts(block, self.d_model, int(self._text.num_attention_heads))
            ]
        if self.final_norm:
            ends = (Part("ln_final.hook_in", side="input", d=self.d_model), Part("ln_final.hook_out", d=self.d_model))
            points += [part.at(prefix="", path=self.final_norm, tower="language") for part in ends]
        ends = (
            Part("unembed.hook_in", side="input", d=self.d_model),
            Part("unembed.hook_out", d=self._text.vocab_size),
        )
        return [*points, *(part.at(prefix="", path=self.unembedding, tower="language") for part in ends)]

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return tokens without a place, as many as the processor makes of a picture of this size."""
        count = self._count(width, height)
        return ImageTokens(
            modality=np.full(count, Modality.IMAGE, dtype=np.int8),
            boxes=np.full((count, 4), np.nan, dtype=np.float32),
            tile=np.zeros(count, dtype=np.int64),
            inexact=UNKNOWN_PLACES,
        )

    def merge_media(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join the picture inputs of several batches.

        Raises:
            PromptError: they have different shapes, and only an adapter would know how to join these.
        """
        try:
            return super().merge_media(batches)
        except RuntimeError as error:
            raise PromptError(
                "got several invokes whose pictures make inputs of different shapes, which family='generic' cannot "
                "join; encode the prompts as one batch, or use one invoke at a time."
            ) from error

    def media_rows(self, inputs: Mapping[str, Any]) -> int:
        """Return a number above 0 where there are pictures."""
        return sum(len(inputs[key]) for key in self.media_keys if inputs.get(key) is not None)

    def position_ids(self, attention_mask: Int[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq"] | None:
        """Count from each row's first token, unless the model has its own idea of positions."""
        rope = getattr(self._text, "rope_parameters", None) or getattr(self._text, "rope_scaling", None) or {}
        if "mrope_section" in rope or "position_ids" not in inspect.signature(self._module.forward).parameters:
            return None
        return super().position_ids(attention_mask)

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - transformers' own
        """Return a tiny LLaVA-NeXT, whose exact adapter this one can be compared with."""
        from sae_lens_multimodal.adapters.random_models import random_llava_next

        return random_llava_next(seed, **structure)

    def processor_images(self, images: Sequence[Sequence[Image.Image]]) -> Any:  # noqa: ANN401 - the processor's form
        """Return a flat list of pictures, or one list for each prompt, whichever the processor takes."""
        if not any(images):
            return None
        return [list(row) for row in images] if self._nested else super().processor_images(images)

    @property
    def _hf(self) -> Any:  # noqa: ANN401 - a transformers model
        return self._module

    def _path_of(self, part: nn.Module | None) -> str:
        path = self._paths.get(id(part))
        if path is None:
            raise UnsupportedModelError(
                f"a {type(self._module).__name__} does not say where its embeddings or unembedding are, which "
                "family='generic' starts from; write an adapter for it."
            )
        return path

    def _find_blocks(self) -> str:
        """Find the language model's blocks: as many as the configuration says, nearest to the token embeddings."""
        place = self._path_of(self._hf.get_input_embeddings())
        count = self.n_layers
        while place:
            place = place.rpartition(".")[0]
            inside = self._module.get_submodule(place) if place else self._module
            found = [
                path
                for path, part in inside.named_modules(prefix=place)
                if isinstance(part, nn.ModuleList)
                and len(part) == count
                and "vision" not in path
                and "visual" not in path
            ]
            if len(found) == 1:
                return found[0].removeprefix(".")
            if found:
                break
        raise UnsupportedModelError(
            f"the {count} blocks of the language model of a {type(self._module).__name__} cannot be told from its "
            "other modules, so family='generic' does not fit; write an adapter for it."
        )

    def _outside(self, place: tuple[str, nn.Module]) -> Iterator[str]:
        """Yield the largest modules that hold nothing of the language model: vision tower, projector and the like."""
        ours = (self._blocks_path.rpartition(".")[0], self._path_of(self._hf.get_input_embeddings()), self.unembedding)
        for name, child in place[1].named_children():
            path = f"{place[0]}.{name}" if place[0] else name
            if any(part == path or path.startswith(f"{part}.") for part in ours if part):
                continue
            if any(part.startswith(f"{path}.") for part in ours):
                yield from self._outside((path, child))
            else:
                yield path

    @cached_property
    def _nested(self) -> bool:
        """Whether the processor refuses the flat list that most take."""
        texts = [self.chat_text([_user(*parts)], True) for parts in (({"type": "image"},), (_WORD,))]
        try:
            self.processor(text=texts, images=[_blank(64, 48)], padding=True, return_tensors="pt")
        except (ValueError, TypeError, IndexError, AttributeError):
            return True
        return False

    def _encode_blank(self, width: int, height: int) -> Any:  # noqa: ANN401 - transformers' BatchFeature
        text = self.chat_text([_user({"type": "image"}, _WORD)], True)
        return self.processor(text=[text], images=self.processor_images([[_blank(width, height)]]), return_tensors="pt")

    def _probe_inputs(self) -> _Probe:
        encoded = self._encode_blank(64, 48)
        accepted = inspect.signature(self._module.forward).parameters
        found = [name for name in encoded if name in accepted and name not in NOT_MEDIA]
        per_token = tuple(name for name in found if name.endswith("token_type_ids"))
        return _Probe(tuple(name for name in found if name not in per_token), per_token)

    @cached_property
    def _counts(self) -> dict[tuple[int, int, str], int]:
        return {}

    def _count(self, width: int, height: int) -> int:
        # the processor's settings are the caller's to change
        settings = (self.processor.image_processor.to_json_string(), getattr(self.processor, "images_kwargs", {}))
        key = (width, height, repr(settings))
        if key not in self._counts:
            ids = self._encode_blank(width, height)["input_ids"]
            self._counts[key] = int(torch.as_tensor(ids).eq(self.image_token_id).sum())
        return self._counts[key]


def _image_token_id(config: Any) -> int:  # noqa: ANN401 - a transformers config
    for name in ("image_token_id", "image_token_index"):
        found = getattr(config, name, None)
        if found is not None:
            return int(found)
    raise UnsupportedModelError(
        f"the configuration of a {config.model_type!r} names no image_token_id, so family='generic' cannot tell image "
        "tokens from text; write an adapter for it."
    )


_WORD = {"type": "text", "text": "."}


def _user(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [dict(part) for part in parts]}


def _blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (127, 127, 127))


def _block_parts(block: nn.Module, width: int, heads: int) -> Iterator[Part]:
    """Yield the hooks of one block: what enters and leaves it, and its inner parts where they have the usual names."""
    names = {path for path, _ in block.named_modules()}
    plain = {name for name, _ in block.named_children()} == PLAIN_BLOCK

    def linear(name: str, path: str, *, side: Side = "output", split: bool = False) -> Iterator[Part]:
        if path in names:
            layer = block.get_submodule(path)
            size = getattr(layer, "in_features" if side == "input" else "out_features", None)
            yield Part(name, path, side=side, d=size, heads=_heads(block, size, heads) if split else None)

    yield Part("hook_resid_pre", side="input", d=width)
    if plain:
        yield Part("ln1.hook_in", "input_layernorm", side="input", d=width)
        yield Part("ln1.hook_out", "input_layernorm", d=width)
    for letter in "qkv":
        yield from linear(f"attn.hook_{letter}", f"self_attn.{letter}_proj", split=True)
    yield from linear("attn.hook_z", "self_attn.o_proj", side="input", split=True)
    if plain:
        # elsewhere a norm or a scale may lie between these and the residual stream
        yield Part("hook_attn_out", "self_attn", d=width, element=0)
        yield Part("ln2.hook_in", "post_attention_layernorm", side="input", d=width)
        yield Part("ln2.hook_out", "post_attention_layernorm", d=width)
    yield from linear("mlp.hook_pre", "mlp.gate_proj")
    yield from linear("mlp.hook_pre_linear", "mlp.up_proj")
    yield from linear("mlp.hook_post", "mlp.down_proj", side="input")
    if plain and "mlp.down_proj" in names:
        yield Part("hook_mlp_out", "mlp", d=width)
    yield Part("hook_resid_post", d=width)


def _heads(block: nn.Module, size: int | None, heads: int) -> int | None:
    """How many heads a layer's values are of; None where that is not plain."""
    width = getattr(block.get_submodule("self_attn"), "head_dim", None)
    if not size or not width or size % width or size // width > heads:
        return None
    return size // int(width)

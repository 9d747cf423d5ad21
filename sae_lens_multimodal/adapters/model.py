"""Loading a vision-language model as an nnsight model with hook names, layouts and batches of pictures."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any, Literal

import torch
from jaxtyping import Int
from nnsight import TransformersModel
from nnsight.intervention.source import SourceNotAvailable
from nnsight.modeling import processing
from nnsight.modeling.tp import TPFragments
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig, AutoModelForImageTextToText

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.batching import Invoke, LocatedInterleaver, MediaBatcher, join_invokes
from sae_lens_multimodal.adapters.encode import encode
from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.hook_access import HookPoints
from sae_lens_multimodal.adapters.hook_points import HookTable, TowerName
from sae_lens_multimodal.adapters.registry import find_family
from sae_lens_multimodal.errors import ModelLoadError
from sae_lens_multimodal.types import Conversation

logger = logging.getLogger(__name__)

TASK = "image-text-to-text"


def load_model(
    name_or_module: str | PathLike[str] | nn.Module,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    processor: Any = None,  # noqa: ANN401 - a processor object, or a name or folder of one
    trust_remote_code: bool = False,
    family: str | None = None,
    **from_pretrained_kwargs: Any,  # noqa: ANN401 - passed on to transformers
) -> VisionLanguageModel:
    """Load a vision-language model.

    Args:
        name_or_module: a Hugging Face hub name, a folder, or a model that is loaded already.
        device: where to put it; by default the CPU, or where a loaded model is. Leave it out with `device_map`.
        dtype: the type of its weights; by default the checkpoint's, or what a loaded model has.
        processor: the processor, or its name or folder, if it is not the model's own.
        trust_remote_code: run Python code that comes with the checkpoint.
        family: the adapter to use; by default the one for `config.model_type`. `"generic"` takes models without one:
            tokens of pictures are then told from text, but have no boxes.
        **from_pretrained_kwargs: passed on to transformers (`attn_implementation`, `device_map`, `revision`,
            `quantization_config`, …).

    Raises:
        ModelLoadError: model or processor cannot be found or read, or this machine lacks the device.
        UnsupportedModelError: there is no adapter for its family.

    Example:
        >>> from sae_lens_multimodal.scenes import model_folder
        >>> model = load_model(model_folder())
        >>> model.hooks.resolve("blocks.2.hook_resid_post").module_path
        'model.language_model.layers.2'
    """
    check_device(device)
    shared = {key: from_pretrained_kwargs[key] for key in _SHARED_KWARGS if key in from_pretrained_kwargs}
    shared["trust_remote_code"] = trust_remote_code
    if isinstance(name_or_module, nn.Module):
        name = str(getattr(name_or_module, "name_or_path", "") or type(name_or_module).__name__)
        config: Any = name_or_module.config
    else:
        name = fspath(name_or_module)
        config = _load(AutoConfig, name, "configuration", **shared)
    adapter = find_family(family or str(config.model_type), name=name)
    if not isinstance(name_or_module, nn.Module):
        module = _load_module(name, device, dtype, trust_remote_code, from_pretrained_kwargs)
    elif device is not None or dtype is not None:
        module = _placed(name_or_module, device, _as_dtype(dtype))
    else:
        module = name_or_module
    if processor is None or isinstance(processor, (str, PathLike)):
        source = name if processor is None else fspath(processor)
        processor = _load(adapter.processor_class(config), source, "processor", **shared)
    return VisionLanguageModel(module.eval(), processor=processor, family=adapter.of(module, processor), name=name)


_SHARED_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def _load(auto_class: Any, name: str, what: str, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers' own
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelLoadError(
            f"cannot load the {what} of {name!r}: {first_line} Expected the hub name of a vision-language model that "
            "can be reached, or a folder with one."
        ) from error


def _load_module(
    name: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    trust_remote_code: bool,
    kwargs: dict[str, Any],
) -> nn.Module:
    if "device_map" in kwargs and device is not None:
        raise ModelLoadError("got both device and device_map; expected one of them.")
    module: nn.Module = _load(
        AutoModelForImageTextToText,
        name,
        "weights",
        dtype=_as_dtype(dtype) or "auto",
        trust_remote_code=trust_remote_code,
        **kwargs,
    )
    return module if "device_map" in kwargs else _placed(module, device or "cpu")


def check_device(device: str | torch.device | None) -> None:
    """Check that tensors can be put on a device; None is any.

    Raises:
        ModelLoadError: there is no such device on this machine.
    """
    try:
        torch.empty(0, device=device)
    # torch says it in all of these ways, by kind of device and build
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ModelLoadError(
            f"got device={str(device)!r}, which this machine or build of torch does not have; expected one such as "
            f"{_known_devices()}."
        ) from error


def _known_devices() -> str:
    found = ["'cpu'"]
    if torch.cuda.is_available():
        found += [f"'cuda:{index}'" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("'mps'")
    return " or ".join(found)


def _placed(module: nn.Module, device: str | torch.device | None, dtype: torch.dtype | None = None) -> nn.Module:
    try:
        return module.to(device=device, dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(
            f"the model does not fit into the memory of {device}; give dtype='bfloat16', device_map='auto' or another "
            "device."
        ) from error


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ModelLoadError(f"got dtype={dtype!r}; expected the name of a torch type such as 'bfloat16'.")
    return found


class VisionLanguageModel(TransformersModel):
    """An nnsight model (`trace`, `generate`, `edit`, `scan` are nnsight's own) with what pictures need.

    Use `load_model` to make one.
    """

    _batcher_class = MediaBatcher

    def __init__(self, module: nn.Module, *, processor: Any, family: Family, name: str) -> None:  # noqa: ANN401
        """Wrap a loaded model."""
        self.family = family
        self.name = name
        placed = {} if getattr(module, "hf_device_map", None) else {"device": _device_of(module)}
        super().__init__(
            module,
            task=TASK,
            processor=processor,
            interleaver=LocatedInterleaver(fragments=TPFragments()),
            **placed,
        )
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._configure_tokenizer()
        self._hook_table = HookTable(family.hook_points(), _towers(module, family), family.old_paths)
        self._expose_operations()

    @property
    def hooks(self) -> HookPoints:
        """The model's hooks by name."""
        # made anew, so that an edited copy of the model gives its own
        return HookPoints(self, self._hook_table)

    @property
    def n_layers(self) -> int:
        """Number of blocks of the language model."""
        return self.family.n_layers

    @property
    def d_model(self) -> int:
        """Width of the language model's residual stream."""
        return self.family.d_model

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        parameter: Tensor = next(self._module.parameters())
        return parameter.dtype

    def encode(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        add_generation_prompt: bool | None = None,
        padding_side: Literal["left", "right"] = "left",
    ) -> EncodedBatch:
        """Encode one conversation, or several as one batch, on the CPU; see `adapters.encode.encode`."""
        return encode(
            self.family, conversations, add_generation_prompt=add_generation_prompt, padding_side=padding_side
        )

    def answer(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        max_new_tokens: int = 32,
        batch_size: int = 8,
    ) -> list[str]:
        """Answer each conversation greedily, with the model's edits if it has any.

        Raises:
            PromptError, ImageError, LayoutError: as `encode`.
        """
        single = len(conversations) > 0 and isinstance(conversations[0], Mapping)
        rows: Sequence[Any] = [conversations] if single else conversations
        answers: list[str] = []
        for start in range(0, len(rows), batch_size):
            batch = self.encode(rows[start : start + batch_size], add_generation_prompt=True)
            answers += self.answer_batch(batch, max_new_tokens=max_new_tokens)
        return answers

    @torch.no_grad()
    def answer_batch(self, batch: EncodedBatch, *, max_new_tokens: int = 32) -> list[str]:
        """Answer each prompt of a batch that `encode` made with `add_generation_prompt=True`, as `answer` does."""
        with warnings.catch_warnings():
            # an edit that holds for all steps ends with the generation, by design
            warnings.filterwarnings("ignore", message=".*was never reached: the loop asked", category=UserWarning)
            tokens = self.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        new = tokens[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def token_strings(self, input_ids: Int[Tensor, " seq"] | Sequence[int]) -> list[str]:
        """Return each token of one row as readable text."""
        ids = torch.as_tensor(input_ids).reshape(-1).tolist()
        return [_readable(self.tokenizer, token) for token in self.tokenizer.convert_ids_to_tokens(ids)]

    def prepare_invoke(self, invoke: Invoke) -> Invoke:
        """Encode an invoke's chat messages or processor arguments; leave model inputs and plain text as they are."""
        inputs, kwargs = invoke
        data: Any = inputs[0] if inputs else None
        with unset_fake_temporarily():
            if processing.as_chats(data) is not None:
                return (), {**self.encode(data), **kwargs}
            media = processing.as_processor_encoding(self, data, kwargs)
        return invoke if media is None else ((), media)

    def _expose_operations(self) -> None:
        """Let nnsight rewrite the forwards that have hooks inside of them, once and before anything runs.

        It would do so by itself when such a hook is first used, which is too late if that forward is running by then.
        """
        for path in dict.fromkeys(point.module_path for point in self.hooks.points() if point.operation is not None):
            try:
                self.get(path).source  # noqa: B018 - reading it is what rewrites
            except SourceNotAvailable as error:
                logger.info("no hooks within %s: %s", path, error)

    def _batch(self, invokes: list[Invoke], fn: Any) -> tuple[Any, ...]:  # noqa: ANN401 - nnsight's signature
        if getattr(fn, "__name__", None) == "pipe":
            return tuple(super()._batch(invokes, fn))
        if len(invokes) > 1 and any(self.family.media_rows(kwargs) for _, kwargs in invokes):
            args: tuple[Any, ...] = ()
            kwargs = join_invokes(self, self.family, invokes)
        else:
            args, kwargs = super()._batch(invokes, fn)
        if detect_fake_mode() is None:
            return args, self._with_positions(kwargs)
        with unset_fake_temporarily():
            return args, self.family.scan_inputs(kwargs)

    def _with_positions(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Count positions from each row's first token, which transformers' own forward does not do."""
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        given = "position_ids" in inputs or inputs.get("past_key_values") is not None
        if given or mask is None or ids is None or mask.shape != ids.shape:
            return inputs
        position_ids = self.family.positions(inputs)
        return inputs if position_ids is None else {**inputs, "position_ids": position_ids}


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _towers(module: nn.Module, family: Family) -> dict[str, TowerName]:
    known = [(point.module_path, point.tower) for point in family.hook_points()]
    vision = tuple(family.media_modules)

    def tower(path: str) -> TowerName:
        named = next((tower for place, tower in known if place == path), None)
        if named is not None:
            return named
        return "vision" if any(path == root or path.startswith(f"{root}.") for root in vision) else "language"

    return {path: tower(path) for path, _ in module.named_modules() if path}


def _readable(tokenizer: Any, token: str) -> str:  # noqa: ANN401 - any transformers tokenizer
    if token.startswith("▁"):
        return token.replace("▁", " ")
    return str(tokenizer.convert_tokens_to_string([token])) or token

"""The settings of one training run: SAE-Lens's runner configuration, with what images add to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.util import str_to_dtype

from sae_lens_multimodal.data.batches import EncodingSettings, TooLong
from sae_lens_multimodal.data.mixture import StopRule, read_settings
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.checkpoint import LATEST, run_id
from sae_lens_multimodal.training.sae_config import build_sae_config
from sae_lens_multimodal.training.typed_fields import as_mapping, typed_fields

SAEConfigT = TypeVar("SAEConfigT", bound=TrainingSAEConfig, covariant=True)

ImageTokens = Literal["all", "base", "tiles"]
MODEL_CLASS_NAME = "VisionLanguageModel"
SHARE_NAMES = ("image", "text")

_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_class_name": (
        lambda value: value == MODEL_CLASS_NAME,
        f"models are loaded as {MODEL_CLASS_NAME}; leave it out and give model_name (a hub name or folder).",
    ),
    "is_dataset_tokenized": (
        lambda value: value is False,
        "pictures and text are encoded while training; give a dataset with its raw text and image columns.",
    ),
    "hook_head_index": (
        lambda value: value is None,
        "single heads are not cut out; train on the whole hook, such as 'blocks.N.hook_attn_out'.",
    ),
    "seqpos_slice": (
        lambda value: tuple(value) == (None,),
        "positions mean little where images have different numbers of tokens; choose tokens with token_shares and "
        "image_tokens.",
    ),
    "prepend_bos": (
        lambda value: value is False,
        "the model's chat template says where a prompt begins; leave it out.",
    ),
    "sequence_separator_token": (
        lambda value: value is None,
        "prompts are never joined; leave it out.",
    ),
    "exclude_special_tokens": (
        lambda value: value is True or isinstance(value, list),
        "special tokens are always left out; leave it out, or list further token ids to leave out.",
    ),
    "disable_concat_sequences": (
        lambda value: value is False,
        "prompts are never joined and short ones are kept; leave it out.",
    ),
    "hook_eval": (
        lambda value: value == "NOT_IN_USE",
        "SAE-Lens itself no longer uses it; leave it out.",
    ),
    "dead_feature_threshold": (
        lambda value: value == LanguageModelSAERunnerConfig.dead_feature_threshold,
        "SAE-Lens itself does not use it; a feature counts as dead after dead_feature_window steps without firing.",
    ),
    "llm_compilation_mode": (
        lambda value: value is None,
        "a traced model cannot be compiled; compile_sae and sae_compilation_mode work.",
    ),
    "compile_llm": (
        lambda value: value is False,
        "a traced model cannot be compiled; compile_sae works.",
    ),
    "model_kwargs": (
        lambda value: not value,
        "the model is called by nnsight; settings for loading it go into model_from_pretrained_kwargs.",
    ),
    "dataset_trust_remote_code": (
        lambda value: not value,
        "the datasets library no longer runs code of a dataset; convert the dataset to Parquet or JSON.",
    ),
}
"""Fields of SAE-Lens that mean nothing here: which value is accepted, and what to do instead."""


@dataclass(kw_only=True)
class MultimodalSAERunnerConfig(LanguageModelSAERunnerConfig[SAEConfigT], Generic[SAEConfigT]):
    """Everything a training run needs, as SAE-Lens spells it, plus the choice of tokens.

    Fields that are not listed here mean what they mean in SAE-Lens. `n_batches_in_buffer` counts training batches of
    `train_batch_size_tokens`; `n_eval_batches` batches of prompts are held out for evaluation.

    Raises:
        ConfigError: a value cannot work, or the field means nothing for prompts with pictures.
    """

    model_name: str = ""
    """Hub name or folder of the vision-language model."""
    model_class_name: str = MODEL_CLASS_NAME
    hook_name: str = ""
    """Where to read: a TransformerLens hook name such as `blocks.24.hook_resid_post`, or a module path."""
    dataset_subset: str | None = None
    """Configuration of a hub dataset that has several."""
    image_folder: str | None = None
    """Where relative picture paths in the dataset begin; the working folder if None."""
    split: str = "train"
    """Split of the dataset to train on."""
    dataset_mixture: list[dict[str, Any]] | None = None
    """Several datasets in place of `dataset_path`: a list of `{path: ..., weight: ...}`, each with `split`, `subset`,
    `image_folder` or `streaming` where they differ. At every row one is drawn by its weight, from the seed."""
    mixture_stop: StopRule = "all_exhausted"
    """When an epoch of the mixture ends, and what becomes of a dataset that ends before: see `data.mixture.Mixture`."""
    token_shares: dict[str, float] | None = None
    """Share of each modality in every training batch, such as `{"image": 0.5, "text": 0.5}`; None: as they come."""
    image_tokens: ImageTokens = "all"
    """Which image tokens: all, those of the base view only, or those of the high-resolution tiles only."""
    newline_tokens: bool = False
    """Whether the separators between rows of patches are trained on too; they count as image tokens."""
    max_norm_ratio: float | None = None
    """Leave out tokens whose norm is more than so many times the median norm of their modality; None keeps all."""
    balanced_threshold: bool = True
    """Whether a BatchTopK SAE is saved with thresholds that let `k` features fire on a token of each modality; False
    saves one threshold, with which `k` fire on average over all tokens."""
    strict: bool = False
    """Whether a row that cannot be read stops the run; otherwise it is skipped and counted."""
    too_long: TooLong = "drop"
    """What becomes of prompts of more than `context_size` tokens: they are left out, or with "truncate" cut after the
    last token or whole picture that fits. Either is counted."""
    n_data_workers: int = 2
    """How many threads open pictures, and how many encode prompts, while the model runs; 0 for none. The batches are
    the same whatever it is."""
    shuffle_buffer_rows: int = 0
    """How many rows of a streamed dataset to shuffle among; other datasets are shuffled whole."""
    eval_losses: bool = True
    """Whether the final evaluation also measures cross-entropy and KL with the reconstruction spliced in: ten further
    passes of the held-out prompts through the whole model."""
    overwrite: bool = False
    """Whether files of an earlier run in `output_path` may be replaced."""
    progress: bool = True
    """Whether to draw a progress bar on stderr."""

    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    is_dataset_tokenized: bool = False
    dataset_trust_remote_code: bool = False
    context_size: int = 4096
    """Longest prompt in tokens, image tokens included; `too_long` says what becomes of longer ones."""
    store_batch_size_prompts: int = 8
    n_eval_batches: int = 8
    prepend_bos: bool = False
    sequence_separator_token: int | Literal["bos", "eos", "sep"] | None = None
    exclude_special_tokens: bool | list[int] = True
    n_batches_for_norm_estimate: int = 100
    logger: LoggingConfig = field(default_factory=lambda: LoggingConfig(log_to_wandb=False))
    verbose: bool = False

    def __post_init__(self) -> None:
        """Check every field, then let SAE-Lens fill in what follows from others."""
        self.seqpos_slice: tuple[int | None, ...] = tuple(self.seqpos_slice)
        _check_refused(self)
        _check_sizes(self)
        check_token_shares(self.token_shares, self.train_batch_size_tokens)
        _check_data(self)
        if self.image_tokens not in get_args(ImageTokens):
            raise ConfigError(f"image_tokens is {self.image_tokens!r}; expected one of {list(get_args(ImageTokens))}.")
        try:
            str_to_dtype(self.dtype)
            folder: str | None = self.checkpoint_path  # type: ignore[has-type]
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.resume_from_checkpoint == LATEST:
            if folder is None:
                raise ConfigError("resume_from_checkpoint='latest' finds checkpoints below checkpoint_path; give one.")
            # Not a new name at each start, as SAE-Lens has it, but one for all starts of this run.
            self.checkpoint_path = f"{folder}/{run_id(self.to_dict())}"
        self.tokens_per_buffer = self.train_batch_size_tokens * self.n_batches_in_buffer

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        content: dict[str, Any] = super().to_dict()
        content["seqpos_slice"] = list(self.seqpos_slice)
        loading = self.model_from_pretrained_kwargs or {}
        content["model_from_pretrained_kwargs"] = {name: _as_json(value) for name, value in loading.items()}
        return content

    @classmethod
    def from_dict(cls, cfg_dict: Mapping[str, Any]) -> MultimodalSAERunnerConfig[Any]:
        """Build the configuration from `to_dict`'s mapping, or from one that leaves fields at their defaults.

        Raises:
            ConfigError: an unknown field, a value of the wrong type, or one that cannot work.
        """
        config = build_config(cfg_dict)
        if "checkpoint_path" in cfg_dict:
            # A new run gets a folder of its own below `checkpoint_path`; a recorded one already has it.
            config.checkpoint_path = cfg_dict["checkpoint_path"]
        return config

    @property
    def eval_batch_prompts(self) -> int:
        """Prompts in one batch of the evaluation."""
        return self.eval_batch_size_prompts or self.store_batch_size_prompts

    @property
    def n_eval_prompts(self) -> int:
        """How many prompts are held out of training to evaluate on."""
        return self.n_eval_batches * self.eval_batch_prompts


def build_config(content: Mapping[str, Any]) -> MultimodalSAERunnerConfig[Any]:
    """Build the configuration from plain values, each brought to its field's type.

    Raises:
        ConfigError: a field is unknown, missing, of the wrong type, or cannot work.
    """
    values = typed_fields(MultimodalSAERunnerConfig, {**content, "sae": None, "logger": None}, prefix="")
    values["sae"] = build_sae_config(content.get("sae"))
    logging = content.get("logger")
    if logging is None:
        del values["logger"]
    else:
        values["logger"] = LoggingConfig(**typed_fields(LoggingConfig, as_mapping("logger", logging), prefix="logger."))
    for name in ("llm_device", "act_store_device"):
        # SAE-Lens writes an absent device as the text 'None'.
        if values.get(name) == "None":
            values[name] = None
    return MultimodalSAERunnerConfig(**values)


def check_token_shares(shares: Mapping[str, float] | None, batch_tokens: int) -> None:
    """Check that shares name known modalities, add up to one, and give each at least one token of a batch.

    Raises:
        ConfigError: they do not.
    """
    if shares is None:
        return
    unknown = sorted(set(shares) - set(SHARE_NAMES))
    if unknown:
        raise ConfigError(f"token_shares names {unknown}; expected shares for {list(SHARE_NAMES)} only.")
    if any(not math.isfinite(share) or share < 0 for share in shares.values()):
        raise ConfigError(f"token_shares is {dict(shares)}; shares must not be negative.")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ConfigError(
            f"token_shares is {dict(shares)}, which adds up to {sum(shares.values()):g}; it must add up to 1."
        )
    starved = [name for name, share in shares.items() if 0 < share * batch_tokens < 1]
    if starved:
        raise ConfigError(
            f"token_shares gives {starved[0]!r} less than one token in a batch of {batch_tokens}; raise the share or "
            "train_batch_size_tokens."
        )


def _as_json(value: Any) -> Any:  # noqa: ANN401 - whatever transformers takes
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, str | int | float | bool | dict | list | None) else str(value)


def _check_refused(config: MultimodalSAERunnerConfig[Any]) -> None:
    for name, (accepts, instead) in _REFUSED.items():
        value = getattr(config, name)
        if not accepts(value):
            raise ConfigError(f"{name}={value!r} cannot be used for a vision-language model: {instead}")


def _check_data(config: MultimodalSAERunnerConfig[Any]) -> None:
    EncodingSettings(config.context_size, config.too_long).check()
    if config.mixture_stop not in get_args(StopRule):
        raise ConfigError(f"mixture_stop is {config.mixture_stop!r}; expected one of {list(get_args(StopRule))}.")
    if config.dataset_mixture is None:
        return
    read_settings(config.dataset_mixture)
    if config.dataset_path:
        raise ConfigError(
            f"Got dataset_path={config.dataset_path!r} and dataset_mixture; give one of them, or put the path into the "
            "mixture with a weight."
        )


def _check_sizes(config: MultimodalSAERunnerConfig[Any]) -> None:
    at_least_one = ("train_batch_size_tokens", "store_batch_size_prompts", "n_batches_in_buffer", "context_size")
    at_least_zero = ("n_eval_batches", "shuffle_buffer_rows", "n_checkpoints", "prefetch_llm_batches", "n_data_workers")
    for names, smallest in ((at_least_one, 1), (at_least_zero, 0)):
        for name in names:
            if getattr(config, name) < smallest:
                raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least {smallest}.")
    if config.training_tokens < config.train_batch_size_tokens:
        raise ConfigError(
            f"training_tokens is {config.training_tokens}, less than one batch of {config.train_batch_size_tokens} "
            "tokens; raise it or lower train_batch_size_tokens."
        )
    if not 0 <= config.activations_mixing_fraction < 1:
        raise ConfigError(
            f"activations_mixing_fraction is {config.activations_mixing_fraction}; it must be at least 0 and below 1."
        )
    if config.max_norm_ratio is not None and config.max_norm_ratio < 1:
        raise ConfigError(
            f"max_norm_ratio is {config.max_norm_ratio}; it must be at least 1; 10 leaves out outliers only."
        )
    if config.lr <= 0:
        raise ConfigError(f"lr is {config.lr}; it must be above 0.")
    if config.sae.d_sae < 1:
        raise ConfigError(f"sae.d_sae is {config.sae.d_sae}; it must be at least 1.")
    if config.eval_batch_size_prompts is not None and config.eval_batch_size_prompts < 1:
        raise ConfigError(f"eval_batch_size_prompts is {config.eval_batch_size_prompts}; it must be at least 1.")

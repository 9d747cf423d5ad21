"""SAE-Lens autoencoders next to a model: do they fit, and their encoder and decoder on tokens."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, SAEConfig, TrainingSAE
from sae_lens.saes.topk_sae import TopK
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import FeatureError, SAEMismatchError
from sae_lens_multimodal.hooks import concept_sae as concept_sae  # so that SAE-Lens can load saved concept dictionaries

CHUNK_TOKENS = 4096
"""Tokens that are encoded at once: at 131 072 features in float32 these are 2 GiB."""

_RESHAPING = ("reshape_fn_in", "reshape_fn_out", "d_head", "hook_z_reshaping_mode")
_NOT_TOKEN_WISE = ("temporal",)
_HUB_CACHE = re.compile(r"models--(?:.+--)?([^/]+)/snapshots/[^/]+/?$")
"""A folder of the hub's cache, which is named after a revision."""
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def check_sae(model: VisionLanguageModel, sae: SAE[Any], hook_name: str | None = None) -> str:
    """Check that an SAE can be used at a hook of a model, and say which.

    Args:
        model: The model.
        sae: Any SAE-Lens SAE that maps each token by itself back into the space it came from.
        hook_name: The hook; None for the one the SAE was trained on.

    Returns:
        The hook's canonical name.

    Raises:
        SAEMismatchError: the SAE names no hook, has another width than the hook, was trained on another model, or is a
            transcoder or an architecture that looks at more than one token.
        UnknownHookError: the model has no such hook.
    """
    name = hook_name or sae.cfg.metadata.hook_name
    if not name:
        raise SAEMismatchError(
            "The SAE's metadata names no hook; pass hook_name=..., such as blocks.2.hook_resid_post."
        )
    hook = model.hooks.resolve(name)
    architecture = sae.cfg.architecture()
    if architecture in _TRANSCODERS:
        raise SAEMismatchError(
            f"Got a {architecture}, which maps one hook to another; expected an SAE, which maps {name} to itself."
        )
    if architecture in _NOT_TOKEN_WISE:
        raise SAEMismatchError(
            f"Got an SAE of the architecture {architecture}, which needs whole sequences; expected one that encodes "
            "each token by itself."
        )
    if hook.d is not None and hook.d != sae.cfg.d_in:
        raise SAEMismatchError(
            f"The SAE {_describe(sae)} has d_in={sae.cfg.d_in}, but {hook.name} of {model.name} has width {hook.d}; "
            "use the SAE trained on this model and hook, or pass the right hook_name."
        )
    trained_on = sae.cfg.metadata.model_name
    if trained_on and not same_model(trained_on, model.name):
        raise SAEMismatchError(
            f"The SAE was trained on {trained_on}, but the model is {model.name}; load the model it was trained on, or "
            "set sae.cfg.metadata.model_name = model.name if the SAE is meant for this one."
        )
    return str(hook.name)


def same_model(one: str, other: str) -> bool:
    """Whether two hub names or folders name one model, as far as names can tell: by their last part.

    >>> same_model("llava-hf/Llava-1.5-7b", "/models/llava-1.5-7b/")
    True
    """
    return _short_name(one) == _short_name(other)


def _short_name(name: str) -> str:
    path = name.replace("\\", "/")
    cached = _HUB_CACHE.search(path)
    # A relative folder such as "." says its name only once it is resolved.
    last = cached.group(1) if cached else Path(path).name or Path(path).resolve().name
    return last.lower()


def _describe(sae: SAE[Any]) -> str:
    metadata = sae.cfg.metadata
    if metadata.model_name or metadata.hook_name:
        return f"of {metadata.hook_name or 'an unnamed hook'} of {metadata.model_name or 'an unnamed model'}"
    return f"({sae.cfg.architecture()}, {sae.cfg.d_sae} features)"


def check_features(sae: SAE[Any], features: Sequence[int]) -> list[int]:
    """Check that all features exist.

    Raises:
        FeatureError: a feature is not an integer of 0 .. d_sae - 1.
    """
    return [_check_feature(sae, feature) for feature in features]


def _check_feature(sae: SAE[Any], feature: Any) -> int:  # noqa: ANN401 - whatever a caller gives
    try:
        number = -1 if isinstance(feature, bool) else operator.index(feature)
    except TypeError:
        number = -1
    if not 0 <= number < sae.cfg.d_sae:
        raise FeatureError(f"Got feature {feature!r}; expected an integer from 0 to {sae.cfg.d_sae - 1}.")
    return number


@torch.no_grad()
def inference_sae(sae: SAE[Any], *, copy: bool = False) -> SAE[Any]:
    """Return the SAE that SAE-Lens would save: an SAE in training may look at the whole batch, a saved one does not.

    An SAE that is not in training is returned as it is.

    Args:
        sae: The SAE.
        copy: Copy the weights of an SAE in training, so that further training leaves the result alone; otherwise they
            are shared as far as SAE-Lens does not fold them.
    """
    if not isinstance(sae, TrainingSAE):
        return sae
    state = {name: tensor.clone() if copy else tensor for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    # Built on the meta device, as SAE-Lens does when loading, so that no second set of weights is initialised.
    config = SAEConfig.from_dict({**sae.cfg.get_inference_sae_cfg_dict(), "device": "meta"})
    plain: SAE[Any] = SAE.get_sae_class_for_architecture(config.architecture())(config)
    plain.process_state_dict_for_loading(state)
    plain.load_state_dict(state, assign=True)
    return plain.to(device=sae.W_dec.device).eval()


def encode_chunks(
    sae: SAE[Any], acts: Float[Tensor, "tokens d_in"], chunk_tokens: int = CHUNK_TOKENS, *, keep_sparse: bool = False
) -> Iterator[tuple[slice, Float[Tensor, "chunk d_sae"]]]:
    """Encode tokens a few at a time, so that no more than `chunk_tokens` by `d_sae` values exist at once.

    SAE-Lens's own `encode` does the work: normalisation, decoder bias, precision and device are the SAE's.

    Args:
        sae: The SAE.
        acts: Activations of tokens, heads flattened.
        chunk_tokens: Tokens encoded at once.
        keep_sparse: Leave what a top-k SAE finds as a sparse tensor, rather than fill and search rows of zeros.

    Yields:
        Which tokens, and their feature activations, dense (or sparse and uncoalesced, ordered by token).
    """
    plain = inference_sae(sae)
    for start in range(0, len(acts), chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, len(acts)))
        with _flat_heads(plain), _sparse_topk(plain, keep_sparse):
            encoded = plain.encode(acts[chunk].to(plain.W_dec.device))
        yield chunk, encoded if keep_sparse or not encoded.is_sparse else encoded.to_dense()


def encode_tokens(
    sae: SAE[Any],
    acts: Float[Tensor, "*batch d_in"],
    chunk_tokens: int = CHUNK_TOKENS,
    *,
    features: Sequence[int] | Int[Tensor, " features"] | None = None,
) -> Float[Tensor, "*batch features"]:
    """Encode tokens, keeping all features or some.

    Args:
        sae: The SAE.
        acts: Activations; any leading dimensions. Heads must be flattened into one dimension.
        chunk_tokens: Tokens encoded at once.
        features: The features to keep; None for all. With a few, memory stays at `chunk_tokens` by `d_sae` however
            many tokens there are.

    Returns:
        Feature activations in the SAE's precision, on the activations' device.
    """
    flat = acts.reshape(-1, acts.shape[-1])
    chosen = None if features is None else torch.as_tensor(features, dtype=torch.long, device=sae.W_dec.device)
    width = sae.cfg.d_sae if chosen is None else len(chosen)
    pieces = [
        (encoded if chosen is None else encoded[:, chosen]).to(acts.device)
        for _, encoded in encode_chunks(sae, flat, chunk_tokens)
    ]
    encoded = torch.cat(pieces) if pieces else torch.zeros(0, width, dtype=sae.dtype, device=acts.device)
    return encoded.reshape(*acts.shape[:-1], width)


def reconstruct_tokens(
    sae: SAE[Any],
    acts: Float[Tensor, "tokens d_in"],
    change: Callable[[Tensor], Tensor] = lambda encoded: encoded,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Float[Tensor, "tokens d_in"]:
    """Encode tokens, change their feature activations, and decode them, by SAE-Lens's own `encode` and `decode`.

    Returns:
        The reconstruction in the SAE's precision, on the activations' device.
    """
    plain = inference_sae(sae)
    pieces = []
    for start in range(0, len(acts), chunk_tokens):
        with _flat_heads(plain):
            # SAE-Lens keeps the norms of what was encoded last for the decoder, so the two go together.
            encoded = _encode(plain, acts[start : start + chunk_tokens])
            pieces.append(plain.decode(change(encoded)).to(acts.device))
    return torch.cat(pieces) if pieces else acts.to(sae.dtype)


def decoder_directions(sae: SAE[Any], features: Sequence[int]) -> Float[Tensor, "features d_in"]:
    """What one unit of each feature adds to the reconstruction, before the SAE undoes its input normalisation."""
    plain = inference_sae(sae)
    directions: Tensor = plain.W_dec
    if features != range(sae.cfg.d_sae):  # all of a wide SAE's are gigabytes to copy
        directions = directions[torch.as_tensor(features, dtype=torch.long, device=directions.device)]
    if getattr(plain.cfg, "rescale_acts_by_decoder_norm", False):
        directions = directions / directions.norm(dim=-1, keepdim=True)
    return directions


def output_scale(sae: SAE[Any], acts: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens 1"] | None:
    """By how much a change in the SAE's normalised space is stretched in the model's; None where they are the same."""
    values = acts.to(sae.dtype)
    match sae.cfg.normalize_activations:
        case "layer_norm":
            return (values - values.mean(dim=-1, keepdim=True)).std(dim=-1, keepdim=True)
        case "constant_norm_rescale":
            return values.norm(dim=-1, keepdim=True) / sae.cfg.d_in**0.5
        case _:
            return None


def _encode(sae: SAE[Any], acts: Tensor) -> Tensor:
    encoded = sae.encode(acts.to(sae.W_dec.device))
    return encoded.to_dense() if encoded.is_sparse else encoded


@contextmanager
def _sparse_topk(sae: SAE[Any], wanted: bool) -> Iterator[None]:
    """Let a top-k SAE give its activations as a sparse tensor, and leave it as it was found."""
    activation = sae.activation_fn
    if not (wanted and isinstance(activation, TopK)):
        yield
        return
    before = activation.use_sparse_activations
    activation.use_sparse_activations = True
    try:
        # SAE-Lens makes the indices from torch.topk; to have them checked would cost what is saved.
        with torch.sparse.check_sparse_tensor_invariants(False):
            yield
    finally:
        activation.use_sparse_activations = before


@contextmanager
def _flat_heads(sae: SAE[Any]) -> Iterator[None]:
    """Let an SAE of attention heads take heads that are already flattened, and leave it as it was found."""
    # Not all of them exist before the SAE's first call.
    before = {name: vars(sae)[name] for name in _RESHAPING if name in vars(sae)}
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        for name in _RESHAPING:
            vars(sae).pop(name, None)
        vars(sae).update(before)

"""Reading SAEs that others published in the layout of EleutherAI's sparsify, such as the LLaVA-NeXT paper's of 131k."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.files import read_json

LLAVA_NEXT_131K = "lmms-lab/llama3-llava-next-8b-hf-sae-131k"
"""The SAE of "Large Multi-modal Models Can Interpret Features in Large Multi-modal Models" (arXiv 2411.14982)."""
CFG_NAME = "cfg.json"
WEIGHTS_NAME = "sae.safetensors"
_LAYER = re.compile(r"(?:^|[._])layers[._](\d+)$")
_MODELS = {LLAVA_NEXT_131K: "llava-hf/llama3-llava-next-8b-hf"}
_CANNOT = {
    "transcode": "it maps one hook to another",
    "skip_connection": "it adds a linear map of its input",
    "signed": "its features may be negative",
}


def load_published_sae(
    source: str | Path,
    *,
    layer: str | None = None,
    model_name: str | None = None,
    hook_name: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SAE[Any]:
    """Read a TopK SAE of the sparsify layout as an SAE-Lens SAE.

    There z = TopK(W (x - b_dec) + b) and x' = z D + b_dec, with W and D of [features, width]; SAE-Lens's `W_enc` is the
    transpose of W. Zero and negative values among the largest k do not fire, as in the original's ReLU.
    SAE-Lens's own loader for this layout reads weights in bfloat16, transposes the decoder and may leave out `b_dec`.

    Args:
        source: a hub name, such as `LLAVA_NEXT_131K`, or a folder.
        layer: which SAE, where there are several: the name of its folder, such as `model.layers.24`.
        model_name: the model it was trained on; None for what is known of it.
        hook_name: where it reads; None for the output of the block that the folder's name says.
        device: where to put it.
        dtype: its precision.

    Raises:
        StoreError: it cannot be found, or is not of this layout.
        ConfigError: it is of a kind that SAE-Lens's TopK SAE is not, or its hook cannot be told from its name.
    """
    folder = _find(source, layer)
    settings = read_json(folder / CFG_NAME)
    for name, why in _CANNOT.items():
        if settings.get(name):
            raise ConfigError(f"{folder} has {name} set: {why}; only plain TopK SAEs can be read.")
    if settings.get("activation", "topk") != "topk":
        raise ConfigError(f"{folder} has activation {settings['activation']!r}; only 'topk' can be read.")
    d_in, k = _number(folder, settings, "d_in"), _number(folder, settings, "k")
    d_sae = settings.get("num_latents") or d_in * _number(folder, settings, "expansion_factor")
    metadata = SAEMetadata(
        model_name=model_name or _MODELS.get(str(source)),
        hook_name=hook_name or _hook_of(folder),
        sae_lens_multimodal={"imported_from": str(source), "layer": folder.name, "settings": settings},
    )
    sae = TopKSAE(
        TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device="meta", apply_b_dec_to_input=True, metadata=metadata)
    )
    weights = _weights(folder, d_in, d_sae)
    sae.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    sae.cfg.dtype, sae.cfg.device = str(dtype), device
    sae.dtype = dtype
    return sae.to(device=device).eval()


def _find(source: str | Path, layer: str | None) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _download(str(source), layer)
    if layer is not None and folder.name != layer:
        folder = folder / layer
    if (folder / CFG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
        return folder
    inside = sorted(path.parent.name for path in folder.glob(f"*/{WEIGHTS_NAME}")) if layer is None else []
    if len(inside) == 1:
        return folder / inside[0]
    if inside:
        raise StoreError(f"{source} holds several SAEs; choose one with layer=..., of: {', '.join(inside)}.")
    raise StoreError(f"{folder} has no {CFG_NAME} and {WEIGHTS_NAME}; expected an SAE in the layout of sparsify.")


def _download(name: str, layer: str | None) -> Path:
    files = [f"{layer}/{file}" if layer else f"*{file}" for file in (CFG_NAME, WEIGHTS_NAME)]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise StoreError(
            f"{name} is no folder and cannot be downloaded ({' '.join(str(error).split())[:200]}); give a folder or a "
            "hub name."
        ) from error


def _number(folder: Path, settings: dict[str, Any], name: str) -> int:
    value = settings.get(name)
    if not isinstance(value, int) or value < 1:
        raise StoreError(f"{folder / CFG_NAME} has {name}={value!r}; expected a whole number above 0.")
    return value


def _hook_of(folder: Path) -> str:
    found = _LAYER.search(folder.name)
    if found is None:
        raise ConfigError(
            f"The name {folder.name!r} does not say where the SAE reads; pass hook_name=..., such as "
            "'blocks.24.hook_resid_post'."
        )
    # sparsify hooks a module's output: that of block 24 is the residual stream after it.
    return f"blocks.{found.group(1)}.hook_resid_post"


def _weights(folder: Path, d_in: int, d_sae: int) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read ({error}).") from error
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, shape in shapes.items():
        has = tuple(found[name].shape) if name in found else None
        if has != shape:
            raise StoreError(f"{path} holds {name} of shape {has}; expected {shape} as its {CFG_NAME} says.")
    return {
        "W_enc": found["encoder.weight"].T.contiguous(),
        "b_enc": found["encoder.bias"],
        "W_dec": found["W_dec"],
        "b_dec": found["b_dec"],
    }
